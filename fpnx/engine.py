"""One batch through the model on its device: pixels in, arrays in the stored type out."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fpnx.config import ExtractConfig
from fpnx.convolutions import native_on_cpu
from fpnx.errors import FpnxError
from fpnx.executable import make_executable
from fpnx.model import PyramidModel
from fpnx.recipes import Recipe
from fpnx.store import valid_extent
from fpnx.values import parse_pool

__all__ = ["Engine", "Features", "arithmetic", "compute_dtype", "resolve_device", "resolve_precision", "slow_precision"]

SPARE = 32  # arrays kept at most: those of a batch's levels, for a few batches
AMPERE = (8, 0)  # compute capability from which on CUDA devices have TF32
STORED = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Features:
    """What a batch gave: level → (B, C, H, W) in the stored type, and level → NaN or infinite values by image.

    Both may still be on their way: `ready()` waits for them. Who has no more use for the arrays may say so with
    `give_back()`: then the next batch is put there.
    """

    arrays: Mapping[str, np.ndarray]
    nonfinite: Mapping[str, Sequence[int]]
    ready: Callable[[], None] = lambda: None
    give_back: Callable[[], None] = lambda: None


class Engine:
    """Runs the executable form of a model; the model itself is left as it is.

    Several threads may call it at once: what it holds may be laid out anew meanwhile, but has the same values.
    """

    def __init__(self, model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> None:
        self.precision = resolve_precision(config.precision, device)
        self.dtype = compute_dtype(self.precision)
        # Fewer operations in more steps pay on processors; a GPU's time goes into the steps.
        self.executable = make_executable(model, device, self.dtype, recombined=device.type == "cpu")
        self.recipe, self.device = recipe, device
        self.pool, self.stored = config.pool, STORED[config.dtype]
        self._strides = {name: model.stride(name) for name in model.levels}
        self._spare, self._coming = _Spare(), set[tuple[int, int]]()

    def prepare(self, size: tuple[int, int]) -> None:
        """Hear that several batches of images of a padded `size` (height, width) will come."""
        self._coming.add(size)

    def __call__(self, pixels: Sequence[np.ndarray]) -> Features:
        """Images of one padded size, each (h, w, 3), 0..255 → their features."""
        sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        with torch.inference_mode():
            images = self.batch(pixels, sizes).to(self.dtype)
            several = (images.shape[2], images.shape[3]) in self._coming
            levels = self.executable.pack(images) if several else self.executable(images)
            stored = {name: self.in_stored_form(name, level, sizes) for name, level in levels.items()}
            del levels
            nonfinite = {name: _count_nonfinite(level) for name, level in stored.items()}
            arrays = {name: level.cpu().numpy() for name, level in stored.items()}
            return Features(arrays, nonfinite, give_back=lambda: self._spare.keep(stored.values()))

    def release(self) -> None:
        """Give memory back that is only kept for speed: what it computes with stays."""

    def batch(self, pixels: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(B, 3, H, W) float32 input of the network, in channels-last layout."""
        padded = self.recipe.padded(sizes[0])
        if len(set(sizes)) == 1:
            stacked = torch.from_numpy(np.stack(pixels)).to(self.device)
            return self.recipe.pad(self.recipe.normalise(stacked), padded)
        each = [self.recipe.normalise(torch.from_numpy(np.stack([image])).to(self.device)) for image in pixels]
        return torch.cat([self.recipe.pad(image, padded) for image in each])

    def in_stored_form(self, name: str, level: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """A level pooled as asked, in the stored type, (B, C, H, W) contiguous."""
        if self.pool != "none":
            level = self._pooled(level.float(), self._strides[name], sizes)
        if level.device.type != "cpu":  # cast and layout in one pass
            return level.to(self.stored, memory_format=torch.contiguous_format).contiguous()
        return self._channels_first(level.to(self.stored))

    def _pooled(self, level: Tensor, stride: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Pool each image over its valid cells, so that padding never enters."""
        grid = parse_pool(self.pool)
        assert grid is not None
        pooled = []
        for image, size in zip(level, sizes, strict=True):
            height, width = valid_extent(size, stride, tuple(level.shape[2:]))
            valid = image[:, :height, :width]
            pooling = F.adaptive_max_pool2d if self.pool == "max" else F.adaptive_avg_pool2d
            pooled.append(pooling(valid, grid))
        return torch.stack(pooled)

    def _channels_first(self, level: Tensor) -> Tensor:
        """A map in (B, C, H, W) order in memory. Image by image each is a transposed matrix, which PyTorch copies in
        blocks: 2.3 times as fast as the map as a whole."""
        if not level.is_contiguous(memory_format=torch.channels_last):
            return level.contiguous()
        channels, height, width = level.shape[1:]
        ordered = self._spare.take(level.shape, level.dtype)
        for source, target in zip(level, ordered, strict=True):
            target.view(channels, height * width).copy_(source.permute(1, 2, 0).reshape(height * width, channels).t())
        return ordered


class _Spare:
    """Memory of batches that are written, for those to come: fresh pages would cost as much as the writing."""

    def __init__(self) -> None:
        self._kept = deque[Tensor](maxlen=SPARE)
        self._turn = threading.Lock()

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        with self._turn:
            for i, held in enumerate(self._kept):
                if held.shape == shape and held.dtype == dtype:
                    del self._kept[i]
                    return held
        # From the start of a page on: so a disk takes it as it is.
        size = shape.numel() * dtype.itemsize
        raw = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
        start = -raw.data_ptr() % mmap.PAGESIZE
        return raw[start : start + size].view(dtype).view(shape)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        with self._turn:
            for tensor in tensors:
                # Two levels may be one map under two names.
                if all(tensor.data_ptr() != held.data_ptr() for held in self._kept):
                    self._kept.append(tensor)


@contextmanager
def arithmetic(device: torch.device, precision: str, *, steady: bool = True) -> Iterator[None]:
    """On CUDA: float32 without TF32, which keeps 10 bits of the mantissa, unless that is the precision; and, where
    shapes are `steady`, convolutions chosen by measuring.

    These are settings of the whole process, so one holder stands around all threads that compute.
    """
    if device.type != "cuda":
        yield
        return
    settings = [*_tf32_settings(precision == "tf32"), (torch.backends.cudnn, "benchmark", steady)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _tf32_settings(tf32: bool) -> list[tuple[Any, str, Any]]:
    """In the words of this torch: 2.9 has new ones, and refuses to read the old where somebody used the new."""
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):
        kind = "tf32" if tf32 else "ieee"
        chosen: list[tuple[Any, str, Any]] = [
            (products, "fp32_precision", kind),
            (cudnn.conv, "fp32_precision", kind),
        ]
    else:
        chosen = [(products, "allow_tf32", tf32), (cudnn, "allow_tf32", tf32)]
    return chosen


def slow_precision(device: torch.device, precision: str) -> str | None:
    """What to say of a precision that this processor computes only in steps of another; None where it is its own."""
    if device.type != "cpu" or precision == "float32" or native_on_cpu(getattr(torch, precision)):
        return None
    return f"this processor has no {precision} arithmetic: float32 is several times as fast on it"


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:1` or `mps` stands for here.

    Raises:
        FpnxError: where there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"this machine has {count} CUDA devices" if count else "no CUDA device can be used here"
            raise FpnxError(f"device {name}: {there}: take --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise FpnxError("device mps: no Metal device can be used here: take --device cpu or auto")
    return device


def resolve_precision(name: str, device: torch.device | None = None) -> str:
    """The compute precision that `auto` stands for: float32.

    Raises:
        FpnxError: where `device` does not have it.
    """
    if name == "tf32" and device is not None:
        if device.type != "cuda":
            raise FpnxError("precision tf32 is of CUDA devices: take float32, or bfloat16 where the processor has it")
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < AMPERE:  # a cluster's may be
            raise FpnxError(f"precision tf32: {torch.cuda.get_device_name(device)} does not have it: take float32")
    return "float32" if name == "auto" else name


def compute_dtype(precision: str) -> torch.dtype:
    """The type of what is computed in `precision`: TF32 is a way to multiply float32."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    return dtype


def _count_nonfinite(level: Tensor) -> list[int]:
    """How many NaN and infinite values each image has; a finite sum means none, which is cheap to see."""
    suspicious = ~torch.isfinite(level.sum(dim=(1, 2, 3), dtype=torch.float32))
    counts = [0] * len(level)
    for i in suspicious.nonzero().flatten().tolist():
        counts[i] = int((~torch.isfinite(level[i])).sum())
    return counts
