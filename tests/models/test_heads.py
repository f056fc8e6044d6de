"""Heads for classification and segmentation against hand-worked numbers, and what all heads share."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fpnx
from fpnx.core.errors import FpnxError
from fpnx.models.heads.base import Geometry, Pyramid, Target, norm_groups
from fpnx.models.heads.classify import ClassifyHead
from fpnx.models.heads.registry import HEADS, create_head, default_head, find_head
from fpnx.models.heads.semantic import SemanticHead


def classify(multi_label: bool = False) -> ClassifyHead:
    """P3 of 2 channels and P4 of 1, with classes that are (a, b + 10, c) of the averages a, b and c."""
    head = ClassifyHead(Pyramid(channels={"P3": 2, "P4": 1}, strides={"P3": 8, "P4": 16}), 3, multi_label=multi_label)
    with torch.no_grad():
        head.head.weight.copy_(torch.eye(3))
        head.head.bias.copy_(torch.tensor([0.0, 10.0, 0.0]))
    return head


def classify_levels() -> dict[str, Tensor]:
    """An input of 32×32: P3 counts 0 to 15, and 100 more in its second channel; P4 is 1, 2, 3, 4."""
    p3 = torch.arange(16.0).reshape(1, 1, 4, 4)
    return {"P3": torch.cat([p3, p3 + 100], 1), "P4": torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), [7.5, 117.5, 2.5]),  # all cells
        # 2 rows and 3 columns of P3: 0 1 2 4 5 6; of P4 the centres at 8 and 24, of which 24 is beyond 20
        ((16, 24), [3.0, 113.0, 1.0]),
        ((20, 28), [3.0, 113.0, 1.5]),  # centres at 20 lie on the border of 20: 2 rows; of P4 24 < 28
        ((21, 28), [5.0, 115.0, 1.5]),  # 3 rows and 3 columns: 0 1 2 4 5 6 8 9 10
        ((3, 3), [0.0, 110.0, 1.0]),  # no centre lies in it: the first cell
    ],
    ids=str,
)
def test_averages_leave_padding_out(size: tuple[int, int], expected: list[float]) -> None:
    (logits,) = classify().predict(classify_levels(), Geometry(padded=(32, 32), sizes=(size,)))
    assert isinstance(logits, Tensor)
    assert logits.tolist() == expected


def test_losses_of_classification_by_hand() -> None:
    levels = {name: level * 0 for name, level in classify_levels().items()}
    geometry = Geometry(padded=(32, 32), sizes=((32, 32),))
    # logits are 0, 10, 0
    target = Target(classes=torch.tensor([0.0, 0.0, 1.0]))
    loss = classify().losses(levels, geometry, [target])["classification"]
    assert loss.item() == pytest.approx(math.log(2 + math.exp(10)), rel=1e-6)
    both = Target(classes=torch.tensor([1.0, 1.0, 0.0]))
    loss = classify(multi_label=True).losses(levels, geometry, [both])["classification"]
    assert loss.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(-10)) + math.log(2)) / 3, rel=1e-6)
    none = Target(classes=torch.zeros(3))
    loss = classify(multi_label=True).losses(levels, geometry, [none])["classification"]
    assert loss.item() == pytest.approx((2 * math.log(2) + 10 + math.log(1 + math.exp(-10))) / 3, rel=1e-6)


def semantic(strides: dict[str, int], classes: int = 2, channels: int = 2) -> SemanticHead:
    """A head whose convolutions copy, and whose norms do nothing but what the statistics do."""
    head = SemanticHead(Pyramid(channels=dict.fromkeys(strides, channels), strides=strides), classes, channels=channels)
    with torch.no_grad():
        for name, value in head.named_parameters():
            if value.dim() == 4:
                value.zero_()
                for i in range(min(value.shape[:2])):
                    value[i, i, value.shape[2] // 2, value.shape[3] // 2] = 1.0
            elif name.endswith("bias"):
                value.zero_()
    return head.eval()


def test_semantic_by_hand() -> None:
    """One map of stride 4: the norm gives ±1 for a channel of two values, ReLU keeps the larger, and 4 times the size.

    A group norm of 2 channels has one group: values 0, 0 and 2, 2 have mean 1 and deviation 1.
    """
    head = semantic({"P2": 4})
    level = torch.zeros(1, 2, 2, 2)
    level[0, 0], level[0, 1] = 0.0, 2.0
    (logits,) = head.predict({"P2": level}, Geometry(padded=(8, 8), sizes=((8, 8),)))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 8, 8)
    torch.testing.assert_close(logits[0], torch.zeros(8, 8), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1], torch.ones(8, 8), rtol=0, atol=1e-4)


def test_semantic_is_the_sum_of_all_levels_at_stride_4() -> None:
    """Against the definition, written out: P4 is convolved and doubled twice, P3 once, P2 convolved alone."""
    head = SemanticHead(
        Pyramid(channels={"P2": 4, "P3": 4, "P4": 4}, strides={"P2": 4, "P3": 8, "P4": 16}), 5, channels=8
    )
    head.initialize(0)
    generator = torch.Generator().manual_seed(0)
    levels = {f"P{k}": torch.randn(2, 4, 96 // 2**k, 64 // 2**k, generator=generator) for k in (2, 3, 4)}
    blocks = head.head.blocks
    assert {name: len(each) for name, each in blocks.items()} == {"P2": 1, "P3": 1, "P4": 2}

    def doubled(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    with torch.no_grad():
        total = blocks["P2"][0](levels["P2"]) + doubled(blocks["P3"][0](levels["P3"]))
        total = total + doubled(blocks["P4"][1](doubled(blocks["P4"][0](levels["P4"]))))
        expected = F.interpolate(head.head.classifier(total), scale_factor=4, mode="bilinear", align_corners=False)
        found = head.predict(levels, Geometry(padded=(96, 64), sizes=((96, 64), (90, 60))))
    torch.testing.assert_close(torch.stack([each for each in found if isinstance(each, Tensor)]), expected)


@pytest.mark.parametrize(
    ("strides", "stride"),
    [
        ({"P2": 4, "P5": 32}, 4),
        ({"P3": 8, "P4": 16}, 4),
        ({"P3": 7, "P4": 14, "P5": 28}, 7),
        ({"C4": 14}, 14),
        ({"C5": 32}, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("floor", [False, True])
def test_semantic_takes_any_levels_and_sizes(strides: dict[str, int], stride: int, floor: bool) -> None:
    head = SemanticHead(Pyramid(channels=dict.fromkeys(strides, 3), strides=strides), 4, channels=8)
    head.initialize(0)
    assert head.stride == stride
    padded = (75, 101)
    round_up = 0 if floor else 1
    levels = {
        name: torch.randn(1, 3, *((side + (each - 1) * round_up) // each for side in padded))
        for name, each in strides.items()
    }
    (logits,) = head.predict(levels, Geometry(padded=padded, sizes=((70, 100),)))
    assert isinstance(logits, Tensor)
    assert logits.shape == (4, *padded)


def test_cells_of_an_odd_map_stay_where_they_are() -> None:
    """A cell that is on in P3 is on in the same pixels of the input, whatever the input's size."""
    head = semantic({"P2": 4, "P3": 8})
    for side in (64, 68, 60):
        p3 = torch.zeros(1, 2, -(-side // 8), -(-side // 8))
        p3[0, 1, 6, 5] = 1.0
        (logits,) = head.predict(
            {"P2": torch.zeros(1, 2, side // 4, side // 4), "P3": p3},
            Geometry(padded=(side, side), sizes=((side, side),)),
        )
        assert isinstance(logits, Tensor)
        peak = logits[1].flatten().argmax().item()
        assert 48 <= peak // side < 56
        assert 40 <= peak % side < 48


def test_semantic_loss_by_hand_and_without_any_class() -> None:
    head = semantic({"P2": 4})
    geometry = Geometry(padded=(8, 8), sizes=((8, 8),))
    level = torch.zeros(1, 2, 2, 2)
    level[0, 1] = 2.0  # logits are 0 and 1 everywhere, as above
    classes = torch.full((8, 8), 255)
    classes[0, 0], classes[0, 1], classes[5, 5] = 1, 1, 0
    loss = head.losses({"P2": level}, geometry, [Target(semantic=classes)])["semantic"]
    assert loss.item() == pytest.approx(math.log(1 + math.e) - 2 / 3, abs=1e-4)
    level.requires_grad_()
    loss = head.losses({"P2": level}, geometry, [Target(semantic=torch.full((8, 8), 255))])["semantic"]
    assert loss.item() == 0
    loss.backward()
    assert level.grad is not None
    assert not level.grad.any()


@pytest.mark.parametrize("kind", ["classify", "semantic"])
def test_losses_fall_and_gradients_reach_the_neck(kind: str) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P3-P5", channels=32)
    head = create_head(kind, model, 3, settings={"channels": 16} if kind == "semantic" else {}).train()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    geometry = Geometry(padded=(64, 96), sizes=((64, 96), (50, 90)))
    semantic_classes = torch.full((2, 64, 96), 255)
    semantic_classes[:, :30, :40], semantic_classes[:, 30:50, 40:90] = 0, 2
    targets = [
        Target(classes=torch.eye(3)[i]) if kind == "classify" else Target(semantic=semantic_classes[i]) for i in (0, 1)
    ]
    with torch.no_grad():
        taps = model.taps(images)
    optimizer = torch.optim.Adam([*model.fpn.parameters(), *head.parameters()], 1e-2)
    totals = []
    for _ in range(8):
        (loss,) = head.losses(model.fpn(taps, model.levels), geometry, targets).values()
        optimizer.zero_grad()
        loss.backward()
        assert model.fpn.inner_blocks[1][0].weight.grad.any()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize("kind", HEADS)
def test_parameters_come_from_the_seed_alone(kind: str) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P4,P5", channels=32)
    settings = {"box_features": 8} if kind.endswith("rcnn") else {}

    def made(seed: int) -> dict[str, Tensor]:
        return create_head(kind, model, 2, seed=seed, settings=settings).state_dict()

    first = made(0)
    torch.rand(5)
    state = torch.get_rng_state()
    other = made(1)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        again = made(0)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(state, torch.get_rng_state())
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(value.dtype is torch.float32 for value in again.values())
    drawn = [name for name, value in first.items() if value.unique().numel() > 1]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_heads_are_found_by_name() -> None:
    assert {kind: head.kind for kind, head in HEADS.items()} == {kind: kind for kind in HEADS}
    assert [default_head(task) for task in ("classification", "detection", "semantic")] == [
        "classify",
        "fcos",
        "semantic",
    ]
    assert {default_head(head.task) for head in HEADS.values()} <= set(HEADS)
    assert all(head.summary and head.default_levels for head in HEADS.values())
    assert {kind for kind, head in HEADS.items() if head.needs_masks} == {"mask_rcnn"}
    with pytest.raises(FpnxError, match=r"'maskrcnn' is unknown \(did you mean mask_rcnn\?\): take fcos, retinanet"):
        find_head("maskrcnn")


def test_group_norms_have_32_groups_where_they_can() -> None:
    assert [norm_groups(n) for n in (256, 128, 64, 96, 48, 40, 32, 16, 7, 2, 1)] == [
        32, 32, 32, 32, 16, 8, 16, 8, 1, 1, 1,
    ]  # fmt: skip
