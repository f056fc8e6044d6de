"""Verification of a file's structure: its tables agree, and every value is read and as finite as counted."""

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
from fpnx.store.reader import DONE, FAILED, PENDING, Store
from fpnx.store.shard_set import ShardSet

__all__ = ["Verification", "describe_first", "verify_structure"]

BLOCK = 1 << 26  # bytes of features that are looked at together


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was looked at, and what is wrong.

    Attributes:
        file: the file, or the pattern of a set of shards.
        images, done, failed, pending: how many there are.
        values: how many stored numbers were read.
        problems: one line for each thing that is not as it should be; empty where the file verifies.
        shards: how many files it is, where it is a set of them; else 0.
        compared: images that were computed again.
        largest_difference: between stored and computed values, relative to the largest of their level.
    """

    file: str
    images: int
    done: int
    failed: int
    pending: int
    values: int
    problems: tuple[str, ...]
    shards: int = 0
    compared: int = 0
    largest_difference: float = 0.0

    @property
    def exit_code(self) -> int:
        """0, or 1 where the file does not verify."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**plain, "problems": list(self.problems), "verified": not self.problems, "exit_code": self.exit_code}


def verify_structure(store: Store, listener: Listener | None = None) -> Verification:
    """Read everything in a store and say what is wrong with it.

    Args:
        store: a file, or all shards of a run.
        listener: receives the progress.
    """
    hears = listener or Listener()
    problems, values, before = [*_whole(store)], 0, 0
    for part in store.each():
        part.check()
        wrong = [*_tables(part), *_placement(part)]
        if not wrong:  # the rows of a wrong table would only be wrong again
            for read, seen, found in _values(part):
                values += read
                wrong += found
                hears.progress("images", before + seen, len(store))
        before += len(part)
        where = "" if part is store else f"{escape(os.path.basename(part.path))}: "
        problems += [where + problem for problem in wrong]
    states = {state: int((store.status == state).sum()) for state in (PENDING, DONE, FAILED)}
    return Verification(
        file=store.path,
        images=len(store),
        done=states[DONE],
        failed=states[FAILED],
        pending=states[PENDING],
        values=values,
        problems=tuple(problems),
        shards=len(store.shards),
    )


def _whole(store: Store) -> Iterator[str]:
    """What is wrong with a set of shards that each may be right."""
    if isinstance(store, ShardSet):
        if why := store.altered():
            yield why
        if len(set(store.paths)) != len(store.paths):
            yield "a path stands in two shards"


def _tables(store: Store) -> Iterator[str]:
    """What is wrong with the tables, without a look at the features."""
    if store.fingerprint != fingerprint(store.config):
        yield "the fingerprint is not the sha256 of the config: one of them was changed"
    if len(set(store.paths)) != len(store.paths):
        yield "a path stands there twice"
    if store.shard_slice and len(store) != len(store.shard_slice.slice):
        part = store.shard_slice
        yield f"it has {len(store)} images, where shard {part.shard} of {part.images} has another number"
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
    placed = store.rows >= 0
    padded = np.array([size or (0, 0) for size in store.padded_sizes]).reshape(-1, 2)
    yield from describe_first("in a group without a row", store, np.flatnonzero(~placed & padded.any(axis=1)))
    wrong = placed & ((store.input_sizes < 1) | (store.input_sizes > padded)).any(axis=1)
    yield from describe_first("of an input size that is not that of its group", store, np.flatnonzero(wrong))


def _placement(store: Store) -> Iterator[str]:
    """What is wrong with the places of images: each has its own row, and each row its image."""
    counts = Counter(size for size in store.padded_sizes if size is not None)
    for size in sorted({*counts, *store.sizes}):
        members = store.rows[_members(store, size)]
        if sorted(members.tolist()) != list(range(len(members))):
            yield f"rows of {format_size(size)} are not numbered one by one"
        for level in store.levels:
            dataset = store.dataset(size, level)
            rows, channels, *cells = dataset.shape
            if rows != len(members):
                yield f"{dataset.name} has {rows} rows for {len(members)} images"
            if channels != dataset.attrs.get("channels") or (level[0] != "C" and channels != store.config["channels"]):
                yield f"{dataset.name} has {channels} channels, which is not what it says"
            stride, pool = store.stride(level), store.config["pool"]
            most = tuple(-(-side // stride) for side in size)
            if pool != "none" and tuple(cells) != parse_pool(pool):
                yield f"{dataset.name} has {cells[0]}×{cells[1]} cells, which is not pool {escape(pool)}"
            elif pool == "none" and not all(1 <= held <= limit for held, limit in zip(cells, most, strict=True)):
                yield f"{dataset.name} has {cells[0]}×{cells[1]} cells, where stride {stride} gives {most[0]}×{most[1]}"
    if len(store.sizes) == 1:
        for level in store.levels:
            if not store.links_to(store.sizes[0], level):
                yield f"/{level} does not lead to /pyramids/{format_size(store.sizes[0])}/{level}"


def _values(store: Store) -> Iterator[tuple[int, int, list[str]]]:
    """How many values were read, how many images seen, and what is wrong: NaN or inf where none are counted."""
    seen = 0
    for size in store.sizes:
        images = np.flatnonzero(_members(store, size))
        images = images[np.argsort(store.rows[images])]
        for position, level in enumerate(store.levels):
            dataset, column = store.dataset(size, level), store.levels.index(level)
            for start, block in _blocks(dataset):
                here = images[start : start + len(block)]
                status = store.status[here]
                bad = (~np.isfinite(block)).reshape(len(block), -1).sum(axis=1)
                wrong = here[(status == DONE) & (bad != store.nonfinite[here, column])]
                filled = here[(status == FAILED) & ~np.isnan(block).reshape(len(block), -1).all(axis=1)]
                found = [*describe_first(f"not as finite in {level} as the file says", store, wrong)]
                found += describe_first(f"failed, but with values in {level}", store, filled)
                seen += len(block) if position == len(store.levels) - 1 else 0
                yield block.size, seen, found


def _members(store: Store, size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: which images have this padded size."""
    return np.array([padded == size for padded in store.padded_sizes], bool)


def _blocks(dataset: h5py.Dataset) -> Iterator[tuple[int, np.ndarray]]:
    each = max(1, int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize)
    step = max(1, BLOCK // each)
    for start in range(0, len(dataset), step):
        yield start, dataset[start : start + step]


def describe_first(what: str, store: Store, indices: Sequence[int] | np.ndarray) -> Iterator[str]:
    """One line for all `indices`, with the first of them by name."""
    if len(indices):
        others = f" and {len(indices) - 1} others" if len(indices) > 1 else ""
        yield f"{escape(store.paths[int(indices[0])])}{others}: {what}"
