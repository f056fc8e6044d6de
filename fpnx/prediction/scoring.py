"""Scores of a run against labels, and the images with the most errors."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.events import Listener
from fpnx.core.predict_config import PredictConfig
from fpnx.core.text import escape, plural
from fpnx.evaluation.classification import classification_scores
from fpnx.evaluation.detection_scores import detection_scores
from fpnx.evaluation.detections import SourceDetections
from fpnx.evaluation.scores import Scores
from fpnx.evaluation.semantic import PixelCounts
from fpnx.labels.annotations import Category, ImageLabels, LabelSet
from fpnx.labels.geometry import fit_to_image
from fpnx.labels.masks import mask_values
from fpnx.labels.matching import match_labels
from fpnx.labels.reading import read_labels
from fpnx.labels.semantic import class_map
from fpnx.prediction.journal import Journal
from fpnx.prediction.predictions import prediction_of_results
from fpnx.prediction.sink import PredictionSink, Target
from fpnx.prediction.task_model import NOT_CLASSES, TaskModel
from fpnx.visualization.png_files import PngPaths
from fpnx.visualization.predictions import DrawnObject, Mark, draw_classes, draw_objects, draw_wrong_pixels

__all__ = ["RunLabels", "Worst", "score_run"]

SHOWN = 10  # worst images
MATCHED = 0.5  # least overlap (IoU) of a found object with the labelled one that it is
EXAMPLES = 3
UNNAMED = re.compile(r"class \d+")


@dataclass(frozen=True)
class Worst:
    """An image with errors.

    Attributes:
        image: its name.
        errors: what is wrong, in words.
        picture: where it is drawn, with the errors marked; None where it is not.
    """

    image: str
    errors: str
    picture: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunLabels:
    """The labels of the images of a run, and how the predicted classes are found in them.

    Attributes:
        labels: all labels.
        of_image: the labels of each image, or None.
        predicted: the predicted classes, with the numbers and names of the labels where these have them.
        places: for each number in `predicted` that the labels have, its position in their categories.
        remarks: notes for the user, a line each.
    """

    labels: LabelSet
    of_image: tuple[ImageLabels | None, ...]
    predicted: tuple[Category, ...]
    places: Mapping[int, int]
    remarks: tuple[str, ...]

    @classmethod
    def read(cls, path: str, names: Sequence[str], root: str, task_model: TaskModel) -> RunLabels:
        """Read labels, and find the images and the classes of a run in them.

        Raises:
            FpnxError: they are not for this task, or have none of the images or classes.
        """
        labels = read_labels(path, names, root, task_model.task)
        matched = match_labels(labels, names, root)
        predicted, places = _joined(task_model.categories, labels)
        remarks = [*labels.remarks, *_left_out({reason: each.count for reason, each in labels.dropped.items()})]
        unlabelled, absent = len(matched.unlabelled), len(matched.absent) + len(matched.ambiguous)
        if unlabelled:
            remarks.append(
                f"{plural(unlabelled, 'image')} without labels: not scored, such as {escape(matched.unlabelled[0])}"
            )
        if absent:
            example = (*matched.absent, *matched.ambiguous)[0]
            remarks.append(f"labels of {plural(absent, 'image')} that the run does not have, such as {escape(example)}")
        unknown = [each.name for each in predicted if each.id not in places and each.name not in NOT_CLASSES]
        if unknown:
            remarks.append(f"{_classes(unknown)} not in the labels: what is found of them is not scored")
        missing = [category.name for i, category in enumerate(labels.categories) if i not in set(places.values())]
        if missing:
            remarks.append(f"{_classes(missing)} in the labels, which the weights do not know: they count as missed")
        return cls(
            labels=labels,
            of_image=tuple(None if i is None else labels.images[i] for i in matched.indices),
            predicted=predicted,
            places=places,
            remarks=tuple(remarks),
        )

    def content_hash(self) -> str:
        """sha256 (hex) of the classes and of the labels of the run's images."""
        digest = hashlib.sha256(json.dumps([[each.id, each.name] for each in self.labels.categories]).encode())
        for image in self.of_image:
            if image is None:
                digest.update(b"none")
                continue
            arrays = [None if each is None else each.tolist() for each in (image.classes, image.boxes, image.crowd)]
            values = [image.id, image.size, image.relative, image.mask_file, *arrays, image.segments]
            digest.update(json.dumps(values, default=lambda mapping: dict(mapping)).encode())
        return digest.hexdigest()

    def image_ids(self, first: int) -> list[int | str]:
        """The number of each image in the label file; images without one are counted on from the largest.

        Args:
            first: index of the first image in the whole list, for labels without numbers.
        """
        ids = [None if image is None else image.id for image in self.of_image]
        if all(number is None for number in ids):
            return [first + i for i in range(len(ids))]
        numbers = [image.id for image in self.labels.images if isinstance(image.id, int)]
        following = max(numbers, default=0) + 1 + first
        return [following + i if number is None else number for i, number in enumerate(ids)]


def score_run(
    labels: RunLabels,
    journal: Journal,
    sink: PredictionSink,
    target: Target,
    config: PredictConfig,
    listener: Listener,
) -> tuple[Scores | None, tuple[Worst, ...]]:
    """The scores of what is in a journal, and the worst images, which are drawn where pictures are.

    Raises:
        FpnxError: where something that is needed is not installed, or a picture cannot be written.
    """
    entries = [(i, entry) for i, entry in journal.entries() if labels.of_image[i] is not None]
    if not entries:
        listener.message("no image with labels was predicted: there are no scores")
        return None, ()
    task = labels.labels.task
    scorer = {"detection": _Detections, "classification": _Classes, "semantic": _Pixels}[task](labels, target, config)
    for index, entry in entries:
        image = labels.of_image[index]
        assert image is not None, "it is among those with labels"
        scorer.add(index, image, entry)
    worst = sorted(scorer.errors, key=lambda each: (-each.weight, each.index))[:SHOWN]
    folder = None if target.pictures is None else target.pictures / "worst"
    shown = []
    for rank, each in enumerate(worst, 1):
        name = target.names[each.index]
        path = None if folder is None else folder / f"{rank:02}-{PngPaths(folder, [name])[name].name}"
        if path is not None and not _draw(scorer, each.index, sink, path, name):
            path = None
        shown.append(Worst(name, each.text, None if path is None else str(path)))
    scores = scorer.scores()
    for remark in scorer.remarks:
        listener.message(remark)
    return scores, tuple(shown)


@dataclass(frozen=True)
class _Errors:
    """The errors in one image: the larger the weight, the worse."""

    index: int
    weight: float
    text: str


class _Scorer:
    """Collects what is scored, image by image."""

    def __init__(self, labels: RunLabels, target: Target, config: PredictConfig) -> None:
        self._labels, self._target, self._config = labels, target, config
        self.errors: list[_Errors] = []
        self.remarks: list[str] = []

    def add(self, index: int, image: ImageLabels, entry: Mapping[str, Any]) -> None:
        """Take one image: its labels, and its entry in the journal."""
        raise NotImplementedError

    def scores(self) -> Scores | None:
        """The scores of all images."""
        raise NotImplementedError

    def draw(self, index: int, picture: Any) -> Any:
        """The picture of an image with its errors."""
        raise NotImplementedError


class _Detections(_Scorer):
    def __init__(self, labels: RunLabels, target: Target, config: PredictConfig) -> None:
        super().__init__(labels, target, config)
        self._truth: list[ImageLabels] = []
        self._found: list[SourceDetections] = []
        self._drawn: dict[int, list[DrawnObject]] = {}
        self._left_out: Counter[str] = Counter()

    def add(self, index: int, image: ImageLabels, entry: Mapping[str, Any]) -> None:
        size = (entry["size"][0], entry["size"][1])
        prediction = prediction_of_results(self._target.names[index], size, "detection", entry["results"])
        fitted = fit_to_image(image, size)
        truth = fitted.labels
        self._left_out.update({reason: len(positions) for reason, positions in fitted.dropped.items()})
        places, boxes = self._labels.places, prediction.boxes
        assert boxes is not None, "objects have boxes"
        known = [i for i, label in enumerate(prediction.labels.tolist()) if label in places]
        classes = np.array([places[int(prediction.labels[i])] for i in known], np.int64)
        self._truth.append(truth)
        self._found.append(
            SourceDetections(
                image=prediction.image,
                size=size,
                boxes=boxes[known],
                scores=prediction.scores[known],
                classes=classes,
                masks=None if prediction.mask_runs is None else tuple(prediction.mask_runs[i] for i in known),
                proposals=np.array(entry["proposals"]).reshape(-1, 4) if "proposals" in entry else None,
            )
        )
        sure = [i for i in range(len(known)) if prediction.scores[known[i]] >= self._target.drawn_from]
        right, found_truth = _matches(truth, boxes[known][sure], classes[sure])
        missed = [i for i in range(len(truth.classes)) if not (found_truth[i] or _is_crowd(truth, i))]
        wrong = int((~right).sum())
        if not (missed or wrong):
            return
        counts = [plural(n, "object") + f" {what}" for n, what in ((len(missed), "missed"), (wrong, "wrong")) if n]
        self.errors.append(_Errors(index, len(missed) + wrong, ", ".join(counts)))
        names = {i: prediction.names[known[i]] for i in sure}
        marks = [
            DrawnObject(
                box=_box(boxes[known][i]),
                label=f"{names[i]} {prediction.scores[known[i]]:.2f}",
                colour=int(prediction.labels[known[i]]),
                mark=Mark.NONE if right[place] else Mark.WRONG,
            )
            for place, i in enumerate(sure)
        ]
        assert truth.boxes is not None, "labels of objects have boxes"
        categories = self._labels.labels.categories
        marks += [
            DrawnObject(
                box=_box(truth.boxes[i]),
                label=categories[int(truth.classes[i])].name,
                colour=categories[int(truth.classes[i])].id,
                mark=Mark.MISSED,
            )
            for i in missed
        ]
        self._drawn[index] = marks

    def scores(self) -> Scores | None:
        masks = [image.masks is not None for image in self._found]
        self.remarks += _left_out(self._left_out)
        if any(masks) and not self._labels.labels.has_segments:
            self.remarks.append("the labels have no outlines: boxes are scored, masks are not")
        return detection_scores(self._labels.labels.categories, self._truth, self._prepared())

    def _prepared(self) -> list[SourceDetections]:
        """Without masks where the labels have none; images without objects have no masks, where others have."""
        if not self._labels.labels.has_segments:
            return [replace(image, masks=None) for image in self._found]
        return self._found

    def draw(self, index: int, picture: Any) -> Any:
        return draw_objects(picture, self._drawn[index])


class _Classes(_Scorer):
    def __init__(self, labels: RunLabels, target: Target, config: PredictConfig) -> None:
        super().__init__(labels, target, config)
        self._truth: list[ImageLabels] = []
        self._logits: list[np.ndarray] = []
        self._results: dict[int, tuple[Sequence[Mapping[str, Any]], str]] = {}

    def add(self, index: int, image: ImageLabels, entry: Mapping[str, Any]) -> None:
        categories, multi_label = self._labels.labels.categories, self._labels.labels.multi_label
        logits = np.full(len(categories), -np.inf)
        for category, value in zip(self._labels.predicted, entry["logits"], strict=True):
            if (place := self._labels.places.get(category.id)) is not None:
                logits[place] = value
        self._truth.append(image)
        self._logits.append(logits)
        labelled = set(image.classes.tolist())
        chosen = set(np.flatnonzero(logits > 0).tolist()) if multi_label else {int(np.argmax(logits))}
        if chosen == labelled or not (labelled or multi_label):
            return
        names = ", ".join(escape(categories[i].name) for i in sorted(labelled)) or "no class"
        taken = ", ".join(escape(categories[i].name) for i in sorted(chosen)) or "no class"
        finite = logits[np.isfinite(logits)]
        shares = np.exp(logits - finite.max()) / np.exp(finite - finite.max()).sum()
        weight = float(len(chosen ^ labelled)) if multi_label else 1 - float(shares[sorted(labelled)].max())
        self.errors.append(_Errors(index, weight, f"{names} taken for {taken}"))
        self._results[index] = (entry["results"], names)

    def scores(self) -> Scores | None:
        labels = self._labels.labels
        return classification_scores(
            labels.categories, self._truth, np.stack(self._logits), multi_label=labels.multi_label
        )

    def draw(self, index: int, picture: Any) -> Any:
        results, names = self._results[index]
        shown = [(each["category_id"], each["category_name"], each["score"]) for each in results]
        return draw_classes(picture, shown, f"labelled {names}")


class _Pixels(_Scorer):
    def __init__(self, labels: RunLabels, target: Target, config: PredictConfig) -> None:
        super().__init__(labels, target, config)
        # One more for predicted classes that the labels do not have.
        self._counts = PixelCounts(len(labels.labels.categories) + 1)
        self._paths = PngPaths(target.output, target.names)
        self._unread = 0

    def add(self, index: int, image: ImageLabels, entry: Mapping[str, Any]) -> None:
        try:
            labelled, predicted = self._maps(index, image, (entry["size"][0], entry["size"][1]))
        except ImageError as error:
            self._unread += 1
            if self._unread <= EXAMPLES:
                self.remarks.append(f"{escape(self._target.names[index])} is not scored: {error}")
            return
        self._counts.add(labelled, predicted)
        known = labelled < len(self._labels.labels.categories)
        wrong = float((labelled != predicted)[known].mean()) if known.any() else 0.0
        if wrong:
            self.errors.append(_Errors(index, wrong, f"{100 * wrong:.1f} % of the pixels wrong"))

    def scores(self) -> Scores | None:
        return self._counts.scores(self._labels.labels.categories)

    def draw(self, index: int, picture: Any) -> Any:
        image = self._labels.of_image[index]
        assert image is not None, "an image with errors has labels"
        labelled, predicted = self._maps(index, image, (picture.height, picture.width))
        wrong = (labelled != predicted) & (labelled < len(self._labels.labels.categories))
        return draw_wrong_pixels(picture, wrong)

    def _maps(self, index: int, image: ImageLabels, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the labels' categories: as labelled and as predicted."""
        labelled = class_map(self._labels.labels, image, size)
        ids = mask_values(str(self._paths[self._target.names[index]]))
        predicted = np.full(ids.shape, len(self._labels.labels.categories), np.int64)
        for number in np.unique(ids).tolist():
            if (place := self._labels.places.get(number)) is not None:
                predicted[ids == number] = place
        return labelled.astype(np.int64), predicted


def _left_out(counts: Mapping[str, int]) -> list[str]:
    """What of the labels is not scored, a line each."""
    return [f"labels left out: {reason} ({count})" for reason, count in counts.items()]


def _joined(predicted: Sequence[Category], labels: LabelSet) -> tuple[tuple[Category, ...], dict[int, int]]:
    """The predicted classes with the numbers of the labels, and the position of each of these in the labels.

    Classes are found by their names. Those of weights that name none are taken in their order.

    Raises:
        FpnxError: where the labels have none of them.
    """
    categories = labels.categories
    if [each.name for each in predicted] == [each.name for each in categories]:
        pairs: list[int | None] = list(range(len(categories)))
    elif all(UNNAMED.fullmatch(each.name) for each in predicted):
        shift = len(predicted) - len(categories)
        if shift not in (0, labels.task == "detection"):  # 1 where the first is the background
            raise FpnxError(
                f"labels {escape(labels.path)} have {len(categories)} of the {len(predicted)} classes of the weights, "
                f"which have no names: nothing says which is which"
            )
        pairs = [i - shift if i >= shift else None for i in range(len(predicted))]
    else:
        by_name: dict[str, int] = {}
        for i, category in enumerate(categories):
            by_name.setdefault(category.name, i)
            by_name.setdefault(_plain(category.name), i)
        pairs = [by_name.get(each.name, by_name.get(_plain(each.name))) for each in predicted]
    if all(place is None for place in pairs):
        raise FpnxError(
            f"labels {escape(labels.path)}: none of their classes is predicted: they have "
            f"{_few([each.name for each in categories])}, the weights "
            f"{_few([each.name for each in predicted if each.name not in NOT_CLASSES])}"
        )
    beyond = max(category.id for category in categories) + 1
    joined, places = [], {}
    for i, (each, place) in enumerate(zip(predicted, pairs, strict=True)):
        if place is None:
            joined.append(Category(beyond + i, each.name))
        else:
            joined.append(categories[place])
            places[categories[place].id] = place
    return tuple(joined), places


def _matches(truth: ImageLabels, boxes: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which found objects are right, and which labelled ones are found. Best found objects choose first.

    What is found in a crowd of its class is right.
    """
    right, taken = np.zeros(len(boxes), bool), np.zeros(len(truth.classes), bool)
    if truth.boxes is None or not len(truth.boxes) or not len(boxes):
        return right, taken
    overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(np.asarray(truth.boxes, np.float64))).numpy()
    for i in range(len(boxes)):
        same = truth.classes == classes[i]
        free = np.where(same & ~taken, overlaps[i], 0.0)
        best = int(free.argmax())
        if free[best] >= MATCHED:
            right[i] = True
            taken[best] = not _is_crowd(truth, best)
        else:
            right[i] = any(_is_crowd(truth, j) and same[j] and _share(boxes[i], truth.boxes[j]) >= MATCHED
                           for j in range(len(truth.classes)))  # fmt: skip
    return right, taken


def _is_crowd(truth: ImageLabels, i: int) -> bool:
    return len(truth.crowd) > i and bool(truth.crowd[i])


def _share(box: np.ndarray, region: np.ndarray) -> float:
    """The share of a box that lies in a region."""
    width = min(box[2], region[2]) - max(box[0], region[0])
    height = min(box[3], region[3]) - max(box[1], region[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return float(width * height / area) if width > 0 and height > 0 and area > 0 else 0.0


def _draw(scorer: _Scorer, index: int, sink: PredictionSink, path: Path, name: str) -> bool:
    """Draw an image with its errors; False where it can no longer be read."""
    try:
        drawn = scorer.draw(index, sink.picture(index))
    except ImageError:
        return False
    sink.save(drawn, path, name)
    return True


def _box(values: np.ndarray) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = values.tolist()
    return x1, y1, x2, y2


def _plain(name: str) -> str:
    """A name without case, and with spaces for underscores and hyphens."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return f"{', '.join(map(escape, listed[:EXAMPLES]))}{', …' if len(listed) > EXAMPLES else ''}"


def _classes(names: Sequence[str]) -> str:
    return f"class {escape(names[0])} is" if len(names) == 1 else f"{len(names)} classes ({_few(names)}) are"
