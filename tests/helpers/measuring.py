"""Benchmarks that measure for a short time, for tests of what is measured and shown."""

from __future__ import annotations

import pytest


def measure_briefly(patch: pytest.MonkeyPatch) -> None:
    """Let end-to-end runs, matrix products and writes be as short as they can be."""
    patch.setattr("fpnx.benchmark.case.TARGET_SECONDS", 0.01)
    patch.setattr("fpnx.benchmark.roofline.MIN_SECONDS", 1e-4)
    patch.setattr("fpnx.benchmark.session.DISK_BYTES", (4 << 20, 4 << 20))
