"""The command line as a process, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.files import ROOT

SMALL: dict[str, Any] = {  # options with which an extraction takes little
    "backbone": "mobilenet_v2",
    "weights": "random",
    "size": 64,
    "levels": "P4-P5",
    "channels": 8,
    "device": "cpu",
}


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the powers of root, which permissions do not bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def process(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`fpnx ARGUMENTS` in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "fpnx", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def document(text: str) -> dict[str, Any]:
    """The one JSON document that `text` is."""
    value = json.loads(text)
    assert isinstance(value, dict)
    return value
