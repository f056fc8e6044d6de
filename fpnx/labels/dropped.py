"""Counting annotations that cannot be used, by reason, with an example of each."""

from __future__ import annotations

import math

from fpnx.core.text import escape
from fpnx.labels.annotations import Dropped

__all__ = [
    "BAD_OUTLINE",
    "DUPLICATE",
    "EMPTY_BOX",
    "NOT_A_NUMBER",
    "NO_OUTLINE",
    "OUTSIDE",
    "REVERSED_BOX",
    "UNKNOWN_CLASS",
    "DropCounter",
    "box_problem",
]

MAX_EXAMPLE = 300  # characters

EMPTY_BOX = "empty boxes"
REVERSED_BOX = "reversed boxes"
NOT_A_NUMBER = "boxes with values that are not finite numbers"
OUTSIDE = "boxes outside of their image"
DUPLICATE = "duplicates"
UNKNOWN_CLASS = "objects of an unknown class"
BAD_OUTLINE = "outlines that cannot be drawn"
NO_OUTLINE = "objects without an outline"


class DropCounter:
    """Counts what is dropped, by reason in the order of their first appearance."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, reason: str, what: str, image: str = "") -> None:
        """Count one. `what` names it, such as `"annotation 17"`, and `image` is its image."""
        if reason not in self._counts:
            self._counts[reason] = 0
            self._examples[reason] = escape(f"{what} of {image}" if image else what)[:MAX_EXAMPLE]
        self._counts[reason] += 1

    @property
    def total(self) -> int:
        """How many were dropped, for any reason."""
        return sum(self._counts.values())

    def result(self) -> dict[str, Dropped]:
        """The counts so far."""
        return {reason: Dropped(count, self._examples[reason]) for reason, count in self._counts.items()}

    def words(self) -> str:
        """All reasons in one line: `"empty boxes (3), such as annotation 17 of a.jpg; …"`."""
        return "; ".join(f"{why} ({each.count}), such as {each.example}" for why, each in self.result().items())


def box_problem(x1: float, y1: float, x2: float, y2: float) -> str | None:
    """The reason why these corners are no box; None where they are one."""
    if not (math.isfinite(x1) and math.isfinite(y1) and math.isfinite(x2) and math.isfinite(y2)):
        return NOT_A_NUMBER
    if x2 < x1 or y2 < y1:
        return REVERSED_BOX
    return EMPTY_BOX if x2 == x1 or y2 == y1 else None
