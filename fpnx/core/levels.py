"""Names of levels: C2 to C7 are taps, P2 to P7 pyramid levels; level k has stride 2^k, or the nearest that there is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from fpnx.core.errors import FpnxError

__all__ = [
    "LEVELS",
    "level_number",
    "level_of_stride",
    "level_place",
    "ordered_levels",
    "parse_levels",
    "UNSTRIDED_LEVELS",
]

LEVELS = (*(f"C{k}" for k in range(2, 8)), *(f"P{k}" for k in range(2, 8)))
# torchvision's level names, fine to coarse; used where there is not one level per stride (MobileNetV3).
UNSTRIDED_LEVELS = ("0", "1", "pool")


def parse_levels(levels: str | Iterable[str]) -> tuple[str, ...]:
    """`"P3-P7"`, `"C3,P3"` or a sequence of names → names, fine to coarse, C before P.

    Raises:
        FpnxError: for an unknown level, an empty or reversed range, or a level named twice.
    """
    if not isinstance(levels, Iterable):
        raise FpnxError(f"levels {levels!r}: take names and ranges such as P2-P5, P3-P7 or C3,P3")
    names: list[str] = []
    for part in levels.split(",") if isinstance(levels, str) else levels:
        if str(part).strip() in UNSTRIDED_LEVELS:
            names.append(str(part).strip())
            continue
        match = re.fullmatch(r"([CP])([2-7])(?:-(?:([CP]))?([2-7]))?", str(part).strip().upper())
        if match is None or (match[3] or match[1]) != match[1] or int(match[4] or match[2]) < int(match[2]):
            backwards = match is not None and (match[3] or match[1]) == match[1]
            why = "a range goes from fine to coarse" if backwards else "levels are C2 to C7 and P2 to P7"
            raise FpnxError(f"level {part!r}: {why}: take names and ranges such as P2-P5, P3-P7 or C3,P3")
        names += [f"{match[1]}{n}" for n in range(int(match[2]), int(match[4] or match[2]) + 1)]
    if not names:
        raise FpnxError("no levels: take names and ranges such as P2-P5, P3-P7 or C3,P3")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise FpnxError(f"level {twice} is named twice")
    return ordered_levels(names)


def ordered_levels(names: Iterable[str]) -> tuple[str, ...]:
    """Level names from fine to coarse, C before P of the same stride."""
    return tuple(sorted(names, key=lambda name: (level_place(name), name[0])))


def level_place(name: str) -> int:
    """Position of a level from fine to coarse: k, or its index in `UNSTRIDED_LEVELS`."""
    return UNSTRIDED_LEVELS.index(name) if name in UNSTRIDED_LEVELS else level_number(name)


def level_number(name: str) -> int:
    """k of `"Pk"` or `"Ck"`: the level of stride 2^k."""
    return int(name[1:])


def level_of_stride(stride: float) -> int:
    """k of the level whose stride 2^k is nearest to `stride`, as a ratio: 4 for 14 and 16."""
    return round(math.log2(stride))
