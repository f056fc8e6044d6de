"""File objects over a function that reads byte ranges, such as ranges of an object at a URL."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

from fpnx.core.text import escape
from fpnx.remote import client as remote

__all__ = ["RangeReader", "RemoteFile"]


class RangeReader(io.RawIOBase):
    """A read-only file of `size` bytes; `read(start, count)` returns its bytes."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._position))
        data = self._read(self._position, count) if count else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class RemoteFile(io.BufferedReader):
    """An object at a URL as a seekable file; its repr is its URL.

    Raises:
        RemoteError: on opening and on reading, where a request fails.
    """

    def __init__(self, url: bytes) -> None:
        self._url, info = url, remote.object_info(url)
        super().__init__(RangeReader(remote.ReadAhead(url, info), info.bytes), 1 << 16)

    def __repr__(self) -> str:
        return escape(self._url)
