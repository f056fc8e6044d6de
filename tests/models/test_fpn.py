"""The pyramid against hand-worked numbers, and against torchvision's on the same parameters."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

import fpnx
from fpnx.core.config import ModelConfig
from fpnx.models.factory import NeckPlan, build_model
from fpnx.models.necks.fpn import FPN, VARIANTS
from fpnx.models.necks.pafpn import PAFPN
from tests.helpers.necks import check_executed_form

CHANNELS = {2: 3, 3: 5, 4: 7, 5: 11}


def taps(height: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(height, width)]
    for _ in range(3):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return {
        f"C{k}": torch.randn(2, CHANNELS[k], *size, generator=generator)
        for k, size in zip(CHANNELS, sizes, strict=True)
    }


def test_two_levels_by_hand() -> None:
    fpn = FPN({4: 1, 5: 1}, channels=1)
    with torch.no_grad():
        for block, scale, bias in ((fpn.inner_blocks[0][0], 2.0, 0.5), (fpn.inner_blocks[1][0], 10.0, 0.0)):
            block.weight.fill_(scale)
            block.bias.fill_(bias)
        for block in fpn.layer_blocks:  # output: the sum of the 3×3 neighbourhood
            block[0].weight.fill_(1.0)
            block[0].bias.zero_()
    c4 = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]])
    c5 = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    # M5 = 10 C5; nearest to 3×3 takes rows and columns 0, 0, 1: [[10 10 20] [10 10 20] [30 30 40]]
    # M4 = 2 C4 + 0.5 + that = [[12.5 14.5 26.5] [18.5 20.5 32.5] [44.5 46.5 58.5]]
    levels = fpn({"C4": c4, "C5": c5})
    assert list(levels) == ["P4", "P5"]
    assert levels["P5"].tolist() == [[[[100.0, 100.0], [100.0, 100.0]]]]
    assert levels["P4"][0, 0].tolist() == [[66.0, 125.0, 94.0], [157.0, 274.5, 199.0], [130.0, 221.0, 158.0]]


@pytest.mark.parametrize("size", [(56, 56), (57, 76), (25, 33), (9, 8)], ids=str)
@pytest.mark.parametrize("top_block", [None, "pool", "c5", "p5"], ids=str)
def test_equals_torchvision(size: tuple[int, int], top_block: str | None) -> None:
    fpn = FPN(CHANNELS, 6, top_block)
    fpn.initialize(seed=3)
    source = 11 if top_block == "c5" else 6
    extra: ExtraFPNBlock | None = LastLevelMaxPool() if top_block == "pool" else None
    if top_block in ("c5", "p5"):
        extra = LastLevelP6P7(source, 6)
    theirs = FeaturePyramidNetwork(list(CHANNELS.values()), 6, extra)
    theirs.load_state_dict(fpn.state_dict())
    inputs = taps(*size)
    with torch.no_grad():
        ours, reference = fpn(inputs), theirs(OrderedDict(inputs))
    assert list(ours) == list(fpn.levels)
    for level, expected in zip(ours.values(), reference.values(), strict=True):
        assert level.shape == expected.shape
        assert (level - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("levels", [("P2",), ("P5",), ("P3", "P5"), ("P6",), ("P7",), ("P4", "P6")], ids=str)
@pytest.mark.parametrize("top_block", ["c5", "p5"])
def test_what_nobody_asked_for_is_not_computed(levels: tuple[str, ...], top_block: str) -> None:
    fpn = FPN(CHANNELS, 4, top_block)
    fpn.initialize(seed=0)
    ran: list[str] = []
    for name, module in fpn.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        some = fpn(taps(32, 40), levels)
        needed = sorted(ran)
        every = fpn(taps(32, 40))
    assert list(some) == list(levels)
    assert all(torch.equal(some[level], every[level]) for level in levels)
    finest = min([int(level[1]) for level in levels if level < "P6"], default=5 if top_block == "p5" else 6)
    outputs = {int(level[1]) for level in levels if level < "P6"}
    if top_block == "p5" and max(levels) > "P5":
        outputs.add(5)
    expected = [f"inner_blocks.{k - 2}.0" for k in range(finest, 6)] + [f"layer_blocks.{k - 2}.0" for k in outputs]
    expected += ["extra_blocks.p6"] * (max(levels) > "P5") + ["extra_blocks.p7"] * (max(levels) > "P6")
    assert needed == sorted(expected)


def test_arguments_are_left_alone() -> None:
    fpn = FPN(CHANNELS, 4, "c5")
    inputs = taps(16, 16)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    with torch.no_grad():
        fpn(inputs)
    assert list(inputs) == list(before)
    assert all(torch.equal(inputs[name], before[name]) for name in before)


def test_seeds_depend_on_the_absolute_level_alone() -> None:
    whole, upper = FPN(CHANNELS, 4, "c5"), FPN({4: 7, 5: 11}, 4)
    torch.rand(17)
    whole.initialize(seed=5)
    state = torch.get_rng_state()
    upper.initialize(seed=5)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was used"
    assert torch.equal(whole.inner_blocks[2][0].weight, upper.inner_blocks[0][0].weight)
    assert torch.equal(whole.layer_blocks[3][0].weight, upper.layer_blocks[1][0].weight)
    other = FPN({4: 7, 5: 11}, 4)
    other.initialize(seed=6)
    assert not torch.equal(other.inner_blocks[0][0].weight, upper.inner_blocks[0][0].weight)
    bound = (3 / 7) ** 0.5  # Kaiming uniform with a = 1 over 7 inputs
    weight = upper.inner_blocks[0][0].weight
    assert 0.8 * bound < weight.abs().max() <= bound
    assert not upper.inner_blocks[0][0].bias.any()


@pytest.mark.parametrize(
    ("variant", "p4"),
    [
        # M4 = 2 C4 + 0.5 = [[2.5 4.5 6.5] [8.5 10.5 12.5] [14.5 16.5 18.5]], and nothing from M5
        ("no-top-down", [[26.0, 45.0, 34.0], [57.0, 94.5, 69.0], [50.0, 81.0, 58.0]]),
        # M4 = nearest(10 C5) = [[10 10 20] [10 10 20] [30 30 40]], and nothing from C4
        ("no-lateral", [[40.0, 80.0, 60.0], [100.0, 180.0, 130.0], [80.0, 140.0, 100.0]]),
    ],
)
def test_variants_by_hand(variant: str, p4: list[list[float]]) -> None:
    """The pyramid of `test_two_levels_by_hand`, with a part left out."""
    fpn = FPN({4: 1, 5: 1}, channels=1, variant=variant)
    with torch.no_grad():
        for i, scale, bias in ((0, 2.0, 0.5), (1, 10.0, 0.0)):
            if variant == "no-lateral" and i == 0:
                assert not list(fpn.inner_blocks[0].parameters())
                continue
            fpn.inner_blocks[i][0].weight.fill_(scale)
            fpn.inner_blocks[i][0].bias.fill_(bias)
        for block in fpn.layer_blocks:
            block[0].weight.fill_(1.0)
            block[0].bias.zero_()
        c4 = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]])
        c5 = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        levels = fpn({"C4": c4, "C5": c5})
    assert levels["P5"].tolist() == [[[[100.0, 100.0], [100.0, 100.0]]]]
    assert levels["P4"][0, 0].tolist() == p4


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_a_variant_has_the_parameters_of_the_whole_but_for_what_it_lacks(variant: str) -> None:
    whole, part = FPN(CHANNELS, 4, "p5"), FPN(CHANNELS, 4, "p5", variant=variant)
    whole.initialize(3)
    part.initialize(3)
    state = whole.state_dict()
    absent = {f"inner_blocks.{i}.0.{name}" for i in range(3) for name in ("weight", "bias")}
    assert set(state) - set(part.state_dict()) == (absent if variant == "no-lateral" else set())
    assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
    assert part.identity() == {**whole.identity(), "variant": variant}
    assert "variant" not in whole.identity()
    assert not PAFPN.choices
    losses = sum(level.square().mean() for level in part(taps(37, 50)).values())
    losses.backward()
    assert all(value.grad is not None for value in part.parameters())


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_the_executed_form_of_a_variant_gives_its_numbers(variant: str, photos: Path, tmp_path: Path) -> None:
    config = ModelConfig(backbone="mobilenet_v2", weights="random", channels=16)
    model = build_model(config, plan=NeckPlan(levels=("P3", "P4", "P5", "P6"), top_block="pool", variant=variant))
    with torch.no_grad():
        for name, value in model.fpn.named_parameters():
            if name.endswith("bias"):
                value.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    check_executed_form(model, [(64, 96), (75, 101)])
    file = tmp_path / "variant.safetensors"
    fpnx.save_weights(model, file)
    assert fpnx.create_model(weights=str(file)).fpn.variant == variant
    fpnx.extract(photos, tmp_path / "out.h5", weights=str(file), size=64)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store.levels == ("P3", "P4", "P5", "P6")
        item = store[0]
        expected = fpnx.create_model(weights=str(file), size=64).features(photos / item.path)
        for name, level in expected.items():
            assert np.abs(item[name] - level.numpy()).max() <= 1e-5 * level.abs().max().item()
