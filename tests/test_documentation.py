"""Every command line and every piece of Python in the README runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.files import ROOT, copied

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for spoken, text in found if spoken == language]


def command_lines() -> list[str]:
    """Lines that call fpnx itself, without comments and the virtual environment's path.

    Those that speak of stores are run in tests/test_uploads.py, where there is one.
    """
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    calls = [re.sub(r".*\.venv/bin/fpnx", "fpnx", line) for line in lines if re.search(r"(^|/)fpnx ", line)]
    return sorted({line for line in calls if "://" not in line})


@pytest.fixture
def place(tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's commands speak of."""
    shutil.copytree(samples, tmp_path / "sample_images")
    copied(samples, tmp_path / "photos", 3)
    shutil.copy(samples / "animals" / "chelsea.jpg", tmp_path / "cat.jpg")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos", "photos")
    (tmp_path / "list.txt").write_text("photos/00001.jpg\nphotos/00000.jpg\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(arguments: list[str]) -> list[str]:
    """A command line as it stands, with options that make it quick and keep it off the network."""
    verb = arguments[0]
    if verb == "extract" and "--weights" not in arguments:
        arguments = [*arguments, "--weights", "random"]
    if verb == "benchmark":
        named = [] if "--backbone" in arguments else ["--backbone", "mobilenet_v2"]
        arguments = [*arguments, *named, "--size", "64", "--channels", "8", "--repeats", "1"]
    return [{"800": "80", "1333": "133"}.get(argument, argument) for argument in arguments]


@pytest.mark.parametrize(
    "line",
    # The whole table of backbones measures all of them where none was met before.
    [pytest.param(line, marks=pytest.mark.slow if line in ("fpnx models",) else ()) for line in command_lines()],
)
def test_command_lines(line: str, place: Path, fpnx: Callable[..., Any]) -> None:
    arguments = shlex.split(line)[1:]
    if arguments == ["extract", "sample_images/", "-o", "trained.h5"]:  # trained weights cannot be fetched in a test
        code, _, error = fpnx(*arguments, "--offline")
        assert code == 2
        assert "put maskrcnn_resnet50_fpn_v2" in error
        return
    if ">" in arguments:  # the shell's
        arguments = arguments[: arguments.index(">")]
    if any("out.shard-" in argument for argument in arguments):
        assert fpnx("extract", "photos", "--shard", "0/1", "--weights", "random", "--size", "64")[0] == 0
    elif "out.h5" in arguments and arguments[0] != "extract":
        assert fpnx("extract", "sample_images", "--weights", "random", "--size", "64", "--channels", "8")[0] == 0
    code, _, error = fpnx(*small(arguments))
    assert code == 0, error


def test_python(place: Path, fpnx: Callable[..., Any]) -> None:
    assert fpnx("extract", "sample_images", "--weights", "random")[0] == 0
    names: dict[str, Any] = {}
    torch.manual_seed(0)  # of the head's first parameters
    for block in blocks("python"):
        exec(block, names)
    assert names["item"].path == "animals/chelsea.jpg"
    assert names["loss"].item() < 10
    assert names["pyramid"]["P2"].shape == (1, 256, 57, 76)
    assert names["result"].done == 5


def test_the_two_commands_for_a_fresh_machine() -> None:
    first, second = (line for line in README.splitlines() if line.startswith("python3 -m venv"))
    assert "fpnx extract sample_images/ --weights random" in first
    assert second.endswith("-m pytest")
    script = (ROOT / ".ci" / "run").read_text()
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_the_example_output_is_what_comes_out(
    place: Path, fpnx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # however long the folder's own name is
    code, out, _ = fpnx("extract", "sample_images/", "--weights", "random")
    assert code == 0
    example = next(block for block in blocks("") if block.startswith("$ fpnx extract"))
    numbers = re.compile(r"\d+(\.\d+)?( [GMT]B)?")

    def skeleton(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if line and not line.startswith("$")]
        return [re.sub(r"\s+", " ", numbers.sub("#", line)).strip() for line in lines]

    shown, real = skeleton(example), skeleton(out)
    real = [line.replace(str(place) + "/", "").replace(re.sub(numbers, "#", str(place)) + "/", "") for line in real]
    assert len(shown) == len(real)
    assert [line.split(" ")[0] for line in shown] == [line.split(" ")[0] for line in real]
    level_lines = [line for line in example.splitlines() if re.match(r"P\d ", line)]
    assert level_lines == [line.rstrip() for line in out.splitlines() if re.match(r"P\d ", line)]


@pytest.mark.slow
def test_the_slurm_script(place: Path) -> None:
    script = next(block for block in blocks("") if block.startswith("#!/bin/bash"))
    (place / "run.sbatch").write_text(script.replace("fpnx extract", "fpnx extract --weights random --size 64"))
    (place / "fpnx").write_text(f'#!/bin/sh\nexec {sys.executable} -m fpnx "$@"\n')
    (place / "fpnx").chmod(0o755)
    count = int(re.findall(r"TASK_ID/(\d+)", script)[0])
    assert f"--array=0-{count - 1} " in script
    for task in (0, count // 3):  # of the photographs there: none, and the first
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{place}{os.pathsep}{os.environ['PATH']}"
        assert subprocess.run(["bash", "run.sbatch"], cwd=place, env=environment).returncode == 0
    assert len(list(place.glob("out.shard-*.h5"))) == 2
