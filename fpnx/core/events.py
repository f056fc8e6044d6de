"""Progress events of a run: the base class of all listeners."""

from __future__ import annotations

from fpnx.core.plan_summary import PlanSummary
from fpnx.core.training_summary import TrainingSummary

__all__ = ["Listener"]


class Listener:
    """Receives progress events; the base class ignores them."""

    def planned(self, plan: PlanSummary) -> None:
        """The run is planned. Called once, before any image is computed."""

    def training_planned(self, plan: TrainingSummary) -> None:
        """A training is planned. Called once, before its first step."""

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` "headers" or "images" are finished. Called repeatedly, from the thread that runs."""

    def status(self, text: str) -> None:
        """A short summary: over all workers of a distributed run, or of a training. Called before `progress`."""

    def message(self, text: str) -> None:
        """A note for the user."""

    def stopping(self, signum: int, at_once: bool) -> None:
        """A signal asked to stop: after the current batch, or at once.

        Called inside the signal handler: code that takes a lock or writes to a buffered stream may deadlock here.
        """
