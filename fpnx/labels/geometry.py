"""Labelled objects in pixels of their image: shares multiplied, another size scaled, boxes clipped to the image.

Coordinates are continuous, of the upright image: (0, 0) is the outer corner of the first pixel, and a box that covers
the image is (0, 0, width, height).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fpnx.labels.annotations import ImageLabels, Segment
from fpnx.labels.dropped import OUTSIDE
from fpnx.labels.segments import scale_segment

__all__ = ["FittedLabels", "fit_to_image"]

MIN_SCALE = 0.02  # sizes that differ by less are taken as rounded, not as resized


@dataclass(frozen=True, eq=False)
class FittedLabels:
    """The labels of one image, in its pixels.

    Attributes:
        labels: boxes within the image, outlines in its pixels; `size` is that of the image, `relative` is False.
        kept: (n,) int64, the positions of these objects among the labels they were.
        dropped: reason → positions of the objects that are left out for it.
        clipped: how many boxes reached beyond the edge, and were cut off there.
        swapped: whether the label file has height and width the other way round, as for a photograph that is turned
            by its EXIF orientation. The boxes are taken as those of the turned picture.
        scale: the factor by which boxes and outlines were multiplied, where the label file was made for a larger or
            smaller copy of the image; else 1.
        other_size: whether the label file says a size of another shape; boxes are then taken as they are.
        lost_outlines: how many objects lose their outline, a run-length encoding of another size than the image.
    """

    labels: ImageLabels
    kept: np.ndarray
    dropped: Mapping[str, tuple[int, ...]]
    clipped: int
    swapped: bool
    scale: float
    other_size: bool
    lost_outlines: int = 0


def fit_to_image(labels: ImageLabels, size: tuple[int, int]) -> FittedLabels:
    """Objects in pixels of the upright image.

    Args:
        labels: the labels of one image.
        size: its (height, width).

    Raises:
        FpnxError: where masks must be resized, and faster-coco-eval is not installed.
    """
    height, width = size
    count = len(labels.classes)
    swapped, scale, other_size = _compared(labels, size)
    if labels.boxes is None:
        fitted = replace(labels, size=size)
        return FittedLabels(fitted, np.arange(count), {}, 0, swapped, scale, other_size)
    # By axis: where the labels' size is rounded, one factor for both would be off at the far edge.
    factors = np.array([width, height] * 2, np.float64) if labels.relative else np.full(4, scale)
    if scale != 1 and labels.size is not None:
        factors = np.array([width / labels.size[1], height / labels.size[0]] * 2)
    boxes = labels.boxes * factors
    clipped = np.clip(boxes, 0, [width, height, width, height])
    inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    kept = np.flatnonzero(inside)
    segments: tuple[Segment | None, ...] = ()
    lost = 0
    if labels.segments:
        before = [labels.segments[i] for i in kept.tolist()]
        segments = tuple(_fitted(segment, factors, size, labels.size if scale != 1 else size) for segment in before)
        lost = sum(segment is not None for segment in before) - sum(segment is not None for segment in segments)
    # A rounding error of a box at the edge is no box beyond it.
    beyond = np.abs(boxes - clipped).max(axis=1, initial=0) > 0.5
    fitted = replace(
        labels,
        size=size,
        relative=False,
        classes=labels.classes[kept],
        boxes=clipped[kept],
        crowd=labels.crowd[kept],
        areas=None if labels.areas is None else labels.areas[kept] * factors[0] * factors[1],
        segments=segments,
    )
    outside = tuple(np.flatnonzero(~inside).tolist())
    dropped = {OUTSIDE: outside} if outside else {}
    return FittedLabels(fitted, kept, dropped, int((beyond & inside).sum()), swapped, scale, other_size, lost)


def _compared(labels: ImageLabels, size: tuple[int, int]) -> tuple[bool, float, bool]:
    """How the size in the label file is to that of the image: swapped, the scale, and whether it is another one."""
    if labels.size is None or labels.relative or labels.size == size:
        return False, 1.0, False
    if labels.size == size[::-1]:
        return True, 1.0, False
    vertical, horizontal = size[0] / labels.size[0], size[1] / labels.size[1]
    rounded = abs(labels.size[1] * vertical - size[1]) <= max(1.0, vertical)
    rounded = rounded or abs(labels.size[0] * horizontal - size[0]) <= max(1.0, horizontal)
    if not rounded:
        return False, 1.0, True
    return False, horizontal if abs(horizontal - 1) > MIN_SCALE else 1.0, False


def _fitted(
    segment: Segment | None, factors: np.ndarray, size: tuple[int, int], labelled_size: tuple[int, int] | None
) -> Segment | None:
    """An outline in pixels of the image; None for a run-length encoding that has neither size."""
    if segment is None or (isinstance(segment, Mapping) and tuple(segment["size"]) not in (size, labelled_size)):
        return None
    return segment if factors[0] == factors[1] == 1 else scale_segment(segment, factors[0], factors[1], size)
