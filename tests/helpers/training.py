"""Small trainings: options with which they take little, and comparisons of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

MODEL: dict[str, Any] = {"backbone": "mobilenet_v2", "weights": "random", "size": 64}
# Of the neck and the head, for images and for stored maps.
ABOVE: dict[str, Any] = {"channels": 8, "convolutions": 1, "levels": "P4-P5", "device": "cpu", "epochs": 2}


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    """The parameters in a file."""
    return load_file(file)


def assert_same_weights(one: Path, other: Path) -> None:
    """Every parameter of two files is equal, bit for bit."""
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different, different[:5]
