"""Two processes have the losses of one on the joint batch, also under torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fpnx.commands.train import train
from tests.helpers.files import ROOT
from tests.helpers.process import forked
from tests.helpers.shapes import draw_scenes, write_coco, write_folders, write_masks
from tests.helpers.training import ABOVE, MODEL, weights_of

pytest.importorskip("accelerate")

OPTIONS: dict[str, Any] = {**MODEL, **ABOVE, "batch_size": 4, "epochs": 2}


def by_torchrun(arguments: list[str], cwd: Path) -> tuple[str, str]:
    """stdout and stderr of two processes that torchrun starts."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "--", "fpnx", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def started_together(arguments: list[str], cwd: Path) -> tuple[str, str]:
    """stdout and stderr of two processes with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    running = [forked(*arguments, cwd=cwd, **common, RANK=f"{i}", LOCAL_RANK=f"{i}") for i in range(2)]
    streams = [each.communicate() for each in running]
    assert [each.returncode for each in running] == [0, 0], streams
    out, err = ("".join(texts) for texts in zip(*streams, strict=True))
    return out, err


@pytest.mark.parametrize(
    ("head", "options", "start"),
    [
        ("fcos", OPTIONS, started_together),
        pytest.param("fcos", OPTIONS, by_torchrun, marks=pytest.mark.slow),
        pytest.param("classify", {**OPTIONS, "convolutions": None}, by_torchrun, marks=pytest.mark.slow),
        pytest.param("semantic", {**OPTIONS, "convolutions": None}, by_torchrun, marks=pytest.mark.slow),
        pytest.param("retinanet", OPTIONS, by_torchrun, marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_losses_of_the_joint_batch(
    head: str, options: dict[str, Any], start: Callable[[list[str], Path], tuple[str, str]], tmp_path: Path
) -> None:
    drawn = draw_scenes(13)
    write_coco(tmp_path / "boxes", drawn)
    write_masks(tmp_path / "masks", drawn)
    write_folders(tmp_path / "folders", drawn)
    images, labels = {
        "classify": ("folders", "folders"),
        "semantic": ("masks/images", "masks/masks"),
    }.get(head, ("boxes/images", "boxes/annotations.json"))
    flags = [
        str(part)
        for name, value in options.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    arguments = ["train", images, "--labels", labels, "-o", "two.safetensors", "--log", "two.jsonl", "--json", *flags]
    out, err = start(arguments, tmp_path)
    shown = json.loads(out)  # of the first process alone
    assert shown["processes"] == 2
    assert err.count("fpnx: epoch 1 of 2") == 1
    alone = train(
        tmp_path / images, labels if labels == "folders" else tmp_path / labels, tmp_path / "one.safetensors", **options
    )
    log = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert len(log) == len(alone.epochs) == 2
    for joint, one in zip(log, alone.epochs, strict=True):
        assert joint["images"] == one.images == 11
        assert joint["losses"] == pytest.approx(one.losses, rel=1e-5)
        assert joint["score"] == pytest.approx(one.score, abs=1e-6)
    two, one = weights_of(tmp_path / "two.safetensors"), weights_of(tmp_path / "one.safetensors")
    assert all((two[name] - value).abs().max() < 1e-4 for name, value in one.items())
    assert not (tmp_path / "two.safetensors.part").exists()
