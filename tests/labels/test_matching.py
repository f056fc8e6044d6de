"""Names of images in labels and of the images of a run."""

from __future__ import annotations

import itertools
import time

import pytest

from fpnx.core.errors import FpnxError
from fpnx.labels.annotations import ImageLabels, LabelSet
from fpnx.labels.matching import Matched, match_labels

COMPOSED, DECOMPOSED = "caf\u00e9/1.jpg", "cafe\u0301/1.jpg"


def match(labelled: list[str], images: list[str], root: str = "") -> Matched:
    entries = tuple(ImageLabels(name=name) for name in labelled)
    return match_labels(LabelSet(format="coco", path="l.json", task="detection", categories=(), images=entries),
                        images, root)  # fmt: skip


def pairs(labelled: list[str], images: list[str], root: str = "") -> dict[str, str]:
    """Image → name in the labels."""
    found = match(labelled, images, root)
    return {image: labelled[i] for image, i in zip(images, found.indices, strict=True) if i is not None}


@pytest.mark.parametrize(
    ("labelled", "image"),
    [
        ("a/1.jpg", "a/1.jpg"),
        ("a\\1.jpg", "a/1.jpg"),
        ("C:\\data\\photos\\a\\1.jpg", "a/1.jpg"),
        ("./a/1.jpg", "a/1.jpg"),
        ("../photos/a//1.jpg", "a/1.jpg"),
        ("/home/me/photos/a/1.jpg", "a/1.jpg"),
        ("s3://bucket/photos/a/1.jpg", "a/1.jpg"),
        ("a/1.jpg", "photos/a/1.jpg"),
        ("1.jpg", "photos/a/1.jpg"),
        ("a/1", "a/1.jpg"),
        ("a/1.png", "a/1.jpg"),
        ("A/1.JPG", "a/1.jpg"),
        ("labels/a/1.txt", "images/a/1.jpg"),
        ("Annotations/1.xml", "JPEGImages/1.jpg"),
        (COMPOSED, DECOMPOSED),
        (DECOMPOSED, f"photos/{COMPOSED}"),
        ("a\\1.jpg", "a\\1.jpg"),  # a backslash may be part of a name
    ],
)
def test_names_that_are_the_same_image(labelled: str, image: str) -> None:
    assert pairs([labelled, "z.jpg"], ["y.jpg", image]) == {image: labelled}


@pytest.mark.parametrize(
    ("labelled", "image"),
    [("b/1.jpg", "a/1.jpg"), ("1.jpg", "11.jpg"), ("a/1.jpg", "a/2.jpg"), ("", "a.jpg"), ("a/1.jpg/2", "a/1.jpg")],
)
def test_names_that_are_not(labelled: str, image: str) -> None:
    with pytest.raises(FpnxError, match="none of the 1 image has labels: an image is named"):
        match([labelled], [image])


def test_base_names_are_not_guessed() -> None:
    found = match(["1.jpg", "b.jpg"], ["x/1.jpg", "y/1.jpg", "b.jpg"])
    assert found.indices == (None, None, 1)
    assert (found.ambiguous, found.absent, found.unlabelled) == (("1.jpg",), (), ("x/1.jpg", "y/1.jpg"))
    with pytest.raises(
        FpnxError, match=r"none of the 2 images has labels for certain, since 1\.jpg in the labels fits several"
    ):
        match(["1.jpg"], ["x/1.jpg", "y/1.jpg"])
    # Nor is one of two entries chosen for an image.
    found = match(["x/1.jpg", "y/1.jpg", "z/2.jpg"], ["1.jpg", "2.jpg"])
    assert (found.indices, found.ambiguous) == ((None, 2), ("x/1.jpg", "y/1.jpg"))


def test_the_surest_name_wins() -> None:
    assert pairs(["train/1.jpg", "1.jpg"], ["1.jpg"]) == {"1.jpg": "1.jpg"}
    assert pairs(["x/y/1.jpg"], ["1.jpg", "y/1.jpg"]) == {"y/1.jpg": "x/y/1.jpg"}
    assert pairs(["a.png", "a.jpg"], ["a.jpg"]) == {"a.jpg": "a.jpg"}
    assert pairs(["b.jpg", "images/a.jpg"], ["a.jpg", "b.jpg"]) == {"a.jpg": "images/a.jpg", "b.jpg": "b.jpg"}
    assert pairs(["b.jpg", "other/a.jpg"], ["a.jpg", "b.jpg"]) == {"b.jpg": "b.jpg"}


def test_the_root_tells_folders_apart() -> None:
    labelled = ["train/1.jpg", "val/1.jpg", "val/2.jpg"]
    assert pairs(labelled, ["1.jpg", "2.jpg"], "/data/train") == {"1.jpg": "train/1.jpg"}
    assert pairs(labelled, ["1.jpg", "2.jpg"], "/data/val") == {"1.jpg": "val/1.jpg", "2.jpg": "val/2.jpg"}
    absolute = [f"/data/{name}" for name in labelled]
    assert pairs(absolute, ["1.jpg", "2.jpg"], "/data/train") == {"1.jpg": "/data/train/1.jpg"}
    assert pairs(["/data/val/labels/1.txt"], ["images/1.jpg", "2.jpg"], "/data/val") == {
        "images/1.jpg": "/data/val/labels/1.txt"
    }


def test_both_sides_are_reported() -> None:
    found = match(["a.jpg", "gone.jpg", "b.jpg"], ["b.jpg", "new.jpg", "a.jpg"])
    assert found == Matched(("b.jpg", "new.jpg", "a.jpg"), (2, None, 0), ("gone.jpg",), ())
    assert found.unlabelled == ("new.jpg",)


def test_nothing_fits_shows_a_name_of_each_side() -> None:
    with pytest.raises(FpnxError, match=r"labels l\.json: none of the 2 images has labels: an image is named x/a\.jpg, "
                                        r"and in the labels there is y/b\.jpg; give the images"):  # fmt: skip
        match(["y/b.jpg"], ["x/a.jpg", "c.jpg"])
    with pytest.raises(FpnxError, match="0 images, and labels of 1"):
        match(["a.jpg"], [])


def test_each_way_of_writing_all_names_gives_the_same() -> None:
    """Whatever folders stand before all names on either side, the same images are found."""
    names = [f"{folder}/{number}.jpg" for folder in ("a", "b") for number in range(3)]
    for before, root in itertools.product(("", "set/", "/home/x/set/", "C:\\set\\", "./"), ("", "/data", "/data/set")):
        labelled = [before + name for name in names]
        assert pairs(labelled, names, root) == dict(zip(names, labelled, strict=True)), (before, root)
        deep = [f"photos/{name}" for name in names]
        relative = [name.replace("/", "\\") for name in names]
        assert pairs(relative, deep, root) == dict(zip(deep, relative, strict=True))


def test_time_grows_with_the_number_of_names_only() -> None:
    def seconds(count: int) -> float:
        images = [f"set/{number % 7}/{number:07}.jpg" for number in range(count)]
        labelled = [f"/other/place/{number % 7}/{number:07}.png" for number in range(count)]
        start = time.process_time()
        match([*labelled, f"{0:07}.jpg"], images)
        return time.process_time() - start

    seconds(100)
    assert seconds(20000) < 40 * max(seconds(2000), 0.01)
