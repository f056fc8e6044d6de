"""Files of trained models without training: a small network with a head whose last layers are made to find much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fpnx.core.config import ModelConfig
from fpnx.labels.annotations import Category
from fpnx.models.factory import NeckPlan, build_model
from fpnx.models.heads.base import Geometry, Head
from fpnx.models.heads.registry import HEADS, create_head
from fpnx.models.heads.trained_file import TrainedModel, save_trained
from tests.helpers.detectors import as_tensor, smooth_image

SIDE = 64
CATEGORIES = (Category(2, "square"), Category(5, "circle"), Category(9, "triangle"))  # those of tests.helpers.shapes
TASKS = {"classify": "classification", "semantic": "semantic"}
# Last layers → the spread of their outputs.
LAST = {
    "rpn.head.cls_logits": 2.0,
    "rpn.head.bbox_pred": 0.2,
    "roi_heads.box_predictor.cls_score": 2.0,
    "roi_heads.box_predictor.bbox_pred": 1.0,
    "roi_heads.mask_predictor.mask_fcn_logits": 3.0,
    "head.classification_head.cls_logits": 1.0,
    "head.regression_head.bbox_reg": 0.3,
    "head.regression_head.bbox_ctrness": 1.0,
}


def trained_model(kind: str, categories: Sequence[Category] = CATEGORIES, **settings: object) -> TrainedModel:
    """A model with a head of this kind for inputs of 64×64, with parameters from a seed."""
    config = ModelConfig(backbone="mobilenet_v2", weights="random", channels=32)
    head_class = HEADS[kind]
    model = build_model(config, plan=NeckPlan(levels=head_class.default_levels, top_block=head_class.default_top_block))
    head = create_head(kind, model, len(categories), seed=1, settings=settings).eval()
    if kind.endswith("rcnn"):
        head.max_detections = 5  # for the time of this function: the file does not keep it
    image = as_tensor(smooth_image((SIDE, SIDE), seed=100))[None]
    with torch.no_grad():
        scale = {name: level.std().clamp_min(1e-6) for name, level in model(image).items()}
        for name, block in zip(model.fpn.levels, getattr(model.fpn, "layer_blocks", []), strict=False):
            if name in scale:
                block[0].weight.div_(scale[name])
                block[0].bias.div_(scale[name])
        levels = model(image)
    for layer, spread in LAST.items():
        _rescale(head, levels, layer, spread)
    return TrainedModel(
        model=model, head=head, categories=tuple(categories), task=TASKS.get(kind, "detection"), facts={"epochs": 1}
    )


def trained_file(path: Path, kind: str, categories: Sequence[Category] = CATEGORIES, **settings: object) -> Path:
    """`path`, with such a model in it."""
    save_trained(path, trained_model(kind, categories, **settings))
    return path


def _rescale(head: Head, levels: dict[str, Tensor], layer: str, spread: float) -> None:
    modules = dict(head.named_modules())
    if layer not in modules:
        return
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = modules[layer].register_forward_hook(lambda module, inputs, output: seen.append(output.flatten()))
        head.predict(levels, Geometry(padded=(SIDE, SIDE), sizes=((SIDE, SIDE),)))
        handle.remove()
        modules[layer].bias.zero_()
        modules[layer].weight.mul_(spread / torch.cat(seen).std().clamp_min(1e-6))
