"""YOLO's text files: `class cx cy w h` or `class x1 y1 x2 y2 …` on each line, in shares of the image's width and
height.

Each image has a text file with its name, beside it or in `labels/` where the image is in `images/`. The classes are
named in `data.yaml` or `classes.txt`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape, plural
from fpnx.labels.annotations import Category, LabelSet, Segment
from fpnx.labels.class_names import CLASS_FILES, find_class_names
from fpnx.labels.dropped import UNKNOWN_CLASS, DropCounter, box_problem
from fpnx.labels.files import list_files, read_text
from fpnx.labels.objects import FoundObject, pack_objects
from fpnx.labels.pairing import pair_files
from fpnx.labels.source import LabelSource

__all__ = ["NAMES_LINE", "YAML_NAMES", "is_yolo_text", "read_yolo"]

NAMES_LINE = re.compile(r"^[\"']?names[\"']?\s*:", re.MULTILINE)
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
BOX = 5  # numbers of a line with a box
MIN_POLYGON = 7  # numbers of a line with a polygon
FAR = 2.0  # shares beyond this are no shares, but pixels
NOT_A_LINE = "lines that are neither a box nor a polygon"
NOT_SHARES = "boxes that are not in shares of the image (0 to 1)"


@dataclass(frozen=True)
class _DataFile:
    """What `data.yaml` says: names by id, and how many numbers follow the box of each object (key points)."""

    names: dict[int, str]
    key_points: bool


def read_yolo(source: LabelSource) -> LabelSet:
    """Read the text files of a folder, or those that belong to a `data.yaml`.

    Raises:
        FpnxError: where there is none, no line can be used, or classes are counted from 1.
    """
    where, dropped = f"labels {escape(source.path)}", DropCounter()
    data, named_by = _class_names(source, where)
    files = _text_files(source)
    if not files:
        raise FpnxError(f"{where}: no text file with labels; YOLO keeps them in labels/ beside images/, one an image")
    remarks = []
    read = {path: _objects(path, data, dropped) for path in files}
    by_file = {path: objects for path, objects in read.items() if objects is not None}
    ids = {each.category for objects in by_file.values() for each in objects}
    if not ids:
        why = f": {dropped.words()}" if dropped.total else ", since all files are empty"
        raise FpnxError(f"{where}: no line can be used{why}")
    if data is None:
        names = {number: str(number) for number in range(max(ids) + 1)}
        remarks.append("there is no data.yaml or classes.txt, so classes have numbers for names")
        if 0 not in ids:
            remarks.append("no object has class 0: YOLO counts classes from 0")
    else:
        names = data.names
        _refuse_from_one(where, named_by, names, ids)
    categories = tuple(Category(number, names[number]) for number in sorted(names))
    index = {category.id: position for position, category in enumerate(categories)}
    images = []
    for name, objects in zip(pair_files(source, list(by_file)), by_file.values(), strict=True):
        known = []
        for each in objects:
            if each.category in index:
                known.append(each._replace(category=index[each.category]))
            else:
                dropped.add(UNKNOWN_CLASS, f"{each.what} (class {each.category})")
        images.append(pack_objects(name, None, known, dropped, relative=True))
    if not any(len(image.classes) for image in images):
        raise FpnxError(f"{where}: no line can be used: {dropped.words()}")
    return LabelSet(
        format="yolo",
        path=source.path,
        task="detection",
        categories=categories,
        images=tuple(images),
        dropped=dropped.result(),
        remarks=tuple(remarks),
    )


def is_yolo_text(text: str) -> bool:
    """Whether the first line that is not empty has numbers only, five or more."""
    words = next((line.split() for line in text.splitlines() if line.strip()), [])
    return len(words) >= BOX and all(_value(word) is not None for word in words)


def _text_files(source: LabelSource) -> list[str]:
    """Absolute paths of the text files: in the folder of labels; for a `data.yaml` also where the images are."""
    folders = [os.path.abspath(source.folder or ".")]
    root = os.path.abspath(source.root) if source.root else ""
    if not os.path.isdir(source.path) and os.path.isdir(root):
        before, images, after = root.rpartition(f"{os.sep}images")
        beside = f"{before}{os.sep}labels{after}"
        folders += [folder for folder in (root, beside) if images and os.path.isdir(folder)] or [root]
    found = dict.fromkeys(path for folder in folders for path in list_files(folder, (".txt",)))
    return [path for path in found if not _is_other_text(os.path.basename(path).lower())]


def _is_other_text(name: str) -> bool:
    """Whether a text file is known to hold no labels: names of classes, notes, lists of images."""
    return name in (*CLASS_FILES, "train.txt", "val.txt", "test.txt") or name.startswith(("readme", "requirements"))


def _objects(path: str, data: _DataFile | None, dropped: DropCounter) -> list[FoundObject] | None:
    """The objects of a text file; `category` is the id of the class. None for a text of words."""
    name, found = os.path.basename(path), []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        what, values = f"line {number} of {name}", [_value(word) for word in words]
        numbers = [value for value in values if value is not None]
        if not numbers:
            return None
        if len(numbers) < len(values) or not numbers[0].is_integer() or not 0 <= numbers[0] < 1 << 31:
            dropped.add(NOT_A_LINE, what)
            continue
        shape = _shape(numbers[1:], data is not None and data.key_points)
        if shape is None:
            dropped.add(NOT_A_LINE, what)
            continue
        box, segment = shape
        problem = box_problem(*box)
        if problem is None and (max(map(abs, box)) > FAR):
            problem = NOT_SHARES
        if problem:
            dropped.add(problem, what)
        else:
            found.append(FoundObject(what, int(numbers[0]), box, segment))
    return found


def _shape(
    values: Sequence[float], key_points: bool
) -> tuple[tuple[float, float, float, float], Segment | None] | None:
    """Corners and outline from the numbers behind the class; None where they are too few, or too many for a box."""
    if len(values) == BOX - 1 or (key_points and len(values) >= BOX):
        x, y, width, height = values[:4]
        return (x - width / 2, y - height / 2, x + width / 2, y + height / 2), None
    if len(values) < MIN_POLYGON - 1 or len(values) % 2:
        return None
    xs, ys = values[::2], values[1::2]
    if not math.isfinite(sum(values)):
        return (math.nan,) * 4, None
    return (min(xs), min(ys), max(xs), max(ys)), [list(values)]


def _value(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _refuse_from_one(where: str, named_by: str, names: dict[int, str], ids: set[int]) -> None:
    """Refuse classes that are counted from 1: none is 0, and the last is the number of names."""
    count = len(names)
    if min(ids) >= 1 and max(ids) == count and count not in names:
        raise FpnxError(
            f"{where}: classes are counted from 1: they are {min(ids)} to {count}, and {named_by} names "
            f"{plural(count, 'class')}, 0 to {count - 1}; YOLO counts from 0, so subtract 1 from each"
        )


def _class_names(source: LabelSource, where: str) -> tuple[_DataFile | None, str]:
    """The names of the classes, and the file that has them."""
    if not os.path.isdir(source.path):
        return _read_data_file(source.path, where), os.path.basename(source.path)
    for folder in (source.path, os.path.dirname(os.path.abspath(source.path))):
        for name in YAML_NAMES:
            if os.path.isfile(path := os.path.join(folder, name)) and NAMES_LINE.search(read_text(path)):
                return _read_data_file(path, where), name
    found = find_class_names(source.path)
    return (None, "") if found is None else (_DataFile(dict(enumerate(found[0])), False), found[1])


def _read_data_file(path: str, where: str) -> _DataFile:
    """The names in a `data.yaml`: a list, or numbers with names.

    It is read with PyYAML's BaseLoader, which makes texts, lists and dictionaries only: nothing in it is run, and
    classes named `no` and `on` stay words.
    """
    try:
        import yaml
    except ImportError:
        raise FpnxError(
            f"{where}: reading YAML needs PyYAML, which is not installed: pip install 'fpnx[train]'"
        ) from None
    try:
        document = yaml.load(read_text(path), yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise FpnxError(f"{where}: not a YAML file that can be read{line}") from None
    names = document.get("names") if isinstance(document, dict) else None
    by_id = _by_id(names)
    if not by_id:
        raise FpnxError(f"{where}: names must be a list of names, or numbers with names")
    count = document.get("nc")
    if isinstance(count, str) and count.isdigit() and int(count) != len(by_id):
        raise FpnxError(f"{where}: nc is {count}, and names has {len(by_id)}: make them agree")
    return _DataFile(by_id, "kpt_shape" in document)


def _by_id(names: Any) -> dict[int, str] | None:
    """Names by number; None where they are something else."""
    if isinstance(names, list):
        names = {str(position): name for position, name in enumerate(names)}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        return None
    if not all(isinstance(number, str) and re.fullmatch(r"\d{1,9}", number) for number in names):
        return None
    return {int(number): name for number, name in names.items()}
