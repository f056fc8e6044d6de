"""Features of boxes: RoIAlign of each box on the level of a pyramid that fits its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from fpnx.core.errors import FpnxError
from fpnx.core.levels import level_of_stride
from fpnx.core.validation import parse_size

__all__ = ["LevelRegions", "PooledLevel", "RegionPooling", "joined_regions"]

CANONICAL_LEVEL, CANONICAL_SIDE = 4, 224  # k0, and the side of its box: Eq. 1 of Lin et al. 2017
EPSILON = 1e-6  # added before rounding down, as torchvision does
SAMPLING_RATIO = 2  # samples along each side of a cell
AVERAGED = (7, 7)  # cells whose mean is the size "avg"


@dataclass(frozen=True)
class PooledLevel:
    """Features of those boxes of a batch that one level fits.

    Attributes:
        places: (n,) int64, positions of these boxes among all of the batch.
        features: (n, C, h, w) on the device.
        nonfinite: (B,) int64 on the device, number of NaN and infinite values of each image.
    """

    places: np.ndarray
    features: Tensor
    nonfinite: Tensor


@dataclass(frozen=True)
class LevelRegions:
    """A `PooledLevel` in arrays: places (n,) int64, features (n, C, h, w)."""

    places: np.ndarray
    features: np.ndarray


class RegionPooling:
    """RoIAlign of boxes, as torchvision's `MultiScaleRoIAlign` with `sampling_ratio=2`.

    A box of width w and height h, in pixels of the network's input, is pooled from level
    k = floor(4 + log2(sqrt(w h) / 224)) (Lin et al. 2017, Eq. 1), or from the nearest that there is: the coarsest level
    that is not above k, else the finest.

    Args:
        strides: by level, in input pixels.
        size: cells of each feature, such as `"7x7"`; or `"avg"`, the mean of 7×7 cells.

    Raises:
        FpnxError: where two levels have the same number k.
    """

    def __init__(self, strides: Mapping[str, int], size: str) -> None:
        self.size, self._strides = size, strides
        self._cells = parse_size(size) or AVERAGED
        self.numbers = {name: level_of_stride(stride) for name, stride in strides.items()}
        levels: dict[int, str] = {}
        for name, number in self.numbers.items():
            if number in levels:
                raise FpnxError(
                    f"levels {levels[number]} and {name} have one stride, and a box is pooled from one of them: "
                    f"name one with --levels"
                )
            levels[number] = name
        self._sorted = np.array(sorted(levels), np.int64)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of a feature in cells."""
        return (1, 1) if self.size == "avg" else self._cells

    def identity(self) -> dict[str, Any]:
        """What stored values depend on, for the fingerprint."""
        return {
            "size": self.size,
            "sampling_ratio": SAMPLING_RATIO,
            "aligned": False,
            "canonical_level": CANONICAL_LEVEL,
            "canonical_side": CANONICAL_SIDE,
        }

    def levels(self, boxes: np.ndarray) -> np.ndarray:
        """(n,) int64, the number of the level that each box is pooled from; 0, which is none, for a box of NaN.

        Args:
            boxes: (n, 4) x1, y1, x2, y2 in pixels of the network's input.
        """
        sides = (boxes[:, 2:] - boxes[:, :2]).clip(min=np.finfo(np.float32).tiny).astype(np.float64)
        levels = np.floor(CANONICAL_LEVEL + np.log2(np.sqrt(sides.prod(axis=1)) / CANONICAL_SIDE) + EPSILON)
        chosen = self._sorted[(np.searchsorted(self._sorted, levels, side="right") - 1).clip(min=0)]
        return np.where(np.isnan(levels), 0, chosen)

    def places(self, name: str, boxes: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) int64, positions among the boxes of all images of those that are pooled from the level `name`."""
        return np.flatnonzero(self.levels(np.concatenate(boxes)) == self.numbers[name])

    def pool(self, name: str, level: Tensor, boxes: Sequence[np.ndarray], dtype: torch.dtype) -> PooledLevel:
        """Features of the boxes that this level fits.

        Args:
            name: of the level.
            level: its maps, (B, C, H, W).
            boxes: of each image, (n, 4) x1, y1, x2, y2 in pixels of the network's input.
            dtype: of the result.
        """
        counts = [len(of_image) for of_image in boxes]
        every, images = np.concatenate(boxes), np.repeat(np.arange(len(boxes)), counts)
        places = self.places(name, boxes)
        rows = torch.from_numpy(np.column_stack([images[places], every[places]]).astype(np.float32))
        rows = (rows.pin_memory() if level.device.type == "cuda" else rows).to(level.device, non_blocking=True)
        if len(places):
            features = roi_align(level.float(), rows, self._cells, 1 / self._strides[name], SAMPLING_RATIO)
        else:
            features = level.new_empty((0, level.shape[1], *self._cells), dtype=torch.float32)
        if self.size == "avg":
            features = features.mean(dim=(2, 3), keepdim=True)
        features = features.to(dtype)
        nonfinite = torch.zeros(len(boxes), dtype=torch.int64, device=level.device)
        nonfinite.index_add_(0, rows[:, 0].long(), (~torch.isfinite(features)).sum(dim=(1, 2, 3)))
        return PooledLevel(places, features, nonfinite)


def joined_regions(parts: Mapping[str, LevelRegions], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Features of all boxes of a batch in their order, (n, C, h, w) = `shape`.

    0 stands in the rows of boxes that no level has, and in the last channels where a level has fewer than others.
    """
    joined = np.zeros(shape, dtype)
    for part in parts.values():
        joined[part.places, : part.features.shape[1]] = part.features
    return joined
