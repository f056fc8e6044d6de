"""Formats are recognised by content, and what is no label file is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fpnx.core.errors import FpnxError
from fpnx.labels.reading import read_labels
from tests.helpers.labels import box, coco_file, files
from tests.helpers.object_stores import web_server

VOC = (
    "<annotation><filename>a.jpg</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>4</xmax><ymax>4</ymax></bndbox></object></annotation>"
)
YOLO = {"labels/a.txt": "0 0.5 0.5 0.2 0.2\n"}


def refused(message: str, *arguments: Any, **more: Any) -> None:
    with pytest.raises(FpnxError, match=message) as error:
        read_labels(*arguments, **more)
    assert len(str(error.value).splitlines()) == 1


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    coco = Path(coco_file(tmp_path / "coco", [box(1, 1, [0, 0, 1, 1])], {"a.jpg": (9, 9)})).read_bytes()
    contents = {
        "coco": (coco, b"\xef\xbb\xbf" + coco, coco.decode().encode("utf-16")),
        "voc": (VOC.encode(), b"\xef\xbb\xbf\n" + VOC.encode(), f'<?xml version="1.0"?>{VOC}'.encode("utf-16")),
        "csv": (b"a.jpg,cat", b"a.jpg\tcat\n", b"a.jpg;cat\r\n", "path,label\na.jpg,cat".encode("utf-16")),
    }
    for name, variants in contents.items():
        for content in variants:
            (tmp_path / "labels.dat").write_bytes(content)
            labels = read_labels(tmp_path / "labels.dat", ["a.jpg"])
            assert (labels.format, len(labels.images)) == (name, 1)
            assert labels.images[0].name == "a.jpg"


def test_a_file_whose_beginning_ends_within_a_character(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-16"):
        for shift in range(4):
            text = f"path,label\n{'x' * shift}.jpg,cat\n" + "\U0001f600.jpg,cat\n" * 10000
            (tmp_path / "labels").write_bytes(text.encode(encoding))
            assert len(read_labels(tmp_path / "labels", ["a.jpg"]).images) == 2


def test_a_file_on_a_web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = Path(coco_file(tmp_path / "coco", [box(1, 1, [0, 0, 1, 1])], {"a.jpg": (9, 9)})).read_bytes()
    with web_server() as server:
        for manners in ({}, {"length": False, "ranges": False}):
            assert read_labels(server.put("/set/labels", content, **manners), ["a.jpg"]).format == "coco"
        assert read_labels(server.put("/l.csv", b"a.jpg,cat\n"), ["a.jpg"]).format == "csv"
        refused("no_such.json: ", f"{server.url}/no_such.json", ["a.jpg"])


def test_the_format_of_a_folder_follows_from_its_content(tmp_path: Path) -> None:
    files(tmp_path / "voc", {"a.xml": VOC, "notes.txt": "hello"})
    files(tmp_path / "yolo", YOLO)
    files(tmp_path / "named", {**YOLO, "data.yaml": "names: [cat]", "labels/b.xml": "<x/>"})
    (tmp_path / "masks").mkdir()
    Image.new("L", (4, 4), 1).save(tmp_path / "masks/a.png")
    for name, kind in (("voc", "voc"), ("yolo", "yolo"), ("named", "yolo"), ("masks", "masks")):
        assert read_labels(tmp_path / name, ["a.jpg"]).format == kind, name


def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    photos = files(tmp_path / "photos", {"cat/a.jpg": b"", "dog/b.jpg": b"", "readme.txt": "1 2 3"})
    Image.new("RGB", (4, 4)).save(photos / "cat/c.png")
    refused("a folder without labels .*; for folders as classes give folders", photos, ["cat/a.jpg"], photos)
    both = files(tmp_path / "both", {"x/a.xml": VOC, "y/a.txt": "0 .5 .5 .5 .5"})
    refused(r"labels of several formats, voc \(x/a.xml\), yolo \(y/a.txt\): name the file or folder", both, ["a.jpg"])
    (tmp_path / "coloured").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "coloured/a.png")
    refused("a.png has colours, and masks have one value for each pixel", tmp_path / "coloured", ["cat/a.jpg"], photos)
    coco_file(tmp_path / "photos/labels.json", [], {})
    refused(r"a folder; name the file, such as \S+photos/labels.json", photos, ["a.jpg"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n", "a PNG, not a label file: name the folder of masks"),
        (b"PK\x03\x04", "a zip archive, not a label file: unpack it"),
        (b"path,label\ncaf\xe9.jpg,cat\n", r"not a text in UTF-8 \(line 2\): save it as UTF-8"),
        (b'{"images": ["\xff"]}', "not a text in UTF-8"),
        (b"0 0.5 0.5 0.1 0.1\n", "labels of one image in YOLO's format: name their folder"),
        (b"hello\n", "no known label format"),
        (b"a.jpg,c\0t\n", "zero bytes"),
    ],
)
def test_files_that_are_no_labels(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(content)
    refused(message, tmp_path / "labels", ["a.jpg"])


def test_what_is_no_file(tmp_path: Path) -> None:
    refused("no such file", tmp_path / "nothing.json", ["a.jpg"])
    refused("a folder without labels", tmp_path, ["a.jpg"])
    refused("an empty path", "", ["a.jpg"])
    os.mkfifo(tmp_path / "pipe")
    refused("not a regular file", tmp_path / "pipe", ["a.jpg"])
    (tmp_path / "file").write_text("x")
    refused("Not a directory", tmp_path / "file" / "labels.json", ["a.jpg"])
    refused("escaped|no such file", "bad\x1b\n.json", ["a.jpg"])


def test_a_task_that_the_format_is_not_for(tmp_path: Path) -> None:
    path = coco_file(tmp_path / "a.json", [box(1, 1, [0, 0, 1, 1])], {"a.jpg": (9, 9)})
    refused("a COCO file can be used for detection and semantic, not for classification", path, ["a.jpg"],
            task="classification")  # fmt: skip
    refused("folders as classes can be used for classification, not for", "folders", ["a/b.jpg"], task="semantic")
    refused("boxes without outlines, and semantic segmentation needs outlines", path, ["a.jpg"], task="semantic")
    assert read_labels(path, ["a.jpg"], task="detection").task == "detection"
