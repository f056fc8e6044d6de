"""PyramidModel: a backbone, a neck and the preprocessing of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, fx, nn

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.levels import level_number
from fpnx.core.provenance import AS_GIVEN, ModelPart
from fpnx.models.backbones.factory import (
    Backbone,
    one_size,
    tap_shapes,
)
from fpnx.models.necks.base import SEED_SCHEME, Neck, neck_shapes
from fpnx.models.pictures import ImageLike, to_picture
from fpnx.models.preprocessing import Recipe, scaled_size
from fpnx.models.weights.resolve import Weights, parameters_hash

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
        weights: where the parameters come from (`weights.body` and `weights.fpn` say what is trained), as it was when
            the model was made; see `current_weights`.
        size: the only (height, width) that the backbone takes, where it is built for one; else None.
        one_stride: the stride of the backbone's only tap, where its maps all have one; else None.
        blocks: then, the blocks whose maps are the tap, counted from 0.
    """

    def __init__(self, backbone: Backbone, neck: Neck, levels: tuple[str, ...], weights: Weights) -> None:
        super().__init__()
        self.body = backbone.body
        self.fpn = neck
        self.backbone = backbone.name
        self.channels = {f"C{k}": n for k, n in backbone.channels.items()} | dict.fromkeys(neck.levels, neck.channels)
        named = weights.pyramid.strides if weights.pyramid is not None else {}
        self.strides = dict(named) or {
            name: stride for name in self.channels if (stride := backbone.stride(level_number(name))) is not None
        }
        self.one_stride, self.blocks = backbone.one_stride, backbone.blocks
        self.size, self._side = backbone.size, backbone.side
        self.levels = levels
        self.weights = weights
        self.recipe = weights.recipe
        self._known_shapes: dict[tuple[int, int], dict[str, tuple[int, int, int]]] = {}
        self._sums: dict[str, int] = {}
        self._forward_to: dict[str, Callable[[nn.Module, Tensor], dict[str, Tensor]]] = {}
        self._last_tap = f"C{max(backbone.channels)}"
        self._forward_to_deepest()  # now, since compiled code cannot make it

    @property
    def scales(self) -> dict[str, float]:
        """For a pyramid of the image at several scales: the scale of each level, relative to the network's input."""
        return {name: self.fpn.scales[name] for name in self.levels if name in self.fpn.scales}

    @property
    def has_neck(self) -> bool:
        """Whether `levels` has any that the neck's parameters give, and not taps alone."""
        return not self.scales and bool(set(self.levels) & set(self.fpn.levels))

    @property
    def largest_scale(self) -> float:
        """The largest of `scales`; 1 where there are none."""
        return max(self.scales.values(), default=1.0)

    @property
    def work(self) -> float:
        """Pixels that go through the backbone, relative to one pass over the network's input."""
        return sum(scale**2 for scale in self.scales.values()) or 1.0

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The levels of (B, 3, H, W) normalised images.

        With the pyramid `"image"` also of `{"P4": (B, 3, 2 H, 2 W), ...}`, the image at the scale of each level, as
        `transform` gives it. A single tensor is enlarged, which adds no detail.
        """
        if self.scales:
            inputs = images if isinstance(images, Mapping) else self._rescaled(images)
            (tap,) = self.fpn.taps_for(self.levels)
            return {name: self.taps(inputs[name])[tap] for name in self.levels}
        taps = self.taps(cast(Tensor, images))
        pyramid = self.fpn(taps, self.levels)
        return {name: pyramid[name] if name in pyramid else taps[name] for name in self.levels}

    def taps(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → the taps that `levels` need, `{"C2": (B, C, H/4, W/4), ...}`; deeper stages are not run."""
        forward = self._forward_to_deepest()
        taps: dict[str, Tensor] = self.body(images) if forward is None else forward(self.body, images)
        return taps

    def transform(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """What the recipe makes of an image, or of each image of a list or tuple: (3, H, W) float32 on the CPU.

        With the pyramid `"image"` it is a dict of them, the image at the scale of each level.

        Args:
            images: one or several, each a path, a Pillow image of any mode, a uint8 array (H, W, 3) or a uint8 tensor
                (3, H, W); arrays and tensors are RGB, 0..255. Paths and Pillow images are turned upright by their EXIF
                orientation.

        Raises:
            ImageError: an image that cannot be read.
            FpnxError: anything else than an image.
        """
        if isinstance(images, (list, tuple)):
            return [self.transform(image) for image in images]
        return self._inputs(to_picture(images, self.recipe.pixels))

    @overload
    def features(self, images: ImageLike) -> dict[str, Tensor]: ...
    @overload
    def features(self, images: Sequence[ImageLike]) -> list[dict[str, Tensor]]: ...
    def features(self, images: ImageLike | Sequence[ImageLike]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The levels of an image, `{"P2": (C, H/4, W/4), ...}`, or a list of them for a list or tuple of images.

        As `fpnx.extract` stores them, padding included, to 1e-5 of each level's largest value. Computed on the model's
        device in its dtype, without gradients, one image after the other.

        Args:
            images: as for `transform`.

        Raises:
            ImageError: an image that cannot be read.
            FpnxError: anything else than an image; a size that the backbone cannot take; a model in training mode,
                where batch norms would use the batch's statistics.
        """
        if self.training:
            raise FpnxError("the model is in training mode: call model.eval() first")
        if isinstance(images, (list, tuple)):
            return [self.features(image) for image in images]
        picture = to_picture(images, self.recipe.pixels)
        self.shapes(self.recipe.padded(self.recipe.input_size((picture.height, picture.width))))
        inputs, like = self._inputs(picture), next(self.parameters())
        with torch.no_grad():
            if self.scales:
                levels = self({name: image[None].to(like) for name, image in inputs.items()})
            else:
                levels = self(inputs[None].to(like))
        return {name: level[0] for name, level in levels.items()}

    def resize(self, picture: Image.Image, size: tuple[int, int], recipe: Recipe) -> Any:
        """The pixels of the network's input for an upright RGB picture; see `Recipe.resize`.

        With the pyramid `"image"` they are a tuple, one array at the scale of each level, all from the picture itself.
        """
        if self.scales:
            return tuple(recipe.resize(picture, scaled_size(size, scale)) for scale in self.scales.values())
        return recipe.resize(picture, size)

    def note_parameters(self) -> None:
        """Take the parameters to be those of `weights`; `current_weights` tells when they were changed afterwards."""
        self._sums = self._checksums()

    def current_weights(self) -> Weights:
        """`weights`, with the source of each part whose parameters were changed as "as given".

        `sha256` is then that of all parameters and buffers.
        """
        changed = {name for name, value in self._checksums().items() if self._sums.get(name) != value}
        if not changed:
            return self.weights
        parts: dict[str, Any] = {name: ModelPart(None, AS_GIVEN) for name in changed}
        return replace(self.weights, **parts, sha256=parameters_hash(self))

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
            if self.one_stride is not None:
                raise FpnxError(self._no_multiple(size)) from error
            least = self._least()
            hint = f": the smallest square it takes is {least}×{least}" if least else ""
            rounded = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
            if least and least <= min(size) and self._takes(rounded):
                hint = f": it takes {rounded[0]}×{rounded[1]}"
            raise FpnxError(f"{self.backbone} cannot take an input of {size[0]}×{size[1]}{hint}") from error

    def padded_size(self, size: tuple[int, int], recipe: Recipe) -> tuple[int, int]:
        """(height, width) to which `recipe` pads an image of `size` after resizing.

        Raises:
            ImageError: the backbone cannot take that size, and other images may have another.
            FpnxError: it cannot take that size, which all images have.
        """
        padded = recipe.padded(size)
        try:
            self.shapes(padded)
        except FpnxError as error:
            if recipe.fixed_size is not None:
                raise
            raise ImageError(str(error)) from error
        return padded

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
            **({"blocks": list(self.blocks)} if self.blocks else {}),
            **self.fpn.identity(),
            "norm_eps": self.weights.norm_eps,
            "stride_in_1x1": self.weights.stride_in_1x1,
            **self.weights.choices,
        }

    def _inputs(self, picture: Image.Image) -> Any:
        """The network's input of an upright RGB picture, or of each level by name."""
        if self.scales:
            return {name: self.recipe(picture, scale) for name, scale in self.scales.items()}
        return self.recipe(picture)

    def _rescaled(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) at the scale of each level, interpolated."""
        height, width = images.shape[-2:]
        return {
            name: F.interpolate(images, size=scaled_size((height, width), scale), mode="bilinear", antialias=scale < 1)
            if scale != 1
            else images
            for name, scale in self.scales.items()
        }

    def _checksums(self) -> dict[str, int]:
        """The sum of all parameters and buffers of `body` and `fpn`, their bytes read as integers."""
        return {
            name: sum(_as_integers(value).sum(dtype=torch.int64).item() for value in part.state_dict().values())
            for name, part in (("body", self.body), ("fpn", self.fpn))
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forward_to": {}}  # code made at run time cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_forward_to": {}, **state})
        self._forward_to_deepest()

    def _forward_to_deepest(self) -> Callable[[nn.Module, Tensor], dict[str, Tensor]] | None:
        """The body's forward up to the deepest tap that `levels` need; None where that is all of it."""
        deepest = max(self._needed_taps(), key=level_number)
        if deepest == self._last_tap or not isinstance(self.body, fx.GraphModule):
            return None  # what is hooked runs whole
        if deepest not in self._forward_to:
            self._forward_to[deepest] = type(fx.GraphModule(self.body, _up_to(self.body.graph, deepest))).forward
        return self._forward_to[deepest]

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
        if self.one_stride is not None:
            return (
                f"{self.weights.name} is for inputs of {self.size[0]}×{self.size[1]}, padding included, and not of "
                f"{size[0]}×{size[1]}: it has position embeddings for that size alone: leave out the size"
            )
        assert self._side is not None
        if size[0] == size[1] and size[0] % self._side == 0:
            built = f"{self.size[0]}×{self.size[1]}"
            return f"{self.backbone} was built for inputs of {built}: give size {size[0]} when it is made"
        return one_size(self.backbone, size, self._side)

    def _no_multiple(self, size: tuple[int, int]) -> str:
        """Why a backbone whose maps have one stride does not take `size` (height, width), and the nearest that is."""
        assert self.one_stride is not None
        multiple = math.ceil(self.one_stride / min([1.0, *self.scales.values()]))
        height, width = (max(multiple, math.floor(side / multiple + 0.5) * multiple) for side in size)
        text = f"{self.backbone} cannot take an input of {size[0]}×{size[1]}"
        if (height, width) == size or not self._takes((height, width)):
            return text
        return f"{text}: its sides are multiples of {multiple}: the nearest size is {height}×{width}"

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
        if self.scales:
            (tap,) = self.fpn.taps_for(self.levels)
            levels = {name: tap_shapes(self.body, scaled_size(size, scale))[tap] for name, scale in self.scales.items()}
            taps = {}
        else:
            taps = tap_shapes(self.body, size)
            levels = neck_shapes(self.fpn, taps, self.levels)
        shapes = self._known_shapes[size] = {name: (taps | levels)[name] for name in self.levels}
        return shapes


def _as_integers(value: Tensor) -> Tensor:
    """The bytes of a tensor as integers of its item size."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().view(kinds[value.element_size()])


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
