"""Resolves facts that parameters do not show, such as the pixel order: from the file, options or framework defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from fpnx.core.config import CheckpointConfig, ModelConfig
from fpnx.core.errors import FpnxError
from fpnx.core.provenance import Setting
from fpnx.models.preprocessing import Recipe
from fpnx.models.weights.effdet import effdet_recipe
from fpnx.models.weights.neck_keys import FpnKeys
from fpnx.models.weights.state_dicts import StateDictLayout
from fpnx.models.weights.torchvision import DETECTOR_RECIPE, native_recipe
from fpnx.models.weights.vitdet import VITDET_SIDE

__all__ = [
    "DETECTRON2_RECIPE",
    "MMDETECTION_RECIPE",
    "OPENCV_NOTE",
    "option_of",
    "resolve_facts",
    "resolve_top_block",
    "facts_in_file",
]

DETECTRON2_RECIPE = Recipe(
    sizing="aspect", short_side=800, long_side=1333, rounding="stepwise-half-up", pad_multiple=32,
    value_range=255.0, order="BGR", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0),
)  # fmt: skip
OPENCV_NOTE = "mmdetection resizes with OpenCV, which rounds pixels to whole numbers; plain is nearest to it"
MMDETECTION_RECIPE = replace(
    DETECTRON2_RECIPE,
    rounding="scaled-half-up",
    backend="tensor",
    order="RGB",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
)
VITDET_RECIPE = replace(
    MMDETECTION_RECIPE,
    short_side=VITDET_SIDE,
    long_side=VITDET_SIDE,
    rounding=DETECTRON2_RECIPE.rounding,
    backend="pillow",
    pad_multiple=VITDET_SIDE,
)
RESNEXT_STD = (57.375, 57.12, 58.395)  # of detectron2's X-101-32x8d
BACKENDS = {"antialiased": "pillow", "plain": "tensor"}


def facts_in_file(layout: StateDictLayout, description: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """The facts that the file states: in fpnx's description, in a config, or by the recipe of published weights."""
    facts = dict(layout.facts)
    facts |= {name: description[name] for name in ("norm_eps", "stride_in_1x1", "p7_relu") if name in description}
    if "top_block" in description:
        facts["top_block"] = description["top_block"] or "none"
    if recipe is not None:
        facts |= _facts_of(recipe)
    return facts


def resolve_facts(
    layout: StateDictLayout,
    facts: Mapping[str, Any],
    recipe: Recipe | None,
    config: ModelConfig,
    backbone: str,
    eps: float,
) -> tuple[Recipe, dict[str, Any], dict[str, Setting]]:
    """Resolve each field of `CheckpointConfig`: the file's `facts`, else an option, else the framework's default.

    Args:
        recipe: the recipe that the file states; None takes the framework's default, with the facts.
        eps: epsilon of the batch norms in files of torchvision's detectors.

    Returns:
        The recipe; name → value; name → value and its source.

    Raises:
        FpnxError: an option contradicts the file, or has no effect on this network.
    """
    default_recipe, defaults = _defaults(layout, backbone, eps)
    settings: dict[str, Setting] = {}
    for each in fields(CheckpointConfig):
        option = getattr(config, each.name)
        if each.name not in defaults:
            if option is not None:
                raise FpnxError(f"{option_of(each.name)} does not matter for {backbone} as this file has it: drop it")
        elif each.name in facts:
            if option not in (None, facts[each.name]):
                stated = "the network's own" if facts[each.name] is None else facts[each.name]
                raise FpnxError(f"{option_of(each.name)} {option} contradicts it, it says {stated}: drop it")
            settings[each.name] = Setting(facts[each.name], "file")
        elif option is not None:
            settings[each.name] = Setting(option, "option")
        else:
            settings[each.name] = Setting(defaults[each.name], "default")
    values = {name: value for name, (value, _) in settings.items()}
    sizes = {name: facts[name] for name in ("short_side", "long_side", "pad_multiple") if name in facts}
    recipe = replace(
        recipe or replace(default_recipe, **sizes),
        order=values["pixel_order"],
        backend=BACKENDS[values["resampling"]],
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
    )
    return recipe, values, settings


def resolve_top_block(
    layout: StateDictLayout, keys: FpnKeys, facts: Mapping[str, Any], asked: str | None, unstrided: bool
) -> tuple[str | None, str]:
    """Where the levels above the last come from, and who says so: shapes, the file, an option, the framework."""
    stated = facts.get("top_block")
    if keys.top_in is None:
        if asked not in (None, "pool"):
            raise FpnxError(f"it has no top block {asked}: its P6 can come by pool only")
        if asked or stated:
            value, who = (asked, "option") if asked else (stated, "file")
        else:
            own = layout.framework == "fpnx" and not unstrided
            value, who = "none" if own else "pool", "default"
        return (None if value == "none" else value), who
    fitting = ["c5"] * (keys.top_in == keys.in_channels[-1]) + ["p5", "m5"] * (keys.top_in == keys.channels)
    for value in (stated, asked):
        if value is not None and value not in fitting:
            raise FpnxError(f"top block {value} contradicts it: by its shapes it has {' or '.join(fitting) or 'none'}")
    if stated is not None and asked not in (None, stated):
        raise FpnxError(f"top block {asked} contradicts it, it says {stated}: drop the option")
    if stated is not None or len(fitting) == 1:
        return stated or fitting[0], "file"
    if not fitting:
        raise FpnxError(f"its P6 takes {keys.top_in} channels, but C5 has {keys.in_channels[-1]}, P5 {keys.channels}")
    return (asked, "option") if asked else (fitting[0], "default")


def option_of(fact: str) -> str:
    """The command-line option for a field of `CheckpointConfig`."""
    return "--" + fact.replace("_", "-")


def _facts_of(recipe: Recipe) -> dict[str, Any]:
    resampling = next(name for name, backend in BACKENDS.items() if backend == recipe.backend)
    return {"pixel_order": recipe.order, "resampling": resampling, "mean": recipe.mean, "std": recipe.std}


def _defaults(layout: StateDictLayout, backbone: str, detection_eps: float) -> tuple[Recipe, dict[str, Any]]:
    """The framework's default recipe, and its defaults of the facts that matter for this network."""
    state, framework = layout.state, layout.framework
    conv2 = state.get("body.layer1.0.conv2.weight")
    is_bottleneck = "body.layer1.0.conv3.weight" in state
    is_grouped = conv2 is not None and conv2.shape[0] != conv2.shape[1]
    if framework in ("detectron2", "caffe2"):
        recipe, eps, relu, in_1x1 = DETECTRON2_RECIPE, 1e-5, True, not is_grouped
        recipe = replace(recipe, std=RESNEXT_STD) if is_grouped else recipe
    elif framework == "detectron2 backbone":  # converted from torchvision, with torchvision's preprocessing
        recipe, eps, relu, in_1x1 = (
            replace(MMDETECTION_RECIPE, backend="pillow", rounding=DETECTRON2_RECIPE.rounding),
            1e-5,
            True,
            False,
        )
    elif framework == "detectron2 ViTDet":
        recipe, eps, relu, in_1x1 = VITDET_RECIPE, None, True, False
    elif framework == "mmdetection":
        recipe, eps, relu, in_1x1 = MMDETECTION_RECIPE, 1e-5, False, False
        if layout.pyramid is not None and layout.pyramid.kind == "nasfpn":  # whose levels must divide each other
            recipe = replace(recipe, pad_multiple=128)
    elif framework == "torchvision detection":
        recipe, eps, relu, in_1x1 = DETECTOR_RECIPE, detection_eps, True, False
    elif framework == "effdet":
        recipe, eps, relu, in_1x1 = effdet_recipe(backbone), None, True, False
    else:
        recipe, eps, relu, in_1x1 = native_recipe(backbone), None, True, False
    facts = _facts_of(recipe)
    if any("running_mean" in name for name in state):
        facts["norm_eps"] = eps
    if is_bottleneck:
        facts["stride_in_1x1"] = in_1x1
    if layout.pyramid and layout.pyramid.top_in:
        facts["p7_relu"] = relu
    return recipe, facts
