"""The bytes of one image: a local file, a member of a tar archive, or an object at a URL."""

from __future__ import annotations

import codecs
import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.image_list import DIGEST_BYTES, ImageRecord
from fpnx.core.names import same_name
from fpnx.core.text import escape
from fpnx.images.local_files import NOT_REGULAR, existing_path, open_regular
from fpnx.images.tar_index import Member
from fpnx.images.tar_members import (
    ArchiveMember,
    archive_index,
    check_complete,
    find_member,
    open_member,
    range_reader,
    split_member_path,
)
from fpnx.remote import client as remote
from fpnx.remote import urls
from fpnx.remote.backends import ObjectInfo

__all__ = ["ImageSource", "content_digest", "locate", "member_source", "open_source", "open_text"]

MAX_LIST_BYTES = 1 << 30  # of a list at a URL
MAX_BOM_BYTES = 4
HASHED_AT_ONCE = 1 << 18  # bytes
BOMS = (  # byte order marks, which editors and shells of Windows write before a text; the longer ones first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One image file, as it was when it was listed.

    Attributes:
        name: as stored, relative to the root of the list.
        path: the file, the URL, or the path of a tar archive followed by the name of a member (`a.tar/b.jpg`).
        bytes: size of the image file; -1 where a web server does not tell it.
        mtime_ns: modification time, of a member that of its archive; for URLs see `fpnx.remote.backends.ObjectInfo`.
        archive_member: where a member is in its archive; None for other images. Found again from `path` if missing.
        blocked: the reason why the image must not be opened; empty for all others.
    """

    name: bytes
    path: bytes
    bytes: int
    mtime_ns: int
    archive_member: ArchiveMember | None = None
    blocked: str = ""

    @property
    def record(self) -> ImageRecord:
        """The record of it that lists and stores keep."""
        return ImageRecord(self.name, self.bytes, self.mtime_ns)


def locate(path: bytes) -> ImageSource:
    """The image at a path or URL, or the archive member at a path such as `a.tar/b.jpg`; its name is its path.

    A file or member whose name differs in Unicode normalisation alone is found, with the name that it has.

    Raises:
        OSError, ValueError: where there is no such file.
        FpnxError: where a URL or a member cannot be read.
    """
    try:
        if urls.is_url(path):
            info = remote.object_info(path)
            return ImageSource(urls.without_query(path), path, info.bytes, info.mtime_ns)
        try:
            file_stat = os.stat(path)
        except FileNotFoundError:
            path = existing_path(path)
            file_stat = os.stat(path)
        if stat.S_ISDIR(file_stat.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder, not an image")
        return ImageSource(path, path, file_stat.st_size, file_stat.st_mtime_ns)
    except (OSError, ValueError, remote.RemoteError) as error:
        missing = not isinstance(error, remote.RemoteError) or error.reason.startswith(remote.NOT_FOUND)
        if not missing or (split := split_member_path(path)) is None:
            raise
        archive, name = split
        info, index = archive_index(archive)
        name = name if name in index.members else same_name(name, index.members) or name
        if (member := index.members.get(name)) is None:
            raise FpnxError(f"{escape(archive)} has no member {escape(name)}: tar -tf shows what it has") from error
        return member_source(archive, info, name, member)


def member_source(archive: bytes, info: ObjectInfo, name: bytes, member: Member) -> ImageSource:
    """The image that is the member `name` of `archive`, whose size and time are `info`."""
    path = urls.without_query(archive) + b"/" + name
    return ImageSource(path, path, member.bytes, info.mtime_ns, ArchiveMember(archive, info.bytes, member))


def open_text(path: bytes) -> BinaryIO:
    """A list file, opened for reading; one at a URL is downloaded. UTF-16 and UTF-32 are read as UTF-8, without BOM.

    Raises:
        OSError: where it cannot be opened.
        RemoteError: where it cannot be downloaded.
        FpnxError: for a text that is not in the encoding that its first bytes name.
    """
    if not urls.is_url(path):
        return _in_utf8(open(existing_path(path), "rb"), path)
    url = urls.checked(path)
    content = io.BytesIO(remote.read(url, remote.object_info(url), most=MAX_LIST_BYTES))
    return _in_utf8(io.BufferedReader(content), path)


def _in_utf8(file: io.BufferedReader, path: bytes) -> BinaryIO:
    """The text in `file` as UTF-8, without its byte order mark; bytes of an unknown encoding stay as they are."""
    start = file.peek(MAX_BOM_BYTES)
    bom, encoding = next(((bom, name) for bom, name in BOMS if start.startswith(bom)), (b"", _utf16_without_bom(start)))
    if encoding is None or encoding == "utf-8":
        file.read(len(bom))
        return file
    with file:
        content = file.read()
    try:
        return io.BytesIO(content.decode(encoding).encode())
    except UnicodeError as error:
        raise FpnxError(
            f"list {escape(path)} begins as a text in {encoding.upper()}, but is none: save it as UTF-8"
        ) from error


def _utf16_without_bom(start: bytes) -> str | None:
    """The encoding of a text in UTF-16 that has no byte order mark: one byte of most characters is zero, and always the
    same one. In a list with NUL after each name that would be names of one character."""
    even, odd = start[::2], start[1::2]
    if odd.count(0) > len(odd) / 2 and 0 not in even:
        return "utf-16-le"
    return "utf-16-be" if even.count(0) > len(even) / 2 and 0 not in odd else None


@contextmanager
def open_source(source: ImageSource, most: int, whole: bool = True) -> Iterator[BinaryIO]:
    """Open the bytes of an image for reading.

    Args:
        source: the image.
        most: the largest number of bytes that it may have.
        whole: whether all of it will be read. If not, only its beginning is downloaded, and more on demand.

    Raises:
        ImageError: with the reason why it cannot be read, such as a change since it was listed.
        OSError: where the file system reports an error.
    """
    if source.bytes > most:
        raise ImageError(f"a file of {source.bytes} bytes, more than the {most} that --max-pixels leaves")
    try:
        member = source.archive_member or find_member(source.path, source.mtime_ns)
        path = source.path if member is None else member.archive
        if urls.is_url(path):
            yield _open_remote(source, member, most, whole)
            return
        with open_regular(path) as file:
            _check_unchanged(file, source, member)
            yield file if member is None else open_member(member.member, range_reader(file))
            _check_unchanged(file, source, member)
    except remote.RemoteError as error:
        raise ImageError(error.reason) from error


def content_digest(file: BinaryIO) -> bytes:
    """The content hash of an open file: the first `DIGEST_BYTES` bytes of the sha256 of all its bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(HASHED_AT_ONCE):
        digest.update(block)
    return digest.digest()[:DIGEST_BYTES]


def _open_remote(source: ImageSource, archived: ArchiveMember | None, most: int, whole: bool) -> BinaryIO:
    """An object, or a member of an archive that is an object."""
    if archived is not None:
        info, member = ObjectInfo(archived.archive_bytes, source.mtime_ns), archived.member
        check_complete(member, archived.archive_bytes)
        if not whole:
            return open_member(member, remote.ReadAhead(archived.archive, info))
        data = remote.read(archived.archive, info, member.offset, member.offset + member.stored, most)
        return open_member(member, lambda start, count: data[start - member.offset :][:count])
    info = ObjectInfo(source.bytes, source.mtime_ns)
    if not whole and not urls.is_web(source.path):
        return open_member(Member(0, source.bytes), remote.ReadAhead(source.path, info))
    return io.BytesIO(remote.read(source.path, info, most=most))


def _check_unchanged(file: BinaryIO, source: ImageSource, archived: ArchiveMember | None) -> None:
    file_stat = os.fstat(file.fileno())
    if not stat.S_ISREG(file_stat.st_mode):
        raise ImageError(NOT_REGULAR)
    size = source.bytes if archived is None else archived.archive_bytes
    if (file_stat.st_size, file_stat.st_mtime_ns) != (size, source.mtime_ns):
        raise ImageError(remote.CHANGED)
    if archived is not None:
        check_complete(archived.member, archived.archive_bytes)
        if archived.member.bytes != source.bytes:
            raise ImageError(remote.CHANGED)
