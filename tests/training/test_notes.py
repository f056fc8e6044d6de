"""What is said about odd data before a training, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fpnx.core.errors import FpnxError
from fpnx.core.train_config import TrainConfig
from fpnx.labels.annotations import Category, ImageLabels, LabelSet
from fpnx.models.heads.detection import FcosHead
from fpnx.models.pyramid_model import PyramidModel
from fpnx.training.model import model_for_images
from fpnx.training.notes import notes_on


@pytest.fixture(scope="module")
def at_half_size() -> PyramidModel:
    """Levels from stride 16 on, of inputs of 64 × 64 pixels."""
    config = TrainConfig(backbone="mobilenet_v2", weights="random", levels="P4-P5", channels=8, size=64)
    return model_for_images(config, FcosHead)


def image(classes: list[int], boxes: list[list[float]] | None = None, crowd: bool = False) -> ImageLabels:
    found = None if boxes is None else np.array(boxes, np.float64).reshape(-1, 4)
    return ImageLabels(
        name="a.jpg", classes=np.array(classes, np.int64), boxes=found, crowd=np.full(len(classes), crowd)
    )


def notes(task: Any, images: list[ImageLabels], training: int, used: PyramidModel, **options: Any) -> list[str]:
    """On images of 128 × 128 pixels, of which the first ones are trained on; three classes."""
    categories = tuple(Category(i, name) for i, name in enumerate(options.pop("names", ("cat", "dog", "bird"))))
    labels = LabelSet(format="coco", path="a", task=task, categories=categories, images=tuple(images), **options)
    return notes_on(labels, [(each, (128, 128)) for each in images[:training]], used)


def test_objects_smaller_than_a_cell(at_half_size: PyramidModel) -> None:
    small, large = [0.0, 0.0, 31.0, 33.0], [0.0, 0.0, 32.0, 32.0]  # a cell is 32 × 32 pixels of the image
    assert notes("detection", [image([0, 1, 2], [small, large, small])], 1, at_half_size) == [
        "objects smaller than a cell of the finest level (16×16 pixels of the network's input): 2 of 3; they are "
        "hardly learned: take a larger --size, or finer --levels"
    ]
    assert notes("detection", [image([0, 1, 2], [large] * 3)], 1, at_half_size) == []
    assert notes("detection", [image([0, 1, 2] * 4, [small] + [large] * 11)], 1, at_half_size) == []  # a few


def test_no_object_to_train_on(at_half_size: PyramidModel) -> None:
    whole = [0.0, 0.0, 128.0, 128.0]
    for training in ([image([0, 0], [whole] * 2, crowd=True)], [image([], [])]):
        with pytest.raises(FpnxError, match=r"the 1 image to train on have no object \(regions of many objects"):
            notes("detection", [*training, image([0], [whole])], 1, at_half_size)


def test_classes_without_an_image_to_train_on(at_half_size: PyramidModel) -> None:
    images = [image([0]), image([1]), image([1])]
    assert notes("classification", images, 1, at_half_size) == ["1 class without an image to train on: dog"]
    assert notes("classification", images, 2, at_half_size) == []  # bird is in no image


def test_one_class(at_half_size: PyramidModel) -> None:
    said = ["there is one class, so there is nothing to tell apart"]
    assert notes("classification", [image([0])], 1, at_half_size, names=["cat"]) == said
    assert notes("semantic", [image([0])], 1, at_half_size, names=["cat"]) == said
    assert notes("classification", [image([0])], 1, at_half_size, names=["cat"], multi_label=True) == []
    assert notes("detection", [image([0], [[0, 0, 64, 64]])], 1, at_half_size, names=["cat"]) == []
