"""What a disk gives: space set aside, writes made durable, one run at a time, and what to say where it refuses."""

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
except ImportError:  # Windows: two runs on one output are not told apart
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "BLOCK",
    "LARGE",
    "OpenFile",
    "check_space",
    "reserve_space",
    "disk_error",
    "free_bytes",
    "lock",
    "replace_file",
    "sync_folder",
    "atomic_write",
]

LARGE = 1 << 16  # bytes from which a piece is worth the system calls that hurry it to the disk
BLOCK = max(4096, mmap.PAGESIZE)  # what goes there directly begins, and ends, at a multiple of it
STAGING = 1 << 20  # bytes that are copied, and written, at a time where memory does not begin there
TRIAL, SLOW = 1 << 27, 200e6  # after so many bytes, at fewer bytes/s, the disk is left to the page cache
FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what no other way of writing makes good
DIRECT = getattr(os, "O_DIRECT", 0) if fcntl is not None else 0  # not on macOS
O_BINARY, O_NOFOLLOW = getattr(os, "O_BINARY", 0), getattr(os, "O_NOFOLLOW", 0)


def free_bytes(folder: Path) -> int | None:
    """Bytes that can still be written in `folder`; None where its file system does not count them."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


@contextlib.contextmanager
def lock(output: Path) -> Iterator[bool]:
    """Hold `output` against other runs; False where the system or file system has no locks.

    The lock dies with its process, whatever ends it; the file that is left then means nothing.

    Raises:
        BusyError: naming the host and process that hold it.
        FpnxError: where nothing can be written beside `output`.
    """
    if fcntl is None:
        yield False
        return
    path = output.with_name(output.name + ".lock")
    flags = os.O_RDWR | os.O_CREAT | O_NOFOLLOW  # a link could empty any other file
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
                time.sleep(0.1)  # a run that has just taken the lock is about to write who it is
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
        # The holder before us may have removed the file between our open and our lock: then it locks nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # on a full disk nobody learns who we are, but we hold the lock
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def disk_error(error: Exception, output: Path, needed: int) -> FpnxError:
    """What to tell of a failed write: a full disk with its numbers, anything else as it is."""
    told = re.search(r"errno = (\d+)", str(error))  # HDF5 hands the number on in its text only
    number = getattr(error, "errno", None) or (int(told[1]) if told else None)
    if number == errno.EFBIG:
        return FpnxError(
            f"{escape(output)} may not become {format_bytes(needed)} large: this file system or `ulimit -f` forbids "
            f"it; take another output, or store less with --dtype float16, --pool 7x7 or fewer --levels"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(output.parent)
        return FpnxError(
            f"too little disk space for {escape(output)}: it takes {format_bytes(needed)}"
            f"{'' if free is None else f' and {format_bytes(free)} are free'}; make room, or store less with "
            f"--dtype float16, --pool 7x7 or fewer --levels"
        )
    why = os.strerror(number) if number else escape(str(error))
    return FpnxError(f"cannot write {escape(output)}: {why}")


def check_space(output: Path, needed: int, free: int | None) -> None:
    """Raise FpnxError where fewer than `needed` bytes are known to be free for `output`."""
    if free is not None and needed > free:
        raise disk_error(OSError(errno.ENOSPC, ""), output, needed)


def reserve_space(descriptor: int, size: int) -> bool:
    """Have the file system set aside `size` bytes; False where it cannot promise them.

    fallocate itself, since glibc's posix_fallocate writes into every block where a file system cannot do it: the
    whole file would travel twice to a network disk.
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
    """A file that is there, opened for writing in place.

    Where system and file system let it, large pieces go from memory straight to the disk (`O_DIRECT`): the way through
    the page cache takes fifteen times the processor time, and pushes out of it what others have there.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDWR | O_BINARY | O_NOFOLLOW)
        self._lock = threading.Lock()
        self._direct = bool(DIRECT)
        self._staging: mmap.mmap | None = None
        self._bytes, self._seconds = 0, 0.0  # that went straight to the disk, and the time it took them

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        rest, large = memoryview(data).cast("B"), len(data) >= LARGE
        with self._lock:
            if large and self._direct:
                edge = -offset % BLOCK
                self._put(offset, rest[:edge])
                taken = edge + self._put_directly(offset + edge, rest[edge:])
                offset, rest = offset + taken, rest[taken:]
            self._put(offset, rest)
            if len(rest) >= LARGE and hasattr(os, "posix_fadvise"):
                # Set off for the disk at once: the next sync finds little left to wait for, instead of seconds.
                with contextlib.suppress(OSError):  # advice only; what is dirty stays in memory until it is written
                    os.posix_fadvise(self._handle(), offset, len(rest), os.POSIX_FADV_DONTNEED)

    def _put(self, offset: int, rest: memoryview) -> None:
        while rest:
            os.lseek(self._handle(), offset, os.SEEK_SET)
            written = os.write(self._handle(), rest)
            rest, offset = rest[written:], offset + written

    def _put_directly(self, offset: int, data: memoryview) -> int:
        """Write the whole blocks at the front of `data` without the page cache; how many bytes of them the disk took.

        Memory, too, has to begin at a block: what does not is copied to where one does.
        """
        flags, done = fcntl.fcntl(self._handle(), fcntl.F_GETFL), 0
        whole, started = len(data) - len(data) % BLOCK, time.perf_counter()
        in_place = np.frombuffer(data, np.uint8).ctypes.data % BLOCK == 0
        try:
            fcntl.fcntl(self._handle(), fcntl.F_SETFL, flags | DIRECT)
            os.lseek(self._handle(), offset, os.SEEK_SET)
            while done < whole and done % BLOCK == 0:
                piece = data[done:whole] if in_place else self._staged(data[done:whole])
                done += os.write(self._handle(), piece)
        except OSError as error:
            if error.errno in FINAL:
                raise
            self._direct = False  # not for this file system, or this memory: the page cache takes anything
        finally:
            fcntl.fcntl(self._handle(), fcntl.F_SETFL, flags)
        self._bytes, self._seconds = self._bytes + done, self._seconds + time.perf_counter() - started
        if self._bytes > TRIAL and self._bytes < SLOW * self._seconds:
            self._direct = False  # a cache in between evens out what a slow disk, or one behind a network, takes
        return done

    def _staged(self, data: memoryview) -> memoryview:
        if self._staging is None:
            self._staging = mmap.mmap(-1, STAGING)
        size = min(len(data), STAGING)
        staging = memoryview(self._staging)[:size]
        np.copyto(np.frombuffer(staging, np.uint8), np.frombuffer(data[:size], np.uint8))
        return staging

    def sync(self) -> None:
        """Make durable what was written."""
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves it in the drive's own cache
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._handle(), fcntl.F_FULLFSYNC)
                return
        getattr(os, "fdatasync", os.fsync)(self._handle())

    def is_at(self, path: Path) -> bool:
        """Whether `path` is a name of this very file."""
        try:
            return os.path.samestat(os.fstat(self._handle()), os.stat(path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close; again, nothing happens."""
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
    """A name beside `path` to write a small file under; at the end it is renamed, after an error there is nothing.

    Raises:
        FpnxError: where the disk refuses.
    """
    part = path.with_name(f".{os.getpid()}.fpnx-part")
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
    """Put `chunks` in the place of what is at `path`, whole or not at all; what is there then outlives a power cut.

    Raises:
        OSError: where the disk refuses.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(fresh, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a new name durable, where the file system lets folders be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
