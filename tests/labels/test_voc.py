"""Pascal VOC's XML files, and hostile XML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fpnx.core.errors import FpnxError
from fpnx.labels.annotations import Category
from fpnx.labels.reading import read_labels
from tests.helpers.labels import files


def thing(name: str, *corners: object, more: str = "") -> str:
    box = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def annotation(*things: str, filename: str = "a.jpg", size: tuple[object, object] = (40, 30)) -> str:
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{sides}{''.join(things)}</annotation>"


def test_pixels_are_counted_from_one_and_the_last_is_included(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></part>"
    files(tmp_path, {"Annotations/a.xml": annotation(
        thing("dog", 1, 1, 40, 30), thing("cat", 3, 4, 3, 4, more="<difficult>1</difficult>" + part)
    )})  # fmt: skip
    labels = read_labels(tmp_path / "Annotations", ["a.jpg"], tmp_path / "JPEGImages")
    assert (labels.format, labels.task, labels.remarks, labels.dropped) == ("voc", "detection", (), {})
    assert labels.categories == (Category(0, "cat"), Category(1, "dog"))
    image = labels.images[0]
    assert (image.name, image.size, image.relative) == ("a.jpg", (30, 40), False)
    np.testing.assert_array_equal(image.boxes, [[0, 0, 40, 30], [2, 3, 3, 4]])
    assert (image.classes.tolist(), image.crowd.tolist()) == ([1, 0], [False, True])


def test_files_that_count_from_zero(tmp_path: Path) -> None:
    files(tmp_path, {"a.xml": annotation(thing("cat", 0, 2, 40, 30)), "b.xml": annotation(thing("cat", 5, 5, 9.5, 9))})
    labels = read_labels(tmp_path, ["a.jpg", "b.jpg"])
    np.testing.assert_array_equal(labels.images[0].boxes, [[0, 2, 40, 30]])
    np.testing.assert_array_equal(labels.images[1].boxes, [[5, 5, 9.5, 9]])
    assert labels.remarks == ("some boxes begin at 0, so pixels are taken as counted from 0, not from 1 as VOC does",)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (thing("cat", 9, 1, 5, 4), "reversed boxes"),
        (thing("cat", "nan", 1, 5, 4), "boxes with values that are not finite numbers"),
        (thing("cat", "", 1, 5, 4), "objects without a box of four numbers"),
        ("<object><name>cat</name></object>", "objects without a box of four numbers"),
        (thing(" ", 1, 1, 5, 4), "objects without a name"),
        (thing("cat", 1, 1, 4, 4), "duplicates"),
    ],
)
def test_what_cannot_be_used_is_counted(bad: str, reason: str, tmp_path: Path) -> None:
    files(tmp_path, {"a.xml": annotation(thing("cat", 1, 1, 4, 4), bad)})
    labels = read_labels(tmp_path, ["a.jpg"])
    assert {reason: each.count for reason, each in labels.dropped.items()} == {reason: 1}
    assert len(labels.images[0].classes) == 1


def test_sizes_of_zero_are_unknown(tmp_path: Path) -> None:
    for number, size in enumerate(((0, 0), ("", 5), ("inf", "nan"))):
        files(tmp_path / str(number), {"a.xml": annotation(thing("cat", 1, 1, 4, 4), size=size)})
        assert read_labels(tmp_path / str(number), ["a.jpg"]).images[0].size is None


def test_the_image_is_that_of_the_file_name_or_of_the_xml_file(tmp_path: Path) -> None:
    contents = {"one.xml": "IMG_1.jpg", "b.xml": "no-such.jpg", "deep/c.xml": "C:\\photos\\c.jpg", "d.xml": "d"}
    files(
        tmp_path / "ann", {name: annotation(thing("x", 1, 1, 4, 4), filename=says) for name, says in contents.items()}
    )
    images = ["IMG_1.jpg", "b.png", "deep/c.jpg", "c.jpg", "d.jpg"]
    labels = read_labels(tmp_path / "ann", images, tmp_path / "photos")
    assert sorted(image.name for image in labels.images) == ["IMG_1.jpg", "b.png", "d.jpg", "deep/c.jpg"]


LAUGHS = '<!DOCTYPE a [<!ENTITY x "lol">' + "".join(
    f'<!ENTITY x{n} "{f"&x{n - 1};" * 10}">' for n in range(1, 10)
).replace("&x0;", "&x;") + "]>"  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS + "<annotation>&x9;</annotation>", "it defines a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "it defines a document type"),
        ("<annotation>&x;</annotation>", "not well-formed XML: undefined entity"),
        ("<annotation><object>", "not well-formed XML: no element found"),
        ("<html></html>", "its root is <html>, not <annotation>"),
        ("<a>" * 100000, "elements nested too deeply"),
        ('<?xml version="1.0" encoding="none"?><annotation/>', "not well-formed XML: unknown encoding"),
        ("<annotation/>", "no object can be used, since there is none"),
        ("<annotation>\xff</annotation>".encode("latin-1"), "not well-formed XML: not well-formed"),
    ],
)
def test_files_that_cannot_be_used(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = files(tmp_path, {"a.xml": content}) / "a.xml"
    with pytest.raises(FpnxError, match=message) as error:
        read_labels(path, ["a.jpg"])
    assert str(error.value).startswith(f"labels {path}: ")
    assert len(str(error.value).splitlines()) == 1
    if "none" not in message:  # among others, such a file is left out
        files(tmp_path, {"b.xml": annotation(thing("cat", 1, 1, 4, 4)), "c.xml": ""})
        labels = read_labels(tmp_path, ["b.jpg"])
        assert len(labels.images) == 1
        dropped = labels.dropped["files that cannot be read"]
        assert dropped.count == 2
        assert dropped.example.startswith(f"a.xml ({message}")


def test_other_encodings_are_those_that_the_file_names(tmp_path: Path) -> None:
    content = f'<?xml version="1.0" encoding="ISO-8859-1"?>{annotation(thing("café", 1, 1, 4, 4))}'
    files(tmp_path, {"a.xml": content.encode("latin-1")})
    assert read_labels(tmp_path, ["a.jpg"]).categories == (Category(0, "café"),)


def test_nothing_that_can_be_used(tmp_path: Path) -> None:
    files(tmp_path, {"a.xml": annotation(thing("cat", 9, 9, 4, 4))})
    with pytest.raises(FpnxError, match=r"no object can be used: reversed boxes \(1\), such as object 1 of a.xml"):
        read_labels(tmp_path, ["a.jpg"])
