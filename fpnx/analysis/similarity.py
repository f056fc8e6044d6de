"""Similarity of representations: linear CKA, streamed, and representational similarity analysis (RSA)."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["CrossHSIC", "cka", "dissimilarity_ranks", "rank_correlations"]


class CrossHSIC:
    """Unbiased estimate of HSIC for the linear kernels of two sets of features of the same images, added up over
    batches (Song et al. 2012, "Feature selection via dependence maximization", equation 5).

    With K = X Xᵀ and L = Y Yᵀ, of which the diagonals are set to 0, it is
    (tr(K L) + (1ᵀK1)(1ᵀL1) / ((n-1)(n-2)) - 2 1ᵀK L 1 / (n-2)) / (n(n-3)).
    All three terms follow from sums over images, so that no n × n matrix is made. The estimate does not change where a
    constant vector is subtracted from all features.

    Args:
        channels_x, channels_y: lengths of the vectors of both sets. 8 bytes × their product are held.
    """

    def __init__(self, channels_x: int, channels_y: int) -> None:
        self.count = 0
        self._cross = np.zeros((channels_x, channels_y))  # Xᵀ Y
        self._sum_x, self._sum_y = np.zeros(channels_x), np.zeros(channels_y)
        self._weighted_x, self._weighted_y = np.zeros(channels_x), np.zeros(channels_y)  # Σ l_ii x_i and Σ k_ii y_i
        self._norms_x = self._norms_y = self._norms_xy = 0.0  # Σ k_ii, Σ l_ii, Σ k_ii l_ii

    def update(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add the vectors (n, C) float64 of n images in both sets."""
        k, lengths = np.einsum("ij,ij->i", x, x), np.einsum("ij,ij->i", y, y)
        self.count += len(x)
        self._cross += x.T @ y
        self._sum_x += x.sum(axis=0)
        self._sum_y += y.sum(axis=0)
        self._weighted_x += lengths @ x
        self._weighted_y += k @ y
        self._norms_x += float(k.sum())
        self._norms_y += float(lengths.sum())
        self._norms_xy += float(k @ lengths)

    def value(self) -> float:
        """The estimate; NaN for fewer than 4 images."""
        n = self.count
        if n < 4:
            return math.nan
        trace = float(np.vdot(self._cross, self._cross)) - self._norms_xy
        total_x = float(self._sum_x @ self._sum_x) - self._norms_x
        total_y = float(self._sum_y @ self._sum_y) - self._norms_y
        rows = float(self._sum_x @ self._cross @ self._sum_y)
        rows -= float(self._sum_x @ self._weighted_x) + float(self._sum_y @ self._weighted_y) - self._norms_xy
        return (trace + total_x * total_y / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def cka(between: float, within_x: float, within_y: float) -> float:
    """Linear CKA of two sets of features from their HSIC and that of each with itself (Kornblith et al. 2019, arXiv
    1905.00414); NaN where features of a set do not differ between images.

    From unbiased estimates, as here, it may be a little below 0 or above 1.
    """
    product = within_x * within_y
    if not (within_x > 0 and within_y > 0 and product > 0):
        return math.nan
    return between / math.sqrt(product)


def dissimilarity_ranks(vectors: np.ndarray) -> np.ndarray:
    """Ranks of the distances between all pairs of images, the upper triangle of the dissimilarity matrix.

    Args:
        vectors: (m, C).

    Returns:
        (m (m - 1) / 2,) float64 of mean 0 and length 1; the ranks of equal distances are averaged. All 0 where all
        distances are equal.
    """
    shifted = np.asarray(vectors, np.float64) - np.asarray(vectors[0], np.float64)
    gram = shifted @ shifted.T
    squares = np.diag(gram)
    distances = (squares[:, None] + squares[None, :] - 2 * gram)[np.triu_indices(len(gram), 1)]
    ranks = _ranks(np.maximum(distances, 0))
    ranks -= ranks.mean()
    length = float(np.sqrt(ranks @ ranks))
    return ranks / length if length else np.zeros_like(ranks)


def rank_correlations(ranks_x: np.ndarray, ranks_y: np.ndarray) -> np.ndarray:
    """Spearman's correlations of dissimilarity matrices (Kriegeskorte et al. 2008).

    Args:
        ranks_x, ranks_y: (a, pairs) and (b, pairs), rows as `dissimilarity_ranks` makes them.

    Returns:
        (a, b); NaN for rows of 0.
    """
    result = ranks_x @ ranks_y.T
    result[~ranks_x.any(axis=1)] = math.nan
    result[:, ~ranks_y.any(axis=1)] = math.nan
    return result


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 on; equal values get the average of their ranks."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.append(starts, len(values)))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(starts + (counts - 1) / 2, counts)
    return ranks
