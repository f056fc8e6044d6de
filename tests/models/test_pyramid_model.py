"""Backbone and pyramid together: parity with torchvision on our own state dict, shapes, seeds, errors."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import functional

import fpnx
from fpnx.core.errors import FpnxError
from tests.helpers.files import noise_image

# The stages of the three classic backbones, by torchvision's names, stated here once more on purpose.
NODES = {
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
    "vgg16": ["features.15", "features.22", "features.29", "features.30"],
    "mobilenet_v2": ["features.3", "features.6", "features.13", "features.18"],
}
IN_CHANNELS = {
    "resnet50": [256, 512, 1024, 2048],
    "vgg16": [256, 512, 512, 512],
    "mobilenet_v2": [24, 32, 96, 1280],
}
SIZES = [(224, 224), (225, 301), (97, 131), pytest.param((480, 640), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=["resnet50", "mobilenet_v2", pytest.param("vgg16", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> fpnx.PyramidModel:
    return with_statistics(fpnx.create_model(request.param, weights="random", levels="C2-C5,P2-P7", seed=1))


def with_statistics(model: fpnx.PyramidModel) -> fpnx.PyramidModel:
    """Normalisation statistics as after training: with fresh ones a forgotten batch norm would not be seen."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity_with_torchvision(model: fpnx.PyramidModel, size: tuple[int, int]) -> None:
    state = model.state_dict()
    plain = models.get_model(model.backbone, weights=None).eval()
    body = create_feature_extractor(plain, {node: f"C{k + 2}" for k, node in enumerate(NODES[model.backbone])})
    body.load_state_dict({key[5:]: value for key, value in state.items() if key.startswith("body.")})
    channels = IN_CHANNELS[model.backbone]
    fpn = FeaturePyramidNetwork(channels, 256, LastLevelP6P7(channels[-1], 256))
    fpn.load_state_dict({key[4:]: value for key, value in state.items() if key.startswith("fpn.")})
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(images)
        taps = OrderedDict(body.eval()(images))
        pyramid = dict(zip(["P2", "P3", "P4", "P5", "P6", "P7"], fpn(taps).values(), strict=True))
    assert list(ours) == ["C2", "P2", "C3", "P3", "C4", "P4", "C5", "P5", "P6", "P7"]
    for name, level in ours.items():
        expected = taps[name] if name[0] == "C" else pyramid[name]
        assert level.shape == expected.shape
        assert (level - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert {name: tuple(level.shape[1:]) for name, level in ours.items()} == model.shapes(size)


@pytest.mark.parametrize("levels", ["C2", "C3,C4", "P2", "P5", "P4-P7", "C2,P6", "C5"])
def test_levels_alone_equal_levels_together(model: fpnx.PyramidModel, levels: str) -> None:
    # P6 alone would come by pooling: ask for the same top block
    some = fpnx.create_model(model.backbone, weights="random", levels=levels, seed=1, top_block="c5")
    some.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        every, part = model(images), some(images)
    assert tuple(part) == some.levels
    assert all(torch.equal(part[name], every[name]) for name in part)


def test_only_taps_means_only_their_stages() -> None:
    model = fpnx.create_model("resnet50", weights="random", levels="C2,C3")
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert any(name.startswith("body.layer2") for name in ran)
    assert not any(name.startswith(("body.layer3", "body.layer4", "fpn")) for name in ran)


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_seeds(backbone: str) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = fpnx.create_model(backbone, weights="random", seed=4)
    assert torch.equal(before, torch.get_rng_state()), "drawing touched the caller's generator"
    torch.rand(1000)
    two = fpnx.create_model(backbone, weights="random", seed=4, levels="P4")
    three = fpnx.create_model(backbone, weights="random", seed=5)
    states = [model.state_dict() for model in (one, two, three)]
    assert states[0].keys() == states[1].keys(), "the whole pyramid is there whatever levels were asked for"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_state_dict_has_torchvisions_names() -> None:
    state = fpnx.create_model("resnet50", weights="random", levels="P3-P7").state_dict()
    plain = models.resnet50(weights=None).state_dict()
    body = {key[5:] for key in state if key.startswith("body.")}
    assert body == {key for key in plain if not key.startswith("fc.")}
    fpn = {key for key in state if key.startswith("fpn.")}
    blocks = [f"fpn.{kind}_blocks.{i}.0" for kind in ("inner", "layer") for i in range(4)]
    blocks += ["fpn.extra_blocks.p6", "fpn.extra_blocks.p7"]
    assert fpn == {f"{block}.{part}" for block in blocks for part in ("weight", "bias")}


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_give_the_same_numbers(way: object) -> None:
    model = with_statistics(fpnx.create_model("mobilenet_v2", weights="random", levels="C2,P4"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model(images), way(model)(images)  # type: ignore[operator]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_transform_is_the_recipe(samples: Path) -> None:
    model = fpnx.create_model("resnet50", weights="random")
    with Image.open(samples / "coffee.jpg") as picture:
        ours = model.transform(picture)
        resized = functional.resize(picture.convert("RGB"), [224, 224], antialias=True)
    expected = functional.normalize(functional.to_tensor(resized), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert ours.shape == (3, 224, 224)
    assert torch.equal(ours, expected)
    assert "224×224" in str(model.recipe)


def test_transform_takes_every_form_of_an_image(tmp_path: Path) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", size="native")
    upright = noise_image(0, (48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture is to be turned by 90 degrees clockwise
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.png", exif=exif)
    array = np.array(upright)
    expected = functional.normalize(functional.to_tensor(upright), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with Image.open(tmp_path / "turned.png") as turned:
        forms = [str(tmp_path / "turned.png"), tmp_path / "turned.png", turned, upright, array]
        forms += [torch.from_numpy(array).permute(2, 0, 1), array[:, ::-1][:, ::-1]]
        many = model.transform(forms)
        assert [torch.equal(one, expected) for one in many] == [True] * len(forms)
        assert all(torch.equal(model.transform(form), expected) for form in forms)
        with torch.no_grad():
            levels = model(expected[None])
        for form in forms:  # turned once, not twice
            assert all(torch.equal(level, levels[name][0]) for name, level in model.features(form).items())
    assert model.transform([]) == []


@pytest.mark.parametrize("size", [64, "native"])
def test_features_are_those_of_extract(photos: Path, tmp_path: Path, size: int | str) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="C3,P3-P6", size=size)
    fpnx.extract(photos, tmp_path / "out.h5", backbone=model, size=size)
    with fpnx.open(tmp_path / "out.h5") as store:
        for item, features in zip(store, model.features([photos / path for path in store.paths]), strict=True):
            assert list(features) == list(store.levels)
            for level, values in features.items():
                assert values.shape == item[level].shape
                assert not values.requires_grad
                assert np.abs(values.numpy() - item[level]).max() <= 1e-5 * np.abs(item[level]).max()
            alone = model.features(photos / item.path)
            assert all(
                (alone[name] - values).abs().max() <= 1e-5 * values.abs().max() for name, values in features.items()
            )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "an object of type NoneType is not an image: take a path"),
        (7, "an object of type int"),
        (np.zeros((8, 8, 3)), r"an array \(8, 8, 3\) of float64"),
        (np.zeros((8, 8), np.uint8), r"an array \(8, 8\) of uint8"),
        (np.zeros((0, 8, 3), np.uint8), r"an array \(0, 8, 3\)"),
        (torch.zeros(3, 8, 8), r"a tensor \(3, 8, 8\) of float32"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"a tensor \(1, 3, 8, 8\)"),
        (torch.empty(3, 8, 8, dtype=torch.uint8, device="meta"), "a tensor that is sparse or without values"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8).to_sparse(), "a tensor that is sparse or without values"),
        (Image.new("RGB", (0, 0)), "a Pillow image without pixels"),
        ("absent.jpg", "absent.jpg: No such file"),
        (".", "it is a folder, not an image"),
        (b"bytes", "an object of type bytes"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P5")
    for call in (model.transform, model.features):
        with pytest.raises(FpnxError, match=message):
            call(image)
        with pytest.raises(FpnxError, match=message):
            call([image])


def test_features_are_refused_in_training_mode_and_at_sizes_that_do_not_fit(photos: Path) -> None:
    model = fpnx.create_model("vgg16", weights="random", levels="P5", size="native")
    with pytest.raises(FpnxError, match="smallest square it takes is 32"):
        model.features(noise_image(0, (20, 20)))
    with pytest.raises(FpnxError, match=r"call model.eval\(\)"):
        model.train().features(photos / "a.jpg")


def test_a_truncated_picture_names_its_path(photos: Path) -> None:
    (photos / "a.jpg").write_bytes((photos / "a.jpg").read_bytes()[:-300])
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P5")
    with pytest.raises(fpnx.ImageError, match=r"a\.jpg: "):
        model.transform(photos / "a.jpg")
    with Image.open(photos / "a.jpg") as picture, pytest.raises(fpnx.ImageError):
        model.transform(picture)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet5"}, "did you mean resnet50"),
        ({"levels": "P7", "top_block": "pool"}, "does not come by pool"),
        ({"levels": "C6"}, "no level C6"),
        ({"levels": "P6-P7", "channels": 0}, "channels 0"),
        ({"weights": "ResNet50_Weights.IMAGENET1K_V3"}, "did you mean ResNet50_Weights.IMAGENET1K_V"),
        ({"backbone": "vgg16", "weights": "ResNet50_Weights.IMAGENET1K_V2"}, "for resnet50, not for vgg16"),
        ({"weights": "nowhere.pt"}, "nowhere.pt"),
    ],
    ids=str,
)
def test_what_cannot_be_made(options: dict[str, object], message: str) -> None:
    with pytest.raises(FpnxError, match=message) as raised:
        fpnx.create_model(**{"weights": "random", **options})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_smaller_size_is_refused_with_the_smallest_one() -> None:
    model = fpnx.create_model("vgg16", weights="random")
    with pytest.raises(FpnxError, match=r"vgg16 cannot take an input of 16×16: the smallest square it takes is 32×32"):
        model.shapes((16, 16))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("levels", ["P2-P5", "P3-P7", "C3,P6"])
def test_saved_weights_come_back(tmp_path: Path, suffix: str, levels: str) -> None:
    model = with_statistics(fpnx.create_model("mobilenet_v2", weights="random", levels=levels, channels=8, seed=9))
    fpnx.save_weights(model, tmp_path / f"mine{suffix}")
    again = fpnx.create_model(weights=str(tmp_path / f"mine{suffix}"))
    assert (again.backbone, again.levels, again.fpn.channels) == ("mobilenet_v2", model.levels, 8)
    assert (again.recipe, str(again.weights.body), again.weights.fpn) == (model.recipe, "as given", model.weights.fpn)
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(images).values(), again(images).values(), strict=True))
    with pytest.raises(FpnxError, match="channels 16 contradicts"):
        fpnx.create_model(weights=str(tmp_path / f"mine{suffix}"), channels=16)
    with pytest.raises(FpnxError, match="for mobilenet_v2, not for vgg16"):
        fpnx.create_model("vgg16", weights=str(tmp_path / f"mine{suffix}"))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (3, "backbone 3: take a name or an nn.Module"),
        (torch.nn.Conv2d, "backbone Conv2d is a class: give an instance of it"),
    ],
    ids=["number", "class"],
)
def test_what_is_no_backbone_is_refused(backbone, message):
    with pytest.raises(FpnxError) as caught:
        fpnx.create_model(backbone)
    assert str(caught.value) == message


# Compiled models

LEVELS = ["C2", "C3,C4", "C2,P3", "C5", "P5", "P4-P7", "P2-P5"]


@pytest.mark.parametrize(
    ("backbone", "levels"),
    [
        pytest.param("mobilenet_v2", one, id=one, marks=() if one in ("C3,C4", "C2,P3") else pytest.mark.slow)
        for one in LEVELS
    ],
)
def test_compiles_as_one_graph_whatever_the_levels(backbone: str, levels: str) -> None:
    model = fpnx.create_model(backbone, weights="random", levels=levels)
    images = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
        expected = model(images)
    assert tuple(compiled) == model.levels
    assert all(torch.equal(compiled[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["C2,C3", "P3"])
def test_compiles_with_inductor(levels: str) -> None:
    model = fpnx.create_model("resnet18", weights="random", levels=levels, pyramid="pafpn")
    images = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        compiled = torch.compile(model, fullgraph=True)(images)
        expected = model(images)
    for name, level in expected.items():
        assert (compiled[name] - level).abs().max() <= 1e-4 * level.abs().max(), name


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_stop_early_with_their_own_parameters(duplicate: Callable[[Any], Any]) -> None:
    model = fpnx.create_model("resnet18", weights="random", levels="C3")
    images = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)["C3"]
        copied = duplicate(model)
        assert copied.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(copied(images)["C3"], expected)
        if duplicate is not copy.copy:
            model.get_parameter("body.conv1.weight").zero_()
            assert torch.equal(copied(images)["C3"], expected)
            assert not torch.equal(model(images)["C3"], expected)
        doubled = copied.double()
        assert doubled(images.double())["C3"].dtype is torch.float64
        copied.levels = ("C2", "C4")
        assert list(copied(images.double())) == ["C2", "C4"]
