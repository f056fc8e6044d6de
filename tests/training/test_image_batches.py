"""Batches of image files: pixels and boxes belong together, also of photographs that are turned when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpnx.core.train_config import TrainConfig
from fpnx.images.listing import find_images
from fpnx.labels.annotations import Category, ImageLabels, LabelSet
from fpnx.models.heads.detection import FcosHead
from fpnx.training.image_batches import ImageBatches
from fpnx.training.model import model_for_images
from fpnx.training.targets import TargetMaker

ORIENTATION = 0x0112
# How a camera stores the upright picture that a viewer shows for each value of EXIF's orientation.
STORED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize("orientation", STORED)
def test_boxes_are_those_of_the_upright_photograph(orientation: int, tmp_path: Path) -> None:
    """A red square at x 32 to 48, y 64 to 80 of an upright photograph, 96 wide and 128 high."""
    upright = np.zeros((128, 96, 3), np.uint8)
    upright[64:80, 32:48, 0] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(upright).transpose(STORED[orientation]).save(tmp_path / "a.png", exif=exif)
    boxes = np.array([[32.0, 64.0, 48.0, 80.0]])
    labels = ImageLabels(name="a.png", classes=np.array([0]), boxes=boxes, crowd=np.array([False]))
    categories = (Category(1, "square"),)
    make = TargetMaker(LabelSet(format="coco", path="a", task="detection", categories=categories, images=(labels,)))
    options = {"backbone": "mobilenet_v2", "weights": "random", "levels": "P4-P5", "channels": 8, "short_side": 48}
    model = model_for_images(TrainConfig(**options), FcosHead)
    source = ImageBatches(
        find_images([tmp_path]).sources, [labels], [(128, 96)], model, make, max_pixels=10**6, workers=1
    )
    batch = source.batch([0], None)
    source.close()
    assert batch.geometry.sizes == ((64, 48),)
    (target,) = batch.targets
    assert target.boxes is not None
    assert target.boxes.tolist() == [[16.0, 32.0, 24.0, 40.0]]  # at half the size
    red = batch.inputs[0, 0] > batch.inputs[0, 1] + 1  # type: ignore[index]
    rows, columns = np.nonzero(red.numpy())
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (16, 32, 24, 40)
