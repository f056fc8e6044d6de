"""The images that one path or URL stands for: a file, a folder, an archive, an object, or a glob of objects."""

from __future__ import annotations

import importlib.util
import os
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape, plural
from fpnx.images.reading import ImageSource, locate, member_source
from fpnx.images.tar_index import NOT_REGULAR_FILES, OUTSIDE, is_archive, is_compressed
from fpnx.images.tar_members import archive_index
from fpnx.remote import client as remote
from fpnx.remote import urls
from fpnx.remote.backends import NO_FOLDERS, ObjectInfo
from fpnx.remote.glob import match_objects

__all__ = [
    "EXTENSIONS",
    "OTHER_EXTENSIONS",
    "FoundImages",
    "find_file",
    "find_in_archive",
    "find_in_folder",
    "find_listed",
    "find_remote",
    "is_image",
]

HEIF = b".heic .heif .hif".split() if importlib.util.find_spec("pillow_heif") else []  # fpnx[heif]
EXTENSIONS = frozenset(
    b".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
    + HEIF
)
OTHER_EXTENSIONS = "with other extensions"  # a kind of files that are no images
UNKNOWN = ObjectInfo(-1, 0)
ARCHIVE_THREADS = 8  # for reading the indexes of remote archives
MAX_WAYS = 10_000  # to one folder: links between folders can give more paths than there is memory
MAX_EXTENSION = 12  # characters; what is longer is rather part of a name


@dataclass
class FoundImages:
    """Images found at one or more paths.

    Attributes:
        roots: the folders, archives and URLs that the images are in.
        sources: the images; their names are still their paths.
        skipped: number of other files of each kind: extensions such as `.txt`, and kinds in words.
        remarks: notes for the user, a line each.
        truncated: archives that end early and may have had more images, a line each.
    """

    roots: list[bytes] = field(default_factory=list)
    sources: list[ImageSource] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)

    def add(self, more: FoundImages) -> None:
        """Append further results."""
        self.roots += more.roots
        self.sources += more.sources
        self.skipped += more.skipped
        self.remarks += more.remarks
        self.truncated += more.truncated


def is_image(name: bytes) -> bool:
    """Whether a name has an extension of images that fpnx reads."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def find_file(path: bytes, where: str = "") -> FoundImages:
    """A file that the user named, whatever its extension; for a plain tar archive, the images in it.

    Raises:
        FpnxError: where it does not exist, or is an archive that cannot be read; `where` starts the message.
    """
    _refuse_compressed(path)
    try:
        source = locate(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if where:
            advice = "" if _is_utf8(path) else ", in UTF-8"
            advice = f"a list has the path of an image on each line, and nothing else{advice}"
            raise FpnxError(f"{where}{escape(path)}: {reason}; {advice}") from error
        raise FpnxError(f"{where}{escape(path)}: {reason}; name files, folders or @list.txt") from error
    if is_archive(path):
        return find_in_archive(path)
    return FoundImages([os.path.dirname(source.path)], [source])


def find_in_folder(folder: bytes) -> FoundImages:
    """The images in a local folder and its subfolders; hidden files are ignored, archives count as other files.

    Links are followed, to the paths that `find -L` lists: a folder with two links to it is listed under both names. A
    link to a folder that it is in is not followed; a remark says so.

    Raises:
        FpnxError: where a folder cannot be read, or links between folders give too many paths.
    """
    result = FoundImages([folder])
    loops: list[bytes] = []
    ways: Counter[tuple[int, int]] = Counter()
    waiting: list[tuple[bytes, tuple[tuple[int, int], ...]]] = [(folder, ())]  # with (device, inode) of what it is in
    while waiting:
        current, ancestors = waiting.pop()
        try:
            folder_stat = os.stat(current)
            identity = (folder_stat.st_dev, folder_stat.st_ino)
            if identity in ancestors:
                loops.append(current)
                continue
            ways[identity] += 1
            if ways[identity] > MAX_WAYS:
                raise FpnxError(
                    f"folder {escape(os.path.realpath(current))} is reached in more than {MAX_WAYS} ways, through "
                    f"links between folders: name folders without such links, or an @list.txt"
                )
            entries = sorted(os.scandir(current), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise FpnxError(
                f"folder {escape(current)}: {error.strerror}: make it readable, or name the images themselves"
            ) from error
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            info = _entry_stat(entry)
            if entry.is_dir(follow_symlinks=False) or (info is not None and stat.S_ISDIR(info.st_mode)):
                waiting.append((entry.path, (*ancestors, identity)))
            elif is_image(entry.name) and (info is None or stat.S_ISREG(info.st_mode)):
                size, mtime = (info.st_size, info.st_mtime_ns) if info is not None else (-1, 0)
                result.sources.append(ImageSource(entry.path, entry.path, size, mtime))
            elif info is None or stat.S_ISREG(info.st_mode):
                result.skipped[_kind(entry.name)] += 1
            else:
                result.skipped[NOT_REGULAR_FILES] += 1
    if loops:
        result.remarks.append(
            f"{escape(folder)}: {plural(len(loops), 'folder')} not entered, since links lead back to a folder that "
            f"they are in: {escape(min(loops))}{' and others' if len(loops) > 1 else ''}"
        )
    return result


def find_listed(paths: Sequence[bytes], where: str = "") -> FoundImages:
    """The images that a list file names, in its order. A URL that cannot be read is no error yet: its size is unknown.

    Raises:
        FpnxError: for a missing file, or where every URL fails; `where` starts the message.
    """
    paths = [urls.checked(path) if urls.is_url(path) else path for path in paths]
    for path in filter(urls.is_url, paths):
        if urls.names_folder(path):
            raise FpnxError(f"{where}{escape(path)} names a folder: a list names images")
    plain_urls = [path for path in paths if urls.is_url(path) and not _may_lead_into_archive(path)]
    infos = dict(zip(plain_urls, remote.object_infos(plain_urls), strict=True))
    errors = [info for info in infos.values() if isinstance(info, remote.RemoteError)]
    if errors and len(errors) == len(set(paths)):
        raise FpnxError(f"{where}none of the images can be read, such as {errors[0]}")
    result = FoundImages()
    for path in paths:
        if (answer := infos.get(path)) is not None:
            info = answer if isinstance(answer, ObjectInfo) else UNKNOWN
            result.roots.append(urls.folder_of(path))
            result.sources.append(ImageSource(urls.without_query(path), path, info.bytes, info.mtime_ns))
        else:
            result.add(_find_object(path) if urls.is_url(path) else find_file(path, where))
    return result


def find_in_archive(path: bytes) -> FoundImages:
    """The images in a plain tar archive, a file or a URL, in byte order.

    Raises:
        FpnxError: where it cannot be read, or is no tar archive.
    """
    info, index = archive_index(path)
    result = FoundImages([urls.without_query(path)], skipped=Counter(index.others), remarks=list(index.remarks))
    for name in sorted(index.members):
        if not _is_hidden(name) and is_image(name):
            result.sources.append(member_source(path, info, name, index.members[name]))
        elif not _is_hidden(name):
            result.skipped[_kind(name)] += 1
    if index.truncated:
        result.truncated.append(f"{escape(path)}: {index.truncated}")
    return result


def find_remote(url: bytes) -> FoundImages:
    """The images that a URL stands for: an object, a plain tar archive, a folder of an object store, or a glob.

    Raises:
        FpnxError: where nothing is found, or it cannot be read.
    """
    url = urls.checked(url)
    if urls.is_web(url):
        if urls.names_folder(url):
            raise FpnxError(f"{escape(url)}: {NO_FOLDERS}")
        return _find_object(url)
    not_found: remote.RemoteError | None = None
    if not urls.names_folder(url):
        try:
            return _find_object(url)
        except remote.RemoteError as error:
            if error.reason != remote.NOT_FOUND:
                raise
            not_found = error
    root = urls.glob_root(url)
    if root != url:
        return _images_of(root, match_objects(url), archives=True)
    folder = url.rstrip(b"/")
    result = _images_of(folder, remote.list_objects(folder), archives=False)
    if not_found is not None and not result.sources and not result.skipped:
        raise not_found
    return result


def _find_object(url: bytes) -> FoundImages:
    """One object; for an archive, the images in it; for a path into an archive, that member."""
    _refuse_compressed(urls.without_query(url))
    if is_archive(urls.without_query(url)):
        return find_in_archive(url)
    source = locate(url)
    return FoundImages([urls.folder_of(source.path)], [source])


def _images_of(root: bytes, objects: Sequence[tuple[bytes, ObjectInfo]], archives: bool) -> FoundImages:
    """The images among `objects` below `root`; with `archives`, also those in tar archives."""
    result, archive_urls, outside = FoundImages([root]), list[bytes](), 0
    for url, info in objects:
        name = urls.relative_to(url, root)
        if _is_hidden(name) or name.endswith(b"/"):  # empty objects that mark folders
            continue
        if name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
            outside += 1
        elif is_image(name):
            result.sources.append(ImageSource(url, url, info.bytes, info.mtime_ns))
        elif archives and is_archive(name):
            archive_urls.append(url)
        else:
            result.skipped[_kind(name)] += 1
    threads = ThreadPoolExecutor(ARCHIVE_THREADS)
    try:
        for images in threads.map(find_in_archive, archive_urls):
            images.roots = []
            result.add(images)
    finally:
        threads.shutdown(cancel_futures=True)
    if outside:
        result.skipped[OUTSIDE] += outside
        result.remarks.append(f"{escape(root)}: {outside} objects are left out, since their names lead out of it")
    return result


def _entry_stat(entry: os.DirEntry[bytes]) -> os.stat_result | None:
    """The stat of an entry, or of its link's target; None where that fails: opening it later gives the reason."""
    try:
        return entry.stat()
    except OSError:
        return None


def _kind(name: bytes) -> str:
    """The kind of a file that is no image: its extension in lower case, or a kind in words."""
    extension = os.path.splitext(name)[1].lower()
    if not extension:
        return "without extension"
    return escape(extension) if len(extension) <= MAX_EXTENSION else OTHER_EXTENSIONS


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _may_lead_into_archive(url: bytes) -> bool:
    return is_archive(urls.without_query(url)) or b".tar/" in url.lower()


def _is_hidden(name: bytes) -> bool:
    return any(part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


def _refuse_compressed(path: bytes) -> None:
    if is_compressed(path) and not os.path.isdir(path):
        raise FpnxError(f"{escape(path)} is compressed, or no tar: only plain .tar archives have random access")
