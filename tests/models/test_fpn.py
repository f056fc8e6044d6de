"""The pyramid against hand-worked numbers, and against torchvision's on the same parameters."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from fpnx.models.necks.fpn import FPN

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
