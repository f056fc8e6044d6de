"""Boxes of a file of predictions, as `fpnx predict` writes it, for the images of a feature file."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape, plural
from fpnx.labels.image_names import AMBIGUOUS, ImageNames

__all__ = ["PredictedBox", "PredictedBoxes", "count_by_level"]

NEEDED = ("file_name", "category_id", "category_name", "bbox", "score")
WHITESPACE = " \t\r\n"
WRITE_BOXES = "take the JSON file that fpnx predict writes for detectors"


@dataclass(frozen=True, slots=True)
class PredictedBox:
    """An object that was found in an image.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the upright source.
        score: 0 to 1.
        category: number of its class.
        name: name of its class.
        level: name of the level that the box comes from; empty where the file does not say.
    """

    box: tuple[float, float, float, float]
    score: float
    category: int
    name: str
    level: str = ""

    @property
    def label(self) -> str:
        """Class, score and level."""
        return f"{self.name} {self.score:.2f} {self.level}".rstrip()


@dataclass(frozen=True)
class PredictedBoxes:
    """The boxes of a file of predictions by the name of their image, best first."""

    path: str
    by_name: Mapping[str, Sequence[PredictedBox]]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PredictedBoxes:
        """Read a file of predictions.

        Raises:
            FpnxError: it cannot be read, or is another file; the message says what is missing.
        """
        where = f"predictions {escape(path)}"
        by_name: dict[str, list[PredictedBox]] = {}
        for number, record in enumerate(_records(_text(path, where), where), 1):
            name, box = _box_of(record, f"{where}: result {number}", where)
            by_name.setdefault(name, []).append(box)
        for boxes in by_name.values():
            boxes.sort(key=lambda each: -each.score)
        return cls(os.fspath(path), by_name)

    def of_images(self, names: Sequence[str], root: str) -> dict[int, tuple[PredictedBox, ...]]:
        """The boxes by the position of their image in `names`; see `ImageNames` for how names are compared.

        Args:
            names: of the images, relative to `root`.
            root: the folder that they are in; it need not exist.

        Raises:
            FpnxError: where there are boxes, and none is of these images.
        """
        index = ImageNames(names, root)
        claims: dict[int, list[tuple[int, str]]] = {}
        for name in self.by_name:
            match = index.find(name)
            if match is not None and match.index != AMBIGUOUS:
                claims.setdefault(match.index, []).append((match.rank, name))
        found: dict[int, tuple[PredictedBox, ...]] = {}
        for position, claimants in claims.items():
            surest = [name for rank, name in claimants if rank == min(claimants)[0]]
            if len(surest) == 1:
                found[position] = tuple(self.by_name[surest[0]])
        if self.by_name and not found:
            raise FpnxError(
                f"predictions {escape(self.path)}: boxes of none of the {plural(len(names), 'image')}: an image is "
                f"named {escape(names[0])}, and in the predictions there is {escape(next(iter(self.by_name)))}; give "
                f"the predictions for these images"
            )
        return found


def count_by_level(boxes: Sequence[PredictedBox]) -> str:
    """`"5 boxes: P3 2 · P4 3"`, the levels in the order of their names."""
    counts = Counter(each.level for each in boxes)
    parts = [f"{level} {counts[level]}" for level in sorted(counts) if level]
    if counts[""] and parts:
        parts.append(f"without a level {counts['']}")
    total = "1 box" if len(boxes) == 1 else f"{len(boxes)} boxes"
    return f"{total}{': ' if parts else ''}{' · '.join(parts)}"


def _text(path: str | os.PathLike[str], where: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except IsADirectoryError:
        raise FpnxError(f"{where}: a folder; only boxes are drawn over levels: {WRITE_BOXES}") from None
    except UnicodeDecodeError:
        raise FpnxError(f"{where}: not a text in UTF-8: {WRITE_BOXES}") from None
    except (OSError, ValueError) as error:
        raise FpnxError(f"{where}: {getattr(error, 'strerror', None) or error}") from error


def _records(text: str, where: str) -> Iterator[Any]:
    """The values of a list in JSON, one at a time: all of a large file at once take many times its size.

    Raises:
        FpnxError: for another file.
    """
    decoder, position = json.JSONDecoder(), _skip(text, 0)
    if text[position : position + 1] != "[":
        raise FpnxError(f"{where}: {_other_file(text[position:])}: {WRITE_BOXES}")
    position = _skip(text, position + 1)
    separator = ","
    if text[position : position + 1] == "]":
        separator, position = "]", _skip(text, position + 1)
    while separator == ",":
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            separator = ""
            break
        yield record
        position = _skip(text, position)
        separator = text[position : position + 1]
        position = _skip(text, position + 1)
    if separator != "]" or position < len(text):
        line = text.count("\n", 0, position) + 1
        raise FpnxError(f"{where}: not a whole JSON file (line {line}): predict again")


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    while position < len(text) and text[position] in WHITESPACE:
        position += 1
    return position


def _other_file(text: str) -> str:
    """What a file is that is no list in JSON."""
    if not text:
        return "the file is empty"
    if text.startswith("path,label,score"):
        return "a table of classes, and only boxes are drawn over levels"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return "not a JSON list"
    if isinstance(document, dict) and "annotations" in document:
        return "labels, not predictions"
    return "not a JSON list"


def _box_of(record: Any, what: str, where: str) -> tuple[str, PredictedBox]:
    """The name of the image of a result, and its box."""
    if not isinstance(record, dict):
        raise FpnxError(f"{what} is no JSON object: {WRITE_BOXES}")
    if missing := [key for key in NEEDED if key not in record]:
        plain = ", as plain COCO results do," if "image_id" in record else ""
        raise FpnxError(f"{where}: its results lack{plain} {' and '.join(missing)}: {WRITE_BOXES}")
    name, category, title, level = (record.get(key) for key in ("file_name", "category_id", "category_name", "level"))
    box, score = record["bbox"], record["score"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        problem = f"bbox {box} is not x, y, width and height"
    elif not _is_number(score) or not 0 <= score <= 1:
        problem = f"score {score} is not from 0 to 1"
    elif type(category) is not int:
        problem = f"category_id {category} is not a whole number"
    elif not (isinstance(name, str) and isinstance(title, str) and isinstance(level or "", str)):
        problem = "file_name, category_name and level must be texts"
    else:
        x, y, width, height = map(float, box)
        return name, PredictedBox((x, y, x + width, y + height), float(score), category, title, level or "")
    raise FpnxError(f"{what}: {escape(problem)[:200]}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9
