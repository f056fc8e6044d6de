"""Necks in the form in which they are executed: an FPN in its own way, any other with its convolutions packed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import cast

import torch
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
    if type(neck) is FPN and neck.variant == "full":
        return FusedFpn(neck, levels, channels, recombined)
    return FusedNeck(neck, levels)


def _merge_upsampling(sequence: nn.Sequential) -> None:
    """Merge a 1×1 convolution into the transposed convolution before it, where that takes fewer operations."""
    for i in reversed(range(len(sequence) - 1)):
        up, after = sequence[i], sequence[i + 1]
        if not (isinstance(up, nn.ConvTranspose2d) and type(after) is nn.Conv2d):
            continue
        plain = up.padding == up.output_padding == (0, 0) and up.dilation == (1, 1)
        plain &= (
            after.kernel_size == (1, 1) and after.groups == 1 and after.stride == (1, 1) and after.padding == (0, 0)
        )
        separate = up.out_channels * (up.in_channels + after.out_channels)
        if not plain or up.groups != 1 or up.in_channels * after.out_channels >= separate:
            continue
        one = after.weight.detach().double().flatten(1)
        bias = up.bias.detach().double() if up.bias is not None else one.new_zeros(up.out_channels)
        bias = one @ bias + (after.bias.detach().double() if after.bias is not None else 0)
        merged = nn.ConvTranspose2d(1, 1, up.kernel_size, up.stride, device="meta")  # whose parameters are not drawn
        merged.in_channels, merged.out_channels = up.in_channels, after.out_channels
        merged.weight = nn.Parameter(torch.einsum("imyx,om->ioyx", up.weight.detach().double(), one).float())
        merged.bias = nn.Parameter(bias.float())
        sequence[i] = merged
        del sequence[i + 1]


def _pack(module: nn.Module) -> None:
    """Replace every convolution below `module`, with the norm and activation that follow it in a sequence."""
    if isinstance(module, nn.Sequential):
        _merge_upsampling(module)
    for name, child in module.named_children():
        if PackedConv2d.takes(child) or (isinstance(child, nn.Sequential) and PackedConv2d.takes(child[0])):
            module.add_module(name, fuse_sequence(child))
        else:
            _pack(child)
