"""The Feature Pyramid Network (Lin et al. 2017, arXiv 1612.03144): the readable definition, pure tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SEED_SCHEME", "FPN", "seeded_generator"]

CONVOLVED = ("c5", "p5", "m5")  # top blocks that are convolutions, by what they start from
SEED_SCHEME = 1  # how seeds become parameters; part of every fingerprint that holds a seed


class FPN(nn.Module):
    """Merges taps C_first…C_last top-down into P_first…P_last, and goes on to coarser levels by a top block.

    M_last = lateral(C_last); M_k = lateral(C_k) + nearest(M_{k+1} → the size of C_k); P_k = output(M_k), with 1×1
    laterals and 3×3 outputs (section 3 of the paper). Top blocks: `"pool"`, P_{last+1} by subsampling P_last
    (Faster R-CNN); `"c5"`, `"p5"` and `"m5"`, two 3×3 convolutions of stride 2 on C_last, P_last or M_last, with a
    ReLU before the second (RetinaNet, arXiv 1708.02002). Keys are those of `torchvision.ops.FeaturePyramidNetwork`,
    counted from the first level: `inner_blocks.{i}.0`, `layer_blocks.{i}.0`, `extra_blocks.p6|p7`.

    Args:
        in_channels: channels of the taps, by level number, contiguous: `{2: 256, 3: 512, 4: 1024, 5: 2048}`.
        channels: channels of every P level.
        top_block: `None`, `"pool"`, `"c5"`, `"p5"` or `"m5"`.
        norm: what follows laterals and outputs, which then have no bias: `None`, `"batch"` or `"group"` (of 32);
            keys `inner_blocks.{i}.1` and `layer_blocks.{i}.1`.
        p7_relu: whether there is a ReLU before the second convolution of the top block.
        names: of the levels, fine to coarse, where they are not one per stride; else `P{k}`.
    """

    def __init__(
        self,
        in_channels: Mapping[int, int],
        channels: int = 256,
        top_block: str | None = None,
        *,
        norm: str | None = None,
        p7_relu: bool = True,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        taps = sorted(in_channels)
        assert taps == list(range(taps[0], taps[-1] + 1)), "taps must be contiguous"
        self.first_level, self.last_level = taps[0], taps[-1]
        self.channels, self.top_block, self.norm, self.p7_relu = channels, top_block, norm, p7_relu
        count = len(taps) + {None: 0, "pool": 1}.get(top_block, 2)
        self.levels = tuple(names) or tuple(f"P{self.first_level + i}" for i in range(count))
        assert len(self.levels) == count, "a name for each level"
        self.inner_blocks = nn.ModuleList(_block(in_channels[k], channels, 1, norm) for k in taps)
        self.layer_blocks = nn.ModuleList(_block(channels, channels, 3, norm) for _ in taps)
        if top_block in CONVOLVED:
            source = in_channels[self.last_level] if top_block == "c5" else channels
            self.extra_blocks = nn.ModuleDict(
                {
                    f"p{self.last_level + 1}": nn.Conv2d(source, channels, 3, 2, 1),
                    f"p{self.last_level + 2}": nn.Conv2d(channels, channels, 3, 2, 1),
                }
            )

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """Taps `{"C2": (B, C, H, W), ...}` → the asked levels, fine to coarse; what nobody asked is not computed."""
        wanted = {i for i, name in enumerate(self.levels) if levels is None or name in levels}
        last = self.last_level - self.first_level
        outputs = {i for i in wanted if i <= last}
        above = wanted - outputs
        if above and self.top_block in ("pool", "p5"):
            outputs.add(last)
        pyramid: dict[int, Tensor] = {}
        merged: list[Tensor] = []  # M_last, M_{last-1}, …
        lowest = min(outputs, default=last if above and self.top_block == "m5" else last + 1)
        for i in range(last, lowest - 1, -1):
            lateral = self.inner_blocks[i](taps[f"C{self.first_level + i}"])
            if merged:
                lateral = lateral + F.interpolate(merged[-1], size=lateral.shape[-2:], mode="nearest")
            merged.append(lateral)
            if i in outputs:
                pyramid[i] = self.layer_blocks[i](lateral)
        if above:
            sources = {"c5": taps[f"C{self.last_level}"], "m5": merged[0] if merged else None}
            above_last = self._top(sources.get(self.top_block or "", pyramid.get(last)), both=last + 2 in above)
            pyramid.update(enumerate(above_last, last + 1))
        return {name: pyramid[i] for i, name in enumerate(self.levels) if i in wanted}

    def _top(self, source: Tensor | None, both: bool) -> list[Tensor]:
        assert source is not None
        if self.top_block == "pool":
            return [F.max_pool2d(source, kernel_size=1, stride=2)]
        first, second = self.extra_blocks.values()
        levels = [first(source)]
        if both:
            levels.append(second(F.relu(levels[0]) if self.p7_relu else levels[0]))
        return levels

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Draw all parameters as torchvision does (Kaiming uniform, a=1, zero bias), each from a generator of its
        own for (seed, kind, level): the lateral of C3 is the same whichever other levels there are."""
        for k in range(self.first_level, self.last_level + 1):
            _draw(self.inner_blocks[k - self.first_level], seed, f"lateral{k}")
            _draw(self.layer_blocks[k - self.first_level], seed, f"output{k}")
        if self.top_block in CONVOLVED:
            for name, block in self.extra_blocks.items():
                _draw(block, seed, f"{self.top_block}.{name}")


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator for the part `name` under `seed`, by the present scheme."""
    digest = hashlib.sha256(f"fpnx:{SEED_SCHEME}:{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _block(in_channels: int, channels: int, side: int, norm: str | None) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, side, padding=side // 2, bias=norm is None)
    if norm is None:
        return nn.Sequential(convolution)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(32, channels))


def _draw(block: nn.Module, seed: int, name: str) -> None:
    for convolution in block.modules():
        if isinstance(convolution, nn.Conv2d):
            weight = convolution.weight
            bound = math.sqrt(3.0 / (weight.shape[1] * weight.shape[2] * weight.shape[3]))
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=seeded_generator(seed, name)))
            if convolution.bias is not None:
                convolution.bias.zero_()
