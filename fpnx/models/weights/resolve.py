"""Which parameters a model gets: drawn from a seed, published under a name, or in a file; and the recipe they carry."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpnx.core.config import TOP_BLOCKS, FileFacts, ModelConfig
from fpnx.core.errors import FpnxError
from fpnx.core.levels import UNSTRIDED_LEVELS, parse_levels
from fpnx.core.provenance import AS_GIVEN, ModelPart, Setting, WeightsInfo
from fpnx.core.text import did_you_mean, escape
from fpnx.models.backbones.factory import check_backbone_name
from fpnx.models.backbones.registry import TIMM
from fpnx.models.preprocessing import Recipe
from fpnx.models.weights.checkpoints import SUFFIXES, read_checkpoint
from fpnx.models.weights.framework_defaults import OPENCV, facts_in_file, option_of, resolve_facts, resolve_top_block
from fpnx.models.weights.state_dicts import FpnKeys, StateDictLayout, backbone_of, recognize_layout
from fpnx.models.weights.timm import adapted, fetched, timm_recipe, timm_weights
from fpnx.models.weights.torchvision import (
    COCO,
    Published,
    best_weights,
    cached_file,
    find_published,
    known_names,
    native_recipe,
    norm_eps_of,
)

__all__ = ["CheckpointNeck", "Weights", "weights_from_module", "resolve_weights"]

DEFAULT_BACKBONE = "resnet50"
# Detectors whose levels are not one per stride: by the laterals' inputs, where the body is tapped, and the strides.
UNSTRIDED: dict[tuple[str, tuple[int, ...]], tuple[dict[int, str], tuple[int, ...]]] = {
    ("mobilenet_v3_large", (160, 960)): ({0: "features.13", 1: "features.16"}, (32, 32, 64))
}


@dataclass(frozen=True, kw_only=True)
class CheckpointNeck:
    """The pyramid in a file: what its keys say, and what else had to be known.

    `first_level` None: the one whose taps have `keys.in_channels`. `levels` None: all of them. `strides` names the
    levels where these are not one per stride.
    """

    keys: FpnKeys
    first_level: int | None = None
    top_block: str | None = None
    p7_relu: bool = True
    levels: tuple[str, ...] | None = None
    strides: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of the neck, as `--pyramid` takes it."""
        return self.keys.kind


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Parameters on the CPU and what they say of themselves.

    Attributes:
        state: in fpnx's layout (`body.*`, `fpn.*`), without the parts that are drawn from the seed: a body or a
            pyramid that it does not hold is random.
        pyramid: the pyramid in the file, where there is one.
        norm_eps: of the body's batch norms; None leaves the network's own.
        stride_in_1x1: whether bottlenecks stride in their first convolution and not in the 3×3 one.
        nodes: where the body is tapped, if not at its last node of each stride.
        framework: whose layout the file has; `ignored` counts the tensors of heads in it.
        settings: what parameters alone do not tell, by name: the value, and what decided it.
        note: where the recipe is not exactly what the network was trained with.
    """

    name: str
    backbone: str
    recipe: Recipe
    body: ModelPart
    fpn: ModelPart
    state: Mapping[str, Tensor]
    pyramid: CheckpointNeck | None = None
    norm_eps: float | None = None
    stride_in_1x1: bool = False
    nodes: Mapping[int, str] | None = None
    framework: str | None = None
    ignored: int = 0
    settings: Mapping[str, Setting] = field(default_factory=dict)
    note: str | None = None
    file: str | None = None
    sha256: str | None = None

    @property
    def info(self) -> WeightsInfo:
        """What tables, JSON and files say of these weights."""
        return WeightsInfo(
            name=self.name,
            body=self.body,
            pyramid=self.fpn,
            file=self.file,
            sha256=self.sha256,
            layout=self.framework,
            heads_ignored=self.ignored,
            settings=self.settings,
            note=self.note,
        )


def resolve_weights(config: ModelConfig) -> Weights:
    """Find, fetch and read what `config.weights` names. Cache first; never another choice than the one asked for.

    Raises:
        FpnxError: an unknown name, a contradiction with `config.backbone`, a file that cannot be had or read.
    """
    backbone = None if config.backbone is None else check_backbone_name(config.backbone)
    if config.weights != "random" and (backbone or config.weights).startswith(TIMM) and not _is_file(config.weights):
        return _timm(config)
    choice = _meant(config.weights, backbone or DEFAULT_BACKBONE)
    if choice == "random":
        _refuse_facts(config, "random weights")
        name = backbone or DEFAULT_BACKBONE
        drawn = ModelPart.drawn(config.seed)
        recipe = native_recipe(name)
        return Weights(name="random", backbone=name, recipe=recipe, body=drawn, fpn=drawn, state={})
    if published := find_published(choice, backbone):
        return _from_published(published, config)
    if _is_file(choice):
        return _from_file(Path(choice), backbone, config)
    raise FpnxError(
        f"weights {escape(choice)!r} are neither a name nor a file{did_you_mean(choice, known_names(backbone))}: take "
        f"default, imagenet, coco, random, a file, or what `fpnx models {backbone or DEFAULT_BACKBONE}` lists"
    )


def weights_from_module(module: nn.Module, name: str, config: ModelConfig) -> Weights:
    """A module's own parameters, which stay as they are, and a pyramid drawn from `config.seed`.

    The recipe is the module's `recipe` where it has one (a `Recipe`), else what timm noted in its `pretrained_cfg`,
    else ImageNet's mean and standard deviation on images stretched to 224×224.
    """
    _refuse_facts(config, "modules")
    recipe, told = getattr(module, "recipe", None), getattr(module, "pretrained_cfg", None)
    if not isinstance(recipe, Recipe):
        timm_told = isinstance(told, dict) and {"input_size", "mean", "std"} <= set(told)
        recipe = timm_recipe(told) if timm_told else Recipe(height=224, width=224)
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Weights(
        name=AS_GIVEN,
        backbone=name,
        recipe=recipe,
        body=ModelPart(None, AS_GIVEN),
        fpn=ModelPart.drawn(config.seed),
        state={},
        sha256=digest.hexdigest(),
    )


def _meant(choice: str, backbone: str) -> str:
    """The name that `default`, `imagenet` and `coco` stand for beside `backbone`."""
    if choice == "default":
        # Never a detector whose levels are not one per stride.
        choice = "coco" if backbone in COCO and backbone not in {name for name, _ in UNSTRIDED} else "imagenet"
    if choice == "imagenet":
        return str(best_weights(backbone))
    if choice == "coco" and backbone not in COCO:
        raise FpnxError(f"no weights coco for {backbone}, only for {', '.join(COCO)}: take imagenet, random or a file")
    return COCO[backbone] if choice == "coco" else choice


def _from_published(published: Published, config: ModelConfig) -> Weights:
    if config.backbone not in (None, published.backbone):
        raise FpnxError(
            f"weights {published.name} are for {published.backbone}, not for {config.backbone}: drop one of the two"
        )
    _refuse_facts(config, published.name)
    file = cached_file(published, config.offline)
    found = _from_file(file, published.backbone, config, published.recipe)
    trained = ModelPart(True, published.name)
    return replace(
        found,
        name=published.name,
        body=trained,
        fpn=trained if "pyramid" in published.trains else found.fpn,
        settings={name: Setting(value, "name") for name, (value, _) in found.settings.items()},
    )


def _timm(config: ModelConfig) -> Weights:
    """timm's weights: by the tag, by the full name (which names the backbone too), or the default ones."""
    backbone, choice = config.backbone or config.weights, config.weights
    known = timm_weights(check_backbone_name(backbone))
    tag = backbone.partition(".")[2]
    if choice in ("default", "imagenet"):
        wanted = [each for each in known if each.tag == tag] or known
    else:
        wanted = [each for each in known if choice in (each.name, each.name[len(TIMM) :], each.tag)]
    found = wanted[0] if wanted else None
    if found is None:
        there = ", ".join(each.tag for each in known) or "none"
        raise FpnxError(f"timm has no weights {escape(choice)!r} for {backbone}, only {there}: take random, or a file")
    if tag and found.tag != tag:
        raise FpnxError(f"weights {found.name} are not those of {backbone}: drop one of the two")
    _refuse_facts(config, found.name)
    file = fetched(found, config.offline)
    state = dict(read_checkpoint(file).state)
    return Weights(
        name=found.name,
        backbone=config.backbone or found.backbone,
        recipe=found.recipe,
        body=ModelPart(True, found.name),
        fpn=ModelPart.drawn(config.seed),
        state={f"body.{name}": value for name, value in adapted(found, state).items()},
        file=str(file),
        sha256=_sha256(file),
    )


def _is_file(choice: str) -> bool:
    return os.path.lexists(choice) or Path(choice).suffix in SUFFIXES


def _refuse_facts(config: ModelConfig, owner: str) -> None:
    given = next((each.name for each in fields(FileFacts) if getattr(config, each.name) is not None), None)
    if given is not None:
        raise FpnxError(
            f"{option_of(given)} is for files that cannot tell it; {owner} need no such word: drop the option"
        )


def _from_file(file: Path, backbone: str | None, config: ModelConfig, recipe: Recipe | None = None) -> Weights:
    """What `file` holds; `recipe` is known where the file was published."""
    checkpoint = read_checkpoint(file)
    sha256 = _sha256(file)
    try:
        layout = recognize_layout(checkpoint.state, checkpoint.config)
        about = _checked(checkpoint.about or {})
        name = _backbone_in(layout, about, backbone)
        if "recipe" in about:
            recipe = Recipe.from_json(about["recipe"])
        told = facts_in_file(layout, about, recipe)
        eps = norm_eps_of(file, sha256)
        recipe, values, settings = resolve_facts(layout, told, recipe, config, name, eps)
        unstrided = UNSTRIDED.get((name, layout.pyramid.in_channels)) if layout.pyramid else None
        pyramid = None
        if layout.pyramid is not None:
            top_block, who = resolve_top_block(layout, layout.pyramid, told, config.top_block, unstrided is not None)
            settings["top_block"] = Setting(top_block or "none", who)
            pyramid = CheckpointNeck(
                keys=layout.pyramid,
                first_level=about.get("first_level", layout.pyramid.first_level),
                top_block=top_block,
                p7_relu=values.get("p7_relu", True),
                levels=parse_levels(about["levels"]) if "levels" in about else None,
                strides=dict(zip(UNSTRIDED_LEVELS, unstrided[1], strict=True)) if unstrided else {},
            )
    except FpnxError as error:
        raise FpnxError(f"{escape(file)}: {error}") from error
    parts = about.get("parts", {})
    body, fpn = (
        ModelPart(*parts[part]) if part in parts else ModelPart(None, file.name)
        if any(key.startswith(f"{part}.") for key in layout.state) else ModelPart.drawn(config.seed)
        for part in ("body", "fpn")
    )  # fmt: skip
    return Weights(
        name=file.name,
        backbone=name,
        recipe=recipe,
        body=body,
        fpn=fpn,
        state=layout.state,
        pyramid=pyramid,
        norm_eps=values.get("norm_eps"),
        stride_in_1x1=bool(values.get("stride_in_1x1")),
        nodes=unstrided[0] if unstrided else None,
        framework=layout.framework,
        ignored=layout.ignored,
        settings=settings,
        note=OPENCV if layout.framework == "mmdetection" and recipe.backend == "tensor" else None,
        file=str(file),
        sha256=sha256,
    )


def _checked(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """The description in a file of fpnx's own, whose values may be anything."""
    parts = about.get("parts", {})
    eps = about.get("norm_eps")
    fits = {
        "first_level": about.get("first_level", 2) in range(8),
        "levels": isinstance(about.get("levels", []), list),
        "norm_eps": eps is None or (isinstance(eps, float) and 0 <= eps < 1),
        "top_block": about.get("top_block") in (None, *TOP_BLOCKS),
        "parts": isinstance(parts, dict)
        and all(isinstance(p, list) and len(p) == 2 and isinstance(p[1], str) for p in parts.values())
        and all(p[0] in (True, False, None) for p in parts.values()),
    }
    for name, is_fitting in fits.items():
        if not is_fitting:
            raise FpnxError(f"its description has {name} {escape(str(about[name]))[:60]}, which fpnx never wrote")
    return about


def _backbone_in(layout: StateDictLayout, about: Mapping[str, Any], asked: str | None) -> str:
    named = about.get("backbone")
    if named is not None:
        if asked not in (None, named):
            raise FpnxError(f"it is for {named}, not for {asked}: drop --backbone or take another file")
        return check_backbone_name(named)
    body = {name[5:]: value for name, value in layout.state.items() if name.startswith("body.")}
    if body:
        return backbone_of(body, asked)
    if asked is None:
        raise FpnxError("it does not say for which backbone it is: name it with --backbone")
    return asked


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
