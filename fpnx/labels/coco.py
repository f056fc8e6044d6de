"""COCO's annotation files: boxes, polygons and run-length masks in one JSON file.

The format: https://cocodataset.org/#format-data. A box is x, y, width, height in continuous coordinates, so that
x2 = x + width.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape, plural
from fpnx.labels.annotations import Category, ImageLabels, LabelSet, Segment
from fpnx.labels.dropped import BAD_OUTLINE, UNKNOWN_CLASS, DropCounter, box_problem
from fpnx.labels.files import read_text
from fpnx.labels.objects import FoundObject, pack_objects
from fpnx.labels.segments import is_drawable, segment_box
from fpnx.labels.source import LabelSource

__all__ = ["read_coco"]

NO_BOX = "annotations without a box of four numbers"
NOT_RECORDS = "annotations that are no JSON objects"
UNKNOWN_IMAGE = "annotations of an image id that is not listed"
MAX_SIDE = 1 << 31  # pixels
NO_NAME = "images without a file name"
KEYS = ("images", "annotations", "categories")
OTHERS = (  # a key of another JSON format, its name, and what to do
    ("shapes", "a LabelMe file", "convert the folder of them to one COCO file"),
    ("_via_img_metadata", "a VIA project", "export its annotations as COCO"),
    ("type", "GeoJSON", "convert it to COCO"),
)
PREDICTIONS = "a list of predictions, not of labels: name the file with images, annotations and categories"


def read_coco(source: LabelSource) -> LabelSet:
    """Read a COCO file.

    Raises:
        FpnxError: for another file, ids that are shifted against the categories, and where no annotation can be used.
    """
    where, dropped = f"labels {escape(source.path)}", DropCounter()
    document = _document(source.path, where)
    categories = _categories(document["categories"], where)
    positions = {category.id: index for index, category in enumerate(categories)}
    records, by_id = _images(document["images"], where, dropped)
    objects: list[list[FoundObject]] = [[] for _ in records]
    unknown: Counter[int] = Counter()
    for number, annotation in enumerate(document["annotations"]):
        if not isinstance(annotation, dict):
            dropped.add(NOT_RECORDS, f"number {number + 1}")
            continue
        what = f"annotation {annotation.get('id', number + 1)}"
        image_id = annotation.get("image_id")
        image = by_id.get(image_id) if isinstance(image_id, Hashable) else None
        if image is None:
            dropped.add(UNKNOWN_IMAGE, f"{what} (image_id {repr(image_id)[:40]})")
            continue
        name, category_id = records[image][0], _whole(annotation.get("category_id"))
        category = None if category_id is None else positions.get(category_id)
        if category is None:
            if category_id is not None:
                unknown[category_id] += 1
            dropped.add(UNKNOWN_CLASS, f"{what} (category_id {repr(annotation.get('category_id'))[:40]})", name)
            continue
        if (found := _object(annotation, what, category, name, dropped)) is not None:
            objects[image].append(found)
    used = {categories[each.category].id for found in objects for each in found}
    _refuse_shifted(where, positions, used, unknown)
    if not used:
        why = f": {dropped.words()}" if dropped.total else ", since there is none"
        raise FpnxError(f"{where}: no annotation can be used{why}")
    ids = {position: number for number, position in reversed(by_id.items())}
    images = tuple(
        replace(pack_objects(name, size, found, dropped), id=ids[position])
        for position, ((name, size), found) in enumerate(zip(records, objects, strict=True))
    )
    return _label_set(source, categories, images, dropped, by_id)


def _object(
    annotation: Mapping[str, Any], what: str, category: int, name: str, dropped: DropCounter
) -> FoundObject | None:
    """The object of one annotation; None where it has no box."""
    segment = _segment(annotation.get("segmentation"))
    if segment is None and annotation.get("segmentation"):
        dropped.add(BAD_OUTLINE, what, name)
    box = _box(annotation.get("bbox"), segment)
    if problem := NO_BOX if box is None else box_problem(*box):
        dropped.add(problem, what, name)
    if box is None or problem:
        return None
    area = _number(annotation.get("area")) or math.nan
    crowd = annotation.get("iscrowd") in (1, True)
    return FoundObject(what, category, box, segment, crowd, area if 0 < area < math.inf else math.nan)


def _label_set(
    source: LabelSource,
    categories: tuple[Category, ...],
    images: tuple[ImageLabels, ...],
    dropped: DropCounter,
    by_id: Mapping[Any, int],
) -> LabelSet:
    remarks = []
    for name, count in Counter(category.name for category in categories).items():
        if count > 1:
            ids = ", ".join(str(category.id) for category in categories if category.name == name)
            remarks.append(f"{count} classes have the name {escape(name)} (ids {ids}): they stay {count} classes")
    if more := len(by_id) - len(set(by_id.values())):
        remarks.append(f"{plural(more, 'image')} listed again under another id: their annotations were joined")
    return LabelSet(
        format="coco",
        path=source.path,
        task="detection",
        categories=categories,
        images=images,
        dropped=dropped.result(),
        remarks=tuple(remarks),
    )


def _document(path: str, where: str) -> dict[str, Any]:
    """The three lists of a COCO file."""
    text = read_text(path)
    if not text.strip():
        raise FpnxError(f"{where}: the file is empty")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        rest = "it ends early" if error.pos >= len(text.rstrip()) - 1 else error.msg
        raise FpnxError(f"{where}: not a whole JSON file (line {error.lineno}: {escape(rest)})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; thousands of brackets
        raise FpnxError(f"{where}: not a JSON file that can be read ({escape(str(error))[:80]})") from None
    if isinstance(document, list):
        is_predictions = bool(document) and isinstance(document[0], dict) and "score" in document[0]
        raise FpnxError(f"{where}: {PREDICTIONS if is_predictions else 'a JSON list, not a COCO file'}")
    if not isinstance(document, dict):
        raise FpnxError(f"{where}: JSON without {', '.join(KEYS)}: not a COCO file")
    if missing := [key for key in KEYS if key not in document]:
        for key, name, what_to_do in OTHERS:
            if key in document:
                raise FpnxError(f"{where}: {name}, which fpnx does not read: {what_to_do}")
        raise FpnxError(f"{where}: JSON without {', '.join(missing)}: not a COCO file")
    for key in KEYS:
        if not isinstance(document[key], list):
            raise FpnxError(f"{where}: {key} must be a list, not {type(document[key]).__name__}")
    if any(isinstance(each, dict) and "segments_info" in each for each in document["annotations"][:1]):
        raise FpnxError(f"{where}: COCO's panoptic format, which fpnx does not read: take the instances or PNG masks")
    return document


def _categories(records: list[Any], where: str) -> tuple[Category, ...]:
    """The categories in the order of their ids."""
    names: dict[int, str] = {}
    for record in records:
        number = _whole(record.get("id")) if isinstance(record, dict) else None
        if number is None:
            raise FpnxError(f"{where}: a category needs a whole number as id, not {escape(repr(record))[:80]}")
        name = record.get("name")
        name = str(number) if name is None else str(name)
        if names.setdefault(number, name) != name:
            both = f"{escape(names[number])} and {escape(name)}"
            raise FpnxError(f"{where}: two categories have the id {number}, {both}: give each its own")
    if not names:
        raise FpnxError(f"{where}: no categories")
    return tuple(Category(number, names[number]) for number in sorted(names))


def _images(
    records: list[Any], where: str, dropped: DropCounter
) -> tuple[list[tuple[str, tuple[int, int] | None]], dict[Any, int]]:
    """(name, size) of each image, and positions by id. Entries with one file name are one image."""
    found: list[tuple[str, tuple[int, int] | None]] = []
    by_name: dict[str, int] = {}
    by_id: dict[Any, int] = {}
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("id"), (int, str)):
            raise FpnxError(f"{where}: image {number + 1} of the list is no JSON object with an id")
        name = record.get("file_name") or record.get("coco_url")  # LVIS has addresses only
        if not isinstance(name, str):
            dropped.add(NO_NAME, f"image {record['id']}")
            continue
        position = by_name.setdefault(name, len(found))
        if position == len(found):
            found.append((name.replace("\\", "/"), _size(record)))
        if by_id.setdefault(record["id"], position) != position:
            both = f"{escape(found[by_id[record['id']]][0])} and {escape(name)}"
            raise FpnxError(f"{where}: two images have the id {escape(str(record['id']))}, {both}: give each its own")
    if not found:
        raise FpnxError(f"{where}: no images{': ' + dropped.words() if dropped.total else ''}")
    return found, by_id


def _size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of an image; None where they are not known."""
    height, width = _whole(record.get("height")), _whole(record.get("width"))
    if height is None or width is None or not (0 < height < MAX_SIDE and 0 < width < MAX_SIDE):
        return None
    return height, width


def _refuse_shifted(where: str, positions: Mapping[int, int], used: set[int], unknown: Mapping[int, int]) -> None:
    """Refuse annotations that count from 0 where the categories count from 1, or the other way round."""
    first, last = min(positions), max(positions)
    for beside, unused, name in ((first - 1, last, "one lower"), (last + 1, first, "one higher")):
        if set(unknown) == {beside} and unused not in used and len(positions) > 1:
            raise FpnxError(
                f"{where}: the categories have ids {first} to {last}, and the annotations are counted {name}: "
                f"{plural(unknown[beside], 'annotation')} with category_id {beside}, none with {unused}; "
                f"make the numbers agree"
            )


def _whole(value: Any) -> int | None:
    """A whole number, also one such as 3.0; None for anything else."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _number(value: Any) -> float | None:
    """A number, infinite where it is too large; None for anything else."""
    if type(value) is float:
        return value
    if type(value) is not int:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _box(value: Any, segment: Segment | None) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 of a box, or of an outline without one; None where there is neither."""
    if value is None or value == []:
        return None if segment is None else segment_box(segment)
    if not isinstance(value, list) or len(value) != 4:
        return None
    x, y, width, height = map(_number, value)
    if x is None or y is None or width is None or height is None:
        return None
    return x, y, x + width, y + height


def _segment(value: Any) -> Segment | None:
    """An outline that can be drawn; None where there is none, or another value. Polygons that are no area are left
    out of it, and one that is not in a list of its own is taken as the only one."""
    if isinstance(value, list) and value and not isinstance(value[0], list):
        value = [value]
    if isinstance(value, list):
        return [polygon for polygon in value if is_drawable([polygon])] or None
    return value if is_drawable(value) else None
