"""The HDF5 format, version 1: the layout, and reading it. Writing is in `fpnx.store.writer`. No torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np

from fpnx.core.config import DTYPES
from fpnx.core.errors import FpnxError, NotDoneError, StoreError
from fpnx.core.levels import UNSTRIDED_LEVELS, level_number, parse_levels
from fpnx.core.provenance import Provenance
from fpnx.core.sharding import ShardSlice
from fpnx.core.text import escape
from fpnx.core.validation import format_size, parse_size
from fpnx.store.hdf5 import (
    attribute_text,
    attribute_whole,
    check_bytes,
    file_state,
    member,
    names,
    open_hdf5,
    parsed,
    table,
)

__all__ = [
    "DONE",
    "ERROR_BYTES",
    "FAILED",
    "FORMAT",
    "FORMAT_VERSION",
    "PENDING",
    "Box",
    "Item",
    "Store",
    "different_fields",
    "open_store_file",
    "valid_extent",
]

FORMAT = "fpnx"
FORMAT_VERSION = 1
PENDING, DONE, FAILED = 0, 1, 2
ERROR_BYTES = 240  # of a failed image's reason, UTF-8

Opened = TypeVar("Opened", bound="Store")


class Box(NamedTuple):
    """A rectangle in source pixels, upright image, x to the right and y down; may be fractional."""

    left: float
    top: float
    right: float
    bottom: float


class Item:
    """One image of a store and its features; reads a level when it is asked for.

    Attributes:
        path: stored path, relative to the store's root (str, undecodable bytes as surrogates).
        index: its row in `/images`.
        source_size, input_size: (height, width) of the upright source, and of what the model saw without padding.
        levels: names of the levels.
    """

    def __init__(self, store: Store, index: int) -> None:
        self._store = store
        self.index = index
        self.path = store.paths[index]
        self.levels = store.levels
        self.source_size: tuple[int, int] = tuple(store.source_sizes[index].tolist())
        self.input_size: tuple[int, int] = tuple(store.input_sizes[index].tolist())

    def __getitem__(self, level: str) -> np.ndarray:
        """Features of one level → (C, H, W), in the stored dtype."""
        dataset, row = self._dataset(level), int(self._store.rows[self.index])
        if not 0 <= row < len(dataset):
            raise StoreError(f"{escape(self._store.path)} is not a whole fpnx file: image {self.index} has no row")
        return dataset[row]

    @property
    def store(self) -> Store:
        """The store that this image is of."""
        return self._store

    def stride(self, level: str) -> int:
        """Stride of a level in input pixels."""
        return int(self._dataset(level).attrs["stride"])

    def valid(self, level: str) -> tuple[int, int]:
        """(height, width) of the cells that are not padding."""
        dataset = self._dataset(level)
        if self._store.config.get("pool", "none") != "none":
            return dataset.shape[2], dataset.shape[3]
        return valid_extent(self.input_size, int(dataset.attrs["stride"]), dataset.shape[2:])

    def box(self, level: str, y: int, x: int) -> Box:
        """The source pixels that cell (y, x) of `level` stands for: cell size is the stride in input pixels.

        Raises:
            FpnxError: for a cell outside the valid (unpadded) map.
        """
        height, width = self.valid(level)
        if not all(isinstance(at, (int, np.integer)) for at in (y, x)):
            raise TypeError(f"cell ({y!r}, {x!r}): take whole numbers, row and column")
        if not (0 <= y < height and 0 <= x < width):
            raise FpnxError(f"cell ({y}, {x}) is outside {level}, which has {height}×{width} cells")
        dataset = self._dataset(level)
        top, bottom = self._span(y, 0, dataset)
        left, right = self._span(x, 1, dataset)
        return Box(left, top, right, bottom)

    def _span(self, cell: int, axis: int, dataset: h5py.Dataset) -> tuple[float, float]:
        stride, source, seen = int(dataset.attrs["stride"]), self.source_size[axis], self.input_size[axis]
        first, last = cell, cell + 1
        bins = dataset.shape[2 + axis]
        if self._store.config.get("pool", "none") != "none":  # adaptive pooling: bins over the valid cells
            cells = math.ceil(seen / stride)
            first, last = cell * cells // bins, -(-(cell + 1) * cells // bins)
        pixels = source / seen
        return first * stride * pixels, min(last * stride * pixels, float(source))

    def _dataset(self, level: str) -> h5py.Dataset:
        if level not in self.levels:
            raise FpnxError(f"no level {level!r} in this file: it has {', '.join(self.levels)}")
        size = self._store.padded_sizes[self.index]
        if size is None:
            raise StoreError(f"{escape(self._store.path)} is not a whole fpnx file: image {self.index} has no size")
        return self._store.dataset(size, level)

    def __repr__(self) -> str:
        return f"Item({self.path!r}, {', '.join(self.levels)})"


class Store:
    """A file of feature pyramids, read lazily; also one that is still being written.

    `store["cats/01.jpg"]` and `store[3]` give an `Item`, or raise `NotDoneError`; iteration gives the items that are
    done; `len(store)` counts all images.

    Attributes:
        levels: level names, fine to coarse.
        config: what the stored numbers depend on, as a dict.
        provenance: versions, command, weights and which parts are trained, recipe, device, time.
        paths: stored paths of all images (str), by row.
        padded_sizes: (height, width) of each image's network input with padding; None where it has none.
        cut: which slice of which list it is, where it is a shard; else None.
        complete: whether this is a finished file (not a `.part`).
        shards: the stores of all shards, where it is a set of them; see `fpnx.store.shard_set`.
    """

    shards: Sequence[Store] = ()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file, self._closed = open_hdf5(self.path), False
        self._place = os.path.abspath(self.path) if os.path.exists(self.path) else self.path  # wherever one goes then
        try:
            self._read_header()
        except FpnxError:
            self._file.close()
            raise
        except Exception as error:  # HDF5 and numpy raise many kinds over a damaged file
            self._file.close()
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file ({escape(str(error))})") from error

    def _read_header(self) -> None:
        file = self._file
        if "format" not in file.attrs or attribute_text(file, "format") != FORMAT.encode():
            raise StoreError(f"{escape(self.path)} is an HDF5 file, but not one of fpnx's")
        version = attribute_whole(file, "format_version")
        if version != FORMAT_VERSION:
            way = "update fpnx" if version > FORMAT_VERSION else "extract it again"
            raise StoreError(
                f"{escape(self.path)} has format version {version}, this fpnx reads {FORMAT_VERSION}: {way}"
            )
        self.config: dict[str, Any] = parsed(file, "config")
        self.fingerprint = attribute_text(file, "fingerprint").decode("ascii", "replace")
        self.provenance = self._read_provenance()
        self.shard_slice = ShardSlice.from_json(parsed(file, "shard")) if "shard" in file.attrs else None
        self.root: str = os.fsdecode(attribute_text(file, "root"))
        self.levels: tuple[str, ...] = self._known_levels()
        images = member(file, "images", h5py.Group)
        self.paths: list[str] = [os.fsdecode(name) for name in names(images, "path")]
        self.padded_sizes: list[tuple[int, int] | None] = self._read_sizes(images)
        count = len(self.paths)
        self.rows: np.ndarray = table(images, "row", np.int64, (count,))
        self.bytes: np.ndarray = table(images, "bytes", np.int64, (count,))
        self.mtimes_ns: np.ndarray = table(images, "mtime_ns", np.int64, (count,))
        self.input_sizes: np.ndarray = table(images, "input_size", np.int32, (count, 2))
        if len(self.padded_sizes) != count:
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: /images/group names no sizes")
        table(images, "error", f"S{ERROR_BYTES}", (count,))
        self._pyramids = member(file, "pyramids", h5py.Group)
        self._index: dict[str, int] | None = None
        self._checked: set[tuple[tuple[int, int], str]] = set()
        self.refresh()

    def _read_sizes(self, images: h5py.Group) -> list[tuple[int, int] | None]:
        """The padded network-input size of every image; None where its header could not be read."""
        held = [name.decode() for name in names(images, "group")]
        sizes = {name: parse_size(name) for name in set(held)}
        if any(name and size is None for name, size in sizes.items()):
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: /images/group names no sizes")
        return [sizes[name] for name in held]

    def _known_levels(self) -> tuple[str, ...]:
        levels = self.config.get("levels")
        try:
            if isinstance(levels, list) and levels and list(parse_levels(levels)) == levels:
                return tuple(levels)
        except FpnxError:
            pass
        raise StoreError(f"{escape(self.path)} is not a whole fpnx file: its config names no levels")

    def _read_provenance(self) -> Provenance:
        """The provenance, where it and the texts of the config are complete."""
        try:
            if not all(isinstance(self.config.get(name), str) for name in ("backbone", "dtype", "pool")):
                raise ValueError("its config is incomplete")
            return Provenance.from_json(parsed(self._file, "provenance"))
        except ValueError as error:
            raise StoreError(
                f"{escape(self.path)} is not a whole fpnx file: its config or provenance is incomplete"
            ) from error

    def each(self) -> Iterator[Store]:
        """The store of every file: this one; of a set the shards in order, each open when its turn comes."""
        yield self

    def refresh(self) -> None:
        """Read again what changes while a run goes on: status, source sizes, errors, counts of NaN and inf.

        The status comes first: whatever it calls done was written before.
        """
        images, count = member(self._opened(), "images", h5py.Group), len(self.paths)
        self.status: np.ndarray = table(images, "status", np.uint8, (count,))
        self.source_sizes: np.ndarray = table(images, "source_size", np.int32, (count, 2))
        statistics = member(self._file, "stats", h5py.Group)
        self.nonfinite: np.ndarray = table(statistics, "nonfinite", np.int64, (count, len(self.levels)))

    def nonfinite_by_level(self) -> dict[str, int]:
        """How many values of the images that are done are NaN or infinite, by level."""
        counts = self.nonfinite[self.status == DONE].sum(axis=0)
        return dict(zip(self.levels, counts.tolist(), strict=True))

    @property
    def complete(self) -> bool:
        """Whether no image is pending and the file has its final name."""
        return not str(self.path).endswith(".part") and not bool((self.status == PENDING).any())

    def error(self, index: int) -> str:
        """Why image `index` failed; empty where it did not."""
        if self.status[index] != FAILED:
            return ""
        return bytes(self._errors[index]).decode(errors="replace")

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of every failed image."""
        failed = np.flatnonzero(self.status == FAILED).tolist()
        reasons = self.errors() if failed else np.empty(0)
        return [(self.paths[i], bytes(reasons[i]).decode(errors="replace")) for i in failed]

    def errors(self) -> np.ndarray:
        """(N,) reasons of all images, in at most `ERROR_BYTES` bytes each; empty where none failed."""
        reasons: np.ndarray = self._errors[:]
        return reasons

    @property
    def _errors(self) -> h5py.Dataset:
        """Opened anew each time: an open dataset may hand out what it read before a writer changed it."""
        return member(self._opened()["images"], "error", h5py.Dataset)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The padded network-input sizes in this file, (height, width)."""
        self._opened()
        return sorted(size for size in map(parse_size, self._pyramids) if size is not None)

    def dataset(self, size: tuple[int, int], level: str) -> h5py.Dataset:
        """The (n, C, H, W) dataset of one padded size and level; attrs stride, channels, valid.

        Raises:
            StoreError: where it is not in this file, or not of this form.
        """
        self._opened()
        if (size, level) in self._checked:
            return self._pyramids[f"{format_size(size)}/{level}"]
        dataset = member(member(self._pyramids, format_size(size), h5py.Group), level, h5py.Dataset)
        stored = str(self.config.get("dtype"))
        if dataset.dtype.name != stored or stored not in DTYPES or len(dataset.shape or ()) != 4:
            raise StoreError(
                f"{escape(self.path)} is not a whole fpnx file: {dataset.name} is {dataset.dtype} {dataset.shape}, "
                f"where {escape(stored)} (n, C, H, W) belongs"
            )
        check_bytes(dataset, dataset.size * dataset.dtype.itemsize)
        stride = int(dataset.attrs.get("stride", 0))
        if stride < 1 or (level not in UNSTRIDED_LEVELS and stride != 2 ** level_number(level)):
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: {dataset.name} has another stride")
        self._checked.add((size, level))
        return dataset

    def check(self) -> None:
        """Look at every group and level, not only when they are asked for.

        Raises:
            StoreError: for the first that is not as the format says.
        """
        for size in dict.fromkeys(self.padded_sizes):
            if size is not None:
                for level in self.levels:
                    self.dataset(size, level)

    def links_to(self, size: tuple[int, int], level: str) -> bool:
        """Whether `/P3` leads to the dataset of this size and level."""
        link = self._opened().get(level, getlink=True)
        return isinstance(link, h5py.SoftLink) and link.path == f"/pyramids/{format_size(size)}/{level}"

    def stride(self, level: str) -> int:
        """Stride of a level in input pixels."""
        return int(self.dataset(self.sizes[0], level).attrs["stride"])

    def index(self, path: str | bytes | os.PathLike[str]) -> int:
        """Row of a stored path.

        Raises:
            NotDoneError: where there is no such image.
        """
        if self._index is None:
            self._index = {name: i for i, name in enumerate(self.paths)}
        name = os.fsdecode(path)
        if name not in self._index:
            raise NotDoneError(f"{escape(name)} is not in {escape(self.path)}: it holds {len(self)} other images")
        return self._index[name]

    def __getitem__(self, key: int | str | bytes | os.PathLike[str]) -> Item:
        if isinstance(key, bool) or not isinstance(key, (int, np.integer, str, bytes, os.PathLike)):
            raise TypeError(f"image {key!r}: take a stored name or an index")
        if isinstance(key, (int, np.integer)):
            index = int(key) + len(self) if key < 0 else int(key)
            if not 0 <= index < len(self):
                raise IndexError(f"image {key}: {escape(self.path)} holds {len(self)}")
        else:
            index = self.index(key)
        if self.status[index] != DONE:
            state = f"failed: {self.error(index)}" if self.status[index] == FAILED else "is not done yet"
            raise NotDoneError(f"{escape(self.paths[index])} {state}")
        return Item(self, index)

    def __iter__(self) -> Iterator[Item]:
        return (Item(self, index) for index in np.flatnonzero(self.status == DONE).tolist())

    def __contains__(self, path: object) -> bool:
        try:
            return isinstance(path, (str, bytes, os.PathLike)) and self.index(path) >= 0
        except NotDoneError:
            return False

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        done = int((self.status == DONE).sum())
        return f"Store({self.path!r}, {done} of {len(self)} images, {', '.join(self.levels)})"

    def release(self) -> None:
        """Close the file until something of it is asked for; what was read of it stays."""
        if self._file:
            self._state = file_state(self._file)
            self._file.close()

    def close(self) -> None:
        """Close the file; items of this store can no longer read."""
        self._closed = True
        self._file.close()

    def _opened(self) -> h5py.File:
        if self._closed:
            raise StoreError(f"{escape(self.path)} has been closed: read inside its with block")
        if not self._file:
            self._file = open_hdf5(self._place)
            if file_state(self._file) != self._state:
                self._file.close()
                raise StoreError(f"{escape(self.path)} is another file than when it was opened: open it again")
            self._pyramids = member(self._file, "pyramids", h5py.Group)
        return self._file

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store_file(path: str | os.PathLike[str]) -> Store:
    """Open a file that `fpnx extract` wrote, also a `.part` that is being written; see `Store`.

    Raises:
        StoreError: where it is missing, truncated, not fpnx's, or of a future format version.
    """
    return Store(path)


def valid_extent(input_size: tuple[int, int], stride: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a map's cells that lie over the unpadded input: ceil(input / stride), at most the map."""
    return min(-(-input_size[0] // stride), shape[0]), min(-(-input_size[1] // stride), shape[1])


def different_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`"seed 0 → 1"` for each field of two configs that differs; nested ones as `recipe.mean`."""
    told = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            told += [f"{name}.{field}" for field in different_fields(before, after)]
        elif before != after:
            told.append(f"{name} {_brief(before)} → {_brief(after)}")
    return told


def _brief(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:12] + "…" if re.fullmatch(r"[0-9a-f]{64}", text) else text
