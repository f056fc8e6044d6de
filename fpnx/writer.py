"""Writing a store so that whatever it calls done is whole: `out.h5.part`, commits, resume, the final rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fpnx.config import fingerprint
from fpnx.errors import FpnxError, StoreError, shown
from fpnx.images import Listing
from fpnx.store import DONE, FAILED, FORMAT, FORMAT_VERSION, PENDING, Store, different_fields

try:
    import fcntl
except ImportError:  # Windows: two runs on one output are not told apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["Layout", "Writer", "disk_error", "free_bytes", "lock", "part_of", "refuse_other_run"]

ERROR_BYTES = 240
TABLE_BYTES = 8 + 8 + 8 + 8 + 1 + ERROR_BYTES + 8 + 16 + 16  # per image, without its path and statistics
VALID_RULE = "rows ceil(input_height / stride), columns ceil(input_width / stride) of a map are not padding"


@dataclass(frozen=True)
class Layout:
    """Everything about a file that is known before the first image is computed.

    `sizes[i]` is (height, width) of what the model sees of image i, `groups[i]` the name of its padded size and
    `rows[i]` its row there; an image whose header could not be read has group `""`, row -1 and an error.
    `shapes` gives (C, H, W) by group and level.
    """

    listing: Listing
    levels: tuple[str, ...]
    strides: Mapping[str, int]
    dtype: str
    config: Mapping[str, Any]
    sizes: np.ndarray
    groups: Sequence[str]
    rows: np.ndarray
    shapes: Mapping[str, Mapping[str, tuple[int, int, int]]]
    errors: Mapping[int, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 of `config`, which holds exactly what changes the numbers."""
        return fingerprint(self.config)

    def members(self, group: str) -> list[int]:
        """Images of one group, by row."""
        return [i for i, name in enumerate(self.groups) if name == group]

    def counts(self) -> dict[str, int]:
        """Number of images by group."""
        counts = dict.fromkeys(self.shapes, 0)
        for name in self.groups:
            if name:
                counts[name] += 1
        return counts

    def feature_bytes(self) -> int:
        """Bytes that the features of all images take."""
        size = np.dtype(self.dtype).itemsize
        each = {group: sum(int(np.prod(s)) for s in shapes.values()) for group, shapes in self.shapes.items()}
        return sum(count * each[group] * size for group, count in self.counts().items())

    def total_bytes(self) -> int:
        """Bytes of the whole file, to within a few per cent of what is not features."""
        names = sum(len(source.name) + 48 for source in self.listing.sources)
        tables = len(self.listing.sources) * (TABLE_BYTES + 8 * len(self.levels))
        return self.feature_bytes() + tables + names + 65536 + 4096 * len(self.shapes) * len(self.levels)


def part_of(output: Path) -> Path:
    """Where the work on `output` goes on."""
    return output.with_name(output.name + ".part")


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written in `folder`."""
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def lock(output: Path) -> Iterator[None]:
    """Hold `output` against other runs. The lock dies with its process.

    Raises:
        StoreError: naming the host and process that hold it.
    """
    if fcntl is None:
        yield
        return
    path = output.with_name(output.name + ".lock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise FpnxError(f"cannot write in {shown(output.parent)}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise FpnxError(f"cannot lock {shown(path)}: {error.strerror}") from error
            raise StoreError(
                f"{shown(output)} is being written by another run ({shown(holder) or 'unknown'}): "
                f"wait for it, or take another output"
            ) from error
        # The holder before us may have removed the file between our open and our lock: then it locks nothing.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


class Writer:
    """The one writer of a `.part` file.

    Everything is created, and its space claimed, by `create`; after that only array contents change, in the order
    features, sizes, errors, counts → fdatasync → status → fdatasync. So a reader, or a run after a crash, that sees
    a row marked done sees all of it.
    """

    def __init__(self, output: Path, file: h5py.File, levels: Sequence[str]) -> None:
        self.output, self._file, self._levels = output, file, tuple(levels)
        images = file["images"]
        self.status: np.ndarray = images["status"][:]
        self._groups = [bytes(name).decode() for name in images["group"][:]]
        self._rows = images["row"][:]
        self._fresh: dict[int, int] = {}
        self._descriptor: int = file.id.get_vfd_handle()
        self.space_is_claimed = True

    @classmethod
    def create(cls, output: Path, layout: Layout, provenance: Mapping[str, Any]) -> Writer:
        """Lay out a new `.part` beside `output` and claim its space.

        Raises:
            FpnxError: where the disk is too small; nothing is left behind then.
        """
        part = part_of(output)
        try:
            file = h5py.File(part, "w", locking="best-effort")
            try:
                _lay_out(file, layout, provenance)
                file.flush()
                claimed = _claim(file.id.get_vfd_handle(), file.id.get_filesize())
                os.fsync(file.id.get_vfd_handle())
                writer = cls(output, file, layout.levels)
            except BaseException:
                file.close()
                part.unlink(missing_ok=True)
                raise
        except (OSError, RuntimeError) as error:
            raise disk_error(error, output, layout.total_bytes()) from error
        writer.space_is_claimed = claimed
        for index in layout.errors:
            writer.fail(index, layout.errors[index])
        return writer

    @classmethod
    def reopen(cls, output: Path, layout: Layout) -> Writer:
        """Continue the `.part` beside `output`, which `refuse_other_run` has let pass.

        Raises:
            StoreError: where it cannot be opened for writing.
        """
        part = part_of(output)
        try:
            file = h5py.File(part, "r+", locking="best-effort")
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{shown(part)} cannot be opened for writing: {error}") from error
        return cls(output, file, layout.levels)

    def put(self, indices: Sequence[int], features: Mapping[str, np.ndarray], source_sizes: np.ndarray) -> None:
        """Write the features of images of one group: level → (len(indices), C, H, W) in the stored dtype."""
        rows = self._rows[list(indices)].tolist()
        group = self._file["pyramids"][self._groups[indices[0]]]
        for start, end in _runs(rows):
            for level, values in features.items():
                group[level][rows[start] : rows[start] + end - start] = values[start:end]
        for start, end in _runs(indices):
            self._file["images/source_size"][indices[start] : indices[start] + end - start] = source_sizes[start:end]
        self._fresh.update(dict.fromkeys(indices, DONE))

    def count_nonfinite(self, index: int, level: str, count: int) -> None:
        """Record how many values of one level are NaN or infinite."""
        self._file["stats/nonfinite"][index, self._levels.index(level)] = count

    def fail(self, index: int, reason: str) -> None:
        """Mark an image as failed: its rows hold NaN, its reason stands in the file."""
        if self._rows[index] >= 0:
            for dataset in self._file["pyramids"][self._groups[index]].values():
                dataset[int(self._rows[index])] = np.nan
        self._file["images/error"][index] = _clipped(reason)
        self._fresh[index] = FAILED

    def commit(self) -> None:
        """Make everything put so far durable, then mark it."""
        if not self._fresh:
            return
        self._sync()
        fresh = sorted(self._fresh)
        self.status[fresh] = [self._fresh[index] for index in fresh]
        for start, end in _runs(fresh):
            first, last = fresh[start], fresh[end - 1] + 1
            self._file["images/status"][first:last] = self.status[first:last]
        self._sync()
        self._fresh.clear()

    def finish(self) -> None:
        """Commit, close, and give the file its final name."""
        self.commit()
        assert not bool((self.status == PENDING).any()), "finish() before every image was put"
        self.close()
        os.replace(part_of(self.output), self.output)
        with contextlib.suppress(OSError):  # not every file system lets a folder be synced
            folder = os.open(self.output.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Close without committing; what was committed stays."""
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        getattr(os, "fdatasync", os.fsync)(self._descriptor)


def refuse_other_run(store: Store, config: Mapping[str, Any], listing: Listing) -> None:
    """Raise unless `store` was made with `config` from the image files of `listing`.

    Raises:
        FpnxError: naming the fields, or counting the images, that differ.
    """
    fields = different_fields(store.config, config)
    if fields or store.fingerprint != fingerprint(config):
        raise FpnxError(
            f"{shown(store.path)} was made with another config ({'; '.join(fields) or 'its fingerprint differs'}): "
            f"repeat that one, take another output, or start over with --overwrite"
        )
    there = dict(zip(store.paths, zip(store.bytes.tolist(), store.mtimes_ns.tolist(), strict=True), strict=True))
    asked = {os.fsdecode(s.name): (s.bytes, s.mtime_ns) for s in listing.sources}
    added, removed = len(asked.keys() - there.keys()), len(there.keys() - asked.keys())
    changed = sum(there[name] != asked[name] for name in asked.keys() & there.keys())
    moved = not (added or removed or changed) and list(there) != list(asked)
    if added or removed or changed or moved:
        what = "in another order" if moved else f"{added} added, {removed} removed, {changed} changed"
        raise FpnxError(
            f"{shown(store.path)} was made from other images ({what}): "
            f"bring the same ones, take another output, or start over with --overwrite"
        )


def disk_error(error: Exception, output: Path, needed: int) -> FpnxError:
    """What to tell of a failed write: a full disk with its numbers, anything else as it is."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if getattr(error, "errno", None) in full or any(f"errno = {number}" in str(error) for number in full):
        return FpnxError(
            f"too little disk space for {shown(output)}: it takes {needed / 1e9:.2f} GB and "
            f"{free_bytes(output.parent) / 1e9:.2f} GB are free; make room, or store less with --dtype float16, "
            f"--pool 7x7 or fewer --levels"
        )
    return FpnxError(f"cannot write {shown(output)}: {getattr(error, 'strerror', None) or error}")


def _lay_out(file: h5py.File, layout: Layout, provenance: Mapping[str, Any]) -> None:
    sources, count = layout.listing.sources, len(layout.listing.sources)
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["config"] = json.dumps(layout.config)
    file.attrs["fingerprint"] = layout.fingerprint
    file.attrs["root"] = np.array(layout.listing.root, dtype=h5py.string_dtype())
    file.attrs["provenance"] = json.dumps(provenance)
    text = h5py.string_dtype("utf-8")
    images = file.create_group("images")
    images.create_dataset("path", data=np.array([s.name for s in sources], dtype=object), dtype=text)
    images.create_dataset("group", data=np.array([g.encode() for g in layout.groups], dtype=object), dtype=text)
    for name, values in (
        ("bytes", np.array([s.bytes for s in sources], dtype=np.int64)),
        ("mtime_ns", np.array([s.mtime_ns for s in sources], dtype=np.int64)),
        ("source_size", np.zeros((count, 2), np.int32)),
        ("input_size", layout.sizes.astype(np.int32)),
        ("status", np.zeros(count, np.uint8)),
        ("error", np.zeros(count, h5py.string_dtype("utf-8", ERROR_BYTES))),
        ("row", layout.rows.astype(np.int64)),
    ):
        _fixed(images, name, values.shape, values.dtype)[...] = values
    statistics = file.create_group("stats")
    _fixed(statistics, "nonfinite", (count, len(layout.levels)), np.int64)[...] = 0
    pyramids = file.create_group("pyramids")
    for size, members in layout.counts().items():
        group = pyramids.create_group(size)
        for level in layout.levels:
            dataset = _fixed(group, level, (members, *layout.shapes[size][level]), np.dtype(layout.dtype))
            dataset.attrs["stride"] = layout.strides[level]
            dataset.attrs["channels"] = layout.shapes[size][level][0]
            dataset.attrs["valid"] = VALID_RULE
            if len(layout.shapes) == 1:
                file[level] = h5py.SoftLink(f"/pyramids/{size}/{level}")


def _fixed(parent: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
    """A contiguous dataset whose place in the file is settled now and never moves: no later write touches
    metadata, so there is no moment at which a crash could leave the file unreadable."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # else the whole file would be written twice
    space = h5py.h5s.create_simple(shape)
    made = h5py.h5d.create(parent.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype), logical=True), space, plist)
    return h5py.Dataset(made)


def _claim(descriptor: int, size: int) -> bool:
    """Have the file system set aside `size` bytes; False where it cannot promise them."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Positions (start, end) of each stretch of consecutive numbers: one write each."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return list(zip([0, *breaks], [*breaks, len(numbers)], strict=True))


def _clipped(reason: str) -> bytes:
    raw = reason.encode("utf-8", "backslashreplace")[:ERROR_BYTES]
    return raw.decode("utf-8", "ignore").encode()
