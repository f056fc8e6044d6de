"""Vectors of images, boxes and pixels at the levels of a file."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import roi_align

from fpnx.analysis.classifiers import Features
from fpnx.analysis.samples import Samples
from fpnx.analysis.vectors import blocks, pooled
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.files import check_space, disk_error, free_bytes, reserve_space
from fpnx.core.levels import UNSTRIDED_LEVELS, level_number
from fpnx.core.text import escape
from fpnx.store.reader import Item, Store

__all__ = ["SampleVectors", "by_size_levels", "vector_folder"]

MEMORY_BYTES = 1 << 30  # of all vectors; beyond it they are in temporary files
CANONICAL, SHORTER_SIDE, CANONICAL_LEVEL = 224, 800, 4  # of Eq. 1 of the FPN paper, and the images it is made for


class SampleVectors:
    """The vectors of samples at several levels of a file, in memory or in temporary files.

    Args:
        store: the file.
        levels: which to take.
        images: (k,) indices in it of the images that `samples.images` counts.
        samples: what the vectors are of.
        folder: for temporary files; None keeps the vectors in memory.
        listener: receives the progress.
    """

    def __init__(
        self,
        store: Store,
        levels: Sequence[str],
        images: np.ndarray,
        samples: Samples,
        folder: Path | None,
        listener: Listener,
    ) -> None:
        if samples.places is not None and store.config.get("pool", "none") != "none":
            raise FpnxError(
                f"{escape(store.path)} is pooled, so that {samples.kind} have no place in it: extract with --pool none"
            )
        self.levels, self._samples = tuple(levels), samples
        channels = {level: pooled(store, level, images[:1]).shape[1] for level in levels}
        self._arrays = {level: _empty((len(samples), width), folder) for level, width in channels.items()}
        self.finite = np.ones(len(samples), bool)
        if samples.places is None:
            self._fill_images(store, images, listener)
        else:
            self._fill_places(store, images, listener)

    def _fill_images(self, store: Store, images: np.ndarray, listener: Listener) -> None:
        for part in blocks(len(self._samples)):
            for level, array in self._arrays.items():
                self._put(array, part, pooled(store, level, images[self._samples.images[part]]))
            listener.progress("images", part.stop, len(self._samples))

    def _fill_places(self, store: Store, images: np.ndarray, listener: Listener) -> None:
        """The samples of one image stand together, so that each map is read once."""
        places = self._samples.places
        assert places is not None
        ends = [*(np.flatnonzero(np.diff(self._samples.images)) + 1).tolist(), len(self._samples)]
        vectors_at = _box_vectors if self._samples.kind == "boxes" else _cell_vectors
        start = 0
        for number, end in enumerate(ends):
            item = store[int(images[self._samples.images[start]])]
            for level, array in self._arrays.items():
                self._put(array, slice(start, end), vectors_at(item, level, places[start:end]))
            start = end
            listener.progress("images", number + 1, len(ends))

    def _put(self, array: np.ndarray, part: slice, values: np.ndarray) -> None:
        array[part] = values
        self.finite[part] &= np.isfinite(values).all(axis=1)

    def features(self, levels: Sequence[str], kept: np.ndarray) -> Features:
        """The vectors of `levels`, side by side, of the samples `kept` (their indices)."""
        arrays = [self._arrays[level] for level in levels]

        def rows(indices: np.ndarray) -> np.ndarray:
            return np.concatenate([array[kept[indices]] for array in arrays], axis=1)

        return Features(sum(array.shape[1] for array in arrays), rows)

    def features_by_size(self, chosen: np.ndarray, levels: Sequence[str], kept: np.ndarray) -> Features:
        """The vector of each sample `kept` at one level: `levels[chosen[i]]` for sample i of all."""
        arrays = [self._arrays[level] for level in levels]

        def rows(indices: np.ndarray) -> np.ndarray:
            result = np.empty((len(indices), arrays[0].shape[1]), np.float32)
            for number, array in enumerate(arrays):
                here = chosen[kept[indices]] == number
                result[here] = array[kept[indices[here]]]
            return result

        return Features(arrays[0].shape[1], rows)

    def same_channels(self) -> tuple[str, ...]:
        """The P levels, where there are several and all have the same channels; else none."""
        levels = [level for level in self.levels if level.startswith("P")]
        widths = {self._arrays[level].shape[1] for level in levels}
        return tuple(levels) if len(levels) > 1 and len(widths) == 1 else ()


def by_size_levels(store: Store, images: np.ndarray, samples: Samples, levels: Sequence[str]) -> np.ndarray:
    """(n,) the level of each box by Eq. 1 of the FPN paper (arXiv 1612.03144), as a position in `levels`.

    k = floor(4 + log2(sqrt(w h) / 224)), or the nearest of `levels`, for boxes in pixels of an image whose shorter side
    has 800.
    """
    assert samples.sides is not None, "boxes have sides"
    shorter = store.source_sizes[images].min(axis=1)[samples.images]
    sides = np.maximum(samples.sides * SHORTER_SIDE / shorter, 1e-6)
    wanted = np.floor(CANONICAL_LEVEL + np.log2(sides / CANONICAL))
    numbers = np.array([level_number(level) for level in levels if level not in UNSTRIDED_LEVELS])
    return np.abs(wanted[:, None] - numbers[None]).argmin(axis=1)


def _valid_map(item: Item, level: str) -> np.ndarray:
    """(C, H, W) float32, without padding."""
    height, width = item.valid(level)
    return np.ascontiguousarray(item[level][:, :height, :width], np.float32)


def _box_vectors(item: Item, level: str, boxes: np.ndarray) -> np.ndarray:
    """(n, C) averages over boxes, given as shares of the image: RoIAlign (arXiv 1703.06870) with one bin.

    Values are interpolated at as many points as the box has cells, and beyond the edge those at the edge count.
    """
    height, width = item.input_size
    scaled = torch.from_numpy((boxes * [width, height, width, height]).astype(np.float32))
    maps = torch.from_numpy(_valid_map(item, level))[None]
    aligned = roi_align(maps, [scaled], 1, 1 / item.stride(level), sampling_ratio=-1, aligned=True)
    result: np.ndarray = aligned[:, :, 0, 0].numpy()
    return result


def _cell_vectors(item: Item, level: str, points: np.ndarray) -> np.ndarray:
    """(n, C) values of the cells under points, given as shares of the image."""
    values = _valid_map(item, level)
    inputs, stride = np.array(item.input_size[::-1]), item.stride(level)
    cells = np.minimum((points * inputs / stride).astype(np.int64), np.array(values.shape[:0:-1]) - 1)
    result: np.ndarray = values[:, cells[:, 1], cells[:, 0]].T
    return result


@contextmanager
def vector_folder(samples: int, width: int) -> Iterator[Path | None]:
    """Yields a folder for `samples` vectors of `width` values in all, or None where they fit into memory.

    Raises:
        FpnxError: where there is too little space for temporary files.
    """
    needed = samples * width * 4
    if needed <= MEMORY_BYTES:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="fpnx-") as name:
        folder = Path(name)
        check_space(folder / "vectors", needed, free_bytes(folder))
        yield folder


def _empty(shape: tuple[int, int], folder: Path | None) -> np.ndarray:
    size = math.prod(shape) * 4
    if folder is None or not size:
        return np.empty(shape, np.float32)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.truncate(size)
        try:
            reserve_space(file.fileno(), size)  # a write to a mapped file that finds the disk full ends the process
        except OSError as error:
            raise disk_error(error, folder, size) from error
    return np.memmap(file.name, np.float32, "r+", shape=shape)
