"""Similarity of all levels of two files, or of one, from the vectors of the images that both have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpnx.analysis.similarity import CrossHSIC, cka, dissimilarity_ranks, rank_correlations
from fpnx.analysis.vectors import blocks, chosen_levels, matched_images, pooled
from fpnx.core.analysis_config import CompareConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.text import escape, plural
from fpnx.store.reader import DONE, Store

__all__ = ["Comparison", "compare_stores"]

LEAST_IMAGES = 4  # of which the unbiased estimate can be computed


@dataclass(frozen=True, eq=False)
class Comparison:
    """How alike the levels of two files are. The rows of the matrices are levels of the first file.

    Attributes:
        files: paths of the files, the same one twice where there is one.
        levels: their levels.
        images: number of images that were compared: done in both files, with finite vectors.
        unmatched: number of images of each file that are done, but not in the other.
        nonfinite: number of images left out because a vector has NaN or infinite values.
        cka: linear CKA, (rows, columns) float64, NaN where it is not defined.
        rsa: Spearman's correlation of the dissimilarity matrices, in the same form.
        rsa_images: number of images that `rsa` is of.
        seed: of the drawing of these.
        constant: the levels of each file whose vectors are the same for all images; no number is defined for them.
    """

    files: tuple[str, str]
    levels: tuple[tuple[str, ...], tuple[str, ...]]
    images: int
    unmatched: tuple[int, int]
    nonfinite: int
    cka: np.ndarray
    rsa: np.ndarray
    rsa_images: int
    seed: int
    constant: tuple[tuple[str, ...], tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; null where a number is not defined."""
        return {
            "files": [escape(path) for path in self.files],
            "levels": [list(levels) for levels in self.levels],
            "images": self.images,
            "unmatched": list(self.unmatched),
            "nonfinite": self.nonfinite,
            "constant": [list(levels) for levels in self.constant],
            "cka": {"estimator": "unbiased", "images": self.images, "matrix": _plain(self.cka)},
            "rsa": {
                "distance": "euclidean",
                "images": self.rsa_images,
                "seed": self.seed,
                "matrix": _plain(self.rsa),
            },
        }


def compare_stores(stores: Sequence[Store], config: CompareConfig, listener: Listener) -> Comparison:
    """Compare the levels of one file, or of two, image by image.

    Vectors of 512 images are in memory at a time, those that RSA is of, and for each two levels 8 bytes × the channels
    of one × those of the other.

    Raises:
        FpnxError: where fewer than 4 images can be compared, or levels do not fit.
    """
    levels, images = chosen_levels(stores, config.levels), matched_images(stores)
    count = len(images[0])
    drawn = np.zeros(count, bool)
    drawn[np.random.default_rng(config.seed).choice(count, min(count, config.sample), replace=False)] = True
    places = [(number, level) for number, names in enumerate(levels) for level in names]
    similarity, kept = _Similarity(len(levels[0]), len(places), both=len(stores) > 1), list[list[np.ndarray]]()
    nonfinite = 0
    for part in blocks(count):
        vectors = [pooled(stores[number], level, images[number][part]) for number, level in places]
        finite = np.logical_and.reduce([np.isfinite(each).all(axis=1) for each in vectors])
        nonfinite += int((~finite).sum())
        vectors = [each[finite] for each in vectors]
        similarity.update(vectors)
        kept.append([each[drawn[part][finite]] for each in vectors])
        listener.progress("images", part.stop, count)
    if similarity.count < LEAST_IMAGES:
        why = f" ({plural(nonfinite, 'image')} left out for NaN or infinite values)" if nonfinite else ""
        raise FpnxError(
            f"{plural(similarity.count, 'image')} to compare{why}: take files that have at least {LEAST_IMAGES}"
        )
    constant = similarity.constant()
    rsa, rsa_images = _rsa([np.concatenate(each) for each in zip(*kept, strict=True)], len(levels[0]), len(stores) > 1)
    done = [int((store.status == DONE).sum()) for store in stores]
    return Comparison(
        files=(stores[0].path, stores[-1].path),
        levels=(levels[0], levels[-1]),
        images=similarity.count,
        unmatched=(done[0] - count, done[-1] - count),
        nonfinite=nonfinite,
        cka=similarity.matrix(),
        rsa=rsa,
        rsa_images=rsa_images,
        seed=config.seed,
        constant=(
            tuple(level for level, same in zip(levels[0], constant, strict=False) if same),
            tuple(level for level, same in zip(levels[-1], constant[-len(levels[-1]) :], strict=True) if same),
        ),
    )


class _Similarity:
    """CKA between the first `rows` of `total` sets of features and the others, or, unless `both`, among all."""

    def __init__(self, rows: int, total: int, both: bool) -> None:
        self._columns = range(rows, total) if both else range(rows)
        self._rows = range(rows)
        pairs = {(min(pair), max(pair)) for pair in itertools.product(self._rows, self._columns)}
        self._pairs = sorted(pairs | {(number, number) for number in range(total)})
        self._hsic: dict[tuple[int, int], CrossHSIC] = {}
        self._shifts: list[np.ndarray] = []
        self.count = 0

    def update(self, vectors: Sequence[np.ndarray]) -> None:
        """Add the vectors of a block of images, (n, C) for each set."""
        if not len(vectors[0]):
            return
        if not self._shifts:  # near the mean, so that differences of large sums stay exact
            self._shifts = [each.mean(axis=0, dtype=np.float64) for each in vectors]
            channels = [each.shape[1] for each in vectors]
            self._hsic = {(i, j): CrossHSIC(channels[i], channels[j]) for i, j in self._pairs}
        self.count += len(vectors[0])
        shifted = [each.astype(np.float64) - shift for each, shift in zip(vectors, self._shifts, strict=True)]
        for (i, j), hsic in self._hsic.items():
            hsic.update(shifted[i], shifted[j])

    def constant(self) -> list[bool]:
        """For each set, whether its vectors are the same for all images."""
        return [not self._hsic[i, i].value() > 0 for i in range(len(self._shifts))]

    def matrix(self) -> np.ndarray:
        """CKA of each row with each column."""
        values = {pair: hsic.value() for pair, hsic in self._hsic.items()}
        return np.array(
            [[cka(values[min(i, j), max(i, j)], values[i, i], values[j, j]) for j in self._columns] for i in self._rows]
        )


def _rsa(vectors: Sequence[np.ndarray], rows: int, both: bool) -> tuple[np.ndarray, int]:
    """The correlations of the dissimilarity matrices, and the number of images."""
    images = len(vectors[0])
    if images < 3:  # two images have one distance
        return np.full((rows, len(vectors) - rows if both else rows), math.nan), images
    ranks = np.stack([dissimilarity_ranks(each) for each in vectors])
    return rank_correlations(ranks[:rows], ranks[rows:] if both else ranks), images


def _plain(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]
