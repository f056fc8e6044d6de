"""The featurised image pyramid (Lin et al. 2017, arXiv 1612.03144, Fig. 1a): one tap of the image at several scales."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.core.levels import LEVELS
from fpnx.models.necks.base import Neck

__all__ = ["ImagePyramid"]

FINER, COARSER = 3, 1  # levels that are given beside the tap's own: scales up to 8, and down to 1/2
FINER_BY_DEFAULT = 2


class ImagePyramid(Neck):
    """Level P_k is the tap C_t of the image at 2^(t - k) times the size of the network's input.

    So P_k has stride 2^k in the coordinates of the input, as the levels of an FPN have. The backbone runs once for
    each level, on inputs of 4^(t - k) times the pixels. There are no parameters.

    Args:
        in_channels: channels of the tap, by its level number: `{5: 2048}`.
    """

    kind = "image"
    default_channels = 0
    summary = "the same map of the photograph at several sizes, without training"
    accepts_single_stride = True
    gives_taps = False

    def __init__(self, in_channels: Mapping[int, int]) -> None:
        super().__init__()
        ((number, channels),) = in_channels.items()
        self.in_channels, self.channels = dict(in_channels), channels
        self.tap = f"C{number}"
        self.scales = {f"P{k}": 2.0 ** (number - k) for k in range(number - FINER, number + COARSER + 1)}
        self.scales = {name: scale for name, scale in self.scales.items() if name in LEVELS}
        self.levels = tuple(self.scales)

    @classmethod
    def for_levels(
        cls, in_channels: Mapping[int, int], channels: int, levels: Sequence[str], top_block: str | None
    ) -> ImagePyramid:
        """The image pyramid of the tap; it has the tap's channels and no top block."""
        for name, value in (("channels", channels), ("top block", top_block)):
            if value:
                raise FpnxError(f"{name} {value} beside pyramid image, whose levels are taps: leave {name} out")
        return cls(in_channels)

    def levels_by_default(self) -> tuple[str, ...]:
        """The tap's own level and the two finer ones, which take 21 times the work of one pass."""
        own = int(self.tap[1:])
        return tuple(name for name in self.levels if own - FINER_BY_DEFAULT <= int(name[1:]) <= own)

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """The asked levels of the taps of the scaled images, `{"P3": (B, C, H/8, W/8), ...}`, as they are."""
        return {name: taps[name] for name in self.levels if name in taps and (levels is None or name in levels)}

    def initialize(self, seed: int) -> None:
        """There are no parameters."""

    def identity(self) -> dict[str, Any]:
        """The kind, the tap and its channels."""
        return {"channels": self.channels, "pyramid": self.kind, "tap": self.tap}

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """There are no modules."""
        return {}
