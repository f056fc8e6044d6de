"""Networks whose maps have one stride: taps equal to timm's own, sizes, blocks, files, weights and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import fpnx
from fpnx import FpnxError
from fpnx.core.config import ExtractConfig
from fpnx.inference.engine import Engine
from fpnx.models.backbones.factory import detect_stages
from fpnx.models.factory import build_model
from tests.helpers.files import noise_image

timm: Any = pytest.importorskip("timm")

Command = Callable[..., tuple[int, str, str]]
TINY = "timm/vit_tiny_patch16_224"
PATCH_14 = "timm/eva02_tiny_patch14_224"


def drawn(module: Any) -> Any:
    """The module, with all parameters drawn, also those that begin as zeros and ones."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def loaded(ours: fpnx.PyramidModel, theirs: Any) -> fpnx.PyramidModel:
    state = theirs.state_dict()
    own = {name: state[name] for name in ours.body.state_dict()}
    ours.body.load_state_dict(own)
    return ours


@pytest.mark.parametrize(
    ("name", "stride", "size", "blocks"),
    [
        ("vit_tiny_patch16_224", 16, (224, 224), None),
        ("vit_tiny_patch16_224", 16, (96, 176), "2,-3"),
        ("deit_tiny_distilled_patch16_224", 16, (112, 64), None),
        ("eva02_tiny_patch14_224", 14, (70, 126), "2,-3"),
        ("vit_small_patch14_reg4_dinov2", 14, (56, 84), None),
        ("vit_small_patch16_dinov3", 16, (64, 96), "2,-3"),
        ("vit_small_patch32_224", 32, (96, 160), None),
        ("xcit_nano_12_p8_224", 8, (48, 64), None),
    ],
)
def test_taps_are_those_of_timm(name: str, stride: int, size: tuple[int, int], blocks: str | None) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = fpnx.create_model(f"timm/{name}", weights="random", blocks=blocks)
    options = {} if name.startswith("xcit") else {"dynamic_img_size": True}
    theirs = drawn(timm.create_model(name, **options))
    loaded(model, theirs)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    indices = [len(theirs.blocks) - 1] if blocks is None else [2, len(theirs.blocks) - 3]
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, indices=indices, intermediates_only=True, output_fmt="NCHW")
        ours = model(images)
    (tap,) = ours
    assert model.stride(tap) == stride
    assert ours[tap].shape[2:] == (size[0] // stride, size[1] // stride)
    assert tuple(ours[tap].shape[1:]) == model.shapes(size)[tap]
    assert (ours[tap] - torch.cat(expected, 1)).abs().max() <= 1e-5 * ours[tap].abs().max()
    assert model.blocks == tuple(indices)


def test_features_only_gives_the_same() -> None:
    model = fpnx.create_model(TINY, weights="random", blocks="5,11")
    theirs = timm.create_model(TINY[5:], features_only=True, out_indices=[5, 11]).eval()
    theirs.model.load_state_dict(model.body.state_dict())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model(images)["C4"], torch.cat(theirs(images), 1))


def test_the_default_is_the_last_block_as_a_raw_tap() -> None:
    model = fpnx.create_model(TINY, weights="random")
    assert (model.levels, model.blocks, model.one_stride) == (("C4",), (11,), 16)
    assert model.channels == {"C4": 192}
    assert list(model.fpn.state_dict()) == []
    assert model.weights.fpn.source == "no parameters"
    assert not any(name.startswith(("head", "norm.")) for name in model.body.state_dict())
    shallow = fpnx.create_model(TINY, weights="random", blocks=3)
    assert "blocks.3.norm1.weight" in shallow.body.state_dict()
    assert "blocks.4.norm1.weight" not in shallow.body.state_dict()
    for name, value in shallow.body.state_dict().items():  # drawn from the same seed
        assert torch.equal(value, model.body.state_dict()[name])


def test_blocks_are_part_of_the_identity_where_there_are_any() -> None:
    identity = fpnx.create_model(TINY, weights="random", blocks="-1,2").identity()
    assert (identity["blocks"], identity["pyramid"]) == ([2, 11], "none")
    assert fpnx.create_model(TINY, weights="random", blocks="2,11").identity() == identity
    assert "blocks" not in fpnx.create_model("resnet18", weights="random").identity()


@pytest.mark.parametrize("name", [TINY, PATCH_14])
def test_reduced_precision_is_near(name: str) -> None:
    config = ExtractConfig(backbone=name, weights="random", precision="bfloat16", size=(224, 224))
    model = build_model(config)
    drawn(model)
    pixels = [np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)]
    recipe = model.recipe.sized(config)
    engine = Engine(model, recipe, config, torch.device("cpu"))
    found = engine(pixels).arrays["C4"][0]
    images = recipe.normalise(torch.from_numpy(np.stack(pixels)))
    with torch.no_grad():
        exact = model(images)["C4"][0].numpy()
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < 0.03, error


def test_a_run_from_end_to_end(fpnx_run: Any, tmp_path: Path) -> None:
    photos, command = fpnx_run
    out = tmp_path / "out.h5"
    options = ("--backbone", PATCH_14, "--weights", "random", "--size", "70x98", "--blocks", "-1,3")
    code, _, err = command("extract", photos, "-o", out, *options)
    assert code == 0, err
    with h5py.File(out) as file:
        assert file["C4"].shape == (3, 384, 5, 7)
        assert file["C4"].attrs["stride"] == 14
    with fpnx.open(out) as store:
        item = store["1.png"]
        assert item.stride("C4") == 14
        # The input is 70×98, the source 56×84: a cell of 14 input pixels covers 14·56/70 by 14·84/98 of them.
        assert item.box("C4", 1, 2) == pytest.approx((2 * 12, 11.2, 3 * 12, 22.4))
        model = fpnx.create_model(PATCH_14, weights="random", blocks="3,11", size=(70, 98))
        expected = model.features(photos / "1.png")["C4"].numpy()
        assert np.abs(item["C4"] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert command("verify", out)[0] == 0
    assert command("verify", out, "--against", photos)[0] == 0
    assert command("extract", photos, "-o", out, *options, "--resume")[0] == 0
    code, _, err = command("extract", photos, "-o", out, *options[:-1], "11", "--resume")
    assert (code, "blocks" in err) == (2, True), err
    code, _, err = command("visualize", out, "-o", tmp_path / "pictures")
    assert code == 0, err


def test_native_sizes_that_are_no_multiple_fail_one_by_one(fpnx_run: Any, tmp_path: Path) -> None:
    photos, command = fpnx_run
    out = tmp_path / "out.h5"
    code, text, _ = command(
        "extract", photos, "-o", out, "--backbone", PATCH_14, "--weights", "random", "--size", "native"
    )
    assert code == 1
    assert f"0.png: {PATCH_14} cannot take an input of 60×80: its sides are multiples of 14: the nearest size" in text
    with fpnx.open(out) as store:
        assert store["1.png"]["C4"].shape == (192, 4, 6)
        assert "multiples of 14" in store.error(0)


def test_an_image_pyramid_has_true_strides(fpnx_run: Any, tmp_path: Path) -> None:
    photos, command = fpnx_run
    out = tmp_path / "out.h5"
    code, _, err = command(
        *("extract", photos, "-o", out, "--backbone", PATCH_14, "--weights", "random", "--size", "56x84"),
        *("--pyramid", "image", "--levels", "P3-P5"),
    )
    assert code == 0, err
    with fpnx.open(out) as store:
        item = store["1.png"]
        assert [item.stride(level) for level in store.levels] == [7, 14, 28]
        assert [item[level].shape[1:] for level in store.levels] == [(8, 12), (4, 6), (2, 3)]
        with Image.open(photos / "1.png") as picture:
            larger = picture.resize((168, 112), Image.Resampling.BICUBIC)
        model = fpnx.create_model(PATCH_14, weights="random", size=(112, 168))
        expected = model.features(larger)["C4"].numpy()
        assert np.abs(item["P3"] - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture
def fpnx_run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Command]:
    """Three photographs, 60×80, 56×84 and 100×64, and the command."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(60, 80), (56, 84), (100, 64)]):
        noise_image(i, size[::-1]).save(folder / f"{i}.png")
    return folder, request.getfixturevalue("fpnx")


# weights


def test_saved_weights_are_read_back(tmp_path: Path) -> None:
    model = drawn(fpnx.create_model(TINY, weights="random", blocks="1,4"))
    fpnx.save_weights(model, tmp_path / "own.safetensors", trained="body")
    again = fpnx.create_model(weights=str(tmp_path / "own.safetensors"))
    assert (again.backbone, again.blocks, again.levels) == (TINY, (1, 4), ("C4",))
    assert again.weights.body.trained is True
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(again(images)["C4"], model(images)["C4"])
    assert fpnx.create_model(weights=str(tmp_path / "own.safetensors"), blocks=1).channels == {"C4": 192}
    with pytest.raises(FpnxError, match=r"does not fit timm/vit_tiny.*missing \(body\.blocks\.5"):
        fpnx.create_model(weights=str(tmp_path / "own.safetensors"), blocks=6)


@pytest.mark.parametrize("prefix", ["", "module.encoder."])
def test_a_file_in_timms_layout(prefix: str, tmp_path: Path) -> None:
    theirs = drawn(timm.create_model(TINY[5:], dynamic_img_size=True))
    torch.save({f"{prefix}{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "own.pth")
    images = torch.randn(1, 3, 64, 96)
    for blocks in (None, 4):
        model = fpnx.create_model(TINY, weights=str(tmp_path / "own.pth"), blocks=blocks)
        with torch.no_grad():
            (expected,) = theirs.forward_intermediates(images, indices=[blocks or 11], intermediates_only=True)
            assert torch.equal(model(images)["C4"], expected)
    with pytest.raises(FpnxError, match="are not those of"):
        fpnx.create_model(PATCH_14, weights=str(tmp_path / "own.pth"))


def test_a_file_of_another_image_size_is_resized_as_timm_does_it(tmp_path: Path) -> None:
    larger = drawn(timm.create_model("vit_tiny_patch16_384", dynamic_img_size=True))
    torch.save(larger.state_dict(), tmp_path / "own.pth")
    model = fpnx.create_model(TINY, weights=str(tmp_path / "own.pth"))
    theirs = timm.create_model(TINY[5:], dynamic_img_size=True).eval()
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(larger.state_dict(), theirs)
    theirs.load_state_dict(filtered)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        (expected,) = theirs.forward_intermediates(images, indices=[11], intermediates_only=True)
        assert torch.equal(model(images)["C4"], expected)


def test_published_weights_from_a_copied_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    from fpnx.models.weights.timm import timm_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "vit_small_patch14_dinov2"
    published = timm_weights(f"timm/{name}")[0]
    theirs = drawn(timm.create_model(name, dynamic_img_size=True))
    published.file.parent.mkdir(parents=True)
    safetensors.torch.save_file(theirs.state_dict(), published.file)
    model = fpnx.create_model(f"timm/{name}", offline=True)
    images = torch.randn(1, 3, 56, 84)
    with torch.no_grad():
        (expected,) = theirs.forward_intermediates(images, indices=[11], intermediates_only=True)
        assert torch.equal(model(images)["C4"], expected)
    assert (model.weights.body.trained, model.weights.body.source) == (True, published.name)
    assert (model.recipe.height, model.recipe.width) == (518, 518)


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pyramid": "fpn"}, r"pyramid fpn on .*vit_tiny.*: fpn merges maps of several strides, .* take --levels C4"),
        ({"pyramid": "pafpn"}, "pyramid pafpn on .*: pafpn merges maps of several strides"),
        ({"levels": "P2-P5"}, r"level P2 on .* all of its maps have stride 16: take --levels C4.* or --pyramid image"),
        ({"channels": 64}, "channels 64 on .* take --levels C4"),
        ({"levels": "C5"}, "has no level C5: it gives C4"),
        ({"pyramid": "image", "tap": "C5"}, "has no tap C5: it gives C4"),
        ({"blocks": 12}, r"has no block 12: it has 12, from 0 to 11, or from -1 \(the last\) to -12"),
        ({"blocks": "-13"}, "has no block -13"),
        ({"blocks": "3,-9"}, "block 3 is named twice in blocks 3,-9"),
        ({"blocks": "last"}, "block 'last': take numbers such as 11, -1 or 5,8,11"),
        ({"blocks": ""}, "block '': take numbers"),
        ({"blocks": []}, "block '': take numbers"),
        ({"backbone": "resnet18", "blocks": 2}, "blocks 2 are for networks with maps of one stride, .*resnet18 has"),
        ({"backbone": PATCH_14, "pyramid": "image", "levels": "P2"}, "of stride 14 has no P2: .* take P3, P4, P5"),
        ({"backbone": "vit_b_16"}, "vit_b_16 has maps at stride 16 only.*such as timm/vit_base_patch16_224"),
        ({"backbone": "timm/gmixer_12_224"}, "has maps at stride 16 only"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FpnxError, match=message) as error:
        fpnx.create_model(**{"backbone": TINY, "weights": "random", **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, (480, 650), "cannot take an input of 480×650: its sides are multiples of 16: the nearest size is 480×656"),
        ({"backbone": PATCH_14}, (480, 640), "multiples of 14: the nearest size is 476×644"),
        ({}, (5, 16), "the nearest size is 16×16"),
        ({"pyramid": "image", "levels": "P3-P5"}, (48, 64), "multiples of 32: the nearest size is 64×64"),
    ],
)
def test_sizes_are_multiples_of_the_patch(options: dict[str, Any], size: tuple[int, int], message: str) -> None:
    model = fpnx.create_model(**{"backbone": TINY, "weights": "random", **options})
    with pytest.raises(FpnxError, match=message):
        model.shapes(size)


def test_detection_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = detect_stages(TINY)
    assert found.stages is not None
    assert (found.stages.stride, found.stages.blocks, found.stages.taps[4].node) == (16, 12, "blocks.11")
    from fpnx.models.backbones import factory

    monkeypatch.setattr(factory, "_detections", {})
    assert factory.cached_detection(TINY) == found
