"""Finding local files by name, and opening them safely: regular files only, never devices or pipes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fpnx.core.errors import ImageError
from fpnx.core.names import same_name

__all__ = ["NOT_REGULAR", "existing_path", "open_regular"]

NOT_REGULAR = "not a regular file"


def existing_path(path: bytes) -> bytes:
    """The absolute path of the file or folder at `path`; each part that does not exist is replaced by the only name in
    its folder that differs in Unicode normalisation alone. Where there is none, `path` as it is."""
    if path.isascii() or os.path.lexists(path):
        return path
    found = b"/"
    for part in os.path.abspath(path).split(b"/"):
        inner = os.path.join(found, part)
        if not os.path.lexists(inner):
            try:
                name = same_name(part, os.listdir(found))
            except OSError:
                return path
            if name is None:
                return path
            inner = os.path.join(found, name)
        found = inner
    return found


@contextmanager
def open_regular(path: bytes) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Raises:
        ImageError: for a broken link, and for anything else than a regular file.
        OSError: where it cannot be opened.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise ImageError("broken link")
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device can have side effects
        raise ImageError(NOT_REGULAR)
    # O_NONBLOCK: if a FIFO has replaced the file since, opening it would block forever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        yield file
