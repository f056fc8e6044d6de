"""PAFPN and the interface of necks: an independent reference, hand-worked numbers, files and a run from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fpnx import FpnxError, create_model, save_weights
from fpnx.core.config import PYRAMIDS, ExtractConfig
from fpnx.models.factory import build_model
from fpnx.models.necks.base import neck_shapes
from fpnx.models.necks.pafpn import PAFPN
from fpnx.models.necks.registry import NECKS
from tests.helpers.necks import assert_levels_equal, check_executed_form, random_taps
from tests.helpers.process import document
from tests.helpers.reference_networks import MMPAFPN, randomise

CHANNELS = {2: 3, 3: 5, 4: 7, 5: 11}
TINY = ["--weights", "random", "--backbone", "mobilenet_v2", "--size", "64", "--channels", "8"]


def in_reference_names(state: dict[str, Tensor], laterals: int) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        kind, place, *rest = name.split(".")
        if kind == "extra_blocks":
            renamed[f"fpn_convs.{laterals + int(place[1]) - 6}.conv.{rest[0]}"] = value
        else:
            names = {"inner_blocks": "lateral", "layer_blocks": "fpn", "downsample_blocks": "downsample"}
            renamed[f"{names.get(kind, 'pafpn')}_convs.{place}.conv.{rest[1]}"] = value
    return renamed


EXTRA = {None: (4, ""), "pool": (5, ""), "c5": (6, "on_input"), "p5": (6, "on_output"), "m5": (6, "on_lateral")}


@pytest.mark.parametrize("size", [(56, 56), (57, 76), (25, 33), (9, 8)], ids=str)
@pytest.mark.parametrize("p7_relu", [True, False])
@pytest.mark.parametrize("top_block", EXTRA, ids=str)
def test_equals_an_independent_reference(size: tuple[int, int], top_block: str | None, p7_relu: bool) -> None:
    neck = randomise(PAFPN(CHANNELS, 6, top_block, p7_relu=p7_relu))
    outs, extra = EXTRA[top_block]
    names = {"start_level": 0, "num_outs": outs, "add_extra_convs": extra, "relu_before_extra_convs": p7_relu}
    reference = MMPAFPN(**names, channels=6, inputs=tuple(CHANNELS.values()))
    reference.load_state_dict(in_reference_names(neck.state_dict(), 4))
    taps = random_taps(CHANNELS, *size)
    with torch.no_grad():
        levels, expected = neck(taps), reference(list(taps.values()))
    assert list(levels) == [f"P{k}" for k in range(2, 2 + outs)]
    assert_levels_equal(levels.values(), expected)


def test_two_levels_by_hand() -> None:
    neck = PAFPN({4: 1, 5: 1}, channels=1)
    with torch.no_grad():
        for convolution in (module for module in neck.modules() if isinstance(module, nn.Conv2d)):
            convolution.weight.zero_()
            convolution.bias.zero_()
        # Every 3×3 takes its middle cell: laterals 1 and 2, outputs 3 and 5, downsampling 10, last convolution 7.
        for block, factor in (
            (neck.inner_blocks[0], 1), (neck.inner_blocks[1], 2), (neck.layer_blocks[0], 3), (neck.layer_blocks[1], 5),
            (neck.downsample_blocks[0], 10), (neck.pafpn_blocks[0], 7),
        ):  # fmt: skip
            middle = block[0].kernel_size[0] // 2
            block[0].weight[0, 0, middle, middle] = factor
    levels = neck({"C4": torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), "C5": torch.tensor([[[[1.0]]]])})
    # M5 = 2, M4 = C4 + 2 = [[3 4] [5 6]]; P4 = S4 = 3 M4; N5 = 5 M5 + 10 S4[0, 0] = 10 + 90; P5 = 7 N5
    assert levels["P4"].tolist() == [[[[9.0, 12.0], [15.0, 18.0]]]]
    assert levels["P5"].tolist() == [[[[700.0]]]]


# Convolutions that have to run: laterals, outputs, downsampling, last convolutions, top block.
NEEDED = [
    (("P2",), {"c5": 4 + 1, "p5": 4 + 1, "m5": 4 + 1}),
    (("P5",), dict.fromkeys(("c5", "p5", "m5"), 4 + 4 + 3 + 1)),
    (("P3", "P5"), dict.fromkeys(("c5", "p5", "m5"), 4 + 4 + 3 + 2)),
    (("P6",), {"c5": 1, "p5": 4 + 4 + 3 + 1 + 1, "m5": 1 + 1}),
    (("P7",), {"c5": 2, "p5": 4 + 4 + 3 + 1 + 2, "m5": 1 + 2}),
    (("P4", "P6"), {"c5": 4 + 3 + 2 + 1 + 1, "p5": 4 + 4 + 3 + 2 + 1, "m5": 4 + 3 + 2 + 1 + 1}),
]


@pytest.mark.parametrize(("levels", "convolutions"), NEEDED, ids=str)
@pytest.mark.parametrize("top_block", ["c5", "p5", "m5"])
def test_what_no_level_needs_is_not_computed(
    levels: tuple[str, ...], convolutions: dict[str, int], top_block: str
) -> None:
    neck = PAFPN(CHANNELS, 4, top_block)
    neck.initialize(seed=0)
    ran: list[str] = []
    for name, module in neck.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        some = neck(random_taps(CHANNELS, 32, 40), levels)
        assert len(ran) == convolutions[top_block], ran
        every = neck(random_taps(CHANNELS, 32, 40))
    assert list(some) == list(levels)
    assert all(torch.equal(some[level], every[level]) for level in levels)


def test_the_registry_has_the_kinds_that_the_option_takes() -> None:
    assert tuple(NECKS) == PYRAMIDS
    assert all(neck.kind == name for name, neck in NECKS.items())


@pytest.mark.parametrize("kind", [kind for kind, neck in NECKS.items() if not neck.accepts_single_stride])
def test_every_neck_keeps_the_interface(kind: str) -> None:
    neck = NECKS[kind].for_levels(CHANNELS, 4, ("P3", "P7"), None)
    assert neck.in_channels.items() <= CHANNELS.items()
    assert {"P3", "P7"} <= set(neck.levels)
    taps = random_taps(CHANNELS, 57, 70)
    with torch.no_grad():
        levels = neck.eval()(taps)
    shapes = {name: tuple(tap.shape[1:]) for name, tap in taps.items()}
    assert neck_shapes(neck, shapes, neck.levels) == {name: tuple(level.shape[1:]) for name, level in levels.items()}
    counted = [id(p) for modules in neck.parts().values() for module in modules for p in module.parameters()]
    assert sorted(counted) == sorted(map(id, neck.parameters())), "each parameter belongs to one part"
    first, again, other = (NECKS[kind].for_levels(CHANNELS, 4, ("P3", "P7"), None) for _ in range(3))
    torch.rand(5)
    state = torch.get_rng_state()
    first.initialize(3)
    again.initialize(3)
    other.initialize(4)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was used"
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    for one, two, three in pairs:
        assert torch.equal(one, two)
        assert not one.any() or not torch.equal(one, three) or one.ndim == 1, "weights of norms and fusions are 1"
    weights = [p for p in first.parameters() if p.ndim == 4 and p.shape[2] == 3]
    assert len({p.flatten()[0].item() for p in weights}) == len(weights), "two blocks have the same parameters"


@pytest.mark.parametrize("levels", ["P2-P5", "P3-P7", "C4,P4", "P2-P6"])
def test_the_executed_form_gives_the_same(levels: str) -> None:
    model = create_model("mobilenet_v2", weights="random", levels=levels, channels=32, pyramid="pafpn")
    randomise(model.fpn)
    check_executed_form(model, ((64, 96), (97, 131)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_saved_weights_are_read_back(tmp_path: Path, suffix: str) -> None:
    model = create_model("mobilenet_v2", weights="random", levels="P3-P7", channels=16, pyramid="pafpn")
    randomise(model)
    save_weights(model, tmp_path / f"pafpn{suffix}")
    again = create_model(weights=str(tmp_path / f"pafpn{suffix}"))
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    assert again.fpn.kind == "pafpn"
    with torch.no_grad():
        found, expected = again(images), model(images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(FpnxError, match=r"pyramid fpn contradicts pafpn.* which has pafpn"):
        create_model(weights=str(tmp_path / f"pafpn{suffix}"), pyramid="fpn")


def test_a_damaged_pafpn_file_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "pafpn.pth"
    save_weights(create_model("mobilenet_v2", weights="random", channels=8, pyramid="pafpn"), path)
    content = torch.load(path, weights_only=True)
    state = dict(content["state_dict"])
    del content["state_dict"]["fpn.pafpn_blocks.0.0.weight"]
    torch.save(content, path)
    with pytest.raises(FpnxError, match=r"1 missing \(fpn.pafpn_blocks.0.0.weight\)"):
        create_model(weights=str(path))
    content = {"fpnx": content["fpnx"].replace('"pafpn"', '"hourglass"'), "state_dict": state}
    torch.save(content, path)
    with pytest.raises(FpnxError, match="its description has pyramid hourglass"):
        create_model(weights=str(path))


def test_an_fpn_s_fingerprint_does_not_name_the_kind() -> None:
    options: dict[str, Any] = {"backbone": "mobilenet_v2", "weights": "random", "channels": 8}
    plain, named, other = (build_model(ExtractConfig(**options, pyramid=kind)) for kind in (None, "fpn", "pafpn"))
    assert plain.identity() == named.identity()
    assert "pyramid" not in plain.identity()
    assert other.identity() == {**plain.identity(), "pyramid": "pafpn"}


@pytest.mark.parametrize("kind", [kind for kind in PYRAMIDS if kind != "fpn"])
def test_the_default_weights_of_other_kinds_are_those_of_imagenet(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FpnxError, match=r"weights ResNet50_Weights.IMAGENET1K_V2 cannot be had"):
        create_model(pyramid=kind, offline=True)
    for pyramid in (None, "fpn"):
        with pytest.raises(FpnxError, match=r"weights MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1 cannot be had"):
            create_model(pyramid=pyramid, offline=True)


def test_from_images_to_a_file(fpnx: Callable[..., tuple[int, str, str]], photos: Path) -> None:
    assert fpnx("extract", photos, *TINY, "--pyramid", "pafpn", "-o", "pafpn.h5")[0] == 0
    assert fpnx("extract", photos, *TINY, "-o", "fpn.h5")[0] == 0
    code, _, err = fpnx("extract", photos, *TINY, "--pyramid", "pafpn", "-o", "fpn.h5", "--resume")
    assert code == 2
    assert "was made with another config" in err
    assert "pyramid fpn → pafpn" in err
    code, _, err = fpnx("extract", photos, *TINY, "-o", "pafpn.h5", "--resume")
    assert code == 2
    assert "pyramid pafpn → fpn" in err
    assert fpnx("verify", "pafpn.h5", "--against", photos)[0] == 0
    assert "P5, pafpn, untrained (random, seed 0)" in fpnx("info", "pafpn.h5")[1]
    assert "pafpn" not in fpnx("info", "fpn.h5")[1]
    info = document(fpnx("info", "pafpn.h5", "--json")[1])
    assert info["config"]["pyramid"] == "pafpn"
    model = create_model("mobilenet_v2", weights="random", channels=8, size=64, pyramid="pafpn")
    from PIL import Image

    with h5py.File("pafpn.h5") as file, torch.no_grad():
        name = file["images/path"].asstr()[0]
        expected = model(model.transform(Image.open(photos / name).convert("RGB"))[None])
        for level, values in expected.items():
            stored = file[level][0]
            assert np.abs(stored - values[0].numpy()).max() <= 1e-5 * np.abs(stored).max()
        with h5py.File("fpn.h5") as plain:
            assert file["P5"].shape == plain["P5"].shape
            assert not np.allclose(file["P5"][0], plain["P5"][0])
