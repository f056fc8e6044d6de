"""The predictions for one image, typed, and as the plain results that are written."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fpnx.core.config import DRAWN_FROM
from fpnx.core.errors import FpnxError
from fpnx.core.mask_runs import MaskRuns, decode_mask
from fpnx.core.text import escape, plural
from fpnx.evaluation.detections import to_source
from fpnx.evaluation.semantic import class_map
from fpnx.labels.annotations import Category, Task
from fpnx.models.heads.base import Detections
from fpnx.models.heads.base import Prediction as HeadPrediction
from fpnx.visualization.predictions import DrawnObject, draw_class_map, draw_classes, draw_objects

__all__ = [
    "Prediction",
    "Reading",
    "draw_prediction",
    "prediction_of",
    "prediction_of_results",
    "results_of",
    "rounded",
]

COORDINATE_DIGITS = 4  # of pixels


@dataclass(frozen=True)
class Reading:
    """How a head's output becomes a prediction.

    Attributes:
        task: what is predicted.
        categories: the classes, of which the head has indices.
        multi_label: whether an image may have several classes, or none.
        top: how many classes of an image are kept.
    """

    task: Task
    categories: Sequence[Category]
    multi_label: bool = False
    top: int = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What was found in one image, in pixels of the upright image.

    Attributes:
        image: name of the image.
        size: its (height, width).
        task: `"detection"`, `"classification"` or `"semantic"`.
        scores: (n,) float64, 0 to 1, of the objects or classes, best first.
        labels: (n,) int64, the numbers of their classes, as the weights or labels have them: COCO's, where it is COCO.
        names: (n,) names of their classes.
        boxes: (n, 4) float64 x1, y1, x2, y2 of the objects; None for other tasks.
        mask_runs: the masks of the objects, in COCO's run-length encoding; None without masks.
        keypoints: (n, K, 3) float64 x, y, visibility; None without keypoints.
        keypoint_scores: (n, K) float64, as torchvision has them; None without keypoints.
        levels: (n,) names of the levels that the boxes come from; empty where that is not known.
        proposals: (m, 4) float64 boxes that may be objects, best first, of detectors with two stages; else None.
        class_map: (H, W) int64, the number of the class of each pixel, for semantic segmentation; else None. `labels`
            and `names` are then the classes in it, and `scores` their shares of the pixels.
        photo: gives the upright RGB image, for drawing; None where it is not at hand.
    """

    image: str
    size: tuple[int, int]
    task: Task
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray | None = None
    mask_runs: tuple[MaskRuns, ...] | None = None
    keypoints: np.ndarray | None = None
    keypoint_scores: np.ndarray | None = None
    levels: tuple[str, ...] = ()
    proposals: np.ndarray | None = None
    class_map: np.ndarray | None = None
    photo: Callable[[], Image.Image] | None = None

    @property
    def masks(self) -> np.ndarray | None:
        """(n, H, W) bool, the pixels of each object; None without masks. Decoded anew at each call."""
        if self.mask_runs is None:
            return None
        masks = np.zeros((len(self), *self.size), bool)
        for mask, runs in zip(masks, self.mask_runs, strict=True):
            mask[:] = decode_mask(runs)
        return masks

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self, threshold: float = DRAWN_FROM) -> Image.Image:
        """The image with what was found in it.

        Args:
            threshold: objects with a lower score are left out.

        Raises:
            FpnxError: the image is not at hand.
            ImageError: it can no longer be read.
        """
        if self.photo is None:
            raise FpnxError(f"{escape(self.image)}: its pixels are not at hand: predict it again, and draw that")
        return draw_prediction(self, self.photo(), threshold)

    def _repr_png_(self) -> bytes | None:
        """The picture that a notebook shows; None where the image can no longer be read."""
        try:
            drawn = self.draw()
        except FpnxError:
            return None
        buffer = io.BytesIO()
        drawn.save(buffer, "PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {score:.2f}" for name, score in list(zip(self.names, self.scores, strict=True))[:5])
        more = ", …" if len(self) > 5 else ""
        what = plural(len(self), "object") if self.task == "detection" else "classes"
        return f"<Prediction of {escape(self.image)}: {what}{': ' if found else ''}{found}{more}>"


def prediction_of(
    image: str,
    found: HeadPrediction,
    reading: Reading,
    input_size: tuple[int, int],
    source_size: tuple[int, int],
    photo: Callable[[], Image.Image] | None = None,
) -> Prediction:
    """The prediction that a head's output is.

    Args:
        image: name of the image.
        found: the head's output.
        reading: how it is read.
        input_size: (height, width) of the network's input, without padding.
        source_size: (height, width) of the upright source image.
        photo: gives the upright RGB image, where it is at hand.
    """
    ids = np.array([category.id for category in reading.categories], np.int64)
    names = [category.name for category in reading.categories]
    values: dict[str, Any] = {"image": image, "size": source_size, "task": reading.task, "photo": photo}
    if isinstance(found, Detections):
        source = to_source(image, found, input_size, source_size)
        return Prediction(
            **values,
            scores=source.scores,
            labels=ids[source.classes],
            names=tuple(names[i] for i in source.classes.tolist()),
            boxes=source.boxes,
            mask_runs=source.masks,
            keypoints=source.keypoints,
            keypoint_scores=source.keypoint_scores,
            levels=source.levels,
            proposals=source.proposals,
        )
    if reading.task == "semantic":
        classes = class_map(found, input_size, source_size)
        counts = np.bincount(classes.ravel(), minlength=len(names))
        best = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
        scores, class_ids = counts[best] / classes.size, ids[classes]
    else:
        probabilities = _probabilities(found, reading.multi_label)
        best = np.argsort(-probabilities, kind="stable")[: reading.top].tolist()
        scores, class_ids = probabilities[best], None
    return Prediction(
        **values, scores=scores, labels=ids[best], names=tuple(names[i] for i in best), class_map=class_ids
    )


def results_of(prediction: Prediction) -> list[dict[str, Any]]:
    """The objects or classes as plain values: COCO's results without the image, with names beside the numbers."""
    results: list[dict[str, Any]] = []
    for i, (label, name, score) in enumerate(
        zip(prediction.labels.tolist(), prediction.names, prediction.scores, strict=True)
    ):
        result: dict[str, Any] = {"category_id": label, "category_name": name}
        if prediction.boxes is not None:
            x1, y1, x2, y2 = prediction.boxes[i].tolist()
            result["bbox"] = rounded(np.array((x1, y1, x2 - x1, y2 - y1)))
        result["score"] = float(str(np.float32(score)))  # the shortest text of the number
        if prediction.mask_runs is not None:
            result["segmentation"] = dict(prediction.mask_runs[i])
        if prediction.keypoints is not None:
            result["keypoints"] = rounded(prediction.keypoints[i].ravel())
        if prediction.keypoint_scores is not None:
            result["keypoint_scores"] = [float(str(np.float32(v))) for v in prediction.keypoint_scores[i].tolist()]
        if prediction.levels:
            result["level"] = prediction.levels[i]
        results.append(result)
    return results


def prediction_of_results(
    image: str, size: tuple[int, int], task: Task, results: Sequence[Mapping[str, Any]]
) -> Prediction:
    """The prediction that `results_of` made plain, without its picture, proposals and class map."""
    boxes = masks = keypoints = keypoint_scores = None
    if task == "detection":
        corners = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1)
    if results and "segmentation" in results[0]:
        runs = [result["segmentation"] for result in results]
        masks = tuple(MaskRuns(size=list(each["size"]), counts=str(each["counts"])) for each in runs)
    if results and "keypoints" in results[0]:
        keypoints = np.array([result["keypoints"] for result in results], np.float64).reshape(len(results), -1, 3)
        keypoint_scores = np.array([result["keypoint_scores"] for result in results], np.float64)
    return Prediction(
        image=image,
        size=size,
        task=task,
        scores=np.array([result["score"] for result in results], np.float64),
        labels=np.array([result["category_id"] for result in results], np.int64),
        names=tuple(str(result["category_name"]) for result in results),
        boxes=boxes,
        mask_runs=masks,
        keypoints=keypoints,
        keypoint_scores=keypoint_scores,
        levels=tuple(result["level"] for result in results if "level" in result),
    )


def rounded(pixels: np.ndarray) -> list[Any]:
    """Coordinates as they are written."""
    values: list[Any] = np.round(pixels, COORDINATE_DIGITS).tolist()
    return values


def draw_prediction(prediction: Prediction, picture: Image.Image, threshold: float) -> Image.Image:
    """A picture of an image with what was found in it; objects below `threshold` are left out."""
    labels, names, scores = prediction.labels.tolist(), prediction.names, prediction.scores.tolist()
    if prediction.task == "classification":
        return draw_classes(picture, list(zip(labels, names, scores, strict=True)))
    if prediction.class_map is not None:
        return draw_class_map(picture, prediction.class_map, list(zip(labels, names, scores, strict=True)))
    assert prediction.boxes is not None, "objects have boxes"
    objects = [
        DrawnObject(
            box=tuple(prediction.boxes[i].tolist()),
            label=f"{names[i]} {scores[i]:.2f}",
            colour=labels[i],
            mask=None if prediction.mask_runs is None else prediction.mask_runs[i],
            keypoints=None if prediction.keypoints is None else prediction.keypoints[i],
        )
        for i in range(len(prediction))
        if scores[i] >= threshold
    ]
    return draw_objects(picture, objects)


def _probabilities(logits: Tensor, multi_label: bool) -> np.ndarray:
    """(classes,) logits → probabilities: softmax, or sigmoid where an image may have several classes."""
    values = logits.detach().double()
    probabilities: np.ndarray = (values.sigmoid() if multi_label else values.softmax(0)).numpy()
    return probabilities
