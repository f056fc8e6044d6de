"""Runs a script that fpnx is compared with in a process of its own and measures it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from fpnx.benchmark.case import BenchmarkCase
from fpnx.core.errors import FpnxError
from fpnx.models.backbones.factory import create_backbone
from fpnx.models.preprocessing import Recipe
from fpnx.models.pyramid_model import PyramidModel

__all__ = ["BaselineProcess", "baseline_model", "check_installed"]

SCRIPTS = {"plain": "fpnx.benchmark.baseline_script", "openvino": "fpnx.benchmark.openvino_script"}
SECONDS_TO_END = 10


class BaselineProcess:
    """A script on the images of a case, with its parameters and batch size.

    Args:
        kind: `"plain"` or `"openvino"`.

    Attributes:
        rss: peak bytes of its main process so far, without the DataLoader's workers; None where it is not known.
    """

    def __init__(self, case: BenchmarkCase, folder: Path, kind: str) -> None:
        plan, self._kind = case.plan, kind
        folder = folder / f"{kind} {plan.model.backbone}"
        folder.mkdir()
        self.output, self.rss = folder / "out.h5", None
        self._batch_size = case.batch_size
        request = baseline_model(plan.model, plan.recipe, folder / "parameters.pt") | {
            "folder": str(case.files),
            "images": case.images,
            "size": case.size,
            "batch_size": case.batch_size,
            "workers": plan.workers,
            "device": str(plan.device),
            "dtype": plan.config.dtype,
            "output": str(self.output),
        }
        self._log = open(folder / "log", "w+b")  # noqa: SIM115
        # In a new session, so that only this process receives Ctrl-C.
        self._process = subprocess.Popen(
            [sys.executable, "-m", SCRIPTS[kind]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        try:
            self._ask(json.dumps(request))
        except BaseException:
            self.close()
            raise

    def forward(self) -> float:
        """Run one batch through the network; returns milliseconds per image."""
        return 1000 * float(self._ask("forward")["seconds"]) / self._batch_size

    def end_to_end(self) -> float:
        """Write the features of all images to a file; returns images/s."""
        answer = self._ask("end to end")
        self.rss = answer["rss"]
        return float(answer["images_per_second"])

    def features(self, level: str, count: int) -> np.ndarray:
        """The first `count` rows of a level in the file that was written last."""
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
            raise FpnxError(f"the {self._kind} script failed: {last[0]}")
        result: dict[str, Any] = json.loads(answer)
        return result


def check_installed(kinds: Iterable[str]) -> None:
    """Refuse a script whose library is missing.

    Raises:
        FpnxError: with the command that installs it.
    """
    if "openvino" in kinds and importlib.util.find_spec("openvino") is None:
        raise FpnxError("baseline openvino needs OpenVINO: pip install openvino")


def baseline_model(model: PyramidModel, recipe: Recipe, parameters: Path) -> dict[str, Any]:
    """The part of a request to the plain script that describes a model; writes its parameters to a .pt file."""
    torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, parameters)
    return _architecture(model) | {
        "parameters": str(parameters),
        "levels": model.levels,
        "resampling": recipe.resampling,
        "mean": [value / recipe.value_range for value in recipe.mean],
        "std": [value / recipe.value_range for value in recipe.std],
    }


def _architecture(model: PyramidModel) -> dict[str, Any]:
    neck = model.fpn
    if neck.kind != "fpn":
        raise FpnxError(f"the plain script of --baseline has torchvision's FPN, not {neck.kind}: give --pyramid fpn")
    if "variant" in neck.identity():
        raise FpnxError(f"the plain script of --baseline has a whole FPN, not {neck.variant}: take other weights")
    return {
        "backbone": model.backbone,
        "nodes": {node: f"C{level}" for level, node in create_backbone(model.backbone, seed=0).nodes.items()},
        "first_level": min(neck.in_channels),
        "in_channels": [channels for _, channels in sorted(neck.in_channels.items())],
        "channels": neck.channels,
        "top_block": neck.identity()["top_block"],
    }
