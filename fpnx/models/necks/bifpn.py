"""The Bidirectional Feature Pyramid Network (EfficientDet; Tan et al. 2020, arXiv 1911.09070), as effdet builds it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.models.necks.base import Neck, draw_convolutions, reset_norms

__all__ = ["BiFPN", "cells_for_width"]

# Channels and cells of EfficientDet D0 to D7 (table 1 of the paper).
PUBLISHED_CELLS = {64: 3, 88: 4, 112: 5, 160: 6, 224: 7, 288: 7, 384: 8}
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu6": nn.ReLU6}
EPS = 1e-4  # of the fast normalised fusion
NORM_EPS = 1e-3
# Of drawn 1×1: keeps the variance of a mean of two through a SiLU, whose output has a mean square of 0.356 for a normal
# input. Without it values fall below float16's smallest within a few cells.
GAIN = (2 / 0.356) ** 0.5


class BiFPN(Neck):
    """Cells that merge all levels top-down and then bottom-up, with learned weights (section 3 of the paper).

    The first cell takes the taps C_first…C_last and coarser levels made from C_last; each further cell takes the
    levels that the one before gives. In each cell, for inputs I_k:

    T_k = conv(fuse(I_k, up(T_{k+1}))), from the coarsest level, where T = I, to the finest, where O = T;
    O_k = conv(fuse(I_k, T_k, down(O_{k-1}))), and for the coarsest level O_k = conv(fuse(I_k, down(O_{k-1}))).

    fuse(x_1, x_2, …) = Σ w_i x_i / (ε + Σ w_j) with w = ReLU of one learned number for each input and ε = 1e-4, the
    fast normalised fusion of section 3.3. conv is an activation, a depthwise 3×3, a 1×1 and a batch norm. up is
    nearest, down a max pooling of 3×3 and stride 2; sizes are halved and rounded up. A tap with other than
    `channels` channels passes a 1×1 with batch norm before each fusion, and before P_{last+1} is pooled from it.

    Args:
        in_channels: channels of the taps, by level number, contiguous: `{3: 512, 4: 1024, 5: 2048}`.
        channels: channels of every level.
        cells: how many there are; None takes the paper's number for that width (`cells_for_width`).
        extra_levels: how many there are above the last tap. A level 8 is computed, but not given.
        weighted: learned weights; False takes plain sums, as D6, D7 and the Lite models do.
        activation: `"silu"` or `"relu6"` (Lite).
        resampling: `"pool"`, as above, or `"bilinear"` for up and down.
        padding: of the pooling: `"symmetric"`, or `"same"` as TensorFlow pads: at the end only where a side is even.
        bias: whether convolutions before a batch norm have a bias, as in TensorFlow's models.
    """

    kind = "bifpn"
    summary = "EfficientDet's BiFPN, weighted and repeated"
    default_channels = 64
    default_levels = ("P3", "P4", "P5", "P6", "P7")
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "activation": tuple(ACTIVATIONS),
        "resampling": ("pool", "bilinear"),
        "padding": ("symmetric", "same"),
    }

    def __init__(
        self,
        in_channels: Mapping[int, int],
        channels: int = 64,
        cells: int | None = None,
        *,
        extra_levels: int = 2,
        weighted: bool = True,
        activation: str = "silu",
        resampling: str = "pool",
        padding: str = "symmetric",
        bias: bool = False,
    ) -> None:
        super().__init__()
        taps = sorted(in_channels)
        assert taps == list(range(taps[0], taps[-1] + 1)), "taps must be contiguous"
        self.in_channels, self.channels = dict(in_channels), channels
        self.first_level, self.last_tap, self.last_level = taps[0], taps[-1], taps[-1] + extra_levels
        self.weighted, self.activation, self.bias = weighted, activation, bias
        self.resampling, self.padding = resampling, padding
        self.levels = tuple(f"P{k}" for k in range(self.first_level, min(self.last_level, 7) + 1))
        self.resize = Resize(resampling, padding)
        self.extra_block = _projection(in_channels[self.last_tap], channels, bias)
        make_node = partial(_Node, channels=channels, weighted=weighted, activation=ACTIVATIONS[activation], bias=bias)
        widths = [in_channels.get(k, channels) for k in range(self.first_level, self.last_level + 1)]
        self.cells = nn.ModuleList()
        for _ in range(cells_for_width(channels) if cells is None else cells):
            self.cells.append(_Cell(widths, make_node, channels))
            widths = [channels] * len(widths)

    @classmethod
    def for_levels(
        cls, in_channels: Mapping[int, int], channels: int, levels: Sequence[str], top_block: str | None
    ) -> BiFPN:
        """A pyramid from C3, or from C2 where P2 is asked for, to P7.

        Raises:
            FpnxError: `top_block` is given.
        """
        if top_block is not None:
            raise FpnxError(f"top block {top_block} is for fpn and pafpn, a bifpn pools its P6 and P7: drop the option")
        last = max(in_channels)
        first = min(2 if "P2" in levels else 3, last)
        return cls({k: n for k, n in in_channels.items() if k >= first}, channels, extra_levels=max(7 - last, 0))

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """Taps `{"C3": (B, C, H, W), ...}` → the asked levels, fine to coarse; what no level needs is not computed."""
        wanted = [i for i, name in enumerate(self.levels) if levels is None or name in levels]
        if not wanted:
            return {}
        maps = [taps[f"C{k}"] for k in sorted(self.in_channels)]
        for k in range(self.last_tap, self.last_level):
            maps.append(self.resize.down(self.extra_block(maps[-1]) if k == self.last_tap else maps[-1]))
        for cell in self.cells:
            last = wanted[-1] if cell is self.cells[-1] else len(maps) - 1
            maps = cell(maps, self.resize, last)
        return {self.levels[i]: maps[i] for i in wanted}

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all convolutions (Kaiming uniform, zero bias), each from a generator of its own for (seed, cell, path,
        level, place). Weights of the fusions are 1; batch norms change nothing but by their epsilon."""
        reset_norms(self)
        draw_convolutions(self.extra_block, seed, "bifpn.extra")
        for i, cell in enumerate(self.cells):
            for path, nodes, finest in (("down", cell.top_down, 0), ("up", cell.bottom_up, 1)):
                for k, node in enumerate(nodes, self.first_level + finest):
                    name = f"bifpn.{i}.{path}{k}"
                    for j, projection in enumerate(node.projections):
                        draw_convolutions(projection, seed, f"{name}.projection{j}")
                    draw_convolutions(node.depthwise, seed, f"{name}.depthwise")
                    draw_convolutions(node.pointwise, seed, f"{name}.pointwise")
                    node.pointwise[0].weight.mul_(GAIN)
                    if node.weights is not None:
                        nn.init.ones_(node.weights)

    def identity(self) -> dict[str, Any]:
        """The kind, channels, which levels, how many cells, and how levels are merged and resampled."""
        return {
            "pyramid": self.kind,
            "channels": self.channels,
            "first_level": f"P{self.first_level}",
            "extra_levels": self.last_level - self.last_tap,
            "cells": len(self.cells),
            "weighted": self.weighted,
            "activation": self.activation,
            "resampling": self.resampling,
            "padding": self.padding,
        }

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """What makes P6 from the last tap, and each cell."""
        return {"P6": (self.extra_block,), **{f"cell {i + 1}": (cell,) for i, cell in enumerate(self.cells)}}


def cells_for_width(channels: int) -> int:
    """The number of cells that EfficientDet has with so many channels, or with the next smaller width (64: 3)."""
    return max((cells for width, cells in PUBLISHED_CELLS.items() if width <= channels), default=3)


@dataclass(frozen=True)
class Resize:
    """How a map becomes one of the next coarser or finer level."""

    resampling: str
    padding: str

    def up(self, x: Tensor, size: Any) -> Tensor:
        """(B, C, h, w) → (B, C, H, W) of `size` (H, W)."""
        if self.resampling == "bilinear":
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return F.interpolate(x, size=size, mode="nearest")

    def down(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ⌈H/2⌉, ⌈W/2⌉)."""
        height, width = x.shape[-2], x.shape[-1]
        if self.resampling == "bilinear":
            size = ((height + 1) // 2, (width + 1) // 2)
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        if self.padding == "same":  # where a side is even, by one at its end; where it is odd, at both ends
            return F.max_pool2d(x, 3, 2, (height % 2, width % 2), ceil_mode=True)
        return F.max_pool2d(x, 3, 2, 1)


class _Cell(nn.Module):
    """One top-down and one bottom-up path; nodes are counted from the finest level."""

    def __init__(self, widths: Sequence[int], make_node: Callable[[Sequence[int]], _Node], channels: int) -> None:
        super().__init__()
        top = len(widths) - 1
        self.top_down = nn.ModuleList(
            make_node([widths[k], widths[top] if k + 1 == top else channels]) for k in range(top)
        )
        self.bottom_up = nn.ModuleList(
            make_node([widths[k], channels, channels] if k < top else [widths[k], channels]) for k in range(1, top + 1)
        )

    def forward(self, inputs: Sequence[Tensor], resize: Resize, last: int) -> list[Tensor]:
        """The levels up to index `last` from all levels, fine to coarse."""
        top = len(inputs) - 1
        merged = {top: inputs[top]}
        for k in range(top - 1, -1, -1):
            coarser = merged[k + 1]
            merged[k] = self.top_down[k]([inputs[k], coarser], partial(resize.up, size=inputs[k].shape[-2:]))
        outputs = [merged[0]]
        for k in range(1, last + 1):
            own = [inputs[k], merged[k]] if k < top else [inputs[k]]
            outputs.append(self.bottom_up[k - 1]([*own, outputs[-1]], resize.down))
        return outputs


class _Node(nn.Module):
    """conv(fuse(…)): `projections` has a 1×1 for each input with other channels, `weights` a number for each input."""

    def __init__(
        self, widths: Sequence[int], channels: int, weighted: bool, activation: type[nn.Module], bias: bool
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(_projection(width, channels, bias) for width in widths)
        self.weights = nn.Parameter(torch.ones(len(widths))) if weighted else None
        self.activation = activation()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = _convolution(channels, channels, bias)

    def forward(self, inputs: Sequence[Tensor], resize: Callable[[Tensor], Tensor]) -> Tensor:
        """Inputs of the size of this node, and the last one of the next level's, which `resize` brings to it."""
        terms = [project(x) for project, x in zip(self.projections, inputs, strict=True)]
        terms[-1] = resize(terms[-1])
        if self.weights is not None:
            weights = F.relu(self.weights)
            weights = weights / (weights.sum() + EPS)
            terms = [x * weights[i] for i, x in enumerate(terms)]
        fused = self.activation(sum(terms[1:], terms[0]))
        convolved: Tensor = self.pointwise(self.depthwise(fused))
        return convolved


def _projection(in_channels: int, channels: int, bias: bool) -> nn.Module:
    return nn.Identity() if in_channels == channels else _convolution(in_channels, channels, bias)


def _convolution(in_channels: int, channels: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=bias), nn.BatchNorm2d(channels, eps=NORM_EPS))
