"""One batch through the model on its device: pixels in, arrays in the stored type out."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fpnx.core.config import ExtractConfig
from fpnx.core.validation import parse_pool
from fpnx.inference.devices import compute_dtype, resolve_precision
from fpnx.inference.graph_fusion import fuse_model
from fpnx.models.preprocessing import Recipe
from fpnx.models.pyramid_model import PyramidModel
from fpnx.store.reader import valid_extent

__all__ = ["Engine", "Features", "Fitting"]

SPARE = 32  # arrays kept at most: those of a batch's levels, for a few batches
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
        self.executable = fuse_model(model, device, self.dtype, recombined=device.type == "cpu")
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


def _count_nonfinite(level: Tensor) -> list[int]:
    """How many NaN and infinite values each image has; a finite sum means none, which is cheap to see."""
    suspicious = ~torch.isfinite(level.sum(dim=(1, 2, 3), dtype=torch.float32))
    counts = [0] * len(level)
    for i in suspicious.nonzero().flatten().tolist():
        counts[i] = int((~torch.isfinite(level[i])).sum())
    return counts


TOLD = ("not enough memory", "can't allocate memory", "out of memory")  # in plain RuntimeErrors of torch


class Fitting:
    """An engine that takes batches of any size, in smaller pieces once memory did not suffice.

    Args:
        engine: computes one batch.
        message: hears once that batches are halved.
    """

    def __init__(self, engine: Engine, message: Callable[[str], None]) -> None:
        self._engine, self._message = engine, message
        self._at_most: int | None = None

    def __call__(self, pixels: Sequence[np.ndarray]) -> Iterator[tuple[slice, Features | None]]:
        """Images of one padded size → which of them, and their features; None for one that does not fit alone."""
        start = 0
        while start < len(pixels):
            piece = slice(start, min(start + (self._at_most or len(pixels)), len(pixels)))
            count = piece.stop - piece.start
            features = self._attempt(pixels[piece])
            if features is None and count > 1:
                if self._at_most is None:
                    self._message(f"out of memory with {count} images at once: going on with fewer")
                self._at_most = (count + 1) // 2
                continue
            yield piece, features
            start = piece.stop

    def _attempt(self, pixels: Sequence[np.ndarray]) -> Features | None:
        try:
            return self._engine(pixels)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(t in str(error) for t in TOLD):
                raise
        self._engine.release()  # only now: the error held on to what had been computed
        return None
