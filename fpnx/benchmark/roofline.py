"""Upper limits of the machine: the speed of a large matrix product, and of writing to the disk."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fpnx.benchmark.timers import StageTimer
from fpnx.core.files import OpenFile, reserve_space
from fpnx.inference.devices import arithmetic, compute_dtype
from fpnx.inference.packed_conv import PackedConv2d, can_pack, packing
from fpnx.models.torch_state import isolated_torch_state

__all__ = ["MatrixProduct", "write_speed"]

BLOCK_BYTES = 4 << 20  # of one write
MIN_SECONDS = 0.03  # of one product
MAX_SIDE = {"cpu": 4096, "cuda": 8192, "mps": 4096}


class MatrixProduct:
    """A product of square matrices on `device` in `precision`, large enough to be timed reliably.

    float32 is IEEE float32 (no TF32), as in the forward pass. On a CPU two libraries can compute it: the BLAS behind
    `torch.mm`, and oneDNN as a 1×1 convolution; the faster one is used.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self._device, self._precision, dtype = device, precision, compute_dtype(precision)
        self._timer = StageTimer(device)
        self.side = 512
        with isolated_torch_state():
            while True:
                a, b = (torch.randn(self.side, self.side).to(device, dtype) for _ in range(2))
                seconds = {product: self._minimum_seconds(product) for product in self._implementations(a, b)}
                self._product = min(seconds, key=seconds.__getitem__)
                if seconds[self._product] >= MIN_SECONDS or self.side >= MAX_SIDE[device.type]:
                    return
                self.side *= 2

    def measure(self) -> float:
        """FLOP/s of one product; a multiply-add is two operations."""
        return 2 * self.side**3 / self._seconds(self._product)

    def _implementations(self, a: Tensor, b: Tensor) -> list[Callable[[], Tensor]]:
        implementations = [lambda: torch.mm(a, b)]
        if self._device.type == "cpu" and can_pack(a.dtype):
            convolution = PackedConv2d.of(a[:, :, None, None].float(), None, (0, 0))
            convolution.prepare(self._device, a.dtype)
            columns = b.view(1, self.side, -1, 32).contiguous(memory_format=torch.channels_last)
            implementations.append(lambda: convolution(columns))
            with torch.inference_mode(), packing():
                convolution(columns)
        return implementations

    def _minimum_seconds(self, product: Callable[[], Tensor]) -> float:
        return min(self._seconds(product) for _ in range(3))

    def _seconds(self, product: Callable[[], Tensor]) -> float:
        with torch.inference_mode(), arithmetic(self._device, self._precision):
            self._timer.start()
            product()
            self._timer.mark("product")
            return self._timer.seconds()["product"]


def write_speed(folder: Path, size: int) -> float:
    """Bytes/s of writing and syncing a new file of `size` bytes in `folder`, as features are written."""
    path = folder / "disk"
    block = mmap.mmap(-1, BLOCK_BYTES)
    block.write(os.urandom(BLOCK_BYTES))
    try:
        with open(path, "wb") as new:
            reserve_space(new.fileno(), size)
        file = OpenFile(path)
        try:
            started = time.perf_counter()
            for start in range(0, size, BLOCK_BYTES):
                file.write(start, memoryview(block)[: size - start])
            file.sync()
            return size / (time.perf_counter() - started)
        finally:
            file.close()
    finally:
        path.unlink(missing_ok=True)
