"""Compact encoding of maps for the HTML page: 16-bit values, 8-bit colours, Rice codes of what similarity needs."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpnx.core.errors import FpnxError
from fpnx.store.reader import Item, Store
from fpnx.visualization.color_scale import NO_PHOTO, sample_cells, sample_rows, value_range
from fpnx.visualization.heatmaps import COMPONENTS, Basis, Moments, heatmap
from fpnx.visualization.image_maps import item_maps

__all__ = [
    "PLAIN_MODES",
    "LevelStatistics",
    "RoundedMap",
    "coordinates",
    "encode_map",
    "measure_statistics",
    "rice_codes",
    "round_map",
    "similarity_error",
]

PLAIN_MODES = ("energy", "mean", "max", "std")
NOT_FINITE = 65535  # stands for a value that is not finite
ALL_ZERO = 255  # in place of a Rice parameter: every value of the direction is 0
RICE_PARAMETERS = range(8)
ERROR_REFERENCES = 16  # cells of a map with which the error of its similarity is measured
ERROR_CELLS = 4096  # cells of a map that are compared with them, at most


@dataclass(frozen=True)
class LevelStatistics:
    """What encoding and decoding one level of a file needs.

    Attributes:
        ranges: minimum and maximum by mode.
        basis: PCA basis of the file.
        directions: (C, C) orthonormal rows, of which the first ones keep most of the length of scaled cells.
    """

    ranges: dict[str, tuple[float, float]]
    basis: Basis
    directions: np.ndarray


@dataclass(frozen=True)
class RoundedMap:
    """A map's coordinates in whole steps.

    Attributes:
        values: (C, H·W) int8.
        parameters: (C,) uint8 Rice parameters with which each direction takes the fewest bits; 255 for only zeros.
        code_bytes: how many bytes `rice_codes` packs.
    """

    values: np.ndarray
    parameters: np.ndarray
    code_bytes: int


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
        unit_moments.setdefault(level, Moments(cells.shape[1])).add(_unit_vectors(cells))
        for mode in PLAIN_MODES:
            extremes[level][mode] += value_range(heatmap(features, mode))

    _for_each_map(store, rows, levels, add_moments, lambda done: progress(done, 2 * len(rows)))
    bases = {level: level_moments.basis() for level, level_moments in moments.items()}
    basis_coordinates: dict[str, list[np.ndarray]] = {level: [] for level in levels}

    def add_coordinates(level: str, features: np.ndarray) -> None:
        cells = sample_cells(features)
        basis_coordinates[level].append(bases[level].project(cells.T[:, :, None]).reshape(COMPONENTS, -1))

    _for_each_map(store, rows, levels, add_coordinates, lambda done: progress(len(rows) + done, 2 * len(rows)))
    return {
        level: LevelStatistics(
            {mode: value_range(np.array(values)) for mode, values in extremes[level].items()},
            basis.with_range(np.hstack(basis_coordinates[level])),
            unit_moments[level].directions(),
        )
        for level, basis in bases.items()
    }


def encode_map(features: np.ndarray, statistics: LevelStatistics) -> dict[str, Any]:
    """(C, H, W) features → JSON values, with arrays as base64 in little-endian order.

    By mode (H, W) uint16 from `low` to `high` (65535: not finite), for PCA (H, W, 3) uint8.
    """
    height, width = features.shape[1:]
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
    return fields


def coordinates(features: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(C, H, W) features → (C, H·W) float32 coordinates of the cells, scaled to length 1, in (C, C) `directions`.

    Zero for a cell of length 0, and for one with a value that is not finite.
    """
    cells = _unit_vectors(features.reshape(len(features), -1).T.astype(np.float64))
    cells[~np.isfinite(cells).all(axis=1)] = 0.0
    return directions.astype(np.float32) @ np.ascontiguousarray(cells.T, np.float32)


def round_map(exact: np.ndarray, step: float) -> RoundedMap:
    """Round (C, n) `coordinates` to multiples of `step`, at least 1/127."""
    values = _round(exact, step)
    parameters, bits = _rice_parameters(_unsigned(values))
    return RoundedMap(values, parameters, len(parameters) + int((-(-bits // 8)).sum()))


def similarity_error(exact: np.ndarray, step: float) -> float:
    """95th percentile of the absolute error of cosines between cells, with coordinates rounded to multiples of `step`.

    Measured between at most 16 and at most 4096 cells, evenly spaced over those that are not zero.
    """
    there = np.flatnonzero(exact.any(axis=0))
    if not there.size:
        return 0.0
    cells = exact[:, there[:: -(-len(there) // ERROR_CELLS)]]
    rounded = _round(cells, step).astype(np.float32)
    rounded /= np.linalg.norm(rounded, axis=0)
    every = -(-cells.shape[1] // ERROR_REFERENCES)
    errors = rounded[:, ::every].T @ rounded - cells[:, ::every].T @ cells
    return float(np.percentile(np.abs(errors), 95))


def rice_codes(rounded: RoundedMap) -> str:
    """The values as base64, in Rice's code (Rice and Plaunt 1971), direction by direction.

    A direction is a byte with its Rice parameter p, or 255 where all its values are 0 and nothing follows; then, from
    the highest bit of a byte, for each value v with u = 2v (2|v| - 1 where v < 0): u >> p zeros, a one, and the p low
    bits of u. Its last byte is filled with zeros.
    """
    parts = []
    for values, parameter in zip(_unsigned(rounded.values), rounded.parameters.tolist(), strict=True):
        parts.append(bytes([parameter]))
        if parameter == ALL_ZERO:
            continue
        ends = np.cumsum(values >> parameter, dtype=np.int64) + np.arange(1, len(values) + 1) * (1 + parameter)
        bits = np.zeros(int(ends[-1]), np.uint8)
        bits[ends - (1 + parameter)] = 1
        for bit in range(parameter):
            bits[ends - (1 + bit)] = (values >> bit) & 1
        parts.append(np.packbits(bits).tobytes())
    return base64.b64encode(b"".join(parts)).decode()


def _unit_vectors(cells: np.ndarray) -> np.ndarray:
    """(n, C) cells scaled to length 1; NaN for cells of length 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return cells / np.sqrt(np.einsum("nc,nc->n", cells, cells, dtype=np.float64))[:, None]


def _round(exact: np.ndarray, step: float) -> np.ndarray:
    """int8 multiples of `step`; where a cell would become zero, its largest coordinate becomes 1 or -1 instead."""
    values = np.rint(exact * np.float32(1 / step)).astype(np.int8)
    vanished = np.flatnonzero(~values.any(axis=0) & exact.any(axis=0))
    largest = np.abs(exact[:, vanished]).argmax(axis=0)
    values[largest, vanished] = np.sign(exact[largest, vanished])
    return values


def _unsigned(values: np.ndarray) -> np.ndarray:
    """int8 values without -128 → uint8: 0, -1, 1, -2, … become 0, 1, 2, 3, …"""
    return ((values << 1) ^ (values >> 7)).view(np.uint8)


def _rice_parameters(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of (C, n) uint8 values: the parameter (uint8) with the shortest code, and the bits of that code."""
    lengths = np.stack([(values >> p).sum(axis=1, dtype=np.int64) + values.shape[1] * (1 + p) for p in RICE_PARAMETERS])
    zero = ~values.any(axis=1)
    parameters = np.where(zero, ALL_ZERO, lengths.argmin(axis=0)).astype(np.uint8)
    return parameters, np.where(zero, 0, lengths.min(axis=0))


def _for_each_map(
    store: Store,
    rows: Sequence[int],
    levels: Sequence[str],
    function: Callable[[str, np.ndarray], None],
    progress: Callable[[int], None],
) -> None:
    for position, row in enumerate(rows):
        with suppress(FpnxError):  # an unreadable row, which is reported when it is drawn
            maps = item_maps(Item(store, row), NO_PHOTO)
            for level in levels:
                with suppress(FpnxError):
                    function(level, maps.read(level))
        progress(position + 1)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
