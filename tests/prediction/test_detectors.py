"""Published detectors: what `predict` finds is what torchvision's own model finds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from fpnx.commands.predict import predict_to_file
from fpnx.core.errors import FpnxError
from fpnx.core.mask_runs import decode_mask
from fpnx.models.weights.torchvision import DETECTORS, detector_weights
from tests.helpers.detectors import found_by, lively_detector, matched, save_published, smooth_image

SIZES = ((96, 128), (120, 100), (200, 170), (96, 97), (110, 150))
QUICK = ("fasterrcnn_mobilenet_v3_large_320_fpn",)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """The smallest detector, which tests copy."""
    return lively_detector(QUICK[0])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


def save_images(folder: Path, sizes: tuple[tuple[int, int], ...]) -> list:
    folder.mkdir()
    images = [smooth_image(size, seed) for seed, size in enumerate(sizes)]
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return images


def results_by_image(path: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for result in json.loads(path.read_text()):
        found.setdefault(result["file_name"], []).append(result)
    return found


def compare(results: list[dict], expected: dict[str, torch.Tensor], least: int) -> None:
    """All that torchvision found is there, and no more."""
    corners = np.array([result["bbox"] for result in results]).reshape(-1, 4)
    boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1)
    scores = np.array([result["score"] for result in results])
    labels = np.array([result["category_id"] for result in results])
    assert len(results) == len(expected["scores"])
    assert len(results) >= least
    pairs = matched(boxes, scores, labels, expected)
    assert len(pairs) == len(results)
    for ours, theirs in pairs:
        if "masks" in expected:
            mask = decode_mask(results[ours]["segmentation"])
            assert (mask != (expected["masks"][theirs, 0] > 0.5).numpy()).mean() < 1e-3
        if "keypoints" in expected:
            points = np.array(results[ours]["keypoints"]).reshape(-1, 3)
            near = np.abs(points - expected["keypoints"][theirs].numpy()).max(axis=1) <= 0.05
            assert near.mean() > 0.9  # of two equal maxima of a heatmap either may be taken


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS]
)
def test_results_equal_torchvisions(name: str, hub: Path, tmp_path: Path) -> None:
    network = lively_detector(name)
    save_published(hub, name, network)
    images = save_images(tmp_path / "images", SIZES)
    options: dict[str, Any] = {"weights": name, "short_side": 96, "long_side": 160, "offline": True}
    if hasattr(network, "roi_heads") and (network.roi_heads.has_mask() or network.roi_heads.has_keypoint()):
        network.roi_heads.detections_per_img = options["max_detections"] = 15  # more would take minutes
    result = predict_to_file(tmp_path / "images", tmp_path / "out.json", **options)
    found = results_by_image(tmp_path / "out.json")
    assert (result.run.done, result.run.images) == (len(SIZES), len(SIZES))
    for i, image in enumerate(images):
        (expected,) = found_by(network, [image])
        compare(found[f"{i}.png"], expected, least=15)
    names = models.get_model_weights(name).DEFAULT.meta["categories"]
    # MobileNetV3's detectors pool all boxes from the first of two levels of one stride.
    levels = {"0"} if "mobilenet" in name else {f"P{k}" for k in range(2, 8)}
    assert {each["level"] for results in found.values() for each in results} <= levels
    for results in found.values():
        assert all(each["category_name"] == names[each["category_id"]] for each in results)
    if name.startswith(("maskrcnn", "keypointrcnn")):
        assert all(("segmentation" if name.startswith("mask") else "keypoints") in each for each in found["0.png"])


def test_a_batch_equals_torchvisions_batch(small: nn.Module, hub: Path, tmp_path: Path) -> None:
    name = QUICK[0]
    network = copy.deepcopy(small)
    save_published(hub, name, network)
    images = save_images(tmp_path / "images", ((96, 100), (96, 128), (90, 120), (96, 110)))
    predict_to_file(
        tmp_path / "images", tmp_path / "out.json", weights=name, short_side=96, long_side=160, batch_size=4, cpus=1
    )
    found = results_by_image(tmp_path / "out.json")
    for i, expected in enumerate(found_by(network, images)):
        compare(found[f"{i}.png"], expected, least=20)


def test_threshold_and_number_of_boxes(small: nn.Module, hub: Path, tmp_path: Path) -> None:
    name = QUICK[0]
    network = copy.deepcopy(small)
    save_published(hub, name, network)
    (image,) = save_images(tmp_path / "images", ((96, 128),))
    options = {"weights": name, "short_side": 96, "long_side": 160}
    predict_to_file(tmp_path / "images", tmp_path / "out.json", threshold=0.3, max_detections=7, **options)
    network.roi_heads.score_thresh, network.roi_heads.detections_per_img = 0.3, 7
    (expected,) = found_by(network, [image])
    compare(results_by_image(tmp_path / "out.json")["0.png"], expected, least=7)


def test_a_detectors_own_file_needs_no_name(small: nn.Module, hub: Path, tmp_path: Path) -> None:
    network = copy.deepcopy(small)
    network.rpn.score_thresh, network.rpn._pre_nms_top_n["testing"] = 0.0, 1000
    network.rpn._post_nms_top_n["testing"] = 1000
    torch.save({"model": {f"module.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "own.pth")
    (image,) = save_images(tmp_path / "images", ((96, 128),))
    predict_to_file(
        tmp_path / "images", tmp_path / "out.json", weights=str(tmp_path / "own.pth"), short_side=96, long_side=160
    )
    (expected,) = found_by(network, [image])
    compare(results_by_image(tmp_path / "out.json")["0.png"], expected, least=20)


def test_a_fine_tuned_detector_has_its_own_number_of_classes(small: nn.Module, hub: Path, tmp_path: Path) -> None:
    network = copy.deepcopy(small)
    network.rpn.score_thresh, network.rpn._pre_nms_top_n["testing"] = 0.0, 1000
    network.rpn._post_nms_top_n["testing"] = 1000
    predictor, boxes = network.roi_heads.box_predictor, network.roi_heads.box_predictor.bbox_pred
    predictor.cls_score = cut(predictor.cls_score, 3)
    predictor.bbox_pred = cut(boxes, 12)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    (image,) = save_images(tmp_path / "images", ((96, 128),))
    predict_to_file(
        tmp_path / "images", tmp_path / "out.json", weights=str(tmp_path / "own.pth"), short_side=96, long_side=160
    )
    (expected,) = found_by(network, [image])
    results = results_by_image(tmp_path / "out.json")["0.png"]
    compare(results, expected, least=20)
    assert {each["category_name"] for each in results} == {"class 1", "class 2"}


def cut(layer: nn.Module, rows: int) -> nn.Linear:
    """The first outputs of a linear layer."""
    smaller = nn.Linear(layer.in_features, rows)
    smaller.load_state_dict({name: value[:rows] for name, value in layer.state_dict().items()})
    return smaller


def test_a_head_that_torchvision_does_not_build_is_refused(small: nn.Module, hub: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "images", ((32, 32),))
    whole = small.state_dict()
    cases = {
        "its 4 anchors a cell on 3 levels": {
            key: value[:4] if key.startswith("rpn.head.cls_logits") else value for key, value in whole.items()
        },
        "not built as torchvision's: 3 names do not fit": {
            key.replace("fc7", "fc8"): value for key, value in whole.items() if "fc7.bias" not in key
        },
        "size mismatch": {key: value[:, :100] if "fc6.weight" in key else value for key, value in whole.items()},
    }
    for message, state in cases.items():
        torch.save(state, tmp_path / "own.pth")
        with pytest.raises(FpnxError, match=message):
            predict_to_file(tmp_path / "images", tmp_path / "out.json", weights=str(tmp_path / "own.pth"))


def test_weights_without_a_head_are_refused(hub: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "images", ((32, 32),))
    with pytest.raises(FpnxError, match="random has no head, so that nothing can be predicted: take weights of a"):
        predict_to_file(tmp_path / "images", tmp_path / "out.json", weights="random", backbone="mobilenet_v2")
    assert not list(tmp_path.glob("out.*"))


def test_detectors_are_named_by_torchvisions_functions() -> None:
    assert detector_weights("fcos_resnet50_fpn") == "FCOS_ResNet50_FPN_Weights.COCO_V1"
    assert detector_weights("maskrcnn_resnet50_fpn_v2") == "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1"
