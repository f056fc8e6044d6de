"""Reading HDF5 that may be anybody's: nothing outside the file, nothing far larger than it, one clear line each."""

from __future__ import annotations

import json
import os
import re
from typing import Any, TypeVar

import h5py
import numpy as np

from fpnx.core.errors import StoreError
from fpnx.core.text import escape
from fpnx.remote.client import RemoteError, object_info
from fpnx.remote.file import RemoteFile
from fpnx.remote.urls import checked, is_url

__all__ = [
    "attribute_text",
    "attribute_whole",
    "check_bytes",
    "file_state",
    "member",
    "names",
    "open_hdf5",
    "parsed",
    "table",
]

TEXT_LIMIT = 1 << 24  # bytes of one attribute; ours are a few kB
NAME_LIMIT = 1 << 16  # bytes of one name, where the file does not tell the sum: paths end at 4096

Kind = TypeVar("Kind", h5py.Group, h5py.Dataset)


def open_hdf5(path: str) -> h5py.File:
    """The file, opened for reading, also while it is being written; or the object of a store.

    Raises:
        StoreError: where it is missing, no file, no HDF5, or truncated.
    """
    if is_url(os.fsencode(path)):
        return _open_remote(path)
    if not os.path.exists(path):
        part = f"{path}.part"
        hint = f"; {escape(part)} is there: continue it with --resume" if os.path.exists(part) else ""
        raise StoreError(f"{escape(path)} does not exist{hint}")
    if os.path.isdir(path):
        raise StoreError(f"{escape(path)} is a folder, not a file that fpnx wrote")
    if not os.path.isfile(path):  # opening a FIFO would wait for ever
        raise StoreError(f"{escape(path)} is not a regular file")
    try:
        open(path, "rb").close()
    except OSError as error:  # HDF5 would tell of this in many words, or raise it as it is
        raise StoreError(f"{escape(path)}: {error.strerror}") from error
    try:
        # A file that is being written is locked by its writer; ours is laid out so that reading it is safe.
        return h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as error:
        try:
            foreign = not h5py.is_hdf5(path)
        except ValueError:
            foreign = False
        if foreign:
            raise StoreError(f"{escape(path)} is not an HDF5 file") from error
        match = re.search(r"\((.*)\)", str(error), re.DOTALL)
        reason = escape(" ".join((match[1] if match else str(error)).split()))
        raise StoreError(f"{escape(path)} cannot be read as HDF5, it may be truncated: {reason}") from error


def file_state(file: h5py.File) -> tuple[int, ...]:
    """What tells a file from one that has taken its name."""
    if _is_remote(file):
        facts = object_info(os.fsencode(_path(file)))
        return facts.bytes, facts.mtime_ns
    held = os.fstat(file.id.get_vfd_handle())
    return held.st_dev, held.st_ino, held.st_size


def _open_remote(path: str) -> h5py.File:
    try:
        return h5py.File(RemoteFile(checked(os.fsencode(path))), "r")
    except RemoteError as error:
        raise StoreError(str(error)) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"{escape(path)} cannot be read as HDF5: it is another file, or truncated") from error


def member(parent: h5py.Group, name: str, kind: type[Kind]) -> Kind:
    """A child of `parent`, if it is of `kind` and its bytes are in this very file.

    Raises:
        StoreError: for what is missing or of another kind, and for links, external or virtual storage: they could
            read (or, on resuming, write) any other file.
    """
    where = f"{parent.name.rstrip('/')}/{name}"
    link = parent.get(name, getlink=True)
    if link is None:
        raise StoreError(f"{_file(parent)} is not a whole fpnx file: {escape(where)} is missing")
    if not isinstance(link, h5py.HardLink):
        raise StoreError(f"{_file(parent)} is not to be trusted: {escape(where)} is a link to another place")
    found = parent[name]
    if not isinstance(found, kind):
        raise StoreError(f"{_file(parent)} is not a whole fpnx file: {escape(where)} is no {kind.__name__.lower()}")
    if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
        raise StoreError(f"{_file(parent)} is not to be trusted: the data of {escape(where)} are in other files")
    return found


def table(parent: h5py.Group, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A small dataset as an array of `dtype`.

    Raises:
        StoreError: where it has another type or shape, or claims to be larger than the file.
    """
    dataset, wanted = member(parent, name, h5py.Dataset), np.dtype(dtype)
    held = dataset.dtype
    if (held.kind, held.itemsize) != (wanted.kind, wanted.itemsize) or dataset.shape != shape:
        raise StoreError(
            f"{_file(parent)} is not a whole fpnx file: {dataset.name} is {held} {dataset.shape}, "
            f"where {wanted} {shape} belongs"
        )
    check_bytes(dataset, dataset.size * held.itemsize)
    values: np.ndarray = dataset[...]
    return values.astype(wanted, copy=False)


def names(parent: h5py.Group, name: str) -> list[bytes]:
    """A one-dimensional dataset of strings, as bytes.

    Raises:
        StoreError: for anything else, or where the strings together would be larger than the file.
    """
    dataset = member(parent, name, h5py.Dataset)
    if len(dataset.shape or ()) != 1 or h5py.check_string_dtype(dataset.dtype) is None:
        raise StoreError(f"{_file(parent)} is not a whole fpnx file: {dataset.name} is no list of names")
    count = dataset.shape[0]
    if dataset.dtype.kind != "O":
        check_bytes(dataset, dataset.dtype.itemsize * count)
        return [bytes(value) for value in dataset[:]]
    start, stored = dataset.id.get_offset(), dataset.id.get_storage_size()
    if start is None or not count or stored % count or _is_remote(dataset):
        return _one_by_one(dataset)
    # A string is kept as its length (4 bytes) and where its bytes are. Many may share one large text, so that a
    # small file could fill the memory: the lengths are added up before anything is read.
    check_bytes(dataset, stored)
    references = np.fromfile(_path(dataset), np.uint8, stored, offset=start)
    if references.size == stored:
        lengths = references.reshape(count, stored // count)[:, :4].copy().view("<u4")
        check_bytes(dataset, int(lengths.sum(dtype=np.int64)))
    return [bytes(value) for value in dataset[:]]


def attribute_text(file: h5py.File, name: str) -> bytes:
    """One string attribute, as bytes.

    Raises:
        StoreError: where it is missing or no string.
    """
    value = _scalar(file, name)
    if isinstance(value, str):
        value = os.fsencode(value)
    if not isinstance(value, bytes) or len(value) > TEXT_LIMIT:
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is no text")
    return value


def attribute_whole(file: h5py.File, name: str) -> int:
    """One whole-number attribute.

    Raises:
        StoreError: where it is missing or no whole number.
    """
    value = _scalar(file, name)
    if not isinstance(value, (int, np.integer)):
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is no whole number")
    return int(value)


def parsed(file: h5py.File, name: str) -> dict[str, Any]:
    """One attribute that holds a JSON object.

    Raises:
        StoreError: where it does not.
    """
    try:
        value = json.loads(attribute_text(file, name))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is not JSON") from error
    if not isinstance(value, dict):
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is no JSON object")
    return value


def _scalar(file: h5py.File, name: str) -> Any:
    if name not in file.attrs:
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is missing")
    held = file.attrs.get_id(name)
    if held.shape != () or held.dtype.itemsize > TEXT_LIMIT:
        raise StoreError(f"{_file(file)} is not a whole fpnx file: attribute {name} is no single value")
    return file.attrs[name]


def _one_by_one(dataset: h5py.Dataset) -> list[bytes]:
    """Names that were packed by another tool, so that only reading them tells how long they are."""
    found = []
    for index in range(dataset.shape[0]):
        found.append(bytes(dataset[index]))
        if len(found[-1]) > NAME_LIMIT:
            raise StoreError(f"{_file(dataset)} is not to be trusted: a name in {dataset.name} never ends")
    return found


def check_bytes(dataset: h5py.Dataset, count: int) -> None:
    """Refuse what would take more than 16 times the file and 16 MiB; repacked by another tool it may be compressed.

    Raises:
        StoreError: naming the dataset.
    """
    size = dataset.file.id.get_filesize() if _is_remote(dataset) else os.path.getsize(_path(dataset))
    if count > 16 * size + (1 << 24):
        raise StoreError(f"{_file(dataset)} is not to be trusted: {dataset.name} claims to be larger than the file")


def _is_remote(held: h5py.Group | h5py.Dataset) -> bool:
    return bool(held.file.driver == "fileobj")


def _path(held: h5py.Group | h5py.Dataset) -> str:
    return str(os.fsdecode(held.file.filename))


def _file(held: h5py.Group | h5py.Dataset) -> str:
    return escape(_path(held))
