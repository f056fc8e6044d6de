"""Durable files: reserved space, direct and atomic writes, locks, and the messages for disk errors."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fpnx.core.errors import BusyError, FpnxError
from fpnx.core.text import escape, format_bytes

try:
    import fcntl
except ImportError:  # Windows: no lock keeps two runs off one output
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "BLOCK",
    "LARGE",
    "OpenFile",
    "SMALLER_FEATURES",
    "check_space",
    "reserve_space",
    "disk_error",
    "free_bytes",
    "lock",
    "replace_file",
    "sync_folder",
    "atomic_write",
]

SMALLER_FEATURES = "store less with --dtype float16, --pool 7x7 or fewer --levels"  # in a file of `fpnx extract`
LARGE = 1 << 16  # bytes; from this size on, a direct write or an early writeback is worth its system calls
BLOCK = max(4096, mmap.PAGESIZE)  # bytes; direct writes begin and end at a multiple of it, in file and memory
STAGING = 1 << 20  # bytes of the buffer that unaligned memory is copied to before a direct write
TRIAL, SLOW = 1 << 27, 200e6  # after TRIAL bytes below SLOW bytes/s, writes go through the page cache again
FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a write through the page cache fails the same way
DIRECT = getattr(os, "O_DIRECT", 0) if fcntl is not None else 0  # 0 on macOS, which lacks it
O_BINARY, O_NOFOLLOW = getattr(os, "O_BINARY", 0), getattr(os, "O_NOFOLLOW", 0)


def free_bytes(folder: Path) -> int | None:
    """Free bytes in `folder`; None where its file system does not report them."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


@contextlib.contextmanager
def lock(output: Path) -> Iterator[bool]:
    """Lock `output` against other runs; yields False where the system or file system has no locks.

    The lock ends with its process, even after a crash; a lock file that is left over has no effect.

    Raises:
        BusyError: where another run holds the lock; it names that host and process.
        FpnxError: where the lock file cannot be created beside `output`.
    """
    if fcntl is None:
        yield False
        return
    path = output.with_name(output.name + ".lock")
    flags = os.O_RDWR | os.O_CREAT | O_NOFOLLOW  # following a symbolic link could truncate any other file
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise FpnxError(
                f"cannot write in {escape(output.parent)}: {escape(path.name)}: {error.strerror}"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                time.sleep(0.1)  # a run that has just locked it is about to write its host and process
                holder = escape(os.read(descriptor, 200).decode(errors="replace").strip())
                os.close(descriptor)
                raise BusyError(
                    f"{escape(output)} is being written by another run ({holder or 'unknown'}): "
                    f"wait for it, or take another output"
                ) from error
            os.close(descriptor)
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise FpnxError(f"cannot lock {escape(path)}: {error.strerror}") from error
            yield False
            return
        # The previous holder may have removed the file between our open and our lock: then ours locks nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # on a full disk the lock is held, without a name in it
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def disk_error(error: Exception, output: Path, needed: int, advice: str = "") -> FpnxError:
    """The FpnxError for a failed write of `output`, which needs `needed` bytes; for a full disk, with the numbers.

    `advice` says how the output can be made smaller, such as `SMALLER_FEATURES`.
    """
    smaller = f", or {advice}" if advice else ""
    match = re.search(r"errno = (\d+)", str(error))  # HDF5 gives the number in its message only
    number = getattr(error, "errno", None) or (int(match[1]) if match else None)
    if number == errno.EFBIG:
        return FpnxError(
            f"{escape(output)} may not become {format_bytes(needed)} large: this file system or `ulimit -f` forbids "
            f"it; take another output{smaller}"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(output.parent)
        return FpnxError(
            f"too little disk space for {escape(output)}: it takes {format_bytes(needed)}"
            f"{'' if free is None else f' and {format_bytes(free)} are free'}; make room{smaller}"
        )
    why = os.strerror(number) if number else escape(str(error))
    return FpnxError(f"cannot write {escape(output)}: {why}")


def check_space(output: Path, needed: int, free: int | None, advice: str = "") -> None:
    """Raise FpnxError where fewer than `needed` bytes are known to be free for `output`; see `disk_error`."""
    if free is not None and needed > free:
        raise disk_error(OSError(errno.ENOSPC, ""), output, needed, advice)


def reserve_space(descriptor: int, size: int) -> bool:
    """Reserve `size` bytes on the disk for an open file; False where the file system cannot.

    Calls fallocate(2): glibc's posix_fallocate falls back to writing into every block, so that the whole file would
    be sent twice to a network disk.
    """
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    fallocate = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(descriptor, 0, 0, size) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


class OpenFile:
    """An existing file, opened for writing in place.

    Where the system and the file system allow it, large writes bypass the page cache (`O_DIRECT`): writing through the
    page cache takes fifteen times the processor time, and evicts the pages of other programs.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDWR | O_BINARY | O_NOFOLLOW)
        self._lock = threading.Lock()
        self._direct = bool(DIRECT)
        self._staging: mmap.mmap | None = None
        self._direct_bytes, self._direct_seconds = 0, 0.0  # written with O_DIRECT, and the time that took

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        rest, large = memoryview(data).cast("B"), len(data) >= LARGE
        with self._lock:
            if large and self._direct:
                edge = -offset % BLOCK
                self._write_cached(offset, rest[:edge])
                written = edge + self._write_direct(offset + edge, rest[edge:])
                offset, rest = offset + written, rest[written:]
            self._write_cached(offset, rest)
            if len(rest) >= LARGE and hasattr(os, "posix_fadvise"):
                # Starts writeback now: the next sync then waits for little, instead of seconds.
                with contextlib.suppress(OSError):  # advice only; dirty pages stay in memory until they are written
                    os.posix_fadvise(self._handle(), offset, len(rest), os.POSIX_FADV_DONTNEED)

    def _write_cached(self, offset: int, rest: memoryview) -> None:
        while rest:
            os.lseek(self._handle(), offset, os.SEEK_SET)
            written = os.write(self._handle(), rest)
            rest, offset = rest[written:], offset + written

    def _write_direct(self, offset: int, data: memoryview) -> int:
        """Write the whole blocks at the front of `data` without the page cache; returns how many bytes are written.

        Memory must be aligned to a block too: unaligned data is copied to a staging buffer first.
        """
        flags, done = fcntl.fcntl(self._handle(), fcntl.F_GETFL), 0
        whole, started = len(data) - len(data) % BLOCK, time.perf_counter()
        aligned = np.frombuffer(data, np.uint8).ctypes.data % BLOCK == 0
        try:
            fcntl.fcntl(self._handle(), fcntl.F_SETFL, flags | DIRECT)
            os.lseek(self._handle(), offset, os.SEEK_SET)
            while done < whole and done % BLOCK == 0:
                piece = data[done:whole] if aligned else self._staged(data[done:whole])
                done += os.write(self._handle(), piece)
        except OSError as error:
            if error.errno in FINAL:
                raise
            self._direct = False  # this file system or this memory does not allow it; the page cache always works
        finally:
            fcntl.fcntl(self._handle(), fcntl.F_SETFL, flags)
        self._direct_bytes += done
        self._direct_seconds += time.perf_counter() - started
        if TRIAL < self._direct_bytes < SLOW * self._direct_seconds:
            self._direct = False  # the page cache buffers the writes to a slow or network disk
        return done

    def _staged(self, data: memoryview) -> memoryview:
        """The first bytes of `data`, copied to the aligned staging buffer."""
        if self._staging is None:
            self._staging = mmap.mmap(-1, STAGING)
        size = min(len(data), STAGING)
        staging = memoryview(self._staging)[:size]
        np.copyto(np.frombuffer(staging, np.uint8), np.frombuffer(data[:size], np.uint8))
        return staging

    def sync(self) -> None:
        """Wait until all written data is on the disk."""
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the data in the drive's own cache
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._handle(), fcntl.F_FULLFSYNC)
                return
        getattr(os, "fdatasync", os.fsync)(self._handle())

    def is_at(self, path: Path) -> bool:
        """Whether `path` still leads to this open file."""
        try:
            return os.path.samestat(os.fstat(self._handle()), os.stat(path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor, self._staging = None, None

    def _handle(self) -> int:
        if self._descriptor is None:
            raise OSError(errno.EBADF, "closed")
        return self._descriptor


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; at the end it is renamed to `path`, after an error it is deleted.

    Raises:
        FpnxError: where writing fails.
    """
    part = path.with_name(f".{os.getpid()}-{threading.get_ident()}.fpnx-part")  # two threads may write in one folder
    try:
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FpnxError(f"cannot write {escape(path)}: {error.strerror or error}") from error


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks` to `path` atomically and durably: after a crash or power cut, the old or the new file is there.

    Raises:
        OSError: where writing fails; the previous file then stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the file system can sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
