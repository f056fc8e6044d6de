"""SIGINT and SIGTERM: the first stops after the batch in progress, the second at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fpnx.core.errors import Interrupted
from fpnx.core.events import Listener

__all__ = ["StopRequest", "handle_signals"]

ECHO = 0.3  # seconds in which a second signal is taken for the same request: `timeout` sends its own twice


class StopRequest:
    """Whether a signal asked the run to stop.

    Before `begin` there is nothing to keep, and a signal raises where it strikes; after it, `signum` is set, and
    only a second one raises.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.begun = False
        self.since = 0.0

    def begin(self) -> None:
        """From now on there is work to keep."""
        self.begun = True


@contextmanager
def handle_signals(listener: Listener) -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM asks to stop after the batch in flight; the second stops at once.

    Signals that are ignored, as in `nohup`, stay so. Outside the main thread nothing is changed.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, _: FrameType | None) -> None:
        if stop.signum is not None and time.monotonic() - stop.since < ECHO:
            return
        if not stop.begun:
            raise Interrupted("interrupted before the first image: nothing was computed", signum)
        listener.stopping(signum, at_once=stop.signum is not None)
        if stop.signum is not None:
            raise Interrupted("interrupted at once: what was committed is kept: continue with --resume", signum)
        stop.signum, stop.since = signum, time.monotonic()

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    before = {signum: handler for signum, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for signum in before:
            signal.signal(signum, ask)
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
