"""Tables of classes: `path,label` on each line, with several labels of an image for multi-label classification."""

from __future__ import annotations

import csv
import io
import re

import numpy as np

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.labels.annotations import Category, ImageLabels, LabelSet
from fpnx.labels.dropped import DUPLICATE, DropCounter
from fpnx.labels.files import read_text
from fpnx.labels.source import LabelSource

__all__ = ["read_csv"]

DELIMITERS = (",", "\t", ";")
SEPARATORS = re.compile(r"[;|]")  # between labels of one image
PATH_COLUMNS = frozenset(
    [
        "path",
        "paths",
        "file",
        "files",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "image",
        "images",
        "image_path",
        "img",
        "name",
        "image_name",
    ]
)
LABEL_COLUMNS = frozenset(
    ["label", "labels", "class", "classes", "class_name", "category", "categories", "target", "tag", "tags"]
)
BOX_COLUMNS = frozenset(["bbox", "box", "xmin", "x_min", "x1", "left"])
NO_LABEL, NO_PATH = "rows without a label", "rows without a path"
WHOLE = re.compile(r"[+-]?\d{1,18}")


def read_csv(source: LabelSource) -> LabelSet:
    """Read a table. Its first line may name the columns; columns beside the path and the label are then passed over.

    Labels that are all whole numbers are the ids of the classes; others are numbered in the order of their names.

    Raises:
        FpnxError: for a file that is no such table, or has no usable row.
    """
    where, dropped = f"labels {escape(source.path)}", DropCounter()
    rows = _rows(read_text(source.path), where)
    path_column, label_column, first = _columns(rows, where)
    found: dict[str, list[str]] = {}
    for line, row in rows[first:]:
        if len(row) <= max(path_column, label_column):
            raise FpnxError(f"{where}, line {line}: {len(row)} columns; every line needs a path and a label")
        path = row[path_column].strip().replace("\\", "/")
        if not path:
            dropped.add(NO_PATH, f"line {line}")
            continue
        labels = found.setdefault(path, [])
        for label in filter(None, map(str.strip, SEPARATORS.split(row[label_column]))):
            if label in labels:
                dropped.add(DUPLICATE, f"line {line}", path)
            else:
                labels.append(label)
    multi_label = any(len(labels) > 1 for labels in found.values())
    if not multi_label:  # an image without a class can only be meant where each may have any number of them
        for path in [path for path, labels in found.items() if not labels]:
            dropped.add(NO_LABEL, path)
            del found[path]
    categories, index = _categories({label for labels in found.values() for label in labels})
    if not categories:
        raise FpnxError(f"{where}: no row with a path and a label{': ' + dropped.words() if dropped.total else ''}")
    images = tuple(
        ImageLabels(name=path, classes=np.array(sorted(index[label] for label in labels), np.int64))
        for path, labels in found.items()
    )
    return LabelSet(
        format="csv",
        path=source.path,
        task="classification",
        categories=categories,
        images=images,
        dropped=dropped.result(),
        multi_label=multi_label,
    )


def _rows(text: str, where: str) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not empty."""
    if not text.strip():
        raise FpnxError(f"{where}: the file is empty")
    if "\0" in text:
        raise FpnxError(f"{where}: holds zero bytes, so it is no text")
    first_line = text.lstrip().splitlines()[0]
    delimiter = next((each for each in DELIMITERS if each in first_line), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise FpnxError(f"{where}, line {reader.line_num}: not a table ({error})") from None
    if not rows:
        raise FpnxError(f"{where}: all lines are empty")
    return rows


def _columns(rows: list[tuple[int, list[str]]], where: str) -> tuple[int, int, int]:
    """Positions of the path and the label, and the number of the first row of data."""
    header = [cell.strip().lower().replace(" ", "_") for cell in rows[0][1]]
    if BOX_COLUMNS & set(header):
        raise FpnxError(f"{where}: a table of boxes, which fpnx does not read: convert it to COCO")
    paths, labels = (
        [column for column, name in enumerate(header) if name in known] for known in (PATH_COLUMNS, LABEL_COLUMNS)
    )
    if len(paths) == 1 and len(labels) == 1:
        return paths[0], labels[0], 1
    if len(header) == 2:
        return 0, 1, 1 if paths or labels else 0
    shown = escape(", ".join(rows[0][1]))[:100]
    raise FpnxError(
        f"{where}: the first line has {len(header)} columns ({shown}); it takes path,label on each line, or a first "
        f"line that names one column path and one label"
    )


def _categories(labels: set[str]) -> tuple[tuple[Category, ...], dict[str, int]]:
    """The classes in the order of their ids, and their positions by label."""
    if all(WHOLE.fullmatch(label) for label in labels) and len({int(label) for label in labels}) == len(labels):
        ordered = sorted(labels, key=int)
        categories = tuple(Category(int(label), label) for label in ordered)
    else:
        ordered = sorted(labels)
        categories = tuple(Category(position, label) for position, label in enumerate(ordered))
    return categories, {label: position for position, label in enumerate(ordered)}
