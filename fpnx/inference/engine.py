"""The inference engine: one batch of pixels through the model, to arrays in the stored type."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fpnx.core.config import ExtractConfig
from fpnx.core.validation import parse_pool
from fpnx.inference.devices import compute_dtype, resolve_precision
from fpnx.inference.graph_fusion import fuse_model
from fpnx.inference.packed_conv import SIZES_PACKED
from fpnx.inference.region_pooling import LevelRegions, PooledLevel, RegionPooling
from fpnx.models.preprocessing import Recipe, scaled_size
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.torch_state import isolated_torch_state
from fpnx.store.reader import valid_extent

__all__ = ["Engine", "Features", "SplittingEngine", "count_nonfinite"]

MAX_FREE_BUFFERS = 32  # kept for reuse: the levels of a few batches
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")  # in plain RuntimeErrors of torch
STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Features:
    """Features of a batch.

    The device may still be copying: call `ready()` before reading. After the last use of the arrays call `recycle()`,
    so that the next batch can reuse their memory.

    Attributes:
        arrays: level → (B, C, H, W) in the stored dtype, with 0×0 cells where regions are stored; an engine for other
            results has them under other names.
        nonfinite: level → number of NaN and infinite values of each image, an array on some devices.
        regions: level → features of the boxes that are pooled from it; empty where maps are stored.
    """

    arrays: Mapping[str, Any]
    nonfinite: Mapping[str, Sequence[int]]
    regions: Mapping[str, LevelRegions] = field(default_factory=dict)
    ready: Callable[[], None] = lambda: None
    recycle: Callable[[], None] = lambda: None


class Engine:
    """Computes features with the fused form of a model; the model itself is not changed.

    Several threads may call it at the same time. Weights may be repacked meanwhile, with the same values.

    Args:
        model: in eval mode.
        recipe: the preprocessing.
        config: precision, pooling, regions and stored dtype.
        device: where it computes.
    """

    def __init__(self, model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> None:
        self.precision = resolve_precision(config.precision, device)
        self.dtype = compute_dtype(self.precision)
        with isolated_torch_state():
            self.executable = self._executable(model, device)
        self.recipe, self.device = recipe, device
        self.pool, self.stored = config.pool, STORED_DTYPES[config.dtype]
        self._scales = model.scales
        self._strides = {name: model.stride(name) for name in model.levels}
        self._region_pooling: RegionPooling | None = None
        if config.boxes is not None:
            self._region_pooling = RegionPooling(self._strides, str(config.roi_size))
        self._buffers, self._prepared_sizes = _BufferPool(), set[tuple[int, int]]()

    def _executable(self, model: PyramidModel, device: torch.device) -> Any:
        """What is run on a batch of normalised images: gives the levels by name, with `pack` for sizes that recur."""
        # Fewer operations in more kernels are faster on a CPU; on a GPU the number of kernels costs more.
        return fuse_model(model, device, self.dtype, recombined=device.type == "cpu")

    def prepare(self, size: tuple[int, int]) -> None:
        """Announce several batches of padded `size` (height, width): weights are then packed for that size.

        Of the sizes of a pyramid of scaled images, for the largest, where most of the work is.
        """
        scales = sorted(self._scales.values(), reverse=True)[:SIZES_PACKED] or [1.0]
        self._prepared_sizes.update(scaled_size(size, scale) for scale in scales)

    def __call__(self, pixels: Sequence[Any], boxes: Sequence[np.ndarray] | None = None) -> Features:
        """Features of images of one padded size, with pixels as `PyramidModel.resize` gives them.

        On some devices they are valid once `ready()` has returned.

        Args:
            pixels: of each image.
            boxes: of each image, (n, 4) in pixels of the network's input, where the config has boxes; else None.
        """
        if not self._scales:
            return self._features(pixels, self.recipe.padded(pixels[0].shape[:2]), boxes)
        return _joined(
            {level: self._features(images, size, boxes, level) for level, images, size in self.passes(pixels)}
        )

    def passes(self, pixels: Sequence[Any]) -> Iterator[tuple[str, Sequence[np.ndarray], tuple[int, int]]]:
        """Of a pyramid of scaled images: each level, with the images at its scale and their padded (height, width)."""
        for i, (level, scale) in enumerate(self._scales.items()):
            images = [image[i] for image in pixels]
            padded = self.recipe.padded(scaled_size(images[0].shape[:2], 1 / scale))
            yield level, images, scaled_size(padded, scale)

    def _features(
        self,
        pixels: Sequence[np.ndarray],
        padded: tuple[int, int],
        boxes: Sequence[np.ndarray] | None,
        scaled_level: str | None = None,
    ) -> Features:
        """Features of images (h, w, 3), 0..255, which are padded to one size (height, width).

        Args:
            pixels: of each image.
            padded: the size.
            boxes: as for `__call__`.
            scaled_level: of a pyramid of scaled images, the level that the only map stands for.
        """
        sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        with isolated_torch_state(), torch.inference_mode():
            levels = self.levels(pixels, padded)
            pooled = self.pooled_regions(levels, boxes, scaled_level)
            stored = {name: self.in_stored_form(name, level, sizes) for name, level in levels.items()}
            del levels
            nonfinite = {name: count_nonfinite(level) for name, level in stored.items()}
            nonfinite |= {name: level.nonfinite.tolist() for name, level in pooled.items()}
            arrays = {name: level.cpu().numpy() for name, level in stored.items()}
            regions = {name: LevelRegions(p.places, p.features.cpu().numpy()) for name, p in pooled.items()}
            return Features(arrays, nonfinite, regions, recycle=lambda: self._buffers.keep(stored.values()))

    def levels(self, pixels: Sequence[np.ndarray], padded: tuple[int, int]) -> dict[str, Tensor]:
        """The levels of images (h, w, 3) on the device, as they are computed; the caller holds the torch state."""
        images = self.batch(pixels, padded).to(self.dtype)
        prepared = (images.shape[2], images.shape[3]) in self._prepared_sizes
        levels: dict[str, Tensor] = self.executable.pack(images) if prepared else self.executable(images)
        return levels

    def release(self) -> None:
        """Free memory that is only held for speed."""

    def batch(self, pixels: Sequence[np.ndarray], padded: tuple[int, int]) -> Tensor:
        """The network's input of a padded size (height, width): (B, 3, H, W) float32, channels last."""
        return self.recipe.batch(pixels, padded, self.device)

    def pooled_regions(
        self, levels: Mapping[str, Tensor], boxes: Sequence[np.ndarray] | None, scaled_level: str | None
    ) -> dict[str, PooledLevel]:
        """The features of boxes by the key of their level in `levels`; empty where maps are stored."""
        if self._region_pooling is None:
            return {}
        assert boxes is not None, "the config has boxes"
        pooled = {}
        for name, level in levels.items():
            known_as, maps = scaled_level or name, level
            if level.device.type == "cpu" and len(self._region_pooling.places(known_as, boxes)):
                maps = self._channels_first(level.float())  # RoIAlign would do it more slowly, in new memory
            pooled[name] = self._region_pooling.pool(known_as, maps, boxes, self.stored)
            if maps.data_ptr() != level.data_ptr():
                self._buffers.keep([maps])
        return pooled

    def in_stored_form(self, name: str, level: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """A level pooled by `config.pool` and cast to the stored dtype, (B, C, H, W) contiguous; without cells where
        regions are stored."""
        if self._region_pooling is not None:
            return level.new_empty((*level.shape[:2], 0, 0), dtype=self.stored)
        if self.pool != "none":
            level = self._pooled(level.float(), self._strides[name], sizes)
        if level.device.type != "cpu":  # cast and change the memory format in one pass
            return level.to(self.stored, memory_format=torch.contiguous_format).contiguous()
        return self._channels_first(level.to(self.stored))

    def _pooled(self, level: Tensor, stride: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Pool each image over its valid cells, without padding."""
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
        """A map in contiguous memory format. Each image is transposed as a matrix, which PyTorch does in blocks: 2.3
        times as fast as `contiguous()` of the batch."""
        if not level.is_contiguous(memory_format=torch.channels_last):
            return level.contiguous()
        channels, height, width = level.shape[1:]
        ordered = self._buffers.take(level.shape, level.dtype)
        for source, target in zip(level, ordered, strict=True):
            target.view(channels, height * width).copy_(source.permute(1, 2, 0).reshape(height * width, channels).t())
        return ordered


def _joined(parts: Mapping[str, Features]) -> Features:
    """The only map of each part as the level that it stands under."""

    def call_all(calls: Iterable[Callable[[], None]]) -> None:
        for call in calls:
            call()

    return Features(
        {level: next(iter(part.arrays.values())) for level, part in parts.items()},
        {level: next(iter(part.nonfinite.values())) for level, part in parts.items()},
        {level: region for level, part in parts.items() for region in part.regions.values()},
        ready=lambda: call_all(part.ready for part in parts.values()),
        recycle=lambda: call_all(part.recycle for part in parts.values()),
    )


class _BufferPool:
    """Reuses the memory of written batches: page faults of fresh memory would cost as much as the writing."""

    def __init__(self) -> None:
        self._free = deque[Tensor](maxlen=MAX_FREE_BUFFERS)
        self._lock = threading.Lock()

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        with self._lock:
            for i, held in enumerate(self._free):
                if held.shape == shape and held.dtype == dtype:
                    del self._free[i]
                    return held
        # Aligned to a page, as O_DIRECT needs it.
        size = shape.numel() * dtype.itemsize
        raw = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
        start = -raw.data_ptr() % mmap.PAGESIZE
        return raw[start : start + size].view(dtype).view(shape)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        with self._lock:
            for tensor in tensors:
                # Two levels may share one tensor.
                if all(tensor.data_ptr() != held.data_ptr() for held in self._free):
                    self._free.append(tensor)


def count_nonfinite(level: Tensor) -> list[int]:
    """Number of NaN and infinite values of each image. Values are only counted where an image's sum is not finite."""
    suspicious = ~torch.isfinite(level.sum(dim=(1, 2, 3), dtype=torch.float32))
    counts = [0] * len(level)
    for i in suspicious.nonzero().flatten().tolist():
        counts[i] = int((~torch.isfinite(level[i])).sum())
    return counts


class SplittingEngine:
    """Runs batches through an engine, and halves them after an out-of-memory error.

    Args:
        engine: computes one batch.
        message: is called once, with a text for the user, when batches are halved.
    """

    def __init__(self, engine: Engine, message: Callable[[str], None]) -> None:
        self._engine, self._message = engine, message
        self._max_batch: int | None = None

    def __call__(
        self, pixels: Sequence[Any], boxes: Sequence[np.ndarray] | None = None
    ) -> Iterator[tuple[slice, Features | None]]:
        """Yield a slice of `pixels` and its features; None for a single image that does not fit into memory.

        The arguments are those of `Engine.__call__`.
        """
        start = 0
        while start < len(pixels):
            piece = slice(start, min(start + (self._max_batch or len(pixels)), len(pixels)))
            count = piece.stop - piece.start
            features = self._try(pixels[piece], None if boxes is None else boxes[piece])
            if features is None and count > 1:
                if self._max_batch is None:
                    self._message(f"out of memory with {count} images at once: going on with fewer")
                self._max_batch = (count + 1) // 2
                continue
            yield piece, features
            start = piece.stop

    def _try(self, pixels: Sequence[Any], boxes: Sequence[np.ndarray] | None) -> Features | None:
        try:
            return self._engine(pixels, boxes)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
                text in str(error) for text in OUT_OF_MEMORY
            ):
                raise
        self._engine.release()  # after the error is gone, whose traceback holds tensors
        return None
