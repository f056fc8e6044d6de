"""Heatmaps of feature maps: energy, mean, max, std, PCA, single channels and cosine similarity, in NumPy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fpnx.core.config import MODES, PictureConfig
from fpnx.core.errors import FpnxError
from fpnx.core.text import did_you_mean
from fpnx.core.validation import parse_channels

__all__ = ["COMPONENTS", "Basis", "Moments", "heatmap", "similarity", "strongest_channels"]

COMPONENTS = 3
RANGE_PERCENTILES = (1.0, 99.0)  # of a component's coordinates: shown as black and as full colour


@dataclass(frozen=True)
class Basis:
    """Principal components of a level's cells (Pearson 1901), with signs as in `Moments.basis`.

    Attributes:
        mean: (C,) mean of the cells.
        components: (3, C) orthonormal rows by decreasing variance; zero rows where there are fewer than three.
        explained: (3,) share of the total variance.
        low, high: (3,) the coordinates that are shown as 0 and as 1.
    """

    mean: np.ndarray
    components: np.ndarray
    explained: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, array: np.ndarray) -> Basis:
        """The basis of one (C, H, W) array, with the range of its coordinates."""
        moments = Moments(len(array))
        moments.add(array.reshape(len(array), -1).T)
        basis = moments.basis()
        return basis.with_range(basis.project(array).reshape(COMPONENTS, -1))

    def project(self, array: np.ndarray) -> np.ndarray:
        """(C, H, W) features → (3, H, W) float64 coordinates; NaN for a cell with a value that is not finite."""
        channels, height, width = array.shape
        cells = array.reshape(channels, -1).astype(np.float64) - self.mean[:, None]
        nonfinite = ~np.isfinite(cells).all(axis=0)
        cells[:, nonfinite] = 0.0
        coordinates = self.components @ cells
        coordinates[:, nonfinite] = np.nan
        return coordinates.reshape(-1, height, width)

    def with_range(self, coordinates: np.ndarray) -> Basis:
        """This basis with the 1st and 99th percentiles of (3, n) `coordinates` as its range."""
        finite = coordinates[:, np.isfinite(coordinates).all(axis=0)]
        if not finite.shape[1]:
            return self
        low, high = np.percentile(finite, RANGE_PERCENTILES, axis=1)
        return replace(self, low=low, high=high)

    def colours(self, array: np.ndarray) -> np.ndarray:
        """(C, H, W) features → (H, W, 3) float32 in 0..1: components 1 to 3 as red, green, blue; NaN as in `project`.

        A component whose range is empty is shown as 0.5.
        """
        span = self.high - self.low
        flat = span <= 0
        unit = (self.project(array) - self.low[:, None, None]) / np.where(flat, 1.0, span)[:, None, None]
        unit[flat] = np.where(np.isnan(unit[flat]), np.nan, 0.5)
        return np.clip(unit, 0.0, 1.0).transpose(1, 2, 0).astype(np.float32)


class Moments:
    """Running sum and sum of outer products of cells; memory is C², whatever the number of cells."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._sum = np.zeros(channels)
        self._outer = np.zeros((channels, channels))

    def add(self, cells: np.ndarray) -> None:
        """Add (n, C) cells; cells with a value that is not finite are ignored."""
        cells = cells[np.isfinite(cells).all(axis=1)].astype(np.float64)
        self.count += len(cells)
        self._sum += cells.sum(axis=0)
        self._outer += cells.T @ cells

    def basis(self) -> Basis:
        """The three directions of largest variance, each with the sign that makes its largest weight positive.

        Its range is empty: set it with `Basis.with_range`.
        """
        count = max(self.count, 1)
        mean = self._sum / count
        values, vectors = np.linalg.eigh(self._outer / count - np.outer(mean, mean))
        rank = min(COMPONENTS, len(mean))
        components = np.zeros((COMPONENTS, len(mean)))
        components[:rank] = vectors[:, ::-1][:, :rank].T
        largest = np.abs(components).argmax(axis=1)
        signs = np.sign(components[np.arange(COMPONENTS), largest])
        components *= np.where(signs == 0, 1.0, signs)[:, None]
        variances = np.maximum(values[::-1], 0.0)
        explained = np.zeros(COMPONENTS)
        explained[:rank] = variances[:rank] / (variances.sum() or 1.0)
        return Basis(mean, components, explained, np.zeros(COMPONENTS), np.zeros(COMPONENTS))

    def directions(self) -> np.ndarray:
        """(C, C) orthonormal rows by decreasing share of the cells' squared length, without centring."""
        _, vectors = np.linalg.eigh(self._outer)
        return np.ascontiguousarray(vectors[:, ::-1].T)


def heatmap(
    array: Any,
    mode: str = PictureConfig.mode,
    *,
    cell: tuple[int, int] | None = None,
    top: int = PictureConfig.top,
    pick: str | Iterable[int] | None = PictureConfig.pick,
) -> np.ndarray:
    """Heatmap of one level's features, given without padding.

    Args:
        array: (C, H, W) NumPy array or torch tensor.
        mode: `"energy"` (L2 norm over channels), `"mean"`, `"max"`, `"std"` over channels; `"pca"`, three principal
            components of this array as red, green and blue; `"channels"`, single channels; `"similarity"`, the
            cosine of every cell with `cell`.
        cell: (y, x) of the reference cell of `"similarity"`.
        top: how many channels `"channels"` shows, by decreasing mean absolute value.
        pick: channel numbers to show in place of those, such as `"3,17"` or `[3, 17]`.

    Returns:
        (H, W) float32; (H, W, 3) float32 in 0..1 for `"pca"`; (k, H, W) float32 for `"channels"`.

    Raises:
        FpnxError: an unknown mode, an array without three axes, a channel or a cell that does not exist.
    """
    features = _features(array)
    if mode == "energy":
        return np.sqrt(np.einsum("chw,chw->hw", features, features, dtype=np.float64)).astype(np.float32)
    if mode == "mean":
        return features.mean(axis=0, dtype=np.float64).astype(np.float32)
    if mode == "max":
        return features.max(axis=0)
    if mode == "std":
        return features.std(axis=0, dtype=np.float64).astype(np.float32)
    if mode == "pca":
        return Basis.fit(features).colours(features)
    if mode == "channels":
        return features[list(strongest_channels(features, top, pick))]
    if mode == "similarity":
        if cell is None:
            raise FpnxError("mode similarity compares with one cell: give cell=(y, x)")
        return similarity(features, cell)
    raise FpnxError(f"mode {mode!r}: take one of {', '.join(MODES)}{did_you_mean(mode, MODES)}")


def strongest_channels(features: np.ndarray, top: int, pick: str | Iterable[int] | None = None) -> tuple[int, ...]:
    """Numbers of the `top` channels of (C, H, W) by decreasing mean absolute value, or the channels in `pick`.

    Raises:
        FpnxError: for a channel that does not exist.
    """
    channels = len(features)
    if pick is not None:
        chosen = parse_channels(pick)
        missing = next((number for number in chosen if number >= channels), None)
        if missing is not None:
            raise FpnxError(f"channel {missing}: there are {channels}, numbered from 0 to {channels - 1}")
        return chosen
    strength = np.abs(features).mean(axis=(1, 2), dtype=np.float64)
    order = np.argsort(-np.nan_to_num(strength, nan=-1.0, posinf=-1.0), kind="stable")
    return tuple(order[:top].tolist())


def similarity(features: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """Cosine of every cell of (C, H, W) with the cell (y, x), (H, W) float32 in -1..1; NaN for cells of length 0.

    Raises:
        FpnxError: for a cell outside the map.
    """
    (y, x), (height, width) = cell, features.shape[1:]
    if not (0 <= y < height and 0 <= x < width):
        raise FpnxError(f"cell ({y}, {x}) is outside a map of {height}×{width} cells")
    vectors = features.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        vectors /= np.sqrt(np.einsum("chw,chw->hw", vectors, vectors))
        cosines = np.einsum("chw,c->hw", vectors, vectors[:, y, x])
    return np.clip(cosines, -1.0, 1.0).astype(np.float32)


def _features(array: Any) -> np.ndarray:
    if hasattr(array, "detach"):  # a torch tensor: it may be on a GPU, be bfloat16 or require a gradient
        array = array.detach().float().cpu()
    features = np.asarray(array, dtype=np.float32)
    if features.ndim != 3 or not features.size:
        raise FpnxError(f"features of shape {features.shape}: take one image's level, (channels, height, width)")
    return features
