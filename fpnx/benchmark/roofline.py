"""What the machine could do at best: a large matrix product, and writing to the disk."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fpnx.benchmark.timers import Stopwatch
from fpnx.core.files import OpenFile, reserve_space
from fpnx.inference.devices import arithmetic, compute_dtype
from fpnx.inference.packed_conv import PackedConv2d, can_pack, packing

__all__ = ["MatrixProduct", "write_speed"]

PIECE = 4 << 20  # bytes handed to the disk at once
LONG_ENOUGH = 0.03  # seconds for one product
LARGEST = {"cpu": 4096, "cuda": 8192, "mps": 4096}


class MatrixProduct:
    """A square product on `device` in `precision`, as large as it takes for a clock to be trusted.

    float32 is IEEE float32 (no TF32), as it is in the forward pass. On a processor two libraries can compute it: the
    BLAS behind `torch.mm`, and oneDNN, as a 1×1 convolution; the faster one is the ceiling.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self._device, self._precision, dtype = device, precision, compute_dtype(precision)
        self._stopwatch = Stopwatch(device)
        self.side = 512
        while True:
            a, b = (torch.randn(self.side, self.side).to(device, dtype) for _ in range(2))
            ways = {way: self._least(way) for way in self._ways(a, b)}
            self._product = min(ways, key=ways.__getitem__)
            if ways[self._product] >= LONG_ENOUGH or self.side >= LARGEST[device.type]:
                return
            self.side *= 2

    def measure(self) -> float:
        """One product, in FLOP/s; a multiply-add is two."""
        return 2 * self.side**3 / self._seconds(self._product)

    def _ways(self, a: Tensor, b: Tensor) -> list[Callable[[], Tensor]]:
        ways = [lambda: torch.mm(a, b)]
        if self._device.type == "cpu" and can_pack(a.dtype):
            convolution = PackedConv2d.of(a[:, :, None, None].float(), None, (0, 0))
            convolution.prepare(self._device, a.dtype)
            columns = b.view(1, self.side, -1, 32).contiguous(memory_format=torch.channels_last)
            ways.append(lambda: convolution(columns))
            with torch.inference_mode(), packing():
                convolution(columns)
        return ways

    def _least(self, product: Callable[[], Tensor]) -> float:
        return min(self._seconds(product) for _ in range(3))

    def _seconds(self, product: Callable[[], Tensor]) -> float:
        with torch.inference_mode(), arithmetic(self._device, self._precision):
            self._stopwatch.start()
            product()
            self._stopwatch.mark("product")
            return self._stopwatch.seconds()["product"]


def write_speed(folder: Path, size: int) -> float:
    """Bytes per second of writing one new file of `size` bytes in `folder`, as features are, until the disk has it."""
    path = folder / "disk"
    block = mmap.mmap(-1, PIECE)
    block.write(os.urandom(PIECE))
    try:
        with open(path, "wb") as new:
            reserve_space(new.fileno(), size)
        file = OpenFile(path)
        try:
            started = time.perf_counter()
            for start in range(0, size, PIECE):
                file.write(start, memoryview(block)[: size - start])
            file.sync()
            return size / (time.perf_counter() - started)
        finally:
            file.close()
    finally:
        path.unlink(missing_ok=True)
