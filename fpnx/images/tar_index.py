"""Index of a plain tar archive: its members and their offsets, from the headers alone."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape, plural

__all__ = ["NOT_REGULAR_FILES", "OUTSIDE", "TarIndex", "Member", "read_tar_index", "is_archive", "is_compressed"]

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # long names and attributes take some kB; a damaged header may claim any size
TAIL_BYTES = 1 << 20  # after the end mark, searched for a second archive
MAX_LINKED = 1_000_000  # paths through links to folders; an archive of a few kB can give any number
MAX_FOLLOWED = 40  # links that one path may lead through, as on Linux
NOT_REGULAR_FILES, BROKEN_LINKS, OUTSIDE = "not regular files", "broken links", "outside of it"  # kinds of members
NOWHERE = b"\0"  # target of a link that leads out of the archive; no member has this name
COMPRESSED_NAMES = tuple(
    b".tar.gz .tgz .tar.bz2 .tbz2 .tar.xz .txz .tar.zst .tzst .tar.lz4 .zip .7z .rar".split()
)  # fmt: skip
COMPRESSED = (  # magic bytes of compressed files, and how to unpack them
    (b"\x1f\x8b", "gzip: unpack it with gunzip"),
    (b"BZh", "bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "xz: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd: unpack it with unzstd"),
    (b"PK\x03\x04", "zip: unpack it, or pack it as tar"),
)


@dataclass(frozen=True)
class Member:
    """A file in an archive: where its content is.

    Attributes:
        offset: of its first stored byte in the archive.
        bytes: size of the file.
        segments: for a sparse file, (offset in the file, bytes) of each stored segment; else None. In the archive the
            segments follow each other; in the file there are zeros between them.
    """

    offset: int
    bytes: int
    segments: tuple[tuple[int, int], ...] | None = None

    @property
    def stored(self) -> int:
        """Bytes of its content in the archive."""
        return self.bytes if self.segments is None else sum(count for _, count in self.segments)


@dataclass(frozen=True)
class TarIndex:
    """The members of an archive.

    Attributes:
        members: files by name, without `./` and leading slashes. Where names repeat, the last member counts, as for
            tar. A hard or symbolic link within the archive stands for its target, a file or a folder.
        others: number of members that are no files, by kind: devices, links without a target in the archive, names
            that lead out of it.
        remarks: notes for the user, a line each.
        truncated: why members may be missing at the end; empty for a complete archive.
    """

    members: dict[bytes, Member]
    others: Mapping[str, int]
    remarks: tuple[str, ...]
    truncated: str


def is_archive(path: bytes) -> bool:
    """Whether a name is that of a plain tar archive."""
    return path.lower().endswith(b".tar")


def is_compressed(path: bytes) -> bool:
    """Whether a name is that of an archive without random access: a compressed tar, zip and the like."""
    return path.lower().endswith(COMPRESSED_NAMES)


def read_tar_index(read: Callable[[int, int], bytes], size: int, what: str) -> TarIndex:
    """Read all headers of an archive.

    Args:
        read: (first byte, count) → bytes, fewer only at the end of the archive.
        size: of the archive, in bytes.
        what: its name, for messages.

    Raises:
        FpnxError: where it is no plain tar archive. One that is truncated or damaged gives the members before that.
    """
    start = read(0, BLOCK)
    if (hint := next((hint for magic, hint in COMPRESSED if start.startswith(magic)), None)) is not None:
        raise FpnxError(f"{what} is compressed with {hint}: only plain tar archives have random access")
    headers = _HeaderFile(read)
    try:
        # Any: tarfile's types lack `members`, and declare `sparse` as a number.
        tar: Any = tarfile.TarFile(
            fileobj=cast(BinaryIO, headers), mode="r", encoding="utf-8", errors="surrogateescape"
        )
    except (FpnxError, OSError):
        raise
    except Exception as error:
        raise FpnxError(f"{what} is not a tar archive ({escape(str(error))})") from error
    builder = _IndexBuilder()
    damaged = False
    try:
        while (info := tar.next()) is not None:
            tar.members.clear()  # or tarfile keeps every header in memory
            if min((info.size, *(number for segment in info.sparse or () for number in segment))) < 0:
                raise tarfile.ReadError("sizes below 0")
            builder.add(info)
    except (FpnxError, OSError):
        raise
    except Exception:  # invalid headers make tarfile raise many types
        damaged = True
    builder.resolve_links(what)
    truncated = _truncation(read, tar.offset, size, damaged)
    return TarIndex(builder.members, builder.others, tuple(builder.remarks(what)), truncated)


class _HeaderFile:
    """The file that tarfile reads: forwards only, and at most MAX_HEADER_BYTES at a time."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read, self._position = read, 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position - 1:  # tarfile reads the byte before a header to see that it exists
            raise tarfile.ReadError("its headers lead backwards")
        self._position = position

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        data = self._read(self._position, count)
        self._position += len(data)
        return data


class _IndexBuilder:
    """Collects members in the order of the archive."""

    def __init__(self) -> None:
        self.members: dict[bytes, Member] = {}
        self.others: Counter[str] = Counter()
        self._links: dict[bytes, tuple[bytes, Member | None]] = {}
        self._folder_entries: set[bytes] = set()
        self._replaced, self._loops = 0, 0

    def add(self, info: Any) -> None:
        name = _normal(_raw(info.name))
        if info.isdir():
            if name is not None:
                self._folder_entries.add(name)
            return
        if not (info.isreg() or info.issym() or info.islnk()):
            self.others[NOT_REGULAR_FILES] += 1
        elif name is None:
            self.others[OUTSIDE] += 1
        else:
            if name in self.members or name in self._links:
                self._replaced += 1
                self.members.pop(name, None)
                self._links.pop(name, None)
            if info.isreg():
                segments = None if info.sparse is None else tuple((int(a), int(n)) for a, n in info.sparse)
                self.members[name] = Member(info.offset_data, info.size, segments)
            elif info.islnk():  # a hard link: its target comes before it
                target = _normal(_raw(info.linkname)) or b""
                if target in self.members or target in self._links:
                    self._links[name] = (target, self.members.get(target))
                else:
                    self.others[BROKEN_LINKS] += 1
            else:
                folder = name.rpartition(b"/")[0]
                raw = _raw(info.linkname)
                resolved = None if raw.startswith(b"/") else _normal(folder + b"/" + raw, is_link=True)
                self._links[name] = (NOWHERE if resolved is None else resolved, None)

    def resolve_links(self, what: str) -> None:
        """Replace each link by the file or the folder that it leads to, through further links."""
        unresolved = []
        for name in self._links:
            visited, current = set[bytes](), name
            member = None
            while member is None and current in self._links and current not in visited:
                visited.add(current)
                current, member = self._links[current]
            member = member or self.members.get(current)
            if member is None:
                unresolved.append(name)
            else:
                self.members[name] = member
        if unresolved:
            self._expand(unresolved, what)

    def _expand(self, links: Sequence[bytes], what: str) -> None:
        """Add the members that links to folders lead to, under the paths through the links.

        Raises:
            FpnxError: for more than MAX_LINKED paths.
        """
        folders, found = self._folders(), 0
        targets = {name: self._real(name, folders) for name in links}
        for name, target in targets.items():
            if target is None:
                self.others[BROKEN_LINKS] += 1
            elif target in self.members:
                self.members[name] = self.members[target]
            # Paths to list, where they really are, and the real folders that each is in.
            waiting = [(name, target, _ancestors(name))] if target in folders else []
            while waiting:
                shown, real, inside = waiting.pop()
                if real in inside:
                    self._loops += 1
                    continue
                found += 1
                if found > MAX_LINKED:
                    raise FpnxError(f"{what}: links to folders in it give over {MAX_LINKED} paths: unpack it")
                for child in folders[real]:
                    path, inner = shown + b"/" + child, _joined(real, child)
                    if (at := targets.get(inner, inner)) is None:
                        continue
                    if at in self.members:
                        self.members.setdefault(path, self.members[at])
                        found += 1
                    elif at in folders:
                        waiting.append((path, at, inside | {real}))

    def _folders(self) -> dict[bytes, set[bytes]]:
        """The names in each folder, of members, links and folders; the archive itself is `b""`."""
        folders: dict[bytes, set[bytes]] = {b"": set()}
        for path in (*self.members, *self._links, *self._folder_entries):
            while path:
                folder, _, name = path.rpartition(b"/")
                known = folder in folders
                folders.setdefault(folder, set()).add(name)
                if known:
                    break
                path = folder
        for path in self._folder_entries:
            folders.setdefault(path, set())
        return folders

    def _real(self, path: bytes, folders: Mapping[bytes, object]) -> bytes | None:
        """The member or folder that a path leads to, through links in any of its parts; None where there is none."""
        real, parts, followed = b"", path.split(b"/"), 0
        while parts:
            at = _joined(real, parts.pop(0))
            if at in folders or at in self.members:
                real = at
            elif at in self._links and followed < MAX_FOLLOWED:
                followed += 1
                target = self._links[at][0]
                real, parts = b"", [*(target.split(b"/") if target else ()), *parts]
            else:
                return None
        return real

    def remarks(self, what: str) -> list[str]:
        lines = []
        if self._replaced:
            lines.append(f"{what}: {self._replaced} members are replaced by later ones of the same name, as in tar")
        if self.others[OUTSIDE]:
            lines.append(f"{what}: {self.others[OUTSIDE]} members are left out, because of .. in their names")
        if self._loops:
            loops = plural(self._loops, "folder")
            lines.append(f"{what}: {loops} not entered, since links lead back to a folder that they are in")
        return lines


def _joined(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name


def _ancestors(path: bytes) -> frozenset[bytes]:
    """All folders that a path is in, with `b""` for the archive itself."""
    parts = path.split(b"/")
    return frozenset(b"/".join(parts[:count]) for count in range(len(parts)))


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _normal(name: bytes, is_link: bool = False) -> bytes | None:
    """`./a//b.jpg` and `/a/b.jpg` → `a/b.jpg`. None for a name with `..`; a link may have them, if it does not lead out
    of the archive, and `b""` is its root."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not (is_link and parts):
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts) if (parts or is_link) and b"\0" not in name else None


def _truncation(read: Callable[[int, int], bytes], end: int, size: int, damaged: bool) -> str:
    """Why members may be missing after `end`, where the headers end; empty for a complete archive."""
    mark = read(end, BLOCK) if end < size else b""
    if len(mark) < BLOCK:
        return f"it ends early, at byte {size}, without an end mark: what may have come after is lost"
    if damaged or mark.count(0) < BLOCK:
        return f"its header at byte {end} is damaged: what comes after is lost"
    if read(end, TAIL_BYTES).strip(b"\0"):
        return f"more follows behind its end mark at byte {end} and is not read: are two archives joined?"
    return ""
