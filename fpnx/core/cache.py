"""On-disk cache of small JSON values, such as stage-detection results, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

from fpnx.core.files import replace_file

__all__ = ["cache_folder", "load_entry", "save_entry"]


def cache_folder() -> Path:
    """`fpnx` in the platform's cache folder (`$XDG_CACHE_HOME` or `~/.cache` on Linux); it need not exist."""
    return Path(platformdirs.user_cache_dir("fpnx"))


def load_entry(key: str) -> dict[str, Any] | None:
    """The value that `save_entry` stored under `key`; None where there is no entry, or a damaged one."""
    try:
        content = json.loads(_entry_path(key).read_bytes())
    except (OSError, ValueError):
        return None
    return content["value"] if isinstance(content, dict) and content.get("key") == key and "value" in content else None


def save_entry(key: str, value: dict[str, Any]) -> None:
    """Store `value` under `key`. The write is atomic; a cache that cannot be written is ignored."""
    path = _entry_path(key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [json.dumps({"key": key, "value": value}).encode()])


def _entry_path(key: str) -> Path:
    return cache_folder() / "stages" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
