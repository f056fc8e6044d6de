"""Detection heads against torchvision's whole detectors, and what torchvision's do not do: odd sizes, any levels."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign, box_iou

from fpnx.core.errors import FpnxError
from fpnx.models.heads.base import Detections, Geometry, Head, Pyramid, Target
from fpnx.models.heads.registry import HEADS
from fpnx.models.torch_state import isolated_torch_state

KINDS = ("fcos", "retinanet", "faster_rcnn", "mask_rcnn")
WIDTH, CLASSES = 64, 3
SIZES = ((64, 96), (50, 70))


def pyramid_of(levels: dict[str, int], channels: int | dict[str, int] = WIDTH) -> Pyramid:
    widths = channels if isinstance(channels, dict) else dict.fromkeys(levels, channels)
    return Pyramid(channels=widths, strides=levels)


def levels_for(head: Head, padded: tuple[int, int], batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            batch, head.pyramid.channels[name], *(-(-side // stride) for side in padded), generator=generator
        )
        for name, stride in head.pyramid.strides.items()
    }


def strides_of(kind: str) -> dict[str, int]:
    return {name: 2 ** int(name[1]) for name in HEADS[kind].default_levels}


def head_of(kind: str, pyramid: Pyramid | None = None, **settings: int) -> Head:
    head = HEADS[kind].for_pyramid(pyramid or pyramid_of(strides_of(kind)), CLASSES, settings)
    head.initialize(0)
    return head


def livelier(head: Head) -> Head:
    """The head with last layers that are not next to zero, so that there are detections to compare."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in head.named_parameters():
            if name.split(".")[-2] in ("cls_logits", "bbox_reg", "bbox_ctrness", "bbox_pred", "cls_score"):
                scale = 0.3 if name.endswith("weight") else 0.01
                value.copy_(scale * torch.randn(value.shape, generator=generator))
    if head.needs_masks:
        head.max_detections = 25  # masks take long
    return head.eval()


def targets_of(kind: str, padded: tuple[int, int] = (64, 96)) -> list[Target]:
    boxes = (torch.tensor([[4.0, 6.0, 40.0, 50.0], [50.0, 10.0, 70.0, 30.0]]), torch.tensor([[10.0, 8.0, 26.0, 40.0]]))
    labels = (torch.tensor([2, 0]), torch.tensor([1]))
    masks = []
    for each in boxes:
        masks.append(torch.zeros(len(each), *padded, dtype=torch.bool))
        for mask, (x1, y1, x2, y2) in zip(masks[-1], each.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
    return [
        Target(boxes=box, labels=label, masks=mask if kind == "mask_rcnn" else None)
        for box, label, mask in zip(boxes, labels, masks, strict=True)
    ]


class GivenLevels(nn.Module):
    """In the place of torchvision's backbone: returns the levels that it holds."""

    def __init__(self, levels: dict[str, Tensor]) -> None:
        super().__init__()
        self.levels, self.out_channels = levels, WIDTH

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        assert images.shape[-2:] == (64, 96)
        return OrderedDict((str(i), level) for i, level in enumerate(self.levels.values()))


def torchvisions(kind: str, levels: dict[str, Tensor]) -> nn.Module:
    """torchvision's detector with its own anchors and thresholds, on given levels; images are taken as they are."""
    backbone = GivenLevels(levels)
    options = {"min_size": 64, "max_size": 96, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if kind in ("faster_rcnn", "mask_rcnn"):
        # 5 levels named 0 to 4, where torchvision's own backbone has "pool" for the last
        options["rpn_anchor_generator"] = AnchorGenerator(
            ((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5
        )
        options["box_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    builder = {
        "fcos": detection.FCOS,
        "retinanet": detection.RetinaNet,
        "faster_rcnn": detection.FasterRCNN,
        "mask_rcnn": detection.MaskRCNN,
    }[kind]
    if kind == "mask_rcnn":
        options["box_detections_per_img"] = 25
    return builder(backbone, CLASSES + 1, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_equal_torchvisions(kind: str) -> None:
    head = livelier(head_of(kind))
    levels = levels_for(head, (64, 96))
    theirs = torchvisions(kind, levels)
    theirs.load_state_dict(head.state_dict())
    theirs.eval()
    images = [torch.zeros(3, *size) for size in SIZES]
    # what torchvision would resize is left as it is
    theirs.transform.resize = lambda image, target: (image, target)
    if kind in ("fcos", "retinanet"):  # torchvision's may find the background class, which is none
        parts = [each.head.classification_head.cls_logits.bias for each in (head._detector[0], theirs)]
        with torch.no_grad():
            for bias in parts:
                bias.view(-1, CLASSES + 1)[:, 0] = -1e4
        head.score_threshold = theirs.score_thresh = 0.5
    with torch.no_grad():
        expected = theirs(images)
        found = head.predict(levels, Geometry(padded=(64, 96), sizes=SIZES))
    for ours, reference in zip(found, expected, strict=True):
        assert isinstance(ours, Detections)
        assert len(reference["boxes"]) > 20
        torch.testing.assert_close(ours.boxes, reference["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(ours.scores, reference["scores"], rtol=0, atol=1e-5)
        assert torch.equal(ours.labels + 1, reference["labels"])
        assert set(ours.labels.tolist()) <= set(range(CLASSES))
        assert len(ours.levels) == len(ours.boxes)
        assert set(ours.levels) <= set(head.levels)
        if kind == "mask_rcnn":
            assert ours.mask_cells is not None
            assert ours.mask_cells.shape == (len(ours.boxes), 28, 28)
            pasted = paste_masks_in_image(ours.mask_cells[:, None], ours.boxes, reference["masks"].shape[-2:])
            torch.testing.assert_close(pasted, reference["masks"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_torchvisions(kind: str) -> None:
    head = head_of(kind).train()
    levels = levels_for(head, (64, 96))
    theirs = torchvisions(kind, levels)
    theirs.load_state_dict(head.state_dict())
    theirs.train()
    theirs.transform.resize = lambda image, target: (image, target)
    targets = targets_of(kind)
    given = [
        {"boxes": each.boxes, "labels": each.labels + 1}
        | ({} if each.masks is None else {"masks": each.masks[:, : size[0], : size[1]].byte()})
        for each, size in zip(targets, SIZES, strict=True)
    ]
    if kind == "mask_rcnn":  # torchvision's masks have the size of their image
        for entry in given:
            entry["masks"] = nn.functional.pad(
                entry["masks"], (0, 96 - entry["masks"].shape[2], 0, 64 - entry["masks"].shape[1])
            )
    with isolated_torch_state(5):
        expected = theirs([torch.zeros(3, *size) for size in SIZES], given)
    with isolated_torch_state(5):
        found = head.losses(levels, Geometry(padded=(64, 96), sizes=SIZES), targets)
    assert set(found) == set(expected)
    for name, loss in found.items():
        assert loss.shape == ()
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_torchvisions(kind: str) -> None:
    head = head_of(kind)
    theirs = torchvisions(kind, {})
    assert list(head.state_dict()) == list(theirs.state_dict())
    assert not head.state_dict().keys() & {f"adapters.{name}.weight" for name in head.levels}


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_boxes_are_trained_on(kind: str) -> None:
    head = head_of(kind).train()
    levels = {name: level.requires_grad_() for name, level in levels_for(head, (64, 96)).items()}
    empty = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    for targets in ([empty, Target()], [targets_of(kind)[0], empty]):
        losses = head.losses(levels, Geometry(padded=(64, 96), sizes=SIZES), targets)
        total = sum(losses.values())
        assert torch.isfinite(total)
        assert total > 0
        total.backward()
    assert all(torch.isfinite(level.grad).all() for level in levels.values() if level.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_without_area_are_left_out(kind: str) -> None:
    head = head_of(kind).train()
    levels = levels_for(head, (64, 96), batch=1)
    (whole, _), geometry = targets_of(kind), Geometry(padded=(64, 96), sizes=SIZES[:1])
    assert whole.boxes is not None
    assert whole.labels is not None
    masks = None if whole.masks is None else torch.cat([whole.masks, whole.masks[:1]])
    boxes = torch.cat([whole.boxes, torch.tensor([[30.0, 20.0, 30.0, 40.0]])])
    broken = Target(boxes=boxes, labels=torch.cat([whole.labels, torch.tensor([1])]), masks=masks)
    with isolated_torch_state(1):
        expected = head.losses(levels, geometry, [whole])
    with isolated_torch_state(1):
        found = head.losses(levels, geometry, [broken])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_losses_fall_and_gradients_reach_every_level(kind: str) -> None:
    head = head_of(kind, pyramid_of({"P3": 8, "P4": 16, "P5": 32})).train()
    levels = {name: level.requires_grad_() for name, level in levels_for(head, (64, 96)).items()}
    optimizer = torch.optim.Adam([*head.parameters(), *levels.values()], 1e-3)
    totals = []
    with isolated_torch_state(0):
        for _ in range(12):
            losses = head.losses(levels, Geometry(padded=(64, 96), sizes=SIZES), targets_of(kind))
            totals.append(sum(losses.values()).item())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert totals[-1] < 0.8 * totals[0]
    assert all(level.grad is not None and level.grad.any() for level in levels.values())
    assert all(value.grad is not None for value in head.parameters())


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize(
    ("strides", "channels"),
    [
        ({"C4": 16}, {"C4": 320}),
        ({"C3": 8, "C4": 16, "C5": 32}, {"C3": 24, "C4": 40, "C5": 72}),
        ({"P2": 4}, {"P2": 32}),
        ({"P3": 8, "P5": 32}, {"P3": 48, "P5": 48}),
        ({"P3": 7, "P4": 14, "P5": 28}, {"P3": 40, "P4": 40, "P5": 40}),
        ({"0": 32, "1": 32, "pool": 64}, {"0": 32, "1": 32, "pool": 32}),
        ({"C4": 14}, {"C4": 384}),
    ],
    ids=lambda value: "+".join(value) if 4 in value.values() or len(value) else None,
)
def test_any_levels_are_taken(kind: str, strides: dict[str, int], channels: dict[str, int]) -> None:
    head = head_of(kind, Pyramid(channels=channels, strides=strides))
    geometry = Geometry(padded=(70, 98), sizes=((70, 91), (50, 70)))
    levels = levels_for(head, (70, 98))
    losses = head.train().losses(levels, geometry, targets_of(kind, (70, 98)))
    sum(losses.values()).backward()
    assert torch.isfinite(sum(losses.values()))
    names = {name for name, value in head.named_parameters() if name.startswith("adapters.")}
    assert bool(names) == (set(channels.values()) != {head.channels})
    with torch.no_grad():
        found = livelier(head).predict(levels, geometry)
    for each, (height, width) in zip(found, geometry.sizes, strict=True):
        assert isinstance(each, Detections)
        assert len(each.boxes)
        assert set(each.levels) <= set(strides)
        assert each.boxes[:, 0::2].max() <= width
        assert each.boxes[:, 1::2].max() <= height
        assert each.boxes.min() >= 0
        assert torch.equal(each.scores, each.scores.sort(descending=True).values)
        assert (each.proposals is not None) == kind.endswith("rcnn")


@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_was_trained_on_is_found(kind: str) -> None:
    """The boxes and classes of two images are learnt by heart: those of predictions are those of targets."""
    settings = {"convolutions": 1} if kind in ("fcos", "retinanet") else {"box_features": 64}
    head = head_of(kind, pyramid_of({"P3": 8, "P4": 16}, 16), **settings).train()
    levels = {name: level.requires_grad_() for name, level in levels_for(head, (64, 96)).items()}
    geometry, targets = Geometry(padded=(64, 96), sizes=SIZES), targets_of(kind)
    optimizer = torch.optim.Adam([*head.parameters(), *levels.values()], 1e-2)
    with isolated_torch_state(0):
        for _ in range(120):
            optimizer.zero_grad()
            sum(head.losses(levels, geometry, targets).values()).backward()
            optimizer.step()
    with torch.no_grad():
        found = head.eval().predict(levels, geometry)
    for each, target in zip(found, targets, strict=True):
        assert isinstance(each, Detections)
        assert target.boxes is not None
        assert target.labels is not None
        best = box_iou(each.boxes[: len(target.boxes)], target.boxes)
        assert (best.max(0).values > 0.85).all()
        assert torch.equal(each.labels[: len(target.boxes)][best.argmax(0)], target.labels)
        if each.proposals is not None:
            assert (box_iou(each.proposals, target.boxes).max(0).values > 0.8).all()


def test_locations_are_at_the_levels_strides_for_every_size() -> None:
    head = head_of("fcos")
    for padded in ((64, 96), (100, 75), (224, 224), (800, 1344)):
        levels = {
            name: torch.zeros(1, WIDTH, *(-(-side // 2 ** int(name[1])) for side in padded)) for name in head.levels
        }
        _, anchors, counts = head._outputs(levels, Geometry(padded=padded, sizes=(padded,)))
        for name, boxes in zip(head.levels, anchors[0].split(counts), strict=True):
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2
            assert centres[0].tolist() == [0, 0]
            stride = 2 ** int(name[1])
            if stride <= 32 and levels[name].shape[-1] > 1:
                assert centres[1].tolist() == [stride, 0]
    # above stride 32 as torchvision, which divides the side: 1344 / 21 = 64, but 800 // 13 = 61
    assert anchors[0].split(counts)[3][21].tolist() == [-32, 29, 32, 93]


def test_a_box_belongs_to_one_level_by_its_size() -> None:
    """FCOS: locations of P3 take boxes that reach up to 64 pixels from them, those of P5 from 64 on where P4 lacks."""
    for strides, expected in (
        ({"P3": 8, "P4": 16, "P5": 32}, {40: "P3", 72: "P4", 200: "P5"}),
        ({"P3": 8, "P5": 32}, {40: "P3", 72: "P3", 200: "P5"}),
        ({"P4": 16}, {40: "P4", 72: "P4", 200: "P4"}),
    ):
        head = head_of("fcos", pyramid_of(strides)).train()
        for reach, level in expected.items():
            levels = {name: value.requires_grad_() for name, value in levels_for(head, (512, 512), batch=1).items()}
            middle = 256.0
            box = torch.tensor([[middle - reach, middle - reach, middle + reach, middle + reach]])
            losses = head.losses(
                levels, Geometry(padded=(512, 512), sizes=((512, 512),)), [Target(boxes=box, labels=torch.tensor([0]))]
            )
            losses["bbox_regression"].backward()
            touched = {name for name, value in levels.items() if value.grad is not None and value.grad.any()}
            assert touched == {level}, (strides, reach)


def test_boxes_are_pooled_from_the_level_of_equation_1() -> None:
    """floor(4 + log2(side / 224)): 224 pixels from P4, 112 from P3, 448 from P5; a missing level by the next finer."""
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in (20.0, 112.0, 223.0, 224.0, 448.0, 2000.0)])
    for strides, expected in (
        ({"P2": 4, "P3": 8, "P4": 16, "P5": 32, "P6": 64}, [0, 1, 1, 2, 3, 3]),
        ({"P3": 8, "P5": 32}, [0, 0, 0, 0, 1, 1]),
        ({"P4": 14, "P5": 28}, [0, 0, 0, 0, 1, 1]),
    ):
        pool = head_of("faster_rcnn", pyramid_of(strides)).roi_heads.box_roi_pool
        assert pool.map_levels([boxes]).tolist() == expected
        assert pool.scales == [1 / stride for stride in strides.values() if stride <= 32]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_copy_and_a_head_from_settings_give_the_same(kind: str) -> None:
    settings = {"channels": 64} | ({"convolutions": 2} if kind in ("fcos", "retinanet") else {"box_features": 48})
    head = livelier(head_of(kind, **settings))
    copied = copy.deepcopy(head)
    again = HEADS[kind].for_pyramid(head.pyramid, CLASSES, head.settings()).eval()
    again.load_state_dict(head.state_dict())
    levels, geometry = levels_for(head, (64, 96)), Geometry(padded=(64, 96), sizes=SIZES)
    with torch.no_grad():
        expected = head.predict(levels, geometry)
        for other in (copied, again):
            for ours, theirs in zip(other.predict(levels, geometry), expected, strict=True):
                assert torch.equal(ours.boxes, theirs.boxes)
                assert torch.equal(ours.scores, theirs.scores)
        for value in head.parameters():
            value.zero_()
        assert torch.equal(copied.predict(levels, geometry)[0].boxes, expected[0].boxes)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_thresholds_are_set_on_the_head(kind: str) -> None:
    head = livelier(head_of(kind))
    levels, geometry = levels_for(head, (64, 96)), Geometry(padded=(64, 96), sizes=SIZES)
    with torch.no_grad():
        before = head.predict(levels, geometry)[0]
        head.max_detections = 5
        assert len(head.predict(levels, geometry)[0].boxes) == 5
        head.max_detections, head.score_threshold = 1000, float(before.scores.median())
        assert head.predict(levels, geometry)[0].scores.min() > before.scores.median()
        head.score_threshold, head.nms_threshold = 0.0, 0.0
        few = head.predict(levels, geometry)[0]
        head.nms_threshold = 0.9
        assert len(head.predict(levels, geometry)[0].boxes) > len(few.boxes)


def test_classes_are_trained_on_as_many_boxes_as_asked_for() -> None:
    geometry = Geometry(padded=(64, 96), sizes=SIZES)
    for samples in (4, 16):
        head = head_of("faster_rcnn", box_samples=samples).train()
        pooled = []
        head.roi_heads.box_roi_pool.register_forward_hook(lambda *call: pooled.append(len(call[-1])))  # noqa: B023
        with isolated_torch_state(0):
            head.losses(levels_for(head, (64, 96)), geometry, targets_of("faster_rcnn"))
        assert pooled == [samples * len(SIZES)]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_mixed_precision_trains_on_the_same_boxes(kind: str) -> None:
    head = head_of(kind).train()
    levels, geometry = levels_for(head, (64, 96)), Geometry(padded=(64, 96), sizes=SIZES)
    with isolated_torch_state(0):
        expected = head.losses(levels, geometry, targets_of(kind))
    with isolated_torch_state(0), torch.autocast("cpu", torch.bfloat16):
        found = head.losses({n: x.bfloat16() for n, x in levels.items()}, geometry, targets_of(kind))
    for name, loss in found.items():
        assert loss.dtype is torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("fcos", {"width": 3}, "head fcos has no setting 'width': it has channels, convolutions"),
        ("fcos", {"convolutions": 0}, "setting convolutions 0: take a whole number from 1 on"),
        ("retinanet", {"convolutions": 5}, "setting convolutions 5: it has at most 4"),
        ("faster_rcnn", {"channels": "64"}, "setting channels 64: take a whole number from 1 on"),
        ("mask_rcnn", {"box_features": True}, "setting box_features True: take a whole number"),
    ],
)
def test_settings_that_do_not_exist_are_refused(kind: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        HEADS[kind].for_pyramid(pyramid_of(strides_of(kind)), CLASSES, settings)
