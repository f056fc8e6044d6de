"""Handling of SIGINT and SIGTERM: the first stops after the current batch, the second at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fpnx.core.errors import Interrupted
from fpnx.core.events import Listener

__all__ = ["StopRequest", "handle_signals", "while_loading"]

DUPLICATE_SECONDS = 0.3  # a second signal within this time is ignored: `timeout` sends its signal twice


class StopRequest:
    """Whether a signal asked the run to stop; `signum` is that signal, or None.

    Before `begin` there is no work to keep, and the first signal raises Interrupted. After it, the first signal sets
    `signum`, and the second raises.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.begun = False
        self.since = 0.0

    def begin(self) -> None:
        """Mark the start of the work that must be kept."""
        self.begun = True


@contextmanager
def while_loading() -> Iterator[None]:
    """Within the block, in which modules are loaded, Ctrl-C raises Interrupted, which says that nothing was written."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted while loading: nothing was written", signal.SIGINT) from None


@contextmanager
def handle_signals(listener: Listener) -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM inside the block; yields the StopRequest that they set.

    The first signal asks to stop after the current batch; the second raises Interrupted at once. Signals that are
    ignored, as under `nohup`, stay ignored. Outside the main thread nothing is changed.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, _: FrameType | None) -> None:
        if stop.signum is not None and time.monotonic() - stop.since < DUPLICATE_SECONDS:
            return
        if not stop.begun:
            raise Interrupted("interrupted before the first image: nothing was computed", signum)
        listener.stopping(signum, at_once=stop.signum is not None)
        if stop.signum is not None:
            raise Interrupted("interrupted at once: what was committed is kept: continue with --resume", signum)
        stop.signum, stop.since = signum, time.monotonic()

    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    previous = {signum: handler for signum, handler in previous.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for signum in previous:
            signal.signal(signum, handle)
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
