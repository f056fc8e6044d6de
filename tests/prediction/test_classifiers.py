"""Whole classifiers of torchvision and timm: a prediction is the plain model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import models

import fpnx
from fpnx.models.weights.timm import timm_weights
from fpnx.models.weights.torchvision import best_weights, classification_recipe
from tests.helpers.detectors import smooth_image
from tests.helpers.reference_networks import randomise


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


def test_timms_classifiers(hub: Path) -> None:
    timm = pytest.importorskip("timm")
    published = timm_weights("timm/mobilenetv3_small_050")[0]
    network = randomise(timm.create_model("mobilenetv3_small_050", pretrained=False))
    import safetensors.torch

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
