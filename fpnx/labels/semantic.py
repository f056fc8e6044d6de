"""Class maps for semantic segmentation, from PNG masks or from the outlines of objects.

Outlines follow torchvision's reference for COCO (references/segmentation/coco_utils.py): what no object covers is
background, and pixels of several objects have no class. Two differences: pixels of several objects of one class keep
that class, and regions of many objects (crowds), which are of their class only in part, have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.text import escape
from fpnx.labels.annotations import Category, Dropped, ImageLabels, LabelSet
from fpnx.labels.dropped import NO_OUTLINE, DropCounter
from fpnx.labels.geometry import fit_to_image
from fpnx.labels.masks import IGNORED, MAX_CLASSES, mask_values
from fpnx.labels.segments import segment_mask

__all__ = ["BACKGROUND", "class_map", "from_outlines"]

BACKGROUND = "background"


def from_outlines(labels: LabelSet) -> LabelSet:
    """Labels of objects as labels for semantic segmentation. A class `background` comes first, unless there is one.

    Raises:
        FpnxError: where no object has an outline, or there are too many classes.
    """
    where, dropped = f"labels {escape(labels.path)}", DropCounter()
    if not labels.has_segments:
        raise FpnxError(f"{where}: boxes without outlines, and semantic segmentation needs outlines or PNG masks")
    named = any(category.name == BACKGROUND for category in labels.categories)
    first = Category(min(min(category.id for category in labels.categories), 1) - 1, BACKGROUND)
    categories = labels.categories if named else (first, *labels.categories)
    if len(categories) > MAX_CLASSES:
        raise FpnxError(f"{where}: {len(categories)} classes; semantic segmentation takes {MAX_CLASSES} at most")
    images = tuple(_outlined(image, 0 if named else 1, dropped) for image in labels.images)
    return replace(
        labels,
        task="semantic",
        categories=categories,
        images=images,
        dropped=_joined(labels.dropped, dropped.result()),
        remarks=(*labels.remarks, f"what no outline covers is of the class {BACKGROUND}"),
    )


def class_map(labels: LabelSet, image: ImageLabels, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel of an image.

    Args:
        labels: what `image` is part of, with the task semantic.
        image: the labels of one image.
        size: (height, width) of the upright image.

    Returns:
        (height, width) uint8: indices into `labels.categories`, 255 where there is no class.

    Raises:
        ImageError: for a mask that cannot be read, or is of another size than its image.
        FpnxError: where outlines need faster-coco-eval, which is not installed.
    """
    if image.mask_file is not None:
        return _from_png(labels, image.mask_file, size)
    background = next(i for i, category in enumerate(labels.categories) if category.name == BACKGROUND)
    classes = np.full(size, background, np.uint8)
    covered = np.zeros(size, bool)
    objects = fit_to_image(image, size).labels
    # Crowds come last: they take only what no object covers.
    for crowd in (False, True):
        unknown = np.zeros(size, bool)
        for i in np.flatnonzero(objects.crowd == crowd).tolist():
            segment = objects.segments[i] if objects.segments else None
            if segment is None:
                continue
            mask = segment_mask(segment, size)
            if crowd:
                unknown |= mask & ~covered
            else:
                unknown |= mask & covered & (classes != objects.classes[i])
                classes[mask] = objects.classes[i]
                covered |= mask
        classes[unknown] = IGNORED
        covered |= unknown
    return classes


def _from_png(labels: LabelSet, path: str, size: tuple[int, int]) -> np.ndarray:
    values = mask_values(path)
    if values.shape != size:
        theirs, ours = ("×".join(map(str, each)) for each in (values.shape, size))
        turned = ", which is turned by its EXIF orientation" if values.shape == size[::-1] else ""
        raise ImageError(f"its mask has {theirs} pixels (height × width), and the image {ours}{turned}")
    ids = np.array([category.id for category in labels.categories])  # in ascending order
    position = np.minimum(np.searchsorted(ids, values), len(ids) - 1)
    known = (ids[position] == values) & (values != IGNORED)
    return np.where(known, position, IGNORED).astype(np.uint8)


def _outlined(image: ImageLabels, shift: int, dropped: DropCounter) -> ImageLabels:
    """The objects that have an outline."""
    segments = image.segments or (None,) * len(image.classes)
    keep = np.array([segment is not None for segment in segments], bool)
    for _ in range(int((~keep).sum())):
        dropped.add(NO_OUTLINE, "one", image.name)
    return replace(
        image,
        classes=image.classes[keep] + shift,
        boxes=None if image.boxes is None else image.boxes[keep],
        segments=tuple(segment for segment in segments if segment is not None),
        crowd=image.crowd[keep],
        areas=None if image.areas is None else image.areas[keep],
    )


def _joined(one: Mapping[str, Dropped], other: Mapping[str, Dropped]) -> dict[str, Dropped]:
    counts = dict(one)
    for reason, more in other.items():
        known = counts.get(reason)
        counts[reason] = more if known is None else Dropped(known.count + more.count, known.example)
    return counts
