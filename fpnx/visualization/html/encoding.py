"""Compact encoding of maps for the HTML page: 16-bit values, 8-bit colours, 8-bit directions for similarity."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpnx.core.errors import FpnxError
from fpnx.store.reader import Item, Store
from fpnx.visualization.color_scale import NO_PHOTO, sample_cells, sample_rows, value_range
from fpnx.visualization.heatmaps import COMPONENTS, Basis, Moments, heatmap, similarity
from fpnx.visualization.image_maps import item_maps

__all__ = ["PLAIN_MODES", "LevelStatistics", "measure_statistics", "encode_map", "quantize", "unit_vectors"]

PLAIN_MODES = ("energy", "mean", "max", "std")
DIRECTIONS = 16
NOT_FINITE = 65535  # stands for a value that is not finite
ERROR_SAMPLE_CELLS = 512  # of an image, on which the error of the similarity is measured


@dataclass(frozen=True)
class LevelStatistics:
    """What encoding and decoding one level of a file needs.

    Attributes:
        ranges: minimum and maximum by mode.
        basis: PCA basis of the file.
        directions: (k, C) orthonormal rows in which similarity is computed.
        error: 95th percentile of the similarity's absolute error.
    """

    ranges: dict[str, tuple[float, float]]
    basis: Basis
    directions: np.ndarray
    error: float


def measure_statistics(
    store: Store, levels: Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, LevelStatistics]:
    """Measure the statistics of a file on the images of `sample_rows`, in two passes."""
    rows = sample_rows(store)
    extremes: dict[str, dict[str, list[float]]] = {level: {mode: [] for mode in PLAIN_MODES} for level in levels}
    moments: dict[str, Moments] = {}
    unit_moments: dict[str, Moments] = {}

    def add_moments(level: str, features: np.ndarray) -> None:
        cells = sample_cells(features)
        moments.setdefault(level, Moments(cells.shape[1])).add(cells)
        unit_moments.setdefault(level, Moments(cells.shape[1])).add(unit_vectors(cells))
        for mode in PLAIN_MODES:
            extremes[level][mode] += value_range(heatmap(features, mode))

    _for_each_map(store, rows, levels, add_moments, lambda done: progress(done, 2 * len(rows)))
    bases = {level: level_moments.basis() for level, level_moments in moments.items()}
    directions = {level: level_moments.directions(DIRECTIONS) for level, level_moments in unit_moments.items()}
    coordinates: dict[str, list[np.ndarray]] = {level: [] for level in levels}
    errors: dict[str, list[np.ndarray]] = {level: [] for level in levels}

    def add_coordinates(level: str, features: np.ndarray) -> None:
        cells = sample_cells(features)
        coordinates[level].append(bases[level].project(cells.T[:, :, None]).reshape(COMPONENTS, -1))
        sample = cells[:: -(-len(cells) // ERROR_SAMPLE_CELLS)]
        reference = len(sample) // 2
        exact = similarity(sample.T[:, :, None], (reference, 0))[:, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            approximate = unit_vectors(quantize(sample, directions[level]).astype(np.float64))
        errors[level].append(np.abs(approximate @ approximate[reference] - exact))

    _for_each_map(store, rows, levels, add_coordinates, lambda done: progress(len(rows) + done, 2 * len(rows)))
    return {
        level: LevelStatistics(
            {mode: value_range(np.array(values)) for mode, values in extremes[level].items()},
            basis.with_range(np.hstack(coordinates[level])),
            directions[level],
            _percentile(np.hstack(errors[level])),
        )
        for level, basis in bases.items()
    }


def encode_map(features: np.ndarray, statistics: LevelStatistics) -> dict[str, Any]:
    """(C, H, W) features → JSON values, with arrays as base64 in little-endian order.

    By mode (H, W) uint16 from `low` to `high` (65535: not finite), for PCA (H, W, 3) uint8, for the directions
    (H, W, k) int8.
    """
    height, width = features.shape[1:]
    flat = features.reshape(len(features), -1).T
    fields: dict[str, Any] = {"height": height, "width": width}
    for mode in PLAIN_MODES:
        values = heatmap(features, mode).astype(np.float64)
        low, high = value_range(values)
        finite = np.isfinite(values)
        share = (np.where(finite, values, low) - low) / ((high - low) or 1.0)
        steps = np.where(finite, np.rint(np.nan_to_num(share) * (NOT_FINITE - 1)), NOT_FINITE)
        ends = [low, high] if finite.any() else [0.0, 0.0]
        fields[mode] = {"low": ends[0], "high": ends[1], "values": _base64(steps.astype("<u2"))}
    colours = np.nan_to_num(statistics.basis.colours(features), nan=0.6)
    fields["pca"] = _base64((colours * 255 + 0.5).astype(np.uint8))
    fields["directions"] = _base64(quantize(flat, statistics.directions))
    return fields


def quantize(cells: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(n, C) cells → (n, k) int8 coordinates in `directions`, scaled to length 127; 0 for zero or non-finite cells."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        inside = unit_vectors(unit_vectors(cells.astype(np.float64)) @ directions.T)
    return np.rint(np.nan_to_num(inside, posinf=0.0, neginf=0.0) * 127).astype(np.int8)


def unit_vectors(cells: np.ndarray) -> np.ndarray:
    """(n, C) cells scaled to length 1; NaN for cells of length 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return cells / np.sqrt(np.einsum("nc,nc->n", cells, cells, dtype=np.float64))[:, None]


def _for_each_map(
    store: Store,
    rows: Sequence[int],
    levels: Sequence[str],
    function: Callable[[str, np.ndarray], None],
    progress: Callable[[int], None],
) -> None:
    for position, row in enumerate(rows):
        for level in levels:
            try:
                features = item_maps(Item(store, row), NO_PHOTO).read(level)
            except FpnxError:  # an unreadable row, which is reported when it is drawn
                continue
            function(level, features)
        progress(position + 1)


def _percentile(errors: np.ndarray) -> float:
    finite = errors[np.isfinite(errors)]
    return float(np.percentile(finite, 95)) if finite.size else 0.0


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
