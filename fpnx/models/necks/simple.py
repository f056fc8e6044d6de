"""ViTDet's simple feature pyramid (Li et al. 2022, arXiv 2203.16527): all levels from one map."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.core.levels import LEVELS
from fpnx.models.necks.base import Neck, seeded_generator

__all__ = ["ChannelNorm", "SimplePyramid"]

NORM_EPS = 1e-6


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel of a map (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        return F.layer_norm(pixels, self.weight.shape, self.weight, self.bias, NORM_EPS).permute(0, 3, 1, 2)


class SimplePyramid(Neck):
    """The simple feature pyramid of section 3 of the paper, from one map C_t, such as a vision transformer's.

    C_t is resampled to each level, without looking at any other level:

        P_{t-2}: 2×2 transposed convolution of stride 2, norm, GELU, and another such transposed convolution
        P_{t-1}: one transposed convolution
        P_t:     as it is
        P_{t+1}: 2×2 max-pool

    Each is followed by a 1×1 and a 3×3 convolution, each with a norm. P_{t+2} is P_{t+1} subsampled. The transposed
    convolutions have half the channels of their input. Norms are layer norms over channels. Keys are
    `blocks.P{k}.{i}.*`, in the order above.

    Args:
        in_channels: channels of the map, by its level number: `{4: 768}`.
        channels: of every level.
    """

    kind = "simple"
    summary = "ViTDet's simple feature pyramid"
    accepts_single_stride = True

    def __init__(self, in_channels: Mapping[int, int], channels: int = 256) -> None:
        super().__init__()
        ((number, width),) = in_channels.items()
        self.in_channels, self.channels, self.tap = dict(in_channels), channels, f"C{number}"
        resampling = {
            f"P{number - 2}": (*_doubled(width), ChannelNorm(width // 2), nn.GELU(), *_doubled(width // 2)),
            f"P{number - 1}": _doubled(width),
            f"P{number}": (),
            f"P{number + 1}": (nn.MaxPool2d(2),),
        }
        widths = dict(zip(resampling, (width // 4, width // 2, width, width), strict=True))
        self.blocks = nn.ModuleDict(
            {
                name: nn.Sequential(*layers, *_convolutions(widths[name], channels))
                for name, layers in resampling.items()
                if name in LEVELS
            }
        )
        self._last = list(self.blocks)[-1]
        self._subsampled = f"P{number + 2}"
        self.levels = tuple(name for name in (*self.blocks, self._subsampled) if name in LEVELS)

    @classmethod
    def for_levels(
        cls, in_channels: Mapping[int, int], channels: int, levels: Sequence[str], top_block: str | None
    ) -> SimplePyramid:
        """The pyramid of the map, with all levels.

        Raises:
            FpnxError: another top block than `pool`, or a map of fewer than 4 channels.
        """
        if top_block not in (None, "pool"):
            raise FpnxError(f"top block {top_block} beside pyramid simple, which subsamples its last level: take pool")
        if min(in_channels.values()) < 4:
            raise FpnxError("pyramid simple halves the channels of its map twice: take a tap with at least 4")
        return cls(in_channels, channels)

    def levels_by_default(self) -> tuple[str, ...]:
        """The four levels of the paper, P2 to P5 from a map of stride 16."""
        return tuple(self.blocks)

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """Taps `{"C4": (B, C, H, W)}` → the asked levels, fine to coarse; what no level needs is not computed."""
        asked = [name for name in self.levels if levels is None or name in levels]
        needed = {self._last if name == self._subsampled else name for name in asked}
        pyramid = {name: block(taps[self.tap]) for name, block in self.blocks.items() if name in needed}
        if self._subsampled in asked:
            pyramid[self._subsampled] = F.max_pool2d(pyramid[self._last], kernel_size=1, stride=2)
        return {name: pyramid[name] for name in asked}

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all convolutions by Kaiming uniform with a=1 and zero bias; norms begin as 1 and 0.

        Each has its own generator for (seed, level, position)."""
        for name, block in self.blocks.items():
            for i, layer in enumerate(block):
                if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                    kernel = 1 if isinstance(layer, nn.ConvTranspose2d) else math.prod(layer.kernel_size)
                    bound = math.sqrt(3.0 / (layer.in_channels * kernel))
                    drawn = torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
                    generator = seeded_generator(seed, f"simple.{name}.{i}")
                    layer.weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
                    if layer.bias is not None:
                        layer.bias.zero_()

    def identity(self) -> dict[str, Any]:
        """The kind, the tap and the channels of the levels."""
        return {"channels": self.channels, "pyramid": self.kind, "tap": self.tap}

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """The modules of all levels."""
        return {"simple": tuple(layer for block in self.blocks.values() for layer in block)}


def _doubled(width: int) -> tuple[nn.Module, ...]:
    """A transposed convolution to twice the size and half the channels."""
    return (nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2),)


def _convolutions(width: int, channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(width, channels, 1, bias=False),
        ChannelNorm(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels),
    )
