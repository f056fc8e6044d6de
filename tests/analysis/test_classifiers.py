"""Cross-validated classifiers: against plain implementations of their definitions, numbers by hand, bounded memory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fpnx.analysis import classifiers
from fpnx.analysis.classifiers import (
    Features,
    Folds,
    interval,
    linear_predictions,
    neighbor_predictions,
    stratified_folds,
)
from tests.helpers.files import ROOT
from tests.helpers.process import Forked

RANDOM = np.random.default_rng(3)


def features_of(x: np.ndarray) -> Features:
    return Features(x.shape[1], lambda indices: x[indices].astype(np.float32))


def clusters(count: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clusters, with channels of very different scale, and one that is constant."""
    labels = np.arange(count) % classes
    x = RANDOM.normal(size=(classes, width))[labels] + RANDOM.normal(size=(count, width))
    x = x * np.logspace(-3, 3, width) + 5
    x[:, 0] = 7
    return x, labels


def standardised(x: np.ndarray, training: np.ndarray) -> np.ndarray:
    deviation = x[training].std(axis=0)
    return (x - x[training].mean(axis=0)) / np.where(deviation > 0, deviation, 1)


def by_newton(x: np.ndarray, labels: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression in float64 by Newton's method on all parameters at once."""
    count, width = x.shape
    classes = int(labels.max()) + 1
    inputs = np.concatenate([x, np.ones((count, 1))], axis=1)
    penalty = np.tile(np.append(np.full(width, l2), 0), classes)
    parameters, wanted = np.zeros((classes, width + 1)), np.eye(classes)[labels]
    for _ in range(30):
        logits = inputs @ parameters.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = ((p - wanted).T @ inputs / count).ravel() + penalty * parameters.ravel()
        hessian = np.zeros((classes, width + 1, classes, width + 1))
        for a in range(classes):
            for b in range(classes):
                weights = p[:, a] * ((a == b) - p[:, b])
                hessian[a, :, b] = (inputs * weights[:, None]).T @ inputs / count
        matrix = hessian.reshape(gradient.size, gradient.size) + np.diag(penalty)
        parameters -= (np.linalg.lstsq(matrix, gradient, rcond=None)[0]).reshape(parameters.shape)
    return parameters[:, :-1].T, parameters[:, -1]


def test_logistic_regression_has_the_same_minimum_as_newtons_method(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = clusters(120, 5, 3)
    folds = stratified_folds(labels, np.arange(120), 3, seed=0)
    monkeypatch.setattr(classifiers, "TOLERANCE", 1e-7)
    problem = Folds(features_of(x), labels, folds)
    for fold in range(3):
        training = np.flatnonzero(folds != fold)
        scaled = standardised(x, training)
        weight, bias = by_newton(scaled[training], labels[training], 0.01)
        found_weight, found_bias = classifiers._fit(problem, fold, 0.01)
        np.testing.assert_allclose(found_weight.numpy(), weight, atol=1e-3)
        np.testing.assert_allclose(found_bias.numpy() - found_bias.numpy().mean(), bias - bias.mean(), atol=1e-3)
    predicted = linear_predictions(problem, 0.01)
    last = np.flatnonzero(folds == 2)
    np.testing.assert_array_equal(predicted[last], (scaled[last] @ weight + bias).argmax(axis=1))


@pytest.mark.parametrize("neighbors", [1, 4, 1000])
def test_neighbors_are_those_of_all_distances(neighbors: int) -> None:
    x, labels = clusters(90, 6, 3)
    folds = stratified_folds(labels, np.arange(90), 3, seed=0)
    queries = np.arange(0, 90, 2)
    found = neighbor_predictions(Folds(features_of(x), labels, folds), neighbors, queries)
    for query, predicted in zip(queries, found, strict=True):
        training = np.flatnonzero(folds != folds[query])
        scaled = standardised(x, training)
        distances = ((scaled[training] - scaled[query]) ** 2).sum(axis=1)
        near = labels[training][np.argsort(distances)[:neighbors]]
        assert predicted == np.bincount(near).argmax()


def test_neighbors_by_hand() -> None:
    # In fold 0 the sample at 0 is predicted from 1, 2, 3 (class 1, 0, 0), and so on.
    x = np.array([[0.0], [1], [2], [3], [4], [10]])
    labels = np.array([0, 1, 0, 0, 1, 1])
    folds = np.array([0, 1, 1, 1, 1, 0])
    problem = Folds(features_of(x), labels, folds)
    assert neighbor_predictions(problem, 1, np.array([0, 5])).tolist() == [1, 1]
    assert neighbor_predictions(problem, 3, np.array([0, 5])).tolist() == [0, 0]
    assert neighbor_predictions(problem, 2, np.array([0])).tolist() == [0]  # of equal votes the lowest class
    # 1, 2, 3, 4 are predicted from 0 and 10, classes 0 and 1.
    assert neighbor_predictions(problem, 1, np.array([1, 2, 3, 4])).tolist() == [0, 0, 0, 0]


def test_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = clusters(200, 6, 4)
    folds = stratified_folds(labels, np.arange(200), 5, seed=1)
    everything = np.arange(200)
    whole = Folds(features_of(x), labels, folds)
    expected = linear_predictions(whole, 0.01), neighbor_predictions(whole, 5, everything)
    for name, value in (("BLOCK", 17), ("QUERY_BLOCK", 7), ("HELD_BYTES", 0)):
        monkeypatch.setattr(classifiers, name, value)
    parts = Folds(features_of(x), labels, folds)
    np.testing.assert_array_equal(linear_predictions(parts, 0.01), expected[0])
    np.testing.assert_array_equal(neighbor_predictions(parts, 5, everything), expected[1])


def test_classes_with_the_same_vectors_are_guessed() -> None:
    x, labels = RANDOM.normal(size=(600, 4)), np.arange(600) % 3
    problem = Folds(features_of(x), labels, stratified_folds(labels, np.arange(600), 5, 0))
    assert abs((linear_predictions(problem, 0.01) == labels).mean() - 1 / 3) < 0.08
    assert abs((neighbor_predictions(problem, 10, np.arange(600)) == labels).mean() - 1 / 3) < 0.08


def test_folds_have_nearly_the_same_classes() -> None:
    labels = np.array([0] * 51 + [1] * 23 + [2] * 6)
    folds = stratified_folds(labels, np.arange(80), 5, seed=0)
    counts = np.array([np.bincount(labels[folds == fold], minlength=3) for fold in range(5)])
    assert counts.sum(axis=1).tolist() == [16] * 5
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
    np.testing.assert_array_equal(folds, stratified_folds(labels, np.arange(80), 5, seed=0))
    assert (folds != stratified_folds(labels, np.arange(80), 5, seed=1)).any()


def test_samples_of_a_group_share_a_fold() -> None:
    groups = RANDOM.integers(0, 60, 400)
    labels = (RANDOM.random(400) < 0.25 + 0.5 * (groups % 2)).astype(int) + 2 * (RANDOM.random(400) < 0.1)
    folds = stratified_folds(labels, groups, 5, seed=0)
    for group in np.unique(groups):
        assert len(set(folds[groups == group])) == 1
    counts = np.array([np.bincount(labels[folds == fold], minlength=4) for fold in range(5)])
    assert (counts.sum(axis=1) > 60).all()
    assert (counts[:, :2] > 20).all()


def test_intervals_by_hand() -> None:
    # Wilson's interval of 8 of 10: (0.8 + z²/20 ± z √(0.8 · 0.2 / 10 + z² / 400)) / (1 + z² / 10).
    right = np.array([True] * 8 + [False] * 2)
    share, low, high = interval(right, np.arange(10))
    assert (share, round(low, 4), round(high, 4)) == (0.8, 0.4902, 0.9433)
    # Two boxes of each image are right or wrong together: as wide as for half as many.
    wide = interval(np.repeat(right, 2), np.repeat(np.arange(10), 2))
    assert wide == pytest.approx((share, low, high))
    # All right: the interval is that of as many images.
    assert interval(np.ones(6, bool), np.repeat(np.arange(3), 2)) == pytest.approx(
        (1, 1 / (1 + 1.96**2 / 3), 1), abs=1e-4
    )
    assert math.isnan(interval(np.ones(0, bool), np.arange(0))[0])


def test_the_interval_covers_the_truth() -> None:
    """In 95 of 100 data sets, with samples of an image that depend on each other."""
    covered = 0
    for _ in range(300):
        images = np.repeat(np.arange(60), 5)
        right = RANDOM.random(300) < np.repeat(RANDOM.beta(1.4, 0.6, 60), 5)
        _, low, high = interval(right, images)
        covered += low <= 0.7 <= high
    assert 0.9 < covered / 300 < 0.99


@pytest.mark.slow
def test_a_million_vectors_within_memory() -> None:
    code = """
import resource
import numpy as np
from fpnx.analysis.classifiers import Features, Folds, linear_predictions, neighbor_predictions, stratified_folds
count, width = 1_000_000, 256
labels = (np.arange(count) % 5).astype(np.int64)
means = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
def rows(indices):
    noise = np.random.default_rng(int(indices[0])).normal(size=(len(indices), width)).astype(np.float32)
    return means[labels[indices]] + 5 * noise
folds = stratified_folds(labels, np.arange(count), 2, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
problem = Folds(Features(width, rows), labels, folds)
import fpnx.analysis.classifiers as module
module.STEPS = 3
predicted = linear_predictions(problem, 0.01)
near = neighbor_predictions(problem, 10, np.arange(0, count, 5000))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, (predicted == labels).mean())
"""
    out, _ = Forked(code, cwd=ROOT).communicate()
    megabytes, share = map(float, out.split())
    assert megabytes < 400  # the vectors are 1 GB
    assert share > 0.5
