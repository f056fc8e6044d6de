"""The interface of necks: modules that turn the taps of a backbone into pyramid levels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fpnx.models.backbones.tracing import meta_copy
from fpnx.models.torch_state import on_meta_device

__all__ = ["SEED_SCHEME", "Neck", "draw_convolutions", "neck_shapes", "reset_norms", "seeded_generator"]

SEED_SCHEME = 1  # how seeds become parameters; part of every fingerprint that holds a seed


class Neck(nn.Module):
    """Turns taps `{"C2": (B, C, H, W), ...}` into levels `{"P2": (B, channels, H, W), ...}`.

    A subclass stands in `fpnx.models.necks.registry.NECKS` under its `kind`. Its forward must run on the meta device
    (shapes of levels come from that) and be traceable by `torch.fx` for given levels.

    Attributes:
        kind: the name of the neck, as `--pyramid` takes it.
        default_channels: channels of every level where none are asked for; 0: those of the tap.
        default_levels: the levels where none are asked for; empty: one for each tap.
        choices: settings that parameters do not show, as `identity` names them, with their values.
        summary: what it is, in a few words for lists.
        accepts_single_stride: whether it makes its levels from one tap, which `--tap` chooses.
        gives_taps: whether C levels can be asked for beside its own.
        scales: for levels that are the tap of the image at another size, that size relative to the network's input;
            empty for all others.
        in_channels: channels of the taps, by level number: `{2: 256, 3: 512, 4: 1024, 5: 2048}`.
        channels: channels of every level.
        levels: names of all levels that it can give, fine to coarse.
    """

    kind: ClassVar[str]
    default_channels: ClassVar[int] = 256
    default_levels: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    summary: ClassVar[str] = ""
    accepts_single_stride: ClassVar[bool] = False
    gives_taps: ClassVar[bool] = True
    scales: Mapping[str, float] = {}
    in_channels: dict[int, int]
    channels: int
    levels: tuple[str, ...]

    @classmethod
    def for_levels(
        cls, in_channels: Mapping[int, int], channels: int, levels: Sequence[str], top_block: str | None
    ) -> Neck:
        """A neck that gives `levels`; `top_block` None chooses what they need."""
        raise NotImplementedError

    def levels_by_default(self) -> tuple[str, ...]:
        """The levels where none are asked for: `default_levels`, or else one for each tap."""
        return self.default_levels or tuple(f"P{k}" for k in sorted(self.in_channels))

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """The asked levels, fine to coarse; None gives all. What no level needs is not computed."""
        raise NotImplementedError

    def initialize(self, seed: int) -> None:
        """Draw all parameters from `seed`, the same on every machine."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Settings that change the output values, as plain values: part of the fingerprint and of saved weights."""
        raise NotImplementedError

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """The modules that are called, by the name of the part that they belong to in tables of costs."""
        raise NotImplementedError

    def taps_for(self, levels: Collection[str]) -> tuple[str, ...]:
        """Names of the taps that `levels` are made from, fine to coarse."""
        return tuple(f"C{level}" for level in sorted(self.in_channels))

    def explain_missing(self, level: str) -> str | None:
        """Why this neck does not give `level` though another of its kind would; None where there is no such reason."""
        return None


def neck_shapes(
    neck: Neck, taps: Mapping[str, tuple[int, int, int]], levels: Collection[str]
) -> dict[str, tuple[int, int, int]]:
    """(channels, height, width) of the asked levels for taps of these shapes, found on the meta device.

    Levels that the neck does not give are left out.
    """
    asked = [name for name in levels if name in neck.levels]
    if not asked:
        return {}
    with on_meta_device():
        found = meta_copy(neck)({name: torch.empty(1, *shape) for name, shape in taps.items()}, asked)
    return {name: (level.shape[1], level.shape[2], level.shape[3]) for name, level in found.items()}


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator for the part `name` under `seed`."""
    digest = hashlib.sha256(f"fpnx:{SEED_SCHEME}:{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def draw_convolutions(block: nn.Module, seed: int, name: str) -> None:
    """Draw the convolutions of `block` as torchvision's FPN does: Kaiming uniform with a=1, zero bias."""
    for convolution in block.modules():
        if isinstance(convolution, nn.Conv2d):
            weight = convolution.weight
            bound = math.sqrt(3.0 / (weight.shape[1] * weight.shape[2] * weight.shape[3]))
            drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            weight.copy_(drawn.uniform_(-bound, bound, generator=seeded_generator(seed, name)))
            if convolution.bias is not None:
                convolution.bias.zero_()


def reset_norms(block: nn.Module) -> None:
    """Set all batch norms of `block` to weight 1, bias 0, mean 0 and variance 1."""
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_parameters()
