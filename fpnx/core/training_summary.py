"""Summary of a planned training in plain values, for listeners, tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fpnx.core.provenance import WeightsInfo

__all__ = ["TrainingSummary"]


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What is going to be trained on what, known before the first step.

    Attributes:
        output: the file to write.
        source: where the images or their maps are.
        stored: whether maps are read from a file, and the backbone is not run.
        label_lines, labels: what the labels hold, in words and as values for JSON.
        training, validation: numbers of images to train on, and held out.
        head, task: what is trained for what.
        backbone, pyramid, levels: of the model.
        weights: where its parameters come from.
        recipe: the preprocessing, in words.
        augmented: whether images are changed at random.
        parameters: part (`"backbone"`, `"pyramid"`, `"head"`) → numbers of `"frozen"` and `"trained"` parameters.
        device, precision, processes, batch_size: how it is computed.
        learning_rate: its peak.
        epochs: how many, or `"auto"`.
        epochs_before: done by an earlier run.
    """

    output: str
    source: str
    stored: bool
    label_lines: tuple[str, ...]
    labels: Mapping[str, Any]
    training: int
    validation: int
    head: str
    task: str
    backbone: str
    pyramid: str
    levels: tuple[str, ...]
    weights: WeightsInfo
    recipe: str
    augmented: bool
    parameters: Mapping[str, Mapping[str, int]]
    device: str
    precision: str
    processes: int
    batch_size: int
    learning_rate: float
    epochs: int | str
    epochs_before: int

    @property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return sum(part["trained"] for part in self.parameters.values())

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "output": self.output,
            "source": self.source,
            "stored": self.stored,
            "labels": dict(self.labels),
            "training": self.training,
            "validation": self.validation,
            "head": self.head,
            "task": self.task,
            "backbone": self.backbone,
            "pyramid": self.pyramid,
            "levels": list(self.levels),
            "weights": self.weights.to_json(),
            "recipe": self.recipe,
            "augmented": self.augmented,
            "parameters": {name: dict(part) for name, part in self.parameters.items()},
            "device": self.device,
            "precision": self.precision,
            "processes": self.processes,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
        }
