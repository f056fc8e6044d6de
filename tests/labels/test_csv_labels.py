"""Tables of classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fpnx.core.errors import FpnxError
from fpnx.labels.annotations import Category, Dropped, LabelSet
from fpnx.labels.reading import read_labels


def read(folder: Path, text: str) -> LabelSet:
    (folder / "labels.csv").write_bytes(text.encode())
    return read_labels(folder / "labels.csv", ["a.jpg"])


def classes(labels: LabelSet) -> dict[str, list[str]]:
    return {image.name: [labels.categories[i].name for i in image.classes] for image in labels.images}


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg,cat\nb/c.jpg,dog\n",
        "path,label\na.jpg,cat\nb/c.jpg,dog",
        "label,image path\ncat,a.jpg\ndog,b/c.jpg\n",
        "\ufefffilename,width,height,class\r\na.jpg,5,6,cat\r\nb/c.jpg,7,8,dog\r\n",
        '"a.jpg", "cat"\n\n"b\\c.jpg", dog\n,,\n',
        "a.jpg;cat\nb/c.jpg;dog",
        "a.jpg\tcat\nb/c.jpg\tdog",
    ],
)
def test_tables(text: str, tmp_path: Path) -> None:
    labels = read(tmp_path, text)
    assert (labels.format, labels.task, labels.multi_label, labels.dropped) == ("csv", "classification", False, {})
    assert labels.categories == (Category(0, "cat"), Category(1, "dog"))
    assert classes(labels) == {"a.jpg": ["cat"], "b/c.jpg": ["dog"]}


@pytest.mark.parametrize("text", ["a.jpg,dog;cat\nb.jpg,dog\nc.jpg,", "a.jpg,cat | dog\nb.jpg,dog\nc.jpg,\n",
                                  "a.jpg,dog\na.jpg,cat\nb.jpg,dog\nc.jpg,;"])  # fmt: skip
def test_several_labels(text: str, tmp_path: Path) -> None:
    labels = read(tmp_path, text)
    assert labels.multi_label
    assert classes(labels) == {"a.jpg": ["cat", "dog"], "b.jpg": ["dog"], "c.jpg": []}


def test_numbers_are_ids_in_their_order(tmp_path: Path) -> None:
    labels = read(tmp_path, "a.jpg,10\nb.jpg,9\nc.jpg,-1")
    assert labels.categories == (Category(-1, "-1"), Category(9, "9"), Category(10, "10"))
    assert classes(labels) == {"a.jpg": ["10"], "b.jpg": ["9"], "c.jpg": ["-1"]}
    assert read(tmp_path, "a.jpg,1\nb.jpg,01").categories == (Category(0, "01"), Category(1, "1"))
    assert read(tmp_path, f"a.jpg,{'9' * 5000}\nb.jpg,1").categories[0] == Category(0, "1")


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    labels = read(tmp_path, "a.jpg,cat\n,dog\nb.jpg,\na.jpg,cat\n")
    assert labels.dropped == {
        "rows without a path": Dropped(1, "line 2"),
        "duplicates": Dropped(1, "line 4 of a.jpg"),
        "rows without a label": Dropped(1, "b.jpg"),
    }
    assert classes(labels) == {"a.jpg": ["cat"]}
    assert labels.categories == (Category(0, "cat"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\nd,e,f", r"the first line has 3 columns \(a, b, c\); it takes path,label on each line"),
        ("path,xmin,ymin,xmax,ymax,class\n", "a table of boxes, which fpnx does not read: convert it to COCO"),
        ("a.jpg,cat\nb.jpg\n", "line 2: 1 columns; every line needs a path and a label"),
        ('a.jpg,"cat\nb.jpg,dog', r"line 2: not a table \(unexpected end of data\)"),
        ("a.jpg," + "x" * 200000, r"line 1: not a table \(field larger than field limit"),
        (",\n;,\n", "no row with a path and a label"),
        (",,\n , ,\n", "all lines are empty"),
        ("path,label\n", "no row with a path and a label"),
        ("a.jpg,\n", r"no row with a path and a label: rows without a label \(1\), such as a.jpg"),
    ],
)
def test_tables_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FpnxError, match=message) as error:
        read(tmp_path, text)
    assert len(str(error.value).splitlines()) == 1
