"""Several files read as one store: all shards of a run, or files with one fingerprint. Does not import torch."""

from __future__ import annotations

import bisect
import glob
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, compress
from typing import Any, NamedTuple

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
from fpnx.store.reader import DONE, FAILED, PENDING, MapLayout, Store, different_fields, open_store_file
from fpnx.store.regions import REGION_TABLES, Regions

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

__all__ = [
    "STORE_ENDINGS",
    "JoinedDataset",
    "JoinedStore",
    "is_store",
    "open_joined",
    "open_store",
    "refuse_separate_shards",
]

STORE_ENDINGS = (".h5", ".hdf5", ".part")
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_OPEN = 64  # open files of a store; an eighth of the process's limit, where that is less
MAX_NAMED = 5  # missing shards that a message names
SHARD_NAME = re.compile(r"\.shard-\d{5}-of-\d{5}(?=\.|$)")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Piece(NamedTuple):
    """Consecutive rows of a dataset of one file that are consecutive in the joined dataset, too.

    Attributes:
        file: number of the file.
        start: the first row in the joined dataset.
        rows: how many.
        first: the first row in the file.
    """

    file: int
    start: int
    rows: int
    first: int


class JoinedStore(Store):
    """Several finished files with one fingerprint as one store; see `Store`.

    The images are those of the first file, then those of the next, and so on. The shards of a run stand together, in
    the order of their slices, where the first of them is named: a set of them equals the file of a run without shards.
    Their lists may differ in the times of images, as those of copies do. An image that is in several files, with the
    same name and the same bytes, is taken once, from the first file in which it is done.

    Only a limited number of the files are open at a time.

    Attributes:
        files: the stores of the files, in the order in which their images are here.
        root: that of the first file; `root_of` gives that of an image.
        argument: what `fpnx.open` takes to open the same files: a glob, or a list of paths.
        repeated: number of images that were left out, since another of the files has them.
        shard_list: fingerprint of the list that all files were cut from, where they are shards of one; else None.
    """

    def __init__(self, paths: Iterable[str], name: str | None = None) -> None:
        self._lock = threading.RLock()  # one thread may close a file that another is about to read
        self._recent: OrderedDict[int, Store] = OrderedDict()
        self._max_open = _open_file_limit()
        self._joined: dict[tuple[tuple[int, int], str], JoinedDataset] = {}
        self._layouts = {}
        self._index: NameIndex | None = None
        self._closed = False
        self._runs = _open_runs(paths)
        self.files = tuple(file for run in self._runs for file in run)
        self._full_path = [file._full_path for file in self.files]
        first, arguments = self.files[0], [argument for run in self._runs for argument in _arguments(run)]
        self.argument = name or (arguments if arguments[1:] else arguments[0])
        self.path = name or arguments[0] + (f" and {len(arguments) - 1} more" if arguments[1:] else "")
        self.shard_slice = None
        lists = {file.shard_slice.list if file.shard_slice else None for file in self.files}
        self.shard_list = lists.pop() if len(lists) == 1 else None
        self.config, self.provenance, self.fingerprint = first.config, first.provenance, first.fingerprint
        self.root, self.levels = first.root, first.levels
        kept = _kept_images(self._runs)
        self.repeated = len(kept) - int(kept.sum())
        self.paths = list(compress((path for file in self.files for path in file.paths), kept.tolist()))
        self.padded_sizes = list(compress((size for file in self.files for size in file.padded_sizes), kept.tolist()))
        for table in ("bytes", "mtimes_ns", "input_sizes", "status", "source_sizes", "nonfinite", "digests"):
            setattr(self, table, np.concatenate([getattr(file, table) for file in self.files])[kept])
        self.has_digests = all(file.has_digests for file in self.files)
        ends = np.cumsum([len(file) for file in self.files])
        self._kept = [np.flatnonzero(chosen) for chosen in np.split(kept, ends[:-1])]
        self._firsts = [0, *np.cumsum([len(chosen) for chosen in self._kept[:-1]]).tolist()]
        self.rows, self._pieces = _joined_rows(self.files, self._kept)

    def each_file(self) -> Iterator[Store]:
        """Yields the stores of the files in order; see `Store.each_file`."""
        return (self._file_at(number) for number in range(len(self.files)))

    def images_of(self, number: int) -> tuple[int, np.ndarray]:
        """The images of one file that are in this store: the index of the first here, and (n,) int64, their indices in
        the file."""
        return self._firsts[number], self._kept[number]

    def root_of(self, index: int) -> str:
        """The folder, archive or URL that the name of image `index` is relative to."""
        return self.files[self._file_of(index)].root

    def list_mismatch(self) -> str:
        """A message where the images of shards are not those of the list that they were cut from; else empty."""
        for run in self._runs:
            records = (
                record
                for file in run
                for record in zip(
                    map(os.fsencode, file.paths), file.bytes.tolist(), file.mtimes_ns.tolist(), strict=True
                )
            )
            slices = [file.shard_slice for file in run if file.shard_slice]
            if not slices:
                continue
            times = len({each.list for each in slices}) == 1  # else they are of copies of the images with other times
            if list_fingerprint(records, times=times) != (slices[0].list if times else slices[0].names):
                return "their images are not those of the list that they were cut from"
        return ""

    def refresh(self) -> None:
        """Does nothing: finished files do not change."""

    def error(self, index: int) -> str:
        """Why image `index` failed; empty where it has not."""
        number = self._file_of(index)
        with self._lock:
            return self._file_at(number).error(int(self._kept[number][index - self._firsts[number]]))

    def errors(self) -> np.ndarray:
        """(N,) reasons of all images; see `Store.errors`."""
        with self._lock:
            return np.concatenate(
                [file.errors()[kept] for file, kept in zip(self.each_file(), self._kept, strict=True)]
            )

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of every failed image."""
        found: list[tuple[str, str]] = []
        for number, file in enumerate(self.files):
            first, kept = self.images_of(number)
            failed = kept[self.status[first : first + len(kept)] == FAILED].tolist()
            if failed:
                with self._lock:
                    reasons = self._file_at(number).errors()
                found += [(file.paths[i], bytes(reasons[i]).decode(errors="replace")) for i in failed]
        return found

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The padded network-input sizes of all files, (height, width)."""
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
            joined = JoinedDataset(self, partial(Store.dataset, size=size, level=level), self._pieces[size])
            self._layouts[size, level] = MapLayout(int(joined.attrs["stride"]), joined.shape)
            self._joined[size, level] = joined
        return self._joined[size, level]

    def _read_regions(self) -> Regions:
        tables: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in REGION_TABLES}
        pieces: list[Piece] = []
        count = 0
        with self._lock:
            for number, file in enumerate(self.each_file()):
                regions, (first, kept) = file._read_regions(), self.images_of(number)
                indices = np.full(len(file), -1)
                indices[kept] = np.arange(first, first + len(kept))
                rows = np.flatnonzero(indices[regions.image] >= 0)
                for name, parts in tables.items():
                    values = getattr(regions, name)[rows]
                    parts.append(indices[values] if name == "image" else values)
                pieces += _pieces_of(number, count, rows)
                count += len(rows)
            features = JoinedDataset(self, Store.region_features, pieces or [Piece(0, 0, 0, 0)])
            joined = {name: np.concatenate(parts) for name, parts in tables.items()}
        return Regions(**joined, features=features, names=regions.names)

    def check(self) -> None:
        """Check all groups and levels of every file; see `Store.check`."""
        with self._lock:
            for file in self.each_file():
                file.check()

    def links_to(self, size: tuple[int, int], level: str) -> bool:
        """False: several files have no links together; each has its own."""
        return False

    def release(self) -> None:
        """Close all files until the next access."""
        with self._lock:
            for file in self._recent.values():
                file.release()
            self._recent.clear()

    def close(self) -> None:
        """Close all files; items of this store can no longer read."""
        self._closed = True
        for file in self.files:
            file.close()

    def _file_of(self, index: int) -> int:
        """The number of the file that has image `index`."""
        return bisect.bisect_right(self._firsts, index) - 1

    def _file_at(self, number: int) -> Store:
        file = self._recent[number] = self._recent.pop(number, self.files[number])
        while len(self._recent) > self._max_open:
            self._recent.popitem(last=False)[1].release()
        return file

    def read_rows(self, dataset: Any, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        """Read rows of a `dataset` of this store; see `fpnx.store.hdf5.read_rows`."""
        dataset.read_rows(pieces)

    def read_file(
        self,
        number: int,
        find: Callable[[Store], h5py.Dataset],
        shape: tuple[int, ...],
        pieces: Sequence[tuple[int, np.ndarray]],
    ) -> None:
        """Read rows of the dataset of one file that `find` gives; see `fpnx.store.hdf5.read_rows`.

        Raises:
            StoreError: where its rows do not have `shape`, or one is missing.
        """
        with self._lock:
            dataset = find(self._file_at(number))
            rows = max(first + len(out) for first, out in pieces)
            if dataset.shape[1:] != shape or len(dataset) < rows:
                raise StoreError(
                    f"{escape(self.files[number].path)} is not a whole fpnx file: {dataset.name} is {dataset.shape}, "
                    f"where {rows} rows of {shape} belong"
                )
            read_rows(dataset, pieces)


class JoinedDataset:
    """The rows of one dataset of all files, with the part of the interface of `h5py.Dataset` that readers use.

    Args:
        store: the joined store.
        find: gives the dataset of one file.
        pieces: the rows of the files, one or more, in the order of the rows here.

    Attributes:
        name, dtype, shape, attrs: those of the dataset in a merged file.
    """

    def __init__(self, store: JoinedStore, find: Callable[[Store], h5py.Dataset], pieces: Sequence[Piece]) -> None:
        self._store, self._find, self._pieces = store, find, pieces
        self._starts = [piece.start for piece in pieces]
        with store._lock:
            first = find(store._file_at(pieces[0].file))
            self.name, self.dtype, self.attrs = first.name, first.dtype, dict(first.attrs)
            self.shape: tuple[int, ...] = (pieces[-1].start + pieces[-1].rows, *first.shape[1:])
        self._rows_of: dict[int, range] = {}
        for file, start, count, _ in pieces:
            self._rows_of[file] = range(self._rows_of.get(file, range(start, start)).start, start + count)

    def rows_of(self, number: int) -> range:
        """The rows that one file has."""
        return self._rows_of.get(number, range(0))

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
            raise IndexError("rows of several files are read one by one, or in slices without a step")
        rows = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        self.read_rows([(start, rows)])
        return rows

    def read_rows(self, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        """Read rows; see `fpnx.store.hdf5.read_rows`. Every file is visited once."""
        by_file: dict[int, list[tuple[int, np.ndarray]]] = {}
        for first, out in pieces:
            position, done = bisect.bisect_right(self._starts, first) - 1, 0
            while done < len(out):
                file, start, count, first_of_file = self._pieces[position]
                skipped = first + done - start
                end = min(len(out), done + count - skipped)
                by_file.setdefault(file, []).append((first_of_file + skipped, out[done:end]))
                position, done = position + 1, end
        for file, parts in by_file.items():
            self._store.read_file(file, self._find, self.shape[1:], parts)


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether an input is a file of features, and not an image: by its name, else by its first bytes."""
    name = os.fsdecode(path)
    if name.endswith(STORE_ENDINGS):
        return not os.path.isdir(name)
    try:
        with open(name, "rb") as file:
            return file.read(len(HDF5_MAGIC)) == HDF5_MAGIC
    except (OSError, ValueError):
        return False


def open_store(path: Paths) -> Store:
    """Open a file that `fpnx extract` wrote, or several as one store; see `Store`.

    Several files are read as the one that `fpnx merge` makes of them: the images of the first, then those of the next.
    All must be finished, and made with one config. An image that is in several, with the same name and the same bytes,
    is taken once, from the first in which it is done; the same name with other bytes is refused. Of a run's shards all
    must be there.

    Args:
        path: a file, also a `.part` that is being written; or several as a glob, `"out.shard-*.h5"`, or as a sequence
            of paths and globs. Shards of a run may be in any order.

    Raises:
        StoreError: where a file is missing, truncated, unfinished, not written by fpnx, or of a future format version;
            where configs differ, an image is not the same in two files, or a shard is missing or given twice.
    """
    if isinstance(path, (str, os.PathLike)) and not _is_glob(os.fspath(path)):
        return open_store_file(path)
    files, name = _expanded(path)
    if len(files) == 1:
        store = open_store_file(files[0])
        if store.shard_slice is None:
            return store
        store.close()
    return JoinedStore(files, name)


def open_joined(paths: Paths) -> JoinedStore:
    """Open files as one store, given by a glob or by their paths, also where it is one; see `open_store`."""
    return JoinedStore(*_expanded(paths))


def _expanded(paths: Paths) -> tuple[list[str], str | None]:
    """The files that paths and globs name, and the glob where there is nothing else.

    Raises:
        StoreError: for a glob that fits no file, and where there is no path.
    """
    arguments = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not arguments:
        raise StoreError("no files: name those that fpnx extract wrote")
    files: list[str] = []
    for name in arguments:
        if _is_glob(name):
            raw = os.fsencode(name)
            matches = list(map(os.fsdecode, match_urls(raw))) if is_url(raw) else sorted(glob.glob(name))
            if not matches:
                raise StoreError(f"no file is called {escape(name)}: name those that fpnx extract wrote")
            files += matches
        else:
            files.append(name)
    return files, arguments[0] if len(arguments) == 1 < len(files) else None


def _is_glob(name: str) -> bool:
    """Whether a name is a pattern, and not that of a file that looks like one."""
    return glob.has_magic(name) and not os.path.lexists(name)


def refuse_separate_shards(stores: Sequence[Store]) -> None:
    """Refuse several shards of one run, which have no image in common: a shell may have expanded their pattern.

    Raises:
        FpnxError: with the pattern to give instead.
    """
    shards = [(store.fingerprint, store.shard_slice) for store in stores if store.shard_slice]
    if any(a[0] == b[0] and a[1].is_of_list(b[1]) for a, b in combinations(shards, 2)):
        pattern = re.sub(r"\.shard-\d+-", ".shard-*-", stores[0].path)
        raise FpnxError(f"these are shards of one run: give them as one, in quotes: '{escape(pattern)}'")


def _open_runs(paths: Iterable[str]) -> list[list[Store]]:
    """The stores at `paths`, all closed again: one list for the shards of each run, and one for each other file.

    Raises:
        StoreError: where a file cannot be read with the first one, or shards are not complete.
    """
    runs: list[dict[int, Store]] = []  # by the index of the shard
    first: Store | None = None
    for path in paths:
        store = open_store_file(path)
        try:
            _refuse_unfinished(store)
            first = store if first is None else first
            _refuse_other_config(first, store)
            shard = store.shard_slice
            run = next((run for run in runs if shard is not None and _is_of_run(shard, run)), None)
            if run is None:
                runs.append(run := {})
            if shard is not None and shard.index in run:
                both = f"{escape(run[shard.index].path)} and {escape(store.path)}"
                raise StoreError(f"shard {shard.shard} is there twice: {both}: name each shard once")
            run[0 if shard is None else shard.index] = store
        finally:
            store.release()
    incomplete = [run for run in runs if len(run) < _run_length(run)]
    if len(incomplete) > 1:
        _refuse_several_runs(*(next(iter(run.values())) for run in incomplete[:2]))
    if incomplete:
        _refuse_missing(incomplete[0])
    return [[run[index] for index in sorted(run)] for run in runs]


def _is_of_run(shard: ShardSlice, run: Mapping[int, Store]) -> bool:
    """Whether a shard is of the list that the shards of a run were cut from."""
    other = next(iter(run.values())).shard_slice
    return other is not None and shard.is_of_list(other)


def _run_length(run: Mapping[int, Store]) -> int:
    """Number of shards that a run has; 1 for a file that is no shard."""
    shard = next(iter(run.values())).shard_slice
    return 1 if shard is None else shard.count


def _refuse_unfinished(store: Store) -> None:
    """Refuse a file that is not finished, and a shard with another number of images than its slice."""
    shard = store.shard_slice
    name = escape(store.path) + ("" if shard is None else f" (shard {shard.shard})")
    if store.path.endswith(".part"):
        raise StoreError(f"{name} is unfinished: finish it with --resume")
    if shard is not None and len(store) != len(shard.slice):
        raise StoreError(
            f"{escape(store.path)} is not a whole fpnx file: it has {len(store)} images, and shard {shard.shard} of "
            f"{shard.images} has {len(shard.slice)}"
        )
    if pending := int((store.status == PENDING).sum()):
        raise StoreError(f"{name} is unfinished: {pending} images are pending")


def _refuse_other_config(first: Store, store: Store) -> None:
    """Refuse a file that was made with another config than the first."""
    fields = different_fields(first.config, store.config)
    if not fields and store.fingerprint != first.fingerprint:
        fields = ["their fingerprints differ"]
    if not fields:
        return
    both, differences = f"{escape(first.path)} and {escape(store.path)}", escape("; ".join(fields))
    if first.shard_slice is not None and store.shard_slice is not None:
        raise StoreError(f"{both} are shards of different runs ({differences}): name those of one run only")
    raise StoreError(
        f"{both} were made with different options ({differences}): only files of one model and preprocessing are read "
        f"as one"
    )


def _refuse_several_runs(one: Store, other: Store) -> None:
    """Refuse shards of two runs, neither of which is complete."""
    assert one.shard_slice is not None
    assert other.shard_slice is not None
    counts = one.shard_slice.count, other.shard_slice.count
    what = "their lists of images differ"
    if counts[0] != counts[1]:
        what = f"one of {counts[0]} shards and one of {counts[1]}"
    raise StoreError(
        f"{escape(one.path)} and {escape(other.path)} are shards of different runs ({what}): name all those of one run"
    )


def _kept_images(runs: Sequence[Sequence[Store]]) -> np.ndarray:
    """(N,) bool: which of the images of all files are taken; one that is in several runs is taken once.

    Raises:
        StoreError: for an image that is not the same in two of them.
    """
    files = [file for run in runs for file in run]
    ends = np.cumsum([len(file) for file in files])
    kept = np.ones(int(ends[-1]), bool)
    if len(runs) == 1:
        return kept
    status = np.concatenate([file.status for file in files])
    run_of_file = [number for number, run in enumerate(runs) for _ in run]
    places: dict[str, int] = {}  # of the image of each name that is taken
    place = -1
    for number, file in enumerate(files):
        for i, name in enumerate(file.paths):
            place += 1
            if (before := places.setdefault(name, place)) == place:
                continue
            other = int(np.searchsorted(ends, before, "right"))
            if run_of_file[other] == run_of_file[number]:  # a damaged file, as `fpnx verify` finds it
                continue
            both_done = status[before] == status[place] == DONE
            if both_done:
                _refuse_other_image(files[other], before - int(ends[other]) + len(files[other]), file, i)
            better = status[place] == DONE and not both_done
            kept[before if better else place] = False
            places[name] = place if better else before
    return kept


def _refuse_other_image(one: Store, i: int, other: Store, j: int) -> None:
    """Refuse an image that is done in two files under the same name, where it is another image, or may be.

    Content hashes decide; where a file has none, the size and time of the image file.
    """
    digests = one.digests[i], other.digests[j]
    sizes, times = (int(one.bytes[i]), int(other.bytes[j])), (int(one.mtimes_ns[i]), int(other.mtimes_ns[j]))
    if all(digest.any() for digest in digests):
        same, differ = np.array_equal(*digests), True
    else:
        same = sizes[0] == sizes[1] >= 0 and times[0] == times[1] != 0
        differ = sizes[0] != sizes[1] and min(sizes) >= 0
    if same:
        return
    both = f"{escape(one.paths[i])} is in {escape(one.path)} and in {escape(other.path)}"
    if differ:
        raise StoreError(
            f"{both}, with other bytes: leave out one of the files, or extract the images from a folder above both, so "
            f"that their names differ"
        )
    raise StoreError(
        f"{both}, which do not tell whether its bytes are the same (no digest, and another time): leave out one of "
        f"the files, or extract the image again"
    )


def _arguments(run: Sequence[Store]) -> list[str]:
    """What `fpnx.open` takes to open a run again: the pattern of its shards, or the paths of its files."""
    paths = [file.path for file in run]
    patterns = {SHARD_NAME.sub(f".shard-*-of-{len(run):05}", path) for path in paths}
    return list(patterns) if run[0].shard_slice is not None and len(patterns) == 1 else paths


def _refuse_missing(shards: Mapping[int, Store]) -> None:
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


def _joined_rows(
    files: Sequence[Store], kept: Sequence[np.ndarray]
) -> tuple[np.ndarray, dict[tuple[int, int], list[Piece]]]:
    """(N,) int64, the row of every image that is taken among all of its padded size; and by size, where rows are."""
    counts: Counter[tuple[int, int]] = Counter()
    rows, pieces = [], dict[tuple[int, int], list[Piece]]()
    for number, (file, images) in enumerate(zip(files, kept, strict=True)):
        rows_in_file, joined = file.rows[images], np.full(len(images), -1, np.int64)
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, image in enumerate(images.tolist()):
            size = file.padded_sizes[image]
            if size is not None and rows_in_file[place] >= 0:
                by_size.setdefault(size, []).append(place)
        for size, places in by_size.items():
            ordered = np.array(places)[np.argsort(rows_in_file[places], kind="stable")]  # as they are on the disk
            joined[ordered] = np.arange(counts[size], counts[size] + len(ordered))
            pieces.setdefault(size, []).extend(_pieces_of(number, counts[size], rows_in_file[ordered]))
            counts[size] += len(ordered)
        rows.append(joined)
    return np.concatenate(rows), pieces


def _pieces_of(number: int, start: int, rows: np.ndarray) -> list[Piece]:
    """The runs of consecutive `rows` of one file, which become the rows from `start` on."""
    if not len(rows):
        return []
    breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    return [
        Piece(number, start + begin, end - begin, int(rows[begin]))
        for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True)
    ]


def _open_file_limit() -> int:
    if resource is None:
        return MAX_OPEN
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, soft // 8))
