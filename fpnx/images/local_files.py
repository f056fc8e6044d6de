"""Opening local files safely: regular files only, never devices or pipes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fpnx.core.errors import ImageError

__all__ = ["NOT_REGULAR", "open_regular"]

NOT_REGULAR = "not a regular file"


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
