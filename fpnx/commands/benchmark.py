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

    In each round every configuration is measured once after the other (A B A B), so drift of the machine
    affects all equally. An interruption ends it early with what has been measured.

    Args:
        listener: hears of the progress.
        options: the fields of `fpnx.core.config.BenchmarkConfig`.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: before anything was measured.
    """
    config, hears = BenchmarkConfig(**options), listener or Listener()
    if config.plot is not None and not Path(config.plot).absolute().parent.is_dir():
        raise FpnxError(f"plot {escape(config.plot)}: its folder does not exist: make it, or name another")
    for name in config.device.split(","):
        resolve_device(name)
    with handle_signals(hears) as stop, pillow_limits(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fpnx-")))
        session = Session(config, folder, stop, hears)
        stack.callback(session.close)
        findings = session.findings
        try:
            session.prepare()
            session.measure()
        except Interrupted as error:
            findings.interrupted = error.signum
        except KeyboardInterrupt:
            findings.interrupted = signal.SIGINT
        if findings.interrupted is not None and not any(column.forward for column in findings.columns):
            raise Interrupted("interrupted before anything was measured", findings.interrupted)
        return findings
