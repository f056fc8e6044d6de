"""Scores of classification, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fpnx.evaluation.classification import classification_scores
from fpnx.evaluation.scores import Confusion
from fpnx.labels.annotations import Category, ImageLabels


def categories(count: int) -> tuple[Category, ...]:
    return tuple(Category(10 * i, f"c{i}") for i in range(count))


def images(*classes: Sequence[int]) -> list[ImageLabels]:
    return [ImageLabels(name=f"{i}.jpg", classes=np.array(c, np.int64)) for i, c in enumerate(classes)]


def ranked(*orders: Sequence[int]) -> np.ndarray:
    """Logits in which the classes of each image have the given order, best first."""
    return -np.argsort(np.array(orders), axis=1).astype(np.float32)


def test_accuracy_and_top_5_by_hand() -> None:
    truth = images([0], [0], [1], [1], [1], [6])
    logits = ranked(
        [0, 1, 2, 3, 4, 5, 6],  # right
        [1, 0, 2, 3, 4, 5, 6],  # second
        [1, 0, 2, 3, 4, 5, 6],  # right
        [6, 5, 4, 3, 1, 2, 0],  # fifth
        [6, 5, 4, 3, 2, 1, 0],  # sixth
        [6, 5, 4, 3, 2, 1, 0],  # right
    )
    scores = classification_scores(categories(7), truth, logits)
    assert (scores.task, scores.main, scores.images, scores.counted) == ("classification", "accuracy", 6, "images")
    assert scores.values == pytest.approx({"accuracy": 3 / 6, "top5": 5 / 6, "mean_recall": (1 / 2 + 1 / 3 + 1) / 3})
    rows = {row.name: (row.id, row.count, dict(row.values)) for row in scores.classes}
    assert rows["c0"] == (0, 2, {"recall": 0.5, "precision": 1.0})
    assert rows["c1"] == (10, 3, {"recall": pytest.approx(1 / 3), "precision": 0.5})
    assert rows["c2"] == (20, 0, {"recall": None, "precision": None})
    assert rows["c6"] == (60, 1, {"recall": 1.0, "precision": pytest.approx(1 / 3)})
    assert scores.confusions == (Confusion("c1", "c6", 2), Confusion("c0", "c1", 1))


def test_few_classes_have_no_top_5() -> None:
    scores = classification_scores(categories(5), images([4]), ranked([4, 0, 1, 2, 3]))
    assert dict(scores.values) == {"accuracy": 1.0, "mean_recall": 1.0}
    assert scores.confusions == ()


def test_images_without_one_class_and_logits_that_are_no_numbers() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [np.nan, -5.0], [np.nan, np.nan]])
    scores = classification_scores(categories(2), images([0], [0, 1], [1], []), logits)
    assert (scores.images, scores.value) == (2, 1.0)
    assert classification_scores(categories(2), [], np.empty((0, 2))).value is None


def test_average_precision_by_hand() -> None:
    truth = images([0], [0, 1], [], [1], [0])
    logits = np.array(
        [
            [0.9, 0.1, 0.0],
            [0.8, 0.9, 0.0],
            [0.7, 0.5, 0.0],
            [0.6, 0.5, 0.0],
            [0.5, 0.5, 0.0],
        ]
    )
    scores = classification_scores(categories(3), truth, logits, multi_label=True)
    # c0: found at ranks 1, 2 and 5. c1: at rank 1, then one of the three that follow with one score.
    expected = [(1 + 1 + 3 / 5) / 3, (1 + 2 / 4) / 2, None]
    assert [row.values["AP"] for row in scores.classes] == [pytest.approx(e) if e else None for e in expected]
    assert [row.count for row in scores.classes] == [3, 2, 0]
    assert (scores.main, scores.images) == ("mAP", 5)
    assert scores.value == pytest.approx((expected[0] + expected[1]) / 2)


def test_average_precision_does_not_depend_on_the_order_of_images() -> None:
    draw = np.random.default_rng(0)
    truth = images(*([0] if draw.random() < 0.4 else [] for _ in range(60)))
    logits = np.round(draw.random((60, 1)), 1)
    order = draw.permutation(60)
    first = classification_scores(categories(1), truth, logits, multi_label=True)
    second = classification_scores(categories(1), [truth[i] for i in order], logits[order], multi_label=True)
    assert first.value == pytest.approx(second.value, abs=1e-12)
    # The same sum, threshold by threshold.
    labels = np.array([len(image.classes) for image in truth])
    expected, before = 0.0, 0.0
    for threshold in sorted(set(logits[:, 0]), reverse=True):
        chosen = logits[:, 0] >= threshold
        recall = labels[chosen].sum() / labels.sum()
        expected += (recall - before) * labels[chosen].mean()
        before = recall
    assert first.value == pytest.approx(expected, abs=1e-12)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 images and 2 classes"):
        classification_scores(categories(2), images([0]), np.zeros((1, 3)))
