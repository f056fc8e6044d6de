"""What a colour means: one range, or one basis, a level for a whole file, measured on a bounded part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from fpnx.core.config import PictureConfig
from fpnx.core.errors import FpnxError
from fpnx.store.reader import DONE, Item, Store
from fpnx.visualization.heatmaps import COMPONENTS, Basis, Moments, heatmap
from fpnx.visualization.scene import Photo, Scene, scene_of

__all__ = ["NO_PHOTO", "ColorScale", "ColorScales", "cells_of", "measure_scales", "sample_rows", "value_range"]

SAMPLE_IMAGES = 64
SAMPLE_BYTES = 2e9
SAMPLE_CELLS = 4096  # of one map, for the moments of its channels
NO_PHOTO = Photo(None)


@dataclass(frozen=True)
class ColorScale:
    """The values that are drawn as the first and the last colour, or the basis of a PCA."""

    low: float = np.nan
    high: float = np.nan
    basis: Basis | None = None


@dataclass(frozen=True)
class ColorScales:
    """One `ColorScale` a level, and on how many of how many images they were measured."""

    levels: dict[str, ColorScale]
    images: int
    total: int

    def __str__(self) -> str:
        return f"from {self.images} of {self.total} images" if self.images < self.total else "from all images"


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Least and greatest finite value; NaN twice where there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)


def sample_rows(store: Store) -> list[int]:
    """Rows of done images, evenly spaced over the file: at most 64, and at most 2 GB of features."""
    done = np.flatnonzero(store.status == DONE)
    if not done.size:
        return []
    each = {size: sum(_bytes(store, size, level) for level in store.levels) for size in store.sizes}
    mean = sum(each[size] for row in done.tolist() if (size := store.padded_sizes[row])) / done.size
    count = int(max(1, min(done.size, SAMPLE_IMAGES, SAMPLE_BYTES // max(mean, 1))))
    return done[np.unique(np.linspace(0, done.size - 1, count).round().astype(int))].tolist()


def measure_scales(
    store: Store,
    config: PictureConfig,
    levels: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ColorScales:
    """The scales that pictures of `store` share; the same for the same file. Measured once for each open store."""
    chosen = tuple(levels or store.levels)
    done = int((store.status == DONE).sum())
    kept = _MEASURED.setdefault(store, {})
    key = (chosen, done, config.mode, config.top, config.pick, config.point)
    if key not in kept:
        work = _bases if config.mode == "pca" else _ranges
        rows = sample_rows(store)
        kept[key] = ColorScales(work(store, chosen, rows, config, progress), len(rows), done)
    return kept[key]


_MEASURED: WeakKeyDictionary[Store, dict[object, ColorScales]] = WeakKeyDictionary()


def _ranges(
    store: Store,
    levels: Sequence[str],
    rows: Sequence[int],
    config: PictureConfig,
    progress: Callable[[int, int], None],
) -> dict[str, ColorScale]:
    ends: dict[str, list[float]] = {level: [] for level in levels}
    for scene in _scenes(store, rows, progress, len(rows)):
        for level in levels:
            try:
                ends[level] += value_range(_shown_map(scene, level, config))
            except FpnxError:  # a broken row, or a point that this image does not have
                continue
    finite = {level: np.array(values)[np.isfinite(values)] for level, values in ends.items()}
    return {
        level: ColorScale(float(v.min()), float(v.max())) if v.size else ColorScale() for level, v in finite.items()
    }


def _shown_map(scene: Scene, level: str, config: PictureConfig) -> np.ndarray:
    features = scene.read(level)
    cell = None
    if config.mode == "similarity":
        cell = scene.cell_at(level, features.shape[1:], config.position(scene.source_size))
    return heatmap(features, config.mode, cell=cell, top=config.top, pick=config.pick)


def _bases(
    store: Store,
    levels: Sequence[str],
    rows: Sequence[int],
    config: PictureConfig,
    progress: Callable[[int, int], None],
) -> dict[str, ColorScale]:
    """Two passes: the moments of all sampled cells, then where their coordinates lie. Memory is one map and C²."""
    passes = 2 * len(rows)
    moments: dict[str, Moments] = {}
    for scene in _scenes(store, rows, progress, passes):
        for level in levels:
            for cells in _readable(scene, level):
                moments.setdefault(level, Moments(cells.shape[1])).add(cells)
    bases = {level: found.basis() for level, found in moments.items()}
    coordinates: dict[str, list[np.ndarray]] = {level: [] for level in levels}
    for scene in _scenes(store, rows, lambda done, total: progress(done + len(rows), total), passes):
        for level, basis in bases.items():
            for cells in _readable(scene, level):
                coordinates[level].append(basis.project(cells.T[:, :, None]).reshape(COMPONENTS, -1))
    return {level: ColorScale(basis=basis.ranged(np.hstack(coordinates[level]))) for level, basis in bases.items()}


def _readable(scene: Scene, level: str) -> Iterator[np.ndarray]:
    """The cells of a map, or none where its row is broken."""
    try:
        features = scene.read(level)
    except FpnxError:
        return
    yield cells_of(features)


def cells_of(features: np.ndarray) -> np.ndarray:
    """(C, H, W) → at most 4096 of its cells, evenly spaced, as (n, C) float32."""
    flat = features.reshape(len(features), -1)
    step = -(-flat.shape[1] // SAMPLE_CELLS)
    return flat[:, ::step].T.astype(np.float32)


def _scenes(store: Store, rows: Sequence[int], progress: Callable[[int, int], None], total: int) -> Iterator[Scene]:
    for position, row in enumerate(rows):
        progress(position, total)
        try:
            scene = scene_of(Item(store, row), NO_PHOTO)
        except FpnxError:  # a broken row, named when its turn comes
            continue
        yield scene
        progress(position + 1, total)


def _bytes(store: Store, size: tuple[int, int], level: str) -> int:
    dataset = store.dataset(size, level)
    return int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize
