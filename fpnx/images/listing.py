"""Find image files, and turn one into upright 8-bit RGB, or say why not."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.image_list import ImageList, list_fingerprint
from fpnx.core.sharding import Shard, ShardSlice
from fpnx.core.text import escape
from fpnx.images.discovery import EXTENSIONS, Found, find_file, find_listed, find_remote, is_image
from fpnx.images.manifest import image_path, is_manifest, manifest_lines, read_manifest
from fpnx.images.reading import ImageSource, open_text
from fpnx.remote.urls import common_root, inside, is_url, joined

__all__ = ["Listing", "as_paths", "find_images", "list_lines", "refuse_missing"]

# How files begin that somebody may name as a list, and that are none.
NO_TEXT = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"PK\x03\x04", b"\x89HDF", b"\x1f\x8b")


@dataclass(frozen=True)
class Listing:
    """The images of a run in their order, the folder that names are relative to, and what was passed over.

    `cut` tells of which list they are a slice, where they are a shard's; `remarks` what the user should know of it,
    and `truncated` which archives may have had more images, a line each.
    """

    root: bytes
    sources: tuple[ImageSource, ...]
    skipped: int
    shard_slice: ShardSlice | None = None
    remarks: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()

    @property
    def records(self) -> ImageList:
        """What a store keeps of these images."""
        return ImageList(self.root, tuple(source.record for source in self.sources), self.shard_slice)


def find_images(
    images: Sequence[str | os.PathLike[str]], limit: int | None = None, shard: Shard | None = None
) -> Listing:
    """Files, folders (recursive; known extensions; hidden files left out), addresses and `@lists` → a listing.

    Names are relative to the one folder given, else to the common parent of all. They are in byte order; a list
    keeps its own. A list has a path a line (or NUL-separated), relative to the current directory, or to the list where
    that is an address. A named file is always listed, whatever its extension. A plain tar archive that is named stands
    for the images in it, as a folder does. For `s3://` and the like see `fpnx.images.discovery`. A list that
    `fpnx list` wrote stands alone; names, sizes and times are its own, and no image is looked at: one that has
    changed since is found out when it is opened.

    Args:
        images: what to look for.
        limit: take the first so many images only.
        shard: of these, take the slice that is this shard's.

    Raises:
        FpnxError: a missing input, the same path twice, no image at all, or a list none of whose images is there.
    """
    images = as_paths(images)
    for argument in map(os.fsencode, images):
        if argument.startswith(b"@") and not os.path.lexists(argument) and is_manifest(argument[1:]):
            if len(images) > 1:
                raise FpnxError(
                    f"{escape(argument)} is from fpnx list and stands alone: name no other images beside it"
                )
            return _from_list(argument[1:], limit, shard)
    found, listed = Found(), False
    for argument in map(os.fsencode, images):
        if argument.startswith(b"@") and not os.path.lexists(argument):
            listed = True
            found.add(find_listed(_read_list(argument[1:]), f"in {escape(argument[1:])}: "))
        elif is_url(argument):
            found.add(find_remote(argument))
        elif os.path.isdir(argument):
            found.add(_walk(os.path.abspath(argument)))
        else:
            found.add(find_file(os.path.abspath(argument)))
    if not found.sources:
        raise _nothing(images, found)
    root, names = _named(found)
    sources = [replace(source, name=name) for source, name in zip(found.sources, names, strict=True)]
    if not listed:
        sources.sort(key=lambda source: source.name)
    _refuse_twice(sources)
    del sources[limit if limit is not None else len(sources) :]
    remarks, truncated = tuple(found.remarks), tuple(found.truncated)
    if shard is None:
        return Listing(root, tuple(sources), found.skipped, None, remarks, truncated)
    cut = ShardSlice.of(shard, len(sources), list_fingerprint(source.record for source in sources))
    return Listing(root, tuple(sources[cut.first : cut.slice.stop]), found.skipped, cut, remarks, truncated)


def as_paths(images: Any) -> list[str | os.PathLike[str]]:
    """One path, or several, as a list.

    Raises:
        FpnxError: for anything else, none, or an empty name.
    """
    several = isinstance(images, Iterable) and not isinstance(images, (str, bytes, os.PathLike))
    paths: list[Any] = [*images] if several else [images]
    if not paths or images is None:
        raise FpnxError("no images given: name files, folders or @list.txt")
    for path in paths:
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fspath(path):
            raise FpnxError(f"images {path!r}: take names of files and folders, or @list.txt")
    return paths


def refuse_missing(images: Sequence[str | os.PathLike[str]]) -> None:
    """Tell at once, without a look into folders, archives and stores, of names that `find_images` would not find.

    Raises:
        FpnxError: as `find_images` would.
    """
    for argument in map(os.fsencode, images):
        name = argument.removeprefix(b"@")
        if is_url(name) or os.path.lexists(argument) or os.path.lexists(name):
            continue
        if argument.startswith(b"@"):
            _read_list(name)
        find_file(os.path.abspath(argument))


def list_lines(listing: Listing) -> Iterator[bytes]:
    """A listing as a file, which `find_images(["@list.txt"])` reads; see `fpnx.images.manifest`.

    Raises:
        FpnxError: for an image that is not where its name says.
    """
    for source in listing.sources:
        if source.path != image_path(listing.root, source.name):
            raise FpnxError(f"{escape(source.path)} cannot be listed: its name is {escape(source.name)}")
    return manifest_lines(listing.root, listing.records.records, listing.skipped)


def _named(found: Found) -> tuple[bytes, list[bytes]]:
    """The root, and each source's name relative to it.

    Raises:
        FpnxError: for files and addresses together, which have no common parent.
    """
    paths = [source.name for source in found.sources]
    if not any(map(is_url, found.roots)):
        root = os.path.commonpath(found.roots)
        return root, [os.path.relpath(path, root) for path in paths]
    if not all(map(is_url, found.roots)):
        raise FpnxError("images on a disk and images at addresses (s3://, https://, …) are two runs: name the one kind")
    root = common_root(found.roots)
    return root, [inside(path, root) for path in paths]


def _nothing(images: Sequence[str | os.PathLike[str]], found: Found) -> FpnxError:
    more = f" ({found.skipped} other files)" if found.skipped else ""
    where = ", ".join(map(escape, images))
    truncated = f"; {found.truncated[0]}" if found.truncated else ""
    return FpnxError(f"no images in {where}{more}: known extensions are {_extensions()}{truncated}")


def _walk(folder: bytes) -> Found:
    """Image files below `folder`, and how many other files. Real folders go before links, so that a folder
    reached both ways keeps its own name, and each is visited once, so that loops end."""
    found = Found([folder])
    visited: set[tuple[int, int]] = set()
    folders: list[bytes] = [folder]
    links: list[bytes] = []
    while folders or links:
        here = folders.pop() if folders else links.pop()
        try:
            about = os.stat(here)
            if (about.st_dev, about.st_ino) in visited:
                continue
            visited.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(here), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise FpnxError(
                f"folder {escape(here)}: {error.strerror}: make it readable, or name the images themselves"
            ) from error
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            seen = _about(entry)
            if entry.is_dir(follow_symlinks=False) or (seen is not None and stat.S_ISDIR(seen.st_mode)):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif is_image(entry.name) and (seen is None or stat.S_ISREG(seen.st_mode)):
                size, mtime = (seen.st_size, seen.st_mtime_ns) if seen is not None else (-1, 0)
                found.sources.append(ImageSource(entry.path, entry.path, size, mtime))
            else:
                found.skipped += 1
    return found


def _about(entry: os.DirEntry[bytes]) -> os.stat_result | None:
    """What an entry is, or leads to; None where that cannot be told, as of a broken link: opening it tells why."""
    try:
        return entry.stat()
    except OSError:
        return None


def _from_list(path: bytes, limit: int | None, shard: Shard | None) -> Listing:
    told = read_manifest(path, limit, shard)
    sources = tuple(ImageSource(name, image_path(told.root, name), size, mtime) for name, size, mtime in told.records)
    _refuse_twice(sources)
    # A disk that is not mounted is no reason to fail image by image; a single changed one is.
    reasons = map(_not_as_listed, sources)
    if (why := next(reasons, "")) and all(reasons):
        raise FpnxError(
            f"none of the {len(sources)} images is as it was listed in {escape(path)}, such as "
            f"{escape(sources[0].path)} ({why}): bring them back, or list them again"
        )
    return Listing(told.root, sources, told.skipped, told.shard_slice)


def _not_as_listed(source: ImageSource) -> str:
    """Why a file is not what its list says; empty where it is, or is no file on a disk."""
    if is_url(source.path):
        return ""
    try:
        about = os.stat(source.path)
    except NotADirectoryError:  # a member of an archive: whether it is the same is seen when it is opened
        return ""
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "" if (about.st_size, about.st_mtime_ns) == (source.bytes, source.mtime_ns) else "changed"


def _read_list(path: bytes) -> list[bytes]:
    try:
        with open_text(path) as file:
            content = file.read()
    except OSError as error:
        raise FpnxError(f"list {escape(path)}: {error.strerror}") from error
    if content.startswith(NO_TEXT):
        raise FpnxError(f"list {escape(path)} is an image or an archive, not a text with a path on each line")
    lines = content.split(b"\0") if b"\0" in content else [line.rstrip(b"\r") for line in content.split(b"\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise FpnxError(f"list {escape(path)} names no image: put a path on each line")
    if is_url(path):
        return [joined(path, line) for line in lines]
    return [line if is_url(line) else os.path.abspath(line) for line in lines]


def _refuse_twice(sources: Iterable[ImageSource]) -> None:
    names: set[bytes] = set()
    for source in sources:
        if source.name in names:
            raise FpnxError(f"{escape(source.name)} is given twice: name each image once")
        names.add(source.name)


def _extensions() -> str:
    return " ".join(sorted(extension.decode() for extension in EXTENSIONS))
