"""Scores of classification: accuracy for one class an image, mean average precision for several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fpnx.evaluation.scores import ClassRow, Confusion, Scores, Value, finite_mean, share
from fpnx.labels.annotations import Category, ImageLabels

__all__ = ["classification_scores"]

TOP = 5
MAX_CONFUSIONS = 5


def classification_scores(
    categories: Sequence[Category], truth: Sequence[ImageLabels], logits: np.ndarray, *, multi_label: bool = False
) -> Scores:
    """Scores of the logits of some images. A logit that is NaN counts as the lowest.

    With one class an image, the main score is `accuracy`; `top5` stands beside it where there are more than five
    classes, and `mean_recall` is the mean over classes of the share of their images that are right. The table has
    the recall and precision of each class. Images without exactly one class are left out.

    With `multi_label`, the main score is `mAP`, the mean of the classes' average precisions. That of a class is
    Σ (R_n − R_{n−1}) P_n over the distinct logits as thresholds, without interpolation, as in scikit-learn.

    Args:
        categories: the classes.
        truth: the labels of each image; `classes` are indices into `categories`.
        logits: (images, classes).
    """
    if logits.shape != (len(truth), len(categories)):
        raise ValueError(f"logits {logits.shape} of {len(truth)} images and {len(categories)} classes")
    scores = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    if multi_label:
        return _multi_label(categories, truth, scores)
    one = [i for i, image in enumerate(truth) if len(image.classes) == 1]
    labels = np.array([truth[i].classes[0] for i in one], np.int64)
    return _single_label(categories, labels, scores[one])


def _single_label(categories: Sequence[Category], labels: np.ndarray, scores: np.ndarray) -> Scores:
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = order == labels[:, None]
    counts = np.zeros((len(categories), len(categories)), np.int64)  # (labelled, predicted)
    np.add.at(counts, (labels, order[:, 0]), 1)
    right = counts.diagonal()
    rows = tuple(
        ClassRow(
            category.id,
            category.name,
            int(counts[i].sum()),
            {"recall": share(right[i], counts[i].sum()), "precision": share(right[i], counts[:, i].sum())},
        )
        for i, category in enumerate(categories)
    )
    values: dict[str, Value] = {"accuracy": share(hits[:, 0].sum(), len(labels))}
    if len(categories) > TOP:
        values[f"top{TOP}"] = share(hits[:, :TOP].sum(), len(labels))
    values["mean_recall"] = finite_mean([row.values["recall"] for row in rows])
    return Scores(
        task="classification",
        main="accuracy",
        images=len(labels),
        values=values,
        classes=rows,
        counted="images",
        confusions=_confusions(categories, counts),
    )


def _confusions(categories: Sequence[Category], counts: np.ndarray) -> tuple[Confusion, ...]:
    """The most frequent pairs of a class and another one that its images were taken for."""
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
    most = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    pairs = (divmod(int(place), len(counts)) for place in most)
    return tuple(
        Confusion(categories[labelled].name, categories[predicted].name, int(wrong[labelled, predicted]))
        for labelled, predicted in pairs
        if wrong[labelled, predicted]
    )


def _multi_label(categories: Sequence[Category], truth: Sequence[ImageLabels], scores: np.ndarray) -> Scores:
    labels = np.zeros(scores.shape, bool)
    for i, image in enumerate(truth):
        labels[i, image.classes] = True
    rows = tuple(
        ClassRow(
            category.id, category.name, int(labels[:, i].sum()), {"AP": _average_precision(labels[:, i], scores[:, i])}
        )
        for i, category in enumerate(categories)
    )
    return Scores(
        task="classification",
        main="mAP",
        images=len(truth),
        values={"mAP": finite_mean([row.values["AP"] for row in rows])},
        classes=rows,
        counted="images",
    )


def _average_precision(labels: np.ndarray, scores: np.ndarray) -> Value:
    """Average precision of one class; None where no image has it."""
    if not labels.any():
        return None
    order = np.argsort(-scores, kind="stable")
    # Images of one score are chosen together: thresholds lie behind the last of them.
    last = np.append(scores[order][1:] != scores[order][:-1], True)
    found = np.cumsum(labels[order])[last]
    chosen = np.flatnonzero(last) + 1
    steps = np.diff(found, prepend=0)
    return float((steps * found / chosen).sum() / labels.sum())
