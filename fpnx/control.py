"""How a run talks to whoever started it: progress and messages out, a request to stop in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from fpnx.errors import Interrupted

if TYPE_CHECKING:
    from fpnx.planning import Plan

__all__ = ["Listener", "Stop", "stoppable"]


class Listener:
    """Hears of a run's progress; this one is silent."""

    def planned(self, plan: Plan) -> None:
        """Once, before any work."""

    def progress(self, what: str, done: int, total: int) -> None:
        """`what` is "headers" or "images"; again and again, from the calling thread."""

    def message(self, text: str) -> None:
        """Something that the user should know."""


class Stop:
    """Whether a signal asked the run to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def check(self) -> None:
        """Raise, where nothing has been computed yet that is worth keeping."""
        if self.signum is not None:
            raise Interrupted("interrupted before the first image: nothing was written", self.signum)


@contextmanager
def stoppable(listener: Listener) -> Iterator[Stop]:
    """The first SIGINT or SIGTERM asks to stop after the batch in flight; the second stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, _: FrameType | None) -> None:
        if stop.signum is not None:
            raise Interrupted("interrupted at once: what was committed is kept: continue with --resume", signum)
        stop.signum = signum
        listener.message("stopping after this batch (again to stop at once)")

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
