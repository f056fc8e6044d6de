"""Building models from a config: backbone, neck and weights; and saving their parameters."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from fpnx.core.config import ExtractConfig, InputConfig, ModelConfig
from fpnx.core.errors import FpnxError
from fpnx.core.levels import UNSTRIDED_LEVELS, level_number, ordered_levels
from fpnx.core.provenance import AS_GIVEN, NO_PARAMETERS, ModelPart, Setting
from fpnx.core.text import did_you_mean, escape
from fpnx.core.validation import parse_blocks
from fpnx.models.backbones.factory import (
    Backbone,
    backbone_from_module,
    create_backbone,
    parameter_shapes,
    refuse_blocks,
)
from fpnx.models.necks.base import Neck
from fpnx.models.necks.fpn import FPN
from fpnx.models.necks.image_pyramid import ImagePyramid
from fpnx.models.necks.no_neck import NoNeck
from fpnx.models.necks.registry import NECKS
from fpnx.models.necks.simple import SimplePyramid
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.torch_state import isolated_torch_state
from fpnx.models.weights.checkpoints import write_checkpoint
from fpnx.models.weights.key_matching import first_names
from fpnx.models.weights.resolve import (
    UNTRAINED,
    CheckpointNeck,
    Weights,
    is_weights_file,
    load_into_module,
    resolve_weights,
    weights_from_module,
)

__all__ = [
    "NeckPlan",
    "build_model",
    "create_model",
    "describe_model",
    "save_weights",
    "split_backbone",
]

DEFAULT_PYRAMID = "fpn"
PARTS = ("body", "fpn")
LAST_TAP, COARSEST = 5, 7  # level numbers: of the tap that top blocks go on from, and of the last level
SMALLEST_EPS = 1e-45  # instead of 0, which some versions of torch refuse; the same in float32 for every variance


@dataclass(frozen=True, kw_only=True)
class NeckPlan:
    """How to build a model that a head is trained on: its neck has no parameters that the levels do not need.

    An FPN or PAFPN is built over the taps from the finest asked level on, as torchvision's detectors are; a model of
    C levels alone has no neck. What the config asks for, and the neck of its weights, go before these.

    Attributes:
        levels: those that are wanted where the config names none; the ones that the model can give are taken.
        top_block: of an FPN or PAFPN whose levels go above the last tap; None: its own choice.
        variant: of an FPN; see `FPN`.
    """

    levels: tuple[str, ...] = ()
    top_block: str | None = None
    variant: str = "full"


def create_model(
    backbone: str | nn.Module | None = ModelConfig.backbone,
    *,
    weights: str = ModelConfig.weights,
    weights_key: str | None = ModelConfig.weights_key,
    weights_prefix: str | None = ModelConfig.weights_prefix,
    levels: Any = ModelConfig.levels,
    pyramid: str | None = ModelConfig.pyramid,
    tap: str | None = ModelConfig.tap,
    blocks: str | int | Sequence[int] | None = ModelConfig.blocks,
    channels: int | None = ModelConfig.channels,
    top_block: str | None = ModelConfig.top_block,
    seed: int = ModelConfig.seed,
    offline: bool = ModelConfig.offline,
    size: str | int | tuple[int, int] = InputConfig.size,
    stride_in_1x1: bool | None = ModelConfig.stride_in_1x1,
    p7_relu: bool | None = ModelConfig.p7_relu,
    norm_eps: float | None = ModelConfig.norm_eps,
    pixel_order: str | None = ModelConfig.pixel_order,
    resampling: str | None = ModelConfig.resampling,
    mean: str | Iterable[float] | None = ModelConfig.mean,
    std: str | Iterable[float] | None = ModelConfig.std,
) -> PyramidModel:
    """A backbone with its feature pyramid, in eval mode on the CPU; see `PyramidModel`.

    Args:
        backbone: a name (`fpnx models` lists them, `"timm/NAME"` is one of timm's); None takes the one that the
            weights are for, or ResNet-50. Or a module of your own, which takes (B, 3, H, W): its taps are found as
            those of named networks are. A copy is taken, and only the pyramid is drawn. Its parameters stay as
            they are (`weights` is `"default"` or `"random"`, which then mean the same), or come from the file that
            `weights` names.
        weights: `"default"`, `"imagenet"`, `"coco"`, `"random"`, a torchvision name such as
            `"ResNet50_Weights.IMAGENET1K_V2"`, or a file of fpnx, torchvision, timm, detectron2, mmdetection or
            effdet.
        weights_key: the key of the file under which the parameters are, such as `"state_dict_ema"`; None finds it.
        weights_prefix: what stands before their names in the file, such as `"encoder_q."`; None finds it.
        levels: `"P2-P5"`, `"C3,P3"` or a sequence of names; None: a file's own levels, else P2…P5, for `"bifpn"` and
            `"nasfpn"` P3…P7.
        pyramid: the kind of neck, `"fpn"`, `"pafpn"`, `"bifpn"`, `"nasfpn"`, `"simple"` or `"image"`; None: a file's
            own, else `"fpn"`.
        tap: with `pyramid="image"` or `"simple"`, the tap that the levels are made of; None: the last.
        blocks: of a backbone whose maps have one stride (a vision transformer): the blocks whose maps are its tap, from
            0 on, or -1 (the last), -2, …; several are concatenated along channels, in their order. None: the last.
        channels: of every P level; None: a file's own, else 256, for `"bifpn"` 64. A BiFPN has as many cells as
            EfficientDet's of that width.
        top_block: of `"fpn"` and `"pafpn"`: `"pool"` (P6), `"c5"`, `"p5"` or `"m5"` (P6 and P7); None: a file's own,
            else what `levels` need.
        seed: for the parts that have no trained parameters.
        offline: never download.
        size: of the recipe's output, as `InputConfig` has it: `"recipe"`, 448, (480, 640). A backbone that is built
            for one size is built for this one.
        stride_in_1x1, p7_relu, norm_eps, pixel_order, resampling, mean, std: facts that a file of parameters may
            lack; see `fpnx.core.config.CheckpointConfig`.

    Raises:
        FpnxError: for names, levels, channels or files that do not exist or contradict each other.
    """
    name, module = split_backbone(backbone)
    config = ExtractConfig(
        backbone=name,
        weights=weights,
        weights_key=weights_key,
        weights_prefix=weights_prefix,
        levels=levels,
        pyramid=pyramid,
        tap=tap,
        blocks=blocks,
        channels=channels,
        top_block=top_block,
        seed=seed,
        offline=offline,
        size=size,
        stride_in_1x1=stride_in_1x1,
        p7_relu=p7_relu,
        norm_eps=norm_eps,
        pixel_order=pixel_order,
        resampling=resampling,
        mean=mean,
        std=std,
    )
    model = build_model(config, module)
    model.recipe = model.recipe.sized(config)
    return model


def split_backbone(backbone: Any) -> tuple[str | None, nn.Module | None]:
    """A backbone as its name (None: the default) and, where it is one, the module that is given instead of a name.

    Raises:
        FpnxError: for anything else.
    """
    if isinstance(backbone, nn.Module):
        return None, backbone
    if isinstance(backbone, type):
        raise FpnxError(f"backbone {backbone.__name__} is a class: give an instance of it")
    if backbone is not None and not isinstance(backbone, str):
        raise FpnxError(f"backbone {backbone!r:.60}: take a name or an nn.Module")
    return backbone, None


def build_model(
    config: ModelConfig, module: nn.Module | None = None, plan: NeckPlan | None = None, *, keep_heads: bool = False
) -> PyramidModel:
    """`create_model` from a config.

    Args:
        config: the options.
        module: a network of the caller's own, or a `PyramidModel`, which is copied.
        plan: for a model that a head is trained on; a `PyramidModel` keeps its neck.
        keep_heads: keep the file's other tensors, of heads, in `weights.heads`.
    """
    if isinstance(module, PyramidModel):
        return _copied(module, config)
    with isolated_torch_state():
        return _build(config, module, plan, keep_heads)


def _build(config: ModelConfig, module: nn.Module | None, plan: NeckPlan | None, keep_heads: bool) -> PyramidModel:
    weights, backbone = _named(config) if module is None else _given(config, module)
    _adjust(backbone.body, weights)
    held_by_file = weights.one_tap
    if held_by_file is not None and config.pyramid in (None, held_by_file.kind):
        config = replace(
            config,
            pyramid=held_by_file.kind,
            tap=config.tap or held_by_file.tap,
            levels=config.levels or held_by_file.levels,
            channels=config.channels or held_by_file.channels,
        )
    elif held_by_file is not None and held_by_file.kind != "image" and config.pyramid != "image":
        raise FpnxError(
            f"pyramid {config.pyramid} contradicts {escape(weights.name)}, which has {held_by_file.kind}: {UNTRAINED}"
        )
    if weights.levels is not None and config.pyramid is None and config.tap is None:
        config = replace(config, levels=config.levels or weights.levels)
    kind = _kind(backbone, config)
    if plan is not None:
        if kind is not ImagePyramid and config.levels and all(name.startswith("C") for name in config.levels):
            kind = NoNeck
        if plan.variant != "full" and (kind is not FPN or weights.pyramid is not None):
            owner = f"{escape(weights.name)}, which has a neck" if weights.pyramid else f"pyramid {kind.kind}"
            raise FpnxError(f"neck variant {plan.variant} is for a new fpn, not for {owner}: drop one of the two")
    if config.tap is not None and not kind.accepts_single_stride:
        raise FpnxError(f"tap {config.tap} is for pyramids of one tap: give --pyramid image or simple beside it")
    if kind is SimplePyramid and backbone.one_stride is None and config.tap is None:
        raise FpnxError(
            f"pyramid simple on {backbone.name}, which has maps of several strides: take --pyramid fpn, which merges "
            f"them, or one of them, as in --tap C{min(4, max(backbone.channels))}"
        )
    if kind in (ImagePyramid, NoNeck):
        weights = _of_body(weights)
    if kind is ImagePyramid and backbone.size is not None:
        raise FpnxError(f"{backbone.name} takes inputs of one size, and pyramid image needs several: take another")
    if weights.pyramid is None and not kind.accepts_single_stride and kind is not NoNeck:
        asked = config.levels or kind.default_levels
        backbone.check_levels([name for name in asked if name not in UNSTRIDED_LEVELS], config.top_block)
    held = weights.pyramid
    neck = _neck_of_weights(held, backbone, config, weights) if held else _new_neck(kind, backbone, config, plan)
    levels = _chosen_levels(config, neck, weights, backbone, plan)
    _check_levels(levels, backbone, neck, weights)
    neck.initialize(config.seed)
    kept, settings = weights.heads if keep_heads else {}, dict(weights.settings)
    if isinstance(neck, FPN) and neck.variant != "full":
        settings["neck_variant"] = Setting(neck.variant, "option" if weights.pyramid is None else "file")
    model = PyramidModel(
        backbone, neck, ordered_levels(levels), replace(weights, state={}, heads=kept, settings=settings)
    )
    _fill(model, weights)
    model.note_parameters()
    return model.eval()


def _kind(backbone: Backbone, config: ModelConfig) -> type[Neck]:
    """The kind of neck that `config` asks for, or the default one.

    Raises:
        FpnxError: it merges taps of several strides, and the backbone has maps of one.
    """
    kind = NECKS[config.pyramid or DEFAULT_PYRAMID]
    if backbone.one_stride is None or kind.accepts_single_stride:
        return kind
    merged = next((name for name in config.levels or () if name.startswith("P")), None)
    asked = {
        f"pyramid {config.pyramid}": config.pyramid,
        f"level {merged}": merged,
        f"channels {config.channels}": config.channels,
        f"top block {config.top_block}": config.top_block,
    }
    (tap,) = backbone.channels
    first = next((name for name, value in asked.items() if value is not None), None)
    if first is not None:
        raise FpnxError(
            f"{first} on {backbone.name}: {kind.kind} merges maps of several strides, and all of its maps have stride "
            f"{backbone.one_stride}: take --levels C{tap}, --pyramid simple or --pyramid image"
        )
    return NoNeck


def _copied(model: PyramidModel, config: ModelConfig) -> PyramidModel:
    """A copy of a caller's model, in eval mode on the CPU, whose `weights` describe the parameters that it has now.

    Raises:
        FpnxError: `config` sets an option of models.
    """
    defaults = ModelConfig()
    for name in (field.name for field in fields(ModelConfig)):
        if name != "offline" and getattr(config, name) != getattr(defaults, name):
            option = name.replace("_", " ")
            raise FpnxError(f"{option} beside a model, which has its own: leave {option} out, or make another model")
    copied = copy.deepcopy(model).cpu().eval()
    copied.weights = copied.current_weights()
    copied.note_parameters()
    return copied


def _named(config: ModelConfig) -> tuple[Weights, Backbone]:
    weights = resolve_weights(config)
    recipe = weights.recipe.sized(config) if isinstance(config, InputConfig) else weights.recipe
    blocks = _blocks(config) or weights.blocks
    backbone = create_backbone(weights.backbone, config.seed, weights.nodes, size=recipe.fixed_size, blocks=blocks)
    return weights, backbone if weights.size is None else replace(backbone, size=weights.size)


def _blocks(config: ModelConfig) -> tuple[int, ...] | None:
    return None if config.blocks is None else parse_blocks(config.blocks)


def _given(config: ModelConfig, module: nn.Module) -> tuple[Weights, Backbone]:
    refuse_blocks(type(module).__name__, _blocks(config))
    if config.weights not in ("default", "random"):
        if is_weights_file(config.weights):
            return _given_with_file(config, module)
        raise FpnxError(
            f"weights {escape(config.weights)} beside a module: it keeps the parameters that it has: leave weights "
            "out, or name a file"
        )
    backbone = backbone_from_module(module)
    return weights_from_module(module, backbone.name, config), backbone


def _given_with_file(config: ModelConfig, module: nn.Module) -> tuple[Weights, Backbone]:
    loaded, facts, absent = load_into_module(module, config)
    backbone = backbone_from_module(loaded)
    needed = [name for name in absent if name in backbone.body.state_dict()]
    if needed:
        raise FpnxError(
            f"{escape(config.weights)} does not fit {backbone.name}: {len(needed)} of its parameters are missing or "
            f"misshapen ({first_names(needed)}): take matching weights"
        )
    own = replace(config, weights="default", weights_key=None, weights_prefix=None)
    return replace(weights_from_module(loaded, backbone.name, own), **facts), backbone


def _new_neck(kind: type[Neck], backbone: Backbone, config: ModelConfig, plan: NeckPlan | None) -> Neck:
    """A neck over all taps that gives the asked levels; with `plan` that of `_planned_fpn`."""
    inputs = _one_tap(backbone, config) if kind.accepts_single_stride else backbone.pyramid_channels
    levels, channels = tuple(config.levels or ()), config.channels or kind.default_channels
    if plan is not None and not levels and not kind.accepts_single_stride:
        top = COARSEST if max(inputs) == LAST_TAP else max(inputs)
        levels = tuple(name for name in plan.levels if name[0] == "P" and min(inputs) <= level_number(name) <= top)
    if plan is not None and issubclass(kind, FPN):
        return _planned_fpn(kind, inputs, channels, levels, config.top_block, plan)
    return kind.for_levels(inputs, channels, levels, config.top_block)


def _planned_fpn(
    kind: type[FPN],
    inputs: Mapping[int, int],
    channels: int,
    levels: tuple[str, ...],
    top_block: str | None,
    plan: NeckPlan,
) -> FPN:
    """An FPN or PAFPN over the taps from the finest of `levels` on, with the top block and the variant of `plan`."""
    finest = min([level_number(name) for name in levels if name[0] == "P"], default=0)
    inputs = {k: n for k, n in inputs.items() if k >= min(finest, max(inputs))}
    goes_above = any(level_number(name) > max(inputs) for name in levels)
    if goes_above and not (plan.top_block == "pool" and "P7" in levels):
        top_block = top_block or plan.top_block
    neck = kind.for_levels(inputs, channels, levels, top_block)
    return neck if plan.variant == "full" else FPN(inputs, channels, neck.top_block, variant=plan.variant)


def _chosen_levels(config: ModelConfig, neck: Neck, weights: Weights, backbone: Backbone, plan: NeckPlan | None) -> Any:
    """The levels of a model: those that are asked for, else of the plan, else of the file, else the neck's default."""
    held = weights.pyramid
    if config.levels:
        return config.levels
    there = [name for name in neck.levels if held or backbone.stride(level_number(name)) is not None]
    planned = tuple(name for name in (plan.levels if plan is not None else ()) if name in there)
    if planned and not isinstance(neck, ImagePyramid):
        return planned
    if held:
        return held.levels or neck.levels
    return tuple(name for name in neck.levels_by_default() if backbone.stride(level_number(name)) is not None)


def _one_tap(backbone: Backbone, config: ModelConfig) -> dict[int, int]:
    """Level number and channels of the tap that `config` asks for, or of the last one."""
    number = max(backbone.channels) if config.tap is None else int(config.tap[1:])
    if number not in backbone.channels:
        there = _listed(f"C{k}" for k in sorted(backbone.channels))
        raise FpnxError(f"{backbone.name} has no tap {config.tap}: it gives {there}")
    return {number: backbone.channels[number]}


def _of_body(weights: Weights) -> Weights:
    """The body's part of `weights`, for a pyramid without parameters."""
    state = {key: value for key, value in weights.state.items() if key.startswith("body.")}
    return replace(weights, state=state, pyramid=None, fpn=ModelPart(None, NO_PARAMETERS))


def _neck_of_weights(held: CheckpointNeck, backbone: Backbone, config: ModelConfig, weights: Weights) -> Neck:
    """The neck that the weights hold, with P6 by pool where it is asked for and costs no parameters."""
    keys, owner = held.keys, escape(weights.name)
    if config.pyramid not in (None, held.kind):
        raise FpnxError(f"pyramid {config.pyramid} contradicts {owner}, which has {held.kind}: {UNTRAINED}")
    if config.channels not in (None, keys.channels):
        raise FpnxError(f"channels {config.channels} contradicts {owner}, which has {keys.channels}: {UNTRAINED}")
    taps = [backbone.pyramid_channels[k] for k in sorted(backbone.pyramid_channels)]
    firsts = [held.first_level] if held.first_level is not None else [
        k for k in backbone.pyramid_channels if tuple(taps[k - min(backbone.pyramid_channels) :]) == keys.in_channels
    ]  # fmt: skip
    inputs = {
        firsts[0] + i: n or backbone.pyramid_channels.get(firsts[0] + i, 0) for i, n in enumerate(keys.in_channels)
    } if firsts else {}  # fmt: skip
    if not inputs.items() or not inputs.items() <= backbone.pyramid_channels.items():
        raise FpnxError(
            f"{owner} has laterals for {_listed(keys.in_channels)} channels, {backbone.name} gives {_listed(taps)}: "
            f"they must be its last taps"
        )
    kind: Any = NECKS[held.kind]
    if not issubclass(kind, FPN):
        return kind(inputs, keys.channels, **held.settings)
    top_block = held.top_block or ("pool" if "P6" in (config.levels or ()) else None)
    options = {"norm": keys.norm, "p7_relu": held.p7_relu, "names": tuple(held.strides)}
    return kind(inputs, keys.channels, top_block, **options, **held.settings)


def _adjust(body: nn.Module, weights: Weights) -> None:
    """Set the norms' epsilon and the bottlenecks' stride to those that the weights were trained with."""
    for name, module in body.named_modules():
        if isinstance(module, nn.BatchNorm2d) and weights.norm_eps is not None:
            module.eps = weights.norm_eps or SMALLEST_EPS
        elif weights.stride_in_1x1 and re.fullmatch(r"layer[234]\.0\.conv[12]", name):
            module.stride = (2, 2) if name.endswith("1") else (1, 1)


def save_weights(
    model: PyramidModel, path: str | os.PathLike[str], *, trained: str | Iterable[str] | None = None
) -> None:
    """Write the model's parameters and their description to `.safetensors`, `.pt` or `.pth`.

    `--weights FILE` and `create_model(weights=FILE)` read it back. Backbone, pyramid, levels, recipe and which parts
    are trained come from the file.

    Args:
        model: as `create_model` made it; its parameters may have been changed since.
        path: the file, which is replaced.
        trained: the parts that you have trained: `"body"`, `"fpn"` or both. Without it, a part whose parameters have
            changed since the model was made is stored as one of which that is not known.

    Raises:
        FpnxError: where the file cannot be written, or could not be read back: the backbone is a module of the
            caller's own, which no name stands for.
    """
    if not isinstance(model, PyramidModel):
        raise FpnxError(f"save_weights takes a model that create_model made, and not a {type(model).__name__}")
    if trained is not None and not isinstance(trained, (str, Iterable)):
        raise FpnxError(f"trained {trained!r}: take {' or '.join(PARTS)}, or both")
    chosen = {trained} if isinstance(trained, str) else set(trained or ())
    for name in sorted(map(str, chosen)):
        if name not in PARTS:
            raise FpnxError(f"trained {escape(name)!r}: take {' or '.join(PARTS)}{did_you_mean(name, PARTS)}")
    weights = model.current_weights()
    parts = {name: ModelPart(True, AS_GIVEN) if name in chosen else getattr(weights, name) for name in PARTS}
    write_checkpoint(path, model.state_dict(), describe_model(model, parts, path))


def describe_model(model: PyramidModel, parts: Mapping[str, ModelPart], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file at `path` has to say of a model beside its parameters, as plain values.

    Args:
        model: the model.
        parts: whether `"body"` and `"fpn"` are trained, and where they come from.
        path: the file, for messages.

    Raises:
        FpnxError: the file could not be read back: the backbone is a module of the caller's own.
    """
    if model.weights.name == AS_GIVEN:
        raise FpnxError(
            f"{escape(path)} could not be read back: the backbone {model.backbone} is a module of yours, which no name "
            "stands for: save its state_dict() with torch.save, and the pyramid's, model.fpn.state_dict()"
        )
    return {
        "backbone": model.backbone,
        **({"blocks": list(model.blocks)} if model.blocks else {}),
        **({"size": list(model.size)} if model.size and model.one_stride else {}),
        **model.fpn.identity(),
        "first_level": min(model.fpn.in_channels),
        "norm_eps": model.weights.norm_eps,
        "stride_in_1x1": model.weights.stride_in_1x1,
        "levels": list(model.levels),
        "recipe": model.recipe.to_json(),
        "parts": {name: [part.trained, part.source] for name, part in parts.items()},
    }


def _check_levels(levels: tuple[str, ...], backbone: Backbone, neck: Neck, weights: Weights) -> None:
    held = weights.pyramid
    if not neck.gives_taps and (taps := [name for name in levels if name.startswith("C")]):
        raise FpnxError(f"level {taps[0]} beside pyramid {neck.kind}, which has P levels only: leave {taps[0]} out")
    there = (
        () if (held and held.strides) or not neck.gives_taps else ordered_levels(f"C{k}" for k in backbone.nodes)
    ) + tuple(name for name in neck.levels if held or backbone.stride(int(name[1:])) is not None)
    absent = next((name for name in levels if name not in there), None)
    if absent is None:
        return
    if absent in neck.levels:
        stride = f"{backbone.one_stride} has no {absent}"
        raise FpnxError(
            f"{backbone.name} of stride {stride}: its stride would be no whole number: take {_listed(there)}"
        )
    if held is not None:
        raise FpnxError(f"{escape(weights.name)} has no level {absent}: it has {_listed(there)}; {UNTRAINED}")
    if (why := neck.explain_missing(absent)) is not None:
        raise FpnxError(why)
    raise FpnxError(f"{backbone.name} has no level {absent}: it gives {_listed(there)}")


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


def _fill(model: PyramidModel, weights: Weights) -> None:
    """Load `weights.state`, strictly for each part that it holds. Parameters behind the last tap are ignored."""
    own = model.state_dict()
    parts = {key.split(".", 1)[0] for key in weights.state}
    beyond = {f"body.{key}" for key in parameter_shapes(model.backbone)} - set(own) if "body" in parts else set()
    given = {key: value for key, value in weights.state.items() if key not in beyond}
    wanted = {key for key in own if key.split(".", 1)[0] in parts and not key.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(wanted - set(given)),
        "unexpected": sorted(set(given) - set(own)),
        "misshapen": sorted(
            f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
            for key in set(given) & set(own)
            if given[key].shape != own[key].shape
        ),
        "without plain values": sorted(
            f"{key} {value.layout if value.layout != torch.strided else value.device}".replace("torch.", "")
            for key, value in given.items()
            if value.layout != torch.strided or value.is_meta
        ),
        "not of floating-point numbers": sorted(
            f"{key} {str(given[key].dtype).removeprefix('torch.')}"
            for key in set(given) & set(own)
            if own[key].is_floating_point() and not given[key].is_floating_point()
        ),
    }
    reasons = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in problems.items() if keys]  # fmt: skip
    if reasons:
        fitting = sum(key in given and given[key].shape == own[key].shape for key in wanted)
        under = f" under the prefix {escape(weights.prefix)}" if weights.prefix else ""
        raise FpnxError(
            f"{escape(weights.name)} does not fit {model.backbone}: {fitting} of {len(wanted)} names fit{under}; "
            f"{'; '.join(reasons)}: take matching weights"
        )
    model.load_state_dict(given, strict=False)
