"""Backbone + pyramid + recipe, put together from a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, fx, nn

from fpnx.backbones import Backbone, create_backbone, tap_shapes
from fpnx.config import ModelConfig, level_number, ordered_levels
from fpnx.errors import FpnxError, shown
from fpnx.images import as_rgb
from fpnx.pyramid import SEED_SCHEME, FeaturePyramid
from fpnx.weights import Weights, resolve_weights, write_weights

__all__ = ["PyramidModel", "build_model", "create_model", "save_weights"]

DEFAULT_CHANNELS = 256


class PyramidModel(nn.Module):
    """A backbone with a Feature Pyramid Network on top (arXiv 1612.03144).

    `model(images)`: (B, 3, H, W) normalised float → `{"P2": (B, channels, H/4, W/4), ...}`, fine to coarse, C before
    P. What nobody asked for is not computed. `state_dict()` has torchvision's names: `body.*`, `fpn.inner_blocks.*`,
    `fpn.layer_blocks.*`, `fpn.extra_blocks.*`, for the whole pyramid whatever `levels` selects.

    Attributes:
        levels: names of what forward gives, fine to coarse.
        recipe: what is done to an image before it comes here; `str(model.recipe)` says it in words.
        weights: where the parameters come from (`weights.body` and `weights.fpn` say what is trained).
    """

    def __init__(self, backbone: Backbone, fpn: FeaturePyramid, levels: tuple[str, ...], weights: Weights) -> None:
        super().__init__()
        self.body = backbone.body
        self.fpn = fpn
        self.backbone = backbone.name
        self.channels = {f"C{k}": n for k, n in backbone.channels.items()} | dict.fromkeys(fpn.levels, fpn.channels)
        self.levels = levels
        self.weights = weights
        self.recipe = weights.recipe
        self._known_shapes: dict[tuple[int, int], dict[str, tuple[int, int, int]]] = {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        taps = self.taps(images)
        pyramid = self.fpn(taps, [name for name in self.levels if name[0] == "P"])
        return {name: taps[name] if name[0] == "C" else pyramid[name] for name in self.levels}

    def taps(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → the taps that `levels` need, `{"C2": (B, C, H/4, W/4), ...}`; deeper stages are not run."""
        deepest = max(self._needed_taps(), key=level_number)
        last = f"C{self.fpn.last_level}"
        if deepest == last:
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
        try:
            return dict(self._shapes(size))
        except RuntimeError as error:
            least = next((n for n in range(1, 1025) if self._takes((n, n))), None)
            hint = f": the smallest square it takes is {least}×{least}" if least else ""
            raise FpnxError(f"{self.backbone} cannot take an input of {size[0]}×{size[1]}{hint}") from error

    def stride(self, level: str) -> int:
        """Stride of a level in input pixels."""
        return 2 ** level_number(level)

    def identity(self) -> dict[str, Any]:
        """What of this model changes numbers, as plain values for the fingerprint."""
        seeded = any(part.trained is False and part.source.startswith("random") for part in self._parts().values())
        return {
            "backbone": self.backbone,
            "weights": self.weights.sha256 or "random",
            "seed": _seed_of(self._parts()) if seeded else None,
            "seed_scheme": SEED_SCHEME if seeded else None,
            "levels": list(self.levels),
            "channels": self.fpn.channels,
            "first_level": f"P{self.fpn.first_level}",
            "top_block": self.fpn.top_block,
        }

    def _parts(self) -> dict[str, Any]:
        wanted = {"body": self.weights.body}
        if any(name[0] == "P" for name in self.levels):
            wanted["fpn"] = self.weights.fpn
        return wanted

    def _needed_taps(self) -> list[str]:
        pyramid = any(name[0] == "P" for name in self.levels)
        taps = [name for name in self.levels if name[0] == "C"]
        return [*taps, f"C{self.fpn.last_level}"] if pyramid else taps

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
            height, width = taps[f"C{min(level_number(name), self.fpn.last_level)}"][1:]
            for _ in range(level_number(name) - self.fpn.last_level):
                height, width = -(-height // 2), -(-width // 2)
            shapes[name] = (self.fpn.channels, height, width)
        return shapes


def create_model(
    backbone: str | None = ModelConfig.backbone,
    *,
    weights: str = ModelConfig.weights,
    levels: Any = ModelConfig.levels,
    channels: int | None = ModelConfig.channels,
    top_block: str | None = ModelConfig.top_block,
    seed: int = ModelConfig.seed,
    offline: bool = ModelConfig.offline,
) -> PyramidModel:
    """A backbone with its feature pyramid, in eval mode on the CPU; see `PyramidModel`.

    Args:
        backbone: a name (`fpnx.backbones.TAPS`); None takes the one that the weights are for, or ResNet-50.
        weights: `"default"`, `"imagenet"`, `"random"`, a torchvision name such as
            `"ResNet50_Weights.IMAGENET1K_V2"`, or a file that `fpnx.save_weights` wrote.
        levels: `"P2-P5"`, `"C3,P3"` or a sequence of names; None: a file's own levels, else P2…P5.
        channels: of every P level; None: a file's own, else 256.
        top_block: `"pool"` (P6), `"c5"` or `"p5"` (P6 and P7); None: a file's own, else what `levels` need.
        seed: for the parts that have no trained parameters.
        offline: never download.

    Raises:
        FpnxError: for names, levels, channels or files that do not exist or contradict each other.
    """
    return build_model(
        ModelConfig(
            backbone=backbone,
            weights=weights,
            levels=levels,
            channels=channels,
            top_block=top_block,
            seed=seed,
            offline=offline,
        )
    )


def build_model(config: ModelConfig) -> PyramidModel:
    """`create_model` from a config."""
    weights = resolve_weights(config)
    backbone = create_backbone(weights.backbone, config.seed)
    held = weights.pyramid or {}
    _refuse("channels", config.channels, held.get("channels"), weights)
    channels = held.get("channels") or config.channels or DEFAULT_CHANNELS
    first = held.get("first_level", min(backbone.nodes))
    levels = tuple(config.levels or held.get("levels") or [f"P{k}" for k in range(first, max(backbone.nodes) + 1)])
    top_block = _top_block(levels, config, weights)
    with torch.random.fork_rng(devices=[]):  # modules draw when they are made, only to be filled below
        fpn = FeaturePyramid({k: n for k, n in backbone.channels.items() if k >= first}, channels, top_block)
    _check_levels(levels, backbone, fpn, weights)
    fpn.draw(config.seed)
    model = PyramidModel(backbone, fpn, ordered_levels(levels), weights)
    _fill(model, weights)
    return model.eval()


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
        "levels": list(model.levels),
        "recipe": model.recipe.to_json(),
        "parts": {
            name: [part.trained, part.source]
            for name, part in (("body", model.weights.body), ("fpn", model.weights.fpn))
        },
    }
    write_weights(path, model.state_dict(), about)


def _top_block(levels: tuple[str, ...], config: ModelConfig, weights: Weights) -> str | None:
    held = weights.pyramid
    if held is not None and (held["top_block"] or "P6" not in levels):
        if held["top_block"] is not None:
            _refuse("top block", config.top_block, held["top_block"], weights)
        return held["top_block"] or config.top_block
    if held is not None and config.top_block in ("c5", "p5"):
        raise FpnxError(f"{weights.name} has no top block {config.top_block}: its P6 can come by pool only")
    if config.top_block is not None:
        return config.top_block
    return "c5" if "P7" in levels and held is None else "pool" if "P6" in levels else None


def _check_levels(levels: tuple[str, ...], backbone: Backbone, fpn: FeaturePyramid, weights: Weights) -> None:
    taps = ordered_levels(f"C{k}" for k in backbone.nodes)
    for name in levels:
        if name in (*taps, *fpn.levels):
            continue
        if name == "P7" and fpn.top_block == "pool" and weights.pyramid is None:
            raise FpnxError("level P7 does not come by pool: take top block c5 or p5")
        owner = weights.name if weights.pyramid is not None else f"{backbone.name}"
        raise FpnxError(f"{owner} has no level {name}: it gives {', '.join(taps)} and {', '.join(fpn.levels)}")


def _refuse(what: str, asked: object, held: object, weights: Weights) -> None:
    if asked is not None and held is not None and asked != held:
        raise FpnxError(f"{what} {asked} contradicts {shown(weights.name)}, which has {held}: drop the option")


def _fill(model: PyramidModel, weights: Weights) -> None:
    """Load `weights.state`, strictly for each part that it holds. A classifier's head is ignored."""
    own = model.state_dict()
    parts = {key.split(".", 1)[0] for key in weights.state}
    heads = ("body.fc.", "body.classifier.")
    given = {key: value for key, value in weights.state.items() if not key.startswith(heads)}
    wanted = {key for key in own if key.split(".", 1)[0] in parts and not key.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(wanted - set(given)),
        "unexpected": sorted(set(given) - set(own)),
        "misshapen": sorted(
            f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
            for key in set(given) & set(own)
            if given[key].shape != own[key].shape
        ),
    }
    told = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in problems.items() if keys]  # fmt: skip
    if told:
        raise FpnxError(
            f"{shown(weights.name)} does not fit {model.backbone}: {'; '.join(told)}: take matching weights"
        )
    model.load_state_dict(given, strict=False)


def _seed_of(parts: Mapping[str, Any]) -> int:
    return next(int(p.source.rsplit(" ", 1)[1]) for p in parts.values() if p.source.startswith("random, seed "))


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
