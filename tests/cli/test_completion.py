"""Shell completion: its words, and that it does not load torch."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from torchvision import models

from fpnx.cli.completion import backbone_names, completer, weights_names
from fpnx.cli.main import app
from fpnx.core.config import BenchmarkConfig, ExtractConfig, VisualizeConfig
from fpnx.core.option import declared_option
from fpnx.models.weights.torchvision import known_names
from tests.helpers.files import ROOT

# Prints on stderr which heavy packages the process has loaded when it ends.
PROGRAM = """
import atexit, sys
heavy = ("torch", "torchvision", "numpy", "h5py", "matplotlib", "PIL")
atexit.register(lambda: print(*(name for name in heavy if name in sys.modules), file=sys.stderr))
from fpnx.__main__ import run
sys.argv = ["fpnx"]
sys.exit(run())
"""


def completed(line: str, cwd: Path) -> list[str]:
    """The words that bash is given for the last word of a command line; a blank at its end begins a new one."""
    words = line.split() + ([""] if line.endswith(" ") else [])
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_FPNX_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr.split()) == (0, []), done.stderr
    return done.stdout.split()


def test_backbones_are_those_that_torchvision_registers() -> None:
    assert backbone_names() == sorted(models.list_models(module=models))


def test_weights_are_those_that_fpnx_finds_by_name() -> None:
    words, names = weights_names()[:4], weights_names()[4:]
    assert words == ["default", "imagenet", "coco", "random"]
    assert sorted(names) == sorted(known_names(None))
    assert "ResNet50_Weights.IMAGENET1K_V2" in names
    assert "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1" in names


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fpnx vi", ["visualize"]),
        ("fpnx extract photos/ --backbone resnet1", ["resnet101", "resnet152", "resnet18"]),
        ("fpnx models squeeze", ["squeezenet1_0", "squeezenet1_1"]),
        ("fpnx extract --weights ResNet50_", ["ResNet50_Weights.IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2"]),
        ("fpnx extract --pyramid ", ["fpn", "pafpn", "bifpn", "nasfpn", "simple", "image"]),
        ("fpnx extract --levels C3,P6", ["C3,P6"]),
        ("fpnx extract --device c", ["cpu", "cuda"]),
        ("fpnx benchmark --precision float32,b", ["float32,bfloat16"]),
        ("fpnx extract --pool ", ["none", "avg", "max"]),
        ("fpnx extract --stride", ["--stride-in-1x1", "--stride-in-3x3"]),
        ("fpnx extract photos/ph", []),  # the shell completes files
    ],
)
def test_bash_gets_words_without_torch(line: str, words: list[str], tmp_path: Path) -> None:
    found = completed(line, tmp_path)
    assert [word for word in found if not word.startswith("cuda:")] == words  # the cards of this machine


def test_a_list_of_values_is_completed_at_its_last_comma() -> None:
    in_lists, single = completer(("P2", "P3", "C3"), lists=True), completer(("P2", "P3", "C3"))
    assert in_lists is not None
    assert single is not None
    assert in_lists("C3,P") == ["C3,P2", "C3,P3"]
    assert single("C3,P") == []
    assert completer(()) is None


def test_the_values_of_every_option_are_completed() -> None:
    group: Any = typer.main.get_command(app)

    def words(command: str, name: str) -> list[str]:
        parameter = next(each for each in group.commands[command].params if each.name == name)
        return [item.value for item in parameter.shell_complete(None, "")]

    for command, config in (("extract", ExtractConfig), ("visualize", VisualizeConfig), ("benchmark", BenchmarkConfig)):
        for field in dataclasses.fields(config):
            declared = declared_option(field)
            assert declared is not None
            if declared.choices:
                assert words(command, field.name) == list(declared.choices)
        assert words(command, "backbone") == backbone_names()
        assert words(command, "weights") == weights_names()
        assert {"P2-P5", "C2", "P7"} <= set(words(command, "levels"))
        assert {"auto", "cpu", "cuda", "mps"} <= set(words(command, "device"))
        assert words(command, "size") == ["recipe", "native"]
    assert words("benchmark", "precision") == words("extract", "precision")
    assert words("verify", "weights") == weights_names()
    assert words("models", "name") == backbone_names()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_for_a_shell_is_shown(shell: str, tmp_path: Path) -> None:
    """As `eval "$(_FPNX_COMPLETE=source_zsh fpnx)"` takes it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_FPNX_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        [sys.executable, "-m", "fpnx"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_FPNX_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_itself_completes(tmp_path: Path) -> None:
    (tmp_path / "fpnx").write_text(f'#!/bin/sh\nexec {sys.executable} -m fpnx "$@"\n')
    (tmp_path / "fpnx").chmod(0o755)
    script = """
eval "$(_FPNX_COMPLETE=source_bash fpnx)"
COMP_WORDS=(fpnx extract photos/ --top-block p) COMP_CWORD=4
"$(complete -p fpnx | sed 's/.*-F \\([^ ]*\\) .*/\\1/')" fpnx
echo "${COMPREPLY[@]}"
"""
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["pool", "p5"], "")
