"""Stage timers on the device's clock, peak memory, and percentiles of samples."""

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
    """Measures the time of consecutive stages.

    On CUDA a mark is an event on the current stream, without synchronisation; elsewhere it reads the monotonic clock
    after the device has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """Clear all marks and start the first stage."""
        self._synchronise()
        self._marks = [("", self._now())]

    def mark(self, stage: str) -> None:
        """End the stage that began at the last mark; its name is `stage`."""
        self._marks.append((stage, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, summed where a stage occurs several times."""
        self._synchronise()
        seconds: dict[str, float] = {}
        for (_, before), (stage, now) in zip(self._marks, self._marks[1:]):  # noqa: B905
            seconds[stage] = seconds.get(stage, 0.0) + _elapsed(before, now)
        return seconds

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
    """Context manager that measures the peak resident memory of the process and the peak CUDA allocation.

    Attributes:
        rss: peak bytes of the process; where the system cannot reset the peak, that since the process started.
        added: `rss` minus the resident bytes when the block began.
        cuda: peak bytes allocated by torch on `device`; None where it is not CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rss, self.added, self.cuda = 0, 0, None if device.type != "cuda" else 0

    def __enter__(self) -> PeakMemory:
        _release_memory()
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: reset the peak
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
    """Median, 10th and 90th percentile of samples, with linear interpolation."""

    median: float
    low: float
    high: float
    samples: int


def percentiles(samples: Sequence[float]) -> Percentiles:
    """The `Percentiles` of at least one sample."""
    low, median, high = np.percentile(np.asarray(samples, np.float64), (10, 50, 90)).tolist()
    return Percentiles(median, low, high, len(samples))


def _elapsed(before: torch.cuda.Event | float, now: torch.cuda.Event | float) -> float:
    if isinstance(before, float) or isinstance(now, float):
        return float(now) - float(before)
    return float(before.elapsed_time(now)) / 1000


def _release_memory() -> None:
    """Return freed memory to the system, so that it does not count in the next peak."""
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
