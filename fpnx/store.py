"""The HDF5 format, version 1: the layout, and reading it. Writing is in `fpnx.writer`. No torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import h5py
import numpy as np

from fpnx.config import parse_extent
from fpnx.errors import FpnxError, NotDoneError, StoreError, shown

__all__ = [
    "DONE",
    "FAILED",
    "FORMAT",
    "FORMAT_VERSION",
    "PENDING",
    "Box",
    "Item",
    "Store",
    "different_fields",
    "open_store",
    "valid_extent",
]

FORMAT = "fpnx"
FORMAT_VERSION = 1
PENDING, DONE, FAILED = 0, 1, 2


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
        return self._dataset(level)[self._store.rows[self.index]]

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
        return self._store.dataset(self._store.groups[self.index], level)

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
        complete: whether this is a finished file (not a `.part`).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = _open_hdf5(self.path)
        try:
            self._read_header()
        except (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
            self._file.close()
            raise StoreError(f"{shown(self.path)} is not a whole fpnx file ({error}): extract it again") from error
        except FpnxError:
            self._file.close()
            raise

    def _read_header(self) -> None:
        attrs = self._file.attrs
        if attrs.get("format") != FORMAT:
            raise StoreError(f"{shown(self.path)} is an HDF5 file, but not one of fpnx's")
        version = int(attrs["format_version"])
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{shown(self.path)} has format version {version}, this fpnx reads {FORMAT_VERSION}: update fpnx"
            )
        self.config: dict[str, Any] = json.loads(attrs["config"])
        self.provenance: dict[str, Any] = json.loads(attrs["provenance"])
        self.fingerprint = str(attrs["fingerprint"])
        self.root: str = os.fsdecode(_raw(attrs["root"]))
        self.levels: tuple[str, ...] = tuple(self.config["levels"])
        images = self._file["images"]
        self._names: list[bytes] = [_raw(name) for name in images["path"][:]]
        self.paths: list[str] = [os.fsdecode(name) for name in self._names]
        self.groups: list[str] = [_raw(name).decode() for name in images["group"][:]]
        self.rows: np.ndarray = images["row"][:]
        self.bytes: np.ndarray = images["bytes"][:]
        self.mtimes_ns: np.ndarray = images["mtime_ns"][:]
        self.input_sizes: np.ndarray = images["input_size"][:]
        self._index: dict[str, int] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read again what changes while a run goes on: status, source sizes, errors, counts of NaN and inf."""
        images = self._file["images"]
        self.status: np.ndarray = images["status"][:]
        self.source_sizes: np.ndarray = images["source_size"][:]
        self.nonfinite: np.ndarray = self._file["stats/nonfinite"][:]

    @property
    def complete(self) -> bool:
        """Whether no image is pending and the file has its final name."""
        return not str(self.path).endswith(".part") and not bool((self.status == PENDING).any())

    def error(self, index: int) -> str:
        """Why image `index` failed; empty where it did not."""
        return _raw(self._file["images/error"][index]).decode(errors="replace") if self.status[index] == FAILED else ""

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of every failed image."""
        return [(self.paths[i], self.error(i)) for i in np.flatnonzero(self.status == FAILED).tolist()]

    @property
    def sizes(self) -> list[str]:
        """The network-input sizes in this file, `"224x224"`, as the names of groups below `/pyramids`."""
        return sorted(self._file["pyramids"], key=lambda name: parse_extent(name) or (0, 0))

    def dataset(self, size: str, level: str) -> h5py.Dataset:
        """The (n, C, H, W) dataset of one size and level; attrs stride, channels, valid."""
        if not self._file:
            raise StoreError(f"{shown(self.path)} has been closed: read inside its with block")
        return self._file[f"pyramids/{size}/{level}"]

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
            raise NotDoneError(f"{shown(name)} is not in {shown(self.path)}: it holds {len(self)} other images")
        return self._index[name]

    def __getitem__(self, key: int | str | bytes | os.PathLike[str]) -> Item:
        if isinstance(key, (int, np.integer)):
            index = int(key) + len(self) if key < 0 else int(key)
            if not 0 <= index < len(self):
                raise IndexError(f"image {key}: {shown(self.path)} holds {len(self)}")
        else:
            index = self.index(key)
        if self.status[index] != DONE:
            state = f"failed: {self.error(index)}" if self.status[index] == FAILED else "is not done yet"
            raise NotDoneError(f"{shown(self.paths[index])} {state}")
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

    def close(self) -> None:
        """Close the file; items of this store can no longer read."""
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(path: str | os.PathLike[str]) -> Store:
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


def _open_hdf5(path: str) -> h5py.File:
    opening: Callable[..., h5py.File] = h5py.File
    try:
        # A file that is being written is locked by its writer; ours is laid out so that reading it is safe.
        return opening(path, "r", locking=False)
    except (OSError, RuntimeError) as error:
        if not os.path.exists(path):
            part = f"{path}.part"
            hint = f"; {shown(part)} is there: continue it with --resume" if os.path.exists(part) else ""
            raise StoreError(f"{shown(path)} does not exist{hint}") from error
        if os.path.isdir(path):
            raise StoreError(f"{shown(path)} is a folder, not a file that fpnx wrote") from error
        if not h5py.is_hdf5(path):
            raise StoreError(f"{shown(path)} is not an HDF5 file") from error
        raise StoreError(f"{shown(path)} cannot be read as HDF5, it may be truncated: {_last_reason(error)}") from error


def _last_reason(error: Exception) -> str:
    match = re.search(r"\((.*)\)", str(error), re.DOTALL)
    return (match[1] if match else str(error)).replace("\n", " ")


def _raw(value: Any) -> bytes:
    if isinstance(value, str):
        return os.fsencode(value)
    return bytes(value)
