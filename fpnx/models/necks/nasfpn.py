"""NAS-FPN (Ghiasi et al. 2019, arXiv 1904.07392), as mmdetection builds it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.models.necks.base import Neck, draw_convolutions, reset_norms

__all__ = ["NASFPN"]

STACKS = 7
TAPS = (3, 4, 5)
CELLS = ("gp_64_4", "sum_44_4", "sum_43_3", "sum_34_4", "sum_55_5", "sum_77_7", "gp_75_6")  # with a convolution


class NASFPN(Neck):
    """Stacks of the seven merging cells that the paper's search found (section 3.2, figure 6).

    The first stack takes laterals of the taps C3…C5, and P6 and P7, each of them a 1×1 and a max pooling of 2×2 from
    the level below; each further stack takes the five levels that the one before gives:

    P4' = gp(P6, P4); P4'' = sum(P4', P4); O3 = sum(P4'', P3); O4 = sum(O3, P4''); O5 = sum(gp(O4, O3), P5);
    O7 = sum(gp(O5, P4''), P7); O6 = gp(O7, O5).

    sum(a, b) = conv(a + b) and gp(a, b) = conv(b + sigmoid(mean(b)) · a), with the mean over all places of a channel
    (the two cells of figure 5), a and b brought to the size of the result: nearest where that is larger, else by a max
    pooling over equal parts, zero-padded on all sides where they do not divide it. conv is a ReLU, a 3×3 and a batch
    norm; the two gp inside another cell have none. Levels halve rounded down from P5 on, as there.

    Args:
        in_channels: channels of the taps: `{3: 512, 4: 1024, 5: 2048}`.
        channels: channels of every level.
        stacks: how many there are.
        norm: `"batch"`, or None for convolutions with a bias and without a norm.
    """

    kind = "nasfpn"
    summary = "NAS-FPN, seven searched merging cells, repeated"
    default_levels = ("P3", "P4", "P5", "P6", "P7")

    def __init__(
        self, in_channels: Mapping[int, int], channels: int = 256, stacks: int = STACKS, *, norm: str | None = "batch"
    ) -> None:
        super().__init__()
        assert tuple(sorted(in_channels)) == TAPS, "taps are C3 to C5"
        self.in_channels, self.channels, self.norm = dict(in_channels), channels, norm
        self.levels = self.default_levels
        bias = norm is None
        self.inner_blocks = nn.ModuleList(_block(in_channels[k], channels, 1, norm, bias) for k in TAPS)
        self.downsample_blocks = nn.ModuleList(_block(channels, channels, 1, norm, bias) for _ in range(2))
        # As in mmdetection, these convolutions have a bias although a norm follows.
        self.stacks = nn.ModuleList(
            nn.ModuleDict({cell: _block(channels, channels, 3, norm, True) for cell in CELLS}) for _ in range(stacks)
        )

    @classmethod
    def for_levels(
        cls, in_channels: Mapping[int, int], channels: int, levels: Sequence[str], top_block: str | None
    ) -> NASFPN:
        """A pyramid over C3 to C5.

        Raises:
            FpnxError: a tap is missing, or `top_block` is given.
        """
        if top_block is not None:
            raise FpnxError(
                f"top block {top_block} is for fpn and pafpn, a nasfpn pools its P6 and P7: drop the option"
            )
        absent = next((k for k in TAPS if k not in in_channels), None)
        if absent is not None:
            raise FpnxError(f"a nasfpn needs the taps C3, C4 and C5, and there is no C{absent}: take another pyramid")
        return cls({k: in_channels[k] for k in TAPS}, channels)

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """Taps `{"C3": (B, C, H, W), ...}` → the asked levels, fine to coarse; what no level needs is not computed."""
        wanted = [name for name in self.levels if levels is None or name in levels]
        if not wanted:
            return {}
        maps = [block(taps[f"C{k}"]) for k, block in zip(TAPS, self.inner_blocks, strict=True)]
        for block in self.downsample_blocks:
            maps.append(F.max_pool2d(block(maps[-1]), 2))
        pyramid = dict(zip(self.levels, maps, strict=True))
        for i, stack in enumerate(self.stacks):
            pyramid = self._merged(stack, pyramid, wanted if i == len(self.stacks) - 1 else self.levels)
        return {name: pyramid[name] for name in wanted}

    def _merged(
        self, stack: nn.ModuleDict, pyramid: Mapping[str, Tensor], wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """One stack, up to the last of the `wanted` levels in its order: P3, P4, P5, P7, P6."""
        p3, p4, p5, p6, p7 = (pyramid[name] for name in self.levels)
        s3, s4, s5, s6, s7 = (level.shape[-2:] for level in (p3, p4, p5, p6, p7))
        last = max(("P3", "P4", "P5", "P7", "P6").index(name) for name in wanted)
        first4 = _cell(stack["gp_64_4"], _attended(_up(p6, s4), p4))
        second4 = _cell(stack["sum_44_4"], first4 + p4)
        made = {"P3": _cell(stack["sum_43_3"], _up(second4, s3) + p3)}
        if last >= 1:
            made["P4"] = _cell(stack["sum_34_4"], _down(made["P3"], s4) + second4)
        if last >= 2:
            made["P5"] = _cell(stack["sum_55_5"], p5 + _attended(_down(made["P4"], s5), _down(made["P3"], s5)))
        if last >= 3:
            made["P7"] = _cell(stack["sum_77_7"], p7 + _attended(_down(made["P5"], s7), _down(second4, s7)))
        if last >= 4:
            made["P6"] = _cell(stack["gp_75_6"], _attended(_up(made["P7"], s6), _down(made["P5"], s6)))
        return made

    def initialize(self, seed: int) -> None:
        """Draw all convolutions (Kaiming uniform, a=1, zero bias), each from a generator of its own for (seed, stack,
        cell). Batch norms change nothing but by their epsilon."""
        reset_norms(self)
        for k, block in zip(TAPS, self.inner_blocks, strict=True):
            draw_convolutions(block, seed, f"nasfpn.lateral{k}")
        for k, block in enumerate(self.downsample_blocks, TAPS[-1] + 1):
            draw_convolutions(block, seed, f"nasfpn.downsample{k}")
        for i, stack in enumerate(self.stacks):
            for cell, block in stack.items():
                draw_convolutions(block, seed, f"nasfpn.{i}.{cell}")

    def identity(self) -> dict[str, Any]:
        """The kind, channels, first level and number of stacks; the norm shows in the parameters."""
        return {
            "pyramid": self.kind,
            "channels": self.channels,
            "first_level": self.levels[0],
            "stacks": len(self.stacks),
        }

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """Laterals, what makes P6 and P7, and each stack."""
        stacks = {f"stack {i + 1}": tuple(stack.values()) for i, stack in enumerate(self.stacks)}
        return {"laterals": tuple(self.inner_blocks), "P6 and P7": tuple(self.downsample_blocks), **stacks}

    def explain_missing(self, level: str) -> str | None:
        """P2 is in no NAS-FPN."""
        return f"level {level} is not in a nasfpn, which has P3 to P7: take --pyramid fpn" if level == "P2" else None


def _block(in_channels: int, channels: int, side: int, norm: str | None, bias: bool) -> nn.Sequential:
    """A convolution with the norm that follows it."""
    convolution = nn.Conv2d(in_channels, channels, side, padding=side // 2, bias=bias)
    return nn.Sequential(convolution) if norm is None else nn.Sequential(convolution, nn.BatchNorm2d(channels))


def _cell(block: nn.Module, merged: Tensor) -> Tensor:
    """The convolution of a cell, with the ReLU before it."""
    level: Tensor = block(F.relu(merged))
    return level


def _attended(x: Tensor, attending: Tensor) -> Tensor:
    """b + sigmoid(mean(b)) · a, for `x` = a and `attending` = b, of one size."""
    return attending + attending.mean((-2, -1), keepdim=True).sigmoid() * x


def _up(x: Tensor, size: Any) -> Tensor:
    """A map of a coarser level at `size` (height, width)."""
    return F.interpolate(x, size=size, mode="nearest")


def _down(x: Tensor, size: Any) -> Tensor:
    """A map of a finer level at `size` (height, width): the largest of each of equal parts, zeros around included."""
    height, width = x.shape[-2], x.shape[-1]
    part = (-(-height // size[0]), -(-width // size[1]))
    below, right = part[0] * size[0] - height, part[1] * size[1] - width
    if not (isinstance(below, int) and below == right == 0):  # while it is traced, sizes are no numbers
        x = F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2))
    return F.max_pool2d(x, part, part)
