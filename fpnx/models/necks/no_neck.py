"""No neck: a model of the backbone's taps alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fpnx.models.necks.base import Neck

__all__ = ["NoNeck"]


class NoNeck(Neck):
    """Gives no levels, for backbones whose maps have one stride: the model's levels are its taps.

    Args:
        in_channels: channels of the taps, by level number.
    """

    kind = "none"
    default_channels = 0

    def __init__(self, in_channels: Mapping[int, int]) -> None:
        super().__init__()
        self.in_channels, self.channels, self.levels = dict(in_channels), 0, ()

    @classmethod
    def for_levels(
        cls, in_channels: Mapping[int, int], channels: int, levels: Sequence[str], top_block: str | None
    ) -> NoNeck:
        """No neck over these taps; the other arguments have no meaning."""
        return cls(in_channels)

    def levels_by_default(self) -> tuple[str, ...]:
        """The taps."""
        return tuple(f"C{k}" for k in sorted(self.in_channels))

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def initialize(self, seed: int) -> None:
        """There are no parameters."""

    def identity(self) -> dict[str, Any]:
        """The kind."""
        return {"pyramid": self.kind}

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """There are no modules."""
        return {}
