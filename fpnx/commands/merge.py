"""The command merge: copies a complete set of shards into one file, as a run without shards writes it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fpnx._version import __version__
from fpnx.core.config import OutputConfig
from fpnx.core.errors import FpnxError, Interrupted, StoreError
from fpnx.core.events import Listener
from fpnx.core.files import OpenFile, check_space, disk_error, free_bytes, lock, sync_folder
from fpnx.core.image_list import ImageList, ImageRecord
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.provenance import Provenance
from fpnx.core.text import escape
from fpnx.core.validation import format_size
from fpnx.store.file_layout import FileLayout, create_file
from fpnx.store.hdf5 import open_hdf5
from fpnx.store.output_path import check_output, real_output
from fpnx.store.reader import DONE, FAILED, Store
from fpnx.store.regions import RegionLayout
from fpnx.store.shard_set import ShardSet, open_shard_set
from fpnx.store.writer import DatasetExtent, part_path

__all__ = ["Merged", "merge"]

BLOCK_BYTES = 1 << 25  # of features that are copied at a time
REGIONS = "regions"  # the dataset of their features, beside one for each size and level


@dataclass(frozen=True)
class Merged:
    """Result of a merge.

    Attributes:
        output: path of the merged file.
        shards: number of shards.
        images, done, failed: number of images in the file, and of those with each status.
        bytes: size of the file.
    """

    output: Path
    shards: int
    images: int
    done: int
    failed: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {**self.__dict__, "output": str(self.output)}


def merge(
    output: str | os.PathLike[str],
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Merged:
    """Copy the complete set of a run's shards into one file; `fpnx merge` as a function.

    The tables are those of a run without shards, and the features equal those of the shards bit by bit. The file gets
    its final name when all of it is on the disk; before that, an error or a crash changes neither the shards nor an
    existing file.

    Args:
        output: the file to write.
        shards: a glob, `"out.shard-*.h5"`, or paths in any order.
        overwrite: replace an existing file, once the new one is complete.
        listener: receives the progress.

    Raises:
        FpnxError: where the set of shards is not complete, or the output cannot be written.
        Interrupted: on SIGINT or SIGTERM.
    """
    target, listener = real_output(Path(output)), listener or Listener()
    _check_output(target, overwrite)
    with handle_signals(listener) as stop, open_shard_set(shards) as store:
        local = [shard.path for shard in store.shards if os.path.exists(shard.path)]  # others are URLs
        if target.exists() and any(os.path.samefile(path, target) for path in local):
            raise FpnxError(f"output {escape(target)} is one of the shards: name another")
        layout = _layout(store)
        with lock(target) as locked:
            if not locked:
                listener.message("files cannot be locked here: see to it that no second run writes this output")
            _check_output(target, overwrite)  # again: another run may have ended in the meantime
            stop.begin()
            _write(target, store, layout, stop, listener)
    return Merged(
        output=target,
        shards=len(store.shards),
        images=len(store),
        done=int((store.status == DONE).sum()),
        failed=int((store.status == FAILED).sum()),
        bytes=os.path.getsize(target),
    )


def _check_output(target: Path, overwrite: bool) -> None:
    check_output(target, OutputConfig(overwrite=True))
    existing = [path for path in (target, part_path(target)) if path.exists()]
    if existing and not overwrite:
        what = "exists" if target in existing else "holds an unfinished run"
        raise FpnxError(f"{escape(existing[0])} {what}: replace it with --overwrite, or name another output")


def _layout(store: ShardSet) -> FileLayout:
    """The layout of the merged file.

    Raises:
        StoreError: where the shards were altered after they were written.
    """
    values = zip(map(os.fsencode, store.paths), store.bytes.tolist(), store.mtimes_ns.tolist(), strict=True)
    records = tuple(ImageRecord(name, size, mtime) for name, size, mtime in values)
    datasets = {size: {level: store.dataset(size, level) for level in store.levels} for size in store.sizes}
    layout = FileLayout(
        images=ImageList(os.fsencode(store.root), records),
        levels=store.levels,
        strides={level: int(data.attrs["stride"]) for levels in datasets.values() for level, data in levels.items()},
        dtype=str(store.config["dtype"]),
        config=store.config,
        input_sizes=store.input_sizes,
        padded_sizes=store.padded_sizes,
        rows=store.rows,
        shapes={  # in the order of their first images, as in a run without shards
            size: {level: (data.shape[1], data.shape[2], data.shape[3]) for level, data in datasets[size].items()}
            for size in dict.fromkeys(filter(None, store.padded_sizes))
        },
        regions=_region_layout(store) if store.has_regions else None,
    )
    reason = "their fingerprint is not that of their config" if layout.fingerprint != store.fingerprint else ""
    if reason := reason or store.list_mismatch():
        raise StoreError(f"{escape(store.path)} cannot be merged: {reason}: run fpnx verify on the shards")
    return layout


def _region_layout(store: ShardSet) -> RegionLayout:
    regions = store.regions
    channels, height, width = regions.features.shape[1:]
    return RegionLayout(regions.image, regions.label, regions.names, (channels, height, width))


def _write(target: Path, store: ShardSet, layout: FileLayout, stop: StopRequest, listener: Listener) -> None:
    """Write the merged file under a temporary name, the status of all images last, then rename it to `target`."""
    temporary = target.with_name(part_path(target).name + ".new")
    needed = layout.total_bytes()
    try:
        try:
            temporary.unlink(missing_ok=True)
            check_space(target, needed, free_bytes(target.parent))
            if not create_file(temporary, layout, _provenance(store)):
                listener.message("this file system cannot reserve space: free space was checked once, at the start")
            disk = OpenFile(temporary)
            try:
                _copy(temporary, disk, store, stop, listener)
            finally:
                disk.close()
            os.replace(temporary, target)
            part_path(target).unlink(missing_ok=True)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise disk_error(error, target, needed) from error


def _copy(path: Path, disk: OpenFile, store: ShardSet, stop: StopRequest, listener: Listener) -> None:
    """Copy all features and results of the shards into the file at `path`, which `disk` has open for writing."""
    with open_hdf5(os.fspath(path)) as file:
        images, pyramids = file["images"], file["pyramids"]
        tables = {name: DatasetExtent.of(images[name]) for name in ("source_size", "error", "status", "digest")}
        tables["nonfinite"] = DatasetExtent.of(file["stats/nonfinite"])
        extents: dict[Any, DatasetExtent] = {
            (size, level): DatasetExtent.of(pyramids[format_size(size)][level])
            for size in store.sizes
            for level in store.levels
        }
        if store.has_regions:
            extents[REGIONS] = DatasetExtent.of(file["regions/features"])
            tables |= {name: DatasetExtent.of(file["regions"][name]) for name in ("box", "level")}
    next_rows = dict.fromkeys(extents, 0)
    written, reported, total = 0, 0, _megabytes(sum(extent.bytes for extent in extents.values()))
    for shard in store.each_file():
        assert shard.shard_slice is not None
        tables["error"].write(disk, shard.shard_slice.first, _read(shard, "images/error", shard.errors))
        for key, dataset, rows in _feature_datasets(shard):
            extent = extents[key]
            for block in _blocks(shard, dataset, (rows, *extent.shape[1:])):
                _raise_if_stopped(stop)
                extent.write(disk, next_rows[key], block)
                next_rows[key], written = next_rows[key] + len(block), written + block.nbytes
                if _megabytes(written) > reported:
                    reported = _megabytes(written)
                    listener.progress("MB", reported, total)
    _raise_if_stopped(stop)
    tables["source_size"].write(disk, 0, store.source_sizes)
    tables["nonfinite"].write(disk, 0, store.nonfinite)
    tables["digest"].write(disk, 0, store.digests)
    if store.has_regions:
        tables["box"].write(disk, 0, store.regions.box)
        tables["level"].write(disk, 0, store.regions.level)
    disk.sync()
    tables["status"].write(disk, 0, store.status)
    disk.sync()


def _feature_datasets(shard: Store) -> Iterator[tuple[Any, h5py.Dataset, int]]:
    """Key, dataset and number of rows of each dataset of features: (size, level), or `REGIONS`."""
    for size, rows in Counter(filter(None, shard.padded_sizes)).items():
        for level in shard.levels:
            yield (size, level), shard.dataset(size, level), rows
    if shard.has_regions and (rows := len(shard.region_features())):
        yield REGIONS, shard.region_features(), rows


def _blocks(shard: Store, dataset: h5py.Dataset, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """All rows of a dataset in order, in blocks of bounded size."""
    if dataset.shape != shape:
        raise StoreError(f"{escape(shard.path)}: {dataset.name} is {dataset.shape}, where {shape} belongs")
    step = max(1, BLOCK_BYTES // max(1, dataset.dtype.itemsize * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield _read(shard, dataset.name, partial(dataset.__getitem__, slice(start, start + step)))


def _read(shard: Store, what: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    """The result of `read`; an error of reading must not be reported as an error of writing.

    Raises:
        StoreError: where reading fails.
    """
    try:
        return read()
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{escape(shard.path)}: {what} cannot be read: {escape(str(error))}") from error


def _megabytes(count: int) -> int:
    return -(-count // 10**6)


def _raise_if_stopped(stop: StopRequest) -> None:
    if stop.signum is not None:
        raise Interrupted("interrupted: nothing was merged, and the shards are as they were", stop.signum)


def _provenance(store: ShardSet) -> Provenance:
    """The provenance of the first shard, with a record of the merge."""
    return replace(
        store.provenance,
        merged={
            "fpnx": __version__,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "list": store.list,
            "shards": [escape(os.path.basename(shard.path)) for shard in store.shards],
            "devices": sorted({shard.provenance.device for shard in store.shards}),
        },
    )
