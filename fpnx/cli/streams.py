"""stdout and stderr that may go away or be full: what nobody can read is dropped, and the work goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

__all__ = ["robust_streams"]


class _Outlet(io.FileIO):
    """A descriptor to write to. Once it refuses, it leads to the null device, and `error` says why."""

    error: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.error = error
            _to_null(self.fileno())
            return memoryview(data).nbytes  # type: ignore[arg-type]

    def refusal(self) -> str:
        """Why something did not arrive; empty where all did, or where a reader went away, having seen enough."""
        if self.error is None or self.error.errno == errno.EPIPE:
            return ""
        return f"cannot write to the standard output: {self.error.strerror}"


class _Outlets:
    """The standard streams of a command."""

    def __init__(self) -> None:
        self._held: dict[int, _Outlet] = {}

    def stream(self, descriptor: int, like: TextIO | None) -> io.TextIOWrapper:
        """Text to `descriptor`, encoded as that of `like`; what cannot be encoded becomes `?`."""
        if like is None:  # started without it: the next file that is opened would get its number
            _to_null(descriptor)
        held = self._held[descriptor] = _Outlet(descriptor, "w", closefd=False)
        encoding, lines = (like.encoding, like.line_buffering) if like is not None else ("utf-8", False)
        return io.TextIOWrapper(io.BufferedWriter(held), encoding, "replace", line_buffering=bool(lines))

    def refusal(self) -> str:
        """Why results did not arrive, in a line; empty where they did."""
        sys.stdout.flush()
        return self._held[1].refusal() if 1 in self._held else ""


@contextlib.contextmanager
def robust_streams() -> Iterator[_Outlets]:
    """Have `sys.stdout` and `sys.stderr` outlast their readers; streams that somebody else put there are left alone."""
    outlets, before = _Outlets(), (sys.stdout, sys.stderr)
    if _is_standard(before[0], 1):
        sys.stdout = outlets.stream(1, before[0])
    if _is_standard(before[1], 2):
        sys.stderr = outlets.stream(2, before[1])
    try:
        yield outlets
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _is_standard(stream: object, descriptor: int) -> bool:
    """Whether a stream is the interpreter's own, or is missing."""
    if stream is None:
        return True
    if not isinstance(stream, io.TextIOWrapper):
        return False
    try:
        stream.flush()
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
