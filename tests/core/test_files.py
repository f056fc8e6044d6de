"""Writing in place: large pieces straight to the disk, whatever their place in the file and in memory."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest

from fpnx.core import files as disk
from fpnx.core.files import BLOCK, LARGE, OpenFile, free_bytes

SIZE = 6 << 20
FLAG = getattr(os, "O_DIRECT", 0)


def pieces(seed: int) -> list[tuple[int, np.ndarray]]:
    """(offset, bytes): small and large, at whole blocks or not, in memory that begins at a block or not."""
    chance, made = random.Random(seed), []
    content = np.random.default_rng(seed)
    for turn in range(40):
        size = chance.choice([1, 100, LARGE - 1, LARGE, LARGE + 1, 5 * BLOCK, 40 * BLOCK, (2 << 20) + 17])
        offset = chance.randrange(SIZE - size)
        if turn % 2:
            offset -= offset % BLOCK
        memory = np.empty(size + 2 * BLOCK, np.uint8)
        start = -memory.ctypes.data % BLOCK + chance.choice([0, 0, 1, 64])
        memory[start : start + size] = content.integers(0, 256, size, np.uint8)
        made.append((offset, memory[start : start + size]))
    return made


@pytest.mark.parametrize("how", ["as it comes", "no such flag", "odd blocks are refused", "a slow disk"])
def test_any_piece_lands_where_it_belongs(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "no such flag":
        monkeypatch.setattr(disk, "DIRECT", 0)
    elif how == "odd blocks are refused":  # by the system: no disk takes these
        monkeypatch.setattr(disk, "BLOCK", 3)
    elif how == "a slow disk":
        monkeypatch.setattr(disk, "TRIAL", 1 << 20)
        monkeypatch.setattr(disk, "SLOW", math.inf)
    path, wanted = tmp_path / "file", np.zeros(SIZE, np.uint8)
    path.write_bytes(bytes(SIZE))
    file = OpenFile(path)
    for offset, piece in pieces(1):
        file.write(offset, piece.data)
        wanted[offset : offset + len(piece)] = piece
    file.write(10, b"as bytes" * LARGE)
    wanted[10 : 10 + 8 * LARGE] = np.frombuffer(b"as bytes" * LARGE, np.uint8)
    file.sync()
    if how != "as it comes":
        assert not file._direct
    assert np.array_equal(np.fromfile(path, np.uint8), wanted)
    file.close()


@pytest.mark.skipif(not FLAG, reason="this system has no O_DIRECT")
@pytest.mark.parametrize(
    ("number", "raised"), [(errno.EFAULT, False), (errno.ENOSYS, False), (errno.ENOSPC, True), (errno.EIO, True)]
)
def test_a_direct_write_that_fails(number: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some blocks, and a short write: the rest takes the other way, or the cause is told."""
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    file, write, turns = OpenFile(path), os.write, []

    def failing(handle: int, data: memoryview) -> int:
        if not fcntl.fcntl(handle, fcntl.F_GETFL) & FLAG:
            return write(handle, data)
        turns.append(len(data))
        if len(turns) == 2:
            raise OSError(number, os.strerror(number))
        return write(handle, data[: 3 * BLOCK])

    monkeypatch.setattr(disk.os, "write", failing)
    if raised:
        with pytest.raises(OSError, match=os.strerror(number)):
            file.write(5, content[5:].data)
        wanted = np.concatenate([np.zeros(5, np.uint8), content[5 : 4 * BLOCK], np.zeros(SIZE - 4 * BLOCK, np.uint8)])
    else:
        file.write(5, content[5:].data)
        wanted = np.concatenate([np.zeros(5, np.uint8), content[5:]])
    assert len(turns) == 2
    assert not fcntl.fcntl(file._handle(), fcntl.F_GETFL) & FLAG
    assert np.array_equal(np.fromfile(path, np.uint8), wanted)
    file.close()


def is_cached(path: Path, offset: int) -> bool:
    """Whether a byte of the file can be had without asking the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


@pytest.mark.skipif(not FLAG, reason="this system has no O_DIRECT")
@pytest.mark.parametrize("shift", [0, 64], ids=["in place", "staged"])
def test_large_pieces_do_not_fill_the_page_cache(shift: int, tmp_path: Path) -> None:
    path, control = tmp_path / "file", tmp_path / "control"
    for each in (path, control):
        with open(each, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
            os.fsync(file.fileno())
    memory = np.ones(SIZE + 2 * BLOCK, np.uint8)
    start = -memory.ctypes.data % BLOCK
    try:
        handle = os.open(control, os.O_WRONLY | FLAG)
        os.write(handle, memory[start : start + BLOCK].data)
        os.close(handle)
        if is_cached(control, 0):
            pytest.skip("this file system holds files in memory")
    except OSError:
        pytest.skip("this file system has no O_DIRECT, or cannot say what is cached")
    file = OpenFile(path)
    file.write(BLOCK // 2, memory[start + shift : start + shift + (SIZE >> 1)].data)
    file.close()
    assert is_cached(path, BLOCK // 2)  # of what is at the edge
    assert not is_cached(path, SIZE >> 2)
    assert np.fromfile(path, np.uint8).sum() == SIZE >> 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_file_system_that_does_not_count_is_not_full(tmp_path: Path) -> None:
    assert free_bytes(Path("/proc")) is None
    free = free_bytes(tmp_path)
    assert free is not None
    assert free > 0
