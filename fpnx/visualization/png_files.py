"""Where the picture of an image goes: its full name below a folder, without collisions, never outside."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fpnx.core.errors import ImageError
from fpnx.core.files import atomic_write
from fpnx.core.text import escape

__all__ = ["PngPaths", "save_png"]

ENDING = ".png"
LONGEST = 255  # bytes of one name on most file systems


class PngPaths:
    """The pictures' paths below `folder`, by the stored paths of all images of a file.

    `cats/01.jpg` goes to `cats/01.jpg.png`. Names that a file system may take for one (it may ignore case, or how
    accents are composed), that are too long, or that are also a folder, get eight digits of their hash.
    """

    def __init__(self, folder: Path, paths: Iterable[str]) -> None:
        self.folder = folder
        self._pictures: Counter[str] = Counter()
        self._folders: set[str] = set()
        for path in paths:
            self._pictures[_folded(path + ENDING)] += 1
            head = os.path.dirname(path)
            while head and (name := _folded(head)) not in self._folders:
                self._folders.add(name)
                head = os.path.dirname(head)

    def __getitem__(self, path: str) -> Path:
        """Where the picture of `path` goes.

        Raises:
            ImageError: for a path that would leave the folder.
        """
        parts = path.split("/")
        if any(part in ("", ".", "..") or "\0" in part or os.sep in part for part in parts):
            raise ImageError(f"its stored path {escape(path)!r} leads out of its folder")
        name = os.fsencode(parts[-1])
        ending = ENDING.encode()
        folded = _folded(path + ENDING)
        if self._pictures[folded] > 1 or folded in self._folders or len(name) + len(ending) > LONGEST:
            digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
            ending = f"~{digest}{ENDING}".encode()
            name = name[: LONGEST - len(ending)]
        return self.folder.joinpath(*parts[:-1], os.fsdecode(name + ending))


def save_png(picture: Image.Image, path: Path, about: dict[str, str]) -> None:
    """Write a PNG with `about` as text in it, whole or not at all; makes the folders above it.

    Raises:
        FpnxError: where it cannot be written.
    """
    info = PngInfo()
    for key, value in about.items():
        info.add_itxt(key, value)
    with atomic_write(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(part, "PNG", pnginfo=info)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()
