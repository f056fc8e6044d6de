"""Necks in the form in which they are executed: an FPN in its own way, any other with its convolutions packed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import cast

from torch import Tensor, nn

from fpnx.inference.fpn_fusion import FusedFpn
from fpnx.inference.packed_conv import PackedConv2d, fuse_sequence
from fpnx.models.necks.base import Neck
from fpnx.models.necks.fpn import FPN

__all__ = ["FusedNeck", "fuse_neck"]


class FusedNeck(nn.Module):
    """Any neck for inference: its own forward, on packed convolutions with norms and activations folded in.

    Attributes:
        taps: names of the taps that it reads.
        last_stage: what its time counts as in tables of stages.
    """

    last_stage = "neck"

    def __init__(self, neck: Neck, levels: Collection[str]) -> None:
        super().__init__()
        self.levels, self.taps = tuple(levels), list(neck.taps_for(levels))
        self.neck = copy.deepcopy(neck)
        _pack(self.neck)

    def forward(self, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", self.neck(taps, self.levels))

    def timed_blocks(self) -> list[tuple[str, nn.Module]]:
        """Modules whose time is shown apart: none."""
        return []


def fuse_neck(
    neck: Neck, levels: Collection[str], channels: Mapping[str, int], recombined: bool
) -> FusedFpn | FusedNeck:
    """The executed form of `neck`, which is read and never changed.

    Args:
        levels: the levels that it is to give.
        channels: of every tap, by name.
        recombined: let an FPN be computed in another order where that takes clearly fewer operations.
    """
    if type(neck) is FPN:
        return FusedFpn(neck, levels, channels, recombined)
    return FusedNeck(neck, levels)


def _pack(module: nn.Module) -> None:
    """Replace every convolution below `module`, with the norm and activation that follow it in a sequence."""
    for name, child in module.named_children():
        if PackedConv2d.takes(child) or (isinstance(child, nn.Sequential) and PackedConv2d.takes(child[0])):
            module.add_module(name, fuse_sequence(child))
        else:
            _pack(child)
