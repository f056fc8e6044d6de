"""Time and memory: marks on a device's own clock, what a run peaked at, and what samples say together."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fpnx.core.system import release_freed_memory

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["PeakMemory", "Percentiles", "Stopwatch", "percentiles"]


class Stopwatch:
    """Splits what goes on between two marks into stages.

    On CUDA a mark is an event on the current stream, which delays nothing; elsewhere it reads the monotonic clock,
    after the device has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """Forget all marks; time runs from here."""
        self._synchronise()
        self._marks = [("", self._now())]

    def mark(self, stage: str) -> None:
        """What went on since the last mark was `stage`."""
        self._marks.append((stage, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, summed over its marks."""
        self._synchronise()
        spent: dict[str, float] = {}
        for (_, before), (stage, now) in zip(self._marks, self._marks[1:]):  # noqa: B905
            spent[stage] = spent.get(stage, 0.0) + _between(before, now)
        return spent

    def _now(self) -> torch.cuda.Event | float:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class PeakMemory:
    """The greatest resident memory of this process, and CUDA's greatest allocation, while the block ran.

    Attributes:
        rss: bytes of the whole process; where the system keeps only one peak for a process's whole life, that.
        added: how much of it came on top of what was resident when the block began.
        cuda: bytes that torch held at most on `device`; None elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rss, self.added, self.cuda = 0, 0, None if device.type != "cuda" else 0

    def __enter__(self) -> PeakMemory:
        _give_back()
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: begin a new peak
        self._before = _status("VmRSS") or _lifetime_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.rss = _status("VmHWM") or _lifetime_peak()
        self.added = max(self.rss - self._before, 0)
        if self._device.type == "cuda":
            self.cuda = torch.cuda.max_memory_allocated(self._device)


@dataclass(frozen=True)
class Percentiles:
    """What samples say together: the median, and the 10th and 90th percentile (linear between samples)."""

    median: float
    low: float
    high: float
    samples: int


def percentiles(samples: Sequence[float]) -> Percentiles:
    """At least one sample → its `Percentiles`."""
    low, median, high = np.percentile(np.asarray(samples, np.float64), (10, 50, 90)).tolist()
    return Percentiles(median, low, high, len(samples))


def _between(before: torch.cuda.Event | float, now: torch.cuda.Event | float) -> float:
    if isinstance(before, float) or isinstance(now, float):
        return float(now) - float(before)
    return float(before.elapsed_time(now)) / 1000


def _give_back() -> None:
    """Return freed memory to the system, so that the next peak is that of the next run."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    release_freed_memory()


def _status(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next((1024 * int(line.split()[1]) for line in file if line.startswith(f"{name}:")), 0)
    return 0


def _lifetime_peak() -> int:
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
