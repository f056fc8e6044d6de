"""Colour scales that all pictures of a file share: a value range or a PCA basis for each level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from fpnx.core.config import PictureConfig
from fpnx.core.errors import FpnxError
from fpnx.store.reader import DONE, Item, Store
from fpnx.visualization.heatmaps import COMPONENTS, Basis, Moments, heatmap
from fpnx.visualization.image_maps import ImageMaps, Photo, item_maps

__all__ = ["NO_PHOTO", "ColorScale", "ColorScales", "measure_scales", "sample_cells", "sample_rows", "value_range"]

SAMPLE_IMAGES = 64
SAMPLE_BYTES = 2e9
SAMPLE_CELLS = 4096  # of one map, for the moments of its channels
NO_PHOTO = Photo(None)


@dataclass(frozen=True)
class ColorScale:
    """The values drawn as the first and the last colour, or the basis of a PCA."""

    low: float = np.nan
    high: float = np.nan
    basis: Basis | None = None


@dataclass(frozen=True)
class ColorScales:
    """One `ColorScale` for each level, measured on `images` of the file's `total` images."""

    levels: dict[str, ColorScale]
    images: int
    total: int

    def __str__(self) -> str:
        return f"from {self.images} of {self.total} images" if self.images < self.total else "from all images"


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Minimum and maximum of the finite values; NaN twice where there are none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)


def sample_rows(store: Store) -> list[int]:
    """Rows of done images, evenly spaced over the file: at most 64 images and 2 GB of features."""
    done = np.flatnonzero(store.status == DONE)
    if not done.size:
        return []
    image_bytes = {size: sum(_map_bytes(store, size, level) for level in store.levels) for size in store.sizes}
    mean = sum(image_bytes[size] for row in done.tolist() if (size := store.padded_sizes[row])) / done.size
    count = int(max(1, min(done.size, SAMPLE_IMAGES, SAMPLE_BYTES // max(mean, 1))))
    return done[np.unique(np.linspace(0, done.size - 1, count).round().astype(int))].tolist()


def measure_scales(
    store: Store,
    config: PictureConfig,
    levels: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ColorScales:
    """Measure the colour scales that all pictures of `store` share, on the images of `sample_rows`.

    The result depends on the file only, and is cached while the store is open.
    """
    chosen = tuple(levels or store.levels)
    done = int((store.status == DONE).sum())
    cached = _CACHE.setdefault(store, {})
    key = (chosen, done, config.mode, config.top, config.pick, config.point)
    if key not in cached:
        measure = _measure_bases if config.mode == "pca" else _measure_ranges
        rows = sample_rows(store)
        cached[key] = ColorScales(measure(store, chosen, rows, config, progress), len(rows), done)
    return cached[key]


_CACHE: WeakKeyDictionary[Store, dict[object, ColorScales]] = WeakKeyDictionary()


def _measure_ranges(
    store: Store,
    levels: Sequence[str],
    rows: Sequence[int],
    config: PictureConfig,
    progress: Callable[[int, int], None],
) -> dict[str, ColorScale]:
    extremes: dict[str, list[float]] = {level: [] for level in levels}
    for maps in _iterate_maps(store, rows, progress, len(rows)):
        for level in levels:
            try:
                extremes[level] += value_range(_heatmap(maps, level, config))
            except FpnxError:  # an unreadable row, or a point outside this image
                continue
    finite = {level: np.array(values)[np.isfinite(values)] for level, values in extremes.items()}
    return {
        level: ColorScale(float(v.min()), float(v.max())) if v.size else ColorScale() for level, v in finite.items()
    }


def _heatmap(maps: ImageMaps, level: str, config: PictureConfig) -> np.ndarray:
    features = maps.read(level)
    cell = None
    if config.mode == "similarity":
        cell = maps.cell_at(level, features.shape[1:], config.position(maps.source_size))
    return heatmap(features, config.mode, cell=cell, top=config.top, pick=config.pick)


def _measure_bases(
    store: Store,
    levels: Sequence[str],
    rows: Sequence[int],
    config: PictureConfig,
    progress: Callable[[int, int], None],
) -> dict[str, ColorScale]:
    """Read the sampled rows twice: for the moments, then for the range of the coordinates.

    Memory holds one map and one C × C matrix for each level.
    """
    passes = 2 * len(rows)
    moments: dict[str, Moments] = {}
    for maps in _iterate_maps(store, rows, progress, passes):
        for level in levels:
            for cells in _sampled_cells(maps, level):
                moments.setdefault(level, Moments(cells.shape[1])).add(cells)
    bases = {level: level_moments.basis() for level, level_moments in moments.items()}
    coordinates: dict[str, list[np.ndarray]] = {level: [] for level in levels}
    for maps in _iterate_maps(store, rows, lambda done, total: progress(done + len(rows), total), passes):
        for level, basis in bases.items():
            for cells in _sampled_cells(maps, level):
                coordinates[level].append(basis.project(cells.T[:, :, None]).reshape(COMPONENTS, -1))
    return {level: ColorScale(basis=basis.with_range(np.hstack(coordinates[level]))) for level, basis in bases.items()}


def _sampled_cells(maps: ImageMaps, level: str) -> Iterator[np.ndarray]:
    """The sampled cells of a map; nothing where the row cannot be read."""
    try:
        features = maps.read(level)
    except FpnxError:
        return
    yield sample_cells(features)


def sample_cells(features: np.ndarray) -> np.ndarray:
    """(C, H, W) → at most 4096 of its cells, evenly spaced, as (n, C) float32."""
    flat = features.reshape(len(features), -1)
    step = -(-flat.shape[1] // SAMPLE_CELLS)
    return flat[:, ::step].T.astype(np.float32)


def _iterate_maps(
    store: Store, rows: Sequence[int], progress: Callable[[int, int], None], total: int
) -> Iterator[ImageMaps]:
    for position, row in enumerate(rows):
        progress(position, total)
        try:
            maps = item_maps(Item(store, row), NO_PHOTO)
        except FpnxError:  # an unreadable row, which is reported when it is drawn
            continue
        yield maps
        progress(position + 1, total)


def _map_bytes(store: Store, size: tuple[int, int], level: str) -> int:
    dataset = store.dataset(size, level)
    return int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize
