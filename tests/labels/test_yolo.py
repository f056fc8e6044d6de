"""YOLO's text files: boxes, polygons, names, and classes that are counted from 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fpnx.core.errors import FpnxError
from fpnx.labels.annotations import Category, Dropped, LabelSet
from fpnx.labels.reading import read_labels
from tests.helpers.labels import files

NAMES = "names: [cat, dog]\nnc: 2\n"


def dataset(folder: Path, lines: str, data: str = NAMES, **more: str) -> Path:
    """A folder with `data.yaml` and the labels of `images/train/a.jpg`."""
    return files(folder, {"data.yaml": data, "labels/train/a.txt": lines, **more})


def read(folder: Path, images: tuple[str, ...] = ("a.jpg",)) -> LabelSet:
    return read_labels(folder / "data.yaml", images, folder / "images/train")


def test_boxes_and_polygons(tmp_path: Path) -> None:
    dataset(tmp_path, "0 0.5 0.25 0.5 0.5\n\n1 0.1 0.2 0.3 0.2 0.1 0.6\r\n1\t0.75 0.75 0.5 0.5\n")
    labels = read(tmp_path)
    assert (labels.format, labels.task, labels.dropped, labels.remarks) == ("yolo", "detection", {}, ())
    assert labels.categories == (Category(0, "cat"), Category(1, "dog"))
    image = labels.images[0]
    assert (image.name, image.relative, image.size) == ("a.jpg", True, None)
    np.testing.assert_allclose(image.boxes, [[0.25, 0, 0.75, 0.5], [0.1, 0.2, 0.3, 0.6], [0.5, 0.5, 1, 1]])
    assert image.classes.tolist() == [0, 1, 1]
    assert image.segments == (None, [[0.1, 0.2, 0.3, 0.2, 0.1, 0.6]], None)


@pytest.mark.parametrize(
    "data",
    [
        "names: [cat, dog]",
        "train: images/train  # a comment\nnc: 2\nnames:\n- cat\n- dog\n",
        "names:\n  1: dog\n  0: cat\n",
        'names: {0: \'cat\', "1": "dog"}\nval: !!python/object/apply:os.system [false]\n',
        '{"names": ["cat", "dog"]}',
    ],
)
def test_names(data: str, tmp_path: Path) -> None:
    dataset(tmp_path, "1 0.5 0.5 0.5 0.5", data)
    if data.startswith("{"):  # JSON is YAML, though a file of that name is read as what it is
        with pytest.raises(FpnxError, match="JSON without images"):
            read(tmp_path)
        return
    assert read(tmp_path).categories == (Category(0, "cat"), Category(1, "dog"))


def test_names_stay_words_and_ids_may_have_gaps(tmp_path: Path) -> None:
    dataset(tmp_path, "0 .5 .5 .5 .5\n7 .5 .5 .5 .5\n9 .5 .5 .5 .5", "names: {0: no, 7: on, 9: 1.0}")
    labels = read(tmp_path)
    assert labels.categories == (Category(0, "no"), Category(7, "on"), Category(9, "1.0"))
    assert labels.images[0].classes.tolist() == [0, 1, 2]


def test_classes_counted_from_one_are_refused_and_from_zero_are_not(tmp_path: Path) -> None:
    dataset(tmp_path, "1 .5 .5 .5 .5\n2 .5 .5 .2 .2")
    with pytest.raises(FpnxError, match=r"classes are counted from 1: they are 1 to 2, and data\.yaml names 2 "
                                        r"classes, 0 to 1; YOLO counts from 0, so subtract 1 from each"):  # fmt: skip
        read(tmp_path)
    dataset(tmp_path, "1 .5 .5 .5 .5\n2 .5 .5 .2 .2\n0 .5 .5 .5 .5")
    labels = read(tmp_path)
    assert labels.dropped == {"objects of an unknown class": Dropped(1, "line 2 of a.txt (class 2)")}
    assert labels.images[0].classes.tolist() == [1, 0]
    dataset(tmp_path, "1 .5 .5 .5 .5", "names: [cat]")
    with pytest.raises(FpnxError, match=r"data\.yaml names 1 class, 0 to 0"):
        read(tmp_path)
    dataset(tmp_path, "1 .5 .5 .5 .5\n2 .5 .5 .2 .2", "names: {1: cat, 2: dog}")
    assert read(tmp_path).images[0].classes.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.5", "lines that are neither a box nor a polygon"),
        ("0 0.5 0.5 0.5 0.5 0.9", "lines that are neither a box nor a polygon"),
        ("0 0.5 0.5 0.5 0.5 0.9 0.1 0.2", "lines that are neither a box nor a polygon"),
        ("0.5 0.5 0.5 0.5 0.5", "lines that are neither a box nor a polygon"),
        ("-1 0.5 0.5 0.5 0.5", "lines that are neither a box nor a polygon"),
        ("0 0.5 0.5 x 0.5", "lines that are neither a box nor a polygon"),
        ("nan 0.5 0.5 0.5 0.5", "lines that are neither a box nor a polygon"),
        ("99999999999999999999 0.5 0.5 0.5 0.5", "lines that are neither a box nor a polygon"),
        ("0 0.5 nan 0.5 0.5", "boxes with values that are not finite numbers"),
        ("0 0.1 0.1 inf 0.2 0.3 0.3", "boxes with values that are not finite numbers"),
        ("0 0.5 0.5 0 0.5", "empty boxes"),
        ("0 0.1 0.1 0.1 0.2 0.1 0.3", "empty boxes"),
        ("0 0.5 0.5 -0.1 0.5", "reversed boxes"),
        ("0 320 240 100 100", "boxes that are not in shares of the image (0 to 1)"),
        ("1 0.5 0.5 0.5 0.5", "duplicates"),
        ("5 0.5 0.5 0.5 0.5", "objects of an unknown class"),
    ],
)
def test_what_cannot_be_used_is_counted(line: str, reason: str, tmp_path: Path) -> None:
    dataset(tmp_path, f"1 0.5 0.5 0.5 0.5\n{line}\n")
    labels = read(tmp_path)
    assert {reason: each.count for reason, each in labels.dropped.items()} == {reason: 1}
    assert len(labels.images[0].classes) == 1


def test_key_points_behind_a_box_are_passed_over(tmp_path: Path) -> None:
    dataset(tmp_path, "0 .5 .5 .5 .5 .1 .1 2 .2 .2 1\n", "names: [cat]\nkpt_shape: [2, 3]")
    labels = read(tmp_path)
    np.testing.assert_allclose(labels.images[0].boxes, [[0.25, 0.25, 0.75, 0.75]])
    assert labels.images[0].segments == ()


def test_where_text_files_may_be(tmp_path: Path) -> None:
    line = "0 .5 .5 .5 .5"
    images = ("a.jpg", "deep/a.jpg", "b.png")
    layouts = {
        "parallel": {"data.yaml": NAMES, "labels/train/a.txt": line, "labels/train/deep/a.txt": line},
        "roboflow": {"data.yaml": NAMES, "images/train/labels/a.txt": line, "images/train/labels/deep/a.txt": line},
        "beside": {"data.yaml": NAMES, "images/train/a.txt": line, "images/train/deep/a.txt": line},
    }
    for name, contents in layouts.items():
        folder = files(tmp_path / name, {**contents, "labels/val/b.txt": line, "README.roboflow.txt": "1 2 3 4 5"})
        labels = read_labels(folder / "data.yaml", images, folder / "images/train")
        # The labels of another folder are not those of an image that happens to have the name.
        assert sorted(image.name for image in labels.images) == ["a.jpg", "deep/a.jpg", "labels/val/b.txt"], name
    folder = files(
        tmp_path / "apart", {"images/train/keep": "", "elsewhere/a.txt": line, "elsewhere/classes.txt": "x\ny\n"}
    )
    labels = read_labels(folder / "elsewhere", ["a.jpg"], folder / "images/train")
    assert [image.name for image in labels.images] == ["a.jpg"]
    assert labels.categories == (Category(0, "x"), Category(1, "y"))


def test_a_data_file_apart_from_the_images(tmp_path: Path) -> None:
    files(tmp_path, {"conf/my.yaml": NAMES, "set/labels/train/a.txt": "0 .5 .5 .5 .5", "set/images/train/a.jpg": b""})
    labels = read_labels(tmp_path / "conf/my.yaml", ["a.jpg"], tmp_path / "set/images/train")
    assert [image.name for image in labels.images] == ["a.jpg"]


def test_empty_files_are_images_without_objects(tmp_path: Path) -> None:
    dataset(tmp_path, "0 .5 .5 .5 .5", **{"labels/train/b.txt": ""})
    labels = read(tmp_path, ("a.jpg", "b.jpg", "c.jpg"))
    assert {image.name: len(image.classes) for image in labels.images} == {"a.jpg": 1, "b.jpg": 0}
    dataset(tmp_path, "")
    with pytest.raises(FpnxError, match="no line can be used, since all files are empty"):
        read(tmp_path)


def test_without_names(tmp_path: Path) -> None:
    folder = files(tmp_path / "labels", {"a.txt": "3 .5 .5 .5 .5\n1 .5 .5 .5 .5"})
    labels = read_labels(folder, ["a.jpg"])
    assert [category.name for category in labels.categories] == ["0", "1", "2", "3"]
    assert labels.remarks == (
        "there is no data.yaml or classes.txt, so classes have numbers for names",
        "no object has class 0: YOLO counts classes from 0",
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("names: [cat, dog]\nnc: 3\n", "nc is 3, and names has 2: make them agree"),
        ("names: []\n", "names must be a list of names, or numbers with names"),
        ("names: cat\n", "names must be a list of names, or numbers with names"),
        ("names: {a: cat}\n", "names must be a list of names, or numbers with names"),
        ("names: [[cat]]\n", "names must be a list of names, or numbers with names"),
        ("names: [cat\n", r"not a YAML file that can be read \(line 2\)"),
        ("names: &a [*a]\n", r"not a YAML file that can be read \(line 1\)"),
        ("names: " + "[" * 200, "not a YAML file that can be read"),
        pytest.param("names: " + "[" * 2000, "not a YAML file that can be read", marks=pytest.mark.slow),
    ],
)
def test_data_files_that_cannot_be_used(data: str, message: str, tmp_path: Path) -> None:
    dataset(tmp_path, "0 .5 .5 .5 .5", data)
    with pytest.raises(FpnxError, match=message) as error:
        read(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_no_text_file_and_no_line(tmp_path: Path) -> None:
    files(tmp_path, {"data.yaml": NAMES})
    with pytest.raises(FpnxError, match="no text file with labels; YOLO keeps them in labels/"):
        read(tmp_path)
    dataset(tmp_path, "0 320 240 100 100")
    with pytest.raises(FpnxError, match=r"no line can be used: boxes that are not in shares of the image .* \(1\)"):
        read(tmp_path)
    dataset(tmp_path, "5 .5 .5 .5 .5")
    with pytest.raises(
        FpnxError, match=r"no line can be used: objects of an unknown class \(1\), such as line 1 of a.txt"
    ):
        read(tmp_path)
    (tmp_path / "labels/train/a.txt").write_bytes(b"0 .5 .5 .5 .5\n\xff")
    with pytest.raises(FpnxError, match=r"a.txt: not a text in UTF-8 \(line 2\)"):
        read(tmp_path)
