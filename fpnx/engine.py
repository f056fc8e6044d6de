"""One batch through the model on its device: pixels in, arrays in the stored type out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fpnx.config import ExtractConfig, parse_extent
from fpnx.errors import FpnxError
from fpnx.model import PyramidModel
from fpnx.recipes import Recipe
from fpnx.store import valid_extent

__all__ = ["Engine", "Features", "resolve_device", "resolve_precision"]

STORED = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Features:
    """What a batch gave: level → (B, C, H, W) in the stored type, and level → NaN or infinite values by image."""

    arrays: Mapping[str, np.ndarray]
    nonfinite: Mapping[str, Sequence[int]]


class Engine:
    """Runs a model for inference. Not for training: it takes the model over and moves it to its device."""

    def __init__(self, model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.recipe, self.device = recipe, device
        self.pool, self.stored = config.pool, STORED[config.dtype]
        precision = resolve_precision(config.precision)
        self.autocast = None if precision == "float32" else getattr(torch, precision)

    def __call__(self, pixels: Sequence[np.ndarray]) -> Features:
        """Images of one padded size, each (h, w, 3), 0..255 → their features."""
        sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self.device.type == "cuda":  # TF32 would keep 10 bits of the mantissa: not without being asked
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False))
            images = self._batch(pixels, sizes)
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, dtype=self.autocast))
            levels = self.model(images)
            stored = {name: self._stored(name, level, sizes) for name, level in levels.items()}
            nonfinite = {name: _nonfinite(level) for name, level in stored.items()}
            return Features({name: level.cpu().numpy() for name, level in stored.items()}, nonfinite)

    def _batch(self, pixels: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> Tensor:
        padded = self.recipe.padded(sizes[0])
        if len(set(sizes)) == 1:
            stacked = torch.from_numpy(np.stack(pixels)).to(self.device)
            return self.recipe.pad(self.recipe.normalise(stacked), padded)
        each = [self.recipe.normalise(torch.from_numpy(np.stack([image])).to(self.device)) for image in pixels]
        return torch.cat([self.recipe.pad(image, padded) for image in each])

    def _stored(self, name: str, level: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        if self.pool != "none":
            level = self._pooled(level.float(), self.model.stride(name), sizes)
        return level.to(self.stored, memory_format=torch.contiguous_format).contiguous()

    def _pooled(self, level: Tensor, stride: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Pool each image over its valid cells, so that padding never enters."""
        extent = parse_extent(self.pool) or (1, 1)
        pooled = []
        for image, size in zip(level, sizes, strict=True):
            height, width = valid_extent(size, stride, tuple(level.shape[2:]))
            valid = image[:, :height, :width]
            pooling = F.adaptive_max_pool2d if self.pool == "max" else F.adaptive_avg_pool2d
            pooled.append(pooling(valid, extent))
        return torch.stack(pooled)


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


def resolve_precision(name: str) -> str:
    """The compute precision that `auto` stands for: float32."""
    return "float32" if name == "auto" else name


def _nonfinite(level: Tensor) -> list[int]:
    """How many NaN and infinite values each image has; a finite sum means none, which is cheap to see."""
    suspicious = ~torch.isfinite(level.sum(dim=(1, 2, 3), dtype=torch.float32))
    counts = [0] * len(level)
    for i in suspicious.nonzero().flatten().tolist():
        counts[i] = int((~torch.isfinite(level[i])).sum())
    return counts
