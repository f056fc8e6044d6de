"""Pictures of predictions: sizes, colours, and text that stays inside and apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpnx.core.mask_runs import encode_mask
from fpnx.visualization import predictions
from fpnx.visualization.class_colours import class_colour, text_colour
from fpnx.visualization.predictions import (
    MARGIN,
    DrawnObject,
    Mark,
    draw_class_map,
    draw_classes,
    draw_objects,
    draw_wrong_pixels,
)

LONG = "an extremely long name of a class, with commas, that somebody wrote into a label file without any thought"


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def objects(count: int, size: tuple[int, int], label: str = "thing 0.50") -> list[DrawnObject]:
    width, height = size
    draw = np.random.default_rng(0)
    made = []
    for i in range(count):
        x, y = draw.uniform(0, 0.8, 2) * size
        box = (x, y, x + 0.2 * width, y + 0.2 * height)
        made.append(DrawnObject(box=box, label=label, colour=i + 1))
    return made


@pytest.mark.parametrize("size", [(1, 1), (32, 24), (640, 480), (6000, 4000), (3000, 20), (20, 3000)])
def test_pictures_have_a_size_at_which_text_can_be_read(size: tuple[int, int]) -> None:
    drawn = draw_objects(grey(*size), objects(3, size))
    assert 640 <= max(drawn.size) <= 1640
    assert drawn.width >= 320
    assert drawn.height >= 240


def test_tags_stay_inside_and_do_not_cover_each_other() -> None:
    size = (500, 400)
    for label, count in (("thing 0.50", 60), (LONG, 6), ("Ünïcode 日本語\t", 5)):
        placed = objects(count, size, label)
        canvas = predictions._Canvas(grey(*size))
        boxes = [predictions._scaled(each.box, canvas) for each in placed]
        tags, left_out = predictions._tags(canvas, placed, boxes)
        assert len(tags) + left_out == count
        assert tags
        for i, (place, lines, _) in enumerate(tags):
            assert place.within(canvas.width, canvas.height)
            for line in lines:  # its text fits into it
                assert predictions.text_width(line, canvas.text) <= place.x2 - place.x1
            assert not any(place.meets(other) for other, *_ in tags[:i])
    assert left_out == 0


def test_labels_without_room_are_counted_below_the_picture() -> None:
    crowd = [DrawnObject(box=(10, 10, 60, 60), label="thing 0.50", colour=1) for _ in range(40)]
    assert draw_objects(grey(640, 480), crowd).height > 480
    assert draw_objects(grey(640, 480), crowd[:3]).height == 480


def test_a_class_has_one_colour_and_classes_differ() -> None:
    colours = [class_colour(number) for number in range(1, 91)]
    assert colours == [class_colour(number) for number in range(1, 91)]
    assert len(set(colours)) == 90
    distances = [np.abs(np.subtract(a, b)).sum() for a, b in itertools.pairwise(colours)]
    assert min(distances) > 100  # of numbers in a row
    assert text_colour((255, 255, 0)) == (0, 0, 0)
    assert text_colour((0, 0, 120)) == (255, 255, 255)


def test_boxes_and_masks_are_where_the_objects_are() -> None:
    mask = np.zeros((480, 640), bool)
    mask[100:200, 300:400] = True
    each = DrawnObject(
        box=(300, 100, 400, 200),
        label="a 1.00",
        colour=5,
        mask=encode_mask(mask[100:200, 300:400], 100, 300, mask.shape),
    )
    drawn = np.asarray(draw_objects(grey(640, 480), [each])).astype(int)
    colour = class_colour(5)
    assert tuple(drawn[150, 300]) == colour
    assert tuple(drawn[199, 350]) == colour
    assert tuple(drawn[250, 350]) == (128, 128, 128)
    blended = 128 + 0.45 * (np.array(colour) - 128)
    assert np.abs(drawn[150, 350] - blended).max() <= 2


def test_errors_have_colours_of_their_own() -> None:
    marked = [
        DrawnObject(box=(100, 100, 200, 200), label="a", colour=5, mark=Mark.WRONG),
        DrawnObject(box=(300, 100, 400, 200), label="b", colour=5, mark=Mark.MISSED),
    ]
    drawn = np.asarray(draw_objects(grey(640, 480), marked))
    assert tuple(drawn[150, 100]) == predictions.WRONG
    edge = {tuple(value) for value in drawn[110:190, 300]}
    assert edge == {predictions.MISSED, (128, 128, 128)}  # dashed


def test_classes_stand_below_the_image() -> None:
    drawn = draw_classes(grey(640, 480), [(1, LONG * 2, 0.8), (2, "sock", 0.1)], "labelled sock")
    assert drawn.width == 640
    assert drawn.height > 480 + 4 * 13
    below = np.asarray(drawn)[482:]
    assert (below != MARGIN).any()
    assert (below[:, -3:] == MARGIN).all()  # nothing is cut off at the edge


def test_maps_of_classes_keep_the_background() -> None:
    classes = np.zeros((480, 640), int)
    classes[:, 320:] = 3
    drawn = np.asarray(draw_class_map(grey(640, 480), classes, [(0, "background", 0.5), (3, "cat", 0.5)])).astype(int)
    assert tuple(drawn[100, 100]) == (128, 128, 128)
    expected = 128 + predictions.CLASS_OPACITY * (np.array(class_colour(3)) - 128)
    assert np.abs(drawn[100, 500] - expected).max() <= 2


def test_wrong_pixels_are_red(tmp_path: Path) -> None:
    wrong = np.zeros((480, 640), bool)
    wrong[:240] = True
    drawn = np.asarray(draw_wrong_pixels(grey(640, 480), wrong)).astype(int)
    assert drawn[100, 100, 0] > drawn[100, 100, 1] + 80
    assert tuple(drawn[400, 100]) == (128, 128, 128)
