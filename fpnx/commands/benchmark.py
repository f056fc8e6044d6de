"""The command `fpnx benchmark`: shapes, costs and timings of configurations side by side."""

from __future__ import annotations

import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fpnx.benchmark.results import BenchmarkResult
from fpnx.benchmark.session import Session
from fpnx.core.config import BenchmarkConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.interrupts import handle_signals
from fpnx.core.text import escape
from fpnx.images.decoding import pillow_limits
from fpnx.inference.devices import resolve_device

__all__ = ["benchmark"]


def benchmark(*, listener: Listener | None = None, **options: Any) -> BenchmarkResult:
    """Measure configurations side by side; `fpnx benchmark` as a function.

    Measurements of the configurations are interleaved (A B A B), so drift of the machine affects all equally. An
    interruption ends the benchmark early and keeps what has been measured.

    Args:
        listener: receives progress events.
        options: the fields of `fpnx.core.config.BenchmarkConfig`.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: before anything was measured.
    """
    config, listener = BenchmarkConfig(**options), listener or Listener()
    if config.plot is not None and not Path(config.plot).absolute().parent.is_dir():
        raise FpnxError(f"plot {escape(config.plot)}: its folder does not exist: make it, or name another")
    for name in config.device.split(","):
        resolve_device(name)
    with handle_signals(listener) as stop, pillow_limits(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fpnx-")))
        session = Session(config, folder, stop, listener)
        stack.callback(session.close)
        result = session.result
        try:
            session.prepare()
            session.measure()
        except Interrupted as error:
            result.interrupted = error.signum
        except KeyboardInterrupt:
            result.interrupted = signal.SIGINT
        if result.interrupted is not None and not any(case.forward for case in result.cases):
            raise Interrupted("interrupted before anything was measured", result.interrupted)
        return result
