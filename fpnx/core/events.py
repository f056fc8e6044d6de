"""How a run talks to whoever started it: progress and messages out, a request to stop in."""

from __future__ import annotations

from fpnx.core.plan_summary import PlanSummary

__all__ = ["Listener"]


class Listener:
    """Receives progress events; the base class ignores them."""

    def planned(self, plan: PlanSummary) -> None:
        """The run is planned: called once, before any work."""

    def progress(self, what: str, done: int, total: int) -> None:
        """`what` is "headers" or "images"; again and again, from the calling thread."""

    def status(self, text: str) -> None:
        """How the work stands over all workers of an engine, in a few words; before each `progress`."""

    def message(self, text: str) -> None:
        """Something that the user should know."""

    def stopping(self, signum: int, at_once: bool) -> None:
        """A signal asked to stop, after the batch in flight or at once.

        Called inside the signal handler: whatever takes a lock or writes to a buffered stream may hang here.
        """
