"""The plain script from outside: start it, have it measured, end it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from fpnx.benchmark.case import BenchmarkCase
from fpnx.core.errors import FpnxError
from fpnx.models.backbones.factory import create_backbone
from fpnx.models.pyramid_model import PyramidModel

__all__ = ["BaselineProcess"]

SECONDS_TO_END = 10


class BaselineProcess:
    """`fpnx.benchmark.baseline_script` in a process, on the images, parameters and batch size of a specimen.

    Attributes:
        rss: peak bytes of its main process so far, without the DataLoader's workers; None where nobody knows.
    """

    def __init__(self, specimen: BenchmarkCase, folder: Path) -> None:
        folder = folder / f"plain {specimen.plan.model.backbone}"  # of its own: there may be several
        folder.mkdir()
        self.output, self.rss = folder / "out.h5", None
        self._batch_size = specimen.batch_size
        parameters = folder / "parameters.pt"
        plan = specimen.plan
        torch.save({name: value.cpu().contiguous() for name, value in plan.model.state_dict().items()}, parameters)
        self._log = open(folder / "log", "w+b")  # noqa: SIM115
        # A session of its own: Ctrl-C is for us to handle.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fpnx.benchmark.baseline_script"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        request = _architecture(plan.model) | {
            "parameters": str(parameters),
            "folder": str(specimen.files),
            "images": specimen.images,
            "size": specimen.size,
            "resampling": plan.recipe.resampling,
            "mean": [value / plan.recipe.value_range for value in plan.recipe.mean],
            "std": [value / plan.recipe.value_range for value in plan.recipe.std],
            "batch_size": specimen.batch_size,
            "workers": plan.workers,
            "device": str(plan.device),
            "levels": plan.model.levels,
            "dtype": plan.config.dtype,
            "output": str(self.output),
        }
        try:
            self._ask(json.dumps(request))
        except BaseException:
            self.close()
            raise

    def forward(self) -> float:
        """One batch through its network: milliseconds per image."""
        return 1000 * float(self._ask("forward")["seconds"]) / self._batch_size

    def end_to_end(self) -> float:
        """All images into a file: images/s."""
        answer = self._ask("end to end")
        self.rss = answer["rss"]
        return float(answer["images_per_second"])

    def features(self, level: str, count: int) -> np.ndarray:
        """The first `count` rows of a level that it wrote last."""
        with h5py.File(self.output) as file:
            values: np.ndarray = file[level][:count]
            return values

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._process.communicate(timeout=SECONDS_TO_END)
        self._log.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            raise FpnxError(f"the plain script failed: {last[0]}")
        found: dict[str, Any] = json.loads(answer)
        return found


def _architecture(model: PyramidModel) -> dict[str, Any]:
    neck = model.fpn
    if neck.kind != "fpn":
        raise FpnxError(f"the plain script of --baseline has torchvision's FPN, not {neck.kind}: give --pyramid fpn")
    return {
        "backbone": model.backbone,
        "nodes": {node: f"C{level}" for level, node in create_backbone(model.backbone, seed=0).nodes.items()},
        "first_level": min(neck.in_channels),
        "in_channels": [channels for _, channels in sorted(neck.in_channels.items())],
        "channels": neck.channels,
        "top_block": neck.identity()["top_block"],
    }
