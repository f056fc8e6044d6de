"""List files with sizes and times: `fpnx list` writes one, and `@list.txt` reads it without opening the images.

The first line is a JSON object: format, format version, number of images, sha256 of all following bytes, the folder
that names are relative to, and the number of other files, in all (`skipped`) and by kind (`skipped_kinds`; may be
missing). Each further line is the JSON array
`["cats/01.jpg",81234,1700000000000000000]`: name, size in bytes, mtime in ns (for objects, see
`fpnx.remote.backends.ObjectInfo`). The file is ASCII; bytes of a name that are not UTF-8 are lone surrogates, as from
`os.fsdecode`.

The sha256 is the list's fingerprint, see `fpnx.core.image_list.list_fingerprint`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from fpnx.core.errors import FpnxError
from fpnx.core.image_list import ImageRecord, list_fingerprint, record_line, without_time
from fpnx.core.sharding import Shard, ShardSlice
from fpnx.core.text import escape
from fpnx.images.local_files import existing_path
from fpnx.images.reading import open_text
from fpnx.remote.urls import is_url

__all__ = ["Manifest", "is_manifest", "image_path", "read_manifest", "manifest_lines"]

FORMAT, VERSION = "fpnx-list", 1
MAGIC = f'{{"format":"{FORMAT}",'.encode()
MAX_LINE_BYTES = 1 << 17  # a path of 4096 bytes takes 24 kB at most


@dataclass(frozen=True)
class Manifest:
    """The images read from a list file, and which slice of the list they are."""

    root: bytes
    records: tuple[ImageRecord, ...]
    skipped: Mapping[str, int]
    shard_slice: ShardSlice | None


def image_path(root: bytes, name: bytes) -> bytes:
    """Path or URL of a listed image."""
    return os.path.join(root, name)


def is_manifest(path: str | bytes) -> bool:
    """Whether `fpnx list` wrote this file. False for pipes: reading would consume their data."""
    try:
        if not is_url(os.fsencode(path)) and not os.path.isfile(existing_path(os.fsencode(path))):
            return False
        with open_text(os.fsencode(path)) as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def manifest_lines(root: bytes, records: Sequence[ImageRecord], skipped: Mapping[str, int]) -> Iterator[bytes]:
    """The lines of a list file."""
    header = {
        "format": FORMAT,
        "format_version": VERSION,
        "images": len(records),
        "sha256": list_fingerprint(records),
        "root": os.fsdecode(root),
        "skipped": sum(skipped.values()),
        **({"skipped_kinds": dict(skipped)} if skipped else {}),
    }
    yield _json(header)
    yield from map(record_line, records)


def read_manifest(path: str | bytes, limit: int | None = None, shard: Shard | None = None) -> Manifest:
    """Read a list file: of its first `limit` images, the slice of `shard`. The other lines are only counted and hashed.

    Raises:
        FpnxError: for a list file that was changed after it was written.
    """
    try:
        with open_text(os.fsencode(path)) as file:
            header = _header(path, _line(file))
            total = header["images"] if limit is None else min(limit, header["images"])
            wanted = shard.slice(total) if shard is not None else range(total)
            all_lines, first_lines, names, count = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), 0
            lines: list[bytes] = []
            for line in iter(lambda: _line(file), b""):
                all_lines.update(line)
                if count < total:  # within `limit`
                    first_lines.update(line)
                    names.update(without_time(line))
                if count in wanted:
                    lines.append(line)
                count += 1
    except OSError as error:
        raise FpnxError(f"list {escape(path)}: {error.strerror}") from error
    if count != header["images"]:
        raise _altered(path, f"it has {count} lines, where its first says {header['images']}")
    if all_lines.hexdigest() != header["sha256"]:
        raise _altered(path, "its lines do not have the sha256 of its first line")
    shard_slice = None
    if shard is not None:
        shard_slice = ShardSlice.of(shard, total, first_lines.hexdigest(), names.hexdigest())
    records = tuple(_record(path, line) for line in lines)
    return Manifest(os.fsencode(header["root"]), records, _skipped(header), shard_slice)


def _line(file: BinaryIO) -> bytes:
    """The next line as `fpnx list` wrote it: a shell of Windows writes other line ends, which no name contains."""
    line = file.readline(MAX_LINE_BYTES)
    return line[:-2] + b"\n" if line.endswith(b"\r\n") else line


def _header(path: str | bytes, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        version = header["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _altered(path, "its first line cannot be read") from error
    if version != VERSION:
        raise FpnxError(f"list {escape(path)} has format version {escape(str(version))}, this fpnx reads {VERSION}")
    counts = [header.get(name) for name in ("images", "skipped")]
    texts = [header.get(name) for name in ("sha256", "root")]
    if not all(type(n) is int and n >= 0 for n in counts) or not all(isinstance(t, str) for t in texts):
        raise _altered(path, "its first line is incomplete")
    return dict(header)


def _skipped(header: Mapping[str, Any]) -> dict[str, int]:
    """The number of other files by kind; of lists by earlier versions only their sum is known."""
    kinds = header.get("skipped_kinds")
    counts = list(kinds.values()) if isinstance(kinds, dict) else []
    if isinstance(kinds, dict) and all(type(n) is int and n > 0 for n in counts) and sum(counts) == header["skipped"]:
        return {escape(kind): count for kind, count in kinds.items()}
    return {"of unknown kinds": header["skipped"]} if header["skipped"] else {}


def _record(path: str | bytes, line: bytes) -> ImageRecord:
    try:
        name, size, mtime = json.loads(line)
        raw = os.fsencode(name)
    except (ValueError, TypeError, RecursionError) as error:
        raise _altered(path, f"{escape(line[:80])} is no image") from error
    outside = not raw or raw.startswith(b"/") or b".." in raw.split(b"/") or b"\0" in raw
    if type(size) is not int or type(mtime) is not int or outside:
        raise _altered(path, f"{escape(line[:80])} is no image")
    return ImageRecord(raw, size, mtime)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _altered(path: str | bytes, reason: str) -> FpnxError:
    return FpnxError(f"list {escape(path)} is not as fpnx list wrote it: {reason}; list the images again")
