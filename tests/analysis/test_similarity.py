"""CKA and RSA: numbers by hand, slow references written from the definitions, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fpnx.analysis.similarity import CrossHSIC, cka, dissimilarity_ranks, rank_correlations

RANDOM = np.random.default_rng(0)


def hsic(x: np.ndarray, y: np.ndarray, batch: int = 1000) -> float:
    estimate = CrossHSIC(x.shape[1], y.shape[1])
    for start in range(0, len(x), batch):
        estimate.update(x[start : start + batch], y[start : start + batch])
    return estimate.value()


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    return cka(hsic(x, y), hsic(x, x), hsic(y, y))


def hsic_from_matrices(x: np.ndarray, y: np.ndarray) -> float:
    """The estimate as Song et al. define it: an average over all ordered 4-tuples of different images."""
    k, lengths, n = x @ x.T, y @ y.T, len(x)
    terms = [
        k[i, j] * (lengths[i, j] + lengths[q, r] - 2 * lengths[i, q])
        for i in range(n)
        for j in range(n)
        for q in range(n)
        for r in range(n)
        if len({i, j, q, r}) == 4
    ]
    return float(np.mean(terms))


def test_by_hand() -> None:
    # x = (1, 1, -1, -1): k_ij = 1 within the pairs {0, 1} and {2, 3}, else -1. K has row sums -1 without its diagonal,
    # so tr(KL) = 12, 1ᵀK1 = -4, 1ᵀKK1 = 4 and the estimate is (12 + 16 / 6 - 2 * 4 / 2) / 4 = 8 / 3.
    x = np.array([[1.0], [1], [-1], [-1]])
    assert hsic(x, x) == pytest.approx(8 / 3)
    # y = (1, -1, 1, -1): tr(KL) = -4 of 12 entries, 1ᵀKL1 = 4: (-4 + 16 / 6 - 4) / 4 = -4 / 3.
    y = np.array([[1.0], [-1], [1], [-1]])
    assert hsic(x, y) == pytest.approx(-4 / 3)
    assert linear_cka(x, y) == pytest.approx(-1 / 2)
    assert linear_cka(x, 3 * x) == pytest.approx(1)


def test_equals_the_definition_over_tuples_of_images() -> None:
    x, y = RANDOM.normal(size=(8, 3)), RANDOM.normal(size=(8, 5)) + 4
    assert hsic(x, y) == pytest.approx(hsic_from_matrices(x, y), abs=1e-12)


def test_batches_give_the_same() -> None:
    x, y = RANDOM.normal(size=(50, 3)), RANDOM.normal(size=(50, 5))
    assert hsic(x, y, batch=7) == pytest.approx(hsic(x, y), rel=1e-12)


def test_unbiased_for_independent_features_with_more_channels_than_images() -> None:
    """The biased estimate of the same is above 0.9."""
    values = [linear_cka(RANDOM.normal(size=(40, 1000)), RANDOM.normal(size=(40, 1000))) for _ in range(10)]
    assert abs(np.mean(values)) < 0.05


@pytest.mark.parametrize("kind", ["rotated", "scaled", "shifted"])
def test_invariances(kind: str) -> None:
    x, y = RANDOM.normal(size=(30, 6)) ** 3, RANDOM.normal(size=(30, 4))
    rotation = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]
    changed = {"rotated": x @ rotation, "scaled": 17.3 * x, "shifted": x + RANDOM.normal(size=6)}[kind]
    assert linear_cka(changed, y) == pytest.approx(linear_cka(x, y), abs=1e-12)
    np.testing.assert_allclose(dissimilarity_ranks(changed), dissimilarity_ranks(x), atol=1e-12)


def test_not_invariant_to_all_linear_maps() -> None:
    x, y = RANDOM.normal(size=(30, 6)), RANDOM.normal(size=(30, 4))
    stretched = x * [1, 10, 1, 1, 1, 1]
    assert abs(linear_cka(stretched, y) - linear_cka(x, y)) > 1e-3
    assert abs(dissimilarity_ranks(stretched) - dissimilarity_ranks(x)).max() > 1e-3


def test_not_defined_without_differences_or_with_few_images() -> None:
    same = np.zeros((6, 2))
    assert math.isnan(linear_cka(same, RANDOM.normal(size=(6, 2))))
    assert math.isnan(hsic(RANDOM.normal(size=(3, 2)), RANDOM.normal(size=(3, 2))))
    ranks = np.stack([dissimilarity_ranks(same), dissimilarity_ranks(RANDOM.normal(size=(6, 2)))])
    correlations = rank_correlations(ranks, ranks)
    assert np.isnan(correlations).tolist() == [[True, True], [True, False]]


def test_rsa_by_hand() -> None:
    # Points 0, 1, 3 on a line: distances 1, 3, 2 of the pairs 01, 02, 12: ranks 0, 2, 1.
    x = dissimilarity_ranks(np.array([[0.0], [1], [3]]))
    np.testing.assert_allclose(x, np.array([-1, 1, 0]) / math.sqrt(2), atol=1e-15)
    # Points 0, 1, 2: distances 1, 2, 1: ranks ½, 2, ½, which differ from 1 by -½, 1, -½.
    y = dissimilarity_ranks(np.array([[0.0], [1], [2]]))
    np.testing.assert_allclose(y, np.array([-0.5, 1, -0.5]) / math.sqrt(1.5), atol=1e-15)
    # Spearman: (½ + 1) / √(2 · 1.5)
    assert rank_correlations(x[None], y[None])[0, 0] == pytest.approx(1.5 / math.sqrt(3))


def test_rsa_equals_the_definition() -> None:
    x, y = RANDOM.integers(0, 3, (9, 4)).astype(float), RANDOM.normal(size=(9, 2))

    def ranked(vectors: np.ndarray) -> np.ndarray:
        pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
        values = np.array([((vectors[i] - vectors[j]) ** 2).sum() for i, j in pairs])
        return np.array([((values < value).sum() + (values <= value).sum() - 1) / 2 for value in values])

    expected = np.corrcoef(ranked(x), ranked(y))[0, 1]
    found = rank_correlations(dissimilarity_ranks(x)[None], dissimilarity_ranks(y)[None])[0, 0]
    assert found == pytest.approx(expected, abs=1e-12)
