"""How a training ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fpnx.core.training_summary import TrainingSummary
from fpnx.evaluation.scores import Scores
from fpnx.training.loop import Epoch

__all__ = ["TrainResult"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a training ended.

    Attributes:
        output: the file with the trained weights.
        scores: of the best epoch on the images held out; None without such images.
        best: number of that epoch, from 1.
        epochs: all epochs.
        failed: name → reason, of images that could not be read and were left out.
        seconds: of all epochs.
        plan: what was trained on what.
    """

    output: str
    scores: Scores | None
    best: int
    epochs: tuple[Epoch, ...]
    failed: Mapping[str, str]
    plan: TrainingSummary = field(repr=False)

    @property
    def seconds(self) -> float:
        """Seconds of all epochs, with those of an earlier run."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def images_per_second(self) -> float:
        """Images of the training per second, validation included."""
        return sum(epoch.images for epoch in self.epochs) / self.seconds if self.seconds else 0.0

    @property
    def exit_code(self) -> int:
        """1 where images could not be read, else 0."""
        return 1 if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            **self.plan.to_json(),
            "scores": None if self.scores is None else self.scores.to_json(),
            "best_epoch": self.best,
            "history": [epoch.to_json() for epoch in self.epochs],
            "failed": [{"path": name, "reason": reason} for name, reason in self.failed.items()],
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "exit_code": self.exit_code,
        }
