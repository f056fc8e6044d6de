"""The bytes of an image, wherever they are: a file, a stretch of an archive, an object in a store."""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.image_list import ImageRecord
from fpnx.core.text import escape
from fpnx.images.tar_index import Member, TarIndex, read_tar_index
from fpnx.remote import client as remote
from fpnx.remote import urls
from fpnx.remote.backends import ObjectInfo
from fpnx.remote.file import RangeReader

__all__ = [
    "NOT_FOUND",
    "ArchivePart",
    "ImageSource",
    "locate",
    "archive_members",
    "open_source",
    "member_source",
    "open_text",
]

CATALOGUES = 4  # archives whose headers are kept, for members that are asked for by name
LARGEST_LIST = 1 << 30  # bytes of a list that is fetched
CHANGED, NOT_FOUND = "changed after it was listed", "not found"


@dataclass(frozen=True, slots=True)
class ArchivePart:
    """A member of an archive; `size` of the whole archive."""

    archive: bytes
    size: int
    member: Member


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One image file: `name` as stored, `path` to open, size in bytes and mtime (ns) when it was listed.

    A `path` is that of a file, an address, or either of a plain tar archive with the name of a member behind it; what
    the `piece` knows of that is found again where it is not given. A member's time is that of its archive. For what an
    address gives instead of a time, or of a size, see `fpnx.remote.backends.ObjectInfo`. `blocked` is why it must not be
    opened at all, where it must not.
    """

    name: bytes
    path: bytes
    bytes: int
    mtime_ns: int
    piece: ArchivePart | None = None
    blocked: str = ""

    @property
    def record(self) -> ImageRecord:
        """What lists and stores keep of it."""
        return ImageRecord(self.name, self.bytes, self.mtime_ns)


def locate(path: bytes) -> ImageSource:
    """The image at a path or an address, or that member of an archive; its name is its path.

    Raises:
        OSError, ValueError: where there is no such file.
        FpnxError: where an address, or a member, cannot be had.
    """
    try:
        if urls.is_url(path):
            facts = remote.about(path)
            return ImageSource(urls.plain(path), path, facts.bytes, facts.mtime_ns)
        about = os.stat(path)
        return ImageSource(path, path, about.st_size, about.st_mtime_ns)
    except (OSError, ValueError, remote.RemoteError) as error:
        gone = not isinstance(error, remote.RemoteError) or error.reason.startswith(NOT_FOUND)
        if not gone or (split := _archive_and_member(path)) is None:
            raise
        archive, name = split
        facts, held = archive_members(archive)
        if (member := held.members.get(name)) is None:
            raise FpnxError(f"{escape(archive)} has no member {escape(name)}: tar -tf shows what it has") from error
        return member_source(archive, facts, name, member)


def open_text(path: bytes) -> BinaryIO:
    """A list, opened for reading; one at an address is fetched.

    Raises:
        OSError: where it cannot be opened.
        RemoteError: where it cannot be had.
    """
    if not urls.is_url(path):
        return open(path, "rb")
    address = urls.checked(path)
    return io.BytesIO(remote.read(address, remote.about(address), most=LARGEST_LIST))


@contextmanager
def open_source(source: ImageSource, most: int, whole: bool = True) -> Iterator[BinaryIO]:
    """The bytes of an image, to read.

    Args:
        source: the image.
        most: how many bytes are too many.
        whole: whether all of it will be read; else only its head is fetched, and more when it is asked for.

    Raises:
        ImageError: with the reason why it cannot be had, also where it is not what was listed.
        OSError: where the file system refuses.
    """
    if source.bytes > most:  # texts and profiles are read whole
        raise ImageError(f"a file of {source.bytes} bytes, more than the {most} that --max-pixels leaves")
    try:
        piece = source.piece or _piece(source)
        path = source.path if piece is None else piece.archive
        if urls.is_url(path):
            yield _fetched(source, piece, most, whole)
            return
        with _regular(path) as file:
            _check_unchanged(file, source, piece)
            yield file if piece is None else _member_file(piece.member, lambda start, count: _at(file, start, count))
            _check_unchanged(file, source, piece)
    except remote.RemoteError as error:
        raise ImageError(error.reason) from error


def _fetched(source: ImageSource, piece: ArchivePart | None, most: int, whole: bool) -> BinaryIO:
    """An object, or a member of an archive that is one."""
    if piece is not None:
        facts, member = ObjectInfo(piece.size, source.mtime_ns), piece.member
        _check_whole(member, piece.size)
        if not whole:
            return _member_file(member, remote.Ranges(piece.archive, facts))
        data = remote.read(piece.archive, facts, member.offset, member.offset + member.stored, most)
        return _member_file(member, lambda start, count: data[start - member.offset :][:count])
    facts = ObjectInfo(source.bytes, source.mtime_ns)
    if not whole and not urls.is_web(source.path):
        return _member_file(Member(0, source.bytes), remote.Ranges(source.path, facts))
    return io.BytesIO(remote.read(source.path, facts, most=most))


@contextmanager
def _regular(path: bytes) -> Iterator[BinaryIO]:
    """A regular file, opened."""
    if os.path.islink(path) and not os.path.exists(path):
        raise ImageError("broken link")
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device may already do something
        raise ImageError("not a regular file")
    # Without O_NONBLOCK a FIFO that was put in the file's place would block for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _check_unchanged(file: BinaryIO, source: ImageSource, piece: ArchivePart | None) -> None:
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode):
        raise ImageError("not a regular file")
    size = source.bytes if piece is None else piece.size
    if (about.st_size, about.st_mtime_ns) != (size, source.mtime_ns):
        raise ImageError(CHANGED)
    if piece is not None:
        _check_whole(piece.member, piece.size)
        if piece.member.bytes != source.bytes:
            raise ImageError(CHANGED)


def _check_whole(member: Member, size: int) -> None:
    if member.offset + member.stored > size:
        raise ImageError(f"cut off: its archive ends {member.offset + member.stored - size} bytes early")


def _member_file(member: Member, read: Callable[[int, int], bytes]) -> BinaryIO:
    """A member of an archive that `read` gives (first byte, count) of."""

    def plain(start: int, count: int) -> bytes:
        return read(member.offset + start, count)

    def sparse(start: int, count: int) -> bytes:
        data, at = bytearray(count), member.offset
        for place, length in member.stretches or ():
            first, last = max(place, start), min(place + length, start + count)
            if first < last:
                data[first - start : last - start] = read(at + first - place, last - first)
            at += length
        return bytes(data)

    window = RangeReader(plain if member.stretches is None else sparse, member.bytes)
    return cast(BinaryIO, io.BufferedReader(window, 1 << 16))


def _at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def member_source(archive: bytes, facts: ObjectInfo, name: bytes, member: Member) -> ImageSource:
    path = urls.plain(archive) + b"/" + name
    return ImageSource(path, path, member.bytes, facts.mtime_ns, ArchivePart(archive, facts.bytes, member))


def _piece(source: ImageSource) -> ArchivePart | None:
    """The piece of a source that is known by its path only, as from a list; None where it is none."""
    if (split := _archive_and_member(source.path)) is None:
        return None
    archive, name = split
    try:
        facts, held = archive_members(archive, source.mtime_ns)
    except remote.RemoteError as error:
        if error.reason.startswith(NOT_FOUND):  # a folder with such a name
            return None
        raise
    except FpnxError as error:
        raise ImageError(str(error)) from error
    if (member := held.members.get(name)) is None:
        raise ImageError(f"not in its archive any more: {escape(archive)}")
    return ArchivePart(archive, facts.bytes, member)


def _archive_and_member(path: bytes) -> tuple[bytes, bytes] | None:
    """The archive and the member that a path may name: `a.tar/b.jpg`, where `a.tar` is no folder."""
    for match in re.finditer(rb"\.tar/(?=.)", path, re.IGNORECASE | re.DOTALL):
        archive, name = path[: match.end() - 1], path[match.end() :]
        if urls.is_url(path) or os.path.isfile(archive):
            return archive, name
    return None


_catalogues: dict[bytes, tuple[ObjectInfo, TarIndex]] = {}
_turns: defaultdict[bytes, threading.Lock] = defaultdict(threading.Lock)  # each archive is gone through once
_lock = threading.Lock()


def archive_members(path: bytes, mtime_ns: int | None = None) -> tuple[ObjectInfo, TarIndex]:
    """Facts on an archive and what is in it; a catalogue is kept, and holds while the archive has its size and time.

    Where `mtime_ns` is known, an archive in a store is not asked for its time again: reading from it tells.

    Raises:
        FpnxError: where it cannot be read, or is no plain tar archive.
    """
    with _lock:
        turn = _turns[path]
    with turn:
        with _lock:
            kept = _catalogues.get(path)
        if kept is None or not urls.is_url(path) or mtime_ns != kept[0].mtime_ns:
            kept = _remote_catalogue(path, kept) if urls.is_url(path) else _local_catalogue(path, kept)
        with _lock:
            _catalogues.pop(path, None)
            while len(_catalogues) >= CATALOGUES:
                _catalogues.pop(next(iter(_catalogues)))
            _catalogues[path] = kept
        return kept


def _remote_catalogue(path: bytes, kept: tuple[ObjectInfo, TarIndex] | None) -> tuple[ObjectInfo, TarIndex]:
    facts = remote.about(path)
    if facts.bytes < 0:
        raise FpnxError(f"{escape(path)}: this server does not tell its size: download it first")
    if kept is not None and kept[0] == facts and facts.mtime_ns:
        return kept
    return facts, read_tar_index(remote.Ranges(path, facts), facts.bytes, escape(path))


def _local_catalogue(path: bytes, kept: tuple[ObjectInfo, TarIndex] | None) -> tuple[ObjectInfo, TarIndex]:
    try:
        with _regular(path) as file:
            about = os.fstat(file.fileno())
            facts = ObjectInfo(about.st_size, about.st_mtime_ns)
            if kept is not None and kept[0] == facts:
                return kept
            return facts, read_tar_index(lambda start, count: _at(file, start, count), facts.bytes, escape(path))
    except (OSError, ImageError) as error:
        raise FpnxError(f"{escape(path)}: {getattr(error, 'strerror', None) or error}") from error
