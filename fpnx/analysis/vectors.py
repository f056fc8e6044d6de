"""One vector for each image and level: the average over the cells that are not padding. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.names import NameIndex
from fpnx.core.text import escape
from fpnx.store.reader import DONE, Store

__all__ = ["blocks", "chosen_levels", "matched_images", "pooled"]

READ_BYTES = 1 << 25  # of one level that are read at a time
BLOCK_IMAGES = 512  # whose vectors are in memory at a time


def chosen_levels(stores: Sequence[Store], levels: str | Iterable[str] | None) -> list[tuple[str, ...]]:
    """For each file those of `levels` that it has, or all of its levels.

    Raises:
        FpnxError: for a level that no file has, or a file that has none of them.
    """
    if levels is None:
        return [store.levels for store in stores]
    wanted = parse_levels(levels)
    for level in wanted:
        if not any(level in store.levels for store in stores):
            stores[0].check_level(level)
    chosen = [tuple(level for level in wanted if level in store.levels) for store in stores]
    for store, found in zip(stores, chosen, strict=True):
        if not found:
            raise FpnxError(
                f"{escape(store.path)} has no level {', '.join(wanted)}: it has {', '.join(store.levels)}; "
                f"name some of both files with --levels"
            )
    return chosen


def matched_images(stores: Sequence[Store]) -> list[np.ndarray]:
    """The images that are done in every file, found by their stored names, in the order in which the first file has
    them on disk.

    Returns:
        (n,) int64 for each file, the index of each image in it.

    Raises:
        FpnxError: where no image is in every file.
    """
    first = stores[0]
    columns = [np.flatnonzero(first.status == DONE)]
    for store in stores[1:]:
        index = NameIndex(store.paths)
        found = (index.get(first.paths[i]) for i in columns[0].tolist())
        places = np.array([-1 if place is None else place for place in found], np.int64)
        both = (places >= 0) & (store.status[places] == DONE)
        columns = [column[both] for column in [*columns, places]]
    if not len(columns[0]):
        raise FpnxError(_why_none(stores))
    sizes = {size: number for number, size in enumerate(dict.fromkeys(first.padded_sizes))}
    groups = np.array([sizes[first.padded_sizes[i]] for i in columns[0].tolist()])
    order = np.lexsort((first.rows[columns[0]], groups))
    return [column[order] for column in columns]


def _why_none(stores: Sequence[Store]) -> str:
    for store in stores:
        if not (store.status == DONE).any():
            return f"{escape(store.path)} has no image that is done"
    examples = [f"{escape(store.path)} has {escape(store.paths[0])}" for store in stores]
    return f"no image is in every file ({', '.join(examples)}): images are matched by their stored names"


def blocks(count: int, size: int = BLOCK_IMAGES) -> Iterator[slice]:
    """Slices of at most `size` that together are 0 to `count`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def pooled(store: Store, level: str, indices: np.ndarray) -> np.ndarray:
    """Average of a level over the cells that are not padding.

    Args:
        store: the file.
        level: its name.
        indices: (n,) of the images, which must be done.

    Returns:
        (n, C) float32. NaN and infinite values of a map are in its average.
    """
    groups: dict[tuple[int, int] | None, list[int]] = {}
    for place, index in enumerate(indices.tolist()):
        groups.setdefault(store.padded_sizes[index], []).append(place)
    result: np.ndarray | None = None
    for size, places in groups.items():
        assert size is not None, "an image that is done has a size"
        dataset = store.dataset(size, level)
        if result is None:
            result = np.empty((len(indices), dataset.shape[1]), np.float32)
        image_bytes = max(1, int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize)
        for part in blocks(len(places), max(1, READ_BYTES // image_bytes)):
            chosen = places[part]
            maps = store.read(level, indices[chosen])
            extents = [store[int(index)].valid(level) for index in indices[chosen]]
            for extent in dict.fromkeys(extents):
                same = [place for place, other in enumerate(extents) if other == extent]
                kept = maps if len(same) == len(maps) else maps[same]
                with np.errstate(invalid="ignore", over="ignore"):
                    means = kept[:, :, : extent[0], : extent[1]].mean(axis=(2, 3), dtype=np.float32)
                result[[chosen[place] for place in same]] = means
    if result is None:
        example = next((store.dataset(size, level) for size in store.sizes), None)
        return np.empty((0, 0 if example is None else example.shape[1]), np.float32)
    return result
