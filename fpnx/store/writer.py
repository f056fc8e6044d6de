"""Writing a store so that whatever it calls done is whole: `out.h5.part`, commits, resume, the final rename."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from fpnx.core.config import fingerprint
from fpnx.core.errors import FpnxError, StoreError
from fpnx.core.files import BLOCK, LARGE, OpenFile, disk_error, reserve_space, sync_folder
from fpnx.core.image_list import ImageList
from fpnx.core.provenance import Provenance
from fpnx.core.text import escape
from fpnx.core.validation import format_size
from fpnx.store.hdf5 import open_hdf5
from fpnx.store.reader import DONE, ERROR_BYTES, FAILED, FORMAT, FORMAT_VERSION, PENDING, Store, different_fields

__all__ = ["FileLayout", "DatasetExtent", "Writer", "create_file", "part_path", "check_same_run"]

TABLE_BYTES = 8 + 8 + 8 + 8 + 1 + ERROR_BYTES + 8 + 16 + 16  # per image, without its path and statistics
VALID_RULE = "rows ceil(input_height / stride), columns ceil(input_width / stride) of a map are not padding"


AnyWriter = TypeVar("AnyWriter", bound="Writer")


@dataclass(frozen=True)
class FileLayout:
    """Everything about a file that is known before the first image is computed.

    Attributes:
        images: names, sizes and times.
        strides: by level, in input pixels.
        config: what the stored numbers depend on; the fingerprint is its hash.
        input_sizes: (N, 2) height and width of what the model sees of each image, without padding.
        padded_sizes: (height, width) with padding; None for an image whose header could not be read.
        rows: (N,) row of each image among those of its padded size; -1 where it has none.
        shapes: (C, H, W) by padded size and level.
        errors: why images have no row, by index.
    """

    images: ImageList
    levels: tuple[str, ...]
    strides: Mapping[str, int]
    dtype: str
    config: Mapping[str, Any]
    input_sizes: np.ndarray
    padded_sizes: Sequence[tuple[int, int] | None]
    rows: np.ndarray
    shapes: Mapping[tuple[int, int], Mapping[str, tuple[int, int, int]]]
    errors: Mapping[int, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 of `config`, which holds exactly what changes the numbers."""
        return fingerprint(self.config)

    def counts(self) -> dict[tuple[int, int], int]:
        """Number of images by padded size."""
        counts = dict.fromkeys(self.shapes, 0)
        for size in self.padded_sizes:
            if size is not None:
                counts[size] += 1
        return counts

    def feature_bytes(self) -> int:
        """Bytes that the features of all images take."""
        item = np.dtype(self.dtype).itemsize
        each = {size: sum(int(np.prod(s)) for s in shapes.values()) for size, shapes in self.shapes.items()}
        return sum(count * each[size] * item for size, count in self.counts().items())

    def total_bytes(self) -> int:
        """Bytes of the whole file, to within a few per cent of what is not features."""
        names = sum(len(record.name) + 48 for record in self.images.records)
        tables = len(self.images) * (TABLE_BYTES + 8 * len(self.levels))
        return self.feature_bytes() + tables + names + 65536 + BLOCK * len(self.shapes) * len(self.levels)


def part_path(output: Path) -> Path:
    """Where the work on `output` goes on."""
    return output.with_name(output.name + ".part")


@dataclass(frozen=True)
class DatasetExtent:
    """Where the rows of a dataset are in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> DatasetExtent:
        """Raises StoreError for one that is not a plain stretch of the file."""
        offset = dataset.id.get_offset() if dataset.size else 0  # what is empty has no place, and needs none
        if offset is None or dataset.id.get_storage_size() != dataset.size * dataset.dtype.itemsize:
            raise StoreError(f"{escape(dataset.file.filename)} was packed by another tool: it cannot be continued")
        return cls(offset, dataset.shape, dataset.dtype)

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def write(self, disk: OpenFile, first: int, values: np.ndarray) -> None:
        """Rows from `first` on, in the dataset's own type."""
        assert values.shape[1:] == self.shape[1:], f"{values.shape} for {self.shape}"
        assert 0 <= first <= first + len(values) <= self.shape[0], f"rows {first} to {first + len(values)}"
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        # The bytes themselves, not a copy: features are megabytes an image.
        raw = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8).data
        disk.write(self.offset + first * row, raw)


class Writer:
    """The one writer of a `.part` file.

    Everything is created, and its space claimed, by `create`; after that only array contents change, in the order
    features, sizes, errors, counts → fdatasync → status → fdatasync. So a reader, or a run after a crash, that sees
    a row marked done sees all of it. Since every array is one stretch of the file that never moves, its rows are
    written there directly: HDF5's caches, which cannot report or survive a disk that refuses, have no part in it.

    Args:
        output: the name that `finish` gives; its `.part` is there.
        disk: takes the writes; None: the `.part`.
    """

    def __init__(self, output: Path, disk: OpenFile | None = None) -> None:
        self.output, part = output, part_path(output)
        if part.is_symlink():
            raise StoreError(f"{escape(part)} is a link, which fpnx never makes: remove it, or take another output")
        with open_hdf5(os.fspath(part)) as file:
            images = file["images"]
            self.status: np.ndarray = images["status"][:]
            self._groups = [bytes(name).decode() for name in images["group"][:]]
            self._rows: np.ndarray = images["row"][:]
            self._levels: list[str] = json.loads(file.attrs["config"])["levels"]
            held = {name: file[name] for name in ("images/source_size", "images/error", "images/status")}
            held["stats/nonfinite"] = file["stats/nonfinite"]
            for group in dict.fromkeys(filter(None, self._groups)):
                held |= {f"{group}/{level}": file[f"pyramids/{group}/{level}"] for level in self._levels}
            self._places = {name: DatasetExtent.of(dataset) for name, dataset in held.items()}
        self._bytes = os.path.getsize(part)
        self._disk = disk or OpenFile(part)
        self._fresh: dict[int, int] = {}
        self._failure: FpnxError | None = None
        self.space_is_claimed = True

    @classmethod
    def create(cls: type[AnyWriter], output: Path, layout: FileLayout, provenance: Provenance) -> AnyWriter:
        """Lay out a new `.part` beside `output` and claim its space; a `.part` that is there is dropped.

        It is made under another name, so that a `.part` is whole from its first moment.

        Raises:
            FpnxError: where the disk is too small; nothing is left behind then.
        """
        part = part_path(output)
        fresh = part.with_name(part.name + ".new")
        try:
            part.unlink(missing_ok=True)
            fresh.unlink(missing_ok=True)
            try:
                claimed = create_file(fresh, layout, provenance)
                os.replace(fresh, part)
                sync_folder(part.parent)
            finally:
                fresh.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            raise disk_error(error, output, layout.total_bytes()) from error
        writer = cls(output)
        writer.space_is_claimed = claimed
        return writer

    @classmethod
    def reopen(cls: type[AnyWriter], output: Path) -> AnyWriter:
        """Continue the `.part` beside `output`, which `check_same_run` has let pass. Failed rows are pending again.

        Raises:
            FpnxError: where it cannot be opened for writing, or the disk refuses.
        """
        try:
            writer = cls(output)
        except OSError as error:
            raise disk_error(error, part_path(output), 0) from error
        try:
            writer.retry()
        except BaseException:
            writer.close()
            raise
        return writer

    def put(
        self,
        indices: Sequence[int],
        features: Mapping[str, np.ndarray],
        source_sizes: np.ndarray,
        nonfinite: Mapping[str, Sequence[int]],
    ) -> None:
        """Write what images of one group gave.

        Args:
            indices: rows in `/images`.
            features: level → (len(indices), C, H, W) in the stored dtype.
            source_sizes: (len(indices), 2) height and width.
            nonfinite: level → how many values of each image are NaN or infinite.

        Raises:
            FpnxError: where the disk refuses.
        """
        rows = self._rows[list(indices)].tolist()
        counts = np.array([nonfinite[level] for level in self._levels]).T
        with self._writing():
            for start, end in _runs(rows):
                for level, values in features.items():
                    self._write(f"{self._groups[indices[0]]}/{level}", rows[start], values[start:end])
            for start, end in _runs(indices):
                self._write("images/source_size", indices[start], source_sizes[start:end])
                self._write("images/error", indices[start], np.full(end - start, b""))  # of an earlier run
                self._write("stats/nonfinite", indices[start], counts[start:end])
        self._fresh.update(dict.fromkeys(indices, DONE))

    def fail(self, index: int, reason: str) -> None:
        """Mark an image as failed: its rows hold NaN, its reason stands in the file.

        Raises:
            FpnxError: where the disk refuses.
        """
        with self._writing():
            for level in self._levels:
                place = f"{self._groups[index]}/{level}"
                shape = self._places[place].shape[1:]
                self._write(place, int(self._rows[index]), np.full((1, *shape), np.nan, np.float32))
            self._write("images/source_size", index, np.zeros((1, 2)))
            self._write("images/error", index, np.array([_clipped(reason)]))
            self._write("stats/nonfinite", index, np.zeros((1, len(self._levels))))
        self._fresh[index] = FAILED

    def retry(self) -> None:
        """Make failed images pending, since from now on their rows may hold anything.

        Raises:
            FpnxError: where the disk refuses.
        """
        failed = np.flatnonzero((self.status == FAILED) & (self._rows >= 0)).tolist()
        if failed:
            with self._writing():
                self._mark(dict.fromkeys(failed, PENDING))

    def commit(self) -> None:
        """Make everything put so far durable, then mark it.

        Raises:
            FpnxError: where the disk refuses.
        """
        if not self._fresh:
            return
        with self._writing():
            self._disk.sync()
            self._mark(self._fresh)
        self._fresh.clear()

    def finish(self) -> None:
        """Commit, close, and give the file its final name.

        Raises:
            FpnxError: where the disk refuses.
            StoreError: where another run has put its own `.part` in the place of this one.
        """
        self.commit()
        assert not bool((self.status == PENDING).any()), "finish() before every image was put"
        if not self._disk.is_at(part_path(self.output)):
            raise StoreError(
                f"{escape(part_path(self.output))} is another run's by now: it goes on with it, and this one ends"
            )
        self.close()
        with self._writing():
            os.replace(part_path(self.output), self.output)
            sync_folder(self.output.parent)

    def close(self) -> None:
        """Close without committing; what was committed stays."""
        self._disk.close()

    def _write(self, name: str, first: int, values: np.ndarray) -> None:
        self._places[name].write(self._disk, first, values)

    def _mark(self, states: Mapping[int, int]) -> None:
        indices = sorted(states)
        self.status[indices] = [states[index] for index in indices]
        for start, end in _runs(indices):
            self._write("images/status", indices[start], self.status[indices[start] : indices[end - 1] + 1].copy())
        self._disk.sync()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What the disk refuses once ends all writing: after a failed sync nobody knows what is on it."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as error:
            told = disk_error(error, self.output, self._bytes)
            self._failure = FpnxError(f"{told}; what was committed is kept: continue it with --resume")
            raise self._failure from error


def create_file(path: Path, layout: FileLayout, provenance: Provenance) -> bool:
    """Lay out a file where none is, pending and durable, and claim its space; False where that cannot be promised.

    Raises:
        OSError, RuntimeError: where the disk refuses.
    """
    # Space comes first: HDF5 must not be told to write where there is none.
    with open(path, "xb") as probe:
        reserve_space(probe.fileno(), layout.total_bytes())
    with h5py.File(path, "w", locking="best-effort", alignment_threshold=LARGE, alignment_interval=BLOCK) as file:
        reserve_space(file.id.get_vfd_handle(), layout.total_bytes())
        _lay_out(file, layout, provenance)
        file.flush()
        size = file.id.get_filesize()
    with open(path, "r+b") as laid_out:
        laid_out.truncate(size)  # the estimate was larger
        claimed = reserve_space(laid_out.fileno(), size)
        os.fsync(laid_out.fileno())
    return claimed


def check_same_run(store: Store, config: Mapping[str, Any], images: ImageList) -> None:
    """Raise unless `store` was made with `config` from the image files `images`.

    Raises:
        FpnxError: naming the fields, or counting the images, that differ.
        StoreError: where the file is not of the form that a run could go on with.
    """
    store.check()
    fields = different_fields(store.config, config)
    if fields or store.fingerprint != fingerprint(config):
        raise FpnxError(
            f"{escape(store.path)} was made with another config ({'; '.join(fields) or 'its fingerprint differs'}): "
            f"repeat that one, take another output, or start over with --overwrite"
        )
    there = dict(zip(store.paths, zip(store.bytes.tolist(), store.mtimes_ns.tolist(), strict=True), strict=True))
    asked = {os.fsdecode(record.name): (record.bytes, record.mtime_ns) for record in images.records}
    added, removed = len(asked.keys() - there.keys()), len(there.keys() - asked.keys())
    changed = sum(_differ(there[name], asked[name]) for name in asked.keys() & there.keys())
    moved = not (added or removed or changed) and list(there) != list(asked)
    if added or removed or changed or moved:
        what = "in another order" if moved else f"{added} added, {removed} removed, {changed} changed"
        raise FpnxError(
            f"{escape(store.path)} was made from other images ({what}): "
            f"bring the same ones, take another output, or start over with --overwrite"
        )
    if store.shard_slice != images.shard:
        was, asked_for = (f"shard {cut}" if cut else "no shard" for cut in (store.shard_slice, images.shard))
        alike = "its list had other images outside this shard" if was == asked_for else f"it is {was}, not {asked_for}"
        raise FpnxError(
            f"{escape(store.path)} was cut from another list ({alike}): bring the same one, take another output, or "
            f"start over with --overwrite"
        )


def _differ(before: tuple[int, int], now: tuple[int, int]) -> bool:
    """Whether (bytes, mtime) tell of two versions. Of an image at an address either may be unknown; see `Facts`."""
    if min(before[0], now[0]) < 0:
        return before[1] != now[1] and 0 not in (before[1], now[1])
    return before != now


def _lay_out(file: h5py.File, layout: FileLayout, provenance: Provenance) -> None:
    records, count = layout.images.records, len(layout.images)
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["config"] = json.dumps(layout.config)
    file.attrs["fingerprint"] = layout.fingerprint
    file.attrs["root"] = np.array(layout.images.root, dtype=h5py.string_dtype())
    file.attrs["provenance"] = json.dumps(provenance.to_json())
    if layout.images.shard is not None:
        file.attrs["shard"] = json.dumps(layout.images.shard.to_json())
    status, errors = np.zeros(count, np.uint8), np.zeros(count, h5py.string_dtype("utf-8", ERROR_BYTES))
    for index, reason in layout.errors.items():  # of headers: these have no row, so nothing is left to do
        status[index], errors[index] = FAILED, _clipped(reason)
    text = h5py.string_dtype("utf-8")
    groups = [b"" if size is None else format_size(size).encode() for size in layout.padded_sizes]
    images = file.create_group("images")
    images.create_dataset("path", data=np.array([record.name for record in records], dtype=object), dtype=text)
    images.create_dataset("group", data=np.array(groups, dtype=object), dtype=text)
    for name, values in (
        ("bytes", np.array([record.bytes for record in records], dtype=np.int64)),
        ("mtime_ns", np.array([record.mtime_ns for record in records], dtype=np.int64)),
        ("source_size", np.zeros((count, 2), np.int32)),
        ("input_size", layout.input_sizes.astype(np.int32)),
        ("status", status),
        ("error", errors),
        ("row", layout.rows.astype(np.int64)),
    ):
        _fixed(images, name, values.shape, values.dtype)[...] = values
    statistics = file.create_group("stats")
    _fixed(statistics, "nonfinite", (count, len(layout.levels)), np.int64)[...] = 0
    pyramids = file.create_group("pyramids")
    for size, members in layout.counts().items():
        group = pyramids.create_group(format_size(size))
        for level in layout.levels:
            dataset = _fixed(group, level, (members, *layout.shapes[size][level]), np.dtype(layout.dtype))
            dataset.attrs["stride"] = layout.strides[level]
            dataset.attrs["channels"] = layout.shapes[size][level][0]
            dataset.attrs["valid"] = VALID_RULE
            if len(layout.shapes) == 1:
                file[level] = h5py.SoftLink(f"/pyramids/{format_size(size)}/{level}")


def _fixed(parent: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
    """A contiguous dataset whose place in the file is settled now and never moves: no later write touches
    metadata, so there is no moment at which a crash could leave the file unreadable."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # else the whole file would be written twice
    space = h5py.h5s.create_simple(shape)
    made = h5py.h5d.create(parent.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype), logical=True), space, plist)
    return h5py.Dataset(made)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Positions (start, end) of each stretch of consecutive numbers: one write each."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return list(zip([0, *breaks], [*breaks, len(numbers)], strict=True))


def _clipped(reason: str) -> bytes:
    raw = escape(reason).encode()[:ERROR_BYTES]
    return raw.decode("utf-8", "ignore").encode()
