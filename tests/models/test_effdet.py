"""Checkpoints of effdet: recognised, equal to effdet's own network, with its preprocessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fpnx
from fpnx.core.config import InputConfig
from fpnx.core.errors import FpnxError
from fpnx.models.weights.effdet import effdet_recipe
from tests.helpers.effdet_reference import detector
from tests.helpers.reference_networks import randomise

SIZE = (128, 224)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 76, 3), dtype=np.uint8))


def save(network: nn.Module, path: Path, prefix: str = "", key: str = "state_dict") -> Path:
    torch.save({key: {f"{prefix}{name}": value for name, value in network.state_dict().items()}}, path)
    return path


def levels_of(network: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return network.fpn(network.backbone(images))


MODELS = {  # model → backbone, side of its images
    "efficientdet_d0": ("timm/efficientnet_b0", 512),
    "tf_efficientdet_d0": ("timm/tf_efficientnet_b0", 512),
    "tf_efficientdet_lite0": ("timm/tf_efficientnet_lite0", 320),
    "tf_efficientdet_d1": ("timm/tf_efficientnet_b1", 640),
    "tf_efficientdet_d7x": ("timm/tf_efficientnet_b7", 1536),
    "efficientdetv2_dt": ("timm/efficientnetv2_rw_t", 768),
}
QUICK = ("efficientdet_d0", "tf_efficientdet_d0", "tf_efficientdet_lite0")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_levels_equal_effdet_s(name: str, tmp_path: Path) -> None:
    size = (256, 384) if "d7x" in name else SIZE  # effdet itself pools no map whose one side is 1, as P7's would be
    reference = randomise(detector(name, size), smallest_variance=0.1)
    path = save(reference, tmp_path / "model.pth", "model." if "lite" in name else "")
    model = fpnx.create_model(weights=str(path))
    backbone, side = MODELS[name]
    assert model.backbone == backbone
    assert model.weights.framework == "effdet"
    assert (model.recipe.short_side, model.recipe.long_side, model.recipe.pad_multiple) == (side, side, side)
    assert model.levels == ("P3", "P4", "P5", "P6", "P7")
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        levels = model(images)
    for level, expected in zip(levels.values(), levels_of(reference, images), strict=False):
        assert level.shape == expected.shape
        assert (level - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_file_has_effdet_s_preprocessing(tmp_path: Path) -> None:
    reference = randomise(detector("tf_efficientdet_lite0", (320, 320)))
    path = save(reference, tmp_path / "model.pth")
    PICTURE.save(tmp_path / "picture.png")
    fpnx.extract(tmp_path / "picture.png", tmp_path / "out.h5", weights=str(path))
    # effdet's ResizePad: one factor for both sides, rounded down, pasted at the top left of a square
    factor = min(320 / PICTURE.height, 320 / PICTURE.width)
    size = (int(PICTURE.height * factor), int(PICTURE.width * factor))
    pixels = np.array(PICTURE.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float32) / 255
    image = (torch.from_numpy(pixels).permute(2, 0, 1) - 0.5) / 0.5
    expected = levels_of(reference, F.pad(image, (0, 320 - size[1], 0, 320 - size[0]))[None])
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store.levels == ("P3", "P4", "P5", "P6", "P7")
        for name, wanted in zip(store.levels, expected, strict=True):
            assert np.abs(store[0][name] - wanted[0].numpy()).max() <= 1e-5 * wanted.abs().max().item()
        assert store.provenance.weights.layout == "effdet"


def test_other_sizes_are_not_padded_to_the_model_s_square() -> None:
    recipe = effdet_recipe("timm/tf_efficientnet_b6")
    assert recipe.padded(recipe.input_size((480, 640))) == (1280, 1280)
    square = recipe.sized(InputConfig(short_side=1536, long_side=1536))
    assert (square.input_size((480, 640)), square.padded((1152, 1536))) == ((1152, 1536), (1536, 1536))
    for config in (
        InputConfig(size="320x448"), InputConfig(short_side=320), InputConfig(short_side=320, long_side=448),
        InputConfig(size="native"),
    ):  # fmt: skip
        sized = recipe.sized(config)
        assert sized.padded((320, 448)) == (320, 448)
        assert sized.mean == recipe.mean
    assert recipe.sized(InputConfig()) == recipe


def test_such_a_model_is_saved_and_read_back(tmp_path: Path) -> None:
    path = save(randomise(detector("tf_efficientdet_lite0", SIZE)), tmp_path / "model.pth")
    model = fpnx.create_model(weights=str(path))
    fpnx.save_weights(model, tmp_path / "own.safetensors")
    again = fpnx.create_model(weights=str(tmp_path / "own.safetensors"))
    assert again.fpn.identity() == model.fpn.identity()
    assert again.recipe == model.recipe
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = again(images), model(images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_on_another_backbone_needs_its_name(tmp_path: Path) -> None:
    changes = {"backbone_name": "mobilenetv3_small_050", "fpn_channels": 16, "backbone_args": {}}
    reference = randomise(detector("efficientdet_d0", SIZE, **changes))
    path = save(reference, tmp_path / "model.pth")
    with pytest.raises(FpnxError, match="none of effdet's own models: name it with --backbone"):
        fpnx.create_model(weights=str(path))
    model = fpnx.create_model("timm/mobilenetv3_small_050", weights=str(path))
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        levels = model(images)
    for level, expected in zip(levels.values(), levels_of(reference, images), strict=True):
        assert (level - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fpn_name": "qufpn_fa"}, "in another order than a BiFPN"),
        ({"fpn_name": "pan_fa"}, "in another order than a BiFPN"),
        ({"separable_conv": False}, "its BiFPN has plain convolutions"),
    ],
    ids=str,
)
def test_other_pyramids_of_effdet_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = save(detector("efficientdet_d0", SIZE, **changes), tmp_path / "model.pth")
    with pytest.raises(FpnxError, match=message):
        fpnx.create_model(weights=str(path))
