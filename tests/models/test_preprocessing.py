"""Recipes: sizes, resampling, normalisation and padding, compared with torchvision and hand-worked numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import functional

from fpnx.core.config import InputConfig
from fpnx.core.errors import ImageError
from fpnx.models.preprocessing import Recipe
from tests.helpers.files import noise_image

DETECTOR = Recipe(
    sizing="aspect", short_side=800, long_side=1333, rounding="scaled-floor", backend="tensor", pad_multiple=32
)


@pytest.mark.parametrize(
    ("recipe", "source", "size"),
    [
        (Recipe(height=224, width=224), (10, 999), (224, 224)),
        (Recipe(sizing="native"), (10, 999), (10, 999)),
        (Recipe(sizing="aspect", short_side=200), (300, 451), (200, 300)),
        (Recipe(sizing="aspect", short_side=200), (451, 300), (300, 200)),
        (Recipe(sizing="aspect", short_side=200, long_side=250), (300, 451), (166, 250)),
        (DETECTOR, (480, 640), (800, 1066)),
        (DETECTOR, (1080, 1920), (749, 1333)),
        (Recipe(sizing="aspect", short_side=800, long_side=1333, rounding="scaled-half-up"), (480, 640), (800, 1067)),
        (Recipe(sizing="aspect", short_side=800, long_side=1333, rounding="scaled-half-up"), (1080, 1920), (750, 1333)),
    ],
    ids=str,
)
def test_input_sizes(recipe: Recipe, source: tuple[int, int], size: tuple[int, int]) -> None:
    assert recipe.input_size(source) == size


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (37, 91), (120, 33), (50, 50)], ids=str)
def test_a_detectors_recipe_equals_torchvisions(size: tuple[int, int]) -> None:
    recipe = Recipe(
        sizing="aspect", short_side=80, long_side=133, rounding="scaled-floor", backend="tensor", pad_multiple=32
    )
    picture = noise_image(0, size[::-1])
    theirs = GeneralizedRCNNTransform(80, 133, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    images, _ = theirs([functional.to_tensor(picture)])
    ours = recipe(picture)
    assert recipe.input_size(size) == tuple(images.image_sizes[0])
    assert ours.shape == images.tensors[0].shape
    assert (ours - images.tensors[0]).abs().max() < 1e-5


def test_detector_sizes_at_many_aspect_ratios() -> None:
    theirs = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3).eval()
    generator = np.random.default_rng(0)
    for height, width in generator.integers(20, 1200, (60, 2)).tolist():
        scale = theirs.resize(torch.empty(3, height, width), None)[0].shape[1:]
        assert DETECTOR.input_size((height, width)) == tuple(scale)


@pytest.mark.parametrize("side", [97, 131, 480, 1333])
def test_aspect_keeping_sizes_equal_torchvisions(side: int) -> None:
    recipe = Recipe(sizing="aspect", short_side=side)
    for width, height in [(640, 427), (300, 451), (1000, 872), (50, 51)]:
        resized = functional.resize(Image.new("L", (width, height)), side)
        assert recipe.input_size((height, width)) == resized.size[::-1]


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
def test_pillow_resampling_equals_torchvisions(resampling: str) -> None:
    picture = noise_image(2, (90, 61))
    recipe = Recipe(height=40, width=56, resampling=resampling)
    expected = functional.resize(picture, [40, 56], functional.InterpolationMode(resampling))
    assert np.array_equal(recipe.resize(picture, (40, 56)), np.asarray(expected))


def test_normalisation_equals_hand_worked_numbers() -> None:
    pixels = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    rgb = Recipe(height=1, width=1, mean=(0.5, 0.5, 0.1), std=(0.5, 0.25, 0.1))
    assert rgb.normalise(pixels)[0, :, 0, 0].tolist() == pytest.approx([-1.0, 2.0, 1.0])
    bgr = Recipe(height=1, width=1, mean=(1.0, 5.0, 0.0), std=(10.0, 10.0, 1.0), order="BGR", value_range=255.0)
    assert bgr.normalise(pixels)[0, :, 0, 0].tolist() == pytest.approx([5.0, 25.0, 0.0])
    floats = pixels.float()
    rgb.normalise(floats)
    assert floats.flatten().tolist() == [0, 255, 51], "normalise changed its argument"


def test_padding_is_zero_at_the_right_and_bottom() -> None:
    recipe = Recipe(sizing="native", pad_multiple=32)
    picture = noise_image(0, (50, 40))
    prepared = recipe(picture)
    assert prepared.shape == (3, 64, 64)
    assert not prepared[:, 40:].any()
    assert not prepared[:, :, 50:].any()
    assert torch.equal(prepared[:, :40, :50], Recipe(sizing="native")(picture))


def test_size_options_change_only_the_size() -> None:
    for config, size in [
        (InputConfig(size="480x640"), (480, 640)),
        (InputConfig(short_side=100), (100, 133)),
        (InputConfig(size="native"), (300, 400)),
        (InputConfig(), (800, 1066)),
    ]:
        recipe = DETECTOR.sized(config)
        assert recipe.input_size((300, 400)) == size
        assert recipe.pad_multiple == 32
        assert recipe.mean == DETECTOR.mean


def test_narrow_images_are_limited_in_pixels() -> None:
    with pytest.raises(ImageError, match="over the limit"):
        Recipe(sizing="aspect", short_side=800).input_size((1, 60000), 178_956_970)
    assert DETECTOR.input_size((1, 60000), 178_956_970) == (1, 1333)


def test_json_round_trip() -> None:
    assert Recipe.from_json(json.loads(json.dumps(DETECTOR.to_json()))) == DETECTOR


def test_bands_and_ranges_are_in_a_recipe_only_where_they_are_set() -> None:
    plain = Recipe(height=224, width=224)
    assert not {"bands", "source_range"} & set(plain.sized(InputConfig(size=64)).to_json())
    recipe = plain.sized(InputConfig(bands="4,3,2", value_range="0,3000", short_side=200))
    values = recipe.to_json()
    assert (values["bands"], values["source_range"], values["short_side"]) == ((4, 3, 2), "0,3000", 200)
    assert Recipe.from_json(json.loads(json.dumps(values))) == recipe
    assert str(recipe).startswith("bands 4,3,2, values 0,3000, short side 200")
