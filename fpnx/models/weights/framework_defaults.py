"""What a file of parameters cannot tell of itself: its framework's conventions, and who settles each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from fpnx.core.config import FileFacts, ModelConfig
from fpnx.core.errors import FpnxError
from fpnx.core.provenance import Setting
from fpnx.models.preprocessing import Recipe
from fpnx.models.weights.state_dicts import FpnKeys, StateDictLayout
from fpnx.models.weights.torchvision import DETECTOR_RECIPE, native_recipe

__all__ = [
    "DETECTRON2_RECIPE",
    "MMDETECTION_RECIPE",
    "OPENCV",
    "option_of",
    "resolve_facts",
    "resolve_top_block",
    "facts_in_file",
]

DETECTRON2_RECIPE = Recipe(
    sizing="aspect", short_side=800, long_side=1333, rounding="stepwise-half-up", pad_multiple=32,
    value_range=255.0, order="BGR", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0),
)  # fmt: skip
OPENCV = "mmdetection resizes with OpenCV; plain is nearest to it, which rounds pixels to whole numbers besides"
MMDETECTION_RECIPE = replace(
    DETECTRON2_RECIPE,
    rounding="scaled-half-up",
    backend="tensor",
    order="RGB",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
)
RESNEXT_STD = (57.375, 57.12, 58.395)  # of detectron2's X-101-32x8d
BACKENDS = {"antialiased": "pillow", "plain": "tensor"}


def facts_in_file(layout: StateDictLayout, about: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """What the file itself says: its own description, a config inside, or the recipe that it was published with."""
    told = {**layout.told, **{name: about[name] for name in ("norm_eps", "stride_in_1x1", "p7_relu") if name in about}}
    if "top_block" in about:
        told["top_block"] = about["top_block"] or "none"
    if recipe is not None:
        told |= _facts_of(recipe)
    return told


def resolve_facts(
    layout: StateDictLayout,
    told: Mapping[str, Any],
    recipe: Recipe | None,
    config: ModelConfig,
    backbone: str,
    eps: float,
) -> tuple[Recipe, dict[str, Any], dict[str, Setting]]:
    """Who says what the parameters cannot: the file, else an option, else the framework's default."""
    usual, defaults = _defaults(layout, backbone, eps)
    settings: dict[str, Setting] = {}
    for each in fields(FileFacts):
        asked = getattr(config, each.name)
        if each.name not in defaults:
            if asked is not None:
                raise FpnxError(f"{option_of(each.name)} does not matter for {backbone} as this file has it: drop it")
        elif each.name in told:
            if asked not in (None, told[each.name]):
                raise FpnxError(f"{option_of(each.name)} {asked} contradicts it, it says {told[each.name]}: drop it")
            settings[each.name] = Setting(told[each.name], "file")
        elif asked is not None:
            settings[each.name] = Setting(asked, "option")
        else:
            settings[each.name] = Setting(defaults[each.name], "default")
    values = {name: value for name, (value, _) in settings.items()}
    sides = {name: told[name] for name in ("short_side", "long_side", "pad_multiple") if name in told}
    recipe = replace(
        recipe or replace(usual, **sides),
        order=values["pixel_order"],
        backend=BACKENDS[values["resampling"]],
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
    )
    return recipe, values, settings


def resolve_top_block(
    layout: StateDictLayout, keys: FpnKeys, told: Mapping[str, Any], asked: str | None, unstrided: bool
) -> tuple[str | None, str]:
    """Where the levels above the last come from, and who says so: shapes, the file, an option, the framework."""
    said = told.get("top_block")
    if keys.top_in is None:
        if asked not in (None, "pool"):
            raise FpnxError(f"it has no top block {asked}: its P6 can come by pool only")
        if asked or said:
            value, who = (asked, "option") if asked else (said, "file")
        else:
            own = layout.framework == "fpnx" and not unstrided
            value, who = "none" if own else "pool", "default"
        return (None if value == "none" else value), who
    fitting = ["c5"] * (keys.top_in == keys.in_channels[-1]) + ["p5", "m5"] * (keys.top_in == keys.channels)
    for value in (said, asked):
        if value is not None and value not in fitting:
            raise FpnxError(f"top block {value} contradicts it: by its shapes it has {' or '.join(fitting) or 'none'}")
    if said is not None and asked not in (None, said):
        raise FpnxError(f"top block {asked} contradicts it, it says {said}: drop the option")
    if said is not None or len(fitting) == 1:
        return said or fitting[0], "file"
    if not fitting:
        raise FpnxError(f"its P6 takes {keys.top_in} channels, but C5 has {keys.in_channels[-1]}, P5 {keys.channels}")
    return (asked, "option") if asked else (fitting[0], "default")


def option_of(fact: str) -> str:
    """What a field of `FileFacts` is called on the command line."""
    return "--" + fact.replace("_", "-")


def _facts_of(recipe: Recipe) -> dict[str, Any]:
    resampling = next(name for name, backend in BACKENDS.items() if backend == recipe.backend)
    return {"pixel_order": recipe.order, "resampling": resampling, "mean": recipe.mean, "std": recipe.std}


def _defaults(layout: StateDictLayout, backbone: str, detection_eps: float) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the facts that matter for this file's network, as its framework has them by default."""
    state, framework = layout.state, layout.framework
    middle = state.get("body.layer1.0.conv2.weight")
    is_bottleneck = "body.layer1.0.conv3.weight" in state
    grouped = middle is not None and middle.shape[0] != middle.shape[1]
    if framework in ("detectron2", "caffe2"):
        recipe, eps, relu, in_1x1 = DETECTRON2_RECIPE, 1e-5, True, not grouped
        recipe = replace(recipe, std=RESNEXT_STD) if grouped else recipe
    elif framework == "detectron2 backbone":  # its converter for torchvision's networks keeps their preprocessing
        recipe, eps, relu, in_1x1 = (
            replace(MMDETECTION_RECIPE, backend="pillow", rounding=DETECTRON2_RECIPE.rounding),
            1e-5,
            True,
            False,
        )
    elif framework == "mmdetection":
        recipe, eps, relu, in_1x1 = MMDETECTION_RECIPE, 1e-5, False, False
    elif framework == "torchvision detection":
        recipe, eps, relu, in_1x1 = DETECTOR_RECIPE, detection_eps, True, False
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
