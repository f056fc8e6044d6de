"""Reading files of predictions, and finding the boxes of images by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fpnx.core.errors import FpnxError
from fpnx.visualization.predicted_boxes import PredictedBox, PredictedBoxes, count_by_level


def result(name: str = "a.png", **changes: Any) -> dict[str, Any]:
    """One result as `fpnx predict` writes it."""
    made = {
        "image_id": 0,
        "file_name": name,
        "category_id": 17,
        "category_name": "cat",
        "bbox": [10, 20, 30.5, 40],
        "score": 0.75,
        "level": "P4",
    }
    return made | changes


def written(path: Path, results: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(results))
    return path


def test_boxes_are_read_best_first(tmp_path: Path) -> None:
    results = [
        result(score=0.25),
        result("\udcff.png", level=None),
        result(score=1, category_name="dog", category_id=0),
    ]
    del results[1]["level"]
    boxes = PredictedBoxes.read(written(tmp_path / "p.json", results)).by_name
    assert boxes["a.png"] == [
        PredictedBox((10, 20, 40.5, 60), 1.0, 0, "dog", "P4"),
        PredictedBox((10, 20, 40.5, 60), 0.25, 17, "cat", "P4"),
    ]
    assert [each.label for each in boxes["a.png"]] == ["dog 1.00 P4", "cat 0.25 P4"]
    assert [each.label for each in boxes["\udcff.png"]] == ["cat 0.75"]


@pytest.mark.parametrize("layout", ["[{0},{0}]", "[\n{0},\n{0}\n]\n", "\ufeff [ {0} , {0} ] ", "[\r\n{0}\r\n,{0}]"])
def test_any_layout_of_the_list(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(layout.replace("{0}", json.dumps(result())).encode())
    assert len(PredictedBoxes.read(path).by_name["a.png"]) == 2


@pytest.mark.parametrize("text", ["[]", "[]\n", " [ \n ] "])
def test_a_file_without_boxes(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    assert PredictedBoxes.read(tmp_path / "p.json").of_images(["a.png"], "/") == {}


WITHOUT_NAMES = json.dumps([{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}])
ONE = json.dumps(result())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        (WITHOUT_NAMES, "lack, as plain COCO results do, file_name and category_name: take the JSON file"),
        (json.dumps([{"file_name": "a", "category_name": "b"}]), "lack category_id and bbox and score"),
        ('{"images": [], "annotations": []}', "labels, not predictions"),
        ("path,label,score,rank,category_id\na.png,cat,1,1,1\n", "a table of classes, and only boxes are drawn"),
        ("hello", "not a JSON list"),
        (f"[\n{ONE},\n{ONE[:40]}", r"not a whole JSON file \(line 3\)"),
        (f"[{ONE}", "not a whole JSON file"),
        (f"[{ONE},]", "not a whole JSON file"),
        (f"[{ONE} {ONE}]", "not a whole JSON file"),
        (f"[{ONE}] x", "not a whole JSON file"),
        ("[" * 100_000, "not a whole JSON file"),
        (f"[{ONE}, 3]", "result 2 is no JSON object"),
        (json.dumps([result(bbox=[1, 2, 3])]), r"result 1: bbox \[1, 2, 3\] is not x, y, width and height"),
        (json.dumps([result(bbox=[1, 2, -3, 4])]), "is not x, y, width and height"),
        (json.dumps([result(bbox=[1, 2, float("nan"), 4])]), "is not x, y, width and height"),
        (json.dumps([result(score=1.5)]), "score 1.5 is not from 0 to 1"),
        (json.dumps([result(score=True)]), "score True is not from 0 to 1"),
        (json.dumps([result(category_id="3")]), "category_id 3 is not a whole number"),
        (json.dumps([result(file_name=3)]), "must be texts"),
        (json.dumps([result(level=4)]), "must be texts"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_other_files_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(FpnxError, match=message) as caught:
        PredictedBoxes.read(tmp_path / "p.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"predictions {tmp_path / 'p.json'}: ")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\x89HDF\r\n")
    for path, message in ((tmp_path, "a folder"), (tmp_path / "p.json", "UTF-8"), (tmp_path / "none", "No such file")):
        with pytest.raises(FpnxError, match=message):
            PredictedBoxes.read(path)


def test_images_are_found_by_their_names(tmp_path: Path) -> None:
    names = ["a.png", "below/a.png", "cafe\u0301.png", "x/d.png", "y/d.png"]
    results = [
        result("below/a.png", score=0.1),
        result("caf\u00e9.png", score=0.2),
        result("/data/photos/a.png", score=0.3),
        result("d.png"),  # of two images
        result("none.png"),
    ]
    found = PredictedBoxes.read(written(tmp_path / "p.json", results)).of_images(names, "/data/photos")
    assert {position: boxes[0].score for position, boxes in found.items()} == {0: 0.3, 1: 0.1, 2: 0.2}


def test_the_surest_of_several_names_has_the_image(tmp_path: Path) -> None:
    results = [
        result("elsewhere/a.png", score=0.1),
        result("a.png", score=0.2),
        result("other/b.png"),
        result("x/b.png"),
    ]
    found = PredictedBoxes.read(written(tmp_path / "p.json", results)).of_images(["a.png", "b.png"], "")
    assert {position: [box.score for box in boxes] for position, boxes in found.items()} == {0: [0.2]}


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    predictions = PredictedBoxes.read(written(tmp_path / "p.json", [result("dogs/1.png")]))
    with pytest.raises(FpnxError, match=r"none of the 2 images: an image is named a\.png, .* there is dogs/1\.png"):
        predictions.of_images(["a.png", "b.png"], "/")


def test_counts_by_level() -> None:
    boxes = [PredictedBox((0, 0, 1, 1), 0.5, 1, "cat", level) for level in ("P5", "P3", "P5")]
    assert count_by_level(boxes) == "3 boxes: P3 1 · P5 2"
    assert count_by_level(boxes[:1]) == "1 box: P5 1"
    assert count_by_level([]) == "0 boxes"
    unknown = PredictedBox((0, 0, 1, 1), 0.5, 1, "cat")
    assert count_by_level([unknown]) == "1 box"
    assert count_by_level([unknown, *boxes]) == "4 boxes: P3 1 · P5 2 · without a level 1"
