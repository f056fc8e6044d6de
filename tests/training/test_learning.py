"""Every head learns shapes drawn on noise from stored maps of random weights, and only from right labels.

The images held out have labels of their own. Those to train on are also given with an error that a reader or a target
assignment might make: a class shifted by one, boxes off by half a cell, boxes of other images. Then the same training
fails the test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fpnx.commands.extract import extract
from fpnx.commands.train import train
from fpnx.evaluation.scores import Scores
from tests.helpers.shapes import CATEGORY_IDS, CLASSES, draw_scenes, write_coco, write_images

GOOD = 0.9
COUNT, HELD_OUT, SIDE = 80, 16, 64
CELL = 8  # pixels: of P3
COMMON: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 4, "ema": 0.9, "channels": 32, "device": "cpu"}
SETTINGS: dict[str, dict[str, Any]] = {
    "classify": {"levels": "P2-P3", "epochs": 30},
    "fcos": {"levels": "P2-P4", "epochs": 16, "convolutions": 2},
    "semantic": {"levels": "P2-P3", "epochs": 18},
    "retinanet": {"levels": "P2-P4", "epochs": 45, "convolutions": 2},
    "faster_rcnn": {"levels": "P2-P4", "epochs": 8, "learning_rate": 5e-3, "box_samples": 64, "val_interval": 8},
    "mask_rcnn": {"levels": "P2-P4", "epochs": 8, "learning_rate": 5e-3, "box_samples": 32, "val_interval": 8},
}
SCORES = {"classify": ("accuracy",), "semantic": ("mIoU",), "mask_rcnn": ("AP50", "mask_AP50")}
SLOW = ("semantic", "retinanet", "faster_rcnn", "mask_rcnn")
Corruption = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with several shapes (`many/`) and with one (`one/`), labels of both parts, and maps."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, most in (("many", 3), ("one", 1)):
        drawn = draw_scenes(COUNT, size=(SIDE, SIDE), shapes=most)
        labels = json.loads(write_coco(folder / name, drawn).read_text())
        write_images(folder / name, drawn)
        for part, chosen in (("val", range(HELD_OUT)), ("train", range(HELD_OUT, COUNT))):
            ids = {100 + i for i in chosen}
            document = {
                "images": [each for each in labels["images"] if each["id"] in ids],
                "annotations": [each for each in labels["annotations"] if each["image_id"] in ids],
                "categories": labels["categories"],
            }
            (folder / name / f"{part}.json").write_text(json.dumps(document))
            (folder / name / f"masks_{part}").mkdir()
            for i in chosen:
                Image.fromarray(drawn[i].classes).save(folder / name / f"masks_{part}" / drawn[i].name)
        extract(
            folder / name / "images", folder / f"{name}.h5", backbone="mobilenet_v2", weights="random", size=SIDE,
            levels="C2-C5", device="cpu",
        )  # fmt: skip
    return folder


def as_table(file: Path) -> Path:
    """The class of the only shape of each image as a table."""
    document = json.loads(file.read_text())
    names = {each["id"]: each["file_name"] for each in document["images"]}
    kinds = dict(zip(CATEGORY_IDS, CLASSES, strict=True))
    rows = [f"{names[each['image_id']]},{kinds[each['category_id']]}" for each in document["annotations"]]
    table = file.with_suffix(".csv")
    table.write_text("path,label\n" + "".join(f"{row}\n" for row in rows))
    return table


def score_of(head: str, data: Path, tmp_path: Path, corrupt: Corruption | None = None) -> float:
    """The lowest score on images with right labels, after a training on labels that `corrupt` has changed."""
    name = "one" if head == "classify" else "many"
    held_out = data / name / "val.json"
    document = json.loads((data / name / "train.json").read_text())
    if corrupt is not None:
        corrupt(document)
    labels = tmp_path / "train.json"
    labels.write_text(json.dumps(document))
    if head == "classify":
        labels, held_out = as_table(labels), as_table(held_out)
    if head == "semantic":
        labels, held_out = data / name / "masks_train", data / name / "masks_val"
        if corrupt is not None:
            labels = corrupted_masks(labels, tmp_path / "masks", corrupt)
    result = train(
        data / f"{name}.h5", labels, tmp_path / "a.safetensors", head=head, val=held_out, **{**COMMON, **SETTINGS[head]}
    )
    scores: Scores | None = result.scores
    assert scores is not None
    assert scores.images == HELD_OUT
    values = [scores.values[name] for name in SCORES.get(head, ("AP50",))]
    return min(0.0 if value is None else value for value in values)


def shift_classes(document: dict[str, Any]) -> None:
    """Each class is the next one."""
    following = dict(zip(CATEGORY_IDS, np.roll(CATEGORY_IDS, -1).tolist(), strict=True))
    for each in document["annotations"]:
        each["category_id"] = following[each["category_id"]]


def shift_boxes(document: dict[str, Any]) -> None:
    """Boxes are half a cell of P3 too far to the right and down."""
    for each in document["annotations"]:
        each["bbox"][0] += CELL / 2
        each["bbox"][1] += CELL / 2


def exchange_images(document: dict[str, Any]) -> None:
    """Boxes belong to the next image."""
    ids = [each["id"] for each in document["images"]]
    following = dict(zip(ids, np.roll(ids, -1).tolist(), strict=True))
    for each in document["annotations"]:
        each["image_id"] = following[each["image_id"]]


def corrupted_masks(masks: Path, folder: Path, corrupt: Corruption) -> Path:
    """Masks with the error of `corrupt`."""
    folder.mkdir()
    for file in masks.iterdir():
        with Image.open(file) as image:
            values = np.asarray(image)
        if corrupt is shift_classes:
            values = np.where(values > 0, values % len(CLASSES) + 1, 0)
        else:
            values = np.roll(values, CELL // 2, (0, 1))
        Image.fromarray(values.astype(np.uint8)).save(folder / file.name)
    return folder


@pytest.mark.timeout(1200)  # of the slow ones
@pytest.mark.parametrize(
    "head", [pytest.param(head, marks=pytest.mark.slow if head in SLOW else ()) for head in SETTINGS]
)
def test_a_head_learns(head: str, data: Path, tmp_path: Path) -> None:
    assert score_of(head, data, tmp_path) >= GOOD


@pytest.mark.parametrize(
    ("head", "corrupt"),
    [
        pytest.param("fcos", shift_boxes, id="boxes", marks=pytest.mark.slow),
        pytest.param("fcos", shift_classes, id="classes of boxes", marks=pytest.mark.slow),
        pytest.param("fcos", exchange_images, id="other images", marks=pytest.mark.slow),
        pytest.param("classify", shift_classes, id="classes of images", marks=pytest.mark.slow),
        pytest.param("semantic", shift_classes, id="classes of pixels", marks=pytest.mark.slow),
        pytest.param("semantic", shift_boxes, id="pixels", marks=pytest.mark.slow),
    ],
)
def test_wrong_labels_are_noticed(head: str, corrupt: Corruption, data: Path, tmp_path: Path) -> None:
    assert score_of(head, data, tmp_path, corrupt) < GOOD
