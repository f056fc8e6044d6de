"""Weights: fpnx's own files, published names, and options that contradict them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.ops import FeaturePyramidNetwork

import fpnx
from fpnx.cli.main import main
from fpnx.core.errors import FpnxError
from fpnx.models.weights.torchvision import find_published, published_weights
from tests.helpers.reference_networks import D2Detector, MMDetector, randomise

IMAGE = torch.linspace(-2, 2, 3 * 64 * 96).reshape(1, 3, 64, 96).sin()


def levels_of(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(IMAGE)


def network_file(folder: Path, layout: str) -> Path:
    """A file in another framework's layout, with the properties that fpnx's own files must keep."""
    if layout == "detectron2":  # stride in 1×1, norms in the pyramid, P6 from C5
        network, options = D2Detector(50, first=3, top="res5", norm=True), {}
    else:  # no ReLU before P7, P6 from the last lateral, epsilon
        network = MMDetector(start_level=1, num_outs=5, add_extra_convs="on_lateral")
        options = {
            "meta": {
                "cfg": "model = dict(backbone=dict(norm_cfg=dict(eps=1e-3)), neck=dict(add_extra_convs='on_lateral'))"
            }
        }
    torch.save({"state_dict": randomise(network).state_dict(), **options}, folder / "other.pth")
    return folder / "other.pth"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_own_files_restore_the_same_model(suffix, tmp_path):
    model = fpnx.create_model("resnet18", weights="random", levels="P3-P7", channels=64, seed=5, top_block="p5")
    file = tmp_path / f"own{suffix}"
    fpnx.save_weights(model, file)
    loaded = fpnx.create_model(weights=str(file))
    assert (loaded.backbone, loaded.levels, loaded.fpn.top_block) == ("resnet18", model.levels, "p5")
    assert loaded.recipe == model.recipe
    assert str(loaded.weights.body) == str(loaded.weights.fpn) == "untrained (random, seed 5)"
    for level, value in levels_of(model).items():
        assert torch.equal(levels_of(loaded)[level], value)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["detectron2", "mmdetection"])
def test_own_files_keep_the_facts_of_other_layouts(layout, tmp_path):
    model = fpnx.create_model(weights=str(network_file(tmp_path, layout)))
    fpnx.save_weights(model, tmp_path / "own.safetensors")
    loaded = fpnx.create_model(weights=str(tmp_path / "own.safetensors"))
    for name in ("norm", "top_block", "p7_relu", "first_level", "channels"):
        assert getattr(loaded.fpn, name) == getattr(model.fpn, name)
    assert loaded.recipe == model.recipe
    assert loaded.weights.norm_eps == model.weights.norm_eps == (1e-3 if layout == "mmdetection" else 1e-5)
    assert loaded.weights.stride_in_1x1 is (layout == "detectron2")
    for level, value in levels_of(model).items():
        assert torch.equal(levels_of(loaded)[level], value)
    other = "RGB" if layout == "detectron2" else "BGR"
    with pytest.raises(FpnxError, match=f"--pixel-order {other} contradicts it"):
        fpnx.create_model(weights=str(tmp_path / "own.safetensors"), pixel_order=other)


def test_own_files_keep_unstrided_levels(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = find_published("FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1", None)
    network = models.get_model("fasterrcnn_mobilenet_v3_large_fpn", weights=None, weights_backbone=None)
    published.file.parent.mkdir(parents=True)
    torch.save(randomise(network).state_dict(), published.file)
    model = fpnx.create_model(weights=published.name, offline=True)
    fpnx.save_weights(model, tmp_path / "own.pth")
    loaded = fpnx.create_model(weights=str(tmp_path / "own.pth"))
    assert loaded.levels == ("0", "1", "pool")
    assert loaded.strides == {"0": 32, "1": 32, "pool": 64}
    for level, value in levels_of(model).items():
        assert torch.equal(levels_of(loaded)[level], value)


def test_the_description_states_the_first_level(tmp_path):
    """With equal channels everywhere, keys alone would load a P3 pyramid one level off."""
    model = fpnx.create_model("resnet18", weights="random", channels=32)
    fpnx.save_weights(model, tmp_path / "own.safetensors")
    with safetensors.safe_open(tmp_path / "own.safetensors", framework="pt") as handle:
        description = json.loads(handle.metadata()["fpnx"])
    assert (description["first_level"], description["levels"]) == (2, ["P2", "P3", "P4", "P5"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_level": "P2"}, "description has first_level P2"),
        ({"levels": 5}, "description has levels 5"),
        ({"parts": {"body": 1}}, "description has parts"),
        ({"norm_eps": "0"}, "description has norm_eps"),
        ({"recipe": {"sizing": "fold"}}, "not a recipe"),
        ({"backbone": "resnet5"}, "backbone 'resnet5' is unknown"),
        ({"backbone": [1]}, r"its description has backbone \[1\], which fpnx never wrote"),
        ({"version": 99}, "is of version 99"),
        ({"format": "other"}, "description that is not fpnx's"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_descriptions_are_refused(change, message, tmp_path):
    description = {"format": "fpnx-weights", "version": 1, "backbone": "resnet18", **change}
    state = {f"body.{name}": value for name, value in models.resnet18().state_dict().items()}
    torch.save({"fpnx": json.dumps(description), "state_dict": state}, tmp_path / "own.pth")
    with pytest.raises(FpnxError, match=message):
        fpnx.create_model(weights=str(tmp_path / "own.pth"))


@pytest.mark.parametrize("wrapped", ["bare", "model", "state_dict", "module.", "model.module."])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_classifiers_own_files_are_recognised(name, wrapped, tmp_path):
    network = randomise(models.get_model(name, num_classes=7))
    state = network.state_dict()
    if wrapped.endswith("."):
        state = {f"{wrapped}{key}": value for key, value in state.items()}
    torch.save({wrapped: state} if wrapped in ("model", "state_dict") else state, tmp_path / "mine.pth")
    model = fpnx.create_model(weights=str(tmp_path / "mine.pth"), levels="C2-C5")
    assert (model.backbone, model.weights.framework, model.weights.ignored) == (name, "torchvision", 2)
    assert (model.weights.body.trained, model.weights.fpn.trained) == (None, False)
    if name == "mobilenet_v2":
        assert torch.equal(levels_of(model)["C5"], network.features(IMAGE))


@pytest.mark.parametrize("name", ["vgg11", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_other_classifiers_files_are_recognised(name, tmp_path):
    torch.save(models.get_model(name, num_classes=3).state_dict(), tmp_path / "mine.pth")
    assert fpnx.create_model(weights=str(tmp_path / "mine.pth"), levels="C3").backbone == name


def test_a_torchvision_backbone_with_fpn_is_read(tmp_path):
    """`BackboneWithFPN(...).state_dict()` has fpnx's own names."""
    body = {f"body.{k}": v for k, v in randomise(models.resnet18()).state_dict().items() if not k.startswith("fc")}
    pyramid = randomise(FeaturePyramidNetwork([128, 256, 512], 48))
    torch.save(body | {f"fpn.{k}": v for k, v in pyramid.state_dict().items()}, tmp_path / "mine.pth")
    model = fpnx.create_model(weights=str(tmp_path / "mine.pth"))
    assert (model.levels, model.fpn.channels) == (("P3", "P4", "P5"), 48)
    taps = model.body(IMAGE)
    with torch.no_grad():
        expected = pyramid({k: taps[f"C{k}"] for k in (3, 4, 5)})
    for ours, theirs in zip(levels_of(model).values(), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_published_weights_have_files_and_urls(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entries = published_weights("resnet50")
    assert len(entries) == 11
    assert {each.trains for each in entries} == {("backbone",), ("backbone", "pyramid")}
    for each in entries:
        assert each.url.endswith(each.file_name)
        assert each.file == tmp_path / "hub" / "checkpoints" / each.file_name
        assert find_published(each.name, None) == each
    assert find_published("IMAGENET1K_V2", "resnet50").name == "ResNet50_Weights.IMAGENET1K_V2"
    assert find_published("IMAGENET1K_V2", None) is None


@pytest.mark.parametrize("variable", [True, False], ids=["FPNX_OFFLINE", "--offline"])
def test_offline_uses_a_copied_file(variable, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    if variable:
        monkeypatch.setenv("FPNX_OFFLINE", "1")
    published = find_published("ResNet18_Weights.IMAGENET1K_V1", None)
    with pytest.raises(FpnxError) as caught:
        fpnx.create_model("resnet18", weights="imagenet", offline=not variable)
    for text in ("downloads are forbidden", published.url, str(published.file.parent), "--weights random"):
        assert text in str(caught.value)
    published.file.parent.mkdir(parents=True)
    torch.save(randomise(models.resnet18()).state_dict(), published.file)
    model = fpnx.create_model("resnet18", weights="imagenet", offline=not variable)
    assert str(model.weights.body) == "trained (ResNet18_Weights.IMAGENET1K_V1)"
    assert str(model.weights.fpn) == "untrained (random, seed 0)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "ResNet50_Weights.IMAGENET1K_V3"}, r"neither a name nor a file \(did you mean ResNet50_Weights"),
        ({"weights": "gone.pth"}, "gone.pth"),
        ({"weights": "coco", "backbone": "vgg16"}, "no weights coco for vgg16, only for mobilenet_v3_large, resnet50"),
        ({"weights": "VGG16_Weights.IMAGENET1K_V1", "backbone": "resnet50"}, "are for vgg16, not for resnet50"),
        ({"weights": "random", "norm_eps": 0.0}, "--norm-eps is for files"),
        ({"weights": "random", "levels": "0"}, "resnet50 has no level 0: it gives C2"),
        ({"mean": "1,2"}, "mean '1,2': take three numbers"),
        ({"std": (1, 0, 1)}, "std 0 cannot be divided by"),
        ({"pixel_order": "GBR"}, "pixel order 'GBR': take one of RGB, BGR"),
        ({"resampling": "cubic"}, "resampling 'cubic': take one of antialiased, plain"),
        ({"norm_eps": -1.0}, "norm eps -1.0: take a number from 0 to 1"),
    ],
    ids=lambda value: "+".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_impossible_requests_name_the_alternatives(options, message):
    with pytest.raises(FpnxError, match=message):
        fpnx.create_model(**options, offline=True)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("weights", ["coco", "RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1"])
def test_another_pyramid_than_the_weights_have_is_refused_before_any_download(weights, offline, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # an empty cache, and no way to a server
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(
        FpnxError, match=r"pyramid pafpn contradicts .*COCO_V1, which has fpn: drop the option, or take"
    ):
        fpnx.create_model(weights=weights, pyramid="pafpn", offline=offline)
    assert list(tmp_path.iterdir()) == []


def test_options_set_what_a_file_does_not_state(tmp_path, capsys):
    network = randomise(models.resnet18())
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    Image.new("RGB", (40, 40), (200, 10, 90)).save(tmp_path / "a.png")
    arguments = [
        "extract",
        str(tmp_path / "a.png"),
        "-o",
        str(tmp_path / "o.h5"),
        "--weights",
        str(tmp_path / "mine.pth"),
    ]
    options = ["--mean", "0,0,0", "--std", "1,1,1", "--pixel-order", "BGR", "--norm-eps", "1e-3", "--levels", "C5"]
    assert main([*arguments, *options, "--size", "64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights"]["settled"]["pixel_order"] == {"value": "BGR", "by": "option"}
    assert result["weights"]["settled"]["norm_eps"] == {"value": 0.001, "by": "option"}
    assert result["recipe"]["mean"] == [0.0, 0.0, 0.0]
    assert main([*arguments, "--mean", "0,0", "--overwrite"]) == 2
    assert capsys.readouterr().err == "fpnx: mean '0,0': take three numbers such as 123.675,116.28,103.53\n"
    fingerprint = result["fingerprint"]
    assert main([*arguments, "--overwrite", "--size", "64", "--levels", "C5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] != fingerprint


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_failed_write_leaves_no_file(suffix, tmp_path):
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="C2")
    target = tmp_path / f"own{suffix}"
    target.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(FpnxError, match=f"cannot write .*own{suffix}: Is a directory"):
        fpnx.save_weights(model, target)
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(FpnxError, match=f"cannot write .*own{suffix}: "):
        fpnx.save_weights(model, tmp_path / "missing" / f"own{suffix}")
