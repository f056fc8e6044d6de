"""What is said of labels before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fpnx.images.decoding import decode, upright_size
from fpnx.labels.annotations import Dropped
from fpnx.labels.geometry import fit_to_image
from fpnx.labels.matching import match_labels
from fpnx.labels.reading import read_labels
from fpnx.labels.summary import LabelSummary, summarize
from tests.helpers.files import image_source
from tests.helpers.labels import box, coco_file, files

IMAGES = ["a.jpg", "b.jpg", "c.jpg", "new.jpg"]


def summary(path: Path | str, images: list[str] = IMAGES, sizes: object = None, **more: object) -> LabelSummary:
    labels = read_labels(path, images, **more)  # type: ignore[arg-type]
    return summarize(labels, match_labels(labels, images), sizes)  # type: ignore[arg-type]


def coco(folder: Path) -> str:
    annotations = [
        box(1, 1, [0, 0, 31, 33]), box(1, 1, [0, 0, 32, 32]), box(1, 3, [0, 0, 96, 95.9]), box(1, 3, [0, 0, 96, 96]),
        box(2, 3, [190, 90, 200, 200]), box(2, 3, [200, 0, 5, 5]), box(2, 1, [0, 0, 9, 9], iscrowd=1),
        box(2, 3, [0, 0, 0, 9]), box(4, 1, [0, 0, 9, 9]),
    ]  # fmt: skip
    sizes = dict.fromkeys(("a.jpg", "b.jpg", "c.jpg", "gone.jpg"), (100, 200))
    categories = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 4, "name": "owl"}]
    return coco_file(folder / "l.json", annotations, sizes, categories)


def test_numbers(tmp_path: Path) -> None:
    found = summary(coco(tmp_path))
    assert (found.format, found.task, found.images, found.labelled, found.without_objects) == (
        "coco",
        "detection",
        4,
        3,
        1,
    )
    rows = {
        each.category.name: (each.images, each.objects, each.small, each.medium, each.large) for each in found.classes
    }
    assert rows == {"cat": (2, 2, 1, 1, 0), "dog": (2, 3, 1, 1, 1), "owl": (0, 0, 0, 0, 0)}
    assert (found.objects, found.crowds, found.clipped) == (5, 1, 1)
    assert (found.unlabelled, found.absent, found.ambiguous) == (Dropped(1, "new.jpg"), Dropped(1, "gone.jpg"), None)
    assert found.dropped == {
        "empty boxes": Dropped(1, "annotation 8 of b.jpg"),
        "boxes outside of their image": Dropped(1, "object 2 of b.jpg"),
    }
    assert found.remarks == ()


def test_words_and_json(tmp_path: Path) -> None:
    path = coco(tmp_path)
    found = summary(path)
    assert found.lines() == [
        f"labels   COCO for detection, 3 classes: {path}",
        "images   4, 3 labelled, 1 of these without objects",
        "  class  objects    small   medium    large   images",
        "  dog          3        1        1        1        2",
        "  cat          2        1        1        0        2",
        "  all          5        2        2        1        3",
        "classes that do not occur: 1 (owl)",
        "without labels: 1, such as new.jpg",
        "labels without an image: 1, such as gone.jpg",
        "not trained on: 1 region of many objects (crowd, difficult)",
        "boxes cut off at the edge of their image: 1",
        "left out: empty boxes (1), such as annotation 8 of b.jpg",
        "left out: boxes outside of their image (1), such as object 2 of b.jpg",
    ]
    values = json.loads(json.dumps(found.to_json()))
    assert values["classes"][1] == {
        "id": 3, "name": "dog", "images": 2, "objects": 3, "small": 1, "medium": 1, "large": 1,
    }  # fmt: skip
    assert values["dropped"]["empty boxes"] == {"count": 1, "example": "annotation 8 of b.jpg"}
    assert (values["objects"], values["unlabelled"]["example"], values["ambiguous"]) == (5, "new.jpg", None)


def test_sizes_of_images_come_before_those_of_labels(tmp_path: Path) -> None:
    found = summary(coco(tmp_path), sizes=[(200, 100), (50, 100), (100, 300), None])
    assert [remark.partition(":")[0] for remark in found.remarks] == [
        "1 image, such as a.jpg (100×200 in the labels, 200×100 in the image)",
        "1 image, such as b.jpg (100×200 in the labels, 50×100 in the image)",
        "1 image, such as c.jpg (100×200 in the labels, 100×300 in the image)",
    ]
    assert "EXIF" in found.remarks[0]
    assert "scaled" in found.remarks[1]


def test_boxes_of_a_photograph_that_its_exif_orientation_turns(tmp_path: Path) -> None:
    """Stored lying, shown upright: the box is that of the upright picture, whichever size the labels say."""
    upright = np.zeros((120, 80, 3), np.uint8)
    upright[20:60, 10:40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    source = image_source(tmp_path / "a.png")
    size = upright_size(source, 10**6)
    assert size == (120, 80)
    for said in ((120, 80), (80, 120)):
        path = coco_file(tmp_path / "l.json", [box(1, 1, [10, 20, 30, 40])], {"a.png": said})
        labels = read_labels(path, ["a.png"])
        found = summarize(labels, match_labels(labels, ["a.png"]), [size])
        assert (found.objects, found.clipped, found.dropped) == (1, 0, {})
        assert ["EXIF" in remark for remark in found.remarks] == ([] if said == size else [True])
        fitted = fit_to_image(labels.images[0], size).labels.boxes
        assert fitted is not None
        x1, y1, x2, y2 = fitted[0].astype(int).tolist()
        pixels = np.asarray(decode(source, 10**6))
        assert (pixels[y1:y2, x1:x2] == 255).all()
        assert pixels.astype(int).sum() == 255 * 3 * 30 * 40


def test_shares_have_a_size_only_with_that_of_the_image(tmp_path: Path) -> None:
    files(tmp_path, {"a.txt": "0 .5 .5 .5 .5\n0 .5 .5 .01 .01\n", "classes.txt": "cat"})
    found = summary(tmp_path, ["a.jpg"])
    assert found.lines()[2:] == ["  class  objects   images", "  cat          2        1"]
    unknown = found.classes[0]
    assert (unknown.objects, unknown.small, unknown.medium, unknown.large) == (2, 0, 0, 0)
    known = summary(tmp_path, ["a.jpg"], [(400, 600)]).classes[0]
    assert (known.objects, known.small, known.medium, known.large) == (2, 1, 0, 1)


def test_classification(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("a.jpg,x\nb.jpg,x;y\nc.jpg,\n")
    found = summary(tmp_path / "l.csv")
    assert [(each.category.name, each.images) for each in found.classes] == [("x", 2), ("y", 1)]
    assert found.lines()[:5] == [
        f"labels   table of classes for classification (multi-label), 2 classes: {tmp_path / 'l.csv'}",
        "images   4, 3 labelled, 1 of these without a class",
        "  class   images",
        "  x            2",
        "  y            1",
    ]


def test_masks_of_another_size(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for name in "ab":
        Image.fromarray(np.array([[0, 1, 1]], np.uint8)).save(tmp_path / f"masks/{name}.png")
    found = summary(tmp_path / "masks", ["a.jpg", "b.jpg"], [(1, 3), (3, 1)])
    assert found.dropped == {"masks of another size than their image": Dropped(1, "b.jpg")}
    assert [(each.category.id, each.images) for each in found.classes] == [(0, 2), (1, 2)]


def test_many_classes_are_a_short_table(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("".join(f"{number}.jpg,c{number:02}\n" for number in range(30)))
    lines = summary(tmp_path / "l.csv", [f"{number}.jpg" for number in range(30)]).lines()
    assert lines[-2:] == ["  c19          1", "  and 10 more classes"]
    assert len(lines) == 24
