"""Reading members of plain tar archives, local or remote, with a cache of the archives' indexes."""

from __future__ import annotations

import io
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.text import escape
from fpnx.images.local_files import open_regular
from fpnx.images.tar_index import Member, TarIndex, read_tar_index
from fpnx.remote import client as remote
from fpnx.remote import urls
from fpnx.remote.backends import ObjectInfo
from fpnx.remote.file import RangeReader

__all__ = [
    "ArchiveMember",
    "archive_index",
    "check_complete",
    "find_member",
    "open_member",
    "range_reader",
    "split_member_path",
]

CACHED_INDEXES = 4
BUFFER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """A member and the archive that it is in.

    Attributes:
        archive: path or URL of the archive.
        archive_bytes: size of the whole archive.
        member: where its content is in the archive.
    """

    archive: bytes
    archive_bytes: int
    member: Member


def split_member_path(path: bytes) -> tuple[bytes, bytes] | None:
    """`a.tar/b.jpg` → (`a.tar`, `b.jpg`), where `a.tar` is a file or a URL; else None."""
    for match in re.finditer(rb"\.tar/(?=.)", path, re.IGNORECASE | re.DOTALL):
        archive, name = path[: match.end() - 1], path[match.end() :]
        if urls.is_url(path) or os.path.isfile(archive):
            return archive, name
    return None


def find_member(path: bytes, mtime_ns: int) -> ArchiveMember | None:
    """The member at a path such as `a.tar/b.jpg`; None where the path does not lead into an archive.

    Raises:
        ImageError: where the archive cannot be read, or does not have the member.
    """
    if (split := split_member_path(path)) is None:
        return None
    archive, name = split
    try:
        info, index = archive_index(archive, mtime_ns)
    except remote.RemoteError as error:
        if error.reason.startswith(remote.NOT_FOUND):  # a folder whose name ends in .tar
            return None
        raise
    except FpnxError as error:
        raise ImageError(str(error)) from error
    if (member := index.members.get(name)) is None:
        raise ImageError(f"not in its archive any more: {escape(archive)}")
    return ArchiveMember(archive, info.bytes, member)


def open_member(member: Member, read: Callable[[int, int], bytes]) -> BinaryIO:
    """A seekable file of a member's content; `read(start, count)` gives bytes of the archive."""

    def read_contiguous(start: int, count: int) -> bytes:
        return read(member.offset + start, count)

    def read_sparse(start: int, count: int) -> bytes:
        data, offset = bytearray(count), member.offset
        for position, length in member.segments or ():
            first, last = max(position, start), min(position + length, start + count)
            if first < last:
                data[first - start : last - start] = read(offset + first - position, last - first)
            offset += length
        return bytes(data)

    reader = RangeReader(read_contiguous if member.segments is None else read_sparse, member.bytes)
    return cast(BinaryIO, io.BufferedReader(reader, BUFFER_BYTES))


def range_reader(file: BinaryIO) -> Callable[[int, int], bytes]:
    """A function that reads `count` bytes from `start` on of an open file."""

    def read(start: int, count: int) -> bytes:
        file.seek(start)
        return file.read(count)

    return read


def check_complete(member: Member, archive_bytes: int) -> None:
    """Raise ImageError where the archive ends within the member."""
    if member.offset + member.stored > archive_bytes:
        raise ImageError(f"cut off: its archive ends {member.offset + member.stored - archive_bytes} bytes early")


_indexes: dict[bytes, tuple[ObjectInfo, TarIndex]] = {}  # by archive, least recently used first
_index_locks: defaultdict[bytes, threading.Lock] = defaultdict(threading.Lock)  # one thread indexes each archive
_lock = threading.Lock()


def archive_index(path: bytes, mtime_ns: int | None = None) -> tuple[ObjectInfo, TarIndex]:
    """Size, time and index of an archive. The index is cached, and is valid while the size and time are the same.

    Args:
        path: the archive, a file or a URL.
        mtime_ns: its time where that is known. A cached index of a remote archive with this time is used without a
            request; reading a member detects a change.

    Raises:
        FpnxError: where it cannot be read, or is no plain tar archive.
    """
    with _lock:
        index_lock = _index_locks[path]
    with index_lock:
        with _lock:
            cached = _indexes.get(path)
        if cached is None or not urls.is_url(path) or mtime_ns != cached[0].mtime_ns:
            cached = _remote_index(path, cached) if urls.is_url(path) else _local_index(path, cached)
        with _lock:
            _indexes.pop(path, None)
            while len(_indexes) >= CACHED_INDEXES:
                _indexes.pop(next(iter(_indexes)))
            _indexes[path] = cached
        return cached


def _remote_index(path: bytes, cached: tuple[ObjectInfo, TarIndex] | None) -> tuple[ObjectInfo, TarIndex]:
    info = remote.object_info(path)
    if info.bytes < 0:
        raise FpnxError(f"{escape(path)}: this server does not tell its size: download it first")
    if cached is not None and cached[0] == info and info.mtime_ns:
        return cached
    return info, read_tar_index(remote.ReadAhead(path, info), info.bytes, escape(path))


def _local_index(path: bytes, cached: tuple[ObjectInfo, TarIndex] | None) -> tuple[ObjectInfo, TarIndex]:
    try:
        with open_regular(path) as file:
            stat = os.fstat(file.fileno())
            info = ObjectInfo(stat.st_size, stat.st_mtime_ns)
            if cached is not None and cached[0] == info:
                return cached
            return info, read_tar_index(range_reader(file), info.bytes, escape(path))
    except (OSError, ImageError) as error:
        raise FpnxError(f"{escape(path)}: {getattr(error, 'strerror', None) or error}") from error
