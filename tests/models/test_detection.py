"""torchvision's detectors: extracted levels equal the inputs of their heads."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import fpnx
from fpnx.core.errors import FpnxError
from fpnx.models.weights.torchvision import (
    COCO,
    DETECTOR_RECIPE,
    DETECTORS,
    ZERO_EPS_FILES,
    find_published,
    published_weights,
)
from tests.helpers.reference_networks import randomise

SIZES = ((50, 70), (97, 131), (60, 200))
LEVELS = {
    "retinanet": {"P3": 8, "P4": 16, "P5": 32, "P6": 64, "P7": 128},
    "fcos": {"P3": 8, "P4": 16, "P5": 32, "P6": 64, "P7": 128},
    "fasterrcnn_mobilenet": {"0": 32, "1": 32, "pool": 64},
    "": {"P2": 4, "P3": 8, "P4": 16, "P5": 32, "P6": 64},
}
ENTRIES = [entry for name in DETECTORS for entry in models.get_model_weights(name)]


def detector_of(entry: models.WeightsEnum, **options: int) -> nn.Module:
    """The detector of published weights, with torchvision's epsilon for them and random parameters.

    Its heads stay on the meta device, without data.
    """
    name = next(name for name in DETECTORS if entry in models.get_model_weights(name))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # warnings of torchvision's own code
        network = models.get_model(name, weights=None, weights_backbone=None, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and Path(entry.url).name in ZERO_EPS_FILES:
            module.eps = 0.0
    network.backbone.to_empty(device="cpu")
    randomise(network.backbone)
    return network.eval()


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict to save, with small tensors in place of the parameters of heads."""
    return {name: torch.zeros(1) if value.is_meta else value for name, value in network.state_dict().items()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and a function that saves a network in it under the published file name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "hub" / "checkpoints"
    folder.mkdir(parents=True)

    def save(entry: models.WeightsEnum, network: nn.Module) -> Path:
        torch.save(state_of(network), folder / Path(entry.url).name)
        return folder / Path(entry.url).name

    return save


def save_images(folder: Path, sizes: tuple[tuple[int, int], ...]) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def assert_equal_levels(network: nn.Module, images: Path, output: Path) -> None:
    """Compare every stored level of every image with `detector.backbone(detector.transform(image))`."""
    with fpnx.open(output) as store:
        assert len(store) == len(list(images.iterdir()))
        for item in store:
            pixels = np.array(Image.open(images / item.path))
            image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
            with torch.no_grad():
                expected = network.backbone(network.transform([image])[0].tensors)
            assert len(expected) == len(item.levels)
            for level, reference in zip(item.levels, expected.values(), strict=True):
                assert item[level].shape == reference.shape[1:]
                error = np.abs(item[level] - reference[0].numpy()).max()
                assert error <= 1e-5 * reference.abs().max().item(), (item.path, level)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry).replace("_Weights", ""))
def test_levels_equal_the_inputs_of_the_detectors_heads(entry, hub, tmp_path):
    network = detector_of(entry, min_size=64, max_size=110)
    hub(entry, network)
    images, output = save_images(tmp_path / "images", SIZES), tmp_path / "out.h5"
    fpnx.extract(images, output, weights=str(entry), short_side=64, long_side=110, offline=True)
    assert_equal_levels(network, images, output)
    with fpnx.open(output) as store:
        name = next(name for name in DETECTORS if entry in models.get_model_weights(name))
        strides = next(levels for start, levels in LEVELS.items() if name.startswith(start))
        assert {level: store.stride(level) for level in store.levels} == strides
        weights = store.provenance.weights.to_json()
        assert weights["backbone"] == weights["pyramid"] == {"trained": True, "source": str(entry)}
        assert weights["layout"] == "torchvision detection"
        assert weights["heads_ignored"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1"],
)
def test_levels_equal_the_inputs_of_the_heads_at_the_published_size(name, hub, tmp_path):
    entry = find_published(name, None).entry
    network = detector_of(entry)
    hub(entry, network)
    images, output = save_images(tmp_path / "images", ((300, 221),)), tmp_path / "out.h5"
    fpnx.extract(images, output, weights=name, offline=True)
    assert_equal_levels(network, images, output)


def test_images_are_batched_by_padded_size(hub, tmp_path):
    entry = find_published("FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1", None).entry
    network = detector_of(entry, min_size=64, max_size=110)
    hub(entry, network)
    images = save_images(tmp_path / "images", ((64, 70), (64, 80), (64, 96), (64, 100)))  # three are 64×96 when padded
    fpnx.extract(images, tmp_path / "out.h5", weights=str(entry), short_side=64, long_side=110, batch_size=4)
    assert_equal_levels(network, images, tmp_path / "out.h5")
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store.padded_sizes == [(64, 96), (64, 96), (64, 96), (64, 128)]
        assert store["0.png"].input_size == (64, 70)


@pytest.mark.slow
def test_the_recipe_gives_the_detectors_sizes():
    rng = np.random.default_rng(0)
    transform = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3).eval()
    for height, width in [(480, 640), (1080, 1920), (37, 3000), *rng.integers(30, 3000, (2000, 2)).tolist()]:
        with torch.device("meta"):
            image, _ = transform.resize(torch.empty(3, height, width))
        assert DETECTOR_RECIPE.input_size((height, width)) == tuple(image.shape[1:]), (height, width)


@pytest.mark.parametrize("backbone", COCO)
def test_coco_has_the_best_box_map(backbone):
    detectors = [each for each in published_weights(backbone) if "pyramid" in each.trains]
    scores = {}
    for each in detectors:
        if not each.name.startswith(("Keypoint", "RetinaNet", "FCOS")):  # one class; no P2
            scores[each.name] = each.entry.meta["_metrics"]["COCO-val2017"]["box_map"]
    assert COCO[backbone] == max(scores, key=scores.get)


def test_default_is_a_trained_pyramid_only_where_levels_are_one_per_stride(hub):
    entry = find_published(COCO["resnet50"], None).entry
    hub(entry, detector_of(entry))
    model = fpnx.create_model("resnet50", offline=True)
    assert model.weights.name == COCO["resnet50"]
    assert model.levels == ("P2", "P3", "P4", "P5", "P6")
    assert model.weights.fpn.trained is True
    for backbone, name in (("mobilenet_v3_large", "mobilenet_v3_large"), ("vgg16", "vgg16")):
        with pytest.raises(FpnxError, match=f"put {name}-[0-9a-f]+.pth from https"):
            fpnx.create_model(backbone, offline=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "P2-P7"}, "has no level P7: it has C2, P2, C3, P3, C4, P4, C5, P5, P6|has no level P7"),
        ({"channels": 128}, "channels 128 contradicts .* which has 256"),
        ({"top_block": "c5"}, "it has no top block c5"),
        ({"backbone": "vgg16"}, "are for resnet50, not for vgg16"),
        ({"mean": "0,0,0"}, "--mean is for files"),
        ({"levels": "0,1"}, "has no level 0"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_options_that_contradict_a_trained_pyramid_are_refused(options, message, hub):
    entry = find_published("FasterRCNN_ResNet50_FPN_Weights.COCO_V1", None).entry
    hub(entry, detector_of(entry))
    with pytest.raises(FpnxError, match=message):
        fpnx.create_model(weights=str(entry), **options)


def test_unstrided_levels_have_torchvisions_names(hub):
    entry = find_published("FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1", None).entry
    hub(entry, detector_of(entry))
    model = fpnx.create_model(weights=str(entry), levels="pool,0")
    assert model.levels == ("0", "pool")
    assert model.shapes((64, 96)) == {"0": (256, 2, 3), "pool": (256, 1, 2)}
    for level in ("P5", "C5"):
        with pytest.raises(FpnxError, match=f"has no level {level}: it has 0, 1, pool"):
            fpnx.create_model(weights=str(entry), levels=level)


def test_a_missing_file_is_reported_with_its_path_and_a_copy_is_used(hub, tmp_path):
    published = find_published("RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1", None)
    with pytest.raises(FpnxError) as caught:
        fpnx.create_model(weights=published.name, offline=True)
    folder = str(tmp_path / "hub" / "hub" / "checkpoints")
    for text in (published.url, published.file_name, folder, "--weights random"):
        assert text in str(caught.value)
    published.file.write_bytes(hub(published.entry, detector_of(published.entry)).read_bytes())
    assert fpnx.create_model(weights=published.name, offline=True).levels == ("P3", "P4", "P5", "P6", "P7")


@pytest.mark.parametrize("wrapped", ["bare", "model", "state_dict module.", "old names"])
def test_a_detectors_own_file_is_recognised(wrapped, tmp_path):
    entry = find_published("RetinaNet_ResNet50_FPN_Weights.COCO_V1", None).entry
    network = detector_of(entry)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    state = state_of(network)
    if wrapped == "old names":
        state = {name.replace("_blocks.0.0.", "_blocks.0.").replace("_blocks.1.0.", "_blocks.1.")
                 .replace("_blocks.2.0.", "_blocks.2."): value for name, value in state.items()}  # fmt: skip
        assert "backbone.fpn.inner_blocks.0.weight" in state
    if wrapped == "state_dict module.":
        state = {f"module.{name}": value for name, value in state.items()}
    key = wrapped.split(" ")[0]
    torch.save({key: state, "epoch": 3} if key in ("model", "state_dict") else state, tmp_path / "own.pth")
    model = fpnx.create_model(weights=str(tmp_path / "own.pth"))
    assert (model.backbone, model.weights.framework) == ("resnet50", "torchvision detection")
    assert (model.levels, model.fpn.top_block) == (("P3", "P4", "P5", "P6", "P7"), "p5")
    assert model.weights.ignored == len([name for name in state if ".head." in name or name.startswith("head.")])
    assert model.weights.settings["norm_eps"] == (1e-5, "default")
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(model(image).values(), network.backbone(image).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", sorted(ZERO_EPS_FILES))
def test_epsilon_is_zero_for_the_four_files_trained_with_zero(name, hub):
    entry = next(entry for entry in ENTRIES if Path(entry.url).name == name)
    hub(entry, detector_of(entry))
    model = fpnx.create_model(weights=str(entry))
    assert {m.eps for m in model.body.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-45}
