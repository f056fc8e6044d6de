"""Resolves `--weights`: random, published or from a file, with the recipe and the facts that belong to them."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpnx.core.config import PYRAMIDS, TOP_BLOCKS, CheckpointConfig, ModelConfig
from fpnx.core.errors import FpnxError
from fpnx.core.levels import UNSTRIDED_LEVELS, parse_levels
from fpnx.core.provenance import AS_GIVEN, NO_PARAMETERS, ModelPart, Setting, WeightsInfo
from fpnx.core.text import did_you_mean, escape
from fpnx.core.validation import parse_blocks
from fpnx.models.backbones.factory import check_backbone_name, detect_stages
from fpnx.models.backbones.huggingface import HF, load_hf_config, pretrained_hf_state
from fpnx.models.backbones.one_stride import chosen_blocks
from fpnx.models.backbones.registry import TIMM
from fpnx.models.necks.fpn import FPN
from fpnx.models.necks.registry import NECKS
from fpnx.models.preprocessing import Recipe
from fpnx.models.weights.checkpoints import SUFFIXES, Checkpoint, read_checkpoint
from fpnx.models.weights.effdet import effdet_settings
from fpnx.models.weights.framework_defaults import (
    OPENCV_NOTE,
    facts_in_file,
    option_of,
    resolve_facts,
    resolve_top_block,
)
from fpnx.models.weights.key_matching import match_module
from fpnx.models.weights.neck_keys import FpnKeys
from fpnx.models.weights.state_dicts import StateDictLayout, recognize_layout, with_names_of
from fpnx.models.weights.timm import cached_timm_file, features_only_state, timm_recipe, timm_weights
from fpnx.models.weights.torchvision import (
    COCO,
    DETECTORS,
    PublishedWeights,
    best_weights,
    cached_file,
    detector_weights,
    find_published,
    known_names,
    native_recipe,
    norm_eps_of,
)
from fpnx.models.weights.vitdet import VITDET_SIDE

__all__ = [
    "UNTRAINED",
    "CheckpointNeck",
    "Weights",
    "is_weights_file",
    "load_into_module",
    "parameters_hash",
    "resolve_weights",
    "weights_from_module",
]

DEFAULT_BACKBONE = "resnet50"
UNTRAINED = "drop the option, or take --weights imagenet or random for an untrained pyramid"
ONE_TAP = ("simple", "image")  # kinds of pyramids that are made of one tap
CHOICES = ("weights_key", "weights_prefix")  # options that choose among the parameters in a file
# Detectors whose levels are not one per stride: by the laterals' inputs, where the body is tapped, and the strides.
UNSTRIDED: dict[tuple[str, tuple[int, ...]], tuple[dict[int, str], tuple[int, ...]]] = {
    ("mobilenet_v3_large", (160, 960)): ({0: "features.13", 1: "features.16"}, (32, 32, 64))
}


@dataclass(frozen=True, kw_only=True)
class CheckpointNeck:
    """The pyramid in a file: what its keys say, and what else had to be known.

    `first_level` None: the one whose taps have `keys.in_channels`. `levels` None: all of them. `strides` names the
    levels where these are not one per stride. `settings` are further arguments of the neck's class.
    """

    keys: FpnKeys
    first_level: int | None = None
    top_block: str | None = None
    p7_relu: bool = True
    levels: tuple[str, ...] | None = None
    strides: Mapping[str, int] = field(default_factory=dict)
    kind: str = "fpn"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OneTapPyramid:
    """The pyramid of one tap that a file's description names; `channels` is None where they are the tap's own."""

    kind: str
    tap: str
    levels: tuple[str, ...]
    channels: int | None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The parameters for a model, on the CPU, with the facts that belong to them.

    Attributes:
        name: the full name of published weights, the file's name, or `"random"`.
        backbone: the network that they are for.
        recipe: their preprocessing.
        body, fpn: whether these parts are trained, and where their parameters come from.
        state: the parameters in fpnx's layout (`body.*`, `fpn.*`), until they are in a model. Parts that are missing
            are drawn from the seed.
        heads: other tensors in the file, of heads and other networks, under their own names, until the model is made.
        pyramid: the pyramid in the file; None where there is none.
        one_tap: in a file of a model with a pyramid of one tap, what it says of it; else None.
        levels: in a file of a model without a neck, its levels; else None.
        blocks: in a file of a model whose backbone has maps of one stride, the blocks that it taps; else None.
        size: the only (height, width) of inputs, padding included, for which they are exact; None: any.
        norm_eps: epsilon of the body's batch norms; None keeps the network's own.
        stride_in_1x1: whether bottlenecks stride in their first 1×1 convolution instead of the 3×3 one.
        nodes: level number → node to tap, instead of the ends of the stages.
        framework: the file's state-dict layout.
        ignored: number of other tensors in the file, which belong to heads and other networks.
        key, prefix: under which key of the file its parameters are, and what stands before their names.
        choices: those of the options `weights_key` and `weights_prefix` that changed which parameters are taken.
        settings: the facts that parameters alone do not show, by name: the value, and its source.
        note: how the recipe differs from the one that the network was trained with, and what else the file holds.
        file, sha256: the file and its hash; a module has a hash only.
    """

    name: str
    backbone: str
    recipe: Recipe
    body: ModelPart
    fpn: ModelPart
    state: Mapping[str, Tensor]
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    pyramid: CheckpointNeck | None = None
    one_tap: OneTapPyramid | None = None
    levels: tuple[str, ...] | None = None
    blocks: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None
    norm_eps: float | None = None
    stride_in_1x1: bool = False
    nodes: Mapping[int, str] | None = None
    framework: str | None = None
    ignored: int = 0
    key: str = ""
    prefix: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    note: str | None = None
    file: str | None = None
    sha256: str | None = None

    @property
    def info(self) -> WeightsInfo:
        """The record of these weights for tables, JSON and stored files."""
        return WeightsInfo(
            name=self.name,
            body=self.body,
            pyramid=self.fpn,
            file=self.file,
            sha256=self.sha256,
            layout=self.framework,
            heads_ignored=self.ignored,
            key=self.key or None,
            prefix=self.prefix or None,
            settings=self.settings,
            note=self.note,
        )


def resolve_weights(config: ModelConfig) -> Weights:
    """Find the weights that `config.weights` names, download their file if it is not in the cache, and read it.

    A choice that fails is never replaced by another one.

    Raises:
        FpnxError: an unknown name, a contradiction with `config.backbone`, or a file that cannot be downloaded or read.
    """
    if (config.backbone or "").startswith(HF):
        load_hf_config(str(config.backbone), config.offline)
        if config.weights in ("default", "imagenet"):
            return _from_hugging_face(config)
    backbone = None if config.backbone is None else check_backbone_name(config.backbone)
    is_name = config.weights in ("default", "imagenet") or not is_weights_file(config.weights)
    if config.weights != "random" and (backbone or config.weights).startswith(TIMM) and is_name:
        return _from_timm(config)
    choice = _resolve_alias(config.weights, backbone or DEFAULT_BACKBONE, config.pyramid)
    if choice == "random":
        _refuse_facts(config, "random weights")
        name = backbone or DEFAULT_BACKBONE
        drawn = ModelPart.drawn(config.seed)
        recipe = native_recipe(name)
        return Weights(name="random", backbone=name, recipe=recipe, body=drawn, fpn=drawn, state={})
    if not (backbone or "").startswith(TIMM) and (published := find_published(choice, backbone)):
        return _from_published(published, config)
    if is_weights_file(choice):
        return _from_file(Path(choice), backbone, config)
    raise FpnxError(
        f"weights {escape(choice)!r} are neither a name nor a file{did_you_mean(choice, known_names(backbone))}: take "
        f"default, imagenet, coco, random, a file, or what `fpnx models {backbone or DEFAULT_BACKBONE}` lists"
    )


def load_into_module(module: nn.Module, config: ModelConfig) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """A copy of `module` with the parameters in the file `config.weights`.

    Returns:
        The copy; the fields of `Weights` that say where its parameters are from; the names of those that are not in the
        file, or not in their shape.

    Raises:
        FpnxError: the file is of another network, or several prefixes fit.
    """
    file = Path(config.weights)
    checkpoint = read_checkpoint(file, config.weights_key)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    try:
        match = match_module(checkpoint.state, shapes, type(module).__name__, config.weights_prefix)
    except FpnxError as error:
        raise FpnxError(f"{escape(file)}: {error}") from error
    loaded = copy.deepcopy(module)
    absent = set(match.missing)
    loaded.load_state_dict({key: value for key, value in match.state.items() if key not in absent}, strict=False)
    facts = {
        "name": file.name,
        "body": ModelPart(None, file.name),
        "ignored": len(checkpoint.state) - len(match.state),
        "key": checkpoint.wrapper,
        "prefix": match.prefix,
        "note": "; ".join(_notes(checkpoint, match.prefix, match.beside)) or None,
    }
    return loaded, facts, match.missing


def weights_from_module(module: nn.Module, name: str, config: ModelConfig) -> Weights:
    """A module's own parameters, unchanged, and a pyramid drawn from `config.seed`.

    The recipe is the module's attribute `recipe` if it is a `Recipe`, else that of timm's `pretrained_cfg`, else
    ImageNet's mean and standard deviation on images stretched to 224×224.

    Raises:
        FpnxError: `config` sets an option that is for files.
    """
    _refuse_facts(config, "modules")
    recipe, timm_config = getattr(module, "recipe", None), getattr(module, "pretrained_cfg", None)
    if not isinstance(recipe, Recipe):
        is_complete = isinstance(timm_config, dict) and {"input_size", "mean", "std"} <= set(timm_config)
        recipe = timm_recipe(timm_config) if is_complete else Recipe(height=224, width=224)
    return Weights(
        name=AS_GIVEN,
        backbone=name,
        recipe=recipe,
        body=ModelPart(None, AS_GIVEN),
        fpn=ModelPart.drawn(config.seed),
        state={},
        sha256=parameters_hash(module),
    )


def parameters_hash(module: nn.Module) -> str:
    """sha256 (hex) of all parameters and buffers of a module, with their names, dtypes and shapes."""
    return _state_hash(module.state_dict())


def _state_hash(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _resolve_alias(choice: str, backbone: str, pyramid: str | None) -> str:
    """The full name that `default`, `imagenet` or `coco` stands for with `backbone`; other choices unchanged."""
    if choice == "default":
        # The default never is a detector whose levels are not one per stride, nor one with another pyramid.
        has_detector = backbone in COCO and backbone not in {name for name, _ in UNSTRIDED}
        choice = "coco" if has_detector and pyramid in (None, "fpn") else "imagenet"
    if choice == "imagenet":
        return str(best_weights(backbone))
    if choice in DETECTORS:
        return detector_weights(choice)
    if choice == "coco" and backbone not in COCO:
        raise FpnxError(f"no weights coco for {backbone}, only for {', '.join(COCO)}: take imagenet, random or a file")
    return COCO[backbone] if choice == "coco" else choice


def _from_published(published: PublishedWeights, config: ModelConfig) -> Weights:
    if config.backbone not in (None, published.backbone):
        raise FpnxError(
            f"weights {published.name} are for {published.backbone}, not for {config.backbone}: drop one of the two"
        )
    _refuse_facts(config, published.name)
    if "pyramid" in published.trains and config.pyramid not in (None, "fpn", "image"):
        raise FpnxError(f"pyramid {config.pyramid} contradicts {published.name}, which has fpn: {UNTRAINED}")
    file = cached_file(published, config.offline)
    weights = _from_file(file, published.backbone, config, published.recipe)
    trained = ModelPart(True, published.name)
    return replace(
        weights,
        name=published.name,
        body=trained,
        fpn=trained if "pyramid" in published.trains else weights.fpn,
        settings={name: Setting(value, "name") for name, (value, _) in weights.settings.items()},
    )


def _from_timm(config: ModelConfig) -> Weights:
    """timm's weights by tag, by full name (which names the backbone too), or its default ones."""
    backbone, choice = config.backbone or config.weights, config.weights
    available = timm_weights(check_backbone_name(backbone))
    tag = backbone.partition(".")[2]
    if choice in ("default", "imagenet"):
        matches = [each for each in available if each.tag == tag] or available
    else:
        matches = [each for each in available if choice in (each.name, each.name[len(TIMM) :], each.tag)]
    if not matches:
        tags = ", ".join(each.tag for each in available) or "none"
        raise FpnxError(f"timm has no weights {escape(choice)!r} for {backbone}, only {tags}: take random, or a file")
    published = matches[0]
    if tag and published.tag != tag:
        raise FpnxError(f"weights {published.name} are not those of {backbone}: drop one of the two")
    _refuse_facts(config, published.name)
    file = cached_timm_file(published, config.offline)
    state = dict(read_checkpoint(file).state)
    return Weights(
        name=published.name,
        backbone=config.backbone or published.backbone,
        recipe=published.recipe,
        body=ModelPart(True, published.name),
        fpn=ModelPart.drawn(config.seed),
        state={f"body.{name}": value for name, value in features_only_state(published, state).items()},
        file=str(file),
        sha256=_sha256(file),
    )


def _from_hugging_face(config: ModelConfig) -> Weights:
    """The weights that are published with a backbone of transformers, or are in its folder."""
    name = str(config.backbone)
    _refuse_facts(config, name)
    blocks = None
    stages = detect_stages(name).stages
    if stages is not None and stages.stride is not None:
        asked = None if config.blocks is None else parse_blocks(config.blocks)
        blocks = chosen_blocks(name, asked, stages.blocks)
    state, source, note = pretrained_hf_state(name, config.offline, blocks)
    return Weights(
        name=name,
        backbone=name,
        recipe=native_recipe(name),
        body=ModelPart(True, name),
        fpn=ModelPart.drawn(config.seed),
        state={f"body.{key}": value for key, value in state.items()},
        note=note or None,
        file=source,
        sha256=_state_hash(state),
    )


def is_weights_file(choice: str) -> bool:
    """Whether `--weights` means a file, be it there or not, and no name."""
    return os.path.lexists(choice) or Path(choice).suffix in SUFFIXES


def _refuse_facts(config: ModelConfig, owner: str) -> None:
    """Raise FpnxError if `config` sets an option that is for files only."""
    names = [each.name for each in fields(CheckpointConfig)]
    name = next((name for name in [*CHOICES, *names] if getattr(config, name) is not None), None)
    if name in CHOICES:
        raise FpnxError(f"{option_of(name)} is for a file of parameters; {owner} need none: drop the option")
    if name is not None:
        raise FpnxError(f"{option_of(name)} is for files that do not state it; {owner} do not need it: drop the option")


def _from_file(file: Path, backbone: str | None, config: ModelConfig, recipe: Recipe | None = None) -> Weights:
    """Read `file`; `recipe` is that of published weights."""
    is_timm = (backbone or "").startswith(TIMM)
    checkpoint = read_checkpoint(file, config.weights_key, averages_first=is_timm)
    sha256 = _sha256(file)
    try:
        description = _check_description(checkpoint.description or {})
        stated = description.get("backbone")
        layout = recognize_layout(
            _in_plain_layout(checkpoint.state) if "head" in description else checkpoint.state,
            checkpoint.config,
            backbone=stated or backbone,
            prefix=config.weights_prefix,
            own=stated is not None,
        )
        layout = layout if stated else with_names_of(layout, backbone)
        name = _backbone_in(layout, description, backbone)
        if "recipe" in description:
            recipe = Recipe.from_json(description["recipe"])
        facts = facts_in_file(layout, description, recipe)
        eps = norm_eps_of(file, sha256)
        recipe, values, settings = resolve_facts(layout, facts, recipe, config, name, eps)
        unstrided = UNSTRIDED.get((name, layout.pyramid.in_channels)) if layout.pyramid else None
        pyramid = None
        if layout.pyramid is not None and not issubclass(NECKS[layout.pyramid.kind], FPN):
            pyramid = _other_neck(layout, name, description, config)
        elif layout.pyramid is not None:
            top_block, source = resolve_top_block(
                layout, layout.pyramid, facts, config.top_block, unstrided is not None
            )
            settings["top_block"] = Setting(top_block or "none", source)
            pyramid = CheckpointNeck(
                keys=layout.pyramid,
                kind=description.get("pyramid", layout.pyramid.kind),
                first_level=description.get("first_level", layout.pyramid.first_level),
                top_block=top_block,
                p7_relu=values.get("p7_relu", True),
                levels=parse_levels(description["levels"]) if "levels" in description else None,
                strides=dict(zip(UNSTRIDED_LEVELS, unstrided[1], strict=True)) if unstrided else {},
                settings={name: description[name] for name in FPN.choices if name in description},
            )
        one_tap = None
        if description.get("pyramid") in ONE_TAP:
            one_tap = OneTapPyramid(
                kind=description["pyramid"],
                tap=description["tap"],
                levels=parse_levels(description.get("levels", "P3-P5")),
                channels=None if description["pyramid"] == "image" else description["channels"],
            )
        elif "fpn.blocks.P4.0.weight" in layout.state:  # ViTDet's
            one_tap = OneTapPyramid(
                kind="simple",
                tap="C4",
                levels=parse_levels("P2-P6"),
                channels=layout.state["fpn.blocks.P4.0.weight"].shape[0],
            )
        size = (VITDET_SIDE, VITDET_SIDE) if layout.framework == "detectron2 ViTDet" else None
        if "size" in description:
            size = tuple(description["size"])
    except FpnxError as error:
        raise FpnxError(f"{escape(file)}: {error}") from error
    # A pyramid without parameters is not in the file; where another one is asked for, it is drawn.
    parts = {name: part for name, part in description.get("parts", {}).items() if part[1] != NO_PARAMETERS}
    body, fpn = (
        ModelPart(*parts[part]) if part in parts else ModelPart(None, file.name)
        if any(key.startswith(f"{part}.") for key in layout.state) else ModelPart.drawn(config.seed)
        for part in ("body", "fpn")
    )  # fmt: skip
    opencv = [OPENCV_NOTE] if layout.framework == "mmdetection" and recipe.backend == "tensor" else []
    return Weights(
        name=file.name,
        backbone=name,
        recipe=recipe,
        body=body,
        fpn=fpn,
        state=layout.state,
        heads=layout.others,
        pyramid=pyramid,
        one_tap=one_tap,
        levels=parse_levels(description["levels"]) if description.get("pyramid") == "none" else None,
        size=size,
        blocks=tuple(description["blocks"]) if "blocks" in description else None,
        norm_eps=values.get("norm_eps"),
        stride_in_1x1=bool(values.get("stride_in_1x1")),
        nodes=unstrided[0] if unstrided else None,
        framework=layout.framework,
        ignored=layout.ignored,
        key=checkpoint.wrapper,
        prefix=layout.prefix,
        choices=_choices(checkpoint, layout),
        settings=settings,
        note="; ".join([*opencv, *_notes(checkpoint, layout.prefix, layout.beside)]) or None,
        file=str(file),
        sha256=sha256,
    )


def _in_plain_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a file with a head, where those of the model stand under `backbone.`."""
    return {name.removeprefix("backbone."): value for name, value in state.items()}


def _choices(checkpoint: Checkpoint, layout: StateDictLayout) -> dict[str, str]:
    key = {} if checkpoint.automatic else {"weights_key": checkpoint.wrapper}
    return key if layout.automatic else {**key, "weights_prefix": layout.prefix}


def _notes(checkpoint: Checkpoint, prefix: str, prefixes: Collection[str]) -> list[str]:
    """Which parameters were taken of a file that holds several sets of them, such as their average (EMA)."""
    sets = (("key", checkpoint.wrapper, checkpoint.beside), ("prefix", prefix, [p for p in prefixes if p != prefix]))
    return [
        f"the file holds parameters under {escape(taken or f'no {what}')} and {escape(', '.join(others))}: "
        f"{escape(taken or f'no {what}')} was taken, --weights-{what} {escape(others[0] or repr(''))} takes the other"
        for what, taken, others in sets
        if others
    ]


def _other_neck(
    layout: StateDictLayout, backbone: str, description: Mapping[str, Any], config: ModelConfig
) -> CheckpointNeck:
    """The neck in a file that is no FPN, whose levels have no top block."""
    keys = layout.pyramid
    assert keys is not None
    if config.top_block is not None:
        raise FpnxError(f"top block {config.top_block} is for fpn and pafpn, it has a {keys.kind}: drop the option")
    stated = effdet_settings(layout.state, backbone) if layout.framework == "effdet" else description
    return CheckpointNeck(
        keys=keys,
        kind=keys.kind,
        first_level=description.get("first_level", keys.first_level),
        levels=parse_levels(description["levels"]) if "levels" in description else None,
        settings={**keys.settings, **{name: stated[name] for name in NECKS[keys.kind].choices if name in stated}},
    )


def _check_description(description: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the description in one of fpnx's own files, or raise FpnxError if it has an invalid value."""
    parts = description.get("parts", {})
    eps = description.get("norm_eps")
    valid = {
        "backbone": isinstance(description.get("backbone", ""), str),
        "first_level": description.get("first_level", 2) in range(8),
        "levels": isinstance(description.get("levels", []), list),
        "norm_eps": eps is None or (isinstance(eps, float) and 0 <= eps < 1),
        "top_block": description.get("top_block") in (None, *TOP_BLOCKS),
        "pyramid": description.get("pyramid", "fpn") in (*PYRAMIDS, "none"),
        "blocks": isinstance(description.get("blocks", []), list)
        and all(isinstance(number, int) and number >= 0 for number in description.get("blocks", [])),
        "tap": description.get("pyramid") not in ONE_TAP or re.fullmatch(r"C[1-9]", str(description.get("tap"))),
        "size": "size" not in description
        or (
            isinstance(description["size"], list)
            and len(description["size"]) == 2
            and all(isinstance(side, int) and side > 0 for side in description["size"])
        ),
        "channels": description.get("pyramid") != "simple" or isinstance(description.get("channels"), int),
        **{name: description.get(name, values[0]) in values for name, values in _neck_choices().items()},
        "parts": isinstance(parts, dict)
        and all(isinstance(p, list) and len(p) == 2 and isinstance(p[1], str) for p in parts.values())
        and all(p[0] in (True, False, None) for p in parts.values()),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            value = escape(str(description.get(name)))[:60]
            raise FpnxError(f"its description has {name} {value}, which fpnx never wrote")
    return description


def _neck_choices() -> dict[str, tuple[str, ...]]:
    return {name: values for neck in NECKS.values() for name, values in neck.choices.items()}


def _backbone_in(layout: StateDictLayout, description: Mapping[str, Any], requested: str | None) -> str:
    """The backbone that a file is for: by its description, by its parameters, or the requested one."""
    name = description.get("backbone")
    if name is not None:
        if requested not in (None, name):
            raise FpnxError(f"it is for {name}, not for {requested}: drop --backbone or take another file")
        return check_backbone_name(name)
    if layout.backbone is not None:
        return layout.backbone
    if requested is None:
        raise FpnxError("it does not say for which backbone it is: name it with --backbone")
    return requested


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
