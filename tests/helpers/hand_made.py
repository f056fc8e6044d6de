"""PNG and TIFF files written byte by byte, with values, types and tags that no library would write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np


def png(samples: Sequence[object], bits: int, color_type: int, *, trns: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of `samples` (height, width) or (height, width, channels), unfiltered."""
    values = np.asarray(samples)
    rows = values.reshape(len(values), -1)
    data = b"".join(b"\0" + _packed(row, bits) for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", trns), (b"IDAT", zlib.compress(data))]
    parts = [_chunk(name, content) for name, content in chunks if content]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + _chunk(b"IEND", b"")


def tiff(data: bytes, **tags: Sequence[int]) -> bytes:
    """A little-endian TIFF of one strip, `data`; tags by number, `t256=[width]`, 32-bit. Replaces 273 and 279."""
    entries = {273: [0], 279: [len(data)]} | {int(name[1:]): list(values) for name, values in tags.items()}
    heap_start = 8 + 2 + 12 * len(entries) + 4
    heap_bytes = sum(4 * len(values) for values in entries.values() if len(values) > 1)
    if entries[273] == [0]:
        entries[273] = [heap_start + heap_bytes]
    directory, heap = struct.pack("<H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        content = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            directory += struct.pack("<HHII", tag, 4, len(values), heap_start + len(heap))
            heap += content
        else:
            directory += struct.pack("<HHI", tag, 4, 1) + content
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + heap + data


def _packed(row: np.ndarray, bits: int) -> bytes:
    if bits == 16:
        return row.astype(">u2").tobytes()
    each = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(each.reshape(-1)).tobytes()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
