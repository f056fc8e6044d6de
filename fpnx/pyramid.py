"""The Feature Pyramid Network (Lin et al. 2017, arXiv 1612.03144): the readable definition, pure tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SEED_SCHEME", "FeaturePyramid", "seeded_generator"]

SEED_SCHEME = 1  # how seeds become parameters; part of every fingerprint that holds a seed


class FeaturePyramid(nn.Module):
    """Merges taps C_first…C_last top-down into P_first…P_last, and goes on to coarser levels by a top block.

    M_last = lateral(C_last); M_k = lateral(C_k) + nearest(M_{k+1} → the size of C_k); P_k = output(M_k), with 1×1
    laterals and 3×3 outputs (section 3 of the paper). Top blocks: `"pool"`, P_{last+1} by subsampling P_last
    (Faster R-CNN); `"c5"` and `"p5"`, two 3×3 convolutions of stride 2 on C_last or P_last, with a ReLU before the
    second (RetinaNet, arXiv 1708.02002). Keys are those of `torchvision.ops.FeaturePyramidNetwork`, counted from
    the first level: `inner_blocks.{i}.0`, `layer_blocks.{i}.0`, `extra_blocks.p6|p7`.

    Args:
        in_channels: channels of the taps, by level number, contiguous: `{2: 256, 3: 512, 4: 1024, 5: 2048}`.
        channels: channels of every P level.
        top_block: `None`, `"pool"`, `"c5"` or `"p5"`.
    """

    def __init__(self, in_channels: Mapping[int, int], channels: int = 256, top_block: str | None = None) -> None:
        super().__init__()
        levels = sorted(in_channels)
        assert levels == list(range(levels[0], levels[-1] + 1)), "taps must be contiguous"
        self.first_level, self.last_level = levels[0], levels[-1]
        self.channels, self.top_block = channels, top_block
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(in_channels[k], channels, 1)) for k in levels)
        self.layer_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in levels)
        if top_block in ("c5", "p5"):
            source = in_channels[self.last_level] if top_block == "c5" else channels
            self.extra_blocks = nn.ModuleDict(
                {
                    f"p{self.last_level + 1}": nn.Conv2d(source, channels, 3, 2, 1),
                    f"p{self.last_level + 2}": nn.Conv2d(channels, channels, 3, 2, 1),
                }
            )

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of all levels that this pyramid gives, fine to coarse."""
        extra = {None: 0, "pool": 1, "c5": 2, "p5": 2}[self.top_block]
        return tuple(f"P{k}" for k in range(self.first_level, self.last_level + extra + 1))

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """Taps `{"C2": (B, C, H, W), ...}` → the asked levels, fine to coarse; what nobody asked is not computed."""
        wanted = self.levels if levels is None else levels
        last = self.last_level
        above = {f"P{last + 1}", f"P{last + 2}"} & set(wanted)
        outputs = {int(name[1:]) for name in wanted if int(name[1:]) <= last}
        if above and self.top_block in ("pool", "p5"):
            outputs.add(last)
        pyramid: dict[str, Tensor] = {}
        merged: Tensor | None = None
        for k in range(last, min(outputs, default=last + 1) - 1, -1):
            lateral = self.inner_blocks[k - self.first_level](taps[f"C{k}"])
            if merged is not None:
                lateral = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            merged = lateral
            if k in outputs:
                pyramid[f"P{k}"] = self.layer_blocks[k - self.first_level](merged)
        if above:
            pyramid.update(self._top(taps[f"C{last}"], pyramid.get(f"P{last}"), f"P{last + 2}" in above))
        return {name: pyramid[name] for name in self.levels if name in wanted}

    def _top(self, coarsest_tap: Tensor, coarsest: Tensor | None, both: bool) -> dict[str, Tensor]:
        first, second = (f"P{self.last_level + n}" for n in (1, 2))
        if self.top_block == "pool":
            assert coarsest is not None
            return {first: F.max_pool2d(coarsest, kernel_size=1, stride=2)}
        source = coarsest_tap if self.top_block == "c5" else coarsest
        levels = {first: self.extra_blocks[first.lower()](source)}
        if both:
            levels[second] = self.extra_blocks[second.lower()](F.relu(levels[first]))
        return levels

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Draw all parameters as torchvision does (Kaiming uniform, a=1, zero bias), each from a generator of its
        own for (seed, kind, level): the lateral of C3 is the same whichever other levels there are."""
        for k in range(self.first_level, self.last_level + 1):
            _draw(self.inner_blocks[k - self.first_level], seed, f"lateral{k}")
            _draw(self.layer_blocks[k - self.first_level], seed, f"output{k}")
        if self.top_block in ("c5", "p5"):
            for name, block in self.extra_blocks.items():
                _draw(block, seed, f"{self.top_block}.{name}")


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator for the part `name` under `seed`, by the present scheme."""
    digest = hashlib.sha256(f"fpnx:{SEED_SCHEME}:{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw(block: nn.Module, seed: int, name: str) -> None:
    for convolution in block.modules():
        if isinstance(convolution, nn.Conv2d):
            weight = convolution.weight
            bound = math.sqrt(3.0 / (weight.shape[1] * weight.shape[2] * weight.shape[3]))
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=seeded_generator(seed, name)))
            if convolution.bias is not None:
                convolution.bias.zero_()
