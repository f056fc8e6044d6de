"""Two processes under torchrun have the losses of one on the joint batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fpnx.commands.train import train
from tests.helpers.files import ROOT
from tests.helpers.shapes import draw_scenes, write_coco, write_folders, write_masks
from tests.helpers.training import ABOVE, MODEL, weights_of

pytest.importorskip("accelerate")

OPTIONS: dict[str, Any] = {**MODEL, **ABOVE, "batch_size": 4, "epochs": 2}


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("fcos", OPTIONS),
        pytest.param("classify", {**OPTIONS, "convolutions": None}, marks=pytest.mark.slow),
        pytest.param("semantic", {**OPTIONS, "convolutions": None}, marks=pytest.mark.slow),
        pytest.param("retinanet", OPTIONS, marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_losses_of_the_joint_batch(head: str, options: dict[str, Any], tmp_path: Path) -> None:
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
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "--", "fpnx", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)  # of the first process alone
    assert shown["processes"] == 2
    assert done.stderr.count("fpnx: epoch 1 of 2") == 1
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
