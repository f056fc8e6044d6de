"""The featurised image pyramid: levels against the backbone run by hand, alignment, sizes, limits, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fpnx
from fpnx.models.preprocessing import Recipe
from tests.helpers.files import noise_image

IMAGE = {"backbone": "mobilenet_v2", "weights": "random", "pyramid": "image"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def by_hand(
    backbone: fpnx.PyramidModel, picture: Image.Image, size: tuple[int, int], padded: tuple[int, int]
) -> np.ndarray:
    """The tap of a picture resized to `size` and padded with zeros to `padded`, (height, width)."""
    pixels = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR), np.float32) / 255
    image = np.zeros((1, 3, *padded), np.float32)
    image[0, :, : size[0], : size[1]] = ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)
    with torch.no_grad():
        (tap,) = backbone(torch.from_numpy(image)).values()
    return tap[0].numpy()


@pytest.mark.parametrize("tap", ["C4", "C5"])
def test_levels_are_the_tap_of_the_scaled_photograph(photos: Path, tmp_path: Path, tap: str) -> None:
    number = int(tap[1])
    levels = [f"P{k}" for k in range(number - 2, number + 2)]
    fpnx.extract(photos, tmp_path / "out.h5", **IMAGE, tap=tap, levels=levels, size=(64, 97))
    backbone = fpnx.create_model("mobilenet_v2", weights="random", levels=tap)
    fpn = fpnx.create_model("mobilenet_v2", weights="random", levels="P2-P6").shapes((64, 97))
    with fpnx.open(tmp_path / "out.h5") as store:
        assert (store.pyramid, store.levels) == ("image", tuple(levels))
        assert len(list(store)) == 6
        for item in store:
            with Image.open(photos / item.path) as picture:
                rgb = picture.convert("RGB")
            for level in levels:
                factor = 2.0 ** (number - int(level[1]))
                size = (int(64 * factor), int(np.ceil(97 * factor)))
                expected = by_hand(backbone, rgb, size, size)
                assert item[level].shape == expected.shape == (backbone.channels[tap], *fpn[level][1:])
                assert np.abs(item[level] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_padding_is_that_of_the_input_at_every_scale(photos: Path, tmp_path: Path) -> None:
    recipe = Recipe(sizing="aspect", short_side=60, pad_multiple=32)
    model = fpnx.create_model(**IMAGE, levels="P4-P6")
    model.recipe = recipe
    fpnx.extract(photos / "a.jpg", tmp_path / "out.h5", backbone=model)
    backbone = fpnx.create_model("mobilenet_v2", weights="random", levels="C5")
    with fpnx.open(tmp_path / "out.h5") as store, Image.open(photos / "a.jpg") as picture:
        item = store[0]
        assert (item.input_size, store.padded_sizes[0]) == ((60, 90), (64, 96))
        for level, size, padded in (
            ("P4", (120, 180), (128, 192)),
            ("P5", (60, 90), (64, 96)),
            ("P6", (30, 45), (32, 48)),
        ):
            expected = by_hand(backbone, picture.convert("RGB"), size, padded)
            assert item[level].shape == expected.shape
            assert np.abs(item[level] - expected).max() <= 1e-5 * np.abs(expected).max()
        assert [item.valid(level) for level in store.levels] == [(4, 6), (2, 3), (1, 2)]


def test_features_and_transform_and_forward_agree_with_extract(photos: Path, tmp_path: Path) -> None:
    model = fpnx.create_model(**IMAGE, size=64)
    fpnx.extract(photos, tmp_path / "out.h5", backbone=model)
    inputs = model.transform(photos / "a.jpg")
    assert {name: tuple(image.shape) for name, image in inputs.items()} == {
        "P3": (3, 256, 256), "P4": (3, 128, 128), "P5": (3, 64, 64)
    }  # fmt: skip
    with fpnx.open(tmp_path / "out.h5") as store, torch.no_grad():
        forward = model({name: image[None] for name, image in inputs.items()})
        for level, values in model.features(photos / "a.jpg").items():
            stored = store["a.jpg"][level]
            assert torch.equal(forward[level][0], values)
            assert np.abs(values.numpy() - stored).max() <= 1e-5 * np.abs(stored).max()
        enlarged = model(inputs["P5"][None])
    assert {name: level.shape for name, level in enlarged.items()} == {
        name: level.shape for name, level in forward.items()
    }
    assert torch.equal(enlarged["P5"], forward["P5"])
    difference = (enlarged["P3"] - forward["P3"]).abs().max() / forward["P3"].abs().max()
    assert difference > 0.01  # the photograph has more detail than its small copy


def averaging_network() -> nn.Module:
    """Five stages, each the mean of 2×2 values and of all channels: C5 is the mean of 32×32 pixels."""
    stages = [nn.Conv2d(a, b, 2, 2, bias=False) for a, b in zip((3, 4, 4, 4, 4), (4, 4, 4, 4, 4), strict=True)]
    for stage in stages:
        nn.init.constant_(stage.weight, 1 / (4 * stage.in_channels))
    return nn.Sequential(*stages)


@pytest.mark.parametrize("place", [(40, 24), (136, 200), (8, 248)])
def test_a_bright_square_lies_where_it_is_at_every_level(tmp_path: Path, place: tuple[int, int]) -> None:
    y, x = place
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[y - 8 : y + 8, x - 8 : x + 8] = 255
    Image.fromarray(pixels).save(tmp_path / "square.png")
    fpnx.extract(
        tmp_path / "square.png",
        tmp_path / "out.h5",
        backbone=averaging_network(),
        pyramid="image",
        size=256,
        levels="P3-P6",
    )
    with fpnx.open(tmp_path / "out.h5") as store:
        for level in store.levels:
            heat = store[0][level].mean(axis=0)
            left, top, right, bottom = store[0].box(level, *np.unravel_index(heat.argmax(), heat.shape))
            assert left <= x <= right
            assert top <= y <= bottom


def test_channels_of_the_averaging_network_by_hand(tmp_path: Path) -> None:
    """P4 of an image that is white on the left: means of 16×16 pixels of the input, 1 or 0 before normalisation."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    fpnx.extract(
        tmp_path / "half.png",
        tmp_path / "out.h5",
        backbone=averaging_network(),
        pyramid="image",
        size=64,
        levels="P4,P5",
    )
    white, black = (float(np.mean([(v - m) / s for m, s in zip(MEAN, STD, strict=True)])) for v in (1, 0))
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store[0]["P5"].shape == (4, 2, 2)
        assert np.allclose(store[0]["P5"], [[white, black]] * 2, rtol=1e-5)
        # at twice the size the middle of the edge is interpolated, so only cells away from it are exact
        assert np.allclose(store[0]["P4"][:, :, (0, 3)], [[white, black]] * 4, rtol=1e-5)


def test_runs_on_images_of_many_sizes_and_resumes(photos: Path, tmp_path: Path) -> None:
    options = {**IMAGE, "short_side": 40, "levels": "P4,P5"}
    noise_image(9, (200, 90)).save(photos / "large.png")
    result = fpnx.extract(photos, tmp_path / "out.h5", **options)
    assert (result.done, result.exit_code) == (7, 0)
    assert fpnx.verify(tmp_path / "out.h5", against=photos).problems == ()
    assert fpnx.extract(photos, tmp_path / "out.h5", **options, resume=True).computed == 0
    with pytest.raises(fpnx.FpnxError, match="tap C5 → C4"):
        fpnx.extract(photos, tmp_path / "out.h5", **options, tap="C4", resume=True)
    with h5py.File(tmp_path / "out.h5") as file:
        config = json.loads(file.attrs["config"])
    assert (config["pyramid"], config["tap"], config["channels"]) == ("image", "C5", 1280)


def test_the_plan_says_how_much_work_it_is(fpnx: Callable[..., Any], photos: Path) -> None:
    line = ("extract", photos, "--backbone", "mobilenet_v2", "--weights", "random", "--pyramid", "image", "--dry-run")
    code, out, _ = fpnx(*line)
    assert code == 0
    assert "P3, P4, P5, image, no parameters, 21 times the work of one pass" in out
    assert "random projection" not in out
    code, out, _ = fpnx(*line, "--levels", "P2-P6", "--json")
    assert json.loads(out)["work"] == 64 + 16 + 4 + 1 + 0.25


def test_pictures_are_drawn(photos: Path, tmp_path: Path) -> None:
    result = fpnx.extract(photos, tmp_path / "png", **IMAGE, size=64, format="png")
    assert result.done == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "C3,P4"}, "level C3 beside pyramid image, which has P levels only"),
        ({"levels": "P7"}, r"mobilenet_v2 has no level P7: it gives P2, P3, P4, P5, P6$"),
        ({"channels": 8}, "channels 8 beside pyramid image"),
        ({"top_block": "pool"}, "top block pool beside pyramid image"),
        ({"tap": "C9"}, "no tap C9: it gives C2, C3, C4, C5"),
        ({"tap": "P3"}, "tap P3: take one of the backbone's taps"),
        ({"tap": "C4", "pyramid": "fpn"}, "give --pyramid image or simple beside it"),
        ({"backbone": "maxvit_t"}, "maxvit_t takes inputs of one size"),
        ({"size": 300, "max_pixels": 1_000_000}, r"1200×1200 pixels, over the limit.* coarser --levels"),
    ],
)
def test_what_does_not_go_is_refused(photos: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(fpnx.FpnxError, match=message):
        fpnx.extract(photos, tmp_path / "out.h5", **{**IMAGE, **options})
    assert not list(tmp_path.glob("out*"))


def test_only_images_over_the_limit_fail(photos: Path, tmp_path: Path) -> None:
    noise_image(9, (300, 300)).save(photos / "large.png")
    result = fpnx.extract(photos, tmp_path / "out.h5", **IMAGE, size="native", max_pixels=400 * 400, levels="P4,P5")
    assert [path for path, _ in result.failed] == ["large.png"]
    assert result.done == 6


def test_default_weights_are_those_of_a_classifier() -> None:
    """A detector's default weights hold an FPN; an image pyramid needs the body alone."""
    with pytest.raises(fpnx.FpnxError, match=r"ResNet50_Weights\.IMAGENET1K_V2 .*(cannot be had|offline)"):
        fpnx.create_model("resnet50", pyramid="image", offline=True)


@pytest.mark.parametrize(
    ("tap", "default", "all_levels"),
    [("C2", ("P2",), ("P2", "P3")), ("C3", ("P2", "P3"), ("P2", "P3", "P4"))],
)
def test_levels_of_early_taps_begin_at_p2(
    photos: Path, tmp_path: Path, tap: str, default: tuple[str, ...], all_levels: tuple[str, ...]
) -> None:
    assert fpnx.create_model(**IMAGE, tap=tap).fpn.levels == all_levels
    fpnx.extract(photos / "a.jpg", tmp_path / "out.h5", **IMAGE, tap=tap, size=64)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store.levels == default


def test_saved_weights_come_back(tmp_path: Path) -> None:
    model = fpnx.create_model(**IMAGE, tap="C4", seed=3)
    fpnx.save_weights(model, tmp_path / "m.safetensors")
    for again in (
        fpnx.create_model(weights=str(tmp_path / "m.safetensors")),
        fpnx.create_model(weights=str(tmp_path / "m.safetensors"), pyramid="image", tap="C4"),
    ):
        assert (again.levels, again.scales, again.fpn.kind) == (model.levels, model.scales, "image")
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )
