"""Structural verification of a file: its tables agree, all values can be read, and NaN and inf are where counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from fpnx.core.config import fingerprint
from fpnx.core.events import Listener
from fpnx.core.text import escape
from fpnx.core.validation import format_size, parse_pool
from fpnx.store.joined_store import JoinedStore
from fpnx.store.reader import DONE, FAILED, PENDING, Store

__all__ = ["Verification", "describe_first", "verify_structure"]

BLOCK_BYTES = 1 << 26  # of features that are read at a time


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of a verification.

    Attributes:
        file: the file, or what stands for several.
        images, done, failed, pending: number of images, and of those with each status.
        values: number of stored values that were read.
        problems: one line for each problem; empty where the file verifies.
        files: number of files that were read as one; 0 for a single file.
        shards: number of shards among these.
        hashed: number of images whose bytes were compared with the stored content hash.
        compared: number of images that were recomputed.
        largest_difference: between stored and recomputed values, relative to the largest value of their level.
    """

    file: str
    images: int
    done: int
    failed: int
    pending: int
    values: int
    problems: tuple[str, ...]
    files: int = 0
    shards: int = 0
    hashed: int = 0
    compared: int = 0
    largest_difference: float = 0.0

    @property
    def exit_code(self) -> int:
        """1 where the file does not verify, else 0."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "problems": list(self.problems), "verified": not self.problems, "exit_code": self.exit_code}


def verify_structure(store: Store, listener: Listener | None = None) -> Verification:
    """Read everything in a store, and collect the problems.

    Args:
        store: a file, or several as one; then all of each file is read, also images that others have, too.
        listener: receives the progress.
    """
    listener = listener or Listener()
    problems, values, images_before = [*_set_problems(store)], 0, 0
    total = sum(map(len, store.files)) or len(store)
    for file in store.each_file():
        file.check()
        file_problems = [*_table_problems(file), *_dataset_problems(file)]
        if file.has_regions:
            file_problems += _region_table_problems(file)
        if not file_problems:  # with wrong tables, the values would be reported again
            for read, images, found in _region_problems(file) if file.has_regions else _value_problems(file):
                values += read
                file_problems += found
                listener.progress("images", images_before + images, total)
        images_before += len(file)
        prefix = "" if file is store else f"{escape(os.path.basename(file.path))}: "
        problems += [prefix + problem for problem in file_problems]
    counts = {status: int((store.status == status).sum()) for status in (PENDING, DONE, FAILED)}
    return Verification(
        file=store.path,
        images=len(store),
        done=counts[DONE],
        failed=counts[FAILED],
        pending=counts[PENDING],
        values=values,
        problems=tuple(problems),
        files=len(store.files),
        shards=store.shard_count,
    )


def _set_problems(store: Store) -> Iterator[str]:
    """Problems between files that are read as one."""
    if isinstance(store, JoinedStore):
        if problem := store.list_mismatch():
            yield problem
        if len(set(store.paths)) != len(store.paths):
            yield "a path occurs in two shards"


def _table_problems(store: Store) -> Iterator[str]:
    """Problems in the tables of one file, without reading features."""
    if store.fingerprint != fingerprint(store.config):
        yield "the fingerprint is not the sha256 of the config: one of them was changed"
    if len(set(store.paths)) != len(store.paths):
        yield "a path occurs twice"
    if store.shard_slice and len(store) != len(store.shard_slice.slice):
        shard = store.shard_slice
        yield f"it has {len(store)} images, but shard {shard.shard} of {shard.images} images has {len(shard.slice)}"
    done, failed = store.status == DONE, store.status == FAILED
    if pending := int((store.status == PENDING).sum()):
        yield f"{pending} of {len(store)} images are pending: continue with fpnx extract --resume"
    if unknown := int((~np.isin(store.status, (PENDING, DONE, FAILED))).sum()):
        yield f"{unknown} images have a status that does not exist"
    errors = dict(store.failures())
    yield from describe_first(
        "failed without a reason", store, [i for i in np.flatnonzero(failed).tolist() if not errors[store.paths[i]]]
    )
    yield from describe_first("done without a row", store, np.flatnonzero(done & (store.rows < 0)))
    yield from describe_first(
        "done without a source size", store, np.flatnonzero(done & (store.source_sizes <= 0).any(axis=1))
    )
    has_row = store.rows >= 0
    padded = np.array([size or (0, 0) for size in store.padded_sizes]).reshape(-1, 2)
    yield from describe_first("in a group without a row", store, np.flatnonzero(~has_row & padded.any(axis=1)))
    wrong = has_row & ((store.input_sizes < 1) | (store.input_sizes > padded)).any(axis=1)
    yield from describe_first("its input size does not fit its group", store, np.flatnonzero(wrong))


def _dataset_problems(store: Store) -> Iterator[str]:
    """Problems in the numbering of rows and the shapes of datasets: every image has its own row."""
    counts = Counter(size for size in store.padded_sizes if size is not None)
    for size in sorted({*counts, *store.sizes}):
        image_rows = store.rows[_has_size(store, size)]
        if sorted(image_rows.tolist()) != list(range(len(image_rows))):
            yield f"rows of {format_size(size)} are not numbered one by one"
        for level in store.levels:
            dataset = store.dataset(size, level)
            rows, channels, *cells = dataset.shape
            if rows != len(image_rows):
                yield f"{dataset.name} has {rows} rows for {len(image_rows)} images"
            if channels != dataset.attrs.get("channels") or (level[0] != "C" and channels != store.config["channels"]):
                yield f"{dataset.name} has {channels} channels, which is not what it says"
            stride, pool = store.stride(level), store.config["pool"]
            limits = tuple(-(-side // stride) for side in size)
            if store.has_regions:
                if cells != [0, 0]:
                    yield f"{dataset.name} has {cells[0]}×{cells[1]} cells, where a file of regions has none"
            elif pool != "none" and tuple(cells) != parse_pool(pool):
                yield f"{dataset.name} has {cells[0]}×{cells[1]} cells, which is not pool {escape(pool)}"
            elif pool == "none" and not all(1 <= count <= limit for count, limit in zip(cells, limits, strict=True)):
                height, width = limits
                yield f"{dataset.name} has {cells[0]}×{cells[1]} cells, where stride {stride} gives {height}×{width}"
    if len(store.sizes) == 1:
        for level in store.levels:
            if not store.links_to(store.sizes[0], level):
                yield f"/{level} does not lead to /pyramids/{format_size(store.sizes[0])}/{level}"


def _value_problems(store: Store) -> Iterator[tuple[int, int, list[str]]]:
    """Reads all features; yields (number of values read, number of images finished so far, problems) for each block."""
    finished = 0
    for size in store.sizes:
        images = np.flatnonzero(_has_size(store, size))
        images = images[np.argsort(store.rows[images])]
        for position, level in enumerate(store.levels):
            dataset, column = store.dataset(size, level), store.levels.index(level)
            for start, block in _blocks(dataset):
                indices = images[start : start + len(block)]
                status = store.status[indices]
                nonfinite = (~np.isfinite(block)).reshape(len(block), -1).sum(axis=1)
                miscounted = indices[(status == DONE) & (nonfinite != store.nonfinite[indices, column])]
                filled = indices[(status == FAILED) & ~np.isnan(block).reshape(len(block), -1).all(axis=1)]
                problems = [*describe_first(f"not as finite in {level} as the file says", store, miscounted)]
                problems += describe_first(f"failed, but with values in {level}", store, filled)
                finished += len(block) if position == len(store.levels) - 1 else 0
                yield block.size, finished, problems


def _region_table_problems(store: Store) -> Iterator[str]:
    """Problems in the boxes, levels and labels of the images that are done, without reading features."""
    regions = store.regions
    done = store.status[regions.image] == DONE
    numbers = list(store.level_numbers.values())
    for what, wrong in (
        ("a region of an image without a row", store.rows[regions.image] < 0),
        ("a box that is not finite", done & (regions.level != 0) & ~np.isfinite(regions.box).all(axis=1)),
        ("a region of a level that the file does not have", done & ~np.isin(regions.level, [0, *numbers])),
        ("a region of a class without a name", ~np.isin(regions.label, list(regions.names))),
    ):
        yield from describe_first(what, store, np.unique(regions.image[wrong]))


def _region_problems(store: Store) -> Iterator[tuple[int, int, list[str]]]:
    """Reads the features of all regions; yields as `_value_problems` does."""
    regions, numbers = store.regions, store.level_numbers
    nonfinite = np.zeros_like(store.nonfinite)
    for start, block in _blocks(regions.features):
        images, levels = (table[start : start + len(block)] for table in (regions.image, regions.level))
        counts = (~np.isfinite(block)).reshape(len(block), -1).sum(axis=1)
        for column, level in enumerate(store.levels):
            chosen = levels == numbers[level]
            np.add.at(nonfinite[:, column], images[chosen], counts[chosen])
        unfilled = ~np.isnan(block).reshape(len(block), -1).all(axis=1)
        values = np.unique(images[(store.status[images] == FAILED) & unfilled])
        yield block.size, int(images[-1]), [*describe_first("failed, but with values in its regions", store, values)]
    miscounted = np.flatnonzero((store.status == DONE) & (nonfinite != store.nonfinite).any(axis=1))
    yield 0, len(store), [*describe_first("not as finite in its regions as the file says", store, miscounted)]


def _has_size(store: Store, size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: which images have this padded size."""
    return np.array([padded == size for padded in store.padded_sizes], bool)


def _blocks(dataset: h5py.Dataset) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a dataset, in blocks of bounded size."""
    bytes_per_row = max(1, int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize)
    step = max(1, BLOCK_BYTES // bytes_per_row)
    for start in range(0, len(dataset), step):
        yield start, dataset[start : start + step]


def describe_first(what: str, store: Store, indices: Sequence[int] | np.ndarray) -> Iterator[str]:
    """One line about the images `indices`, with the name of the first; nothing where there are none."""
    if len(indices):
        others = f" and {len(indices) - 1} others" if len(indices) > 1 else ""
        yield f"{escape(store.paths[int(indices[0])])}{others}: {what}"
