"""Objects of one image, as readers find them, packed into `ImageLabels`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fpnx.labels.annotations import ImageLabels, Segment
from fpnx.labels.dropped import DUPLICATE, DropCounter

__all__ = ["FoundObject", "pack_objects"]


class FoundObject(NamedTuple):
    """One object.

    Attributes:
        what: names it in messages, such as `"annotation 17"`.
        category: index of its class.
        box: x1, y1, x2, y2.
        segment: its outline, or None.
        crowd: whether it is a region of many objects.
        area: in square pixels, as the label file says it; else NaN.
    """

    what: str
    category: int
    box: tuple[float, float, float, float]
    segment: Segment | None = None
    crowd: bool = False
    area: float = math.nan


def pack_objects(
    name: str,
    size: tuple[int, int] | None,
    objects: Sequence[FoundObject],
    dropped: DropCounter,
    *,
    relative: bool = False,
) -> ImageLabels:
    """The labels of one image. Of objects with the same class, box and outline the first is kept."""
    kept: list[FoundObject] = []
    seen: set[tuple[object, ...]] = set()
    for each in objects:
        key = (each.category, each.box, each.crowd, _hashable(each.segment))
        if key in seen:
            dropped.add(DUPLICATE, each.what, name)
        else:
            seen.add(key)
            kept.append(each)
    segments = tuple(each.segment for each in kept)
    areas = np.array([each.area for each in kept], np.float64)
    return ImageLabels(
        name=name,
        size=size,
        classes=np.array([each.category for each in kept], np.int64),
        boxes=np.array([each.box for each in kept], np.float64).reshape(-1, 4),
        relative=relative,
        segments=segments if any(segment is not None for segment in segments) else (),
        crowd=np.array([each.crowd for each in kept], bool),
        areas=areas if np.isfinite(areas).any() else None,
    )


def _hashable(segment: Segment | None) -> object:
    """An outline as a key of dictionaries."""
    if isinstance(segment, Mapping):
        counts = segment["counts"]
        return (*segment["size"], tuple(counts) if isinstance(counts, list) else counts)
    return None if segment is None else tuple(map(tuple, segment))
