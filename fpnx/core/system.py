"""Processors, memory and network that this process may use, and control of glibc's memory allocator."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape

__all__ = ["available_memory", "downloads_forbidden", "release_freed_memory", "keep_freed_memory", "usable_cpus"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Processors that this process may use: its affinity, limited by the CPU quota of its control groups (v1, v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _own_groups("cpu", proc, cgroups) if (quota := _cpu_quota(folder)) is not None]
    return max(1, min(count, *(math.ceil(quota) for quota in quotas))) if quotas else count


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that can be allocated without swapping: MemAvailable, limited by the control groups (v1, v2)."""
    limits = []
    for line in _text(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for folder in _own_groups("memory", proc, cgroups):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            maximum, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if maximum.isdigit() and used.isdigit():
                limits.append(max(int(maximum) - int(used), 0))
    return min(limits, default=4 * 2**30)  # other systems than Linux: a low estimate


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation; with another C library, do nothing.

    By default large blocks are returned to the system, which zeroes the pages of each new one: up to a fifth of the
    time of a small network. Threads share one arena, because the heap of an extra arena is unmapped whenever it is
    empty. Peak memory does not change.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc accepts
            library.mallopt(M_TRIM_THRESHOLD, 1 << 30)
            library.mallopt(M_ARENA_MAX, 1)


def release_freed_memory() -> None:
    """Make glibc return free memory to the system; with another C library, do nothing.

    Call it after large objects are freed: because of fragmentation, little of their memory would be reused. It takes
    milliseconds.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _own_groups(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Folders of the control groups of this process, innermost first; the limits of all of them apply."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for base in (cgroups / controllers, cgroups / controller) if controllers else (cgroups,):
            inner = PurePosixPath(path)
            # In a container the path may be the host's, while only the container's own group is mounted here.
            for group in (inner, *inner.parents):
                folder = base / group.relative_to("/")
                if folder.is_dir():
                    yield folder


def _cpu_quota(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    if not words:
        words = [_text(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    return None  # no limit ("max" or -1), or no such controller


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def downloads_forbidden() -> bool:
    """Whether the environment variable `FPNX_OFFLINE` forbids downloads.

    Raises:
        FpnxError: its value is neither true nor false.
    """
    value = os.environ.get("FPNX_OFFLINE", "")
    if value.lower() not in ("", "0", "1", "false", "true", "no", "yes", "off", "on"):
        raise FpnxError(f"FPNX_OFFLINE={escape(value)}: take 1, which forbids downloads, or 0")
    return value.lower() in ("1", "true", "yes", "on")
