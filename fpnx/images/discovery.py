"""What paths and addresses stand for: files, archives and the images in them, folders and globs of stores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.images.reading import NOT_FOUND, ImageSource, archive_members, locate, member_source
from fpnx.images.tar_index import is_archive, is_compressed
from fpnx.remote import client as remote
from fpnx.remote import urls
from fpnx.remote.backends import NO_FOLDERS, ObjectInfo
from fpnx.remote.glob import match_objects

__all__ = ["EXTENSIONS", "Found", "find_file", "find_in_archive", "find_listed", "find_remote", "is_image"]

EXTENSIONS = frozenset(
    b".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
UNKNOWN = ObjectInfo(-1, 0)
ARCHIVES_AT_ONCE = 8  # archives of a store whose headers are read side by side


@dataclass
class Found:
    """What was found of images that were named.

    Attributes:
        roots: folders, archives and addresses that they are in.
        sources: the images, their names still their paths.
        skipped: how many other files were passed over.
        remarks: what the user should know, a line each.
        truncated: archives that may have had more, a line each.
    """

    roots: list[bytes] = field(default_factory=list)
    sources: list[ImageSource] = field(default_factory=list)
    skipped: int = 0
    remarks: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)

    def add(self, more: Found) -> None:
        """Put further ones behind these."""
        self.roots += more.roots
        self.sources += more.sources
        self.skipped += more.skipped
        self.remarks += more.remarks
        self.truncated += more.truncated


def find_file(path: bytes, where: str = "") -> Found:
    """A file that was named, whatever its extension; the images in it, if it is a plain tar archive.

    Raises:
        FpnxError: where it is not there, or is an archive that cannot be read; `where` says who names it.
    """
    _refuse_compressed(path)
    try:
        source = locate(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise FpnxError(f"{where}{escape(path)}: {why}; name files, folders or @list.txt") from error
    if is_archive(path):
        return find_in_archive(path)
    return Found([os.path.dirname(source.path)], [source])


def find_listed(paths: Sequence[bytes], where: str = "") -> Found:
    """What a list names, in its order. An address that cannot be had is no error yet: its size is unknown.

    Raises:
        FpnxError: for a missing file, or where not one address can be had.
    """
    paths = [urls.checked(path) if urls.is_url(path) else path for path in paths]
    for path in filter(urls.is_url, paths):
        if urls.names_folder(path):
            raise FpnxError(f"{where}{escape(path)} names a folder: a list names images")
    simple = [path for path in paths if urls.is_url(path) and not _may_be_packed(path)]
    answers = dict(zip(simple, remote.about_all(simple), strict=True))
    failures = [answer for answer in answers.values() if isinstance(answer, remote.RemoteError)]
    if failures and len(failures) == len(set(paths)):
        raise FpnxError(f"{where}none of the images can be had, such as {failures[0]}")
    found = Found()
    for path in paths:
        if (answer := answers.get(path)) is not None:
            facts = answer if isinstance(answer, ObjectInfo) else UNKNOWN
            found.roots.append(urls.folder_of(path))
            found.sources.append(ImageSource(urls.plain(path), path, facts.bytes, facts.mtime_ns))
        else:
            found.add(_find_object(path) if urls.is_url(path) else find_file(path, where))
    return found


def find_in_archive(path: bytes) -> Found:
    """The images in a plain tar archive, a file or an address, in byte order.

    Raises:
        FpnxError: where it cannot be read, or is no tar archive.
    """
    facts, held = archive_members(path)
    found = Found([urls.plain(path)], skipped=held.others, remarks=list(held.remarks))
    for name in sorted(held.members):
        if not _is_hidden(name) and is_image(name):
            found.sources.append(member_source(path, facts, name, held.members[name]))
        elif not _is_hidden(name):
            found.skipped += 1
    if held.truncated:
        found.truncated.append(f"{escape(path)}: {held.truncated}")
    return found


def find_remote(url: bytes) -> Found:
    """What an address stands for: an object, a plain tar archive, a folder of a store, or a glob in one.

    Raises:
        FpnxError: where there is nothing, or it cannot be had.
    """
    url = urls.checked(url)
    if urls.is_web(url):
        if urls.names_folder(url):
            raise FpnxError(f"{escape(url)}: {NO_FOLDERS}")
        return _find_object(url)
    missing: remote.RemoteError | None = None
    if not urls.names_folder(url):
        try:
            return _find_object(url)
        except remote.RemoteError as error:
            if error.reason != NOT_FOUND:
                raise
            missing = error
    root = urls.glob_root(url)
    found = _find_below(url.rstrip(b"/")) if root == url else _find_globbed(url, root)
    if missing is not None and root == url and not found.sources and not found.skipped:
        raise missing
    return found


def is_image(name: bytes) -> bool:
    """Whether a name has an extension of images that fpnx reads."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _may_be_packed(url: bytes) -> bool:
    return is_archive(urls.plain(url)) or b".tar/" in url.lower()


def _find_object(url: bytes) -> Found:
    """One object, the images in one that is an archive, or a member of one."""
    _refuse_compressed(urls.plain(url))
    if is_archive(urls.plain(url)):
        return find_in_archive(url)
    source = locate(url)
    return Found([urls.folder_of(source.path)], [source])


def _find_below(root: bytes) -> Found:
    """The images in a folder of a store; archives there are other files, as they are on a disk."""
    return _gathered(root, remote.below(root), archives=False)


def _find_globbed(pattern: bytes, root: bytes) -> Found:
    """The images that a glob matches, and those in archives that it matches."""
    return _gathered(root, match_objects(pattern), archives=True)


def _gathered(root: bytes, below: Sequence[tuple[bytes, ObjectInfo]], archives: bool) -> Found:
    found, packed, outside = Found([root]), list[bytes](), 0
    for url, facts in below:
        name = urls.inside(url, root)
        if _is_hidden(name) or name.endswith(b"/"):  # stores mark folders by objects of nothing
            continue
        if name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
            outside += 1
        elif is_image(name):
            found.sources.append(ImageSource(url, url, facts.bytes, facts.mtime_ns))
        elif archives and is_archive(name):
            packed.append(url)
        else:
            found.skipped += 1
    readers = ThreadPoolExecutor(ARCHIVES_AT_ONCE)
    try:
        for inside in readers.map(find_in_archive, packed):
            inside.roots = []
            found.add(inside)
    finally:
        readers.shutdown(cancel_futures=True)
    if outside:
        found.skipped += outside
        found.remarks.append(f"{escape(root)}: {outside} objects are left out, since their names lead out of it")
    return found


def _is_hidden(name: bytes) -> bool:
    return any(part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


def _refuse_compressed(path: bytes) -> None:
    if is_compressed(path) and not os.path.isdir(path):
        raise FpnxError(f"{escape(path)} is compressed, or no tar: only plain .tar archives can be read at any place")
