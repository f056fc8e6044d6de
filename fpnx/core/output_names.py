"""Paths of output files below a folder, one for each image, without name collisions."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fpnx.core.errors import ImageError
from fpnx.core.text import escape

__all__ = ["OutputPaths", "name_digest"]

MAX_NAME_BYTES = 255  # bytes of one name on most file systems


class OutputPaths:
    """Maps each image's stored path to the path of its own output file below `folder`.

    With the suffix `.png`, `cats/01.jpg` becomes `cats/01.jpg.png`. Eight digits of a hash are added to names that a
    file system may treat as equal (because of case or Unicode composition), that are too long, or that are also the
    name of a folder.
    """

    def __init__(self, folder: Path, paths: Iterable[str], suffix: str) -> None:
        self.folder, self._suffix = folder, suffix
        self._names: Counter[str] = Counter()
        self._folders: set[str] = set()
        for path in paths:
            self._names[_normalized(path + self._suffix)] += 1
            parent = os.path.dirname(path)
            while parent and (name := _normalized(parent)) not in self._folders:
                self._folders.add(name)
                parent = os.path.dirname(parent)

    def __getitem__(self, path: str) -> Path:
        """Path of the file for the stored path `path`.

        Raises:
            ImageError: for a path that would leave the folder.
        """
        parts = path.split("/")
        if any(part in ("", ".", "..") or "\0" in part or os.sep in part for part in parts):
            raise ImageError(f"its stored path {escape(path)!r} leads out of its folder")
        name = os.fsencode(parts[-1])
        suffix = self._suffix.encode()
        normalized = _normalized(path + self._suffix)
        if self._names[normalized] > 1 or normalized in self._folders or len(name) + len(suffix) > MAX_NAME_BYTES:
            suffix = f"~{name_digest(path)}{self._suffix}".encode()
            name = name[: MAX_NAME_BYTES - len(suffix)]
        return self.folder.joinpath(*parts[:-1], os.fsdecode(name + suffix))


def name_digest(path: str) -> str:
    """Eight hexadecimal digits of the hash of a stored path."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


def _normalized(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()
