"""Typed annotations, into which every label format is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["Category", "Dropped", "ImageLabels", "LabelSet", "Segment", "Task"]

Task = Literal["classification", "detection", "semantic"]

# The outline of one object: polygons, each (x1, y1, x2, y2, …) in pixels, or COCO's run-length encoding
# `{"size": [height, width], "counts": [...] | str}`.
Segment = list[list[float]] | Mapping[str, Any]


@dataclass(frozen=True)
class Category:
    """A class of objects, as the label file has it.

    Attributes:
        id: its number in the label file; its position where the format has names only.
        name: its name.
    """

    id: int
    name: str


@dataclass(frozen=True)
class Dropped:
    """Annotations that are not used, for one reason.

    Attributes:
        count: how many.
        example: the first of them, in words, such as `"box 17 of cats/01.jpg"`.
    """

    count: int
    example: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageLabels:
    """The annotations of one image. Coordinates are in pixels of the upright image, x to the right, y down.

    Attributes:
        name: the image, as the label file names it, with `/` between folders.
        size: (height, width) of the image where the label file says it, else None.
        classes: (n,) int64, indices into `LabelSet.categories`: of the boxes; with the task classification, of the
            image; of a mask file, the different ones in it.
        boxes: (n, 4) float64, x1, y1, x2, y2; shares of width and height where `relative`. None for other tasks.
        relative: whether boxes and polygons are shares of the image's width and height (YOLO).
        segments: the outline of each object, or None for one without; empty where no object has any.
        crowd: (n,) bool: regions of many objects, which are neither trained on nor count as missed.
        areas: (n,) float64, of the objects in square pixels, as the label file says them, NaN where it does not; None
            where it says none. Scores by size go by them.
        mask_file: path of the PNG with a class for each pixel, for semantic segmentation; else None.
        id: of the image in the label file; None where the format has none.
    """

    name: str
    size: tuple[int, int] | None = None
    classes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    boxes: np.ndarray | None = None
    relative: bool = False
    segments: tuple[Segment | None, ...] = ()
    crowd: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    areas: np.ndarray | None = None
    mask_file: str | None = None
    id: int | str | None = None


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """All annotations of a label source.

    Attributes:
        format: `"folders"`, `"csv"`, `"coco"`, `"yolo"`, `"voc"` or `"masks"`.
        path: the label file or folder, for messages.
        task: what can be trained with them by default.
        categories: the classes, in the order of their ids.
        images: one entry for each image that the labels name.
        dropped: reason in words, such as `"empty boxes"` → the annotations left out for it.
        multi_label: whether an image may have several classes, or none (classification).
        remarks: notes for the user, a line each.
    """

    format: str
    path: str
    task: Task
    categories: tuple[Category, ...]
    images: tuple[ImageLabels, ...]
    dropped: Mapping[str, Dropped] = field(default_factory=dict)
    multi_label: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def has_segments(self) -> bool:
        """Whether any object has an outline."""
        return any(segment is not None for image in self.images for segment in image.segments)
