"""The learning rate at each step, and when a run ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["AUTO_WITHOUT_SCORES", "Schedule"]

WARM_UP_STEPS, WARM_UP_SHARE = 200, 0.1  # the shorter of both; with `auto` at most an epoch
LAST = 0.01  # of the peak, at the end of the cosine
MOST_EPOCHS = 100  # of `auto`, before the rate falls
FALL = 0.5  # of the epochs before it: over how many the rate falls with `auto`
LEAST_GAIN = 0.002  # by which a score must rise to count as better
AUTO_WITHOUT_SCORES = 12  # epochs of `auto` where there is no image for validation


class Schedule:
    """Warm-up, then a cosine to the end.

    With a fixed number of epochs the cosine spans all steps. With `"auto"` the rate stays at its peak until the score
    has not risen for `patience` epochs, then falls along a cosine over half as many epochs as there were, and the run
    ends.

    Args:
        epochs: number, or `"auto"`.
        steps: of an epoch.
        patience: epochs without a better score.
    """

    def __init__(self, epochs: int | str, steps: int, patience: int) -> None:
        self.steps, self.patience = steps, patience
        self.auto = epochs == "auto"
        self.falls_from = 0 if not self.auto else None
        self.epochs: int | None = None if self.auto else int(epochs)

    def factor(self, step: int) -> float:
        """The learning rate at a step, counted over all epochs from 0, relative to its peak."""
        share = 1.0 if self.auto else WARM_UP_SHARE * (self.epochs or 1)
        warm_up = min(WARM_UP_STEPS, math.ceil(share * self.steps))
        rising = min(1.0, (step + 1) / warm_up)
        if self.epochs is None or self.falls_from is None:
            return rising
        first = max(self.falls_from * self.steps, warm_up if not self.auto else 0)
        share = min(1.0, max(0.0, (step - first) / max(1, self.epochs * self.steps - first)))
        return rising * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * share)))

    def after_epoch(self, scores: Sequence[float | None]) -> None:
        """Take note of the scores of all epochs so far."""
        if not self.auto or self.epochs is not None:
            return
        done = len(scores)
        values = [-math.inf if value is None else value for value in scores]
        best, at = -math.inf, 0
        for i, value in enumerate(values):
            if value > best + LEAST_GAIN:
                best, at = value, i
        if done - 1 - at >= self.patience or done >= MOST_EPOCHS:
            self.falls_from = done
            self.epochs = done + max(1, math.ceil(FALL * done))

    def finished(self, epochs_done: int) -> bool:
        """Whether the run has ended."""
        return self.epochs is not None and epochs_done >= self.epochs

    def state(self) -> dict[str, Any]:
        """What changes during a run."""
        return {"falls_from": self.falls_from, "epochs": self.epochs}

    def load(self, state: dict[str, Any]) -> None:
        """Set what `state` returned."""
        self.falls_from, self.epochs = state["falls_from"], state["epochs"]
