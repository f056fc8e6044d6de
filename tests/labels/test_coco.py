"""COCO files: right numbers from odd files, and one clear line for those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpnx.core.errors import FpnxError
from fpnx.labels.annotations import Category, Dropped, LabelSet
from fpnx.labels.reading import read_labels
from tests.helpers.labels import box, coco_file

SIZES = {"a.jpg": (100, 200), "b/c.jpg": (50, 60)}
GOOD = box(1, 1, [10, 20, 30, 40])
TRIANGLE = [10.0, 10.0, 30.0, 10.0, 10.0, 30.0]


def read(path: str | Path, **more: Any) -> LabelSet:
    return read_labels(path, ["a.jpg", "b/c.jpg"], **more)


def counts(labels: LabelSet) -> dict[str, int]:
    return {reason: each.count for reason, each in labels.dropped.items()}


def test_a_whole_file(tmp_path: Path) -> None:
    annotations = [
        box(2, 3, [1.5, 2, 3, 4], area=7.5, segmentation=[TRIANGLE], iscrowd=0, id=11),
        box(1, 1, [10, 20, 30, 40], id=12),
        box(2, 1, [0, 0, 60, 50], iscrowd=1, segmentation={"size": [50, 60], "counts": [0, 3000]}, area=3000, id=13),
    ]
    labels = read(coco_file(tmp_path / "labels", annotations, SIZES))
    assert (labels.format, labels.task, labels.dropped, labels.remarks) == ("coco", "detection", {}, ())
    assert labels.categories == (Category(1, "cat"), Category(3, "dog"))
    first, second = labels.images
    assert (first.name, first.size, first.areas, first.segments) == ("a.jpg", (100, 200), None, ())
    np.testing.assert_array_equal(first.boxes, [[10, 20, 40, 60]])
    assert (second.name, second.size, second.relative) == ("b/c.jpg", (50, 60), False)
    np.testing.assert_array_equal(second.boxes, [[1.5, 2, 4.5, 6], [0, 0, 60, 50]])
    assert (second.classes.tolist(), second.crowd.tolist()) == ([1, 0], [False, True])
    assert second.areas is not None
    assert second.areas.tolist() == [7.5, 3000]
    assert second.segments == ([TRIANGLE], {"size": [50, 60], "counts": [0, 3000]})
    assert labels.has_segments


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (box(1, 1, [10, 20, 0, 40]), "empty boxes"),
        (box(1, 1, [1e30, 20, 1, 40]), "empty boxes"),  # x + width is x
        (box(1, 1, [10, 20, 30, -4]), "reversed boxes"),
        (box(1, 1, [float("nan"), 20, 30, 40]), "boxes with values that are not finite numbers"),
        (box(1, 1, [10, 20, float("inf"), 40]), "boxes with values that are not finite numbers"),
        (box(1, 1, [10**400, 20, 30, 40]), "boxes with values that are not finite numbers"),
        (box(1, 1, [1e308, 20, 1e308, 40]), "boxes with values that are not finite numbers"),
        (box(1, 1, [10, 20, 30]), "annotations without a box of four numbers"),
        (box(1, 1, [10, 20, "30", 40]), "annotations without a box of four numbers"),
        (box(1, 1, [10, 20, True, 40]), "annotations without a box of four numbers"),
        (box(1, 1, {"x": 1}), "annotations without a box of four numbers"),
        (box(1, 1, None), "annotations without a box of four numbers"),
        (box(1, 1, []), "annotations without a box of four numbers"),
        (box(1, 7, [10, 20, 30, 40]), "objects of an unknown class"),
        (box(1, "1", [10, 20, 30, 40]), "objects of an unknown class"),
        (box(1, None, [10, 20, 30, 40]), "objects of an unknown class"),
        (box(1, [1], [10, 20, 30, 40]), "objects of an unknown class"),
        (box(99, 1, [10, 20, 30, 40]), "annotations of an image id that is not listed"),
        (box([1], 1, [10, 20, 30, 40]), "annotations of an image id that is not listed"),
        (GOOD, "duplicates"),
        (17, "annotations that are no JSON objects"),
        (None, "annotations that are no JSON objects"),
    ],
)
def test_what_cannot_be_used_is_counted(bad: Any, reason: str, tmp_path: Path) -> None:
    labels = read(coco_file(tmp_path / "labels", [GOOD, bad, bad], SIZES))
    assert counts(labels) == {reason: 2}
    np.testing.assert_array_equal(labels.images[0].boxes, [[10, 20, 40, 60]])
    assert len(labels.images[1].classes) == 0


def test_examples_name_the_annotation(tmp_path: Path) -> None:
    bad = [box(1, 1, [0, 0, 0, 1], id=17), box(2, 9, [0, 0, 1, 1]), box(1, 1, [0, 0, 0, 1], id=18)]
    labels = read(coco_file(tmp_path / "labels", [GOOD, *bad], SIZES))
    assert labels.dropped == {
        "empty boxes": Dropped(2, "annotation 17 of a.jpg"),
        "objects of an unknown class": Dropped(1, "annotation 3 (category_id 9) of b/c.jpg"),
    }


@pytest.mark.parametrize(
    "outline",
    [
        [[10, 10, 30, 10]], [[10, 10, 30, 10, 10, 30, 1]], [[10, 10, 30, 10, 10, float("nan")]], "RLE", 17, [["a"] * 6],
        [[10, 10, 30, 10, 10, 10**400]], {"size": [100, 200], "counts": [3]}, {"size": [100], "counts": [100]},
        {"size": [100, 200], "counts": [-1, 20001]}, {"size": [100, 200], "counts": ""}, {"counts": "04"},
        {"size": [10**6, 10**6], "counts": [10**12]}, {"size": ["1", 2], "counts": [2]}, {"size": [2, 2], "counts": 4},
    ],
)  # fmt: skip
def test_outlines_that_cannot_be_drawn_leave_the_box(outline: Any, tmp_path: Path) -> None:
    labels = read(coco_file(tmp_path / "labels", [{**GOOD, "segmentation": outline}], SIZES))
    assert counts(labels) == {"outlines that cannot be drawn": 1}
    assert labels.images[0].segments == ()
    np.testing.assert_array_equal(labels.images[0].boxes, [[10, 20, 40, 60]])


def test_bad_polygons_are_left_out_of_an_outline_and_a_single_one_needs_no_list(tmp_path: Path) -> None:
    several = {**GOOD, "segmentation": [[1, 2], TRIANGLE]}
    single = {**GOOD, "segmentation": TRIANGLE}
    for number, annotation in enumerate((several, single)):
        labels = read(coco_file(tmp_path / str(number), [annotation], SIZES))
        assert labels.images[0].segments == ([TRIANGLE],)


def test_a_box_is_taken_from_the_outline_where_there_is_none(tmp_path: Path) -> None:
    rle = {"size": [100, 200], "counts": [205, 10, 90, 10, 19685]}  # rows 5 to 14 of columns 2 and 3
    annotations = [{**box(1, 1, None), "segmentation": [TRIANGLE]}, {**box(1, 3, None), "segmentation": rle}]
    labels = read(coco_file(tmp_path / "labels", annotations, SIZES))
    np.testing.assert_array_equal(labels.images[0].boxes, [[10, 10, 30, 30], [2, 5, 4, 15]])


def test_equal_boxes_with_other_outlines_or_classes_are_no_duplicates(tmp_path: Path) -> None:
    annotations = [GOOD, {**GOOD, "segmentation": [TRIANGLE]}, {**GOOD, "category_id": 3}, {**GOOD, "iscrowd": 1}]
    labels = read(coco_file(tmp_path / "labels", annotations, SIZES))
    assert (len(labels.images[0].classes), labels.dropped) == (4, {})


def test_gaps_names_and_order_of_categories_stay(tmp_path: Path) -> None:
    categories = [{"id": 90, "name": "x"}, {"id": 7, "name": "y"}, {"id": 13}, {"id": 8.0, "name": "y"}]
    labels = read(
        coco_file(tmp_path / "labels", [box(1, 90, [0, 0, 1, 1]), box(1, 7, [0, 0, 1, 1])], SIZES, categories)
    )
    assert [(each.id, each.name) for each in labels.categories] == [(7, "y"), (8, "y"), (13, "13"), (90, "x")]
    assert labels.images[0].classes.tolist() == [3, 0]
    assert labels.remarks == ("2 classes have the name y (ids 7, 8): they stay 2 classes",)


def test_one_class_one_image(tmp_path: Path) -> None:
    labels = read(
        coco_file(tmp_path / "labels", [box(1, 0, [0, 0, 1, 1])], {"a.jpg": (9, 9)}, [{"id": 0, "name": "x"}])
    )
    assert (labels.categories, len(labels.images)) == ((Category(0, "x"),), 1)


def test_entries_of_one_file_are_one_image(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": "two", "file_name": "a.jpg", "height": 5, "width": None}]
    annotations = [GOOD, box("two", 1, [10, 20, 30, 40]), box("two", 3, [1, 1, 1, 1])]
    labels = read(coco_file(tmp_path / "labels", annotations, images))
    assert (len(labels.images), labels.images[0].size) == (1, None)
    assert labels.images[0].classes.tolist() == [0, 1]
    assert counts(labels) == {"duplicates": 1}
    assert labels.remarks == ("1 image listed again under another id: their annotations were joined",)


def test_names_of_windows_and_lvis(tmp_path: Path) -> None:
    url = "http://images.cocodataset.org/train2017/000000391895.jpg"
    images = [{"id": 1, "file_name": "cats\\a.jpg"}, {"id": 2, "coco_url": url}, {"id": 3}]
    labels = read(coco_file(tmp_path / "labels", [GOOD], images))
    assert [image.name for image in labels.images] == ["cats/a.jpg", url]
    assert labels.dropped == {"images without a file name": Dropped(1, "image 3")}


@pytest.mark.parametrize(("ids", "shown"), [((0, 1), "one lower"), ((2, 3), "one higher")])
def test_numbers_off_by_one_are_refused(ids: tuple[int, ...], shown: str, tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    annotations = [box(1, number, [0, 0, 5, 5]) for number in ids]
    with pytest.raises(
        FpnxError, match=rf"have ids 1 to 2, .* counted {shown}: 1 annotation with category_id"
    ) as error:
        read(coco_file(tmp_path / "labels", annotations, SIZES, categories))
    assert "\n" not in str(error.value)


def broken(**changes: Any) -> str:
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [GOOD], "categories": [{"id": 1, "name": "cat"}],
    }  # fmt: skip
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        (broken()[:-40], r"not a whole JSON file \(line 1: "),
        (broken()[:-1], r"not a whole JSON file \(line 1: it ends early\)"),
        ("{" * 100000, "not a"),
        ("[" * 100000, "not a JSON file that can be read"),
        ('{"images": ' + "1" * 5000 + "}", r"not a JSON file that can be read \(Exceeds the limit"),
        ("[]", "a JSON list, not a COCO file"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]', "a list of predictions"),
        ("{}", "JSON without images, annotations, categories: not a COCO file"),
        ('{"shapes": [], "imagePath": "a.jpg"}', "a LabelMe file, which fpnx does not read"),
        (broken(annotations={}), "annotations must be a list, not dict"),
        (broken(images=None), "images must be a list, not NoneType"),
        (broken(annotations=[]), "no annotation can be used, since there is none"),
        (broken(annotations=[box(1, 8, [1, 1, 1, 1])]), r"no annotation can be used: objects of an unknown class "
                                                        r"\(1\), such as annotation 1 \(category_id 8\) of a.jpg"),
        (broken(categories=[]), "no categories"),
        (broken(categories=[{"name": "cat"}]), "a category needs a whole number as id"),
        (broken(categories=["cat"]), "a category needs a whole number as id, not 'cat'"),
        (broken(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "two categories have the id 1, a and b"),
        (broken(images=[]), "no images"),
        (broken(images=["a.jpg"]), "image 1 of the list is no JSON object with an id"),
        (broken(images=[{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]), "two images have the id 1, a"),
        (broken(images=[{"id": 1, "file_name": 5}]), "no images: images without a file name"),
        (broken(annotations=[{"segments_info": [], "image_id": 1}]), "COCO's panoptic format"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(FpnxError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"labels {path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_names_in_messages_are_printable(tmp_path: Path) -> None:
    path = coco_file(tmp_path / "labels", [GOOD, box(1, 1, [0, 0, 0, 0], id="\x1b[31m\n")], {"a\x07.jpg": (9, 9)})
    assert read(path).dropped["empty boxes"].example == r"annotation \x1b[31m\n of a\x07.jpg"
