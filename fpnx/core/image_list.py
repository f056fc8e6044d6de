"""Records of images as lists and stores keep them, and the fingerprint of a list."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fpnx.core.sharding import ShardSlice

__all__ = ["DIGEST_BYTES", "ImageList", "ImageRecord", "list_fingerprint", "record_line", "without_time"]

DIGEST_BYTES = 16  # of an image's content hash


class ImageRecord(NamedTuple):
    """One image, as lists and stores keep it.

    Attributes:
        name: relative to the root, as bytes.
        bytes: size of the file; -1 where unknown (some web servers).
        mtime_ns: modification time in nanoseconds, or what replaces it (see `ObjectInfo`); 0 where unknown.
    """

    name: bytes
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class ImageList:
    """The images of a run in their order.

    Attributes:
        root: the folder, archive or URL that names are relative to.
        records: one for each image.
        shard: for a shard, which slice of which list this is; else None.
    """

    root: bytes
    records: tuple[ImageRecord, ...]
    shard: ShardSlice | None = None

    def __len__(self) -> int:
        return len(self.records)


def list_fingerprint(records: Iterable[tuple[bytes, int, int]], *, times: bool = True) -> str:
    """sha256 (hex) of the lines that `fpnx list` writes for `records`; without `times`, of `without_time` of each.

    It depends on names, sizes, times and order only, not on whether the list was written to a file.
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(record_line(record) if times else without_time(record_line(record)))
    return digest.hexdigest()


def record_line(record: tuple[bytes, int, int]) -> bytes:
    """One record as a line of JSON, `["cats/01.jpg",81234,1700000000000000000]`, in ASCII."""
    name, size, mtime = record
    return json.dumps([os.fsdecode(name), size, mtime], separators=(",", ":")).encode() + b"\n"


def without_time(line: bytes) -> bytes:
    """The line of a record without its time, `["cats/01.jpg",81234`."""
    return line.rpartition(b",")[0]
