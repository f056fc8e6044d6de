"""What is in a plain tar archive, and at which byte; found by its headers alone, nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape

__all__ = ["TarIndex", "Member", "read_tar_index", "is_archive", "is_compressed"]

BLOCK = 512
LARGEST_HEADER = 1 << 20  # bytes: long names and attributes take some kB; a header may claim what it likes
TAIL = 1 << 20  # bytes behind the end mark that are looked at
COMPRESSED_NAMES = tuple(
    b".tar.gz .tgz .tar.bz2 .tbz2 .tar.xz .txz .tar.zst .tzst .tar.lz4 .zip .7z .rar".split()
)  # fmt: skip
COMPRESSED = (  # how compressed files begin, and what makes a plain one of them
    (b"\x1f\x8b", "gzip: unpack it with gunzip"),
    (b"BZh", "bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "xz: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd: unpack it with unzstd"),
    (b"PK\x03\x04", "zip: unpack it, or pack it as tar"),
)


@dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
        offset: of its first byte in the archive.
        bytes: how many it has.
        stretches: where its content is not one stretch (a sparse file): (place in the file, bytes) of each piece; they
            follow on each other in the archive, and zeros are between them.
    """

    offset: int
    bytes: int
    stretches: tuple[tuple[int, int], ...] | None = None

    @property
    def stored(self) -> int:
        """How many bytes it takes in the archive."""
        return self.bytes if self.stretches is None else sum(count for _, count in self.stretches)


@dataclass(frozen=True)
class TarIndex:
    """What an archive holds.

    Attributes:
        members: files by name, without `./` and leading slashes; of several of one name the last, as tar unpacks them.
            A hard or symbolic link within the archive is the file that it leads to.
        others: how many members are no files: devices, links that lead nowhere or out of the archive.
        remarks: what the user should know, a line each.
        truncated: why something may be missing at the end, or empty.
    """

    members: dict[bytes, Member]
    others: int
    remarks: tuple[str, ...]
    truncated: str


def is_archive(path: bytes) -> bool:
    """Whether a name says that this is a plain tar archive."""
    return path.lower().endswith(b".tar")


def is_compressed(path: bytes) -> bool:
    """Whether a name says that this is an archive which can only be read from its beginning on."""
    return path.lower().endswith(COMPRESSED_NAMES)


def read_tar_index(read: Callable[[int, int], bytes], size: int, what: str) -> TarIndex:
    """Go through the headers of an archive.

    Args:
        read: (first byte, count) → bytes, fewer only at the end of the archive.
        size: of the archive, in bytes.
        what: its name, for messages.

    Raises:
        FpnxError: where it is no plain tar archive. One that is cut off or damaged gives what stands before.
    """
    start = read(0, BLOCK)
    if (how := next((how for mark, how in COMPRESSED if start.startswith(mark)), None)) is not None:
        raise FpnxError(f"{what} is compressed with {how}: only plain tar archives can be read at any place")
    headers = _Headers(read)
    try:
        # Any: what is typed of tarfile lacks `members`, and takes `sparse` for a number.
        tar: Any = tarfile.TarFile(
            fileobj=cast(BinaryIO, headers), mode="r", encoding="utf-8", errors="surrogateescape"
        )
    except (FpnxError, OSError):
        raise
    except Exception as error:
        raise FpnxError(f"{what} is not a tar archive ({escape(str(error))})") from error
    found = _Found()
    damaged = False
    try:
        while (info := tar.next()) is not None:
            tar.members.clear()  # else it keeps every header
            if min((info.size, *(number for stretch in info.sparse or () for number in stretch))) < 0:
                raise tarfile.ReadError("sizes below 0")
            found.add(info)
    except (FpnxError, OSError):
        raise
    except Exception:  # hostile headers make tarfile raise many kinds
        damaged = True
    found.follow_links()
    return TarIndex(
        found.members, found.others, tuple(found.remarks(what)), _truncation(read, tar.offset, size, damaged)
    )


class _Headers:
    """The file as tarfile sees it: read forwards only and never much at once, whatever its headers claim."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read, self._position = read, 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position - 1:  # tarfile looks at the byte before a header to see that it is there
            raise tarfile.ReadError("its headers lead backwards")
        self._position = position

    def read(self, count: int) -> bytes:
        if not 0 <= count <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {count} bytes")
        data = self._read(self._position, count)
        self._position += len(data)
        return data


class _Found:
    """Members as they come."""

    def __init__(self) -> None:
        self.members: dict[bytes, Member] = {}
        self.others = 0
        self._links: dict[bytes, tuple[bytes, Member | None]] = {}
        self._replaced, self._outside = 0, 0

    def add(self, info: Any) -> None:
        if info.isdir():
            return
        name = _normal(_raw(info.name))
        if not (info.isreg() or info.issym() or info.islnk()):
            self.others += 1
        elif name is None:
            self._outside += 1
            self.others += 1
        else:
            if name in self.members or name in self._links:
                self._replaced += 1
                self.members.pop(name, None)
                self._links.pop(name, None)
            if info.isreg():
                stretches = None if info.sparse is None else tuple((int(a), int(n)) for a, n in info.sparse)
                self.members[name] = Member(info.offset_data, info.size, stretches)
            elif info.islnk():  # a further name of a file that came before, and of no later one
                target = _normal(_raw(info.linkname)) or b""
                if target in self.members or target in self._links:
                    self._links[name] = (target, self.members.get(target))
                else:
                    self.others += 1
            else:
                folder = name.rpartition(b"/")[0]
                raw = _raw(info.linkname)
                leads = None if raw.startswith(b"/") else _normal(folder + b"/" + raw, climbs=True)
                self._links[name] = (leads or b"", None)

    def follow_links(self) -> None:
        """Put in place of each link the file that it leads to; symbolic ones may lead to links."""
        for name in self._links:
            seen, here = set[bytes](), name
            member = None
            while member is None and here in self._links and here not in seen:
                seen.add(here)
                here, member = self._links[here]
            member = member or self.members.get(here)
            if member is None:
                self.others += 1
            else:
                self.members[name] = member

    def remarks(self, what: str) -> list[str]:
        told = []
        if self._replaced:
            told.append(f"{what}: {self._replaced} members have the name of a later one, which counts, as tar does it")
        if self._outside:
            told.append(f"{what}: {self._outside} members are left out, since .. in their names leads out of it")
        return told


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _normal(name: bytes, climbs: bool = False) -> bytes | None:
    """`./a//b.jpg` and `/a/b.jpg` → `a/b.jpg`. None for a name with `..`; where it `climbs`, for one that leads out."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not (climbs and parts):
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts) if parts and b"\0" not in name else None


def _truncation(read: Callable[[int, int], bytes], end: int, size: int, damaged: bool) -> str:
    """Why something may be missing behind `end`, where reading the headers ended."""
    mark = read(end, BLOCK) if end < size else b""
    if len(mark) < BLOCK:
        return f"it ends early, at byte {size}, without an end mark: what may have come after is lost"
    if damaged or mark.count(0) < BLOCK:
        return f"its header at byte {end} is damaged: what comes after is lost"
    if read(end, TAIL).strip(b"\0"):
        return f"more follows behind its end mark at byte {end} and is not read: are two archives joined?"
    return ""
