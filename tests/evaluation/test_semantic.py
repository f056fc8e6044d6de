"""Scores of semantic segmentation, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fpnx.evaluation.semantic import PixelCounts, class_map
from fpnx.labels.annotations import Category

CATEGORIES = tuple(Category(i, name) for i, name in enumerate(["background", "cat", "dog", "never there"]))


def test_two_images_by_hand() -> None:
    counts = PixelCounts(4)
    counts.add(np.array([[0, 0, 1], [1, 255, 255]], np.uint8), np.array([[0, 1, 1], [1, 1, 3]], np.int64))
    counts.add(np.array([[0, 0, 2]]), np.array([[0, 0, 0]]))
    scores = counts.scores(CATEGORIES)
    assert (scores.task, scores.main, scores.images, scores.counted) == ("semantic", "mIoU", 2, "pixels")
    # background: 3 right, 4 labelled, 4 predicted. cat: 2 right, 2 labelled, 3 predicted. dog: 1 labelled.
    assert [row.values["IoU"] for row in scores.classes] == [3 / 5, pytest.approx(2 / 3), 0, None]
    assert [row.values["recall"] for row in scores.classes] == [3 / 4, 1, 0, None]
    assert [row.count for row in scores.classes] == [4, 2, 1, 0]
    assert scores.value == pytest.approx((3 / 5 + 2 / 3 + 0) / 3)
    assert scores.values["pixel_accuracy"] == pytest.approx(5 / 7)


def test_no_pixels() -> None:
    assert PixelCounts(4).scores(CATEGORIES).value is None
    counts = PixelCounts(4)
    counts.add(np.full((2, 2), 255), np.zeros((2, 2), np.int64))
    assert (counts.scores(CATEGORIES).value, counts.images) == (None, 1)
    with pytest.raises(ValueError, match=r"labels of \(2, 2\) pixels"):
        counts.add(np.zeros((2, 2)), np.zeros((2, 3)))


def test_classes_of_the_source_image_leave_out_the_padding() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 32, 64)
    logits[3, 20:] = logits[3, :, 50:] = 100
    got = class_map(logits, (20, 50), (67, 41))
    expected = F.interpolate(logits[None, :, :20, :50], size=(67, 41), mode="bilinear", align_corners=False)[0].argmax(
        0
    )
    assert (got.dtype, got.shape) == (np.int64, (67, 41))
    assert (got == expected.numpy()).all()
    assert (class_map(logits, (20, 50), (20, 50)) == logits[:, :20, :50].argmax(0).numpy()).all()
