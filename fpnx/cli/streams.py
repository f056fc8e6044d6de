"""stdout and stderr that survive a closed pipe or a full device: output that cannot be written is dropped."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

__all__ = ["robust_streams"]


class _RobustFile(io.FileIO):
    """A file descriptor to write to. After a write fails, it leads to the null device, and `error` is the reason."""

    error: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.error = error
            _redirect_to_null(self.fileno())
            return memoryview(data).nbytes  # type: ignore[arg-type]

    def write_error(self) -> str:
        """Why output was lost; empty if none was, or if the reader closed the pipe."""
        if self.error is None or self.error.errno == errno.EPIPE:
            return ""
        return f"cannot write to the standard output: {self.error.strerror}"


class RobustStreams:
    """The standard streams of a command."""

    def __init__(self) -> None:
        self._files: dict[int, _RobustFile] = {}

    def stream(self, descriptor: int, like: TextIO | None) -> io.TextIOWrapper:
        """A text stream to `descriptor`, encoded as `like` is; characters that cannot be encoded become `?`."""
        if like is None:  # the process was started without it: the next file opened would get its number
            _redirect_to_null(descriptor)
        file = self._files[descriptor] = _RobustFile(descriptor, "w", closefd=False)
        encoding, line_buffering = (like.encoding, like.line_buffering) if like is not None else ("utf-8", False)
        return io.TextIOWrapper(io.BufferedWriter(file), encoding, "replace", line_buffering=bool(line_buffering))

    def write_error(self) -> str:
        """Why results could not be written to stdout, in one line; empty if they could."""
        sys.stdout.flush()
        return self._files[1].write_error() if 1 in self._files else ""


@contextlib.contextmanager
def robust_streams() -> Iterator[RobustStreams]:
    """Make `sys.stdout` and `sys.stderr` robust while the context lasts; streams of other code stay as they are."""
    streams, before = RobustStreams(), (sys.stdout, sys.stderr)
    if _is_standard(before[0], 1):
        sys.stdout = streams.stream(1, before[0])
    if _is_standard(before[1], 2):
        sys.stderr = streams.stream(2, before[1])
    try:
        yield streams
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _is_standard(stream: object, descriptor: int) -> bool:
    """Whether a stream is the interpreter's own for `descriptor`, or is missing."""
    if stream is None:
        return True
    if not isinstance(stream, io.TextIOWrapper):
        return False
    try:
        stream.flush()
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
