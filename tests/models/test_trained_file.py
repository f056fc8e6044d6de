"""The file of a trained model: torchvision's detectors load it, and fpnx reads its pyramid and its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fpnx.core.config import ModelConfig
from fpnx.labels.annotations import Category
from fpnx.models.factory import NeckPlan, build_model
from fpnx.models.heads.base import Detections, Geometry
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


@pytest.mark.parametrize("kind", ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"])
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
