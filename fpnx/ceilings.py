"""What the machine could do at best: a large matrix product, and writing to the disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from fpnx.stopwatch import Stopwatch

__all__ = ["MatrixProduct", "write_speed"]

LONG_ENOUGH = 0.03  # seconds for one product
LARGEST = {"cpu": 4096, "cuda": 8192, "mps": 4096}


class MatrixProduct:
    """A square product on `device` in `precision`, as large as it takes for a clock to be trusted.

    float32 is IEEE float32 (no TF32), as it is in the forward pass.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self._device, dtype = device, getattr(torch, precision)
        self._stopwatch = Stopwatch(device)
        side = 512
        while True:
            self._a, self._b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
            self.side = side
            self.measure()
            least = min(self._seconds() for _ in range(2))
            if least >= LONG_ENOUGH or side >= LARGEST[device.type]:
                return
            side *= 2

    def measure(self) -> float:
        """One product, in FLOP/s; a multiply-add is two."""
        return 2 * self.side**3 / self._seconds()

    def _seconds(self) -> float:
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.inference_mode():
                self._stopwatch.start()
                torch.mm(self._a, self._b)
                self._stopwatch.mark("product")
                return self._stopwatch.seconds()["product"]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32


def write_speed(folder: Path, size: int) -> float:
    """Bytes per second of writing one new file of `size` bytes in `folder`, until it is on the disk."""
    path = folder / "disk"
    block = os.urandom(1 << 20) * 4
    try:
        with open(path, "wb", buffering=0) as file:
            started = time.perf_counter()
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
            getattr(os, "fdatasync", os.fsync)(file.fileno())
            return size / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)
