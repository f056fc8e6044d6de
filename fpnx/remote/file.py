"""Files that are read by ranges: objects of a store, and parts of files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

from fpnx.core.text import escape
from fpnx.remote import client as remote

__all__ = ["RangeReader", "RemoteFile"]


class RangeReader(io.RawIOBase):
    """A file of `size` bytes that are read elsewhere."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
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
    """An object of a store, to read and seek in; it prints as its address.

    Raises:
        RemoteError: on opening and on reading, where it cannot be had.
    """

    def __init__(self, url: bytes) -> None:
        self._url, facts = url, remote.about(url)
        super().__init__(RangeReader(remote.Ranges(url, facts), facts.bytes), 1 << 16)

    def __repr__(self) -> str:
        return escape(self._url)
