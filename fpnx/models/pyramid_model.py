"""PyramidModel: a backbone, a neck and the preprocessing of its weights."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor, fx, nn

from fpnx.core.errors import FpnxError
from fpnx.core.levels import level_number
from fpnx.core.provenance import ModelPart
from fpnx.images.decoding import to_rgb
from fpnx.models.backbones.factory import (
    Backbone,
    one_size,
    tap_shapes,
)
from fpnx.models.necks.base import SEED_SCHEME, Neck, neck_shapes
from fpnx.models.weights.resolve import Weights

__all__ = ["PyramidModel"]


class PyramidModel(nn.Module):
    """A backbone with a neck on top: by default a Feature Pyramid Network (arXiv 1612.03144).

    `model(images)`: (B, 3, H, W) normalised float → `{"P2": (B, channels, H/4, W/4), ...}`, fine to coarse, C before
    P. What `levels` do not need is not computed. `state_dict()` has torchvision's names: `body.*`, and for an FPN
    `fpn.inner_blocks.*`, `fpn.layer_blocks.*`, `fpn.extra_blocks.*`, for the whole pyramid whatever `levels` selects.

    Attributes:
        fpn: the neck, of any kind.
        levels: names of what forward gives, fine to coarse.
        recipe: what is done to an image before it comes here; `str(model.recipe)` says it in words.
        weights: where the parameters come from (`weights.body` and `weights.fpn` say what is trained).
        size: the only (height, width) that the backbone takes, where it is built for one; else None.
    """

    def __init__(self, backbone: Backbone, neck: Neck, levels: tuple[str, ...], weights: Weights) -> None:
        super().__init__()
        self.body = backbone.body
        self.fpn = neck
        self.backbone = backbone.name
        self.channels = {f"C{k}": n for k, n in backbone.channels.items()} | dict.fromkeys(neck.levels, neck.channels)
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
        last = f"C{max(self.fpn.in_channels)}"
        if deepest == last or not isinstance(self.body, fx.GraphModule):  # what is hooked runs whole
            taps: dict[str, Tensor] = self.body(images)
            return taps
        return fx.Interpreter(self.body, graph=_up_to(self.body.graph, deepest)).run(images)

    def transform(self, picture: Image.Image) -> Tensor:
        """What the recipe does to one picture (any mode, upright) → (3, H, W) float32, normalised."""
        return self.recipe(to_rgb(picture))

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
            **self.fpn.identity(),
            "norm_eps": self.weights.norm_eps,
            "stride_in_1x1": self.weights.stride_in_1x1,
            **self.weights.choices,
        }

    def _parts(self) -> list[ModelPart]:
        """The parts that `levels` depend on."""
        pyramid = [self.weights.fpn] if set(self.levels) & set(self.fpn.levels) else []
        return [self.weights.body, *pyramid]

    def _needed_taps(self) -> list[str]:
        pyramid = [name for name in self.levels if name in self.fpn.levels]
        taps = [name for name in self.levels if name not in pyramid]
        return [*taps, *self.fpn.taps_for(pyramid)] if pyramid else taps

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
        levels = neck_shapes(self.fpn, taps, self.levels)
        shapes = self._known_shapes[size] = {name: (taps | levels)[name] for name in self.levels}
        return shapes


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
