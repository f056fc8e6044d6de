"""The Feature Pyramid Network (Lin et al. 2017, arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fpnx.models.necks.base import Neck, draw_convolutions

__all__ = ["FPN", "VARIANTS"]

# Parts that a neck may lack, for comparisons: Table 1 (d) and (e) of the paper.
VARIANTS = ("full", "no-top-down", "no-lateral")
CONV_TOP_BLOCKS = ("c5", "p5", "m5")  # named after their input: C_last, P_last or M_last


class FPN(Neck):
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
        variant: `"full"`; `"no-top-down"`, M_k = lateral(C_k) for all levels; `"no-lateral"`, M_k = nearest(M_{k+1} →
            the size of C_k) for all but the last. Finer laterals do not exist in the last, as they have no use.
    """

    kind = "fpn"
    summary = "Feature Pyramid Network, top-down"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"variant": VARIANTS}

    def __init__(
        self,
        in_channels: Mapping[int, int],
        channels: int = 256,
        top_block: str | None = None,
        *,
        norm: str | None = None,
        p7_relu: bool = True,
        names: Sequence[str] = (),
        variant: str = "full",
    ) -> None:
        super().__init__()
        assert variant in VARIANTS, variant
        taps = sorted(in_channels)
        assert taps == list(range(taps[0], taps[-1] + 1)), "taps must be contiguous"
        self.in_channels, self.channels = dict(in_channels), channels
        self.first_level, self.last_level = taps[0], taps[-1]
        self.top_block, self.norm, self.p7_relu, self.variant = top_block, norm, p7_relu, variant
        count = len(taps) + {None: 0, "pool": 1}.get(top_block, 2)
        self.levels = tuple(names) or tuple(f"P{self.first_level + i}" for i in range(count))
        assert len(self.levels) == count, "a name for each level"
        self.inner_blocks = nn.ModuleList(
            nn.Identity() if variant == "no-lateral" and k < taps[-1] else self._block(in_channels[k], 1) for k in taps
        )
        self.layer_blocks = nn.ModuleList(self._block(channels, 3) for _ in taps)
        self.extra_blocks = nn.ModuleDict()
        if top_block in CONV_TOP_BLOCKS:
            source = in_channels[self.last_level] if top_block == "c5" else channels
            self.extra_blocks[f"p{self.last_level + 1}"] = nn.Conv2d(source, channels, 3, 2, 1)
            self.extra_blocks[f"p{self.last_level + 2}"] = nn.Conv2d(channels, channels, 3, 2, 1)

    @classmethod
    def for_levels(
        cls, in_channels: Mapping[int, int], channels: int, levels: Sequence[str], top_block: str | None
    ) -> FPN:
        """A pyramid over all taps; P7 needs the top block `"c5"`, P6 alone `"pool"`."""
        needed = "c5" if "P7" in levels else "pool" if "P6" in levels else None
        return cls(in_channels, channels, top_block or needed)

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """Taps `{"C2": (B, C, H, W), ...}` → the asked levels, fine to coarse; what no level needs is not computed."""
        wanted, outputs = self._levels_to_compute(levels)
        merged = self._merged(taps, min(outputs, default=self._lowest_without_outputs(wanted)))
        pyramid = {i: self.layer_blocks[i](merged[i]) for i in sorted(outputs, reverse=True)}
        pyramid.update(self._coarser_levels(taps, merged, pyramid, wanted))  # torch 2.6 cannot compile |=
        return {name: pyramid[i] for i, name in enumerate(self.levels) if i in wanted}

    def initialize(self, seed: int) -> None:
        """Draw all parameters as torchvision does (Kaiming uniform, a=1, zero bias), each from a generator of its
        own for (seed, lateral or output, level): the lateral of C3 is the same whichever other levels there are."""
        for i, k in enumerate(range(self.first_level, self.last_level + 1)):
            draw_convolutions(self.inner_blocks[i], seed, f"lateral{k}")
            draw_convolutions(self.layer_blocks[i], seed, f"output{k}")
        for name, block in self.extra_blocks.items():
            draw_convolutions(block, seed, f"{self.top_block}.{name}")

    def identity(self) -> dict[str, Any]:
        """Channels, first level, top block and its ReLU, and the variant of one that lacks a part.

        A norm comes only from files, whose hash is recorded too.
        """
        return {
            "channels": self.channels,
            "first_level": self.levels[0],
            "top_block": self.top_block,
            "p7_relu": self.p7_relu,
            **({} if self.variant == "full" else {"variant": self.variant}),
        }

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """Laterals, outputs and, where there is one, the top block; pooling has no modules."""
        parts = {"laterals": tuple(self.inner_blocks), "outputs": tuple(self.layer_blocks)}
        return parts if self.top_block is None else {**parts, "top block": tuple(self.extra_blocks.values())}

    def explain_missing(self, level: str) -> str | None:
        """P7 does not come by pooling."""
        if level == "P7" and self.top_block == "pool":
            return "level P7 does not come by pool: take top block c5 or p5"
        return None

    @property
    def _last(self) -> int:
        """Index of the level of the last tap."""
        return self.last_level - self.first_level

    def _levels_to_compute(self, levels: Collection[str] | None) -> tuple[set[int], set[int]]:
        """Indices of the asked levels, and of those among the taps' levels that have to be computed for them."""
        wanted = {i for i, name in enumerate(self.levels) if levels is None or name in levels}
        outputs = {i for i in wanted if i <= self._last}
        if wanted != outputs and self.top_block in ("pool", "p5"):
            outputs.add(self._last)
        return wanted, outputs

    def _lowest_without_outputs(self, wanted: set[int]) -> int:
        """The lowest M_k that is needed where none of the taps' levels is: M_last for `"m5"`, else none."""
        return self._last if wanted and self.top_block == "m5" else self._last + 1

    def _merged(self, taps: Mapping[str, Tensor], lowest: int) -> dict[int, Tensor]:
        """M_k = lateral(C_k) + nearest(M_{k+1}), by index, from the last tap down to `lowest`."""
        merged: dict[int, Tensor] = {}
        for i in range(self._last, lowest - 1, -1):
            tap = taps[f"C{self.first_level + i}"]
            if i == self._last or self.variant == "no-top-down":
                merged[i] = self.inner_blocks[i](tap)
                continue
            above = F.interpolate(merged[i + 1], size=tap.shape[-2:], mode="nearest")
            merged[i] = above if self.variant == "no-lateral" else self.inner_blocks[i](tap) + above
        return merged

    def _coarser_levels(
        self, taps: Mapping[str, Tensor], merged: Mapping[int, Tensor], pyramid: Mapping[int, Tensor], wanted: set[int]
    ) -> dict[int, Tensor]:
        """The asked levels above the last tap, by index."""
        last = self._last
        if max(wanted, default=0) <= last:
            return {}
        if self.top_block == "pool":
            return {last + 1: F.max_pool2d(pyramid[last], kernel_size=1, stride=2)}
        if self.top_block == "c5":
            source = taps[f"C{self.last_level}"]
        else:
            source = pyramid[last] if self.top_block == "p5" else merged[last]
        first, second = self.extra_blocks.values()
        above = {last + 1: first(source)}
        if last + 2 in wanted:
            above[last + 2] = second(F.relu(above[last + 1]) if self.p7_relu else above[last + 1])
        return above

    def _block(self, in_channels: int, side: int, stride: int = 1) -> nn.Sequential:
        """A convolution to `channels`, with the norm that follows."""
        bias = self.norm is None
        convolution = nn.Conv2d(in_channels, self.channels, side, stride, padding=side // 2, bias=bias)
        if self.norm is None:
            return nn.Sequential(convolution)
        norm = nn.BatchNorm2d(self.channels) if self.norm == "batch" else nn.GroupNorm(32, self.channels)
        return nn.Sequential(convolution, norm)
