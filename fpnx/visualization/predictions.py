"""Predictions drawn over the image: boxes, masks, keypoints and their labels; classes; maps of classes.

A picture has at least `LEAST_SIDE` pixels on its longer side and at most `MOST_SIDE`, so that text can be read whatever
the image's size. Text never leaves the picture: tags are moved inside, long names are broken into lines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from fpnx.core.mask_runs import decode_mask
from fpnx.core.text import plural
from fpnx.visualization.class_colours import class_colour, text_colour
from fpnx.visualization.text_layout import fit_text, pillow_runs, text_width

__all__ = [
    "DrawnObject",
    "Mark",
    "draw_class_map",
    "draw_classes",
    "draw_objects",
    "draw_wrong_pixels",
    "outline_objects",
    "tag_objects",
]

LEAST_SIDE, MOST_SIDE = 640, 1600  # of the longer side of a picture
LEAST_WIDTH, LEAST_HEIGHT = 320, 240  # of a picture; narrower images get a margin
SIZES = (13, 20)  # of text, in pixels
MARGIN = (40, 40, 44)  # colour beside an image
OPACITY = 0.45  # of masks
EDGE = 170  # alpha of the edges of lines, 0 to 255
CLASS_OPACITY = 0.6  # of maps of classes
WRONG, MISSED = (235, 30, 30), (255, 215, 0)
COVERED = 0.4  # share of a small picture that tags may cover
TAG_LINES = 3  # at most, of one tag
LEGEND_ROWS = 24  # classes below a picture
BAR = 3  # height of a bar
NO_OBJECT = 0  # by custom the number of the background, which stays as it is

# Lines between COCO's keypoints of a person, by their positions.
SKELETON = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
    (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip
KEYPOINTS = 17


class Mark(Enum):
    """What is to be said of an object beside labels."""

    NONE = ""
    WRONG = "wrong: "
    MISSED = "missed: "


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnObject:
    """An object in a picture.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the image.
        label: the text beside it.
        colour: number of its class, which gives the colour.
        mask: its pixels in COCO's run-length encoding; None draws none.
        keypoints: (K, 3) x, y, visibility; None draws none.
        mark: wrong objects and missed ones have a colour of their own.
    """

    box: tuple[float, float, float, float]
    label: str
    colour: int
    mask: Mapping[str, Any] | None = None
    keypoints: np.ndarray | None = None
    mark: Mark = Mark.NONE


@dataclass(frozen=True)
class _Rectangle:
    x1: float
    y1: float
    x2: float
    y2: float

    def meets(self, other: _Rectangle) -> bool:
        return self.x1 < other.x2 and other.x1 < self.x2 and self.y1 < other.y2 and other.y1 < self.y2

    def within(self, width: float, height: float) -> bool:
        return self.x1 >= 0 and self.y1 >= 0 and self.x2 <= width and self.y2 <= height


_Tag: TypeAlias = tuple[_Rectangle, list[str], tuple[int, int, int]]


class _Sheet:
    """What is drawn on: its size in pixels, and the sizes of text and lines on it.

    Attributes:
        scale: pixels for each pixel of the image.
        width, height: in pixels.
        text, line, stroke: size of text, from one line of it to the next, and width of the lines of boxes.
    """

    def __init__(self, scale: tuple[float, float], width: int, height: int, text: int) -> None:
        self.scale, self.width, self.height, self.text = scale, width, height, text
        self.line = math.ceil(text * 1.3)
        self.stroke = max(2, round(text / 7))


class _Canvas(_Sheet):
    """A picture of an image at a size at which text can be read, with space below for lines of text."""

    def __init__(self, photo: Image.Image) -> None:
        longer = max(photo.size)
        scale = max(1.0, LEAST_SIDE / longer) if longer < MOST_SIDE else MOST_SIDE / longer
        self.size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
        self.photo = photo.convert("RGB").resize(self.size, Image.Resampling.LANCZOS)
        width, height = max(self.size[0], LEAST_WIDTH), max(self.size[1], LEAST_HEIGHT)
        text = min(max(round(max(width, height) / 64), SIZES[0]), SIZES[1])
        super().__init__((scale, scale), width, height, text)

    def overlay(self, mask: np.ndarray, colour: tuple[int, int, int], opacity: float) -> None:
        """Colour the pixels of a mask of the image's size."""
        shape = Image.fromarray(np.where(mask, round(255 * opacity), 0).astype(np.uint8))
        self.photo.paste(colour, mask=shape.resize(self.size, Image.Resampling.BILINEAR))

    def finished(self, below: int = 0) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        """The picture with its margins, and `below` pixels more at the bottom."""
        picture = Image.new("RGB", (self.width, self.height + below), MARGIN)
        picture.paste(self.photo, (0, 0))
        return picture, ImageDraw.Draw(picture)


def draw_objects(photo: Image.Image, objects: Sequence[DrawnObject]) -> Image.Image:
    """Boxes with tags over an image.

    Each object has the colour of its class. Tags do not cover each other: the best objects, which come first, have the
    first choice of a place at their box, and where there is none left, a line below the picture says how many are
    without.

    Args:
        photo: the upright RGB image.
        objects: what is drawn, best first, in pixels of the image.
    """
    canvas = _Canvas(photo)
    for each in reversed(objects):  # the best on top
        if each.mask is not None:
            canvas.overlay(decode_mask(each.mask), _colour(each), OPACITY)
    boxes = [_scaled(each.box, canvas) for each in objects]
    tags, left_out = _tags(canvas, objects, boxes)
    picture, pen = canvas.finished(canvas.line + 8 if left_out else 0)
    for each, box in reversed(list(zip(objects, boxes, strict=True))):
        _draw_box(pen, box, _colour(each), canvas.stroke, dashed=each.mark is Mark.MISSED)
        if each.keypoints is not None:
            _draw_keypoints(pen, each.keypoints[:, :2] * canvas.scale[0], _colour(each), canvas.stroke)
    _draw_tags(pen, canvas, tags)
    if left_out:
        text = f"{plural(left_out, 'label')} left out for want of room"
        _write(pen, (4, canvas.height + 4), text, canvas.text, (255, 255, 255))
    return picture


def tag_objects(
    photo: Image.Image, objects: Sequence[DrawnObject], size: tuple[int, int], text: int, width: int = 0
) -> tuple[Image.Image, int]:
    """Boxes with tags over a picture of the image that keeps its size; and how many tags there is no room for.

    Args:
        photo: a picture of the whole image.
        objects: what is drawn, best first, in pixels of the image. Only boxes and tags are drawn.
        size: (height, width) of the image.
        text: size of the text in pixels.
        width: in pixels; a narrower picture gets a white margin, in which tags may be.
    """
    sheet = _sheet_over(photo, size, text)
    sheet.width = max(photo.width, width)
    boxes = [_scaled(each.box, sheet) for each in objects]
    tags, left_out = _tags(sheet, objects, boxes, COVERED * sheet.width * sheet.height)
    picture = Image.new("RGB", (sheet.width, sheet.height), "white")
    picture.paste(outline_objects(photo, objects, size, sheet.stroke))
    _draw_tags(ImageDraw.Draw(picture), sheet, tags)
    return picture, left_out


def outline_objects(
    photo: Image.Image, objects: Sequence[DrawnObject], size: tuple[int, int], stroke: int, opacity: float = 1.0
) -> Image.Image:
    """Boxes without tags over a picture of the image that keeps its size.

    Lines have an edge of one pixel in black or white, so that they stand out from any background.

    Args:
        photo: a picture of the whole image.
        objects: whose boxes are drawn, best first, in pixels of the image.
        size: (height, width) of the image.
        stroke: width of the lines in pixels.
        opacity: of the lines, 0 to 1. Faint lines have no edges.
    """
    picture = photo.convert("RGB")
    pen, sheet = ImageDraw.Draw(picture, "RGBA"), _sheet_over(photo, size, SIZES[0])
    for each in reversed(objects):
        box, colour = _scaled(each.box, sheet), _colour(each)
        x1, y1 = (
            math.floor(min(max(value, 0), side - 1)) for value, side in ((box.x1, sheet.width), (box.y1, sheet.height))
        )
        x2 = max(math.ceil(min(box.x2, sheet.width)) - 1, x1)
        y2 = max(math.ceil(min(box.y2, sheet.height)) - 1, y1)
        if opacity == 1.0:
            edge = (*text_colour(colour), EDGE)
            pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=edge)
            if min(x2 - x1, y2 - y1) > 2 * stroke + 2:
                pen.rectangle((x1 + stroke, y1 + stroke, x2 - stroke, y2 - stroke), outline=edge)
        pen.rectangle((x1, y1, x2, y2), outline=(*colour, round(255 * opacity)), width=stroke)
    return picture


def draw_classes(photo: Image.Image, classes: Sequence[tuple[int, str, float]], note: str = "") -> Image.Image:
    """The classes of an image below it, each with a bar as long as its score.

    Args:
        photo: the upright RGB image.
        classes: number, name and score of each, best first.
        note: a line above them.
    """
    rows = [(number, f"{100 * score:.1f} %  {name}", score) for number, name, score in classes]
    return _with_legend(_Canvas(photo), rows, note)


def draw_class_map(photo: Image.Image, class_map: np.ndarray, classes: Sequence[tuple[int, str, float]]) -> Image.Image:
    """The class of each pixel as a colour over the image, and the colours' names below.

    Args:
        photo: the upright RGB image.
        class_map: (H, W) numbers of the classes.
        classes: number, name and share of the pixels of each, the most frequent first.
    """
    canvas = _Canvas(photo)
    for number in np.unique(class_map).tolist():
        if number != NO_OBJECT:
            canvas.overlay(class_map == number, class_colour(number), CLASS_OPACITY)
    rows = [(number, f"{100 * share:.1f} %  {name}", share) for number, name, share in classes]
    return _with_legend(canvas, rows, "")


def draw_wrong_pixels(photo: Image.Image, wrong: np.ndarray) -> Image.Image:
    """An image with its wrong pixels in red.

    Args:
        photo: the upright RGB image.
        wrong: (H, W) bool.
    """
    canvas = _Canvas(photo)
    canvas.photo = canvas.photo.convert("L").convert("RGB")
    canvas.overlay(wrong, WRONG, 0.75)
    return _with_legend(canvas, [], f"{100 * float(wrong.mean()):.1f} % of the pixels are wrong")


def _with_legend(canvas: _Canvas, rows: Sequence[tuple[int, str, float]], note: str) -> Image.Image:
    """Lines of text below the image, each with the colour of a class and a bar."""
    shown, room = rows[:LEGEND_ROWS], canvas.width - 2 * canvas.line
    blocks = [(number, fit_text(text, room, canvas.text, TAG_LINES), score) for number, text, score in shown]
    notes = fit_text(note, canvas.width - 8, canvas.text, TAG_LINES) if note else []
    if len(rows) > len(shown):
        notes.append(f"and {len(rows) - len(shown)} more classes")
    lines = len(notes) + sum(len(block) for _, block, _ in blocks)
    picture, pen = canvas.finished(lines * canvas.line + len(blocks) * 2 * BAR + 8)
    y = canvas.height + 4
    for note_line in notes:
        _write(pen, (4, y), note_line, canvas.text, (255, 255, 255))
        y += canvas.line
    for number, block, score in blocks:
        colour = class_colour(number)
        left, side = canvas.line + 4, canvas.line - 8
        pen.rectangle((4, y + 3, 4 + side, y + 3 + side), fill=colour, outline=(255, 255, 255))
        for line in block:
            _write(pen, (left, y), line, canvas.text, (255, 255, 255))
            y += canvas.line
        length = max(1.0, min(score, 1.0) * (canvas.width - left - 4))
        pen.rectangle((left, y, left + length, y + BAR - 1), fill=colour if number != NO_OBJECT else (140, 140, 140))
        y += 2 * BAR
    return picture


def _tags(
    canvas: _Sheet, objects: Sequence[DrawnObject], boxes: Sequence[_Rectangle], area: float = math.inf
) -> tuple[list[_Tag], int]:
    """Where each tag goes, with its lines and colour; and how many have no place. All but the first fit into `area`."""
    placed: list[_Tag] = []
    left_out = 0
    for each, box in zip(objects, boxes, strict=True):
        lines = fit_text(f"{each.mark.value}{each.label}", canvas.width - 8, canvas.text, TAG_LINES)
        width = max(text_width(line, canvas.text) for line in lines) + 7
        height = len(lines) * canvas.line
        free = None
        if not placed or width * height <= area:
            free = next(
                (
                    place
                    for place in _places(box, width, height, canvas)
                    if place.within(canvas.width, canvas.height) and not any(place.meets(other) for other, *_ in placed)
                ),
                None,
            )
        if free is None:
            left_out += 1
        else:
            area -= width * height
            placed.append((free, lines, _colour(each)))
    return placed, left_out


def _places(box: _Rectangle, width: float, height: float, canvas: _Sheet) -> list[_Rectangle]:
    """Places for a tag at a box, the best first: above, inside at the top, below, inside at the bottom, beside."""
    left = min(max(box.x1, 0), max(canvas.width - width, 0))
    right = max(min(box.x2, canvas.width) - width, 0)
    top, bottom = max(box.y1, 0), min(box.y2, canvas.height)
    corners = [(left, box.y1 - height), (left, top), (left, box.y2), (left, bottom - height)]
    corners += [(right, box.y1 - height), (right, top), (right, box.y2), (right, bottom - height)]
    corners += [(box.x2, top), (box.x1 - width, top), (box.x2, bottom - height), (box.x1 - width, bottom - height)]
    return [_Rectangle(round(x), round(y), round(x) + math.ceil(width), round(y) + height) for x, y in corners]


def _draw_tags(pen: ImageDraw.ImageDraw, sheet: _Sheet, tags: Sequence[_Tag]) -> None:
    for rectangle, lines, colour in tags:
        pen.rectangle((rectangle.x1, rectangle.y1, rectangle.x2 - 1, rectangle.y2 - 1), fill=colour)
        for i, line in enumerate(lines):
            _write(pen, (rectangle.x1 + 3, rectangle.y1 + i * sheet.line), line, sheet.text, text_colour(colour))


def _sheet_over(photo: Image.Image, size: tuple[int, int], text: int) -> _Sheet:
    """The sheet of a picture of an image whose (height, width) is `size`."""
    return _Sheet((photo.width / size[1], photo.height / size[0]), photo.width, photo.height, text)


def _scaled(box: Sequence[float], sheet: _Sheet) -> _Rectangle:
    x, y = sheet.scale
    return _Rectangle(box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def _colour(each: DrawnObject) -> tuple[int, int, int]:
    return {Mark.WRONG: WRONG, Mark.MISSED: MISSED}.get(each.mark) or class_colour(each.colour)


def _draw_box(
    pen: ImageDraw.ImageDraw, box: _Rectangle, colour: tuple[int, int, int], stroke: int, dashed: bool
) -> None:
    x1, y1 = round(box.x1), round(box.y1)
    x2, y2 = max(round(box.x2) - 1, x1), max(round(box.y2) - 1, y1)
    if not dashed:
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=stroke)
        return
    step = 4 * stroke
    for x in range(x1, x2 + 1, 2 * step):
        for y in (y1, y2):
            pen.line((x, y, min(x + step, x2), y), fill=colour, width=stroke)
    for y in range(y1, y2 + 1, 2 * step):
        for x in (x1, x2):
            pen.line((x, y, x, min(y + step, y2)), fill=colour, width=stroke)


def _draw_keypoints(pen: ImageDraw.ImageDraw, points: np.ndarray, colour: tuple[int, int, int], stroke: int) -> None:
    places = [(float(x), float(y)) for x, y in points]
    if len(places) == KEYPOINTS:
        for first, last in SKELETON:
            pen.line((*places[first], *places[last]), fill=colour, width=stroke)
    for x, y in places:
        pen.ellipse((x - stroke, y - stroke, x + stroke, y + stroke), fill=(255, 255, 255), outline=colour)


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: tuple[int, int, int]
) -> None:
    """Write one line of printable text with its top left corner at (x, y)."""
    x, y = place
    baseline = y + size
    for font, part in pillow_runs(text, size):
        pen.text((x, baseline), part, font=font, fill=colour, anchor="ls")
        x += text_width(part, size)
