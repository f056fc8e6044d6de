"""Lists of images as files: `fpnx list` writes one, and `@list.txt` reads it, or a slice of it, without a look at the
images.

The first line is a JSON object: format, its version, how many images follow, the sha256 of all bytes that follow, the
folder that names are relative to, and how many files were passed over. Each further line is the JSON array
`["cats/01.jpg",81234,1700000000000000000]`: name, size in bytes, mtime in ns (what stands for it where an image is not
a file on a disk). All of it is ASCII; bytes of a name that are no UTF-8 stand as lone surrogates, as in `os.fsdecode`.

The sha256 is the list's fingerprint: the same images in the same order have the same, listed to a file or not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.image_list import ImageRecord, list_fingerprint, record_line
from fpnx.core.sharding import Shard, ShardSlice
from fpnx.core.text import escape
from fpnx.images.reading import open_text
from fpnx.remote.urls import is_url

__all__ = ["Manifest", "is_manifest", "image_path", "read_manifest", "manifest_lines"]

FORMAT, VERSION = "fpnx-list", 1
MARK = f'{{"format":"{FORMAT}",'.encode()
LONGEST = 1 << 17  # bytes of one line; a path of 4096 bytes takes 24 kB at most


@dataclass(frozen=True)
class Manifest:
    """The images that were asked for of a list, and which part of it they are."""

    root: bytes
    records: tuple[ImageRecord, ...]
    skipped: int
    shard_slice: ShardSlice | None


def image_path(root: bytes, name: bytes) -> bytes:
    """Where a listed image is."""
    return os.path.join(root, name)


def is_manifest(path: str | bytes) -> bool:
    """Whether `fpnx list` wrote this file; what is read of a pipe would be lost to who reads it next."""
    try:
        if not is_url(os.fsencode(path)) and not os.path.isfile(path):
            return False
        with open_text(os.fsencode(path)) as file:
            return file.read(len(MARK)) == MARK
    except (OSError, ValueError):
        return False


def manifest_lines(root: bytes, records: Sequence[ImageRecord], skipped: int) -> Iterator[bytes]:
    """The lines of a list."""
    head = {
        "format": FORMAT,
        "format_version": VERSION,
        "images": len(records),
        "sha256": list_fingerprint(records),
        "root": os.fsdecode(root),
        "skipped": skipped,
    }
    yield _json(head)
    yield from map(record_line, records)


def read_manifest(path: str | bytes, limit: int | None = None, shard: Shard | None = None) -> Manifest:
    """What a list names: of its first `limit` images those that are `shard`'s. The rest is counted and hashed only.

    Raises:
        FpnxError: for a list that is not as it was written.
    """
    try:
        with open_text(os.fsencode(path)) as file:
            head = _head(path, file.readline(LONGEST))
            total = head["images"] if limit is None else min(limit, head["images"])
            mine = shard.slice(total) if shard is not None else range(total)
            whole, beginning, count = hashlib.sha256(), hashlib.sha256(), 0
            lines: list[bytes] = []
            for line in iter(lambda: file.readline(LONGEST), b""):
                whole.update(line)
                if count < total:
                    beginning.update(line)
                if count in mine:
                    lines.append(line)
                count += 1
    except OSError as error:
        raise FpnxError(f"list {escape(path)}: {error.strerror}") from error
    if count != head["images"]:
        raise _altered(path, f"it has {count} lines, where its first says {head['images']}")
    if whole.hexdigest() != head["sha256"]:
        raise _altered(path, "its lines are not those that its first line tells the sha256 of")
    cut = ShardSlice.of(shard, total, beginning.hexdigest()) if shard is not None else None
    return Manifest(os.fsencode(head["root"]), tuple(_record(path, line) for line in lines), head["skipped"], cut)


def _head(path: str | bytes, line: bytes) -> dict[str, Any]:
    try:
        head = json.loads(line)
        version = head["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _altered(path, "its first line cannot be read") from error
    if version != VERSION:
        raise FpnxError(f"list {escape(path)} has format version {escape(str(version))}, this fpnx reads {VERSION}")
    counts, texts = [head.get(name) for name in ("images", "skipped")], [head.get(name) for name in ("sha256", "root")]
    if not all(type(n) is int and n >= 0 for n in counts) or not all(isinstance(t, str) for t in texts):
        raise _altered(path, "its first line lacks what belongs there")
    return dict(head)


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


def _altered(path: str | bytes, why: str) -> FpnxError:
    return FpnxError(f"list {escape(path)} is not as fpnx list wrote it: {why}; list the images again")
