"""COCO's scores of boxes and masks, and the average recall of proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fpnx.evaluation.coco_library import coco_library
from fpnx.evaluation.detections import SourceDetections
from fpnx.evaluation.scores import ClassRow, Scores, Value, share
from fpnx.labels.annotations import Category, ImageLabels
from fpnx.labels.segments import segment_rle

__all__ = ["detection_scores"]

MAX_DETECTIONS = (1, 10, 100)  # of an image, best first, as COCO counts them
MAX_PROPOSALS = (20, 100, 1000)
SIZES = {"s": "small", "m": "medium", "l": "large"}  # COCO's: below 32² and 96² square pixels of the source image
EVERY_SIZE = 0
PROPOSAL_IMAGES = 256


def detection_scores(
    categories: Sequence[Category], truth: Sequence[ImageLabels], found: Sequence[SourceDetections]
) -> Scores:
    """COCO's scores of detections, by faster-coco-eval; the numbers are those of pycocotools.

    Values are AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm and ARl of boxes; the same of masks with
    `mask_` before them, where there are masks; and with `proposal_` AR20, AR100 and AR1000 of proposals, without
    regard to classes, and the latter two by size (Table 1 of the FPN paper, arXiv 1612.03144). AP and AR are means over
    IoU thresholds of 0.5, 0.55, …, 0.95 and over the classes that have objects.

    The main score is the AP of masks, where there are masks, else that of boxes. The size of an object is the area
    in the label file, else that of its outline, else that of its box. Crowds neither count as missed nor make what was
    found in them wrong; with masks, this also holds for the boxes of objects without an outline.

    Args:
        categories: the classes, of which `truth` and `found` have indices.
        truth: the labels of each image, in its pixels, as `fpnx.labels.geometry.fit_to_image` gives them.
        found: what was found in the same images, in the same order.

    Raises:
        FpnxError: where faster-coco-eval is not installed.
    """
    if len(truth) != len(found):
        raise ValueError(f"labels of {len(truth)} images, detections of {len(found)}")
    with_masks = any(image.masks is not None for image in found)
    objects = [_Objects(labels, image.size, with_masks) for labels, image in zip(truth, found, strict=True)]
    boxes = _Evaluation("bbox", categories, [image.boxes_truth() for image in objects], _found_boxes(found), found)
    values: dict[str, Value] = boxes.scores()
    columns = {"AP": boxes.by_class(), "AP50": boxes.by_class(iou=0.5), "AR100": boxes.by_class(recall=True)}
    if with_masks:
        masks = _Evaluation("segm", categories, [image.masks_truth() for image in objects], _found_masks(found), found)
        values |= {f"mask_{name}": value for name, value in masks.scores().items()}
        columns |= {"mask AP": masks.by_class(), "mask AP50": masks.by_class(iou=0.5)}
    if any(image.proposals is not None for image in found):
        values |= _proposal_scores([image.boxes_truth() for image in objects], found)
    counts = np.zeros(len(categories), np.int64)
    for labels, image in zip(truth, objects, strict=True):
        np.add.at(counts, labels.classes[~image.crowd], 1)
    return Scores(
        task="detection",
        main="mask_AP" if with_masks else "AP",
        images=len(found),
        values=values,
        classes=tuple(
            ClassRow(category.id, category.name, int(counts[i]), {name: column[i] for name, column in columns.items()})
            for i, category in enumerate(categories)
        ),
    )


class _Objects:
    """The labelled objects of one image as COCO annotations without ids."""

    def __init__(self, labels: ImageLabels, size: tuple[int, int], with_masks: bool) -> None:
        self._size, self._classes = size, labels.classes
        self._boxes = np.empty((0, 4)) if labels.boxes is None else labels.boxes.astype(np.float64)
        self.crowd = labels.crowd if len(labels.crowd) else np.zeros(len(self._boxes), bool)
        # Outlines are rasterised only where masks are scored, or where the file says nothing else of the area.
        said = labels.areas is not None and np.isfinite(labels.areas).all()
        segments = () if said and not with_masks else labels.segments
        self._runs = [None if segment is None else segment_rle(segment, size) for segment in segments]
        self._runs = self._runs or [None] * len(self._boxes)
        self._areas = (self._boxes[:, 2] - self._boxes[:, 0]) * (self._boxes[:, 3] - self._boxes[:, 1])
        for i, runs in enumerate(self._runs):
            if runs is not None:
                self._areas[i] = coco_library().mask.area(runs)
        if labels.areas is not None:
            self._areas = np.where(np.isfinite(labels.areas), labels.areas, self._areas)

    def boxes_truth(self) -> list[dict[str, Any]]:
        """One annotation for each object, with its box."""
        return [
            {"category_id": int(c) + 1, "bbox": _corner_and_size(box), "area": float(area), "iscrowd": int(crowd)}
            for c, box, area, crowd in zip(self._classes, self._boxes, self._areas, self.crowd, strict=True)
        ]

    def masks_truth(self) -> list[dict[str, Any]]:
        """One annotation for each object, with its outline; without one, its box as a crowd."""
        annotations = self.boxes_truth()
        for annotation, box, runs in zip(annotations, self._boxes, self._runs, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotation["iscrowd"] = int(annotation["iscrowd"] or runs is None)
            annotation["segmentation"] = runs or segment_rle([[x1, y1, x2, y1, x2, y2, x1, y2]], self._size)
        return annotations


def _found_boxes(found: Sequence[SourceDetections]) -> list[list[dict[str, Any]]]:
    """Annotations of the boxes found in each image."""
    return [
        [
            {"category_id": int(c) + 1, "bbox": _corner_and_size(box), "score": float(score), "area": _area(box)}
            for c, box, score in zip(image.classes, image.boxes, image.scores, strict=True)
        ]
        for image in found
    ]


def _found_masks(found: Sequence[SourceDetections]) -> list[list[dict[str, Any]]]:
    """Annotations of the masks found in each image."""
    area = coco_library().mask.area
    return [
        [
            {"category_id": int(c) + 1, "segmentation": runs, "score": float(score), "area": float(area(runs))}
            for c, runs, score in zip(image.classes, image.masks or (), image.scores, strict=True)
        ]
        for image in found
    ]


def _proposal_scores(truth: Sequence[Sequence[dict[str, Any]]], found: Sequence[SourceDetections]) -> dict[str, Value]:
    """Average recall of the proposals; all objects are of one class."""
    right, objects = np.zeros((1 + len(SIZES), len(MAX_PROPOSALS))), np.zeros(1 + len(SIZES))
    # Some images at a time: the thousand proposals of each take much memory as annotations.
    for start in range(0, len(found), PROPOSAL_IMAGES):
        part = slice(start, start + PROPOSAL_IMAGES)
        annotations = [[{**annotation, "category_id": 1} for annotation in image] for image in truth[part]]
        proposals = [_found_proposals(image) for image in found[part]]
        evaluation = _Evaluation("bbox", (Category(1, "object"),), annotations, proposals, found[part], MAX_PROPOSALS)
        for size, count in enumerate(evaluation.object_counts()):
            objects[size] += count
            right[size] += [count * (evaluation.recall(size, i) or 0.0) for i in range(len(MAX_PROPOSALS))]
    values = {f"proposal_AR{limit}": share(right[EVERY_SIZE, i], objects[0]) for i, limit in enumerate(MAX_PROPOSALS)}
    for i, limit in list(enumerate(MAX_PROPOSALS))[1:]:
        for size, letter in enumerate(SIZES, EVERY_SIZE + 1):
            values[f"proposal_AR{limit}{letter}"] = share(right[size, i], objects[size])
    return values


def _found_proposals(image: SourceDetections) -> list[dict[str, Any]]:
    """Annotations of the proposals of an image, with scores in their order."""
    boxes = np.empty((0, 4)) if image.proposals is None else image.proposals[: MAX_PROPOSALS[-1]]
    return [
        {"category_id": 1, "bbox": _corner_and_size(box), "score": -float(rank), "area": _area(box)}
        for rank, box in enumerate(boxes)
    ]


class _Evaluation:
    """One run of faster-coco-eval."""

    def __init__(
        self,
        kind: Literal["bbox", "segm"],
        categories: Sequence[Category],
        truth: Sequence[Sequence[dict[str, Any]]],
        found: Sequence[Sequence[dict[str, Any]]],
        images: Sequence[SourceDetections],
        limits: Sequence[int] = MAX_DETECTIONS,
    ) -> None:
        library = coco_library()
        entries = [
            {"id": number, "height": image.size[0], "width": image.size[1]} for number, image in enumerate(images, 1)
        ]
        # Numbers of classes are their positions: names and ids of a label file need not differ.
        classes = [{"id": number, "name": str(number)} for number in range(1, len(categories) + 1)]
        sides = [
            library.COCO({"images": entries, "categories": classes, "annotations": _numbered(side)})
            for side in (truth, found)
        ]
        run = library.COCOeval_faster(*sides, iouType=kind)
        run.params.maxDets = list(limits)
        run.evaluate()
        run.accumulate()
        self._thresholds, self._ranges, self._truth = run.params.iouThrs, run.params.areaRng, truth
        # -1 where a class has no objects. (thresholds, recalls, classes, sizes, limits); (thresholds, classes, …)
        shape = (len(self._thresholds), len(categories), 1 + len(SIZES), len(limits))
        self._precision = np.reshape(run.eval["precision"], (shape[0], -1, *shape[1:]))
        self._recall = np.reshape(run.eval["recall"], shape)

    def precision(self, size: int = EVERY_SIZE, iou: float | None = None) -> Value:
        """Average precision, of objects of one size, at one IoU threshold or all of them."""
        return _mean(self._precision[self._at(iou), :, :, size, -1])

    def recall(self, size: int = EVERY_SIZE, limit: int = -1) -> Value:
        """Average recall, of objects of one size, with one of the limits of detections in an image."""
        return _mean(self._recall[:, :, size, limit])

    def object_counts(self) -> list[int]:
        """How many objects there are of each size, those of every size first; crowds do not count."""
        areas = np.array([each["area"] for image in self._truth for each in image if not each["iscrowd"]])
        return [int(((areas >= low) & (areas <= high)).sum()) for low, high in self._ranges]

    def by_class(self, iou: float | None = None, recall: bool = False) -> list[Value]:
        """Average precision or recall of each class."""
        values = self._recall[:, None] if recall else self._precision
        return [_mean(values[self._at(iou), :, k, EVERY_SIZE, -1]) for k in range(values.shape[2])]

    def scores(self) -> dict[str, Value]:
        """COCO's twelve scores."""
        sizes = list(enumerate(SIZES, EVERY_SIZE + 1))
        return {
            "AP": self.precision(),
            "AP50": self.precision(iou=0.5),
            "AP75": self.precision(iou=0.75),
            **{f"AP{letter}": self.precision(number) for number, letter in sizes},
            **{f"AR{limit}": self.recall(limit=i) for i, limit in enumerate(MAX_DETECTIONS)},
            **{f"AR{letter}": self.recall(number) for number, letter in sizes},
        }

    def _at(self, iou: float | None) -> Any:
        return slice(None) if iou is None else np.isclose(self._thresholds, iou)


def _numbered(annotations: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The annotations of all images in one list, with `id` and `image_id` from 1 on."""
    numbered: list[dict[str, Any]] = []
    for image, entries in enumerate(annotations, 1):
        for entry in entries:
            numbered.append({"iscrowd": 0, **entry, "id": len(numbered) + 1, "image_id": image})
    return numbered


def _mean(values: np.ndarray) -> Value:
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def _corner_and_size(box: np.ndarray) -> list[float]:
    """x1, y1, x2, y2 → COCO's x, y, width, height."""
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def _area(box: np.ndarray) -> float:
    _, _, width, height = _corner_and_size(box)
    return width * height
