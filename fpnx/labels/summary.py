"""What labels hold for the images of a run: counts by class and size, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fpnx.core.text import escape, plural
from fpnx.labels.annotations import Category, Dropped, ImageLabels, LabelSet, Task
from fpnx.labels.geometry import fit_to_image
from fpnx.labels.matching import Matched
from fpnx.labels.semantic import BACKGROUND

__all__ = ["ClassCounts", "LabelSummary", "summarize"]

SMALL, MEDIUM = 32**2, 96**2  # square pixels: COCO's limits
MAX_CLASSES = 20  # in lines; all are in JSON
FORMATS = {
    "folders": "folders as classes",
    "csv": "table of classes",
    "coco": "COCO",
    "yolo": "YOLO",
    "voc": "Pascal VOC",
    "masks": "PNG masks",
}


@dataclass(frozen=True)
class ClassCounts:
    """What there is of one class in the labelled images. Crowds are not counted.

    Attributes:
        category: the class.
        images: in how many images it is.
        objects: how many objects there are; of them `small` are below 32² square pixels of the source image by their
            box, `medium` below 96², `large` the rest. Those of images of unknown size are in none of the three.
    """

    category: Category
    images: int
    objects: int
    small: int
    medium: int
    large: int


@dataclass(frozen=True, kw_only=True)
class LabelSummary:
    """What labels hold for the images of a run.

    Attributes:
        format, path, task: as in `LabelSet`.
        multi_label: whether an image may have several classes.
        images: of the run.
        labelled: how many of them have labels.
        without_objects: how many of the labelled have no object, or no class.
        unlabelled: images without labels; None where there is none.
        absent: names in the labels that no image has; None where there is none.
        ambiguous: names in the labels that fit several images; None where there is none.
        classes: counts of each class.
        crowds: regions of many objects, which are not trained on.
        clipped: boxes that reached beyond the edge of their image, and were cut off there.
        dropped: what was left out, by reason.
        remarks: notes, a line each.
    """

    format: str
    path: str
    task: Task
    multi_label: bool
    images: int
    labelled: int
    without_objects: int
    unlabelled: Dropped | None
    absent: Dropped | None
    ambiguous: Dropped | None
    classes: tuple[ClassCounts, ...]
    crowds: int
    clipped: int
    dropped: Mapping[str, Dropped]
    remarks: tuple[str, ...]

    @property
    def objects(self) -> int:
        """Objects of all classes."""
        return sum(counts.objects for counts in self.classes)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        values = {**asdict(self), "dropped": {reason: asdict(each) for reason, each in self.dropped.items()}}
        values["classes"] = [{**asdict(each.category), **_without_category(each)} for each in self.classes]
        return {**values, "objects": self.objects, "remarks": list(self.remarks)}

    def lines(self) -> list[str]:
        """The same in words, for a terminal."""
        task = "semantic segmentation" if self.task == "semantic" else self.task
        lines = [
            f"labels   {FORMATS.get(self.format, self.format)} for {task}{' (multi-label)' * self.multi_label}, "
            f"{plural(len(self.classes), 'class')}: {escape(self.path)}",
            f"images   {self.images}, {self.labelled} labelled",
        ]
        if self.without_objects:
            lines[-1] += f", {self.without_objects} of these without {self._things}"
        lines += self._class_lines()
        for heading, found in (
            ("without labels", self.unlabelled),
            ("labels without an image", self.absent),
            ("labels that fit several images", self.ambiguous),
        ):
            if found is not None:
                lines.append(f"{heading}: {found.count}, such as {escape(found.example)}")
        if self.crowds:
            lines.append(f"not trained on: {plural(self.crowds, 'region')} of many objects (crowd, difficult)")
        if self.clipped:
            lines.append(f"boxes cut off at the edge of their image: {self.clipped}")
        lines += [f"left out: {reason} ({each.count}), such as {each.example}" for reason, each in self.dropped.items()]
        return lines + [f"note: {remark}" for remark in self.remarks]

    @property
    def _things(self) -> str:
        return "objects" if self.task == "detection" else "a class"

    def _class_lines(self) -> list[str]:
        """A table of the classes, the most frequent first, and a line of those that do not occur."""
        detection = self.task == "detection"
        key = (lambda each: -each.objects) if detection else (lambda each: -each.images)
        present = sorted((each for each in self.classes if each.images), key=key)
        shown = present[:MAX_CLASSES]
        names = [escape(each.category.name) for each in shown]
        width = max(map(len, [*names, "class"]))
        sized = ("small", "medium", "large") if any(each.small + each.medium + each.large for each in present) else ()
        heads = ("objects", *sized, "images") if detection else ("images",)
        table = [f"  {'class':<{width}}" + "".join(f"{head:>9}" for head in heads)] if shown else []
        for name, each in zip(names, shown, strict=True):
            table.append(f"  {name:<{width}}" + "".join(f"{getattr(each, head):>9}" for head in heads))
        if detection and len(present) > 1:
            totals = [sum(getattr(each, head) for each in present) for head in heads[:-1]]
            table.append(f"  {'all':<{width}}" + "".join(f"{total:>9}" for total in [*totals, self.labelled]))
        if rest := len(present) - len(shown):
            table.insert(len(shown) + 1, f"  and {plural(rest, 'more class')}")
        absent = [each.category.name for each in self.classes if not each.images]
        if self.task == "semantic" and self.format != "masks":  # what no outline covers: it occurs, uncounted
            absent = [name for name in absent if name != BACKGROUND]
        if absent:
            more = ", …" if len(absent) > 5 else ""
            table.append(f"classes that do not occur: {len(absent)} ({', '.join(map(escape, absent[:5]))}{more})")
        return table


def summarize(
    labels: LabelSet, matched: Matched, sizes: Sequence[tuple[int, int] | None] | None = None
) -> LabelSummary:
    """Count what labels hold for the images of a run.

    Args:
        labels: the labels.
        matched: which images have them.
        sizes: (height, width) of each upright image, in the order of `matched.images`, where it is known. Without it
            the sizes in the label file count, and boxes in shares of the image have no size.

    Raises:
        FpnxError: where masks must be resized, and faster-coco-eval is not installed.
    """
    counts = np.zeros((len(labels.categories), 5), np.int64)  # images, objects, small, medium, large
    found = _Found()
    known = list(sizes) if sizes is not None else [None] * len(matched.images)
    for name, index, size in zip(matched.images, matched.indices, known, strict=True):
        if index is None:
            continue
        entry = labels.images[index]
        size = size or entry.size
        if entry.mask_file is not None and size != entry.size:
            found.count("masks of another size than their image", name)
        if entry.boxes is not None and size is not None:
            entry = found.fitted(name, entry, size)
        counts[np.unique(entry.classes), 0] += 1
        found.empty += len(entry.classes) == 0
        if entry.boxes is None:
            np.add.at(counts[:, 1], entry.classes, 1)
            continue
        found.crowds += int(entry.crowd.sum())
        classes, boxes = entry.classes[~entry.crowd], entry.boxes[~entry.crowd]
        np.add.at(counts[:, 1], classes, 1)
        if not entry.relative:
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            np.add.at(counts, (classes, 2 + np.searchsorted([SMALL, MEDIUM], areas, side="right")), 1)
    unlabelled = matched.unlabelled
    return LabelSummary(
        format=labels.format,
        path=labels.path,
        task=labels.task,
        multi_label=labels.multi_label,
        images=len(matched.images),
        labelled=len(matched.images) - len(unlabelled),
        without_objects=found.empty,
        unlabelled=_sample(unlabelled),
        absent=_sample(matched.absent),
        ambiguous=_sample(matched.ambiguous),
        classes=tuple(
            ClassCounts(category, *row) for category, row in zip(labels.categories, counts.tolist(), strict=True)
        ),
        crowds=found.crowds,
        clipped=found.clipped,
        dropped={**labels.dropped, **found.dropped},
        remarks=(*labels.remarks, *found.remarks()),
    )


class _Found:
    """What turns up when labels are fitted to images."""

    def __init__(self) -> None:
        self.crowds = self.clipped = self.empty = 0
        self.dropped: dict[str, Dropped] = {}
        self._swapped: list[str] = []
        self._scaled: list[str] = []
        self._other: list[str] = []

    def count(self, reason: str, what: str, more: int = 1) -> None:
        """Count what is left out."""
        before = self.dropped.get(reason)
        self.dropped[reason] = (
            Dropped(more, escape(what)) if before is None else Dropped(before.count + more, before.example)
        )

    def fitted(self, name: str, labels: ImageLabels, size: tuple[int, int]) -> ImageLabels:
        """The labels of one image in its pixels; what comes of that is counted."""
        fitted, said = fit_to_image(labels, size), labels.size
        self.clipped += fitted.clipped
        for reason, positions in fitted.dropped.items():
            self.count(reason, f"object {positions[0] + 1} of {name}", len(positions))
        if fitted.lost_outlines:
            self.count("outlines of another size than their image", name, fitted.lost_outlines)
        if said is not None:
            example = f"{escape(name)} ({said[0]}×{said[1]} in the labels, {size[0]}×{size[1]} in the image)"
            if fitted.swapped:
                self._swapped.append(example)
            if fitted.scale != 1:
                self._scaled.append(example)
            if fitted.other_size:
                self._other.append(example)
        return fitted.labels

    def remarks(self) -> list[str]:
        """A line for each way in which sizes differ."""
        texts = (
            (self._swapped, "height and width are swapped in the labels, as for photographs that are turned by their "
                            "EXIF orientation; coordinates are taken as those of the upright image"),
            (self._scaled, "the labels are of a larger or smaller copy; coordinates are scaled to the image"),
            (self._other, "the labels say another shape; coordinates are taken as pixels of the image"),
        )  # fmt: skip
        return [f"{plural(len(names), 'image')}, such as {names[0]}: {text}" for names, text in texts if names]


def _sample(names: Sequence[str]) -> Dropped | None:
    return Dropped(len(names), names[0]) if names else None


def _without_category(counts: ClassCounts) -> dict[str, int]:
    return {name: value for name, value in asdict(counts).items() if name != "category"}
