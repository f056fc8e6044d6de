"""Whole classifiers of torchvision and timm: a prediction is the plain model's."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision import models

import fpnx
from fpnx.core.errors import FpnxError
from fpnx.models.weights.timm import timm_weights
from fpnx.models.weights.torchvision import best_weights, classification_recipe
from tests.helpers.detectors import smooth_image
from tests.helpers.reference_networks import randomise
from tests.helpers.shapes import draw_scenes, write_folders


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("backbone", ["mobilenet_v2", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_torchvisions_classifiers(backbone: str, hub: Path) -> None:
    entry = best_weights(backbone)
    network = randomise(models.get_model(backbone, weights=None))
    state = network.state_dict()
    if backbone.startswith("densenet"):  # the published files have older names
        state = {
            key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.").replace(
                "conv2.", "conv.2."
            ) if "denselayer" in key else key: value
            for key, value in state.items()
        }  # fmt: skip
    torch.save(state, hub / Path(entry.url).name)
    image = smooth_image((90, 120), 0)
    found = fpnx.predict(image, weights="imagenet", backbone=backbone, offline=True)
    recipe = classification_recipe(entry)
    with torch.no_grad():
        expected = network(recipe(image)[None])[0].double().softmax(0).numpy()
    best = np.argsort(-expected)[:5]
    np.testing.assert_allclose(found.scores, expected[best], atol=1e-4)
    assert found.labels.tolist() == best.tolist()
    assert found.names == tuple(entry.meta["categories"][i] for i in best)
    assert found.task == "classification"
    assert found.boxes is None


@pytest.mark.parametrize(("backbone", "classes"), [("mobilenet_v2", 3), ("mobilenet_v2", 1000), ("squeezenet1_1", 5)])
def test_a_file_of_ones_own_classifier(backbone: str, classes: int, tmp_path: Path) -> None:
    network = randomise(models.get_model(backbone, weights=None, num_classes=classes))
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "own.pth")
    image = smooth_image((90, 120), 0)
    found = fpnx.predict(image, weights=str(tmp_path / "own.pth"), size=64, top=2)
    recipe = dataclasses.replace(classification_recipe(best_weights(backbone)), height=64, width=64)
    with torch.no_grad():
        expected = network(recipe(image)[None])[0].double().softmax(0).numpy()
    best = np.argsort(-expected)[:2]
    np.testing.assert_allclose(found.scores, expected[best], atol=1e-4)
    assert found.labels.tolist() == best.tolist()
    known = best_weights(backbone).meta["categories"]
    assert found.names == tuple(known[i] if classes == 1000 else f"class {i}" for i in best)


def test_classes_of_ones_own_classifier_take_the_names_of_labels(tmp_path: Path) -> None:
    network = randomise(models.mobilenet_v2(weights=None, num_classes=3))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "own.safetensors")
    folder = write_folders(tmp_path / "classes", draw_scenes(6))
    options = {"weights": str(tmp_path / "own.safetensors"), "size": 32, "labels": "folders"}
    result = fpnx.predict(folder, tmp_path / "out.csv", **options)
    assert result.scores is not None
    assert result.to_json()["weights"]["heads_ignored"] == 0
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"circle", "square", "triangle"}  # in this order
    assert {(row["label"], row["category_id"]) for row in rows} == {("circle", "0"), ("square", "1"), ("triangle", "2")}
    shutil.rmtree(folder / "square")  # which of the three has no images, nothing says
    with pytest.raises(FpnxError, match="have 2 of the 3 classes of the weights, which have no names: nothing says"):
        fpnx.predict(folder, tmp_path / "other.csv", **options)


def test_a_classifier_of_other_layers_is_refused(tmp_path: Path) -> None:
    state = randomise(models.mobilenet_v2(weights=None, num_classes=3)).state_dict()
    body = {name: value for name, value in state.items() if not name.startswith("classifier")}
    linear = state["classifier.1.weight"]
    cases = {
        r"its head \(classifier.3.weight\) is not the one of mobilenet_v2 \(classifier.1.weight\): rename": {
            "classifier.3.weight": linear
        },
        "own.pth has no head, so that nothing can be predicted": {},
        "own.pth lacks classifier.1.bias": {"classifier.1.weight": linear},
        "own.pth has another shape of classifier.1.weight": {
            "classifier.1.weight": linear[:, :100], "classifier.1.bias": state["classifier.1.bias"]
        },
    }  # fmt: skip
    for message, head in cases.items():
        torch.save({**body, **head}, tmp_path / "own.pth")
        with pytest.raises(FpnxError, match=message):
            fpnx.predict(smooth_image((32, 32), 0), weights=str(tmp_path / "own.pth"), size=32)


def test_timms_classifiers(hub: Path) -> None:
    timm = pytest.importorskip("timm")
    published = timm_weights("timm/mobilenetv3_small_050")[0]
    network = randomise(timm.create_model("mobilenetv3_small_050", pretrained=False))
    safetensors.torch.save_file(network.state_dict(), published.file)
    image = smooth_image((90, 120), 0)
    found = fpnx.predict(image, weights=published.name, offline=True, top=3)
    with torch.no_grad():
        expected = network(published.recipe(image)[None])[0].double().softmax(0).numpy()
    best = np.argsort(-expected)[:3]
    np.testing.assert_allclose(found.scores, expected[best], atol=1e-4)
    assert found.labels.tolist() == best.tolist()
    assert all(found.names)
    assert found.names[0] == timm.data.ImageNetInfo("imagenet-1k").index_to_description(int(best[0]))


def test_a_file_of_ones_own_timm_classifier(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = randomise(timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=4))
    torch.save(network.state_dict(), tmp_path / "own.pth")
    image = smooth_image((90, 120), 0)
    options = {"weights": str(tmp_path / "own.pth"), "backbone": "timm/mobilenetv3_small_050", "size": 64}
    found = fpnx.predict(image, **options)
    recipe = dataclasses.replace(timm_weights(options["backbone"])[0].recipe, height=64, width=64)
    with torch.no_grad():
        expected = network(recipe(image)[None])[0].double().softmax(0).numpy()
    np.testing.assert_allclose(found.scores, np.sort(expected)[::-1], atol=1e-4)
    assert found.names == tuple(f"class {i}" for i in np.argsort(-expected))
