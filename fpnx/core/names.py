"""Looking up names of files: a name is also found by one that differs from it in Unicode normalisation alone.

`é` is one character, or an `e` and an accent. macOS writes the second into archives and onto other disks, keyboards and
tables write the first, and both look alike.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import AnyStr

__all__ = ["NameIndex", "normal_form", "same_name"]


def normal_form(name: str | bytes) -> str:
    """A name in Unicode's normal form C; bytes that are not UTF-8 stay as they are."""
    return unicodedata.normalize("NFC", os.fsdecode(name))


def same_name(name: AnyStr, names: Iterable[AnyStr]) -> AnyStr | None:
    """The one of `names` with the normal form of `name`; None where there is none, or several."""
    if name.isascii():
        return None
    form = normal_form(name)
    found = [other for other in names if not other.isascii() and normal_form(other) == form]
    return found[0] if len(found) == 1 else None


class NameIndex:
    """Positions of names. An exact name comes first, then the only one with the same normal form."""

    def __init__(self, names: Sequence[str]) -> None:
        self._positions = {name: position for position, name in enumerate(names)}
        self._by_form: dict[str, list[int]] | None = None

    def get(self, name: str) -> int | None:
        """Position of a name; None where there is none."""
        if name in self._positions or name.isascii():
            return self._positions.get(name)
        if self._by_form is None:
            self._by_form = {}
            for other, position in self._positions.items():
                if not other.isascii():
                    self._by_form.setdefault(normal_form(other), []).append(position)
        found = self._by_form.get(normal_form(name), [])
        return found[0] if len(found) == 1 else None
