"""Opening files beside h5py, with every setting of HDF5's file locks, and what is said of files that cannot be read."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest

import fpnx
from fpnx.core.errors import StoreError
from fpnx.store.hdf5 import open_hdf5
from fpnx.store.writer import Writer, part_path
from tests.helpers.files import ROOT
from tests.helpers.layouts import LEVELS, PROVENANCE, features_of, layout_of

SIZE = (64, 64)
SETTINGS = (None, "TRUE", *(pytest.param(each, marks=pytest.mark.slow) for each in ("FALSE", "BEST_EFFORT")))


def put(writer: Writer, index: int) -> None:
    features = features_of([index], SIZE, "float32")
    writer.put([index], features, np.array([[7, 7 + index]]), {level: [0] for level in LEVELS})
    writer.commit()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    writer = Writer.create(tmp_path / "made.h5", layout_of(["64x64"] * 3), PROVENANCE)
    for index in range(3):
        put(writer, index)
    writer.finish()
    return tmp_path / "made.h5"


def run(code: str, path: Path, setting: str | None = None) -> str:
    """What Python code with `path` prints in a process with this HDF5_USE_FILE_LOCKING."""
    environment = {name: value for name, value in os.environ.items() if name != "HDF5_USE_FILE_LOCKING"}
    if setting is not None:
        environment["HDF5_USE_FILE_LOCKING"] = setting
    program = f"import sys, h5py, fpnx\npath = sys.argv[1]\n{textwrap.dedent(code)}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, path],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("setting", SETTINGS)
def test_h5py_and_fpnx_in_one_process(made: Path, setting: str | None) -> None:
    """Both orders, each handle closed first; before fpnx with every `locking` that h5py takes."""
    code = """
        readers = [fpnx.open, lambda p: fpnx.PyramidDataset(p).store, fpnx.verify]
        for locking in (None, False, True, "best-effort"):
            for read in readers:
                with h5py.File(path, "r", locking=locking) as file:
                    opened = read(path)
                    assert file["P4"][1].sum() != 0
                    getattr(opened, "close", int)()
                    assert file["images/status"][:].tolist() == [1, 1, 1]
        for read in readers[:2]:
            store = read(path)
            with h5py.File(path, "r") as file:
                assert (file["P4"][1] == store[1]["P4"]).all()
            assert store.read("P4", [1])[0].sum() != 0
            store.close()
        print("read")
    """
    assert run(code, made, setting) == "read"


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_file_that_is_being_written_beside_h5py(tmp_path: Path, setting: str | None) -> None:
    """The writer, here this process, holds no lock that keeps h5py or fpnx from reading."""
    writer = Writer.create(tmp_path / "out.h5", layout_of(["64x64"] * 3), PROVENANCE)
    put(writer, 0)
    code = """
        with h5py.File(path, "r") as file, fpnx.open(path) as store:
            assert file["images/status"][:].tolist() == store.status.tolist() == [1, 0, 0]
        with fpnx.open(path) as store, h5py.File(path, "r") as file:
            assert (file["P4"][0] == store[0]["P4"]).all()
        with h5py.File(path, "r", locking=False) as file, fpnx.open(path) as store:
            print([item.path for item in store] == [store.paths[0]])
    """
    assert run(code, part_path(tmp_path / "out.h5"), setting) == "True"
    put(writer, 1)
    writer.close()


def test_values_are_not_those_that_h5py_read_before_they_were_written(tmp_path: Path) -> None:
    """HDF5 keeps what it read of a dataset while any handle in the process has it open."""
    writer = Writer.create(tmp_path / "out.h5", layout_of(["64x64"] * 3), PROVENANCE)
    with h5py.File(part_path(tmp_path / "out.h5"), "r") as file:
        kept = [file["images/status"], *(file[level] for level in LEVELS)]
        before = [dataset[0].sum() for dataset in kept]
        for index in range(3):
            put(writer, index)
        assert kept[0][0] == before[0] == 0, "h5py gives the outdated value"
        expected = features_of([1], SIZE, "float32")
        with fpnx.open(part_path(tmp_path / "out.h5")) as store:
            assert store.status.tolist() == [1, 1, 1]
            for level in LEVELS:
                assert np.array_equal(store[1][level], expected[level][0])
                assert np.array_equal(store.read(level, [1]), expected[level])
            assert fpnx.verify(store.path).problems == ()
    writer.close()


def held_open(path: Path) -> subprocess.Popen[bytes]:
    """Another process that has the file open for writing, and so has locked it."""
    code = "import sys, h5py\nfile = h5py.File(sys.argv[1], 'r+', locking=True)\nprint(flush=True)\nsys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


READ = """
    try:
        with fpnx.open(path) as store:
            print(len(store.read("P4")), "images")
    except fpnx.StoreError as error:
        print(error)
"""


def test_a_file_that_another_program_has_locked(made: Path) -> None:
    with held_open(made) as holder:
        try:
            for setting in (None, "FALSE"):  # as before there were locks in HDF5
                assert run(READ, made, setting) == "3 images"
            for setting in ("TRUE", "BEST_EFFORT"):  # the user asks for locks
                assert run(READ, made, setting) == (
                    f"{made} is locked: another program has it open for writing; close it there, or unset "
                    f"HDF5_USE_FILE_LOCKING, which is {setting}"
                )
        finally:
            holder.communicate()
    assert run(READ, made, "TRUE") == "3 images"


WITHOUT_FLOCK = """
    import ctypes, struct
    numbers = {"x86_64": (0xC000003E, 73), "aarch64": (0xC00000B7, 32)}
    architecture, flock = numbers[__import__("platform").machine()]
    rules = [(0x20, 0, 0, 4), (0x15, 0, 2, architecture), (0x20, 0, 0, 0), (0x15, 1, 0, flock),
             (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | 38)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0
    import fcntl
    try:
        fcntl.flock(1, fcntl.LOCK_SH)
        raise SystemExit("flock works")
    except OSError as error:
        assert error.errno == 38, error
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="the kernel's filter of system calls")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="numbers of system calls")
def test_a_file_system_without_locks(made: Path) -> None:
    """As on some network disks: the kernel answers every flock with ENOSYS."""
    for setting in (None, "FALSE", "BEST_EFFORT"):
        assert run(WITHOUT_FLOCK + READ, made, setting) == "3 images"
    message = run(WITHOUT_FLOCK + READ, made, "TRUE")
    assert message.startswith(f"{made} cannot be locked, perhaps because its file system has no locks (unable to lock")
    assert message.endswith("unset HDF5_USE_FILE_LOCKING, which is TRUE")


@pytest.mark.parametrize("length", [9, 40, 95, 96, 800, -1])
def test_a_truncated_file_is_called_truncated(made: Path, length: int) -> None:
    made.write_bytes(made.read_bytes()[:length])
    with pytest.raises(StoreError, match=r"made\.h5 is truncated \(.*\): copy it again, or make it again"):
        open_hdf5(str(made))


@pytest.mark.parametrize(("at", "content"), [(8, b"\xff"), (60, b"\xee" * 8), (100, bytes(400))])
def test_a_damaged_file_of_full_length_is_not_called_truncated(made: Path, at: int, content: bytes) -> None:
    with made.open("r+b") as file:
        file.seek(at)
        file.write(content)
    with pytest.raises(StoreError, match=r"made\.h5 cannot be read as HDF5: \w+") as raised:
        open_hdf5(str(made))
    assert "truncated" not in str(raised.value)


def test_a_finished_run_is_named_where_its_part_is_gone(made: Path) -> None:
    with pytest.raises(StoreError, match=r"made\.h5\.part does not exist; .*made\.h5 is there: the run has ended"):
        fpnx.open(part_path(made))
