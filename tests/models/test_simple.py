"""The simple feature pyramid: an independent reference, hand-worked numbers, the executed form, files and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpnx
from fpnx import FpnxError
from fpnx.inference.graph_fusion import fuse_model
from fpnx.models.necks.base import neck_shapes
from fpnx.models.necks.simple import ChannelNorm, SimplePyramid
from tests.helpers.reference_networks import randomise

Command = Callable[..., tuple[int, str, str]]
CNN = {"backbone": "mobilenet_v2", "weights": "random", "pyramid": "simple", "tap": "C4"}


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6) over the channels of each pixel, scaled and shifted."""
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight[:, None, None] + bias[:, None, None]


def reference(state: dict[str, Tensor], x: Tensor, tap: int) -> dict[str, Tensor]:
    """Section 3 of the paper, written out for the parameters of each level in their order."""

    def values(level: int) -> list[Tensor]:
        return [value for name, value in state.items() if name.startswith(f"blocks.P{level}.")]

    def end(x: Tensor, one: Tensor, w1: Tensor, b1: Tensor, three: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return channel_norm(F.conv2d(channel_norm(F.conv2d(x, one), w1, b1), three, padding=1), w2, b2)

    first, b, weight, bias, second, b2, *rest = values(tap - 2)
    x2 = F.gelu(channel_norm(F.conv_transpose2d(x, first, b, stride=2), weight, bias))
    found = {f"P{tap - 2}": end(F.conv_transpose2d(x2, second, b2, stride=2), *rest)}
    first, b, *rest = values(tap - 1)
    found[f"P{tap - 1}"] = end(F.conv_transpose2d(x, first, b, stride=2), *rest)
    found[f"P{tap}"] = end(x, *values(tap))
    found[f"P{tap + 1}"] = end(F.max_pool2d(x, 2, 2), *values(tap + 1))
    found[f"P{tap + 2}"] = found[f"P{tap + 1}"][:, :, ::2, ::2]
    return found


@pytest.mark.parametrize(("tap", "width", "size"), [(4, 24, (6, 9)), (5, 40, (7, 4)), (4, 192, (5, 5))])
def test_levels_are_those_of_the_paper(tap: int, width: int, size: tuple[int, int]) -> None:
    neck = SimplePyramid({tap: width}, 16)
    neck.initialize(3)
    randomise(neck)
    x = torch.randn(2, width, *size, generator=torch.Generator().manual_seed(0))
    expected = reference(neck.state_dict(), x, tap)
    with torch.no_grad():
        found = neck({f"C{tap}": x})
    assert tuple(found) == neck.levels == tuple(expected)
    for name, level in found.items():
        assert (level - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
        with torch.no_grad():
            (alone,) = neck({f"C{tap}": x}, [name]).values()
        assert torch.equal(alone, level)
    shapes = neck_shapes(neck, {f"C{tap}": (width, *size)}, neck.levels)
    assert shapes == {name: tuple(level.shape[1:]) for name, level in found.items()}


def test_hand_worked_numbers() -> None:
    neck = SimplePyramid({4: 4}, 2)
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.zero_()
        one, norm, three, last = neck.blocks["P4"]
        one.weight[0, 0], one.weight[1, 1] = 1, 1
        norm.weight.fill_(1)
        three.weight[0, 0, 1, 1], three.weight[1, 0, 1, 1] = 3, 1
        last.weight.fill_(10)
        last.bias.copy_(torch.tensor([1.0, 2.0]))
        x = torch.zeros(1, 4, 1, 1)
        x[0, 0], x[0, 1] = 5, 1
        # 1×1: (5, 1); norm: (1, -1); 3×3: (3, 1); norm: (1, -1); times 10, plus (1, 2).
        assert neck({"C4": x}, ["P4"])["P4"].flatten().tolist() == pytest.approx([11, -8], abs=1e-4)


def test_channel_norm_is_layer_norm_of_each_pixel() -> None:
    norm = randomise(ChannelNorm(6))
    x = torch.randn(2, 6, 3, 4)
    expected = nn.LayerNorm(6, eps=1e-6)
    expected.load_state_dict(norm.state_dict())
    with torch.no_grad():
        assert torch.allclose(norm(x)[1, :, 2, 3], expected(x[1, :, 2, 3]), atol=1e-6)


@pytest.mark.parametrize(
    ("width", "channels"), [(24, 64), (256, 16)]
)  # the transposed and the 1×1 convolution are merged where that pays
def test_the_executed_form_is_equal(width: int, channels: int) -> None:
    from fpnx.inference.neck_fusion import fuse_neck

    neck = SimplePyramid({4: width}, channels)
    neck.initialize(0)
    randomise(neck)
    neck.eval()
    fused = fuse_neck(neck, neck.levels, {"C4": width}, True)
    for part in fused.modules():
        if hasattr(part, "prepare"):
            part.prepare(torch.device("cpu"), torch.float32)
    x = torch.randn(1, width, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = neck({"C4": x}), fused({"C4": x})
    for name, level in expected.items():
        assert (found[name] - level).abs().max() <= 1e-5 * level.abs().max(), name
    kinds = [type(layer).__name__ for layer in fused.neck.blocks["P3"]]
    assert (kinds.count("PackedConv2d"), kinds.count("ConvTranspose2d")) == ((1, 1) if width == 256 else (2, 1)), kinds


def test_a_model_and_its_executed_form() -> None:
    model = fpnx.create_model(**CNN, channels=16, levels="C5,P2-P6")
    assert model.levels == ("P2", "P3", "P4", "C5", "P5", "P6")
    images = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(images), fuse_model(model)(images)
    for name, level in expected.items():
        assert (found[name] - level).abs().max() <= 1e-5 * level.abs().max(), name
    assert {name: tuple(level.shape[1:]) for name, level in expected.items()} == model.shapes((96, 64))
    again = fpnx.create_model(**CNN, channels=16, levels="P3")
    for name, value in again.fpn.state_dict().items():
        assert torch.equal(value, model.fpn.state_dict()[name])
    other = fpnx.create_model(**CNN, channels=16, seed=1)
    assert not torch.equal(other.fpn.blocks["P4"][0].weight, model.fpn.blocks["P4"][0].weight)
    assert other.levels == ("P2", "P3", "P4", "P5")
    assert other.identity()["tap"] == "C4"


def test_weights_are_read_back(tmp_path: Path) -> None:
    model = randomise(fpnx.create_model(**CNN, channels=16, levels="P3,P6"))
    fpnx.save_weights(model, tmp_path / "own.pt", trained=["body", "fpn"])
    again = fpnx.create_model(weights=str(tmp_path / "own.pt"))
    assert (again.levels, again.fpn.kind, again.weights.fpn.trained) == (("P3", "P6"), "simple", True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, level in model(images).items():
            assert torch.equal(again(images)[name], level)
    with pytest.raises(FpnxError, match=r"pyramid fpn contradicts own\.pt, which has simple"):
        fpnx.create_model(weights=str(tmp_path / "own.pt"), pyramid="fpn")
    image = fpnx.create_model(weights=str(tmp_path / "own.pt"), pyramid="image")
    assert image.fpn.kind == "image"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tap": None}, r"pyramid simple on mobilenet_v2, which has maps of several strides: .* --tap C4"),
        ({"tap": "C7"}, "has no tap C7"),
        ({"top_block": "c5"}, "top block c5 beside pyramid simple.*: take pool"),
        ({"levels": "P7"}, "has no level P7: it gives .*P6"),
        ({"pyramid": "fpn"}, "tap C4 is for pyramids of one tap"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        fpnx.create_model(**{**CNN, **options})


def test_on_a_vision_transformer(fpnx: Command, photos: Path) -> None:
    pytest.importorskip("timm")
    code, _, err = fpnx(
        *("extract", photos, "-o", "out.h5", "--backbone", "timm/vit_tiny_patch16_224", "--weights", "random"),
        *("--size", "64x96", "--pyramid", "simple", "--levels", "P2-P6", "--channels", "8"),
    )
    assert code == 0, err
    with h5py.File("out.h5") as file:
        shapes = {name: (file[name].shape[1:], int(file[name].attrs["stride"])) for name in file if name[0] == "P"}
    assert shapes == {
        "P2": ((8, 16, 24), 4),
        "P3": ((8, 8, 12), 8),
        "P4": ((8, 4, 6), 16),
        "P5": ((8, 2, 3), 32),
        "P6": ((8, 1, 2), 64),
    }
    assert fpnx("verify", "out.h5", "--against", photos)[0] == 0


def test_a_patch_of_14_has_no_p2() -> None:
    pytest.importorskip("timm")
    name = "timm/eva02_tiny_patch14_224"
    model = fpnx.create_model(name, weights="random", pyramid="simple", channels=8)
    assert {level: model.stride(level) for level in model.levels} == {"P3": 7, "P4": 14, "P5": 28}
    with pytest.raises(FpnxError, match="stride 14 has no P2: its stride would be no whole number: take C4, P3, P4"):
        fpnx.create_model(name, weights="random", pyramid="simple", levels="P2")
