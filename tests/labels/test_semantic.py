"""Class maps from masks and outlines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpnx.core.errors import FpnxError, ImageError
from fpnx.labels.annotations import Category, LabelSet
from fpnx.labels.reading import read_labels
from fpnx.labels.semantic import class_map
from tests.helpers.labels import box, coco_file, files

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]


def square(image: int, category: int, x1: int, y1: int, x2: int, y2: int, crowd: int = 0) -> dict[str, object]:
    outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return box(image, category, [x1, y1, x2 - x1, y2 - y1], segmentation=outline, iscrowd=crowd)


def outlined(folder: Path, *annotations: object, categories: object = CATEGORIES) -> LabelSet:
    path = coco_file(folder / "a.json", annotations, {"a.jpg": (6, 8)}, categories)  # type: ignore[arg-type]
    return read_labels(path, ["a.jpg"], task="semantic")


def test_a_map_of_outlines(tmp_path: Path) -> None:
    labels = outlined(tmp_path, square(1, 3, 0, 0, 4, 3), square(1, 3, 2, 0, 5, 3), square(1, 5, 4, 2, 8, 4))
    assert (labels.task, labels.categories) == (
        "semantic", (Category(0, "background"), Category(3, "cat"), Category(5, "dog")),
    )  # fmt: skip
    expected = np.zeros((6, 8), np.uint8)
    expected[0:3, 0:5] = 1  # two cats over each other are cat
    expected[2:4, 4:8] = 2
    expected[2, 4] = 255  # a cat and a dog
    found = class_map(labels, labels.images[0], (6, 8))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(class_map(labels, labels.images[0], (12, 16)), expected.repeat(2, 0).repeat(2, 1))


def test_a_third_object_does_not_bring_back_a_class(tmp_path: Path) -> None:
    whole = [square(1, number, 0, 0, 8, 6) for number in (3, 5)]
    for more in ([], [square(1, 3, 0, 0, 8, 6)], [square(1, 5, 0, 0, 7, 6), square(1, 3, 0, 0, 7, 6)]):
        labels = outlined(tmp_path, *whole, *more)
        assert (class_map(labels, labels.images[0], (6, 8)) == 255).all()


def test_crowds_have_no_class_where_no_object_is(tmp_path: Path) -> None:
    labels = outlined(tmp_path, square(1, 5, 0, 0, 8, 2, crowd=1), square(1, 3, 0, 1, 2, 3))
    expected = np.zeros((6, 8), np.uint8)
    expected[0:2] = 255
    expected[1:3, 0:2] = 1
    np.testing.assert_array_equal(class_map(labels, labels.images[0], (6, 8)), expected)


def test_the_class_background_may_be_there_already(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "cat"}, {"id": 9, "name": "background"}]
    labels = outlined(tmp_path, square(1, 0, 0, 0, 8, 3), categories=categories)
    assert labels.categories == (Category(0, "cat"), Category(9, "background"))
    np.testing.assert_array_equal(class_map(labels, labels.images[0], (6, 8))[:, 0], [0, 0, 0, 1, 1, 1])
    labels = outlined(tmp_path, square(1, 0, 0, 0, 8, 3), categories=categories[:1])
    assert labels.categories == (Category(-1, "background"), Category(0, "cat"))


def test_objects_without_an_outline_are_counted(tmp_path: Path) -> None:
    labels = outlined(tmp_path, square(1, 3, 0, 0, 4, 3), box(1, 5, [0, 0, 8, 6]))
    assert {reason: each.count for reason, each in labels.dropped.items()} == {"objects without an outline": 1}
    assert (class_map(labels, labels.images[0], (6, 8)) < 2).all()


def test_yolo_polygons(tmp_path: Path) -> None:
    files(tmp_path, {"a.txt": "1 0 0 0.5 0 0.5 1 0 1\n", "classes.txt": "cat\ndog"})
    labels = read_labels(tmp_path, ["a.jpg"], task="semantic")
    found = class_map(labels, labels.images[0], (4, 6))
    np.testing.assert_array_equal(found, [[2, 2, 2, 0, 0, 0]] * 4)


def test_a_map_of_a_png(tmp_path: Path) -> None:
    values = np.array([[0, 7, 255], [26, 7, 0]], np.uint8)
    (tmp_path / "masks").mkdir()
    Image.fromarray(values).save(tmp_path / "masks/a.png")
    labels = read_labels(tmp_path / "masks", ["a.jpg"])
    np.testing.assert_array_equal(class_map(labels, labels.images[0], (2, 3)), [[0, 1, 255], [2, 1, 0]])
    with pytest.raises(
        ImageError, match=r"its mask has 2×3 pixels \(height × width\), and the image 3×2, which is turned"
    ):
        class_map(labels, labels.images[0], (3, 2))
    with pytest.raises(ImageError, match=r"and the image 4×6$"):
        class_map(labels, labels.images[0], (4, 6))
    # A value that the classes do not have, as in a file that changed since.
    Image.fromarray(values + 1).save(tmp_path / "masks/a.png")
    np.testing.assert_array_equal(class_map(labels, labels.images[0], (2, 3)), [[255, 255, 0], [255, 255, 255]])


def test_too_many_classes(tmp_path: Path) -> None:
    categories = [{"id": number, "name": str(number)} for number in range(1, 256)]
    with pytest.raises(FpnxError, match="256 classes; semantic segmentation takes 255 at most"):
        outlined(tmp_path, square(1, 3, 0, 0, 4, 3), categories=categories)
