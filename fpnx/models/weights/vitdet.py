"""detectron2's ViTDet checkpoints (Li et al. 2022, arXiv 2203.16527) in the names of timm's samvit networks.

These have the same blocks: window attention with decomposed relative positions, and global attention in four of them.
detectron2 resizes the position embeddings of pretraining at every input size, and pads all inputs to 1024×1024. Here
they are resized once, for that size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fpnx.core.errors import FpnxError

__all__ = ["VITDET_SIDE", "rename_vitdet", "vitdet_backbone", "vitdet_state"]

VITDET_SIDE = 1024  # of the inputs of detectron2's models, padding included
GRID = VITDET_SIDE // 16
NETWORKS = {  # channels and number of blocks → timm's network
    (768, 12): "timm/samvit_base_patch16",
    (1024, 24): "timm/samvit_large_patch16",
    (1280, 32): "timm/samvit_huge_patch16",
}
FIRST_CONVOLUTION = {2: 4, 3: 1, 4: 0, 5: 1}  # level → position of the 1×1 convolution in its sequence


def rename_vitdet(name: str) -> str | None:
    """fpnx's name for one of detectron2's; None for a name that it does not know."""
    if match := re.fullmatch(r"backbone\.net\.(pos_embed|patch_embed\.proj\.\w+|blocks\.\d+\.(?!residual).+)", name):
        return f"body.{match[1]}"
    if match := re.fullmatch(r"backbone\.simfp_([2-5])\.(\d)\.(norm\.)?(weight|bias)", name):
        first, position = FIRST_CONVOLUTION[int(match[1])], int(match[2])
        # A norm is part of its convolution in detectron2, and the next layer here.
        position += (position - first if position > first else 0) + (match[3] is not None)
        return f"fpn.blocks.P{match[1]}.{position}.{match[4]}"
    return None


def vitdet_backbone(state: Mapping[str, Tensor]) -> str:
    """timm's network with the parameters `body.*`.

    Raises:
        FpnxError: there is none of this width and depth.
    """
    width = state["body.patch_embed.proj.weight"].shape[0] if "body.patch_embed.proj.weight" in state else 0
    depth = len({match[1] for name in state if (match := re.match(r"body\.blocks\.(\d+)\.", name))})
    if (width, depth) not in NETWORKS:
        raise FpnxError(
            f"its ViT has {depth} blocks of {width} channels: ViTDet's B, L and H are read, of "
            + ", ".join(f"{blocks} of {channels}" for channels, blocks in NETWORKS)
        )
    return NETWORKS[width, depth]


def vitdet_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with position embeddings (1, 64, 64, C), resized from those of pretraining as detectron2 does it.

    Raises:
        FpnxError: they are not of a square of patches.
    """
    found = dict(state)
    positions = found.get("body.pos_embed")
    if positions is None or positions.dim() != 3:
        return found
    side = math.isqrt(positions.shape[1])
    grid = positions[:, positions.shape[1] - side * side :].float()  # behind the class token, where there is one
    if positions.shape[1] - side * side > 1:
        raise FpnxError(f"its {positions.shape[1]} position embeddings are not those of a square of patches")
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    with torch.no_grad():
        if side != GRID:
            grid = F.interpolate(grid, size=(GRID, GRID), mode="bicubic", align_corners=False)
    found["body.pos_embed"] = grid.permute(0, 2, 3, 1).contiguous()
    return found
