"""Writer of the HDF5 file: a `.part` file, durable commits, resume, the final rename.

After a crash at any moment, every image that is marked as done has all its features on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from fpnx.core.errors import FpnxError, StoreError
from fpnx.core.files import SMALLER_FEATURES, OpenFile, disk_error, sync_folder
from fpnx.core.image_list import DIGEST_BYTES
from fpnx.core.provenance import Provenance
from fpnx.core.text import escape
from fpnx.store.file_layout import FileLayout, create_file, encode_reason
from fpnx.store.hdf5 import open_hdf5
from fpnx.store.reader import DONE, FAILED, PENDING
from fpnx.store.regions import RegionBatch, first_rows

__all__ = ["DatasetExtent", "Writer", "part_path"]

AnyWriter = TypeVar("AnyWriter", bound="Writer")


def part_path(output: Path) -> Path:
    """Path of the unfinished file of `output`."""
    return output.with_name(output.name + ".part")


@dataclass(frozen=True)
class DatasetExtent:
    """Position, shape and dtype of a contiguous dataset in its file, for writing rows without HDF5."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> DatasetExtent:
        """The extent of an open dataset.

        Raises:
            StoreError: where it is not contiguous, or compressed.
        """
        offset = dataset.id.get_offset() if dataset.size else 0  # an empty dataset has no offset
        if offset is None or dataset.id.get_storage_size() != dataset.size * dataset.dtype.itemsize:
            raise StoreError(f"{escape(dataset.file.filename)} was packed by another tool: it cannot be continued")
        return cls(offset, dataset.shape, dataset.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of the dataset."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def write(self, disk: OpenFile, first: int, values: np.ndarray) -> None:
        """Write rows from row `first` on, converted to the dataset's dtype."""
        assert values.shape[1:] == self.shape[1:], f"{values.shape} for {self.shape}"
        assert 0 <= first <= first + len(values) <= self.shape[0], f"rows {first} to {first + len(values)}"
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        # A view of the bytes, not a copy: features are megabytes per image.
        raw = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8).data
        disk.write(self.offset + first * row, raw)


class Writer:
    """Writes features into a `.part` file; a file has one writer at a time.

    `create` creates all datasets and reserves their space. After that only values change, in the order features,
    sizes, errors, counts → fdatasync → status → fdatasync. So a reader, or a run after a crash, that sees an image
    marked as done sees all of its features. Datasets are contiguous and never move, so rows are written to the file
    directly and not through HDF5, whose caches cannot report a failed write or recover from it.

    Args:
        output: the final path, which `finish` renames to; its `.part` exists.
        disk: the open file to write to; by default the `.part` is opened.

    Attributes:
        status: (N,) uint8, PENDING, DONE or FAILED for each image, as committed.
        space_is_reserved: whether the disk space of the whole file is reserved.
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
            datasets = {name: file[name] for name in ("images/source_size", "images/error", "images/status")}
            datasets["stats/nonfinite"] = file["stats/nonfinite"]
            if "digest" in images:  # a `.part` of an earlier version has none
                datasets["images/digest"] = images["digest"]
            for group in dict.fromkeys(filter(None, self._groups)):
                datasets |= {f"{group}/{level}": file[f"pyramids/{group}/{level}"] for level in self._levels}
            self._first_regions: np.ndarray | None = None  # of each image; None for a file of maps
            if "regions" in file:
                self._first_regions = first_rows(file["regions/image"][:], len(self.status))
                datasets |= {f"regions/{name}": file[f"regions/{name}"] for name in ("box", "level", "features")}
            self._extents = {name: DatasetExtent.of(dataset) for name, dataset in datasets.items()}
        self._bytes = os.path.getsize(part)
        self._disk = disk or OpenFile(part)
        self._uncommitted: dict[int, int] = {}
        self._failure: FpnxError | None = None
        self.space_is_reserved = True

    @classmethod
    def create(cls: type[AnyWriter], output: Path, layout: FileLayout, provenance: Provenance) -> AnyWriter:
        """Create a new `.part` beside `output` and reserve its space; an existing `.part` is deleted.

        It is created under a temporary name and then renamed, so that a `.part` is always complete.

        Raises:
            FpnxError: where the disk is too small or writing fails; no file is left then.
        """
        part = part_path(output)
        temporary = part.with_name(part.name + ".new")
        try:
            part.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
            try:
                reserved = create_file(temporary, layout, provenance)
                os.replace(temporary, part)
                sync_folder(part.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            raise disk_error(error, output, layout.total_bytes(), SMALLER_FEATURES) from error
        writer = cls(output)
        writer.space_is_reserved = reserved
        return writer

    @classmethod
    def reopen(cls: type[AnyWriter], output: Path) -> AnyWriter:
        """Open the `.part` beside `output`, which is known to be of the same run; failed images are pending again.

        Raises:
            FpnxError: where it cannot be opened for writing, or writing fails.
        """
        try:
            writer = cls(output)
        except OSError as error:
            raise disk_error(error, part_path(output), 0) from error
        try:
            writer.reset_failed()
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
        regions: RegionBatch | None = None,
        digests: np.ndarray | None = None,
    ) -> None:
        """Write the features of images of one padded size.

        Args:
            indices: rows in `/images`.
            features: level → (len(indices), C, H, W) in the stored dtype.
            source_sizes: (len(indices), 2) height and width.
            nonfinite: level → number of NaN and infinite values of each image.
            regions: those of the images, for a file of regions.
            digests: (len(indices), 16) uint8 content hashes; None where they are not known.

        Raises:
            FpnxError: where writing fails.
        """
        rows = self._rows[list(indices)].tolist()
        nonfinite_counts = np.array([nonfinite[level] for level in self._levels]).T
        digests = np.zeros((len(indices), DIGEST_BYTES), np.uint8) if digests is None else digests
        with self._writing():
            for start, end in _runs(rows):
                for level, values in features.items():
                    self._write(f"{self._groups[indices[0]]}/{level}", rows[start], values[start:end])
            if regions is not None:
                self._put_regions(indices, regions)
            for start, end in _runs(indices):
                self._write("images/source_size", indices[start], source_sizes[start:end])
                self._write("images/error", indices[start], np.full(end - start, b""))  # an earlier run may have failed
                self._write("stats/nonfinite", indices[start], nonfinite_counts[start:end])
                self._write_digests(indices[start], digests[start:end])
        self._uncommitted.update(dict.fromkeys(indices, DONE))

    def fail(self, index: int, reason: str) -> None:
        """Mark an image as failed: its features are NaN, and the reason is stored.

        Raises:
            FpnxError: where writing fails.
        """
        with self._writing():
            for level in self._levels:
                name = f"{self._groups[index]}/{level}"
                shape = self._extents[name].shape[1:]
                self._write(name, int(self._rows[index]), np.full((1, *shape), np.nan, np.float32))
            if self._first_regions is not None:
                self._put_regions([index], self._failed_regions(index))
            self._write("images/source_size", index, np.zeros((1, 2)))
            self._write("images/error", index, np.array([encode_reason(reason)]))
            self._write("stats/nonfinite", index, np.zeros((1, len(self._levels))))
            self._write_digests(index, np.zeros((1, DIGEST_BYTES), np.uint8))
        self._uncommitted[index] = FAILED

    def reset_failed(self) -> None:
        """Mark failed images as pending, and commit that before their rows are overwritten.

        Raises:
            FpnxError: where writing fails.
        """
        failed = np.flatnonzero((self.status == FAILED) & (self._rows >= 0)).tolist()
        if failed:
            with self._writing():
                self._mark(dict.fromkeys(failed, PENDING))

    def commit(self) -> None:
        """Sync everything written so far to the disk, then mark those images as done or failed.

        Raises:
            FpnxError: where writing fails.
        """
        if not self._uncommitted:
            return
        with self._writing():
            self._disk.sync()
            self._mark(self._uncommitted)
        self._uncommitted.clear()

    def finish(self) -> None:
        """Commit, close, and rename the file to its final name.

        Raises:
            FpnxError: where writing fails.
            StoreError: where another run has replaced the `.part` with its own.
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
        """Close without committing; earlier commits are kept."""
        self._disk.close()

    def _put_regions(self, indices: Sequence[int], regions: RegionBatch) -> None:
        """Write the rows of each image where its regions are."""
        assert self._first_regions is not None, "regions for a file of maps"
        position = 0
        for start, end in _runs(indices):
            first, last = int(self._first_regions[indices[start]]), int(self._first_regions[indices[end - 1] + 1])
            for name, values in regions.tables():
                self._write(f"regions/{name}", first, values[position : position + last - first])
            position += last - first
        assert position == len(regions.boxes), "regions of other images"

    def _failed_regions(self, index: int) -> RegionBatch:
        """Rows for the regions of an image that failed: NaN, and level 0."""
        assert self._first_regions is not None
        count = int(self._first_regions[index + 1] - self._first_regions[index])
        shape = self._extents["regions/features"].shape[1:]
        return RegionBatch(
            np.full((count, 4), np.nan), np.zeros(count, np.int64), np.full((count, *shape), np.nan, np.float32)
        )

    def _write(self, name: str, first: int, values: np.ndarray) -> None:
        self._extents[name].write(self._disk, first, values)

    def _write_digests(self, first: int, digests: np.ndarray) -> None:
        if "images/digest" in self._extents:
            self._write("images/digest", first, digests)

    def _mark(self, states: Mapping[int, int]) -> None:
        indices = sorted(states)
        self.status[indices] = [states[index] for index in indices]
        for start, end in _runs(indices):
            self._write("images/status", indices[start], self.status[indices[start] : indices[end - 1] + 1].copy())
        self._disk.sync()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns an OSError into FpnxError, and refuses all later writes: after a failed sync, the content of the disk
        is unknown."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as error:
            message = disk_error(error, self.output, self._bytes, SMALLER_FEATURES)
            self._failure = FpnxError(f"{message}; what was committed is kept: continue it with --resume")
            raise self._failure from error


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) positions of each run of consecutive numbers, which takes one write."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return list(zip([0, *breaks], [*breaks, len(numbers)], strict=True))
