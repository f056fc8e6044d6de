"""Scores of one evaluation: the numbers, the table of classes, and their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fpnx.core.text import escape, plural
from fpnx.labels.annotations import Task

__all__ = ["ClassRow", "Confusion", "Scores", "Value", "finite_mean", "share"]

MAX_ROWS = 40  # of the table of classes in the text
MAX_NAME = 32  # characters of a class in the text
COLUMNS = 80

# A score; None where there is nothing to score, such as the AP of a class without objects.
Value = float | None


@dataclass(frozen=True)
class ClassRow:
    """The scores of one class.

    Attributes:
        id, name: of the class in the label file.
        count: how many objects, images or pixels are labelled with it.
        values: its scores by name.
    """

    id: int
    name: str
    count: int
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Confusion:
    """How often images of one class were taken for another.

    Attributes:
        labelled, predicted: names of the classes.
        count: number of images.
    """

    labelled: str
    predicted: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of predictions against the labels of some images.

    Attributes:
        task: what was predicted.
        main: the name of the score that decides which of two models is better; higher is better.
        images: number of images.
        values: all scores by name, each 0 to 1, or None where no label says anything about it.
        classes: one row for each class, in the order of the label file.
        counted: what `ClassRow.count` counts: `"objects"`, `"images"` or `"pixels"`.
        confusions: the most frequent confusions, for classification with one class for each image.
    """

    task: Task
    main: str
    images: int
    values: Mapping[str, Value]
    classes: Sequence[ClassRow] = ()
    counted: str = "objects"
    confusions: Sequence[Confusion] = field(default=())

    @property
    def value(self) -> Value:
        """The main score."""
        return self.values[self.main]

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; `from_json` reads them."""
        return {
            "task": self.task,
            "main": self.main,
            "value": self.value,
            "images": self.images,
            "values": dict(self.values),
            "counted": self.counted,
            "classes": [
                {"id": row.id, "name": row.name, "count": row.count, "values": dict(row.values)} for row in self.classes
            ],
            "confusions": [
                {"labelled": pair.labelled, "predicted": pair.predicted, "count": pair.count}
                for pair in self.confusions
            ],
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Scores:
        """The scores that `to_json` returned."""
        return cls(
            task=facts["task"],
            main=facts["main"],
            images=facts["images"],
            values=dict(facts["values"]),
            counted=facts["counted"],
            classes=tuple(ClassRow(**row) for row in facts["classes"]),
            confusions=tuple(Confusion(**pair) for pair in facts["confusions"]),
        )

    def lines(self) -> list[str]:
        """Text for the terminal, 80 columns wide: the scores, the table of classes, and the confusions."""
        kinds: dict[str, list[str]] = {}
        for name, value in self.values.items():
            kind = next((kind for kind in ("mask", "proposal") if name.startswith(f"{kind}_")), None)
            start, short = (f"{kind}s: ", name.removeprefix(f"{kind}_")) if kind else ("", name)
            kinds.setdefault(start, []).append(f"{short.replace('_', ' ')} {_text(value)}")
        lines = [line for start, parts in kinds.items() for line in _wrapped(start, parts)]
        lines += self._table()
        lines += [
            f"{plural(pair.count, 'image')} of {escape(pair.labelled)} taken for {escape(pair.predicted)}"
            for pair in self.confusions
        ]
        return lines

    def _table(self) -> list[str]:
        rows = self.classes
        if not rows:
            return []
        names = [_shortened(row.name) for row in rows[:MAX_ROWS]]
        columns = list(rows[0].values)
        width = max(map(len, [*names, "class"]))
        counts = max(len(self.counted), *(len(str(row.count)) for row in rows))
        titles = "".join(f"  {column:>{max(len(column), 5)}}" for column in columns)
        lines = [f"{'class':{width}}  {self.counted:>{counts}}{titles}"]
        for name, row in zip(names, rows, strict=False):
            cells = "".join(f"  {_text(row.values[column]):>{max(len(column), 5)}}" for column in columns)
            lines.append(f"{name:{width}}  {row.count:>{counts}}{cells}")
        if len(rows) > MAX_ROWS:
            lines.append(f"and {len(rows) - MAX_ROWS} more classes")
        return lines


def finite_mean(values: Sequence[Value]) -> Value:
    """Mean of the values that are there; None where there is none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def share(part: float, whole: float) -> Value:
    """part / whole; None where `whole` is 0."""
    return float(part / whole) if whole else None


def _wrapped(start: str, parts: Sequence[str]) -> list[str]:
    """The parts after `start`, in as many lines as they need."""
    lines = [start]
    for part in parts:
        if len(lines[-1]) + len(part) > COLUMNS:
            lines.append(" " * len(start))
        lines[-1] += f"{part}  "
    return [line.rstrip() for line in lines]


def _text(value: Value) -> str:
    return "-" if value is None else f"{value:.3f}"


def _shortened(name: str) -> str:
    shown = escape(name)
    return shown if len(shown) <= MAX_NAME else f"{shown[: MAX_NAME - 1]}…"
