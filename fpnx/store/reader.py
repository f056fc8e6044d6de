"""Reader of the HDF5 file, format version 1. Does not import torch.

The layout of the file is in `fpnx.store.file_layout`, the writer in `fpnx.store.writer`.
"""

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
from fpnx.core.image_list import DIGEST_BYTES
from fpnx.core.levels import UNSTRIDED_LEVELS, level_number, level_of_stride, parse_levels
from fpnx.core.names import NameIndex
from fpnx.core.provenance import Provenance
from fpnx.core.sharding import ShardSlice
from fpnx.core.text import escape
from fpnx.core.validation import format_size, parse_size
from fpnx.store.batch import Indices, checked_out, image_indices, row_runs
from fpnx.store.hdf5 import (
    attribute_bytes,
    attribute_int,
    attribute_json,
    check_bytes,
    damage_named,
    file_identity,
    get_member,
    open_hdf5,
    read_rows,
    read_strings,
    read_table,
)
from fpnx.store.regions import REGION_TABLES, Regions

__all__ = [
    "DONE",
    "ERROR_BYTES",
    "FAILED",
    "FORMAT",
    "FORMAT_VERSION",
    "PENDING",
    "Box",
    "Item",
    "MapLayout",
    "Store",
    "different_fields",
    "open_store_file",
    "valid_extent",
]

FORMAT = "fpnx"
FORMAT_VERSION = 1
PENDING, DONE, FAILED = 0, 1, 2  # status of an image
IMPLIED = {"pyramid": "fpn"}  # values that a config leaves out
MAX_NAMED = 5  # images that a message names
ERROR_BYTES = 240  # of a failed image's reason, UTF-8

AnyStore = TypeVar("AnyStore", bound="Store")


class Box(NamedTuple):
    """A rectangle in pixels of the upright source image, x to the right and y down; may be fractional."""

    left: float
    top: float
    right: float
    bottom: float


class MapLayout(NamedTuple):
    """Of all maps of one padded size and level: the stride in input pixels, and the shape (n, C, H, W)."""

    stride: int
    shape: tuple[int, ...]


class Item:
    """One image of a store and its features; a level is read from the file on access.

    A pickle of it holds no features: it opens the store again, see `Store`.

    Attributes:
        path: stored path, relative to the store's root (str, undecodable bytes as surrogates).
        index: of the image in the store, as `store[index]` and `store.read` take it: its position in `store.paths`.
        source_size, input_size: (height, width) of the upright source, and of the network input without padding.
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
        """Features of one level, (C, H, W) in the stored dtype."""
        dataset, row = self._dataset(level), int(self._store.rows[self.index])
        if not 0 <= row < len(dataset):
            raise StoreError(f"{escape(self._store.path)} is not a whole fpnx file: image {self.index} has no row")
        values = np.empty(dataset.shape[1:], dataset.dtype)
        self._store.read_rows(dataset, [(row, values[None])])
        return values

    @property
    def regions(self) -> Regions:
        """The boxes of this image and the features of each, in the order of its boxes.

        Raises:
            FpnxError: for a store without regions.
        """
        stored = self._store.regions
        rows = stored.rows(self.index)
        features = np.empty((rows.stop - rows.start, *stored.features.shape[1:]), stored.features.dtype)
        self._store.read_rows(stored.features, [(rows.start, features)])
        tables = {name: getattr(stored, name)[rows].copy() for name, _, _ in REGION_TABLES}
        return Regions(**tables, features=features, names=stored.names)

    @property
    def store(self) -> Store:
        """The store that holds this image."""
        return self._store

    def stride(self, level: str) -> int:
        """Stride of a level in input pixels."""
        return self._layout(level).stride

    def valid(self, level: str) -> tuple[int, int]:
        """(height, width) of the cells that are not padding."""
        stride, shape = self._layout(level)
        if self._store.config.get("pool", "none") != "none":
            return shape[2], shape[3]
        return valid_extent(self.input_size, stride, shape[2:])

    def box(self, level: str, y: int, x: int) -> Box:
        """The rectangle of source pixels under cell (y, x) of `level`; a cell covers stride × stride input pixels.

        Raises:
            FpnxError: for a cell outside the valid (unpadded) map.
        """
        height, width = self.valid(level)
        if not all(isinstance(number, (int, np.integer)) for number in (y, x)):
            raise TypeError(f"cell ({y!r}, {x!r}): take whole numbers, row and column")
        if not (0 <= y < height and 0 <= x < width):
            raise FpnxError(f"cell ({y}, {x}) is outside {level}, which has {height}×{width} cells")
        layout = self._layout(level)
        top, bottom = self._span(y, 0, layout)
        left, right = self._span(x, 1, layout)
        return Box(left, top, right, bottom)

    def _span(self, cell: int, axis: int, layout: MapLayout) -> tuple[float, float]:
        """First and last source pixel under a cell along one axis."""
        stride, source, size = layout.stride, self.source_size[axis], self.input_size[axis]
        first, last = cell, cell + 1
        bins = layout.shape[2 + axis]
        if self._store.config.get("pool", "none") != "none":  # adaptive pooling: bins over the valid cells
            cells = math.ceil(size / stride)
            first, last = cell * cells // bins, -(-(cell + 1) * cells // bins)
        scale = source / size
        return first * stride * scale, min(last * stride * scale, float(source))

    def _dataset(self, level: str) -> h5py.Dataset:
        self._store.check_level(level)
        return self._store._dataset_of(self._store.padded_sizes[self.index], level)

    def _layout(self, level: str) -> MapLayout:
        self._store.check_level(level)
        return self._store._layout_of(self._store.padded_sizes[self.index], level)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._store, self.index, self.path)

    def __repr__(self) -> str:
        return f"Item({self.path!r}, {', '.join(self.levels)})"


class Store:
    """A file of feature pyramids, read lazily; also one that is still being written.

    `store["cats/01.jpg"]` and `store[3]` return an `Item`, or raise `NotDoneError`; iteration yields the items that are
    done; `len(store)` counts all images. The index of an image is its position in `paths`, whatever its status.

    A pickle of a store holds its path only, and the file is opened again where it is unpickled.

    Attributes:
        path: of the file, or its URL.
        levels: level names, fine to coarse.
        config: everything that the stored values depend on, as a dict.
        fingerprint: sha256 (hex) of the config.
        provenance: versions, command, weights and which parts are trained, recipe, device, time.
        root: the folder, archive or URL that paths are relative to.
        paths: stored paths of all images (str), by row.
        status: (N,) uint8, PENDING, DONE or FAILED.
        rows: (N,) int64, row of each image in the datasets of its padded size; -1 where it has none.
        bytes, mtimes_ns: (N,) int64, size and modification time of each image file.
        source_sizes, input_sizes: (N, 2) int32, (height, width) of the source and of the network input.
        padded_sizes: (height, width) of each image's network input with padding; None where it has none.
        nonfinite: (N, levels) int64, number of NaN and infinite values.
        digests: (N, 16) uint8, content hash of each image file: the first bytes of its sha256; zeros where it is not
            known, as for images that are not done, and in files of earlier versions.
        has_digests: whether the file has a place for content hashes.
        shard_slice: which slice of which list this is, for a shard; else None.
        complete: whether this is a finished file (not a `.part`).
        files: the stores of all files, where several are read as one; see `fpnx.store.joined_store`.
    """

    files: Sequence[Store] = ()
    _full_path: Any  # for reopening: absolute, or a URL; those of all files where there are several
    _regions: Regions | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file, self._closed = open_hdf5(self.path), False
        self._full_path = os.path.abspath(self.path) if os.path.exists(self.path) else self.path
        try:
            self._read_header()
        except FpnxError:
            self._file.close()
            raise
        except Exception as error:  # HDF5 and numpy raise many types for a damaged file
            self._file.close()
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file ({escape(str(error))})") from error

    def _read_header(self) -> None:
        file = self._file
        if "format" not in file.attrs or attribute_bytes(file, "format") != FORMAT.encode():
            raise StoreError(f"{escape(self.path)} is an HDF5 file, but not one of fpnx's")
        version = attribute_int(file, "format_version")
        if version != FORMAT_VERSION:
            action = "update fpnx" if version > FORMAT_VERSION else "extract it again"
            raise StoreError(
                f"{escape(self.path)} has format version {version}, this fpnx reads {FORMAT_VERSION}: {action}"
            )
        self.config: dict[str, Any] = attribute_json(file, "config")
        self.fingerprint = attribute_bytes(file, "fingerprint").decode("ascii", "replace")
        self.provenance = self._read_provenance()
        self.shard_slice = ShardSlice.from_json(attribute_json(file, "shard")) if "shard" in file.attrs else None
        self.root: str = os.fsdecode(attribute_bytes(file, "root"))
        self.levels: tuple[str, ...] = self._known_levels()
        images = get_member(file, "images", h5py.Group)
        self.paths: list[str] = [os.fsdecode(name) for name in read_strings(images, "path")]
        self.padded_sizes: list[tuple[int, int] | None] = self._read_sizes(images)
        count = len(self.paths)
        self.rows: np.ndarray = read_table(images, "row", np.int64, (count,))
        self.bytes: np.ndarray = read_table(images, "bytes", np.int64, (count,))
        self.mtimes_ns: np.ndarray = read_table(images, "mtime_ns", np.int64, (count,))
        self.input_sizes: np.ndarray = read_table(images, "input_size", np.int32, (count, 2))
        if len(self.padded_sizes) != count:
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: /images/group names no sizes")
        read_table(images, "error", f"S{ERROR_BYTES}", (count,))
        self._pyramids = get_member(file, "pyramids", h5py.Group)
        self._index: NameIndex | None = None
        self._layouts: dict[tuple[tuple[int, int], str], MapLayout] = {}  # of the datasets that were checked
        if self.has_regions:
            get_member(file, "regions", h5py.Group)
        self.refresh()

    def _read_sizes(self, images: h5py.Group) -> list[tuple[int, int] | None]:
        """The padded network-input size of every image; None where its header could not be read."""
        groups = [name.decode() for name in read_strings(images, "group")]
        sizes = {name: parse_size(name) for name in set(groups)}
        if any(name and size is None for name, size in sizes.items()):
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: /images/group names no sizes")
        return [sizes[name] for name in groups]

    def _known_levels(self) -> tuple[str, ...]:
        levels = self.config.get("levels")
        try:
            if isinstance(levels, list) and levels and list(parse_levels(levels)) == levels:
                return tuple(levels)
        except FpnxError:
            pass
        raise StoreError(f"{escape(self.path)} is not a whole fpnx file: its config names no levels")

    def _read_provenance(self) -> Provenance:
        """The provenance.

        Raises:
            StoreError: where it, or a text in the config, is missing.
        """
        try:
            if not all(isinstance(self.config.get(name), str) for name in ("backbone", "dtype", "pool")):
                raise ValueError("its config is incomplete")
            return Provenance.from_json(attribute_json(self._file, "provenance"))
        except ValueError as error:
            raise StoreError(
                f"{escape(self.path)} is not a whole fpnx file: its config or provenance is incomplete"
            ) from error

    def each_file(self) -> Iterator[Store]:
        """Yields the store of every file: this one; or those of `files` in order, each opened when it is yielded."""
        yield self

    @property
    def shard_count(self) -> int:
        """Number of shards among `files`."""
        return sum(file.shard_slice is not None for file in self.files)

    def root_of(self, index: int) -> str:
        """The folder, archive or URL that the name of image `index` is relative to: `root`, where there is one file."""
        return self.root

    def refresh(self) -> None:
        """Read again what changes during a run: status, source sizes, errors, content hashes, counts of NaN and inf,
        regions.

        The status is read first: everything of an image that is done was written before its status.
        """
        images, count = get_member(self._opened(), "images", h5py.Group), len(self.paths)
        self.status: np.ndarray = read_table(images, "status", np.uint8, (count,))
        self.source_sizes: np.ndarray = read_table(images, "source_size", np.int32, (count, 2))
        statistics = get_member(self._file, "stats", h5py.Group)
        self.nonfinite: np.ndarray = read_table(statistics, "nonfinite", np.int64, (count, len(self.levels)))
        self.digests: np.ndarray = np.zeros((count, DIGEST_BYTES), np.uint8)
        self.has_digests = "digest" in images
        if self.has_digests:
            self.digests = read_table(images, "digest", np.uint8, (count, DIGEST_BYTES))
            self.digests[self.status != DONE] = 0
        self._regions = None

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return str(self.config["backbone"])

    @property
    def pyramid(self) -> str:
        """Kind of the pyramid, as `--pyramid` takes it."""
        return str(self.config.get("pyramid", IMPLIED["pyramid"]))

    @property
    def has_regions(self) -> bool:
        """Whether this is a file of regions: features of boxes, in place of the levels' maps."""
        return isinstance(self.config.get("regions"), dict)

    @property
    def regions(self) -> Regions:
        """The boxes of all images and the features of each.

        Raises:
            FpnxError: for a file without regions.
            StoreError: for a damaged one.
        """
        if not self.has_regions:
            raise FpnxError(f"{escape(self.path)} has no regions: fpnx extract --boxes LABELS makes a file of them")
        if self._regions is None:
            self._regions = self._read_regions()
        return self._regions

    def _read_regions(self) -> Regions:
        features = self.region_features()
        group, count = self._file["regions"], len(features)
        tables = {name: read_table(group, name, dtype, (count, *shape)) for name, dtype, shape in REGION_TABLES}
        image, names = tables["image"], attribute_json(group, "names")
        if count and (image[0] < 0 or image[-1] >= len(self) or (np.diff(image) < 0).any()):
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: /regions/image is not in order")
        if not all(re.fullmatch(r"-?\d{1,18}", number, re.ASCII) for number in names):
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: /regions names no classes")
        classes = {int(number): str(name) for number, name in names.items()}
        return Regions(**tables, features=features, names=classes)

    def region_features(self) -> h5py.Dataset:
        """The (R, C, h, w) dataset of the features of regions.

        Raises:
            StoreError: where it is missing, or has another shape or dtype.
        """
        group = get_member(self._opened(), "regions", h5py.Group)
        dataset = get_member(group, "features", h5py.Dataset)
        if dataset.dtype.name != self.config["dtype"] or len(dataset.shape or ()) != 4:
            raise StoreError(
                f"{escape(self.path)} is not a whole fpnx file: {dataset.name} is {dataset.dtype} {dataset.shape}, "
                f"where {escape(self.config['dtype'])} (n, C, h, w) belongs"
            )
        check_bytes(dataset, dataset.size * dataset.dtype.itemsize)
        return dataset

    @property
    def level_numbers(self) -> dict[str, int]:
        """k of each level, whose stride is nearest to 2^k, as in `Regions.level`; empty for a file without images."""
        return {level: level_of_stride(self.stride(level)) for level in self.levels} if self.sizes else {}

    def stored_values(self, index: int, level: str) -> np.ndarray:
        """All stored values of one level of an image that is done: its map, or in a file of regions the features of the
        boxes that were pooled from it."""
        if not self.has_regions:
            return self[index][level]
        regions, channels = self[index].regions, self._dataset_of(self.padded_sizes[index], level).shape[1]
        features: np.ndarray = regions.features[regions.level == self.level_numbers[level], :channels]
        return features

    def nonfinite_by_level(self) -> dict[str, int]:
        """Number of NaN and infinite values in the images that are done, by level."""
        counts = self.nonfinite[self.status == DONE].sum(axis=0)
        return dict(zip(self.levels, counts.tolist(), strict=True))

    @property
    def complete(self) -> bool:
        """Whether no image is pending and the file has its final name."""
        return not str(self.path).endswith(".part") and not bool((self.status == PENDING).any())

    def error(self, index: int) -> str:
        """Why image `index` failed; empty where it has not."""
        if self.status[index] != FAILED:
            return ""
        return bytes(self._errors[index]).decode(errors="replace")

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of every failed image."""
        failed = np.flatnonzero(self.status == FAILED).tolist()
        reasons = self.errors() if failed else np.empty(0)
        return [(self.paths[i], bytes(reasons[i]).decode(errors="replace")) for i in failed]

    def errors(self) -> np.ndarray:
        """(N,) reasons of all images, at most `ERROR_BYTES` bytes each; empty where an image has not failed."""
        reasons = np.empty(len(self), f"S{ERROR_BYTES}")
        read_rows(self._errors, [(0, reasons)])
        return reasons

    @property
    def _errors(self) -> h5py.Dataset:
        """The dataset of reasons, opened again on each access: an open dataset may return outdated cached values."""
        return get_member(self._opened()["images"], "error", h5py.Dataset)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The padded network-input sizes in this file, (height, width)."""
        self._opened()
        with damage_named(self.path, "/pyramids"):
            return sorted(size for size in map(parse_size, self._pyramids) if size is not None)

    def dataset(self, size: tuple[int, int], level: str) -> h5py.Dataset:
        """The (n, C, H, W) dataset of one padded size and level; attrs stride, channels, valid.

        Raises:
            StoreError: where it is missing, or has another shape or dtype.
        """
        self._opened()
        with damage_named(self.path, f"{format_size(size)}/{level}"):
            return self._checked_dataset(size, level)

    def _checked_dataset(self, size: tuple[int, int], level: str) -> h5py.Dataset:
        if (size, level) in self._layouts:
            return self._pyramids[f"{format_size(size)}/{level}"]
        dataset = get_member(get_member(self._pyramids, format_size(size), h5py.Group), level, h5py.Dataset)
        dtype = str(self.config.get("dtype"))
        if dataset.dtype.name != dtype or dtype not in DTYPES or len(dataset.shape or ()) != 4:
            raise StoreError(
                f"{escape(self.path)} is not a whole fpnx file: {dataset.name} is {dataset.dtype} {dataset.shape}, "
                f"where {escape(dtype)} (n, C, H, W) belongs"
            )
        check_bytes(dataset, dataset.size * dataset.dtype.itemsize)
        stride = int(dataset.attrs.get("stride", 0))
        if stride < 1 or (level not in UNSTRIDED_LEVELS and level_of_stride(stride) != level_number(level)):
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: {dataset.name} has another stride")
        self._layouts[size, level] = MapLayout(stride, dataset.shape)
        return dataset

    def _dataset_of(self, size: tuple[int, int] | None, level: str) -> h5py.Dataset:
        """The dataset of images that are done and have this padded size."""
        if size is None:
            raise StoreError(f"{escape(self.path)} is not a whole fpnx file: an image that is done has no size")
        return self.dataset(size, level)

    def _layout_of(self, size: tuple[int, int] | None, level: str) -> MapLayout:
        """The layout of the dataset of images that are done and have this padded size, which is read once."""
        if size is None or (size, level) not in self._layouts:
            self._dataset_of(size, level)
        assert size is not None
        return self._layouts[size, level]

    def check(self) -> None:
        """Check all groups and levels now, and not on access.

        Raises:
            StoreError: for the first that does not follow the format.
        """
        for size in dict.fromkeys(self.padded_sizes):
            if size is not None:
                for level in self.levels:
                    self.dataset(size, level)
        if self.has_regions:
            self._read_regions()

    def links_to(self, size: tuple[int, int], level: str) -> bool:
        """Whether the soft link `/P3` leads to the dataset of this size and level."""
        link = self._opened().get(level, getlink=True)
        return isinstance(link, h5py.SoftLink) and link.path == f"/pyramids/{format_size(size)}/{level}"

    def stride(self, level: str) -> int:
        """Stride of a level in input pixels."""
        return self._layout_of(self.sizes[0], level).stride

    def index(self, path: str | bytes | os.PathLike[str]) -> int:
        """Row of a stored path in `/images`, or of the only one that differs in Unicode normalisation alone.

        Raises:
            NotDoneError: where there is no such image.
        """
        if self._index is None:
            self._index = NameIndex(self.paths)
        name = os.fsdecode(path)
        if (row := self._index.get(name)) is None:
            raise NotDoneError(f"{escape(name)} is not in {escape(self.path)}: it holds {len(self)} other images")
        return row

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
            raise NotDoneError(self._why_not_done(index))
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

    def read(self, level: str, indices: Indices = slice(None), out: np.ndarray | None = None) -> np.ndarray:
        """Features of one level of many images in one array; faster than one by one.

        Args:
            level: its name.
            indices: which images, in any order, also repeatedly: `item.index` of each, as `store[index]` takes it, so
                negative ones count from the end; or a slice of all images, or a boolean mask (N,) such as
                `store.status == 1`.
            out: a C-contiguous array to fill, instead of a new one.

        Returns:
            (n, C, H, W) in the stored dtype, with padding, in the order of `indices`.

        Raises:
            FpnxError: for a level that is not in the file, images whose maps differ in size, or an `out` that does not
                fit.
            IndexError: for an index or mask that does not fit the number of images.
            NotDoneError: for images that are pending or failed; it names them.
        """
        self.check_level(level)
        chosen = image_indices(indices, len(self), escape(self.path))
        self._check_done(chosen)
        padded = [self.padded_sizes[index] for index in chosen.tolist()]
        datasets = {size: self._dataset_of(size, level) for size in dict.fromkeys(padded)}
        shapes = {size: dataset.shape[1:] for size, dataset in datasets.items()}
        if len(set(shapes.values())) > 1:
            other = next(size for size in shapes if shapes[size] != shapes[padded[0]])
            examples = [(self.paths[chosen[padded.index(size)]], shapes[size]) for size in (padded[0], other)]
            described = ", ".join(f"{escape(path)} has {shape[1]}×{shape[2]} cells" for path, shape in examples)
            raise FpnxError(
                f"maps of {level} differ in size ({described}) and do not fit into one array: read images of one size "
                f"in store.padded_sizes at a time, or each alone, as store[i][{level!r}]"
            )
        if not datasets:  # no image: the array has the shape of others, where there are any
            datasets = {size: self.dataset(size, level) for size in self.sizes[:1]}
        example = next(iter(datasets.values()), None)
        shape, dtype = ((0, 0, 0), self.config["dtype"]) if example is None else (example.shape[1:], example.dtype)
        result = checked_out(out, (len(chosen), *shape), np.dtype(dtype))
        for size in dict.fromkeys(padded):
            places = np.array([place for place, other in enumerate(padded) if other == size])
            rows = self.rows[chosen[places]]
            if rows.min() < 0 or rows.max() >= len(datasets[size]):
                raise StoreError(f"{escape(self.path)} is not a whole fpnx file: an image that is done has no row")
            runs, (repeated, sources) = row_runs(rows, places)
            self.read_rows(datasets[size], [(row, result[place : place + count]) for row, place, count in runs])
            result[repeated] = result[sources]
        return result

    def _check_done(self, indices: np.ndarray) -> None:
        undone = np.unique(indices[self.status[indices] != DONE]).tolist()
        if undone:
            named = "; ".join(self._why_not_done(index) for index in undone[:MAX_NAMED])
            others = f"; and {len(undone) - MAX_NAMED} more" if len(undone) > MAX_NAMED else ""
            raise NotDoneError(f"{named}{others}: read those whose store.status is 1")

    def read_rows(self, dataset: Any, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        """Read rows of a `dataset` of this store; see `fpnx.store.hdf5.read_rows`."""
        read_rows(dataset, pieces)

    def check_level(self, level: str) -> None:
        """Raise FpnxError for a level whose maps are not in the file."""
        if level not in self.levels:
            raise FpnxError(f"no level {level!r} in {escape(self.path)}: it has {', '.join(self.levels)}")
        if self.has_regions:
            raise FpnxError(
                f"no maps of {level} in {escape(self.path)}, which has regions: in Python read item.regions, or take "
                f"PyramidDataset(..., regions=True)"
            )

    def _why_not_done(self, index: int) -> str:
        """The reason why an image cannot be read, for messages."""
        if self.status[index] == FAILED:
            return f"{escape(self.paths[index])} failed: {self.error(index)}"
        return f"{escape(self.paths[index])} is not done yet"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closed:
            raise StoreError(f"{escape(self.path)} has been closed: pickle it inside its with block")
        return _reopened, (type(self), self._full_path, self.path, self.fingerprint, len(self))

    def release(self) -> None:
        """Close the file until the next access; tables that were read stay in memory."""
        if self._file:
            self._identity = file_identity(self._file)
            self._file.close()

    def close(self) -> None:
        """Close the file; items of this store can no longer read."""
        self._closed = True
        self._file.close()

    def _opened(self) -> h5py.File:
        if self._closed:
            raise StoreError(f"{escape(self.path)} has been closed: read inside its with block")
        if not self._file:
            self._file = open_hdf5(self._full_path)
            if file_identity(self._file) != self._identity:
                self._file.close()
                raise StoreError(f"{escape(self.path)} is another file than when it was opened: open it again")
            self._pyramids = get_member(self._file, "pyramids", h5py.Group)
        return self._file

    def __enter__(self: AnyStore) -> AnyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store_file(path: str | os.PathLike[str]) -> Store:
    """Open a file that `fpnx extract` wrote, also a `.part` that is being written; see `Store`.

    Raises:
        StoreError: where it is missing, truncated, not written by fpnx, or of a future format version.
    """
    return Store(path)


def _restored(store: Store, index: int, path: str) -> Item:
    """A pickled item.

    Raises:
        StoreError: where the store has another image there by now.
    """
    if index >= len(store) or store.paths[index] != path:
        raise StoreError(f"{escape(store.path)} is another file than when {escape(path)} was read from it")
    return Item(store, index)


def _reopened(kind: type[Store], full_path: Any, path: str, fingerprint: str, count: int) -> Store:
    """A pickled store, opened again.

    Raises:
        StoreError: where the file is gone, or another one by now.
    """
    store = kind(full_path)
    store.path = path
    if (store.fingerprint, len(store)) != (fingerprint, count):
        store.close()
        raise StoreError(f"{escape(path)} is another file than when it was opened: open it again")
    return store


def valid_extent(input_size: tuple[int, int], stride: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of the cells of a map that lie over the input without padding: ceil(input / stride), at most the
    map."""
    return min(-(-input_size[0] // stride), shape[0]), min(-(-input_size[1] // stride), shape[1])


def different_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One text for each field that differs between two configs: `"seed 0 → 1"`, nested fields as `recipe.mean`."""
    differences = []
    for name in sorted({*old, *new}):
        before, after = (config.get(name, IMPLIED.get(name)) for config in (old, new))
        if isinstance(before, dict) and isinstance(after, dict):
            differences += [f"{name}.{field}" for field in different_fields(before, after)]
        elif before != after:
            differences.append(f"{name} {_shortened(before)} → {_shortened(after)}")
    return differences


def _shortened(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:12] + "…" if re.fullmatch(r"[0-9a-f]{64}", text) else text
