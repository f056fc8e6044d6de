"""Folders as classes."""

from __future__ import annotations

import pytest

from fpnx.core.errors import FpnxError
from fpnx.labels.annotations import Category
from fpnx.labels.reading import read_labels


def test_the_first_folder_is_the_class() -> None:
    labels = read_labels("folders", ["dog/deep/1.jpg", "Cat/1.jpg", "loose.jpg", "dog/2.jpg"], "/x")
    assert (labels.format, labels.task, labels.multi_label) == ("folders", "classification", False)
    assert labels.categories == (Category(0, "Cat"), Category(1, "dog"))
    assert {image.name: image.classes.tolist() for image in labels.images} == {
        "dog/deep/1.jpg": [1], "Cat/1.jpg": [0], "dog/2.jpg": [1],
    }  # fmt: skip
    assert labels.remarks == ("1 image in no folder have no class",)


def test_one_class() -> None:
    assert read_labels("folders", ["a/1.jpg"]).categories == (Category(0, "a"),)


def test_parts_of_a_data_set_are_no_classes() -> None:
    for names in (
        ["train/cat/1.jpg", "val/cat/2.jpg"],
        ["train/cat/1.jpg"],
        ["Train/a/1.jpg", "test/b.jpg", "x/c.jpg"],
    ):
        with pytest.raises(
            FpnxError, match=r"are parts of a data set .*, not classes: give the images of one, such as /x/"
        ):
            read_labels("folders", names, "/x")
    assert len(read_labels("folders", ["train/1.jpg", "boat/1.jpg"]).categories) == 2  # a train


def test_no_folder() -> None:
    with pytest.raises(FpnxError, match="no image is in a folder of its class; put them into /x/CLASS/"):
        read_labels("folders", ["1.jpg"], b"/x")
