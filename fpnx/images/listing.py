"""The list of images of a run: from paths, folders, archives, URLs and list files, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.image_list import ImageList, list_fingerprint
from fpnx.core.sharding import Shard, ShardSlice
from fpnx.core.text import escape, other_files
from fpnx.images.discovery import (
    EXTENSIONS,
    OTHER_EXTENSIONS,
    FoundImages,
    find_file,
    find_in_folder,
    find_listed,
    find_remote,
)
from fpnx.images.local_files import existing_path
from fpnx.images.manifest import image_path, is_manifest, manifest_lines, read_manifest
from fpnx.images.reading import ImageSource, open_text
from fpnx.remote.urls import common_root, is_url, relative_to, resolve_line

__all__ = ["Listing", "as_paths", "find_images", "list_lines", "refuse_missing"]

# Magic bytes of images and archives that may be given as a list by mistake.
NOT_A_LIST = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"PK\x03\x04", b"\x89HDF", b"\x1f\x8b")
MAX_KINDS = 20  # of other files, that are counted each


@dataclass(frozen=True)
class Listing:
    """The images of a run, in their order.

    Attributes:
        root: the folder, archive or URL that names are relative to.
        sources: the images.
        skipped: number of other files, by kind: extensions such as `.txt`, and kinds in words.
        shard_slice: for a shard, which slice of which list this is; else None.
        remarks: notes for the user, a line each.
        truncated: archives that end early and may have had more images, a line each.
    """

    root: bytes
    sources: tuple[ImageSource, ...]
    skipped: Mapping[str, int]
    shard_slice: ShardSlice | None = None
    remarks: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()

    @property
    def records(self) -> ImageList:
        """The records of these images that stores keep."""
        return ImageList(self.root, tuple(source.record for source in self.sources), self.shard_slice)


def find_images(
    images: Sequence[str | os.PathLike[str]], limit: int | None = None, shard: Shard | None = None
) -> Listing:
    """List the images in files, folders (recursive; known extensions; no hidden files), archives, URLs and `@lists`.

    Names are relative to the folder, if only one is given, else to the common parent of all inputs. They are in byte
    order; a list file keeps its own order. It has one path per line (or NUL-separated), relative to the current
    directory, or to the list's URL. A named file is always listed, whatever its extension. A named plain tar archive
    stands for the images in it, as a folder does. For URLs see `fpnx.images.discovery`. A list from `fpnx list` must be
    the only input; its names, sizes and times are used without opening the images. An image that has changed since
    fails when it is opened.

    Args:
        images: paths, URLs and `@lists`.
        limit: keep only the first `limit` images.
        shard: of these, keep the slice of this shard.

    Raises:
        FpnxError: for a missing input, a path given twice, no image at all, or a list none of whose images exists.
    """
    images = as_paths(images)
    arguments = [os.fsencode(image) for image in images]
    lists = [argument for argument in arguments if _is_list(argument)]
    for argument in lists:
        if is_manifest(argument[1:]):
            if len(arguments) > 1:
                raise FpnxError(
                    f"{escape(argument)} is from fpnx list and stands alone: name no other images beside it"
                )
            return _from_manifest(argument[1:], limit, shard)
    found = FoundImages()
    for argument in arguments:
        found.add(_find(argument))
    if not found.sources:
        raise _no_images(images, found)
    root, names = _root_and_names(found)
    sources = [replace(source, name=name) for source, name in zip(found.sources, names, strict=True)]
    if not lists:
        sources.sort(key=lambda source: source.name)
    _refuse_duplicates(sources)
    del sources[limit if limit is not None else len(sources) :]
    skipped, remarks, truncated = _by_kind(found.skipped), tuple(found.remarks), tuple(found.truncated)
    if shard is None:
        return Listing(root, tuple(sources), skipped, None, remarks, truncated)
    records = [source.record for source in sources]
    part = ShardSlice.of(shard, len(sources), list_fingerprint(records), list_fingerprint(records, times=False))
    return Listing(root, tuple(sources[part.first : part.slice.stop]), skipped, part, remarks, truncated)


def as_paths(images: Any) -> list[str | os.PathLike[str]]:
    """One path or several, as a list.

    Raises:
        FpnxError: for other types, no path, or an empty path.
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
    """Check quickly that the local inputs exist, without opening folders, archives or URLs.

    Raises:
        FpnxError: for a missing input, as from `find_images`.
    """
    for argument in map(os.fsencode, images):
        name = argument.removeprefix(b"@")
        if is_url(name) or os.path.lexists(argument) or os.path.lexists(existing_path(name)):
            continue
        if argument.startswith(b"@"):
            _read_list(name)
        find_file(os.path.abspath(argument))


def list_lines(listing: Listing) -> Iterator[bytes]:
    """The lines of a list file, which `find_images(["@list.txt"])` reads; see `fpnx.images.manifest`.

    Raises:
        FpnxError: for an image whose path is not its root and name.
    """
    for source in listing.sources:
        if source.path != image_path(listing.root, source.name):
            raise FpnxError(f"{escape(source.path)} cannot be listed: its name is {escape(source.name)}")
    return manifest_lines(listing.root, listing.records.records, listing.skipped)


def _find(argument: bytes) -> FoundImages:
    """The images that one argument stands for."""
    if _is_list(argument):
        return find_listed(_read_list(argument[1:]), f"in {escape(argument[1:])}: ")
    if is_url(argument):
        return find_remote(argument)
    path = existing_path(os.path.abspath(argument))
    return find_in_folder(path) if os.path.isdir(path) else find_file(path)


def _is_list(argument: bytes) -> bool:
    return argument.startswith(b"@") and not os.path.lexists(argument)


def _root_and_names(found: FoundImages) -> tuple[bytes, list[bytes]]:
    """The common root, and each source's name relative to it.

    Raises:
        FpnxError: for files and URLs together, which have no common root.
    """
    paths = [source.name for source in found.sources]
    if not any(map(is_url, found.roots)):
        root = os.path.commonpath(found.roots)
        return root, [os.path.relpath(path, root) for path in paths]
    if not all(map(is_url, found.roots)):
        raise FpnxError("images on a disk and images at addresses (s3://, https://, …) are two runs: name the one kind")
    root = common_root(found.roots)
    return root, [relative_to(path, root) for path in paths]


def _by_kind(skipped: Mapping[str, int]) -> dict[str, int]:
    """Counts of the most frequent kinds, and of all others together."""
    kinds = sorted(skipped, key=lambda kind: (-skipped[kind], kind))
    counts = {kind: skipped[kind] for kind in kinds[:MAX_KINDS]}
    if rest := sum(skipped[kind] for kind in kinds[MAX_KINDS:]):
        counts[OTHER_EXTENSIONS] = counts.get(OTHER_EXTENSIONS, 0) + rest
    return counts


def _no_images(images: Sequence[str | os.PathLike[str]], found: FoundImages) -> FpnxError:
    skipped = f" ({other_files(found.skipped)})" if found.skipped else ""
    where = ", ".join(map(escape, images))
    truncated = f"; {found.truncated[0]}" if found.truncated else ""
    return FpnxError(f"no images in {where}{skipped}: known extensions are {_extensions()}{truncated}")


def _from_manifest(path: bytes, limit: int | None, shard: Shard | None) -> Listing:
    manifest = read_manifest(path, limit, shard)
    root = manifest.root
    sources = tuple(ImageSource(name, image_path(root, name), size, mtime) for name, size, mtime in manifest.records)
    _refuse_duplicates(sources)
    # Where every image is missing, such as on a disk that is not mounted, fail now instead of image by image.
    reasons = map(_difference, sources)
    if (reason := next(reasons, "")) and all(reasons):
        raise FpnxError(
            f"none of the {len(sources)} images is as it was listed in {escape(path)}, such as "
            f"{escape(sources[0].path)} ({reason}): bring them back, or list them again"
        )
    return Listing(root, sources, manifest.skipped, manifest.shard_slice)


def _difference(source: ImageSource) -> str:
    """How a local file differs from its list: missing or changed; empty for the same, and for URLs and members."""
    if is_url(source.path):
        return ""
    try:
        info = os.stat(source.path)
    except NotADirectoryError:  # a member of an archive: it is compared when it is opened
        return ""
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "" if (info.st_size, info.st_mtime_ns) == (source.bytes, source.mtime_ns) else "changed"


def _read_list(path: bytes) -> list[bytes]:
    if not path:
        raise FpnxError("@ without a name: name the list, such as @list.txt")
    try:
        with open_text(path) as file:
            content = file.read()
    except IsADirectoryError as error:
        raise FpnxError(f"list {escape(path)} is a folder: name it without @ for the images in it") from error
    except OSError as error:
        raise FpnxError(f"list {escape(path)}: {error.strerror}") from error
    if content.startswith(NOT_A_LIST):
        raise FpnxError(f"list {escape(path)} is an image or an archive, not a text with a path on each line")
    lines = content.split(b"\0") if b"\0" in content else [line.rstrip(b"\r") for line in content.split(b"\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise FpnxError(f"list {escape(path)} names no image: put a path on each line")
    if is_url(path):
        return [resolve_line(path, line) for line in lines]
    return [line if is_url(line) else os.path.abspath(line) for line in lines]


def _refuse_duplicates(sources: Iterable[ImageSource]) -> None:
    names: set[bytes] = set()
    for source in sources:
        if source.name in names:
            raise FpnxError(f"{escape(source.name)} is given twice: name each image once")
        names.add(source.name)


def _extensions() -> str:
    return " ".join(sorted(extension.decode() for extension in EXTENSIONS))
