"""The standard streams: closed pipes, full devices, limited encodings; and interrupts while modules are loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fpnx as package
from tests.helpers.files import ROOT, noise_image
from tests.helpers.process import process
from tests.helpers.stored import stored

SMALL = ["--weights", "random", "--backbone", "mobilenet_v2", "--levels", "P5", "--channels", "8", "--size", "32"]
full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


def run_to(stdout: int, *arguments: object, cwd: Path, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """`fpnx ARGUMENTS` with its output to a descriptor → exit code and stderr."""
    command = [sys.executable, "-m", "fpnx", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=stdout, stderr=stderr, text=True, timeout=240)
    return done.returncode, done.stderr or ""


def broken_pipe() -> int:
    """The writing end of a pipe whose reading end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_work_goes_on_when_the_pipe_is_closed(tmp_path: Path) -> None:
    noise_image(0, (40, 40)).save(tmp_path / "a.png")
    pipe = broken_pipe()
    assert run_to(pipe, "extract", "a.png", *SMALL, cwd=tmp_path, stderr=pipe) == (0, "")
    with package.open(tmp_path / "out.h5") as store:
        assert store["a.png"]["P5"].shape == (8, 1, 1)
    assert run_to(pipe, "info", "out.h5", cwd=tmp_path) == (0, "")
    assert run_to(pipe, "info", "missing.h5", "--json", cwd=tmp_path) == (2, "fpnx: missing.h5 does not exist\n")
    os.close(pipe)


@full_device
@pytest.mark.parametrize("json_wanted", [[], ["--json"]], ids=["text", "json"])
def test_a_full_device_is_an_error_of_one_line(tmp_path: Path, json_wanted: list[str]) -> None:
    stored(tmp_path / "out.h5", {"P3": np.ones((1, 4))})
    with open("/dev/full", "wb") as full:
        code, error = run_to(full.fileno(), "info", "out.h5", *json_wanted, cwd=tmp_path)
    assert (code, error) == (2, "fpnx: cannot write to the standard output: No space left on device\n")


def test_a_stream_that_is_closed_from_the_start(tmp_path: Path) -> None:
    stored(tmp_path / "out.h5", {"P3": np.ones((1, 4))})
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m fpnx info out.h5 >&-', sys.executable],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_characters_that_cannot_be_encoded_are_replaced(tmp_path: Path) -> None:
    stored(tmp_path / "ä.h5", {"P3": np.ones((1, 4))})
    done = process("info", "ä.h5", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "height ? width" in done.stdout


@pytest.mark.parametrize("module", ["typer", "fpnx.core.config", "fpnx.cli.views", "torch"])
def test_an_interrupt_while_modules_are_loaded_says_that_nothing_was_written(tmp_path: Path, module: str) -> None:
    noise_image(0, (40, 40)).save(tmp_path / "a.png")
    code = f"""
import signal, sys
class Interrupter:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
from fpnx.__main__ import run
sys.argv[1:] = {["extract", "a.png", *SMALL]!r}
raise SystemExit(run())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "fpnx: interrupted while loading: nothing was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
