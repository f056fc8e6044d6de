"""Targets in pixels of the network's input: hand-worked numbers, padding, and the same under augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpnx.core.errors import ImageError
from fpnx.labels.annotations import Category, ImageLabels, LabelSet
from fpnx.models.torch_state import isolated_torch_state
from fpnx.training.augmentation import augmented
from fpnx.training.targets import TargetMaker, padded_target, resized_target

CATEGORIES = (Category(3, "cat"), Category(7, "dog"))


def label_set(task: str, **others: object) -> LabelSet:
    return LabelSet(format="coco", path="x", task=task, categories=CATEGORIES, images=(), **others)  # type: ignore[arg-type]


def boxes_of(
    *boxes: tuple[float, ...], classes: tuple[int, ...], crowd: tuple[bool, ...] = (), **others: object
) -> ImageLabels:
    return ImageLabels(
        name="a.png",
        classes=np.array(classes, np.int64),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        crowd=np.array(crowd or [False] * len(classes), bool),
        **others,  # type: ignore[arg-type]
    )


def test_boxes_follow_the_size_of_the_input() -> None:
    """An image of 100 × 200 pixels (height × width) on an input of 50 × 400: y by 1/2, x by 2."""
    labels = boxes_of((10, 20, 30, 60), (-5, 90, 250, 120), (0, 0, 9, 9), classes=(1, 0, 1), crowd=(False, False, True))
    target = TargetMaker(label_set("detection"))(labels, (100, 200), (50, 400))
    assert target.boxes is not None
    assert target.labels is not None
    assert target.boxes.tolist() == [[20, 10, 60, 30], [0, 45, 400, 50]]  # clipped to the image
    assert target.boxes.dtype == torch.float32
    assert target.labels.tolist() == [1, 0]  # and the crowd is left out
    assert target.masks is None


def test_shares_of_the_image() -> None:
    labels = boxes_of((0.1, 0.25, 0.5, 0.75), classes=(1,), relative=True)
    target = TargetMaker(label_set("detection"))(labels, (100, 200), (64, 32))
    assert target.boxes is not None
    np.testing.assert_allclose(target.boxes.numpy(), [[3.2, 16, 16, 48]], rtol=1e-6)


def test_masks_are_those_of_the_outlines_or_of_the_boxes() -> None:
    labels = boxes_of(
        (2, 2, 6, 4), (4, 4, 8, 8), classes=(0, 1), segments=([[2.0, 2.0, 6.0, 2.0, 6.0, 4.0, 2.0, 4.0]], None)
    )  # fmt: skip
    target = TargetMaker(label_set("detection"), masks=True)(labels, (8, 8), (16, 8))
    assert target.masks is not None
    expected = np.zeros((2, 16, 8), bool)
    expected[0, 4:8, 2:6] = True
    expected[1, 8:16, 4:8] = True
    assert np.array_equal(target.masks.numpy(), expected)
    none = TargetMaker(label_set("detection"), masks=True)(boxes_of(classes=()), (8, 8), (16, 8))
    assert none.masks is not None
    assert none.masks.shape == (0, 16, 8)


def test_classes_of_an_image() -> None:
    labels = ImageLabels(name="a.png", classes=np.array([1], np.int64))
    target = TargetMaker(label_set("classification"))(labels, (5, 5), (64, 64))
    assert target.classes is not None
    assert target.classes.tolist() == [0.0, 1.0]


def test_a_class_for_each_pixel(tmp_path: Path) -> None:
    values = np.array([[3, 3, 7, 7], [255, 3, 7, 0]], np.uint8)  # 0 is no class
    Image.fromarray(values).save(tmp_path / "m.png")
    labels = ImageLabels(name="a.png", size=(2, 4), mask_file=str(tmp_path / "m.png"))
    make = TargetMaker(label_set("semantic"))
    target = make(labels, (2, 4), (4, 4))
    assert target.semantic is not None
    assert target.semantic.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [255, 0, 1, 255], [255, 0, 1, 255]]
    padded = padded_target(target, (5, 6)).semantic
    assert padded is not None
    assert [*padded[:, 4].tolist(), 255] == padded[4].tolist() == [255] * 6
    with pytest.raises(ImageError, match=r"its mask has 2×4 pixels \(height × width\), and the image 3×4"):
        make(labels, (3, 4), (4, 4))


def test_a_target_is_resized() -> None:
    labels = boxes_of((2, 2, 6, 4), classes=(0,))
    make = TargetMaker(label_set("detection"), masks=True)
    direct = make(labels, (8, 8), (4, 4))
    resized = resized_target(make(labels, (8, 8), (16, 32)), (16, 32), (4, 4))
    for name in ("boxes", "labels", "masks"):
        assert torch.equal(getattr(direct, name), getattr(resized, name)), name


@pytest.mark.parametrize("seed", range(12))
def test_an_augmented_image_and_its_targets_belong_together(seed: int) -> None:
    """A red and a blue rectangle on grey: boxes, masks and classes are where the colours are."""
    size = (60, 80)
    picture = np.full((*size, 3), 120, np.uint8)
    picture[10:34, 12:40] = (250, 20, 20)
    picture[30:55, 50:70] = (20, 20, 250)
    image = Image.fromarray(picture)
    labels = boxes_of((12, 10, 40, 34), (50, 30, 70, 55), classes=(0, 1))
    make = TargetMaker(label_set("detection"), masks=True)

    def resize(wanted: tuple[int, int]) -> np.ndarray:
        return np.asarray(image.resize(wanted[::-1], Image.Resampling.NEAREST))

    before = torch.get_rng_state()
    with isolated_torch_state(seed):
        pixels, target = augmented("detection", size, resize, lambda wanted: make(labels, size, wanted))
    assert torch.equal(before, torch.get_rng_state())
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    assert target.boxes is not None
    assert target.labels is not None
    assert target.masks is not None
    red, blue = pixels[..., 0].astype(int), pixels[..., 2].astype(int)
    seen = {0: red - blue > 90, 1: blue - red > 90}
    for number in range(2):
        at = np.argwhere(seen[number])
        kept = (target.labels == number).nonzero().flatten().tolist()
        if len(at) == 0 or not kept:
            assert len(at) <= 2 * max(size) * 2  # nothing, or a rest of less than two pixels
            continue
        box = target.boxes[kept[0]].numpy()
        found = np.array([at[:, 1].min(), at[:, 0].min(), at[:, 1].max() + 1, at[:, 0].max() + 1])
        np.testing.assert_allclose(box, found, atol=1.01)
        mask = target.masks[kept[0]].numpy()
        assert (mask ^ seen[number]).sum() <= 2 * (found[2] - found[0] + found[3] - found[1])


def test_augmentation_of_classes_keeps_them() -> None:
    image = Image.new("RGB", (40, 40), "red")
    labels = ImageLabels(name="a.png", classes=np.array([1], np.int64))
    make = TargetMaker(label_set("classification"))
    with isolated_torch_state(0):
        pixels, target = augmented(
            "classification", (32, 48), lambda s: np.asarray(image.resize(s[::-1])), lambda s: make(labels, (40, 40), s)
        )
    assert pixels.shape == (32, 48, 3)
    assert target.classes is not None
    assert target.classes.tolist() == [0.0, 1.0]
    assert (pixels[..., 0] > 150).all()  # only enlarged, so that there is no border
