"""Features of regions in a store: what is known before a run, the rows of a batch, and all of them as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpnx.core.plan_summary import RegionSummary

__all__ = ["REGION_TABLES", "RegionBatch", "RegionLayout", "Regions", "first_rows"]

# Per region: name, dtype and shape of one row of the datasets in /regions, besides the features.
REGION_TABLES: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
    ("image", np.int64, ()),
    ("box", np.float64, (4,)),
    ("level", np.int64, ()),
    ("label", np.int64, ()),
)


@dataclass(frozen=True, eq=False)
class RegionLayout:
    """The regions of a new file, known before the first image is computed.

    Attributes:
        image: (R,) int64, index of the image of each region, ascending.
        label: (R,) int64, ids of classes.
        names: of the classes, by id.
        shape: (C, h, w) of the features of one region.
    """

    image: np.ndarray
    label: np.ndarray
    names: Mapping[int, str]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.image)

    def summary(self, dtype: Any) -> RegionSummary:
        """Number and shape of the regions, stored in `dtype`."""
        return _summary(self.image, self.names, self.shape, dtype)


@dataclass(frozen=True, eq=False)
class RegionBatch:
    """The regions of a batch of images, in the order of the images.

    Attributes:
        boxes: (n, 4) float64, x1, y1, x2, y2 in pixels of the upright source images.
        levels: (n,) int64, number of the level that each was pooled from.
        features: (n, C, h, w) in the stored dtype.
    """

    boxes: np.ndarray
    levels: np.ndarray
    features: np.ndarray

    def tables(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name in `/regions` and values of what is written with the features of an image."""
        yield from (("box", self.boxes), ("level", self.levels), ("features", self.features))


@dataclass(frozen=True, eq=False)
class Regions:
    """Boxes and the feature of each: all those of a store, or those of one image; see `Store.regions`, `Item.regions`.

    The rows of one image stand together, in the order of its boxes; images are in the order of their indices. Boxes and
    levels of a store are those of the moment when they were read; rows of images that are not done hold nothing.

    Attributes:
        image: (R,) int64, index of the image in the store.
        box: (R, 4) float64, x1, y1, x2, y2 in pixels of the upright source image.
        level: (R,) int64, k of the level that the feature was pooled from: 3 for P3, or C3.
        label: (R,) int64, ids of classes.
        features: (R, C, h, w) in the stored dtype; those of a store are read on access, as `features[:10]`.
        names: of the classes, by id.
    """

    image: np.ndarray
    box: np.ndarray
    level: np.ndarray
    label: np.ndarray
    features: Any
    names: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, index: int) -> slice:
        """The rows of the image with this index."""
        first, last = np.searchsorted(self.image, (index, index + 1)).tolist()
        return slice(first, last)

    def summary(self) -> RegionSummary:
        """Number and shape of the regions."""
        return _summary(self.image, self.names, self.features.shape[1:], self.features.dtype)

    def __repr__(self) -> str:
        return f"Regions({len(self)}, {'×'.join(map(str, self.features.shape[1:]))})"


def first_rows(image: np.ndarray, count: int) -> np.ndarray:
    """(count + 1,) int64: the rows of image i are those from `first[i]` to `first[i + 1]`.

    Args:
        image: (R,) index of the image of each region, ascending.
        count: number of images.
    """
    return np.searchsorted(image, np.arange(count + 1))


def _summary(image: np.ndarray, names: Mapping[int, str], shape: tuple[int, int, int], dtype: Any) -> RegionSummary:
    channels, height, width = shape
    return RegionSummary(
        count=len(image),
        images=len(np.unique(image)),
        classes=len(names),
        channels=channels,
        height=height,
        width=width,
        bytes_per_region=channels * height * width * np.dtype(dtype).itemsize,
    )
