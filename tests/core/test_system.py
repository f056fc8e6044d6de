"""Usable processors and memory, from files as Linux has them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fpnx.core.system import available_memory, usable_cpus

ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write_files(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc", root / "cgroup"


V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/job/7\n3:memory:/job\n"}
NESTED = {"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/cpu.max": "max 100000\n"}


def v1(folder: str, quota: str) -> dict[str, str]:
    return {**V1, f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        pytest.param({}, None, id="no-groups"),
        pytest.param(NESTED, None, id="v2-max"),
        pytest.param({**NESTED, "cgroup/a/b/cpu.max": "50000 100000\n"}, 1, id="v2-half"),
        pytest.param({**NESTED, "cgroup/a/cpu.max": "90000 100000\n"}, 1, id="v2-parent"),
        pytest.param({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "100000 100000\n"}, 1, id="v2-root"),
        pytest.param({"proc/self/cgroup": "0::/outside\n", "cgroup/cpu.max": "100 100\n"}, 1, id="v2-container"),
        pytest.param(v1("cgroup/cpu,cpuacct/job/7", "-1"), None, id="v1-unlimited"),
        pytest.param(v1("cgroup/cpu,cpuacct/job", "20000"), 1, id="v1-parent"),
        pytest.param(v1("cgroup/cpu", "100000"), 1, id="v1-other-mount"),
        pytest.param({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "99900000 100000\n"}, 999, id="ample"),
    ],
)
def test_processors_within_affinity_and_quota(tmp_path, files, quota):
    proc, cgroups = write_files(tmp_path, files)
    assert usable_cpus(proc, cgroups) == min(ALLOWED, quota or ALLOWED)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or ALLOWED < 2, reason="needs two processors to choose from")
def test_affinity_is_respected(tmp_path):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cpus(tmp_path, tmp_path) == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("files", "bytes_free"),
    [
        ({}, 4 * 2**30),
        ({"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    3000 kB\n"}, 3000 * 1024),
        (
            {
                "proc/meminfo": "MemAvailable: 3000 kB\n",
                "proc/self/cgroup": "0::/a\n",
                "cgroup/a/memory.max": "1000000\n",
                "cgroup/a/memory.current": "400000\n",
            },
            600000,
        ),
        (
            {
                **V1,
                "cgroup/memory/job/memory.limit_in_bytes": "5000\n",
                "cgroup/memory/job/memory.usage_in_bytes": "7000\n",
            },
            0,
        ),
        (
            {"proc/meminfo": "MemAvailable: 1 kB", "proc/self/cgroup": "0::/a\n", "cgroup/a/memory.max": "max\n"},
            1024,
        ),
    ],
    ids=["unknown", "system", "v2", "v1-overdrawn", "v2-max"],
)
def test_memory_within_limits(tmp_path, files, bytes_free):
    assert available_memory(*write_files(tmp_path, files)) == bytes_free


MEMORY = """
import os
import platform
import subprocess
import sys
import numpy as np
from fpnx.core.system import keep_freed_memory, release_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
keep_freed_memory()
blocks = [np.ones(20 << 20, np.uint8) for _ in range(10)]
print(resident())
del blocks
print(resident())
release_freed_memory()
print(resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    allocated, kept, released = (int(line) >> 20 for line in done.stdout.split())
    assert allocated - kept < 20
    assert kept - released > 180
