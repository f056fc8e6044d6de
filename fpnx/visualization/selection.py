"""Which images of a file are meant: by name, glob, index or range."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from fpnx.core.errors import FpnxError
from fpnx.core.text import did_you_mean, escape

__all__ = ["select"]

LOOKED_AT = 5000  # names that a misspelt one is compared with


def select(paths: Sequence[str], wanted: Iterable[str] | None) -> list[int]:
    """Rows of the images that `wanted` means, in the file's order; all where it is None.

    An exact name comes first, then an index (`"3"`), a range without its end (`"0:10"`), and a glob (`"cats/*"`,
    where `*` also crosses folders).

    Raises:
        FpnxError: for one that means no image.
    """
    if wanted is None:
        return list(range(len(paths)))
    index = {path: row for row, path in enumerate(paths)}
    chosen: set[int] = set()
    for one in wanted:
        if one in index:
            chosen.add(index[one])
            continue
        numbers = re.fullmatch(r"(\d*)(:?)(\d*)", one, re.ASCII)
        if numbers and (numbers[1] or numbers[2]):
            start = int(numbers[1] or 0)
            end = (int(numbers[3]) if numbers[3] else len(paths)) if numbers[2] else start + 1
            found = list(range(start, min(end, len(paths))))
        else:
            found = [row for row, path in enumerate(paths) if fnmatch.fnmatchcase(path, one)]
        if not found:
            near = did_you_mean(one, map(escape, paths[:LOOKED_AT]))
            raise FpnxError(
                f"no image {escape(one)!r} among {len(paths)}{near}: take a stored name, a glob such "
                f"as 'cats/*', an index from 0 to {len(paths) - 1}, or a range such as 0:10"
            )
        chosen.update(found)
    return sorted(chosen)
