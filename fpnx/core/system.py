"""What this process may use of the machine: processors, memory."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

__all__ = ["available_memory", "release_freed_memory", "keep_freed_memory", "usable_cpus"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Processors that this process may keep busy: its affinity, within the quota of its control groups (v1, v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _own_groups("cpu", proc, cgroups) if (quota := _cpu_quota(folder)) is not None]
    return max(1, min(count, *(math.ceil(quota) for quota in quotas))) if quotas else count


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that can be had without swapping: what the system calls available, within the control groups' limits."""
    found = []
    for line in _text(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for folder in _own_groups("memory", proc, cgroups):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                found.append(max(int(most) - int(used), 0))
    return min(found, default=4 * 2**30)  # elsewhere than on Linux: assume little


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for what it takes next; with another C library nothing happens.

    By default large blocks go back to the system, which zeroes every page of the next one: up to a fifth of the time
    that small networks take. Threads get no arenas of their own, since those end with a heap that is empty for a
    moment. What can be in use at once does not change.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
            library.mallopt(M_TRIM_THRESHOLD, 1 << 30)
            library.mallopt(M_ARENA_MAX, 1)


def release_freed_memory() -> None:
    """Have glibc hand what is free by now back to the system, after all; with another C library nothing happens.

    For the moments at which something large has gone: between what is still in use, little of that comes to use again.
    It takes milliseconds.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _own_groups(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Folders of the control groups that hold this process, from the innermost out; limits of all of them count."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for base in (cgroups / controllers, cgroups / controller) if controllers else (cgroups,):
            inner = PurePosixPath(path)
            # Inside a container the path may be the host's, and what is mounted here its own group alone.
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
    return None  # "max", -1, or no such controller


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
