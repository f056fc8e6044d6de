"""The file of a trained model: torchvision's detectors load it, and fpnx reads its pyramid and its head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import fpnx
from fpnx.core.config import ModelConfig
from fpnx.core.errors import FpnxError
from fpnx.core.provenance import describe_pyramid
from fpnx.labels.annotations import Category
from fpnx.models.factory import NeckPlan, build_model
from fpnx.models.heads.base import Detections, Geometry, Target
from fpnx.models.heads.registry import HEADS, create_head
from fpnx.models.heads.trained_file import TrainedModel, load_trained, save_trained

CATEGORIES = (Category(id=3, name="cat"), Category(id=7, name="dog"))
TASKS = {"classify": "classification", "semantic": "semantic"}


def trained_of(
    kind: str, *, variant: str = "full", settings: dict[str, Any] | None = None, **options: Any
) -> TrainedModel:
    config = ModelConfig(**{"backbone": "mobilenet_v2", "weights": "random", "channels": 32, **options})
    head = HEADS[kind]
    plan = NeckPlan(levels=head.default_levels, top_block=head.default_top_block, variant=variant)
    model = build_model(config, plan=plan)
    with torch.no_grad():  # as if it had been trained: levels of a deviation near 1, by changed parameters
        levels = model(torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(5)))
        scale = 1 / torch.stack([level.std() for level in levels.values()]).max()
        for block in getattr(model.fpn, "layer_blocks", []):
            block[0].weight.mul_(scale)
    return TrainedModel(
        model=model,
        head=create_head(kind, model, len(CATEGORIES), seed=1, settings=settings).eval(),
        categories=CATEGORIES,
        task=TASKS.get(kind, "detection"),
        scores={"AP": 0.25, "by class": {"cat": 0.5, "dog": None}},
        facts={"epochs": 3, "labels": "coco"},
    )


def torchvisions(kind: str, classes: int) -> nn.Module:
    """torchvision's own detector with a ResNet-50, as its builders make it."""
    options = {"min_size": 96, "max_size": 160}
    if kind in ("fcos", "retinanet"):
        backbone = resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
        )
        return {"fcos": detection.FCOS, "retinanet": detection.RetinaNet}[kind](backbone, classes + 1, **options)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    builder = {"faster_rcnn": detection.FasterRCNN, "mask_rcnn": detection.MaskRCNN}[kind]
    return builder(backbone, classes + 1, box_detections_per_img=20, **options)


@pytest.mark.parametrize(
    "kind",
    ["fcos", "faster_rcnn", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("retinanet", "mask_rcnn"))],
)
def test_torchvisions_detectors_load_it_and_find_the_same(kind: str, tmp_path: Path) -> None:
    trained = trained_of(kind, backbone="resnet50", channels=None)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in trained.head.named_parameters():
            if name.split(".")[-2] in ("cls_logits", "bbox_reg", "bbox_ctrness", "bbox_pred", "cls_score"):
                value.copy_((0.05 if name.endswith("weight") else 0.01) * torch.randn(value.shape, generator=generator))
    if kind in ("fcos", "retinanet"):  # torchvision's may find the background class, which is none
        with torch.no_grad():
            trained.head.head.classification_head.cls_logits.bias.view(-1, len(CATEGORIES) + 1)[:, 0] = -1e4
    file = tmp_path / "trained.safetensors"
    save_trained(file, trained)

    theirs = torchvisions(kind, len(CATEGORIES))
    theirs.load_state_dict(load_file(file), strict=True)
    theirs.eval()
    images = [torch.rand(3, 96, 150, generator=generator), torch.rand(3, 96, 128, generator=generator)]
    for module in theirs.modules():  # torchvision's frozen batch norms add nothing but an epsilon
        assert getattr(module, "eps", 1e-5) == 1e-5
    loaded = load_trained(file)
    if kind.endswith("rcnn"):
        loaded.head.max_detections = 20
    with torch.no_grad():
        expected = theirs(images)
        batch, _ = theirs.transform(images)
        padded = tuple(batch.tensors.shape[-2:])
        levels = loaded.model(batch.tensors)
        found = loaded.head.predict(levels, Geometry(padded=padded, sizes=tuple(batch.image_sizes)))
    assert list(levels) == list(HEADS[kind].default_levels)
    for ours, reference in zip(found, expected, strict=True):
        assert isinstance(ours, Detections)
        assert len(reference["boxes"]) >= 10
        assert (ours.boxes - reference["boxes"]).abs().max() <= 0.05
        assert (ours.scores - reference["scores"]).abs().max() <= 1e-4
        assert torch.equal(ours.labels + 1, reference["labels"])
        if kind == "mask_rcnn":
            assert ours.masks is not None
            masks = reference["masks"][:, 0]
            assert (ours.masks[:, : masks.shape[1], : masks.shape[2]] - masks).abs().max() <= 1e-3


def levels_of(model: nn.Module, side: int = 64) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize(
    ("kind", "options", "levels", "neck"),
    [
        ("fcos", {}, "P3-P7", {"first_level": 3, "top_block": "p5"}),
        ("faster_rcnn", {}, "P2-P6", {"first_level": 2, "top_block": "pool"}),
        ("semantic", {"pyramid": "pafpn"}, "P2-P5", {"first_level": 2, "top_block": None}),
        ("retinanet", {"pyramid": "bifpn"}, "P3-P7", {}),
        ("classify", {"levels": "P4"}, "P4", {"first_level": 4, "top_block": None}),
        ("fcos", {"levels": "P3-P5"}, "P3-P5", {"first_level": 3, "top_block": None}),
        ("classify", {"pyramid": "simple", "tap": "C4"}, "P2-P5", {}),
        ("fcos", {"variant": "no-lateral"}, "P3-P7", {"variant": "no-lateral"}),
        ("semantic", {"variant": "no-top-down"}, "P2-P5", {"variant": "no-top-down"}),
    ],
    ids=str,
)
def test_the_pyramid_and_the_head_come_back(
    kind: str, options: dict[str, Any], levels: str, neck: dict[str, Any], tmp_path: Path
) -> None:
    trained = trained_of(kind, **options)
    file = tmp_path / "trained.safetensors"
    save_trained(file, trained)
    assert not [name for name in load_file(file) if name.startswith(("body.", "fpn."))]

    model = fpnx.create_model(weights=str(file))
    asked = fpnx.create_model("mobilenet_v2", weights="random", levels=levels, pyramid=options.get("pyramid"),
                              tap=options.get("tap")).levels  # fmt: skip
    assert model.levels == trained.model.levels == asked
    expected = levels_of(trained.model)
    for name, level in levels_of(model).items():
        assert torch.equal(level, expected[name])
    for name, value in neck.items():
        found = min(model.fpn.in_channels) if name == "first_level" else getattr(model.fpn, name)
        assert found == value, name
    said = describe_pyramid(options.get("pyramid", "fpn"), model.weights.info)
    assert said.endswith("trained (fpnx train)")
    assert ("variant" in neck) == said.startswith(f"fpn {neck.get('variant')}, ")
    assert str(model.weights.fpn) == "trained (fpnx train)"
    assert str(model.weights.body) == "untrained (random, seed 0)"
    assert model.weights.framework == "fpnx"
    assert model.weights.ignored == len(trained.head.state_dict())

    loaded = load_trained(file)
    assert (loaded.categories, loaded.task, loaded.scores, loaded.facts) == (
        CATEGORIES, trained.task, trained.scores, trained.facts,
    )  # fmt: skip
    assert loaded.head.kind == kind
    assert not loaded.model.training
    assert not loaded.head.training
    state = loaded.head.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.head.state_dict().items())
    again = tmp_path / "again.safetensors"
    save_trained(again, loaded, parts=())
    assert load_file(again).keys() == load_file(file).keys()
    assert fpnx.create_model(weights=str(again)).weights.fpn == model.weights.fpn


@pytest.mark.parametrize(
    ("options", "levels"), [({"levels": "C4"}, ("C4",)), ({"levels": "C3-C5"}, ("C3", "C4", "C5"))], ids=str
)
def test_a_head_on_taps_needs_no_neck(options: dict[str, Any], levels: tuple[str, ...], tmp_path: Path) -> None:
    trained = trained_of("fcos", **{**options, "channels": None}, settings={"channels": 32, "convolutions": 1})
    file = tmp_path / "taps.safetensors"
    save_trained(file, trained)
    names = load_file(file)
    assert not [name for name in names if name.startswith("backbone.fpn.")]
    assert {name for name in names if name.startswith("adapters.") and name.endswith("weight")} == {
        f"adapters.{level}.weight" for level in levels
    }
    loaded = load_trained(file)
    assert loaded.model.levels == loaded.head.levels == levels
    assert not list(loaded.model.fpn.parameters())
    expected = levels_of(trained.model)
    model = fpnx.create_model(weights=str(file))
    assert model.levels == levels
    for name, level in levels_of(model).items():
        assert torch.equal(level, expected[name])
    assert fpnx.create_model(weights=str(file), levels="P4").weights.fpn.trained is False


def test_a_head_on_an_image_pyramid(tmp_path: Path) -> None:
    trained = trained_of("classify", pyramid="image", tap="C4", channels=None)
    file = tmp_path / "image.safetensors"
    save_trained(file, trained)
    loaded = load_trained(file)
    assert loaded.model.fpn.kind == "image"
    assert loaded.head.levels == loaded.model.levels == ("P2", "P3", "P4")
    assert str(loaded.model.weights.fpn) == "no parameters"
    expected = levels_of(trained.model)
    assert all(torch.equal(level, expected[name]) for name, level in levels_of(loaded.model).items())


def test_extraction_takes_the_pyramid_and_says_that_it_is_trained(photos: Path, tmp_path: Path) -> None:
    trained = trained_of("fcos")
    file = tmp_path / "trained.safetensors"
    save_trained(file, trained)
    fpnx.extract(photos, tmp_path / "out.h5", weights=str(file), size=64)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store.levels == ("P3", "P4", "P5", "P6", "P7")
        info = store.provenance.weights.to_json()
        assert info["pyramid"] == {"trained": True, "source": "fpnx train"}
        assert info["heads_ignored"] == len(trained.head.state_dict())


def test_the_description_stands_in_the_metadata(tmp_path: Path) -> None:
    trained = trained_of("retinanet", settings={"convolutions": 2})
    file = tmp_path / "trained.safetensors"
    save_trained(file, trained, parts=("body", "fpn"), source="mine")
    with safetensors.safe_open(file, framework="pt") as handle:
        about = json.loads(handle.metadata()["fpnx"])
    assert about["format"] == "fpnx-weights"
    assert about["head"] == {"kind": "retinanet", "settings": {"channels": 32, "convolutions": 2}}
    assert about["classes"] == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    assert about["parts"] == {"body": [True, "mine"], "fpn": [True, "mine"]}
    assert about["scores"]["by class"] == {"cat": 0.5, "dog": None}
    assert (about["backbone"], about["levels"]) == ("mobilenet_v2", ["P3", "P4", "P5", "P6", "P7"])


def test_one_step_of_training_goes_through_a_loaded_file(tmp_path: Path) -> None:
    file = tmp_path / "trained.pth"
    save_trained(file, trained_of("fcos"))
    loaded = load_trained(file)
    loaded.head.train()
    levels = loaded.model(torch.rand(1, 3, 64, 64))
    target = Target(boxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([1]))
    losses = loaded.head.losses(levels, Geometry(padded=(64, 64), sizes=((64, 64),)), [target])
    sum(losses.values()).backward()
    without = [name for name, value in loaded.model.fpn.named_parameters() if value.grad is None]
    assert not without, "parameters that no level needs"


def test_files_without_a_whole_head_are_refused(tmp_path: Path) -> None:
    trained = trained_of("classify")
    plain, file = tmp_path / "plain.safetensors", tmp_path / "trained.safetensors"
    fpnx.save_weights(trained.model, plain)
    with pytest.raises(FpnxError, match=r"plain\.safetensors has no head, only a backbone or a pyramid"):
        load_trained(plain)
    save_trained(file, trained)
    with safetensors.safe_open(file, framework="pt") as handle:
        about = json.loads(handle.metadata()["fpnx"])
    state = load_file(file)

    def broken(changes: dict[str, Any], state: dict[str, Tensor] = state) -> Path:
        text = json.dumps({**about, **changes})
        safetensors.torch.save_file(state, tmp_path / "broken.safetensors", metadata={"fpnx": text})
        return tmp_path / "broken.safetensors"

    for changes, message in (
        ({"head": {"kind": "yolo", "settings": {}}}, r"broken\.safetensors: head 'yolo' is unknown: take fcos, "),
        ({"head": {"kind": "classify"}}, "its description has no whole head"),
        ({"head": ["classify"]}, "its description has no whole head"),
        ({"classes": []}, "its description has no whole head"),
        ({"task": "depth"}, "its description has no whole head"),
        ({"head": {"kind": "classify", "settings": {"depth": 3}}}, "head classify has no setting 'depth'"),
        ({"classes": [*about["classes"], {"id": 9, "name": "cow"}]}, "parameters of its head do not fit head classify"),
        ({"variant": "no-way"}, "its description has variant no-way, which fpnx never wrote"),
        ({"variant": "no-lateral"}, "unexpected"),
    ):
        with pytest.raises(FpnxError, match=message):
            load_trained(broken(changes))
    with pytest.raises(FpnxError, match=r"do not fit head classify: head\.bias"):
        load_trained(broken({}, {name: value for name, value in state.items() if name != "head.bias"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variant": "no-lateral", "pyramid": "pafpn"},
            "neck variant no-lateral is for a new fpn, not for pyramid pafpn",
        ),
        ({"variant": "no-top-down", "levels": "C4", "channels": None}, "neck variant no-top-down is for a new fpn"),
        ({"levels": "P2-P9"}, "level"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        trained_of("fcos", **options)


def test_a_plan_changes_nothing_for_others() -> None:
    """Models that are made without a plan have the same parameters and the same fingerprint as before."""
    config = ModelConfig(backbone="mobilenet_v2", weights="random", levels="P3-P5")
    whole, planned = build_model(config), build_model(config, plan=NeckPlan())
    assert sorted(whole.fpn.in_channels) == [2, 3, 4, 5]
    assert sorted(planned.fpn.in_channels) == [3, 4, 5]
    assert whole.identity()["first_level"] == "P2"
    assert "variant" not in whole.identity()
    for ours, theirs in zip(levels_of(planned).values(), levels_of(whole).values(), strict=True):
        assert torch.equal(ours, theirs)
