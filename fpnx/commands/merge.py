"""The verb merge: a set of shards → the one file that a whole run would have written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
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
from fpnx.core.text import escape
from fpnx.core.validation import format_size
from fpnx.store.hdf5 import open_hdf5
from fpnx.store.output_path import check_output, real_output
from fpnx.store.reader import DONE, FAILED, Store
from fpnx.store.shard_set import ShardSet, open_shard_set
from fpnx.store.writer import DatasetExtent, FileLayout, create_file, part_path

__all__ = ["Merged", "merge"]

BLOCK = 1 << 25  # bytes of features that are copied together


@dataclass(frozen=True)
class Merged:
    """What was merged.

    Attributes:
        output: the file.
        shards: how many went into it.
        images, done, failed: how many there are in it.
        bytes: how large it is.
    """

    output: Path
    shards: int
    images: int
    done: int
    failed: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        return {**self.__dict__, "output": str(self.output)}


def merge(
    output: str | os.PathLike[str],
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Merged:
    """Copy the complete set of a run's shards into one file; `fpnx merge` as a function.

    Tables are those of a whole run, rows are bit-equal to their shard's. The file has its name only once all of it is
    on the disk; whatever ends the work before that leaves the shards, and what had the name, as they were.

    Args:
        output: the file to make.
        shards: a glob, `"out.shard-*.h5"`, or paths in any order.
        overwrite: replace what is there, once the new file is whole.
        listener: hears of the progress.

    Raises:
        FpnxError: a set that is not complete, or an output that cannot be made.
        Interrupted: on SIGINT or SIGTERM.
    """
    target, hears = real_output(Path(output)), listener or Listener()
    _check_output(target, overwrite)
    with handle_signals(hears) as stop, open_shard_set(shards) as store:
        here = [shard.path for shard in store.shards if os.path.exists(shard.path)]  # others are in a store
        if target.exists() and any(os.path.samefile(path, target) for path in here):
            raise FpnxError(f"output {escape(target)} is one of the shards: name another")
        layout = _layout(store)
        with lock(target) as alone:
            if not alone:
                hears.message("files cannot be locked here: see to it that no second run writes this output")
            _check_output(target, overwrite)  # again: another run may have ended since
            stop.begin()
            _write(target, store, layout, stop, hears)
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
    there = [path for path in (target, part_path(target)) if path.exists()]
    if there and not overwrite:
        what = "exists" if target in there else "holds an unfinished run"
        raise FpnxError(f"{escape(there[0])} {what}: replace it with --overwrite, or name another output")


def _layout(store: ShardSet) -> FileLayout:
    told = zip(map(os.fsencode, store.paths), store.bytes.tolist(), store.mtimes_ns.tolist(), strict=True)
    records = tuple(ImageRecord(name, size, mtime) for name, size, mtime in told)
    datasets = {size: {level: store.dataset(size, level) for level in store.levels} for size in store.sizes}
    layout = FileLayout(
        images=ImageList(os.fsencode(store.root), records),
        levels=store.levels,
        strides={level: int(held.attrs["stride"]) for levels in datasets.values() for level, held in levels.items()},
        dtype=str(store.config["dtype"]),
        config=store.config,
        input_sizes=store.input_sizes,
        padded_sizes=store.padded_sizes,
        rows=store.rows,
        shapes={  # in the order of their first images, as in a whole run
            size: {level: (held.shape[1], held.shape[2], held.shape[3]) for level, held in datasets[size].items()}
            for size in dict.fromkeys(filter(None, store.padded_sizes))
        },
    )
    why = "their fingerprint is not that of their config" if layout.fingerprint != store.fingerprint else ""
    if why := why or store.altered():
        raise StoreError(f"{escape(store.path)} cannot be merged: {why}: fpnx verify tells more")
    return layout


def _write(target: Path, store: ShardSet, layout: FileLayout, stop: StopRequest, listener: Listener) -> None:
    """Under another name, which nothing takes for a finished file, and with the status of all images last."""
    fresh = target.with_name(part_path(target).name + ".new")
    needed = layout.total_bytes()
    try:
        try:
            fresh.unlink(missing_ok=True)
            check_space(target, needed, free_bytes(target.parent))
            if not create_file(fresh, layout, _provenance(store)):
                listener.message("this file system cannot set space aside: free space was checked once, now")
            disk = OpenFile(fresh)
            try:
                _copy(fresh, disk, store, stop, listener)
            finally:
                disk.close()
            os.replace(fresh, target)
            part_path(target).unlink(missing_ok=True)
            sync_folder(target.parent)
        finally:
            fresh.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise disk_error(error, target, needed) from error


def _copy(fresh: Path, disk: OpenFile, store: ShardSet, stop: StopRequest, listener: Listener) -> None:
    with open_hdf5(os.fspath(fresh)) as file:
        images, pyramids = file["images"], file["pyramids"]
        tables = {name: DatasetExtent.of(images[name]) for name in ("source_size", "error", "status")}
        tables["nonfinite"] = DatasetExtent.of(file["stats/nonfinite"])
        places = {
            (size, level): DatasetExtent.of(pyramids[format_size(size)][level])
            for size in store.sizes
            for level in store.levels
        }
    starts = dict.fromkeys(store.sizes, 0)
    written, told, total = 0, 0, _megabytes(sum(place.bytes for place in places.values()))
    for shard in store.each():
        assert shard.shard_slice is not None
        tables["error"].write(disk, shard.shard_slice.first, _read(shard, "images/error", shard.errors))
        for size, rows in Counter(filter(None, shard.padded_sizes)).items():
            for level in store.levels:
                place, row = places[size, level], starts[size]
                for block in _blocks(shard, size, level, (rows, *place.shape[1:])):
                    _heed(stop)
                    place.write(disk, row, block)
                    row, written = row + len(block), written + block.nbytes
                    if _megabytes(written) > told:
                        told = _megabytes(written)
                        listener.progress("MB", told, total)
            starts[size] += rows
    _heed(stop)
    tables["source_size"].write(disk, 0, store.source_sizes)
    tables["nonfinite"].write(disk, 0, store.nonfinite)
    disk.sync()
    tables["status"].write(disk, 0, store.status)
    disk.sync()


def _blocks(shard: Store, size: tuple[int, int], level: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """All rows of a dataset in order, a bounded number at a time."""
    dataset = shard.dataset(size, level)
    if dataset.shape != shape:
        raise StoreError(f"{escape(shard.path)}: {dataset.name} is {dataset.shape}, where {shape} belongs")
    step = max(1, BLOCK // max(1, dataset.dtype.itemsize * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield _read(shard, dataset.name, lambda start=start: dataset[start : start + step])


def _read(shard: Store, what: str, work: Any) -> np.ndarray:
    try:
        values: np.ndarray = work()
        return values
    except (OSError, RuntimeError) as error:  # not to be taken for a disk that refuses to be written
        raise StoreError(f"{escape(shard.path)}: {what} cannot be read: {escape(str(error))}") from error


def _megabytes(count: int) -> int:
    return -(-count // 10**6)


def _heed(stop: StopRequest) -> None:
    if stop.signum is not None:
        raise Interrupted("interrupted: nothing was merged, and the shards are as they were", stop.signum)


def _provenance(store: ShardSet) -> Provenance:
    """That of the first shard, and what was merged."""
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
