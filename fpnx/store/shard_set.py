"""Sets of shards, read as one store. Does not import torch."""

from __future__ import annotations

import bisect
import glob
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import h5py
import numpy as np

from fpnx.core.errors import FpnxError, StoreError
from fpnx.core.image_list import list_fingerprint
from fpnx.core.names import NameIndex
from fpnx.core.sharding import Shard, ShardSlice
from fpnx.core.text import escape
from fpnx.core.validation import format_size
from fpnx.remote.glob import match_urls
from fpnx.remote.urls import is_url
from fpnx.store.hdf5 import read_rows
from fpnx.store.reader import PENDING, Store, different_fields, open_store_file
from fpnx.store.regions import REGION_TABLES, Regions

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

__all__ = [
    "STORE_ENDINGS",
    "JoinedDataset",
    "ShardSet",
    "is_store",
    "open_store",
    "open_shard_set",
    "refuse_separate_shards",
]

STORE_ENDINGS = (".h5", ".hdf5", ".part")
MAX_OPEN = 64  # open files of a set; an eighth of the process's limit, where that is less
MAX_NAMED = 5  # missing shards that a message names
SHARD_NAME = re.compile(r"\.shard-\d{5}-of-\d{5}(?=\.|$)")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class ShardSet(Store):
    """All shards of one run as one store, with the rows of a run without shards; see `Store`.

    Only a limited number of the files are open at a time.

    Attributes:
        shards: the stores of the shards, in order.
        list: fingerprint of the whole list of images.
    """

    def __init__(self, paths: Iterable[str], name: str | None = None) -> None:
        self._lock = threading.RLock()  # one thread may close a file that another is about to read
        self._recent: OrderedDict[int, Store] = OrderedDict()
        self._max_open = _open_file_limit()
        self._joined: dict[tuple[tuple[int, int], str], JoinedDataset] = {}
        self._index: NameIndex | None = None
        self._closed = False
        self.shards = self._open_shards(paths)
        self._full_path = [shard._full_path for shard in self.shards]
        first = self.shards[0]
        assert first.shard_slice is not None
        self.path = name or SHARD_NAME.sub(f".shard-*-of-{len(self.shards):05}", first.path)
        self.shard_slice, self.list = None, first.shard_slice.list
        self.config, self.provenance, self.fingerprint = first.config, first.provenance, first.fingerprint
        self.root, self.levels = first.root, first.levels
        self.paths = [path for shard in self.shards for path in shard.paths]
        self.padded_sizes = [size for shard in self.shards for size in shard.padded_sizes]
        for table in ("bytes", "mtimes_ns", "input_sizes", "status", "source_sizes", "nonfinite"):
            setattr(self, table, np.concatenate([getattr(shard, table) for shard in self.shards]))
        self.rows, self._pieces = _joined_rows(self.shards)
        self._firsts = [shard.shard_slice.first for shard in self.shards if shard.shard_slice]

    def _open_shards(self, paths: Iterable[str]) -> list[Store]:
        """The stores at `paths` in the order of their shards, all closed again.

        Raises:
            StoreError: where they are not the complete set of one run's shards.
        """
        shards: dict[int, Store] = {}
        for path in paths:
            store = open_store_file(path)
            try:
                part = _slice_of(store)
                _refuse_other_run(store, next(iter(shards.values()), store))
                if part.index in shards:
                    both = f"{escape(shards[part.index].path)} and {escape(store.path)}"
                    raise StoreError(f"shard {part.shard} is there twice: {both}: name each shard once")
                shards[part.index] = store
            finally:
                store.release()
        if not shards:
            raise StoreError("no shards: name their files")
        _refuse_missing(shards)
        return [shards[index] for index in sorted(shards)]

    def each_file(self) -> Iterator[Store]:
        """Yields the stores of the shards in order; see `Store.each_file`."""
        return (self._shard(number) for number in range(len(self.shards)))

    def list_mismatch(self) -> str:
        """A message where the images are not those of the list that the shards were cut from; else empty."""
        records = zip(map(os.fsencode, self.paths), self.bytes.tolist(), self.mtimes_ns.tolist(), strict=True)
        if list_fingerprint(records) == self.list:
            return ""
        return "their images are not those of the list that they were cut from"

    def refresh(self) -> None:
        """Does nothing: finished files do not change."""

    def error(self, index: int) -> str:
        """Why image `index` failed; empty where it has not."""
        number = bisect.bisect_right(self._firsts, index) - 1
        with self._lock:
            return self._shard(number).error(index - self._firsts[number])

    def errors(self) -> np.ndarray:
        """(N,) reasons of all images; see `Store.errors`."""
        with self._lock:
            return np.concatenate([shard.errors() for shard in self.each_file()])

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of every failed image."""
        with self._lock:
            return [failure for shard in self.each_file() for failure in shard.failures()]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The padded network-input sizes of all shards, (height, width)."""
        return sorted(self._pieces)

    def dataset(self, size: tuple[int, int], level: str) -> JoinedDataset:
        """All rows of one size and level, in order; see `Store.dataset`."""
        if self._closed:
            raise StoreError(f"{escape(self.path)} has been closed: read inside its with block")
        if (size, level) not in self._joined:
            if size not in self._pieces:
                raise StoreError(
                    f"{escape(self.path)} is not a whole fpnx file: /pyramids/{format_size(size)} is missing"
                )
            self._joined[size, level] = JoinedDataset(
                self, partial(Store.dataset, size=size, level=level), self._pieces[size]
            )
        return self._joined[size, level]

    def _read_regions(self) -> Regions:
        with self._lock:
            of_shards = [shard._read_regions() for shard in self.each_file()]
            tables = {name: [getattr(regions, name) for regions in of_shards] for name, _, _ in REGION_TABLES}
            tables["image"] = [image + first for image, first in zip(tables["image"], self._firsts, strict=True)]
            ends = np.cumsum([len(regions) for regions in of_shards]).tolist()
            pieces = [(i, end - len(of_shards[i]), len(of_shards[i])) for i, end in enumerate(ends)]
            features = JoinedDataset(self, Store.region_features, [piece for piece in pieces if piece[2]] or pieces[:1])
            joined = {name: np.concatenate(parts) for name, parts in tables.items()}
        return Regions(**joined, features=features, names=of_shards[0].names)

    def check(self) -> None:
        """Check all groups and levels of every shard; see `Store.check`."""
        with self._lock:
            for shard in self.each_file():
                shard.check()

    def links_to(self, size: tuple[int, int], level: str) -> bool:
        """False: a set has no links; each shard has its own."""
        return False

    def release(self) -> None:
        """Close all files until the next access."""
        with self._lock:
            for shard in self._recent.values():
                shard.release()
            self._recent.clear()

    def close(self) -> None:
        """Close all files; items of this set can no longer read."""
        self._closed = True
        for shard in self.shards:
            shard.close()

    def _shard(self, number: int) -> Store:
        shard = self._recent[number] = self._recent.pop(number, self.shards[number])
        while len(self._recent) > self._max_open:
            self._recent.popitem(last=False)[1].release()
        return shard

    def read_rows(self, dataset: Any, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        """Read rows of a `dataset` of this set; see `fpnx.store.hdf5.read_rows`."""
        dataset.read_rows(pieces)

    def read_shard(
        self,
        number: int,
        find: Callable[[Store], h5py.Dataset],
        shape: tuple[int, ...],
        pieces: Sequence[tuple[int, np.ndarray]],
    ) -> None:
        """Read rows of the dataset of shard `number` that `find` gives; see `fpnx.store.hdf5.read_rows`.

        Raises:
            StoreError: where its dataset does not have `shape`.
        """
        with self._lock:
            dataset = find(self._shard(number))
            if dataset.shape != shape:
                raise StoreError(
                    f"{escape(self.shards[number].path)} is not a whole fpnx file: {dataset.name} is {dataset.shape}, "
                    f"where {shape} belongs"
                )
            read_rows(dataset, pieces)


class JoinedDataset:
    """The rows of one dataset of all shards, with the part of the interface of `h5py.Dataset` that readers use.

    Args:
        shard_set: the set.
        find: gives the dataset of one shard.
        pieces: (shard, first row, number of rows) of each shard that has rows.

    Attributes:
        name, dtype, shape, attrs: those of the dataset in a merged file.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        find: Callable[[Store], h5py.Dataset],
        pieces: Sequence[tuple[int, int, int]],
    ) -> None:
        self._shard_set, self._find, self._pieces = shard_set, find, pieces
        self._starts = [start for _, start, _ in pieces]
        with shard_set._lock:
            first = find(shard_set._shard(pieces[0][0]))
            self.name, self.dtype, self.attrs = first.name, first.dtype, dict(first.attrs)
            self.shape: tuple[int, ...] = (pieces[-1][1] + pieces[-1][2], *first.shape[1:])

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """One row (C, H, W), or a slice of rows without a step (n, C, H, W)."""
        if not isinstance(key, slice):
            row = int(key)
            if not 0 <= row < len(self):
                raise IndexError(f"row {row} of {len(self)}")
            values: np.ndarray = self[row : row + 1][0]
            return values
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError("rows of a set of shards are read one by one, or in slices without a step")
        rows = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        self.read_rows([(start, rows)])
        return rows

    def read_rows(self, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        """Read rows; see `fpnx.store.hdf5.read_rows`. Every shard is visited once."""
        by_shard: dict[int, list[tuple[int, np.ndarray]]] = {}
        for first, out in pieces:
            position, done = bisect.bisect_right(self._starts, first) - 1, 0
            while done < len(out):
                _, start, count = self._pieces[position]
                end = min(len(out), start + count - first)
                by_shard.setdefault(position, []).append((first + done - start, out[done:end]))
                position, done = position + 1, end
        for position, parts in by_shard.items():
            number, _, count = self._pieces[position]
            self._shard_set.read_shard(number, self._find, (count, *self.shape[1:]), parts)


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether an input is a file of features, and not an image: by its name, else by its content."""
    name = os.fsdecode(path)
    return name.endswith(STORE_ENDINGS) or (os.path.isfile(name) and os.access(name, os.R_OK) and h5py.is_hdf5(name))


def open_store(path: Paths) -> Store:
    """Open a file that `fpnx extract` wrote, or the complete set of a run's shards as one store; see `Store`.

    Args:
        path: a file, also a `.part` that is being written; or shards as a glob, `"out.shard-*.h5"`, or as a sequence
            of paths, in any order.

    Raises:
        StoreError: where a file is missing, truncated, not written by fpnx, or of a future format version; where
            shards are of different runs, or one is missing, unfinished or given twice.
    """
    if not isinstance(path, (str, os.PathLike)):
        return open_shard_set(path)
    name = os.fspath(path)
    return open_shard_set(name) if glob.has_magic(name) and not os.path.lexists(name) else open_store_file(name)


def open_shard_set(paths: Paths) -> ShardSet:
    """Open the complete set of a run's shards, given by a glob or by their paths; see `open_store`."""
    arguments = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    files: list[str] = []
    for name in arguments:
        if glob.has_magic(name) and not os.path.lexists(name):
            raw = os.fsencode(name)
            matches = list(map(os.fsdecode, match_urls(raw))) if is_url(raw) else sorted(glob.glob(name))
            if not matches:
                raise StoreError(f"no file is called {escape(name)}: name the shards that fpnx extract --shard wrote")
            files += matches
        else:
            files.append(name)
    return ShardSet(files, arguments[0] if len(arguments) == 1 < len(files) else None)


def refuse_separate_shards(stores: Sequence[Store]) -> None:
    """Refuse several shards of one run, which have no image in common: a shell may have expanded their pattern.

    Raises:
        FpnxError: with the pattern to give instead.
    """
    runs = [(store.fingerprint, store.shard_slice.list) for store in stores if store.shard_slice]
    if len(set(runs)) < len(runs):
        pattern = re.sub(r"\.shard-\d+-", ".shard-*-", stores[0].path)
        raise FpnxError(f"these are shards of one run: give them as one, in quotes: '{escape(pattern)}'")


def _slice_of(store: Store) -> ShardSlice:
    """The slice that a finished shard holds.

    Raises:
        StoreError: where `store` is not a finished shard.
    """
    if store.path.endswith(".part"):
        which = f"shard {store.shard_slice.shard}" if store.shard_slice else "no shard"
        raise StoreError(f"{escape(store.path)} ({which}) is unfinished: finish it with --resume")
    if store.shard_slice is None:
        raise StoreError(f"{escape(store.path)} is no shard: it was made without --shard; open it alone")
    if len(store) != len(store.shard_slice.slice):
        raise StoreError(
            f"{escape(store.path)} is not a whole fpnx file: it has {len(store)} images, and shard "
            f"{store.shard_slice.shard} of {store.shard_slice.images} has {len(store.shard_slice.slice)}"
        )
    if pending := int((store.status == PENDING).sum()):
        raise StoreError(
            f"{escape(store.path)} (shard {store.shard_slice.shard}) is unfinished: {pending} images are pending"
        )
    return store.shard_slice


def _refuse_other_run(store: Store, first: Store) -> None:
    """Refuse a shard of another run than the first's."""
    assert store.shard_slice is not None
    assert first.shard_slice is not None
    fields = different_fields(first.config, store.config)
    if not fields and store.fingerprint != first.fingerprint:
        fields = ["their fingerprints differ"]
    if not fields and store.shard_slice.count != first.shard_slice.count:
        fields = [f"one of {first.shard_slice.count} shards and one of {store.shard_slice.count}"]
    if not fields and (store.shard_slice.list, store.shard_slice.images) != (
        first.shard_slice.list,
        first.shard_slice.images,
    ):
        fields = ["their lists of images differ"]
    if fields:
        raise StoreError(
            f"{escape(first.path)} and {escape(store.path)} are shards of different runs "
            f"({escape('; '.join(fields))}): name those of one run only"
        )


def _refuse_missing(shards: dict[int, Store]) -> None:
    """Refuse an incomplete set; the message names the missing shards."""
    first = next(iter(shards.values()))
    assert first.shard_slice is not None
    count = first.shard_slice.count
    missing = [Shard(index, count) for index in range(count) if index not in shards]
    if not missing:
        return
    path = SHARD_NAME.sub(f".shard-{missing[0].index:05}-of-{count:05}", first.path)
    names = ", ".join(map(str, missing[:MAX_NAMED])) + (
        f" and {len(missing) - MAX_NAMED} more" if missing[MAX_NAMED:] else ""
    )
    hint = "name all shards of the run"
    if path != first.path:
        part, exists = f"{path}.part", os.path.exists(path)
        hint = f"{escape(path)} is {'there, but not named' if exists else 'not there'}"
        if not exists and os.path.exists(part):
            hint = f"{escape(part)} is unfinished: finish it with --resume"
    raise StoreError(f"{len(missing)} of {count} shards missing: {names} ({hint})")


def _joined_rows(shards: Iterable[Store]) -> tuple[np.ndarray, dict[tuple[int, int], list[tuple[int, int, int]]]]:
    """The row of every image among all images of its size, and by size, (shard, first row, number of rows) of each
    shard."""
    counts: Counter[tuple[int, int] | None] = Counter()
    rows, pieces = [], dict[tuple[int, int], list[tuple[int, int, int]]]()
    for number, shard in enumerate(shards):
        before = np.array([counts[size] for size in shard.padded_sizes], np.int64)
        rows.append(np.where(shard.rows < 0, shard.rows, shard.rows + before))
        for size, count in Counter(filter(None, shard.padded_sizes)).items():
            pieces.setdefault(size, []).append((number, counts[size], count))
            counts[size] += count
    return np.concatenate(rows), pieces


def _open_file_limit() -> int:
    if resource is None:
        return MAX_OPEN
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, soft // 8))
