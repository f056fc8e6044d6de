"""Writing in place: direct and cached writes of any size, offset and memory alignment."""

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


def random_pieces(seed: int) -> list[tuple[int, np.ndarray]]:
    """(offset, bytes) pairs: small and large, with and without aligned offsets and aligned memory."""
    choice, pieces = random.Random(seed), []
    content = np.random.default_rng(seed)
    for number in range(40):
        size = choice.choice([1, 100, LARGE - 1, LARGE, LARGE + 1, 5 * BLOCK, 40 * BLOCK, (2 << 20) + 17])
        offset = choice.randrange(SIZE - size)
        if number % 2:
            offset -= offset % BLOCK
        memory = np.empty(size + 2 * BLOCK, np.uint8)
        start = -memory.ctypes.data % BLOCK + choice.choice([0, 0, 1, 64])
        memory[start : start + size] = content.integers(0, 256, size, np.uint8)
        pieces.append((offset, memory[start : start + size]))
    return pieces


@pytest.mark.parametrize("case", ["default", "no O_DIRECT", "alignment refused", "slow disk"])
def test_every_piece_is_written_at_its_offset(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "no O_DIRECT":
        monkeypatch.setattr(disk, "DIRECT", 0)
    elif case == "alignment refused":  # by the system: no disk allows blocks of 3 bytes
        monkeypatch.setattr(disk, "BLOCK", 3)
    elif case == "slow disk":
        monkeypatch.setattr(disk, "TRIAL", 1 << 20)
        monkeypatch.setattr(disk, "SLOW", math.inf)
    path, wanted = tmp_path / "file", np.zeros(SIZE, np.uint8)
    path.write_bytes(bytes(SIZE))
    file = OpenFile(path)
    for offset, piece in random_pieces(1):
        file.write(offset, piece.data)
        wanted[offset : offset + len(piece)] = piece
    file.write(10, b"as bytes" * LARGE)
    wanted[10 : 10 + 8 * LARGE] = np.frombuffer(b"as bytes" * LARGE, np.uint8)
    file.sync()
    if case != "default":
        assert not file._direct
    assert np.array_equal(np.fromfile(path, np.uint8), wanted)
    file.close()


@pytest.mark.skipif(not FLAG, reason="this system has no O_DIRECT")
@pytest.mark.parametrize(
    ("number", "raised"), [(errno.EFAULT, False), (errno.ENOSYS, False), (errno.ENOSPC, True), (errno.EIO, True)]
)
def test_a_direct_write_that_fails(number: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short direct write, then an error: the rest goes through the page cache, or the error is raised."""
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    file, write, sizes = OpenFile(path), os.write, []

    def failing(handle: int, data: memoryview) -> int:
        if not fcntl.fcntl(handle, fcntl.F_GETFL) & FLAG:
            return write(handle, data)
        sizes.append(len(data))
        if len(sizes) == 2:
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
    assert len(sizes) == 2
    assert not fcntl.fcntl(file._handle(), fcntl.F_GETFL) & FLAG
    assert np.array_equal(np.fromfile(path, np.uint8), wanted)
    file.close()


def is_cached(path: Path, offset: int) -> bool:
    """Whether the byte at `offset` is in the page cache."""
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
    assert is_cached(path, BLOCK // 2)  # the unaligned edge
    assert not is_cached(path, SIZE >> 2)
    assert np.fromfile(path, np.uint8).sum() == SIZE >> 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_unknown_free_space_is_none(tmp_path: Path) -> None:
    assert free_bytes(Path("/proc")) is None
    free = free_bytes(tmp_path)
    assert free is not None
    assert free > 0
