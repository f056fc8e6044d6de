"""Networks whose maps have one stride, such as vision transformers: their blocks, and the maps of chosen blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.core.levels import level_of_stride
from fpnx.models.backbones.huggingface import HF, HfBlockMaps, HfMaps, block_count, hf_network
from fpnx.models.backbones.registry import TIMM, build_network
from fpnx.models.backbones.stage_search import PROBE_SIZES, Stages, TapPoint
from fpnx.models.backbones.tracing import run_on_meta

__all__ = ["BlockMaps", "block_maps", "build_blocks", "chosen_blocks", "find_blocks"]

PROBE_CELLS = ((28, 42), (20, 9))  # sizes of maps (height, width) with which a network is tried


class BlockMaps(nn.Module):
    """The maps of some blocks of a timm network, concatenated along channels: (B, 3, H, W) → `{"C4": (B, C, h, w)}`.

    They are what timm's `forward_intermediates` gives: tokens of the image without class and register tokens, before
    the network's last norm. Parameters are the network's own, under its names.

    Args:
        network: offers `forward_intermediates`.
        blocks: their numbers, from 0 on.
        tap: the name of the map.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[int], tap: str) -> None:
        super().__init__()
        # The registries are shared with the network, so that both have the same names, devices and parameters.
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = network.__dict__[registry]
        self.__dict__["_network"] = network
        self._blocks, self._tap = list(blocks), tap

    def train(self, mode: bool = True) -> BlockMaps:
        self.__dict__["_network"].training = mode
        return super().train(mode)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = _maps(self.__dict__["_network"], images, self._blocks)
        return {self._tap: maps[0] if len(maps) == 1 else torch.cat(maps, 1)}


def build_blocks(
    name: str, blocks: Sequence[int] = (-1,), *, meta: bool = False, loaded: dict[str, Tensor] | None = None
) -> nn.Module:
    """The network `name` up to the last of `blocks`, without last norm and head, for images of any size.

    Args:
        blocks, meta, loaded: their numbers; the others as for `build_network`.
    """
    network: Any = None
    if name.startswith(HF):
        network = hf_network(name, [number % block_count(name) for number in blocks])
        return nn.Module.to(network, "meta") if meta else nn.Module.eval(network)
    for options in ({"dynamic_img_size": True}, {}):  # position embeddings are resized to the image
        try:
            network = build_network(name, options=options, meta=meta, loaded=loaded, classifier=True)
            break
        except TypeError:
            if not options:
                raise
    network.prune_intermediate_layers(list(blocks), prune_norm=True, prune_head=True)
    return nn.Module.eval(network)


def find_blocks(name: str) -> Stages | None:
    """The blocks of a timm network whose maps have one stride, with the last as the tap; None for other networks.

    Raises:
        Exception: of any kind, where the network does not take images of several sizes.
    """
    if name.startswith(HF):
        return _find_hf_blocks(name)
    if not name.startswith(TIMM):
        return None
    network: Any = build_network(name, meta=True, classifier=True)
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "prune_intermediate_layers"):
        return None
    info = list(getattr(network.feature_info, "info", network.feature_info))
    strides = {entry["reduction"] for entry in info}
    stride = strides.pop()
    if strides or stride != int(stride):
        return None
    network = build_blocks(name, meta=True)
    for cells in PROBE_CELLS:
        (found,) = run_on_meta(lambda images: _maps(network, images, [len(info) - 1]), _times(cells, int(stride)))
        if tuple(found.shape[2:]) != cells:
            return None
    tap = TapPoint(node=info[-1].get("module", f"blocks.{len(info) - 1}"), channels=found.shape[1])
    return Stages(taps={level_of_stride(stride): tap}, traced=False, stride=int(stride), blocks=len(info))


def block_maps(name: str, network: nn.Module, stages: Stages, blocks: Sequence[int]) -> nn.Module:
    """The module that gives the only tap of a network that `build_blocks` has built for these blocks."""
    (level,) = stages.taps
    if name.startswith(HF):
        assert stages.stride is not None
        return HfBlockMaps(network, stages.stride, f"C{level}")
    return BlockMaps(network, blocks, f"C{level}")


def _find_hf_blocks(name: str) -> Stages | None:
    """The blocks of a backbone of transformers whose maps all have one stride; None for others."""
    count = block_count(name)
    network = HfMaps(hf_network(name)).to("meta").eval()
    size = PROBE_SIZES[0]
    maps = run_on_meta(network, size)
    strides = {(size[0] / each.shape[2], size[1] / each.shape[3]) for each in maps}
    if len(strides) != 1 or count < 2:
        return None
    ((stride, other),) = strides
    if stride != other or stride != int(stride):
        return None
    tap = TapPoint(node=f"stage{count}", channels=maps[-1].shape[1])
    return Stages(taps={level_of_stride(stride): tap}, traced=False, stride=int(stride), blocks=count)


def chosen_blocks(name: str, asked: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The blocks that `--blocks` asks for, counted from 0 and in order; None: the last.

    Raises:
        FpnxError: there is no such block, or one is named twice.
    """
    numbers = []
    for number in asked or (-1,):
        if not -count <= number < count:
            raise FpnxError(
                f"{name} has no block {number}: it has {count}, from 0 to {count - 1}, or from -1 (the last) to "
                f"-{count}"
            )
        numbers.append(number % count)
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if twice is not None:
        raise FpnxError(f"block {twice} is named twice in blocks {','.join(map(str, asked or ()))}")
    return tuple(sorted(numbers))


def _maps(network: Any, images: Tensor, blocks: list[int]) -> list[Tensor]:
    maps: list[Tensor] = network.forward_intermediates(
        images, indices=blocks, intermediates_only=True, output_fmt="NCHW"
    )
    return maps


def _times(cells: tuple[int, int], stride: int) -> tuple[int, int]:
    return cells[0] * stride, cells[1] * stride
