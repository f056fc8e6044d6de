"""The FPN for inference: linear in its taps, so each level is computed in the order with fewest operations."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpnx.inference.packed_conv import PackedConv2d, fuse_sequence
from fpnx.models.necks.fpn import FPN

__all__ = ["FusedFpn"]

MAX_COST_RATIO = 0.8  # of the multiply-adds; below it another order is also faster, memory traffic included
KERNEL_CELLS_2, KERNEL_CELLS_4 = 16, 25  # of all phases of an upsampling by 2, or by 4, 8, …


class FusedFpn(nn.Module):
    """Computes what `FPN` does, on channels-last maps.

    P_k = output_k(lateral_k(C_k) + up(lateral_{k+1}(C_{k+1}) + up(…))) is a sum over its taps. Where taps have few
    channels, it is cheaper to merge `output_k` with their laterals than to apply it to their sum; see `_Recombined`.
    That needs maps whose sizes double exactly from tap to tap; other sizes take the order of the definition.

    Attributes:
        taps: names of the taps that it reads.
    """

    def __init__(
        self, pyramid: FPN, levels: Collection[str], channels: Mapping[str, int], recombined: bool = True
    ) -> None:
        super().__init__()
        self.first, self.last, self.top_block = pyramid.first_level, pyramid.last_level, pyramid.top_block
        self.p7_relu = pyramid.p7_relu
        # By number: names need not tell it where levels are not one per stride.
        self.levels = {k: name for k, name in enumerate(pyramid.levels, self.first) if name in levels}
        self.outputs = {k for k in self.levels if k <= self.last}
        self.above = [k for k in self.levels if k > self.last]
        if self.above and self.top_block in ("pool", "p5"):
            self.outputs.add(self.last)
        self.taps = [f"C{k}" for k in range(min(self.outputs, default=self.last), self.last + 1)]
        none = self.last if self.above and self.top_block == "m5" else self.last + 1
        counted = range(min(self.outputs, default=none), self.last + 1)
        self.lateral = nn.ModuleDict({str(k): fuse_sequence(pyramid.inner_blocks[k - self.first]) for k in counted})
        self.output = nn.ModuleDict(
            {str(k): fuse_sequence(pyramid.layer_blocks[k - self.first]) for k in counted if k in self.outputs}
        )
        self.extra = nn.ModuleDict()
        if self.above and self.top_block in ("c5", "p5", "m5"):
            self.extra.update({name: fuse_sequence(block) for name, block in pyramid.extra_blocks.items()})
        self.recombined = nn.ModuleDict()
        for k in sorted(self.outputs) if recombined else ():
            way = self._best(k, {n: channels[f"C{n}"] for n in counted}, pyramid.channels)
            if way is not None:
                laterals = [self._plain_lateral(n) for n in range(k, way)]
                self.recombined[str(k)] = _Recombined(laterals, self._plain_output(k))  # type: ignore[arg-type]

    def forward(self, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        merged: dict[int, Tensor] = {}
        levels: dict[int, Tensor] = {}
        for k in sorted(self.outputs, reverse=True):
            way = self._way(k, taps)
            if way is None:
                levels[k] = self.output[str(k)](self._merged(k, taps, merged))
            else:
                sources = [taps[f"C{n}"] for n in range(k, k + way.steps)]
                levels[k] = way(sources, self._merged(k + way.steps, taps, merged))
        for k in range(self.last + 1, max(self.above, default=0) + 1):
            levels[k] = self._top(k, taps, merged, levels)
        return {name: levels[k] for k, name in self.levels.items()}

    @property
    def last_stage(self) -> str:
        """What the time after the last of the `timed_blocks` counts as in tables of stages."""
        return "top block" if self.above else "lateral + top-down"

    def timed_blocks(self) -> list[tuple[str, nn.Module]]:
        """Modules whose time is shown apart, by the stage that they count as; the rest is lateral + top-down."""
        outputs = [*self.output.items(), *self.recombined.items()]
        blocks = [(f"output P{k}", block) for k, block in outputs]
        return blocks + [("top block", block) for block in self.extra.values()]

    def _way(self, k: int, taps: Mapping[str, Tensor]) -> _Recombined | None:
        """The recombined form of P_k, where there is one and the sizes of these maps allow it."""
        if str(k) not in self.recombined:
            return None
        way = self.recombined[str(k)]
        assert isinstance(way, _Recombined)
        return way if _doubles([taps[f"C{n}"] for n in range(k, k + way.steps + 1)]) else None

    def _merged(self, k: int, taps: Mapping[str, Tensor], merged: dict[int, Tensor]) -> Tensor:
        """M_k = lateral(C_k) + nearest(M_{k+1})."""
        if k not in merged:
            lateral: Tensor = self.lateral[str(k)](taps[f"C{k}"])
            merged[k] = lateral if k == self.last else _add_upsampled(lateral, self._merged(k + 1, taps, merged))
        return merged[k]

    def _top(
        self, k: int, taps: Mapping[str, Tensor], merged: dict[int, Tensor], levels: Mapping[int, Tensor]
    ) -> Tensor:
        if self.top_block == "pool":
            return levels[k - 1][:, :, ::2, ::2]
        if k > self.last + 1:
            x = F.relu(levels[k - 1]) if self.p7_relu else levels[k - 1]
        elif self.top_block == "p5":
            x = levels[self.last]
        else:
            x = taps[f"C{self.last}"] if self.top_block == "c5" else self._merged(self.last, taps, merged)
        level: Tensor = self.extra[f"p{k}"](x)
        return level

    def _best(self, k: int, channels: Mapping[int, int], width: int) -> int | None:
        """The level whose merged map, together with the finer taps, gives P_k with the fewest multiply-adds.

        None: level k itself, as in the definition. Counted for each cell and channel of P_k.
        """
        if self._plain_output(k) is None:
            return None
        plain, cost, best = 9.0 * width, 0.0, None
        least = MAX_COST_RATIO * plain
        for n in range(k, self.last):
            if self._plain_lateral(n) is None:
                break
            cost += _cells(n - k) * channels[n]
            whole = cost + _cells(n + 1 - k) * width
            if whole < least:
                least, best = whole, n + 1
        return best

    def _plain_lateral(self, k: int) -> PackedConv2d | None:
        block = self.lateral[str(k)]
        return block if isinstance(block, PackedConv2d) and _is_plain(block, 1) else None

    def _plain_output(self, k: int) -> PackedConv2d | None:
        block = self.output[str(k)]
        return block if isinstance(block, PackedConv2d) and _is_plain(block, 3) else None


class _Recombined(nn.Module):
    """P_k from the taps C_k, …, C_{n-1} and the merged map M_n, whose sizes halve exactly from one to the next.

    With 1×1 laterals L and a 3×3 output O, each tap's share of P_k is O(up(L(C))). O∘L is one convolution with as
    many input channels as the tap has. A 3×3 convolution of a map upsampled by s sees, along each axis, only two
    neighbouring cells for the first and the last of every s rows, and one for those between: kernels of 2 cells
    and of 1, with summed weights, on the small map. Upsampling keeps constants, so the laterals' biases are
    added to M_n instead: then zero padding means the same on the small map as on the large.
    """

    def __init__(self, laterals: list[PackedConv2d], output: PackedConv2d) -> None:
        super().__init__()
        self.steps = len(laterals)
        self.bias: Tensor | None
        kernel = output.weight.double()
        merged = [torch.einsum("omyx,mi->oiyx", kernel, lateral.weight[:, :, 0, 0].double()) for lateral in laterals]
        self.finest = PackedConv2d.of(merged[0].float(), output.bias, (1, 1))
        scales = [2**step for step in range(1, self.steps + 1)]
        self.shares = nn.ModuleList(
            _UpsampledConvolution(weight, scale) for weight, scale in zip([*merged[1:], kernel], scales, strict=True)
        )
        biases = [lateral.bias for lateral in laterals if lateral.bias is not None]
        self.register_buffer("bias", torch.stack(biases).double().sum(0).float().view(1, -1, 1, 1) if biases else None)

    def forward(self, taps: list[Tensor], merged: Tensor) -> Tensor:
        level: Tensor = self.finest(taps[0])
        sources = [*taps[1:], merged if self.bias is None else merged + self.bias]
        for share, source in zip(self.shares, sources, strict=True):
            share(source, level)
        return level


class _UpsampledConvolution(nn.Module):
    """Adds a 3×3 convolution, zero-padded by 1, of a map upsampled by `scale` to a map of that size."""

    def __init__(self, kernel: Tensor, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.parts = nn.ModuleDict()
        kernel = kernel.contiguous()
        kinds = ("ends",) if scale == 2 else ("ends", "middle")
        for rows in kinds:
            for columns in kinds:
                weight = torch.cat([_summed(kernel, y, x) for y in _ROWS[rows] for x in _ROWS[columns]])
                padding = (int(rows == "ends"), int(columns == "ends"))
                self.parts[f"{rows}_{columns}"] = PackedConv2d.of(weight.float(), None, padding)

    def forward(self, x: Tensor, level: Tensor) -> None:
        batch, _, height, width = x.shape
        scale, channels = self.scale, level.shape[1]
        cells = level.permute(0, 2, 3, 1).view(batch, height, scale, width, scale, channels)
        for name, part in self.parts.items():
            rows, columns = name.split("_")
            shares = part(x).permute(0, 2, 3, 1).split(channels, dim=3)
            places = [(y, x) for y in _ROWS[rows] for x in _ROWS[columns]]
            for share, (y, x_) in zip(shares, places, strict=True):
                share = share[:, _begin(y) :, _begin(x_) :][:, :height, :width]
                cells[:, :, _place(y, scale), :, _place(x_, scale)].add_(share[:, :, None, :, None])


_ROWS = {"ends": ("first", "last"), "middle": ("middle",)}


# Which of three cells are summed to each cell of a kernel on the small map, where the upsampled map repeats its cells.
_SUMS = {"first": [[1, 0, 0], [0, 1, 1]], "middle": [[1, 1, 1]], "last": [[1, 1, 0], [0, 0, 1]]}


def _summed(kernel: Tensor, rows: str, columns: str) -> Tensor:
    """A kernel (out, in, 3, 3) for the first, middle or last of the rows and columns that repeat a cell."""
    down, across = (torch.tensor(_SUMS[kind], dtype=kernel.dtype, device=kernel.device) for kind in (rows, columns))
    return (kernel.flatten(2) @ torch.kron(down, across).T).unflatten(2, (len(down), len(across)))


def _begin(kind: str) -> int:
    """First row of the results for the first or last rows, in those of a 2-cell kernel over a padded map."""
    return 1 if kind == "last" else 0


def _place(kind: str, scale: int) -> slice:
    return {"first": slice(0, 1), "middle": slice(1, scale - 1), "last": slice(scale - 1, scale)}[kind]


def _cells(steps: int) -> float:
    """Multiply-adds for each output cell and input channel, for a map that is `steps` levels coarser."""
    return 9.0 if steps == 0 else (KERNEL_CELLS_2 if steps == 1 else KERNEL_CELLS_4) / 4**steps


def _doubles(taps: list[Tensor]) -> bool:
    """Whether each map is exactly twice as large as the next."""
    sizes = [tap.shape[-2:] for tap in taps]
    return all(fine[i] == 2 * coarse[i] for fine, coarse in itertools.pairwise(sizes) for i in (0, 1))


def _add_upsampled(lateral: Tensor, coarse: Tensor) -> Tensor:
    """lateral + nearest(coarse), in place; through a broadcast, without the upsampled map, where sizes double."""
    if not _doubles([lateral, coarse]) or not lateral.is_contiguous(memory_format=torch.channels_last):
        return lateral.add_(F.interpolate(coarse, size=lateral.shape[-2:], mode="nearest"))
    batch, channels, height, width = coarse.shape
    cells = lateral.permute(0, 2, 3, 1).view(batch, height, 2, width, 2, channels)
    cells.add_(coarse.permute(0, 2, 3, 1).reshape(batch, height, 1, width, 1, channels))
    return lateral


def _is_plain(convolution: PackedConv2d, side: int) -> bool:
    """Whether a convolution is side × side, keeps the size of its map, and is linear."""
    return (
        tuple(convolution.weight.shape[2:]) == (side, side)
        and tuple(convolution.padding) == (side // 2, side // 2)
        and tuple(convolution.stride) == (1, 1)
        and tuple(convolution.dilation) == (1, 1)
        and convolution.groups == 1
        and convolution.activation is None
    )
