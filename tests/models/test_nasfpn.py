"""NAS-FPN: an independent reference, hand-worked numbers, mmdetection's files, and a run from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fpnx import FpnxError, create_model, save_weights
from fpnx.core.config import ExtractConfig
from fpnx.models.factory import build_model
from fpnx.models.necks.nasfpn import NASFPN
from tests.helpers.necks import assert_levels_equal, check_executed_form, random_taps
from tests.helpers.process import document
from tests.helpers.reference_networks import MMNASFPN, MMDetector, randomise

CHANNELS = {3: 5, 4: 7, 5: 11}
TINY = ["--weights", "random", "--backbone", "mobilenet_v2", "--size", "128", "--channels", "8", "--pyramid", "nasfpn"]


def in_fpnx_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of mmdetection's NASFPN with fpnx's names."""
    renamed = {}
    for name, value in state.items():
        kind, place, *rest = name.split(".")
        tail = ".".join("01"[part == "bn"] if part in ("conv", "bn") else part for part in rest if part != "out_conv")
        if kind == "extra_downsamples":
            tail = tail.removeprefix("0.")
        kinds = {"lateral_convs": "inner_blocks", "extra_downsamples": "downsample_blocks", "fpn_stages": "stacks"}
        renamed[f"{kinds[kind]}.{place}.{tail}"] = value
    return renamed


@pytest.mark.parametrize("size", [(32, 48), (29, 38), (25, 34), (28, 28), (13, 100)], ids=str)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("stacks", [1, 3])
def test_equals_an_independent_reference(size: tuple[int, int], norm: bool, stacks: int) -> None:
    reference = randomise(
        MMNASFPN(stack_times=stacks, channels=6, norm=norm, inputs=tuple(CHANNELS.values())), smallest_variance=0.1
    )
    neck = NASFPN(CHANNELS, 6, stacks, norm="batch" if norm else None).eval()
    neck.load_state_dict(in_fpnx_names(reference.state_dict()))
    taps = random_taps(CHANNELS, *size)
    with torch.no_grad():
        levels, expected = neck(taps), reference(list(taps.values()))
    assert list(levels) == ["P3", "P4", "P5", "P6", "P7"]
    assert_levels_equal(levels.values(), expected)


def test_one_stack_by_hand() -> None:
    neck = NASFPN({3: 1, 4: 1, 5: 1}, 1, 1, norm=None)
    with torch.no_grad():
        for convolution in (module for module in neck.modules() if isinstance(module, nn.Conv2d)):
            convolution.weight.zero_()
            convolution.bias.zero_()
            middle = convolution.kernel_size[0] // 2
            convolution.weight[0, 0, middle, middle] = 1.0
    # P3 = 1 everywhere, P4 = 2, P5 = 4; P6 and P7 are pooled from P5: 4
    levels = neck({f"C{k}": torch.full((1, 1, side, side), 2.0 ** (k - 3)) for k, side in ((3, 16), (4, 8), (5, 4))})
    gate = torch.sigmoid(torch.tensor([2.0]))
    first4 = 2 + gate * 4
    second4 = first4 + 2
    p3 = second4 + 1
    p4 = p3 + second4
    p5 = 4 + (p3 + torch.sigmoid(p3) * p4)
    p7 = 4 + (second4 + torch.sigmoid(second4) * p5)
    p6 = p5 + torch.sigmoid(p5) * p7
    for name, expected, side in (("P3", p3, 16), ("P4", p4, 8), ("P5", p5, 4), ("P6", p6, 2), ("P7", p7, 1)):
        assert levels[name].shape == (1, 1, side, side)
        assert torch.allclose(levels[name], expected), name


# Convolutions of 3×3 in the last of two stacks, by the last level in the order P3, P4, P5, P7, P6.
@pytest.mark.parametrize(
    ("levels", "cells"), [(("P3",), 3), (("P4",), 4), (("P5",), 5), (("P7",), 6), (("P3", "P6"), 7)]
)
def test_what_no_level_needs_is_not_computed(levels: tuple[str, ...], cells: int) -> None:
    neck = NASFPN(CHANNELS, 4, 2).eval()
    neck.initialize(0)
    ran: list[str] = []
    for name, module in neck.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        some = neck(random_taps(CHANNELS, 16, 24), levels)
        assert len(ran) == 7 + cells, ran
        every = neck(random_taps(CHANNELS, 16, 24))
    assert list(some) == list(levels)
    assert all(torch.equal(some[level], every[level]) for level in levels)


@pytest.mark.parametrize("levels", [None, "P3,P4", "C4,P6"])
def test_the_executed_form_gives_the_same(levels: str | None) -> None:
    model = create_model("mobilenet_v2", weights="random", levels=levels, channels=16, pyramid="nasfpn")
    randomise(model.fpn, smallest_variance=0.1)
    fused = check_executed_form(model, ((128, 192), (129, 200)))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.neck.modules()), "norms are folded"


def test_levels_without_a_choice_are_those_of_the_paper() -> None:
    model = create_model("mobilenet_v2", weights="random", pyramid="nasfpn", channels=8)
    assert model.levels == ("P3", "P4", "P5", "P6", "P7")
    assert len(model.fpn.stacks) == 7
    sides = {"P3": 28, "P4": 14, "P5": 7, "P6": 3, "P7": 1}
    assert model.shapes((224, 224)) == {name: (8, side, side) for name, side in sides.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_saved_weights_are_read_back(tmp_path: Path, suffix: str) -> None:
    model = create_model("mobilenet_v2", weights="random", channels=8, pyramid="nasfpn", levels="P3-P6")
    randomise(model)
    path = tmp_path / f"nasfpn{suffix}"
    save_weights(model, path)
    again = create_model(weights=str(path))
    images = torch.randn(1, 3, 128, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = again(images), model(images)
    assert list(found) == list(expected) == ["P3", "P4", "P5", "P6"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(FpnxError, match=r"pyramid pafpn contradicts nasfpn.* which has nasfpn"):
        create_model(weights=str(path), pyramid="pafpn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_block": "c5"}, "top block c5 is for fpn and pafpn, a nasfpn pools its P6 and P7"),
        ({"levels": "P2-P5"}, "level P2 is not in a nasfpn, which has P3 to P7"),
        ({"backbone": "squeezenet1_1"}, "squeezenet1_1 has no level P5: the network has no map at stride 32"),
        ({"backbone": "squeezenet1_1", "levels": "P3"}, "a nasfpn needs the taps C3, C4 and C5, and there is no C5"),
    ],
)
def test_wrong_requests(options: dict[str, str], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        build_model(ExtractConfig(**{"backbone": "mobilenet_v2", "weights": "random", "pyramid": "nasfpn", **options}))


def test_an_input_without_a_p7_is_refused_with_the_size_that_works() -> None:
    model = create_model("mobilenet_v2", weights="random", pyramid="nasfpn", channels=8)
    with pytest.raises(FpnxError, match="cannot take an input of 64×64: the smallest square it takes is 97×97"):
        model.shapes((64, 64))
    assert model.shapes((97, 97))["P7"] == (8, 1, 1)


# --- mmdetection's files ---

CONFIG = """
model = dict(
    type='RetinaNet',
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    neck=dict(type='{kind}', in_channels=[256, 512, 1024, 2048], out_channels=16, {neck}))
"""
RETINANET = "start_level=1, num_outs=5, add_extra_convs='on_input'"
MMDETECTION = {  # what the reference has, and what the config says; None: there is no config
    "NASFPN": ({"kind": "NASFPN", "stack_times": 2, "channels": 16}, f"stack_times=2, {RETINANET}"),
    "NASFPN without config": ({"kind": "NASFPN", "stack_times": 2, "channels": 16, "norm": False}, None),
    "PAFPN": (
        {"kind": "PAFPN", "start_level": 1, "num_outs": 5, "add_extra_convs": "on_output", "channels": 16},
        "start_level=1, num_outs=5, add_extra_convs='on_output'",
    ),
    "PAFPN without config": ({"kind": "PAFPN", "start_level": 0, "num_outs": 5, "channels": 16, "norm": True}, None),
}


@pytest.mark.parametrize("case", MMDETECTION)
def test_files_of_mmdetection_equal_the_reference(case: str, tmp_path: Path) -> None:
    neck, text = MMDETECTION[case]
    kind = case.split()[0]
    network = randomise(MMDetector(**neck), smallest_variance=0.1)
    meta = {"config": CONFIG.format(kind=kind, neck=text)} if text else {}
    torch.save({"meta": meta, "state_dict": network.state_dict()}, tmp_path / "model.pth")
    model = create_model(weights=str(tmp_path / "model.pth"))
    assert model.backbone == "resnet50"
    assert model.fpn.kind == kind.lower()
    assert model.weights.framework == "mmdetection"
    assert model.recipe.pad_multiple == (128 if kind == "NASFPN" else 32)
    images = torch.randn(1, 3, 128, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        levels, expected = model(images), network(images)
    if "norm" not in neck and kind == "PAFPN":
        assert model.fpn.top_block == "p5"
    assert list(levels) == list(expected)
    for name, level in levels.items():
        assert (level - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_from_images_to_a_file(fpnx: Callable[..., tuple[int, str, str]], photos: Path) -> None:
    assert fpnx("extract", photos, *TINY, "-o", "nasfpn.h5")[0] == 0
    code, _, err = fpnx("extract", photos, *TINY[:-1], "bifpn", "-o", "nasfpn.h5", "--resume")
    assert code == 2
    assert "pyramid nasfpn → bifpn" in err
    assert fpnx("verify", "nasfpn.h5", "--against", photos)[0] == 0
    assert "P7, nasfpn, untrained (random, seed 0)" in fpnx("info", "nasfpn.h5")[1]
    assert document(fpnx("info", "nasfpn.h5", "--json")[1])["config"]["stacks"] == 7
    code, _, err = fpnx("extract", photos, *TINY, "--size", "64", "-o", "small.h5")
    assert code == 2
    assert "the smallest square it takes is 97×97" in err
