"""Cross-validated nearest neighbours and logistic regression on features that need not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Features", "Folds", "interval", "linear_predictions", "neighbor_predictions", "stratified_folds"]

BLOCK = 8192  # vectors that are standardised and multiplied at a time
QUERY_BLOCK = 1024
HELD_BYTES = 1 << 28  # of the vectors of a training set, which are kept standardised if they fit
STEPS = 200  # of L-BFGS at most
TOLERANCE = 1e-5  # of the gradient, at which L-BFGS stops
CONSTANT = 1e-6  # standard deviation of a channel in shares of its mean, below which it is rounding noise
Z95 = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of samples, read in blocks.

    Attributes:
        width: length of a vector.
        rows: from indices (m,), in ascending order, to their vectors, a new array (m, width) float32.
    """

    width: int
    rows: Callable[[np.ndarray], np.ndarray]


def stratified_folds(classes: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Split samples into folds of nearly the same shares of classes, samples of one group into the same fold.

    Without groups, folds differ by at most one sample in their number. Groups are placed one after the other, those
    with the most uneven classes first, where their classes are rarest so far.

    Args:
        classes: (n,) from 0 on.
        groups: (n,) numbers of groups; all different: no groups.
        folds: how many.
        seed: of the order in which samples or groups are placed.

    Returns:
        (n,) int64, the fold of each sample.
    """
    random = np.random.default_rng(seed)
    names, group_of = np.unique(groups, return_inverse=True)
    if len(names) == len(classes):
        order = random.permutation(len(classes))
        order = order[np.argsort(classes[order], kind="stable")]
        result = np.empty(len(classes), np.int64)
        result[order] = np.arange(len(classes)) % folds
        return result
    counts = np.zeros((len(names), int(classes.max()) + 1))
    np.add.at(counts, (group_of, classes), 1)
    totals = counts.sum(axis=0)
    shares = counts / np.where(totals > 0, totals, 1)
    order = random.permutation(len(names))
    order = order[np.argsort(-counts[order].std(axis=1), kind="stable")]
    filled, sizes = np.zeros((folds, counts.shape[1])), np.zeros(folds)
    chosen = np.empty(len(names), np.int64)
    for group in order.tolist():
        overlap = filled @ shares[group]  # adding to this fold makes the squares of all shares that much larger
        best = int(np.lexsort((sizes, overlap))[0])
        chosen[group] = best
        filled[best] += shares[group]
        sizes[best] += counts[group].sum()
    return chosen[group_of]


class Folds:
    """Samples with classes and folds; in each fold in turn they are predicted from all others.

    Channels are standardised with mean and standard deviation of the training samples, which are computed for all folds
    in one pass over the features.

    Args:
        features: of all samples.
        classes: (n,) int64, from 0 on.
        folds: (n,) int64, the fold of each sample.
    """

    def __init__(self, features: Features, classes: np.ndarray, folds: np.ndarray) -> None:
        self.features, self.classes, self.folds = features, classes, folds
        self.count = int(classes.max()) + 1
        self.numbers = np.unique(folds).tolist()
        self._mean, self._scale = self._statistics()

    def _statistics(self) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Mean and standard deviation of the training samples of each fold."""
        shift = self.features.rows(np.arange(1))[0].astype(np.float64)
        sums = {number: np.zeros((2, self.features.width)) for number in self.numbers}
        for indices in _blocks(np.arange(len(self.classes))):
            values = self.features.rows(indices).astype(np.float64) - shift
            for number in self.numbers:
                own = values[self.folds[indices] == number]
                sums[number] += np.stack([own.sum(axis=0), np.einsum("ij,ij->j", own, own)])
        total = np.sum(list(sums.values()), axis=0)
        means, scales = {}, {}
        for number in self.numbers:
            count = int((self.folds != number).sum())
            first, second = (total - sums[number]) / count
            mean, deviation = first + shift, np.sqrt(np.maximum(second - first**2, 0))
            means[number] = mean.astype(np.float32)
            scales[number] = np.where(deviation > CONSTANT * np.abs(mean), deviation, 1).astype(np.float32)
        return means, scales

    def training(self, fold: int) -> np.ndarray:
        """Indices of the samples outside a fold."""
        return np.flatnonzero(self.folds != fold)

    def standardised(self, fold: int, indices: np.ndarray) -> Tensor:
        """(m, C) float32 vectors, with the mean and standard deviation of the training samples of a fold."""
        values = self.features.rows(indices)  # a copy
        values -= self._mean[fold]
        values /= self._scale[fold]
        return torch.from_numpy(values)

    def batches(self, fold: int, indices: np.ndarray) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        """A function that yields all vectors of `indices` with their classes; small sets are kept in memory."""
        classes = torch.from_numpy(self.classes)
        if len(indices) * self.features.width * 4 <= HELD_BYTES:
            held = [(self.standardised(fold, part), classes[part]) for part in _blocks(indices)]
            return lambda: iter(held)
        return lambda: ((self.standardised(fold, part), classes[part]) for part in _blocks(indices))


def neighbor_predictions(folds: Folds, neighbors: int, queries: np.ndarray) -> np.ndarray:
    """The most frequent class among the nearest neighbours in the training samples.

    Distances are Euclidean, of standardised vectors; each neighbour has one vote, and of equal votes the lowest class
    wins, as in scikit-learn's `KNeighborsClassifier`.

    Args:
        folds: the samples.
        neighbors: how many.
        queries: (m,) indices of the samples to predict, in ascending order.

    Returns:
        (m,) int64 classes.
    """
    result = np.empty(len(queries), np.int64)
    for fold in folds.numbers:
        places = np.flatnonzero(folds.folds[queries] == fold)
        if len(places):
            result[places] = _nearest_classes(folds, fold, queries[places], neighbors)
    return result


def _nearest_classes(folds: Folds, fold: int, queries: np.ndarray, neighbors: int) -> np.ndarray:
    wanted = [folds.standardised(fold, part) for part in _blocks(queries, QUERY_BLOCK)]
    best: list[tuple[Tensor, Tensor]] = [
        (torch.empty(len(each), 0, dtype=torch.float32), torch.empty(len(each), 0, dtype=torch.int64))
        for each in wanted
    ]
    for vectors, classes in folds.batches(fold, folds.training(fold))():
        squares = vectors.square().sum(dim=1)
        for number, each in enumerate(wanted):
            distances = torch.addmm(squares, each, vectors.T, alpha=-2)  # without the query's own square
            distances, labels = torch.cat([best[number][0], distances], 1), _beside(best[number][1], classes)
            kept = distances.topk(min(neighbors, distances.shape[1]), dim=1, largest=False)
            best[number] = (kept.values, labels.gather(1, kept.indices))
    votes = [torch.zeros(len(labels), folds.count, dtype=torch.int64) for _, labels in best]
    for vote, (_, labels) in zip(votes, best, strict=True):
        vote.scatter_add_(1, labels, torch.ones_like(labels))
    return np.concatenate([_first_largest(vote.numpy()) for vote in votes])


def _beside(labels: Tensor, classes: Tensor) -> Tensor:
    return torch.cat([labels, classes.expand(len(labels), -1)], 1)


def _first_largest(votes: np.ndarray) -> np.ndarray:
    result: np.ndarray = votes.argmax(axis=1)
    return result


def linear_predictions(folds: Folds, l2: float) -> np.ndarray:
    """The most probable class by multinomial logistic regression on the training samples.

    It minimises the mean cross-entropy plus `l2` / 2 times the squared weights, without the bias, of standardised
    vectors; scikit-learn's `LogisticRegression(C=1 / (l2 * n))` has the same minimum.

    Args:
        folds: the samples.
        l2: weight of the penalty.

    Returns:
        (n,) int64 classes.
    """
    result = np.empty(len(folds.classes), np.int64)
    for fold in folds.numbers:
        weight, bias = _fit(folds, fold, l2)
        for part in _blocks(np.flatnonzero(folds.folds == fold)):
            result[part] = torch.addmm(bias, folds.standardised(fold, part), weight).argmax(dim=1).numpy()
    return result


def _fit(folds: Folds, fold: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weights (C, classes) and biases (classes,) for standardised vectors."""
    training = folds.training(fold)
    batches = folds.batches(fold, training)
    weight = torch.zeros(folds.features.width, folds.count, dtype=torch.float32, device="cpu", requires_grad=True)
    bias = torch.zeros(folds.count, dtype=torch.float32, device="cpu", requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=TOLERANCE, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        with torch.no_grad():
            total = 0.5 * l2 * float(weight.square().sum())
            weight.grad, bias.grad = l2 * weight, torch.zeros_like(bias)
            for vectors, classes in batches():
                logits = torch.addmm(bias, vectors, weight)
                total += float(F.cross_entropy(logits, classes, reduction="sum")) / len(training)
                residual = logits.softmax(dim=1)
                residual[torch.arange(len(classes), device="cpu"), classes] -= 1
                residual /= len(training)
                weight.grad.addmm_(vectors.T, residual)
                bias.grad += residual.sum(dim=0)
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def interval(correct: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """The share of right predictions, with its 95 % interval (Wilson 1927).

    Samples of one group (boxes or cells of an image) are not independent. The interval is that of the number of
    independent samples which has the same variance as the mean over groups.

    Args:
        correct: (n,) bool.
        groups: (n,) numbers of groups.

    Returns:
        The share and the ends of the interval; NaN without samples.
    """
    if not len(correct):
        return math.nan, math.nan, math.nan
    _, group_of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_of).astype(np.float64)
    right = np.bincount(group_of, weights=correct)
    share = float(correct.mean())
    variance = float(np.square(right - share * sizes).sum()) / len(correct) ** 2
    count = min(share * (1 - share) / variance, len(correct)) if variance > 0 else float(len(sizes))
    spread = Z95**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half))


def _blocks(indices: np.ndarray, size: int = BLOCK) -> Iterator[np.ndarray]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
