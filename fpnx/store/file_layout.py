"""Layout of a new HDF5 file in format version 1: its tables and datasets, created before any feature is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fpnx.core.config import fingerprint
from fpnx.core.files import BLOCK, LARGE, reserve_space
from fpnx.core.image_list import DIGEST_BYTES, ImageList
from fpnx.core.provenance import Provenance
from fpnx.core.text import escape
from fpnx.core.validation import format_size
from fpnx.store.reader import ERROR_BYTES, FAILED, FORMAT, FORMAT_VERSION
from fpnx.store.regions import REGION_TABLES, RegionLayout

__all__ = ["FileLayout", "create_file", "encode_reason"]

TABLE_BYTES = 8 + 8 + 8 + 8 + 1 + ERROR_BYTES + 8 + 16 + 16 + DIGEST_BYTES  # per image, without its path and statistics
REGION_BYTES = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for _, dtype, shape in REGION_TABLES)
VALID_RULE = "rows ceil(input_height / stride), columns ceil(input_width / stride) of a map are not padding"


@dataclass(frozen=True)
class FileLayout:
    """Tables, shapes and attributes of a file, known before the first image is computed.

    Attributes:
        images: names, file sizes and modification times.
        levels: level names, fine to coarse.
        strides: by level, in input pixels.
        dtype: of the stored features, "float32" or "float16".
        config: everything that the stored values depend on; the fingerprint is its hash.
        input_sizes: (N, 2) height and width of each image's network input, without padding.
        padded_sizes: (height, width) with padding; None for an image whose header could not be read.
        rows: (N,) row of each image among those of its padded size; -1 where it has none.
        shapes: (C, H, W) by padded size and level.
        errors: reasons, by index, why images have no row.
        regions: the boxes whose features are stored, in place of the levels' maps; else None.
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
    regions: RegionLayout | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of `config`."""
        return fingerprint(self.config)

    def counts(self) -> dict[tuple[int, int], int]:
        """Number of images by padded size."""
        counts = dict.fromkeys(self.shapes, 0)
        for size in self.padded_sizes:
            if size is not None:
                counts[size] += 1
        return counts

    def feature_bytes(self) -> int:
        """Bytes of the features of all images and regions."""
        values = {size: sum(int(np.prod(s)) for s in shapes.values()) for size, shapes in self.shapes.items()}
        total = sum(count * values[size] for size, count in self.counts().items())
        if self.regions is not None:
            total += len(self.regions) * int(np.prod(self.regions.shape))
        return total * np.dtype(self.dtype).itemsize

    def total_bytes(self) -> int:
        """Upper estimate of the bytes of the whole file, exact except for a few per cent of the tables."""
        names = sum(len(record.name) + 48 for record in self.images.records)
        tables = len(self.images) * (TABLE_BYTES + 8 * len(self.levels))
        if self.regions is not None:
            tables += len(self.regions) * REGION_BYTES + 2 * len(_names_json(self.regions)) + 2 * BLOCK
        return self.feature_bytes() + tables + names + 65536 + BLOCK * len(self.shapes) * len(self.levels)


def create_file(path: Path, layout: FileLayout, provenance: Provenance) -> bool:
    """Create the file at `path`, which must not exist, with all images pending, and sync it to the disk.

    Returns:
        Whether the space for the whole file is reserved; False where the file system cannot reserve space.

    Raises:
        OSError, RuntimeError: where creating or writing it fails.
    """
    # Reserved first, so that a full disk is noticed before HDF5 writes.
    with open(path, "xb") as empty:
        reserve_space(empty.fileno(), layout.total_bytes())
    with h5py.File(path, "w", locking="best-effort", alignment_threshold=LARGE, alignment_interval=BLOCK) as file:
        reserve_space(file.id.get_vfd_handle(), layout.total_bytes())
        _create_datasets(file, layout, provenance)
        file.flush()
        size = file.id.get_filesize()
    with open(path, "r+b") as created:
        created.truncate(size)  # the estimate was larger
        reserved = reserve_space(created.fileno(), size)
        os.fsync(created.fileno())
    return reserved


def encode_reason(reason: str) -> bytes:
    """The reason of a failed image as it is stored: escaped, UTF-8, cut to `ERROR_BYTES`."""
    raw = escape(reason).encode()[:ERROR_BYTES]
    return raw.decode("utf-8", "ignore").encode()


def _create_datasets(file: h5py.File, layout: FileLayout, provenance: Provenance) -> None:
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
    for index, reason in layout.errors.items():  # images without a row have failed already
        status[index], errors[index] = FAILED, encode_reason(reason)
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
        ("digest", np.zeros((count, DIGEST_BYTES), np.uint8)),
    ):
        _create_contiguous(images, name, values.shape, values.dtype)[...] = values
    statistics = file.create_group("stats")
    _create_contiguous(statistics, "nonfinite", (count, len(layout.levels)), np.int64)[...] = 0
    pyramids = file.create_group("pyramids")
    for size, count_of_size in layout.counts().items():
        group = pyramids.create_group(format_size(size))
        for level in layout.levels:
            dataset = _create_contiguous(
                group, level, (count_of_size, *layout.shapes[size][level]), np.dtype(layout.dtype)
            )
            dataset.attrs["stride"] = layout.strides[level]
            dataset.attrs["channels"] = layout.shapes[size][level][0]
            dataset.attrs["valid"] = VALID_RULE
            if len(layout.shapes) == 1:
                file[level] = h5py.SoftLink(f"/pyramids/{format_size(size)}/{level}")
    if layout.regions is not None:
        _create_regions(file, layout.regions, np.dtype(layout.dtype))


def _create_regions(file: h5py.File, regions: RegionLayout, dtype: np.dtype[Any]) -> None:
    group = file.create_group("regions")
    group.attrs["names"] = _names_json(regions)
    known = {"image": regions.image, "label": regions.label}
    for name, kind, shape in REGION_TABLES:
        _create_contiguous(group, name, (len(regions), *shape), kind)[...] = known.get(name, 0)
    _create_contiguous(group, "features", (len(regions), *regions.shape), dtype)


def _names_json(regions: RegionLayout) -> str:
    """The names of classes as JSON, by id."""
    return json.dumps({str(number): name for number, name in regions.names.items()})


def _create_contiguous(parent: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
    """Create a contiguous dataset that is allocated now and never moves.

    Later writes then change no metadata of the file, so that no crash can leave it unreadable.
    """
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # filling would write the whole file twice
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(parent.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype), logical=True), space, plist)
    return h5py.Dataset(dataset)
