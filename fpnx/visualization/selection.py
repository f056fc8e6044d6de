"""Selection of a file's images by name, glob, index or range."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from fpnx.core.errors import FpnxError
from fpnx.core.names import NameIndex, normal_form
from fpnx.core.text import did_you_mean, escape

__all__ = ["select"]

MAX_CANDIDATES = 5000  # stored names that a misspelt name is compared with


def select(paths: Sequence[str], wanted: Iterable[str] | None) -> list[int]:
    """Rows of the images that `wanted` selects, in the file's order; all rows where it is None.

    An exact name comes first, then an index (`"3"`), a range without its end (`"0:10"`), and a glob (`"cats/*"`,
    where `*` also crosses folders). Names and globs may differ from the stored names in Unicode normalisation.

    Raises:
        FpnxError: for an entry that selects no image.
    """
    if wanted is None:
        return list(range(len(paths)))
    index = NameIndex(paths)
    chosen: set[int] = set()
    for entry in wanted:
        if (row := index.get(entry)) is not None:
            chosen.add(row)
            continue
        numbers = re.fullmatch(r"(\d*)(:?)(\d*)", entry, re.ASCII)
        if numbers and (numbers[1] or numbers[2]):
            start = int(numbers[1] or 0)
            end = (int(numbers[3]) if numbers[3] else len(paths)) if numbers[2] else start + 1
            rows = list(range(start, min(end, len(paths))))
        else:
            rows = [row for row, path in enumerate(paths) if fnmatch.fnmatchcase(path, entry)]
            if not rows and not entry.isascii():
                form = normal_form(entry)
                rows = [row for row, path in enumerate(paths) if fnmatch.fnmatchcase(normal_form(path), form)]
        if not rows:
            suggestion = did_you_mean(entry, map(escape, paths[:MAX_CANDIDATES]))
            raise FpnxError(
                f"no image {escape(entry)!r} among {len(paths)}{suggestion}: take a stored name, a glob such "
                f"as 'cats/*', an index from 0 to {len(paths) - 1}, or a range such as 0:10"
            )
        chosen.update(rows)
    return sorted(chosen)
