"""Checkpoints of effdet (EfficientDet in PyTorch): names, backbones, settings and recipes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fpnx.core.errors import FpnxError
from fpnx.models.backbones.factory import check_backbone_name, parameter_shapes
from fpnx.models.backbones.registry import TIMM
from fpnx.models.preprocessing import Recipe

__all__ = ["effdet_backbone", "effdet_recipe", "effdet_settings", "from_effdet"]

FIRST_LEVEL = 3
# Channels of the pyramid → the backbones of effdet's models with so many, without and with squeeze-and-excitation.
BACKBONES = {
    64: ("efficientnet_lite0", "efficientnet_b0"),
    88: ("efficientnet_lite1", "efficientnet_b1"),
    112: ("efficientnet_lite2", "efficientnet_b2"),
    128: ("efficientnetv2_rw_t",),
    160: ("efficientnet_lite3", "efficientnet_b3"),
    200: ("efficientnet_lite3",),
    224: ("efficientnet_lite4", "efficientnet_b4"),
    256: ("efficientnetv2_rw_s",),
    288: ("efficientnet_b5",),
    384: ("efficientnet_b6", "efficientnet_b7"),
}
# Side of the images that a model with this backbone was trained with.
SIDES = {
    "efficientnet_b0": 512, "efficientnet_b1": 640, "efficientnet_b2": 768, "efficientnet_b3": 896,
    "efficientnet_b4": 1024, "efficientnet_b5": 1280, "efficientnet_b6": 1280, "efficientnet_b7": 1536,
    "efficientnet_lite0": 320, "efficientnet_lite1": 384, "efficientnet_lite2": 448, "efficientnet_lite3": 512,
    "efficientnet_lite4": 640, "efficientnetv2_rw_t": 768, "efficientnetv2_rw_s": 1024,
}  # fmt: skip
DEFAULT_SIDE = 640
HALF = (0.5, 0.5, 0.5)


def from_effdet(state: Mapping[str, Tensor]) -> Callable[[str], str | None]:
    """The function that renames effdet's keys to fpnx's (None: not known).

    Raises:
        FpnxError: the pyramid is another one than a BiFPN with separable convolutions.
    """
    top = _levels(state) - 1

    def rename(name: str) -> str | None:
        if name.startswith("backbone."):
            return f"body.{name[9:]}"
        if match := re.fullmatch(r"fpn\.resample\.\d+\.conv\.(conv|bn)\.(\w+)", name):
            return f"fpn.extra_block.{_place(match[1])}.{match[2]}"
        match = re.fullmatch(r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.(.+)", name)
        if match is None:
            return None
        # Nodes go from the coarsest level but one to the finest, and back.
        j, inner = int(match[2]), match[3]
        level = top - 1 - j if j < top else j - top + 1
        node = f"fpn.cells.{match[1]}.{'top_down' if j < top else 'bottom_up'}.{level if j < top else level - 1}"
        if inner == "combine.edge_weights":
            return f"{node}.weights"
        if match := re.fullmatch(r"combine\.resample\.(\d+)\.conv\.(conv|bn)\.(\w+)", inner):
            own = int(match[1]) == level
            return f"{node}.projections.0.{_place(match[2])}.{match[3]}" if own else None
        if match := re.fullmatch(r"after_combine\.conv\.(conv_dw|conv_pw|bn)\.(\w+)", inner):
            places = {"conv_dw": "depthwise", "conv_pw": "pointwise.0", "bn": "pointwise.1"}
            return f"{node}.{places[match[1]]}.{match[2]}"
        return None

    return rename


def effdet_backbone(state: Mapping[str, Tensor], requested: str | None) -> str:
    """The timm network that the backbone in `state` (`body.*`, `fpn.*`) is of: the requested one, or that of effdet's
    model with such a pyramid. Where convolutions before norms have biases, it is one of TensorFlow's (`tf_`).

    Raises:
        FpnxError: it is none of effdet's own models, or timm is not installed.
    """
    if requested is not None:
        return requested
    width = state["fpn.cells.0.top_down.0.depthwise.weight"].shape[0]
    prefix = f"{TIMM}tf_" if "fpn.cells.0.top_down.0.pointwise.0.bias" in state else TIMM
    shapes = {name: tuple(value.shape) for name, value in state.items() if name.startswith("body.")}
    for name in BACKBONES.get(width, ()):
        expected = parameter_shapes(check_backbone_name(prefix + name))
        if shapes == {
            f"body.{key}": shape for key, shape in expected.items() if not key.endswith("num_batches_tracked")
        }:
            return prefix + name
    raise FpnxError("its backbone is none of effdet's own models: name it with --backbone, such as timm/resnet50")


def effdet_settings(state: Mapping[str, Tensor], backbone: str) -> dict[str, Any]:
    """The settings of a BiFPN that its parameters do not show, by effdet's configs."""
    return {
        "padding": "same" if "fpn.cells.0.top_down.0.pointwise.0.bias" in state else "symmetric",
        "activation": "relu6" if _base(backbone).startswith("efficientnet_lite") else "silu",
        "resampling": "bilinear" if _base(backbone).startswith("efficientnetv2_rw") else "pool",
    }


def effdet_recipe(backbone: str) -> Recipe:
    """effdet's preprocessing: the longer side to the model's size, and padded to a square."""
    side = SIDES.get(_base(backbone), DEFAULT_SIDE)
    recipe = Recipe(sizing="aspect", short_side=side, long_side=side, rounding="scaled-floor", pad_multiple=side)
    is_lite = _base(backbone).startswith("efficientnet_lite")
    return Recipe(**{**recipe.to_json(), "mean": HALF, "std": HALF}) if is_lite else recipe


def _base(backbone: str) -> str:
    return backbone.removeprefix(TIMM).removeprefix("tf_").partition(".")[0]


def _place(module: str) -> int:
    return ("conv", "bn").index(module)


def _levels(state: Mapping[str, Tensor]) -> int:
    """How many levels the pyramid has, by its first cell."""
    inputs: dict[int, int] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"fpn\.cell\.0\.fnode\.(\d+)\.(combine\.edge_weights)?.*", name):
            j = int(match[1])
            inputs[j] = value.numel() if match[2] else inputs.get(j, 0)
    nodes = len(inputs)
    top = nodes // 2
    expected = [2] * top + [3] * (top - 1) + [2]
    found = [inputs.get(j, 0) for j in range(nodes)]
    if nodes < 2 or nodes % 2 or (any(found) and found != expected):
        raise FpnxError(
            "its pyramid merges levels in another order than a BiFPN (effdet's quad FPN or PAN): take another"
        )
    if not any(re.match(r"fpn\.cell\.0\.fnode\.0\.after_combine\.conv\.conv_dw\.", name) for name in state):
        raise FpnxError("its BiFPN has plain convolutions, fpnx's has separable ones: take another file")
    return top + 1
