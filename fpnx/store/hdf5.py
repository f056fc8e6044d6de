"""Safe reading of HDF5 files from untrusted sources.

Nothing outside the file is read, nothing much larger than the file is allocated, and every error is one StoreError.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import h5py
import numpy as np

from fpnx.core.errors import StoreError
from fpnx.core.text import escape
from fpnx.remote.client import RemoteError, object_info
from fpnx.remote.file import RemoteFile
from fpnx.remote.urls import checked, is_url

__all__ = [
    "attribute_bytes",
    "attribute_int",
    "attribute_json",
    "check_bytes",
    "damage_named",
    "file_identity",
    "get_member",
    "open_hdf5",
    "read_rows",
    "read_strings",
    "read_table",
]

MAX_ATTRIBUTE_BYTES = 1 << 24  # of one attribute; those of fpnx have a few kB
MAX_STRING_BYTES = 1 << 16  # of one string, where their total is unknown; paths have 4096 at most

LOCKING = (None, False, "best-effort", True)  # values of h5py's `locking`; None is its default
SUPERBLOCK_BYTES = 96  # at the start of each file

Kind = TypeVar("Kind", h5py.Group, h5py.Dataset)


def open_hdf5(path: str) -> h5py.File:
    """Open a file, or the object at a URL, for reading; also a file that is being written.

    HDF5 wants the same `locking` of all handles of a file in a process. h5py's default comes first, so that h5py and
    what is built on it can open the file too. Where HDF5 refuses it, because another handle has another `locking` or
    because of a lock, the others follow: reading needs no lock, since datasets never move (see `fpnx.store.writer`).

    Raises:
        StoreError: where it is missing, not a regular file, not HDF5, truncated, or locked.
    """
    if is_url(os.fsencode(path)):
        return _open_remote(path)
    if not os.path.exists(path):
        part = f"{path}.part"
        hint = f"; {escape(part)} is there: continue it with --resume" if os.path.exists(part) else ""
        if path.endswith(".part") and os.path.exists(path[: -len(".part")]):
            hint = f"; {escape(path[: -len('.part')])} is there: the run has ended"
        raise StoreError(f"{escape(path)} does not exist{hint}")
    if os.path.isdir(path):
        raise StoreError(f"{escape(path)} is a folder, not a file that fpnx wrote")
    if not os.path.isfile(path):  # opening a FIFO would block
        raise StoreError(f"{escape(path)} is not a regular file")
    try:
        open(path, "rb").close()
    except OSError as error:  # the message of HDF5 has many lines
        raise StoreError(f"{escape(path)}: {error.strerror}") from error
    refusal: Exception | None = None
    for locking in LOCKING:
        try:
            return h5py.File(path, "r", locking=locking)
        except (OSError, RuntimeError, ValueError) as error:
            refusal = refusal or error  # that of h5py's default
            if not _is_about_locks(error):
                break
    assert refusal is not None
    raise StoreError(f"{escape(path)} {_why_unreadable(path, refusal)}") from refusal


def _is_about_locks(error: Exception) -> bool:
    return "lock file" in str(error) or "file locking" in str(error)


def _reason(error: Exception) -> str:
    """The reason in an error of HDF5, on one line."""
    match = re.search(r"\((.*)\)", str(error), re.DOTALL)
    return escape(" ".join((match[1] if match else str(error)).split()))


def _why_unreadable(path: str, error: Exception) -> str:
    """What HDF5 found wrong with a local file."""
    reason = _reason(error)
    if _is_about_locks(error):  # even without locks: only this variable can ask for them
        advice = f"unset HDF5_USE_FILE_LOCKING, which is {escape(os.environ.get('HDF5_USE_FILE_LOCKING', 'unset'))}"
        if isinstance(error, BlockingIOError):
            return f"is locked: another program has it open for writing; close it there, or {advice}"
        return f"cannot be locked, perhaps because its file system has no locks ({reason}): {advice}"
    try:
        is_foreign = not h5py.is_hdf5(path)
    except ValueError:
        is_foreign = False
    if is_foreign:
        return "is not an HDF5 file"
    if "truncated file" in reason or os.path.getsize(path) < SUPERBLOCK_BYTES:
        return f"is truncated ({reason}): copy it again, or make it again"
    return f"cannot be read as HDF5: {reason}"


def file_identity(file: h5py.File) -> tuple[int, ...]:
    """Numbers that change when another file is put at the same path or URL."""
    if _is_remote(file):
        info = object_info(os.fsencode(_path(file)))
        return info.bytes, info.mtime_ns
    stat = os.fstat(file.id.get_vfd_handle())
    return stat.st_dev, stat.st_ino, stat.st_size


def _open_remote(path: str) -> h5py.File:
    try:
        return h5py.File(RemoteFile(checked(os.fsencode(path))), "r")
    except RemoteError as error:
        raise StoreError(str(error)) from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = _reason(error)
        if "signature not found" in reason:
            raise StoreError(f"{escape(path)} is not an HDF5 file") from error
        what = "is truncated" if "truncated file" in reason else "cannot be read as HDF5"
        raise StoreError(f"{escape(path)} {what} ({reason}): send it again") from error


@contextmanager
def damage_named(path: str, name: str) -> Iterator[None]:
    """Inside, what h5py raises for a damaged object is a `StoreError` that names it."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{escape(path)} is damaged: {escape(name)} cannot be read ({_reason(error)})") from error


def get_member(parent: h5py.Group, name: str, kind: type[Kind]) -> Kind:
    """The group or dataset `name` of `parent`, of type `kind`, whose data are in this file.

    Raises:
        StoreError: where it is missing or of another type, and for links and external or virtual storage, which could
            read (or, on resuming, write) any other file.
    """
    full_name = f"{parent.name.rstrip('/')}/{name}"
    with damage_named(_path(parent), full_name):
        link = parent.get(name, getlink=True)
        result = parent[name] if isinstance(link, h5py.HardLink) else None
    if link is None:
        raise StoreError(f"{_file(parent)} is not a whole fpnx file: {escape(full_name)} is missing")
    if not isinstance(link, h5py.HardLink):
        raise StoreError(f"{_file(parent)} is not to be trusted: {escape(full_name)} is a link to another place")
    if not isinstance(result, kind):
        raise StoreError(f"{_file(parent)} is not a whole fpnx file: {escape(full_name)} is no {kind.__name__.lower()}")
    if isinstance(result, h5py.Dataset) and (result.is_virtual or result.external):
        raise StoreError(f"{_file(parent)} is not to be trusted: the data of {escape(full_name)} are in other files")
    return result


def read_table(parent: h5py.Group, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A small dataset as an array of `dtype`.

    Raises:
        StoreError: where it has another dtype or shape, or claims to be larger than the file.
    """
    dataset, expected = get_member(parent, name, h5py.Dataset), np.dtype(dtype)
    actual = dataset.dtype
    if (actual.kind, actual.itemsize) != (expected.kind, expected.itemsize) or dataset.shape != shape:
        raise StoreError(
            f"{_file(parent)} is not a whole fpnx file: {dataset.name} is {actual} {dataset.shape}, "
            f"where {expected} {shape} belongs"
        )
    check_bytes(dataset, dataset.size * actual.itemsize)
    values = np.empty(shape, actual)
    read_rows(dataset, [(0, values)])
    return values.astype(expected, copy=False)


def read_strings(parent: h5py.Group, name: str) -> list[bytes]:
    """A one-dimensional dataset of strings, as bytes.

    Raises:
        StoreError: where it is something else, or the strings together would be larger than the file.
    """
    dataset = get_member(parent, name, h5py.Dataset)
    if len(dataset.shape or ()) != 1 or h5py.check_string_dtype(dataset.dtype) is None:
        raise StoreError(f"{_file(parent)} is not a whole fpnx file: {dataset.name} is no list of names")
    count = dataset.shape[0]
    if dataset.dtype.kind != "O":
        check_bytes(dataset, dataset.dtype.itemsize * count)
        return [bytes(value) for value in dataset[:]]
    start, stored = dataset.id.get_offset(), dataset.id.get_storage_size()
    if start is None or not count or stored % count or _is_remote(dataset):
        return _read_one_by_one(dataset)
    # Each entry is a length (4 bytes) and a reference to the bytes. Many entries of a small file may refer to one large
    # string and fill the memory, so the lengths are added up before the strings are read.
    check_bytes(dataset, stored)
    entries = np.fromfile(_path(dataset), np.uint8, stored, offset=start)
    if entries.size == stored:
        lengths = entries.reshape(count, stored // count)[:, :4].copy().view("<u4")
        check_bytes(dataset, int(lengths.sum(dtype=np.int64)))
    return [bytes(value) for value in dataset[:]]


def read_rows(dataset: h5py.Dataset, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
    """Read rows of `dataset`: for each (first row, array) fill the array, C-contiguous (n, ...), from that row on.

    Contiguous datasets are read from the file itself. HDF5 may give outdated values of a file that is being written,
    where anything else in this process has the same dataset open.

    Raises:
        StoreError: where the file is shorter than it was.
    """
    offset, count, dtype = dataset.id.get_offset(), len(dataset), dataset.dtype
    bytes_per_row = dataset.size // max(1, count) * dtype.itemsize
    is_plain = offset is not None and dataset.id.get_storage_size() == bytes_per_row * count
    descriptor = -1
    if is_plain and hasattr(os, "preadv") and not _is_remote(dataset):
        descriptor = dataset.file.id.get_vfd_handle()
    for first, out in pieces:
        assert 0 <= first <= first + len(out) <= count, f"rows {first} to {first + len(out)} of {count}"
        if descriptor >= 0 and out.dtype == dtype:
            _read_exactly(descriptor, offset + first * bytes_per_row, out, dataset)
        elif out.size:
            dataset.read_direct(out, np.s_[first : first + len(out)])


def _read_exactly(descriptor: int, position: int, out: np.ndarray, dataset: h5py.Dataset) -> None:
    rest = memoryview(out.reshape(-1).view(np.uint8))
    while rest:
        count = os.preadv(descriptor, [rest], position)
        if not count:
            raise StoreError(f"{_file(dataset)} is truncated: {dataset.name} goes on beyond its end")
        rest, position = rest[count:], position + count


def attribute_bytes(file: h5py.Group, name: str) -> bytes:
    """A string attribute, as bytes.

    Raises:
        StoreError: where it is missing or not a string.
    """
    value = _scalar(file, name)
    if isinstance(value, str):
        value = os.fsencode(value)
    if not isinstance(value, bytes) or len(value) > MAX_ATTRIBUTE_BYTES:
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is no text")
    return value


def attribute_int(file: h5py.File, name: str) -> int:
    """An integer attribute.

    Raises:
        StoreError: where it is missing or not an integer.
    """
    value = _scalar(file, name)
    if not isinstance(value, (int, np.integer)):
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is no whole number")
    return int(value)


def attribute_json(file: h5py.Group, name: str) -> dict[str, Any]:
    """The JSON object in a string attribute.

    Raises:
        StoreError: where it is missing or not a JSON object.
    """
    try:
        value = json.loads(attribute_bytes(file, name))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is not JSON") from error
    if not isinstance(value, dict):
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is no JSON object")
    return value


def _scalar(file: h5py.Group, name: str) -> Any:
    if name not in file.attrs:
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is missing")
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.itemsize > MAX_ATTRIBUTE_BYTES:
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is no single value")
    return file.attrs[name]


def _read_one_by_one(dataset: h5py.Dataset) -> list[bytes]:
    """Strings whose total length is unknown before they are read: remote, or repacked by another tool."""
    strings = []
    for index in range(dataset.shape[0]):
        strings.append(bytes(dataset[index]))
        if len(strings[-1]) > MAX_STRING_BYTES:
            raise StoreError(f"{_file(dataset)} is not to be trusted: a name in {dataset.name} never ends")
    return strings


def check_bytes(dataset: h5py.Dataset, count: int) -> None:
    """Refuse to read `count` bytes of `dataset` where they are more than 16 times the file size and 16 MiB.

    A file that another tool has repacked may be compressed, hence the factor.

    Raises:
        StoreError: with the name of the dataset.
    """
    size = dataset.file.id.get_filesize() if _is_remote(dataset) else os.path.getsize(_path(dataset))
    if count > 16 * size + (1 << 24):
        raise StoreError(f"{_file(dataset)} is not to be trusted: {dataset.name} claims to be larger than the file")


def _is_remote(member: h5py.Group | h5py.Dataset) -> bool:
    return bool(member.file.driver == "fileobj")


def _path(member: h5py.Group | h5py.Dataset) -> str:
    return str(os.fsdecode(member.file.filename))


def _file(member: h5py.Group | h5py.Dataset) -> str:
    """Printable path or URL of the file, for messages."""
    return escape(_path(member))
