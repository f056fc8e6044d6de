"""BiFPN: hand-worked numbers, parity with effdet, files and a run from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fpnx import FpnxError, create_model, save_weights
from fpnx.core.config import ExtractConfig
from fpnx.models.factory import build_model
from fpnx.models.necks.bifpn import BiFPN, cells_for_width
from tests.helpers.effdet_reference import BiFpn, config_of, in_fpnx_names
from tests.helpers.necks import assert_levels_equal, check_executed_form, random_taps
from tests.helpers.process import document
from tests.helpers.reference_networks import randomise

CHANNELS = {3: 40, 4: 112, 5: 320}
TINY = ["--weights", "random", "--backbone", "mobilenet_v2", "--size", "64", "--channels", "8", "--pyramid", "bifpn"]


def taps_of(height: int, width: int) -> dict[str, Tensor]:
    """Taps for an image of that size."""
    return random_taps(CHANNELS, -(-height // 8), -(-width // 8))


# Models of effdet, and what fpnx calls their settings.
MODELS: dict[str, dict[str, object]] = {
    "efficientdet_d0": {},
    "efficientdet_d2": {},
    "tf_efficientdet_d1": {"padding": "same", "bias": True},
    "tf_efficientdet_d6": {"padding": "same", "bias": True, "weighted": False},
    "tf_efficientdet_d7x": {"padding": "same", "bias": True, "weighted": False, "extra_levels": 3},
    "tf_efficientdet_lite0": {"padding": "same", "bias": True, "weighted": False, "activation": "relu6"},
    "efficientdetv2_dt": {"resampling": "bilinear"},
}


@pytest.mark.parametrize("size", [(128, 128), (200, 333)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_effdet(name: str, size: tuple[int, int]) -> None:
    config = config_of(name, size)
    infos = [{"num_chs": channels, "reduction": 2**k} for k, channels in CHANNELS.items()]
    reference = randomise(BiFpn(config, infos))
    neck = BiFPN(CHANNELS, config.fpn_channels, config.fpn_cell_repeats if "v2" in name else None, **MODELS[name])
    neck.eval().load_state_dict(in_fpnx_names(reference.state_dict()))
    taps = taps_of(*size)
    with torch.no_grad():
        levels, expected = neck(taps), reference(list(taps.values()))
    assert list(levels) == ["P3", "P4", "P5", "P6", "P7"]
    assert_levels_equal(levels.values(), expected[: len(levels)])


def test_two_levels_by_hand() -> None:
    neck = BiFPN({4: 1, 5: 1}, 1, cells=1, extra_levels=0, activation="relu6").eval()
    cell = neck.cells[0]
    with torch.no_grad():
        for node, weights in ((cell.top_down[0], (1.0, 3.0)), (cell.bottom_up[0], (-5.0, 2.0))):
            node.weights.copy_(torch.tensor(weights))
            node.depthwise.weight.zero_()
            node.depthwise.weight[0, 0, 1, 1] = 2.0
            node.pointwise[0].weight.fill_(5.0)
            node.pointwise[1].eps = 0.0
    c4 = torch.tensor([[[[4.0, -8.0], [0.0, 20.0]]]])
    levels = neck({"C4": c4, "C5": torch.tensor([[[[2.0]]]])})
    # P4 = 2 · 5 · relu6((C4 + 3 · 2) / 4.0001): sums are 10, -2, 6 and 26, the last is cut off at 6
    expected = [100 / 4.0001, 0.0, 60 / 4.0001, 60.0]
    assert levels["P4"].flatten().tolist() == pytest.approx(expected, rel=1e-6)
    # P5: the negative weight of C5 is 0: 10 · relu6(2 · max(P4) / 2.0001), and 60 is cut off
    assert levels["P5"].item() == pytest.approx(60.0, rel=1e-6)


@pytest.mark.parametrize(("channels", "cells"), [(8, 3), (64, 3), (87, 3), (88, 4), (160, 6), (384, 8), (1000, 8)])
def test_the_number_of_cells_is_the_published_one(channels: int, cells: int) -> None:
    assert cells_for_width(channels) == cells
    assert len(BiFPN(CHANNELS, channels).cells) == cells


@pytest.mark.parametrize("levels", [("P3",), ("P5",), ("P4", "P7"), ("P6",)], ids=str)
def test_what_no_level_needs_is_not_computed(levels: tuple[str, ...]) -> None:
    neck = BiFPN(CHANNELS, 16).eval()
    neck.initialize(0)
    ran: list[str] = []
    for name, module in neck.named_modules():
        if name.endswith("depthwise"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    taps = taps_of(64, 96)
    with torch.no_grad():
        some = neck(taps, levels)
        assert len(ran) == 8 + 8 + 4 + int(levels[-1][1]) - 3, ran
        every = neck(taps)
    assert list(some) == list(levels)
    assert all(torch.equal(some[level], every[level]) for level in levels)


def test_levels_without_a_choice_are_those_of_the_paper() -> None:
    model = create_model("mobilenet_v2", weights="random", pyramid="bifpn")
    assert model.levels == ("P3", "P4", "P5", "P6", "P7")
    assert model.shapes((225, 301))["P7"] == (64, 2, 3)
    fine = create_model("mobilenet_v2", weights="random", pyramid="bifpn", levels="P2-P4")
    assert fine.identity()["first_level"] == "P2"
    assert fine.shapes((64, 64)) == {"P2": (64, 16, 16), "P3": (64, 8, 8), "P4": (64, 4, 4)}


def test_a_block_is_the_same_whichever_channels_other_taps_have() -> None:
    one, other = BiFPN(CHANNELS, 16), BiFPN({**CHANNELS, 5: 64}, 16)
    one.initialize(3)
    other.initialize(3)
    assert torch.equal(
        one.cells[0].top_down[0].projections[0][0].weight, other.cells[0].top_down[0].projections[0][0].weight
    )
    assert torch.equal(one.cells[2].bottom_up[3].depthwise.weight, other.cells[2].bottom_up[3].depthwise.weight)


@pytest.mark.parametrize("levels", [None, "P2-P4", "C4,P4,P7"])
def test_the_executed_form_gives_the_same(levels: str | None) -> None:
    model = create_model("mobilenet_v2", weights="random", levels=levels, channels=32, pyramid="bifpn")
    randomise(model.fpn)
    fused = check_executed_form(model, ((64, 96), (97, 131)))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.neck.modules()), "norms are folded"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("channels", [16, 320])
def test_saved_weights_are_read_back(tmp_path: Path, suffix: str, channels: int) -> None:
    # mnasnet1_0 gives 320 channels at C5: there is no 1×1 for it then.
    model = create_model("mnasnet1_0", weights="random", channels=channels, pyramid="bifpn", levels="P3-P6")
    randomise(model)
    path = tmp_path / f"bifpn{suffix}"
    save_weights(model, path)
    again = create_model(weights=str(path))
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = again(images), model(images)
    assert list(found) == list(expected) == ["P3", "P4", "P5", "P6"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again.fpn.identity() == model.fpn.identity()
    with pytest.raises(FpnxError, match=r"pyramid fpn contradicts bifpn.* which has bifpn"):
        create_model(weights=str(path), pyramid="fpn")
    with pytest.raises(FpnxError, match="top block c5 is for fpn and pafpn, it has a bifpn"):
        create_model(weights=str(path), top_block="c5")
    with pytest.raises(FpnxError, match="has no level P2: it has C2, C3, C4, C5, P3"):
        create_model(weights=str(path), levels="P2")


def test_settings_that_parameters_do_not_show_are_read_back(tmp_path: Path) -> None:
    model = create_model("mobilenet_v2", weights="random", pyramid="bifpn")
    taps = model.fpn.in_channels
    model.fpn = BiFPN(
        taps, 64, 2, activation="relu6", padding="same", resampling="bilinear", weighted=False, bias=True
    ).eval()
    save_weights(model, tmp_path / "w.pth")
    again = create_model(weights=str(tmp_path / "w.pth"))
    assert again.fpn.identity() == model.fpn.identity()
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    torch.save({**content, "fpnx": content["fpnx"].replace('"same"', '"none"')}, tmp_path / "w.pth")
    with pytest.raises(FpnxError, match="its description has padding none, which fpnx never wrote"):
        create_model(weights=str(tmp_path / "w.pth"))


def test_a_damaged_file_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "bifpn.pth"
    save_weights(create_model("mobilenet_v2", weights="random", channels=8, pyramid="bifpn"), path)
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["fpn.cells.1.top_down.2.weights"]
    torch.save(content, path)
    with pytest.raises(FpnxError, match=r"1 missing \(fpn.cells.1.top_down.2.weights\)"):
        create_model(weights=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_block": "pool"}, "top block pool is for fpn and pafpn, a bifpn pools its P6 and P7"),
        ({"backbone": "squeezenet1_1"}, "squeezenet1_1 has no level P5: the network has no map at stride 32"),
    ],
)
def test_wrong_requests(options: dict[str, str], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        build_model(ExtractConfig(**{"backbone": "mobilenet_v2", "weights": "random", "pyramid": "bifpn", **options}))


def test_from_images_to_a_file(fpnx: Callable[..., tuple[int, str, str]], photos: Path) -> None:
    assert fpnx("extract", photos, *TINY, "-o", "bifpn.h5")[0] == 0
    code, _, err = fpnx("extract", photos, *TINY[:-1], "fpn", "--levels", "P3-P7", "-o", "bifpn.h5", "--resume")
    assert code == 2
    assert "pyramid bifpn → fpn" in err
    assert fpnx("extract", photos, *TINY, "-o", "bifpn.h5", "--resume")[0] == 0
    assert fpnx("verify", "bifpn.h5", "--against", photos)[0] == 0
    assert "P7, bifpn, untrained (random, seed 0)" in fpnx("info", "bifpn.h5")[1]
    info = document(fpnx("info", "bifpn.h5", "--json")[1])
    assert info["config"]["pyramid"] == "bifpn"
    assert info["config"]["cells"] == 3
