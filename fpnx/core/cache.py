"""On-disk cache of stage-detection results."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "load_entry", "save_entry"]


def cache_folder() -> Path:
    """`fpnx` in `$XDG_CACHE_HOME`, or in `~/.cache`; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fpnx"


def load_entry(key: str) -> dict[str, Any] | None:
    """What `save_entry` kept under `key`; None where there is nothing whole."""
    try:
        content = json.loads(_file(key).read_bytes())
    except (OSError, ValueError):
        return None
    return content["value"] if isinstance(content, dict) and content.get("key") == key and "value" in content else None


def save_entry(key: str, value: dict[str, Any]) -> None:
    """Keep `value` under `key`, in one step, so that no reader sees half of it; silent where it cannot be written."""
    file, part = _file(key), None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent, prefix=".part-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({"key": key, "value": value}, stream)
        os.replace(part, file)
    except OSError:
        if part is not None and os.path.exists(part):
            os.unlink(part)


def _file(key: str) -> Path:
    return cache_folder() / "stages" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
