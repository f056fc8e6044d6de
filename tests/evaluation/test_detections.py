"""Detections in pixels of the source image, against torchvision's and by hand."""

from __future__ import annotations

import numpy as np
import torch
from pycocotools import mask as masks_of_coco
from torchvision.models.detection.transform import resize_boxes

from fpnx.evaluation.detections import to_source
from fpnx.models.heads.base import Detections


def found(boxes: torch.Tensor, **more: object) -> Detections:
    count = len(boxes)
    return Detections(
        boxes=boxes,
        scores=torch.linspace(0.9, 0.1, count),
        labels=torch.arange(count),
        **more,  # type: ignore[arg-type]
    )


def test_boxes_are_those_of_torchvision() -> None:
    torch.manual_seed(0)
    boxes = torch.rand(20, 2, 2).sort(dim=1).values.reshape(20, 4) * torch.tensor([96.0, 60.0, 96.0, 60.0])
    got = to_source("a.jpg", found(boxes, proposals=boxes.flip(0)), (60, 96), (471, 333))
    expected = resize_boxes(boxes, [60, 96], [471, 333])
    torch.testing.assert_close(torch.from_numpy(got.boxes).float(), expected)
    torch.testing.assert_close(torch.from_numpy(got.proposals).float(), expected.flip(0))
    assert (got.image, got.size, got.boxes.dtype, got.masks, got.levels) == ("a.jpg", (471, 333), np.float64, None, ())
    assert got.classes.tolist() == list(range(20))


def test_boxes_are_clipped_to_the_image() -> None:
    got = to_source("a.jpg", found(torch.tensor([[-4.0, -1.0, 40.0, 25.0]])), (20, 30), (40, 90))
    assert got.boxes.tolist() == [[0, 0, 90, 40]]


def test_what_is_not_finite_is_left_out() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0.0, 0, torch.nan, 9], [0.0, 0, torch.inf, 9], [1.0, 1, 8, 8]])
    cells = torch.stack([torch.full((28, 28), value) for value in (0.9, 0.9, 0.9, 0.1)])
    given = found(boxes, mask_cells=cells, proposals=boxes, levels=("P3", "P4", "P5", "P6"))
    got = to_source("a.jpg", given, (20, 30), (20, 30))
    assert got.classes.tolist() == [0, 3]
    assert got.levels == ("P3", "P6")
    assert [masks_of_coco.area(runs) > 80 for runs in got.masks] == [True, False]
    assert masks_of_coco.area(got.masks[1]) == 0
    assert len(got.proposals) == 2
    given = Detections(boxes=boxes[:1], scores=torch.tensor([torch.nan]), labels=torch.tensor([0]))
    assert len(to_source("a.jpg", given, (20, 30), (20, 30)).boxes) == 0


def test_an_image_without_detections() -> None:
    nothing = Detections(
        boxes=torch.empty(0, 4), scores=torch.empty(0), labels=torch.empty(0, dtype=torch.int64),
        mask_cells=torch.empty(0, 28, 28), proposals=torch.empty(0, 4),
    )  # fmt: skip
    got = to_source("a.jpg", nothing, (32, 32), (64, 64))
    assert (got.boxes.shape, got.scores.shape, got.classes.shape) == ((0, 4), (0,), (0,))
    assert (got.masks, got.proposals.shape) == ((), (0, 4))
