"""Maps in a compact form, for a page: 16-bit values, 8-bit colours, and a few directions for similarity."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpnx.core.errors import FpnxError
from fpnx.store.reader import Item, Store
from fpnx.visualization.color_scale import NO_PHOTO, cells_of, sample_rows, value_range
from fpnx.visualization.heatmaps import COMPONENTS, Basis, Moments, heatmap, similarity
from fpnx.visualization.scene import scene_of

__all__ = ["PLAIN_MODES", "Digest", "digest", "encoded", "quantised", "unit"]

PLAIN_MODES = ("energy", "mean", "max", "std")
DIRECTIONS = 16
ABSENT = 65535  # a value that is not finite
PAIRS = 512  # cells of an image whose similarity is compared, exact with compact


@dataclass(frozen=True)
class Digest:
    """What one level of one file needs to be read back.

    Attributes:
        ranges: least and greatest value by mode.
        basis: of the file's PCA.
        directions: (k, C): what similarity is computed in.
        error: 95 % of the similarities are nearer than this to the exact ones.
    """

    ranges: dict[str, tuple[float, float]]
    basis: Basis
    directions: np.ndarray
    error: float


def digest(
    store: Store, levels: Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Digest]:
    """Measure a file on the same bounded part of it as its scales, in two passes."""
    rows = sample_rows(store)
    spreads: dict[str, dict[str, list[float]]] = {level: {mode: [] for mode in PLAIN_MODES} for level in levels}
    moments: dict[str, Moments] = {}
    lengths: dict[str, Moments] = {}

    def first(level: str, features: np.ndarray) -> None:
        cells = cells_of(features)
        moments.setdefault(level, Moments(cells.shape[1])).add(cells)
        lengths.setdefault(level, Moments(cells.shape[1])).add(unit(cells))
        for mode in PLAIN_MODES:
            spreads[level][mode] += value_range(heatmap(features, mode))

    _each(store, rows, levels, first, lambda done: progress(done, 2 * len(rows)))
    bases = {level: found.basis() for level, found in moments.items()}
    directions = {level: found.directions(DIRECTIONS) for level, found in lengths.items()}
    coordinates: dict[str, list[np.ndarray]] = {level: [] for level in levels}
    errors: dict[str, list[np.ndarray]] = {level: [] for level in levels}

    def second(level: str, features: np.ndarray) -> None:
        cells = cells_of(features)
        coordinates[level].append(bases[level].project(cells.T[:, :, None]).reshape(COMPONENTS, -1))
        some = cells[:: -(-len(cells) // PAIRS)]
        middle = len(some) // 2
        exact = similarity(some.T[:, :, None], (middle, 0))[:, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            compact = unit(quantised(some, directions[level]).astype(np.float64))
        errors[level].append(np.abs(compact @ compact[middle] - exact))

    _each(store, rows, levels, second, lambda done: progress(len(rows) + done, 2 * len(rows)))
    return {
        level: Digest(
            {mode: value_range(np.array(ends)) for mode, ends in spreads[level].items()},
            basis.ranged(np.hstack(coordinates[level])),
            directions[level],
            _percentile(np.hstack(errors[level])),
        )
        for level, basis in bases.items()
    }


def encoded(features: np.ndarray, facts: Digest) -> dict[str, Any]:
    """(C, H, W) → JSON values: by mode base64 of little-endian arrays, (H, W) uint16 between `low` and `high`
    (65535: not finite), (H, W, 3) uint8 of the PCA, (H, W, k) int8 of the directions."""
    height, width = features.shape[1:]
    flat = features.reshape(len(features), -1).T
    told: dict[str, Any] = {"height": height, "width": width}
    for mode in PLAIN_MODES:
        values = heatmap(features, mode).astype(np.float64)
        low, high = value_range(values)
        finite = np.isfinite(values)
        share = (np.where(finite, values, low) - low) / ((high - low) or 1.0)
        steps = np.where(finite, np.rint(np.nan_to_num(share) * (ABSENT - 1)), ABSENT)
        ends = [low, high] if finite.any() else [0.0, 0.0]
        told[mode] = {"low": ends[0], "high": ends[1], "values": _base64(steps.astype("<u2"))}
    colours = np.nan_to_num(facts.basis.colours(features), nan=0.6)
    told["pca"] = _base64((colours * 255 + 0.5).astype(np.uint8))
    told["directions"] = _base64(quantised(flat, facts.directions))
    return told


def quantised(cells: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(n, C) cells → (n, k) int8: each of length 127 in the directions; 0 for one that has no length or is broken."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        inside = unit(unit(cells.astype(np.float64)) @ directions.T)
    return np.rint(np.nan_to_num(inside, posinf=0.0, neginf=0.0) * 127).astype(np.int8)


def unit(cells: np.ndarray) -> np.ndarray:
    """(n, C) cells at length 1; NaN where there is no length."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return cells / np.sqrt(np.einsum("nc,nc->n", cells, cells, dtype=np.float64))[:, None]


def _each(
    store: Store,
    rows: Sequence[int],
    levels: Sequence[str],
    work: Callable[[str, np.ndarray], None],
    progress: Callable[[int], None],
) -> None:
    for position, row in enumerate(rows):
        for level in levels:
            try:
                features = scene_of(Item(store, row), NO_PHOTO).read(level)
            except FpnxError:  # a broken row, named when its turn comes
                continue
            work(level, features)
        progress(position + 1)


def _percentile(errors: np.ndarray) -> float:
    finite = errors[np.isfinite(errors)]
    return float(np.percentile(finite, 95)) if finite.size else 0.0


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
