"""Pascal VOC's XML files: one for each image, with `<object><name>…</name><bndbox>…</bndbox></object>`.

VOC counts pixels from 1 and includes the last: a box from 1 to the width covers the whole image, so that x1 = xmin − 1
and x2 = xmax in continuous coordinates. Files of tools that count from 0 are recognised by a 0 among the corners.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.parsers import expat

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.labels.annotations import Category, LabelSet
from fpnx.labels.dropped import DropCounter, box_problem
from fpnx.labels.files import list_files, read_bytes
from fpnx.labels.objects import FoundObject, pack_objects
from fpnx.labels.pairing import pair_files
from fpnx.labels.source import LabelSource

__all__ = ["read_voc"]

NO_BOX = "objects without a box of four numbers"
NO_CLASS = "objects without a name"
BAD_FILE = "files that cannot be read"
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MAX_DEPTH = 50  # of elements in each other; VOC has 5


@dataclass(frozen=True)
class _Object:
    """One object as the file has it, with its corners."""

    what: str
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class _File:
    """What one file says: the name of its image, (height, width), and its objects."""

    image: str
    size: tuple[int, int] | None
    objects: list[_Object]


def read_voc(source: LabelSource) -> LabelSet:
    """Read the XML files of a folder, or one. `difficult` objects are taken as crowds: not trained on, and not missed.

    Classes are in the order of their names. A file that cannot be read is left out and counted.

    Raises:
        FpnxError: where no object can be used, and for a single file that cannot be read.
    """
    where, dropped = f"labels {escape(source.path)}", DropCounter()
    single = not os.path.isdir(source.path)
    files = [os.path.abspath(source.path)] if single else list_files(os.path.abspath(source.path), (".xml",))
    found: dict[str, _File] = {}
    for path in files:
        name = os.path.basename(path)
        try:
            root = _parsed(source.path if single else path)
            if root.tag != "annotation":
                raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        except ValueError as error:
            if single:
                raise FpnxError(f"{where}: {escape(str(error))}") from None
            dropped.add(BAD_FILE, f"{name} ({error})")
            continue
        image = (root.findtext("filename") or "").strip()
        found[path] = _File(image, _size(root), _objects(root, name, dropped))
    objects = [each for file in found.values() for each in file.objects]
    classes = sorted({each.name for each in objects})
    if not classes:
        why = f": {dropped.words()}" if dropped.total else ", since there is none"
        raise FpnxError(f"{where}: no object can be used{why}")
    from_zero = any(min(each.corners[:2]) < 1 for each in objects)
    shift, index = 0.0 if from_zero else 1.0, {name: position for position, name in enumerate(classes)}
    images = []
    names = pair_files(source, list(found), [file.image for file in found.values()])
    for image, file in zip(names, found.values(), strict=True):
        kept = []
        for each in file.objects:
            x1, y1, x2, y2 = each.corners
            box = (x1 - shift, y1 - shift, x2, y2)
            if problem := box_problem(*box):
                dropped.add(problem, each.what)
            else:
                kept.append(FoundObject(each.what, index[each.name], box, crowd=each.difficult))
        images.append(pack_objects(image, file.size, kept, dropped))
    if not any(len(image.classes) for image in images):
        raise FpnxError(f"{where}: no object can be used: {dropped.words()}")
    return LabelSet(
        format="voc",
        path=source.path,
        task="detection",
        categories=tuple(Category(position, name) for position, name in enumerate(classes)),
        images=tuple(images),
        dropped=dropped.result(),
        remarks=("some boxes begin at 0, so pixels are taken as counted from 0, not from 1 as VOC does",)
        if from_zero
        else (),
    )


def _parsed(path: str) -> ElementTree.Element:
    """The root of an XML file. A document type, which may expand into anything, is refused.

    Raises:
        ValueError: with the reason, where it is not well-formed.
    """
    content = read_bytes(path)
    if not content.strip():
        raise ValueError("the file is empty")
    parser, builder, depth = expat.ParserCreate(), ElementTree.TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("elements nested too deeply")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise ValueError("it defines a document type (<!DOCTYPE>), which fpnx does not read: remove it")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an encoding that is not known
        raise ValueError(f"not well-formed XML: {error}") from None
    return builder.close()


def _objects(root: ElementTree.Element, file: str, dropped: DropCounter) -> list[_Object]:
    found = []
    for number, element in enumerate(root.findall("object"), 1):
        what = f"object {number} of {file}"
        name = (element.findtext("name") or "").strip()
        box = element.find("bndbox")
        corners = [] if box is None else [_number(box.findtext(corner)) for corner in CORNERS]
        x1, y1, x2, y2 = corners or [None] * 4
        if not name:
            dropped.add(NO_CLASS, what)
        elif x1 is None or y1 is None or x2 is None or y2 is None:
            dropped.add(NO_BOX, what)
        elif problem := box_problem(x1, y1, x2 + 1, y2 + 1):  # the last pixel is included
            dropped.add(problem, what)
        else:
            difficult = (element.findtext("difficult") or "").strip() in ("1", "true", "True")
            found.append(_Object(what, name, (x1, y1, x2, y2), difficult))
    return found


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width); None where the file says 0, or nothing."""
    sides = [_number(root.findtext(f"size/{side}")) for side in ("height", "width")]
    height, width = (int(side) if side is not None and math.isfinite(side) else 0 for side in sides)
    return (height, width) if height > 0 and width > 0 else None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
