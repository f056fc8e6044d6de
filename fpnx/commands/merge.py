"""The command merge: copies all shards of a run, or files with one fingerprint, into one file, as one run writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fpnx._version import __version__
from fpnx.core.config import OutputConfig
from fpnx.core.errors import FpnxError, Interrupted, StoreError
from fpnx.core.events import Listener
from fpnx.core.files import OpenFile, check_space, disk_error, free_bytes, lock, sync_folder
from fpnx.core.image_list import ImageList, ImageRecord
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.provenance import Provenance
from fpnx.core.text import escape, plural
from fpnx.core.validation import format_size
from fpnx.store.file_layout import FileLayout, create_file
from fpnx.store.hdf5 import open_hdf5
from fpnx.store.joined_store import JoinedDataset, JoinedStore, open_joined
from fpnx.store.output_path import check_output, real_output
from fpnx.store.reader import DONE, FAILED, Store
from fpnx.store.regions import RegionLayout
from fpnx.store.writer import DatasetExtent, part_path

__all__ = ["Merged", "merge"]

BLOCK_BYTES = 1 << 25  # of features that are copied at a time
REGIONS = "regions"  # the dataset of their features, beside one for each size and level


@dataclass(frozen=True)
class Merged:
    """Result of a merge.

    Attributes:
        output: path of the merged file.
        shards: number of shards among the files.
        images, done, failed: number of images in the file, and of those with each status.
        bytes: size of the file.
        files: number of files that were merged.
        repeated: number of images that another of the files had, too, and that were taken once.
    """

    output: Path
    shards: int
    images: int
    done: int
    failed: int
    bytes: int
    files: int
    repeated: int

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {**self.__dict__, "output": str(self.output)}


def merge(
    output: str | os.PathLike[str],
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Merged:
    """Copy all shards of a run, or finished files with one fingerprint, into one file; `fpnx merge` as a function.

    The images are those of the first file, then those of the next, and so on; all shards of a run count as one file,
    and give the tables of a run without shards. Features equal those of the files bit by bit. An image that is in
    several files, with the same name and the same bytes, is taken once, from the first in which it is done.

    The new file gets its final name when all of it is on the disk; before that, an error or a crash changes neither
    the files nor an existing output. Memory: the tables (about 1 kB an image), and 32 MB of features.

    Args:
        output: the file to write.
        files: a glob, `"out.shard-*.h5"`, or paths and globs; shards of a run in any order.
        overwrite: replace an existing file, once the new one is complete.
        listener: receives messages and the progress.

    Raises:
        FpnxError: where files differ in their config, an image is not the same in two of them, a set of shards is not
            complete, or the output cannot be written.
        Interrupted: on SIGINT or SIGTERM.
    """
    target, listener = real_output(Path(output)), listener or Listener()
    _check_output(target, overwrite)
    with handle_signals(listener) as stop, open_joined(files) as store:
        local = [file.path for file in store.files if os.path.exists(file.path)]  # others are URLs
        if target.exists() and any(os.path.samefile(path, target) for path in local):
            raise FpnxError(f"output {escape(target)} is one of the files to merge: name another")
        layout = _layout(store)
        with lock(target) as locked:
            if not locked:
                listener.message("files cannot be locked here: see to it that no second run writes this output")
            _check_output(target, overwrite)  # again: another run may have ended in the meantime
            _tell_roots(store, listener)
            stop.begin()
            _write(target, store, layout, stop, listener)
    return Merged(
        output=target,
        shards=store.shard_count,
        images=len(store),
        done=int((store.status == DONE).sum()),
        failed=int((store.status == FAILED).sum()),
        bytes=os.path.getsize(target),
        files=len(store.files),
        repeated=store.repeated,
    )


def _check_output(target: Path, overwrite: bool) -> None:
    check_output(target, OutputConfig(overwrite=True))
    existing = [path for path in (target, part_path(target)) if path.exists()]
    if existing and not overwrite:
        what = "exists" if target in existing else "holds an unfinished run"
        raise FpnxError(f"{escape(existing[0])} {what}: replace it with --overwrite, or name another output")


def _tell_roots(store: JoinedStore, listener: Listener) -> None:
    """Say where the images are of other folders than the one that the merged file names."""
    others = {file.root for file in store.files} - {store.root}
    if others:
        listener.message(
            f"the files are of images in {plural(len(others) + 1, 'folder')}: the merged one names "
            f"{escape(store.root)}, where images of the others are not found"
        )


def _layout(store: JoinedStore) -> FileLayout:
    """The layout of the merged file.

    Raises:
        StoreError: where the files were altered after they were written.
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
        raise StoreError(f"{escape(store.path)} cannot be merged: {reason}: run fpnx verify on the files")
    return layout


def _region_layout(store: JoinedStore) -> RegionLayout:
    regions = store.regions
    channels, height, width = regions.features.shape[1:]
    return RegionLayout(regions.image, regions.label, regions.names, (channels, height, width))


def _write(target: Path, store: JoinedStore, layout: FileLayout, stop: StopRequest, listener: Listener) -> None:
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


def _copy(path: Path, disk: OpenFile, store: JoinedStore, stop: StopRequest, listener: Listener) -> None:
    """Copy all features and results of the files into the file at `path`, which `disk` has open for writing."""
    with open_hdf5(os.fspath(path)) as merged:
        images, pyramids = merged["images"], merged["pyramids"]
        tables = {name: DatasetExtent.of(images[name]) for name in ("source_size", "error", "status", "digest")}
        tables["nonfinite"] = DatasetExtent.of(merged["stats/nonfinite"])
        extents: dict[Any, DatasetExtent] = {
            (size, level): DatasetExtent.of(pyramids[format_size(size)][level])
            for size in store.sizes
            for level in store.levels
        }
        if store.has_regions:
            extents[REGIONS] = DatasetExtent.of(merged["regions/features"])
            tables |= {name: DatasetExtent.of(merged["regions"][name]) for name in ("box", "level")}
    written, reported, total = 0, 0, _megabytes(sum(extent.bytes for extent in extents.values()))
    for number, file in enumerate(store.each_file()):
        first, images = store.images_of(number)
        tables["error"].write(disk, first, _read(file, "images/error", file.errors)[images])
        for key, dataset in _feature_datasets(store):
            for start, block in _blocks(file, dataset, dataset.rows_of(number)):
                _raise_if_stopped(stop)
                extents[key].write(disk, start, block)
                written += block.nbytes
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


def _feature_datasets(store: JoinedStore) -> Iterator[tuple[Any, JoinedDataset]]:
    """Key and rows of each dataset of features: (size, level), or `REGIONS`."""
    for size in store.sizes:
        for level in store.levels:
            yield (size, level), store.dataset(size, level)
    if store.has_regions:
        yield REGIONS, store.regions.features


def _blocks(file: Store, dataset: JoinedDataset, rows: range) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a dataset, those that are of `file`, in blocks of bounded size."""
    step = max(1, BLOCK_BYTES // max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))))
    for start in range(rows.start, rows.stop, step):
        part = slice(start, min(start + step, rows.stop))
        yield start, _read(file, dataset.name, partial(dataset.__getitem__, part))


def _read(file: Store, what: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    """The result of `read`; an error of reading must not be reported as an error of writing.

    Raises:
        StoreError: where reading fails.
    """
    try:
        return read()
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{escape(file.path)}: {what} cannot be read: {escape(str(error))}") from error


def _megabytes(count: int) -> int:
    return -(-count // 10**6)


def _raise_if_stopped(stop: StopRequest) -> None:
    if stop.signum is not None:
        raise Interrupted("interrupted: nothing was merged, and the files are as they were", stop.signum)


def _provenance(store: JoinedStore) -> Provenance:
    """The provenance of the first file, with a record of the merge."""
    names = [escape(os.path.basename(file.path)) for file in store.files]
    of_shards = store.shard_list is not None
    return replace(
        store.provenance,
        merged={
            "fpnx": __version__,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **({"list": store.shard_list, "shards": names} if of_shards else {"files": names}),
            "devices": sorted({file.provenance.device for file in store.files}),
        },
    )
