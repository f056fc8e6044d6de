"""Backbone + pyramid + recipe, put together from a config."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, fx, nn

from fpnx.backbones import Backbone, create_backbone, given_backbone, one_size, parameter_shapes, tap_shapes
from fpnx.checkpoints import write_checkpoint
from fpnx.config import ExtractConfig, InputConfig, ModelConfig
from fpnx.errors import FpnxError, shown
from fpnx.images import as_rgb
from fpnx.provenance import ModelPart
from fpnx.pyramid import SEED_SCHEME, FeaturePyramid
from fpnx.values import UNSTRIDED_LEVELS, level_number, ordered_levels
from fpnx.weights import HeldPyramid, Weights, given_weights, resolve_weights

__all__ = ["PyramidModel", "build_model", "create_model", "save_weights"]

DEFAULT_CHANNELS = 256
UNTRAINED = "drop the option, or take --weights imagenet or random for an untrained pyramid"


class PyramidModel(nn.Module):
    """A backbone with a Feature Pyramid Network on top (arXiv 1612.03144).

    `model(images)`: (B, 3, H, W) normalised float → `{"P2": (B, channels, H/4, W/4), ...}`, fine to coarse, C before
    P. What nobody asked for is not computed. `state_dict()` has torchvision's names: `body.*`, `fpn.inner_blocks.*`,
    `fpn.layer_blocks.*`, `fpn.extra_blocks.*`, for the whole pyramid whatever `levels` selects.

    Attributes:
        levels: names of what forward gives, fine to coarse.
        recipe: what is done to an image before it comes here; `str(model.recipe)` says it in words.
        weights: where the parameters come from (`weights.body` and `weights.fpn` say what is trained).
        size: the only (height, width) that the backbone takes, where it is built for one; else None.
    """

    def __init__(self, backbone: Backbone, fpn: FeaturePyramid, levels: tuple[str, ...], weights: Weights) -> None:
        super().__init__()
        self.body = backbone.body
        self.fpn = fpn
        self.backbone = backbone.name
        self.channels = {f"C{k}": n for k, n in backbone.channels.items()} | dict.fromkeys(fpn.levels, fpn.channels)
        named = weights.pyramid.strides if weights.pyramid is not None else {}
        self.strides = dict(named) or {name: 2 ** level_number(name) for name in self.channels}
        self.size, self._side = backbone.size, backbone.side
        self.levels = levels
        self.weights = weights
        self.recipe = weights.recipe
        self._known_shapes: dict[tuple[int, int], dict[str, tuple[int, int, int]]] = {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        taps = self.taps(images)
        pyramid = self.fpn(taps, self.levels)
        return {name: pyramid[name] if name in pyramid else taps[name] for name in self.levels}

    def taps(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → the taps that `levels` need, `{"C2": (B, C, H/4, W/4), ...}`; deeper stages are not run."""
        deepest = max(self._needed_taps(), key=level_number)
        last = f"C{self.fpn.last_level}"
        if deepest == last or not isinstance(self.body, fx.GraphModule):  # what is hooked runs whole
            taps: dict[str, Tensor] = self.body(images)
            return taps
        return fx.Interpreter(self.body, graph=_up_to(self.body.graph, deepest)).run(images)

    def transform(self, picture: Image.Image) -> Tensor:
        """What the recipe does to one picture (any mode, upright) → (3, H, W) float32, normalised."""
        return self.recipe(as_rgb(picture))

    def shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """(channels, height, width) of every level for an input of `size` (height, width), without computing it.

        Raises:
            FpnxError: where the backbone cannot take that size.
        """
        if self.size is not None and size != self.size:
            raise FpnxError(self._one_size(size))
        try:
            return dict(self._shapes(size))
        except RuntimeError as error:
            least = self._least()
            hint = f": the smallest square it takes is {least}×{least}" if least else ""
            rounded = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
            if least and least <= min(size) and self._takes(rounded):
                hint = f": it takes {rounded[0]}×{rounded[1]}"
            raise FpnxError(f"{self.backbone} cannot take an input of {size[0]}×{size[1]}{hint}") from error

    def stride(self, level: str) -> int:
        """Stride of a level in input pixels."""
        return self.strides[level]

    def identity(self) -> dict[str, Any]:
        """What of this model changes numbers, as plain values for the fingerprint."""
        seeds = [part.seed for part in self._parts() if part.seed is not None]
        return {
            "backbone": self.backbone,
            "weights": self.weights.sha256 or "random",
            "seed": seeds[0] if seeds else None,
            "seed_scheme": SEED_SCHEME if seeds else None,
            "levels": list(self.levels),
            "channels": self.fpn.channels,
            "first_level": self.fpn.levels[0],
            "top_block": self.fpn.top_block,
            "p7_relu": self.fpn.p7_relu,
            "norm_eps": self.weights.norm_eps,
            "stride_in_1x1": self.weights.stride_in_1x1,
        }

    def _parts(self) -> list[ModelPart]:
        """The parts that `levels` depend on."""
        pyramid = [self.weights.fpn] if set(self.levels) & set(self.fpn.levels) else []
        return [self.weights.body, *pyramid]

    def _needed_taps(self) -> list[str]:
        pyramid = set(self.levels) & set(self.fpn.levels)
        taps = [name for name in self.levels if name not in pyramid]
        return [*taps, f"C{self.fpn.last_level}"] if pyramid else taps

    def _one_size(self, size: tuple[int, int]) -> str:
        assert self.size is not None
        assert self._side is not None
        if size[0] == size[1] and size[0] % self._side == 0:
            built = f"{self.size[0]}×{self.size[1]}"
            return f"{self.backbone} was built for inputs of {built}: give size {size[0]} when it is made"
        return one_size(self.backbone, size, self._side)

    def _least(self) -> int | None:
        """The side of the smallest square input, found by halving; None where 1024 is not taken either."""
        below, taken = 0, 1024
        if not self._takes((taken, taken)):
            return None
        while taken - below > 1:
            middle = (below + taken) // 2
            below, taken = (below, middle) if self._takes((middle, middle)) else (middle, taken)
        return taken

    def _takes(self, size: tuple[int, int]) -> bool:
        try:
            self._shapes(size)
        except RuntimeError:
            return False
        return True

    def _shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        if size in self._known_shapes:
            return self._known_shapes[size]
        taps = tap_shapes(self.body, size)
        shapes = self._known_shapes[size] = {}
        for name in self.levels:
            if name in taps:
                shapes[name] = taps[name]
                continue
            level = self.fpn.first_level + self.fpn.levels.index(name)
            height, width = taps[f"C{min(level, self.fpn.last_level)}"][1:]
            for _ in range(level - self.fpn.last_level):
                height, width = -(-height // 2), -(-width // 2)
            shapes[name] = (self.fpn.channels, height, width)
        return shapes


def create_model(
    backbone: str | nn.Module | None = ModelConfig.backbone,
    *,
    weights: str = ModelConfig.weights,
    levels: Any = ModelConfig.levels,
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
            those of named networks are. A copy is taken; its parameters stay as they are, only the pyramid is drawn,
            and `weights` must be `"default"` or `"random"`, which then mean the same.
        weights: `"default"`, `"imagenet"`, `"coco"`, `"random"`, a torchvision name such as
            `"ResNet50_Weights.IMAGENET1K_V2"`, or a file of fpnx, torchvision, detectron2 or mmdetection.
        levels: `"P2-P5"`, `"C3,P3"` or a sequence of names; None: a file's own levels, else P2…P5.
        channels: of every P level; None: a file's own, else 256.
        top_block: `"pool"` (P6), `"c5"`, `"p5"` or `"m5"` (P6 and P7); None: a file's own, else what `levels` need.
        seed: for the parts that have no trained parameters.
        offline: never download.
        size: of the recipe's output, as `InputConfig` has it: `"recipe"`, 448, (480, 640). A backbone that is built
            for one size is built for this one.
        stride_in_1x1, p7_relu, norm_eps, pixel_order, resampling, mean, std: what a file may not tell of itself;
            see `fpnx.config.FileFacts`.

    Raises:
        FpnxError: for names, levels, channels or files that do not exist or contradict each other.
    """
    module = backbone if isinstance(backbone, nn.Module) else None
    if isinstance(backbone, type):
        raise FpnxError(f"backbone {backbone.__name__} is a class: give a module that is made of it")
    config = ExtractConfig(
        backbone=None if isinstance(backbone, nn.Module) else backbone,
        weights=weights,
        levels=levels,
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


def build_model(config: ModelConfig, module: nn.Module | None = None) -> PyramidModel:
    """`create_model` from a config; `module` is a network of the caller's own."""
    weights, backbone = _named(config) if module is None else _given(config, module)
    _adjust(backbone.body, weights)
    if weights.pyramid is None:
        asked = [name for name in config.levels or () if name not in UNSTRIDED_LEVELS]
        backbone.check_levels(asked, config.top_block)
    with torch.random.fork_rng(devices=[]):  # modules draw when they are made, only to be filled below
        fpn = _held_pyramid(weights.pyramid, backbone, config, weights) if weights.pyramid else _new(backbone, config)
    levels = tuple(config.levels or (weights.pyramid and weights.pyramid.levels) or ())
    if not levels:
        levels = fpn.levels if weights.pyramid else tuple(f"P{k}" for k in backbone.pyramid_channels)
    _check_levels(levels, backbone, fpn, weights)
    fpn.draw(config.seed)
    model = PyramidModel(backbone, fpn, ordered_levels(levels), weights)
    _fill(model, weights)
    return model.eval()


def _named(config: ModelConfig) -> tuple[Weights, Backbone]:
    weights = resolve_weights(config)
    recipe = weights.recipe.sized(config) if isinstance(config, InputConfig) else weights.recipe
    return weights, create_backbone(weights.backbone, config.seed, weights.nodes, size=recipe.fixed_size)


def _given(config: ModelConfig, module: nn.Module) -> tuple[Weights, Backbone]:
    if config.weights not in ("default", "random"):
        raise FpnxError(
            f"weights {shown(config.weights)} beside a module: it keeps the parameters that it has: leave weights out, "
            "and load them into the module first"
        )
    backbone = given_backbone(module)
    return given_weights(module, backbone.name, config), backbone


def _new(backbone: Backbone, config: ModelConfig) -> FeaturePyramid:
    """A pyramid over all taps, with the top block that the levels need."""
    levels = tuple(config.levels or ())
    needed = "c5" if "P7" in levels else "pool" if "P6" in levels else None
    return FeaturePyramid(backbone.pyramid_channels, config.channels or DEFAULT_CHANNELS, config.top_block or needed)


def _held_pyramid(held: HeldPyramid, backbone: Backbone, config: ModelConfig, weights: Weights) -> FeaturePyramid:
    """The pyramid that the weights hold, with P6 by pool where it is asked for and costs no parameters."""
    keys, owner = held.keys, shown(weights.name)
    if config.channels not in (None, keys.channels):
        raise FpnxError(f"channels {config.channels} contradicts {owner}, which has {keys.channels}: {UNTRAINED}")
    taps = [backbone.pyramid_channels[k] for k in sorted(backbone.pyramid_channels)]
    firsts = [held.first_level] if held.first_level is not None else [
        k for k in backbone.pyramid_channels if tuple(taps[k - min(backbone.pyramid_channels) :]) == keys.in_channels
    ]  # fmt: skip
    inputs = {firsts[0] + i: n for i, n in enumerate(keys.in_channels)} if firsts else {}
    if not inputs.items() or not inputs.items() <= backbone.pyramid_channels.items():
        raise FpnxError(
            f"{owner} has laterals for {_listed(keys.in_channels)} channels, {backbone.name} gives {_listed(taps)}: "
            f"they must be its last taps"
        )
    top_block = held.top_block or ("pool" if "P6" in (config.levels or ()) else None)
    return FeaturePyramid(
        inputs, keys.channels, top_block, norm=keys.norm, p7_relu=held.p7_relu, names=tuple(held.strides)
    )


def _adjust(body: nn.Module, weights: Weights) -> None:
    """Give the body the norms' epsilon and the bottlenecks' stride that the weights were trained with."""
    for name, module in body.named_modules():
        if isinstance(module, nn.BatchNorm2d) and weights.norm_eps is not None:
            module.eps = weights.norm_eps
        elif weights.stride_in_1x1 and re.fullmatch(r"layer[234]\.0\.conv[12]", name):
            module.stride = (2, 2) if name.endswith("1") else (1, 1)


def save_weights(model: PyramidModel, path: str | os.PathLike[str]) -> None:
    """Write the model's parameters, with what they are, to `.safetensors`, `.pt` or `.pth`.

    `--weights FILE` and `create_model(weights=FILE)` read it back: backbone, pyramid, levels, recipe and the
    statement of what is trained come from the file.

    Raises:
        FpnxError: where the file cannot be written.
    """
    about = {
        "backbone": model.backbone,
        "first_level": model.fpn.first_level,
        "top_block": model.fpn.top_block,
        "p7_relu": model.fpn.p7_relu,
        "norm_eps": model.weights.norm_eps,
        "stride_in_1x1": model.weights.stride_in_1x1,
        "levels": list(model.levels),
        "recipe": model.recipe.to_json(),
        "parts": {
            name: [part.trained, part.source]
            for name, part in (("body", model.weights.body), ("fpn", model.weights.fpn))
        },
    }
    write_checkpoint(path, model.state_dict(), about)


def _check_levels(levels: tuple[str, ...], backbone: Backbone, fpn: FeaturePyramid, weights: Weights) -> None:
    held = weights.pyramid
    there = (() if held and held.strides else ordered_levels(f"C{k}" for k in backbone.nodes)) + fpn.levels
    absent = next((name for name in levels if name not in there), None)
    if absent is None:
        return
    if held is not None:
        raise FpnxError(f"{shown(weights.name)} has no level {absent}: it has {_listed(there)}; {UNTRAINED}")
    if absent == "P7" and fpn.top_block == "pool":
        raise FpnxError("level P7 does not come by pool: take top block c5 or p5")
    raise FpnxError(f"{backbone.name} has no level {absent}: it gives {_listed(there)}")


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


def _fill(model: PyramidModel, weights: Weights) -> None:
    """Load `weights.state`, strictly for each part that it holds. What the network has beyond its taps is ignored."""
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
        "not of floating-point numbers": sorted(
            f"{key} {str(given[key].dtype).removeprefix('torch.')}"
            for key in set(given) & set(own)
            if own[key].is_floating_point() and not given[key].is_floating_point()
        ),
    }
    told = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in problems.items() if keys]  # fmt: skip
    if told:
        raise FpnxError(
            f"{shown(weights.name)} does not fit {model.backbone}: {'; '.join(told)}: take matching weights"
        )
    model.load_state_dict(given, strict=False)


def _up_to(graph: fx.Graph, tap: str) -> fx.Graph:
    """A copy of `graph` that stops at `tap`."""
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    shorter, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        copied[node] = shorter.node_copy(node, copied.__getitem__)
        if node is outputs[tap]:
            break
    shorter.output({name: copied[node] for name, node in outputs.items() if node in copied})
    return shorter
