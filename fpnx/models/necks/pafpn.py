"""The Path Aggregation Network's pyramid (Liu et al. 2018, arXiv 1803.01534), as mmdetection builds it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fpnx.models.necks.base import draw_convolutions
from fpnx.models.necks.fpn import FPN

__all__ = ["PAFPN"]


class PAFPN(FPN):
    """An FPN whose levels are merged once more, bottom-up (section 3.1 of the paper).

    With the FPN's sums M_k and 3×3 convolutions: S_k = output(M_k); N_first = S_first;
    N_{k+1} = S_{k+1} + downsample_k(N_k), of stride 2; P_first = N_first, P_k = pafpn_k(N_k) for coarser k. The
    bottom-up path uses the sums N_k, before the last convolutions. Top blocks are those of `FPN`. By default
    there is no norm; there is no activation, as in mmdetection. Keys are those of `FPN`, and `downsample_blocks.{i}.0`,
    `pafpn_blocks.{i}.0`.

    Args:
        in_channels, channels, top_block, norm, p7_relu, names: as for `FPN`.
    """

    kind = "pafpn"
    summary = "Path Aggregation Network, top-down and bottom-up"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

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
        super().__init__(in_channels, channels, top_block, norm=norm, p7_relu=p7_relu, names=names)
        self.downsample_blocks = nn.ModuleList(self._block(channels, 3, stride=2) for _ in range(self._last))
        self.pafpn_blocks = nn.ModuleList(self._block(channels, 3) for _ in range(self._last))

    def forward(self, taps: Mapping[str, Tensor], levels: Collection[str] | None = None) -> dict[str, Tensor]:
        """Taps `{"C2": (B, C, H, W), ...}` → the asked levels, fine to coarse; what no level needs is not computed."""
        wanted, outputs = self._levels_to_compute(levels)
        # The bottom-up path begins at the finest level, whichever levels are asked for.
        merged = self._merged(taps, 0 if outputs else self._lowest_without_outputs(wanted))
        pyramid: dict[int, Tensor] = {}
        sums: Tensor | None = None
        for i in range(max(outputs, default=-1) + 1):
            output = self.layer_blocks[i](merged[i])
            sums = output if sums is None else output + self.downsample_blocks[i - 1](sums)
            if i in outputs:
                pyramid[i] = sums if i == 0 else self.pafpn_blocks[i - 1](sums)
        pyramid.update(self._coarser_levels(taps, merged, pyramid, wanted))
        return {name: pyramid[i] for i, name in enumerate(self.levels) if i in wanted}

    def initialize(self, seed: int) -> None:
        """Draw all parameters as `FPN` does, each from a generator of its own for (seed, kind of block, level)."""
        super().initialize(seed)
        for i, k in enumerate(range(self.first_level, self.last_level)):
            draw_convolutions(self.downsample_blocks[i], seed, f"pafpn.downsample{k}")
            draw_convolutions(self.pafpn_blocks[i], seed, f"pafpn.output{k + 1}")

    def identity(self) -> dict[str, Any]:
        """What `FPN` has, and the kind."""
        return {**super().identity(), "pyramid": self.kind}

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """The parts of an FPN, and the bottom-up path."""
        return {**super().parts(), "bottom-up": (*self.downsample_blocks, *self.pafpn_blocks)}
