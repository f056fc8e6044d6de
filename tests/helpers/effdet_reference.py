"""effdet, the reference of BiFPN and EfficientDet checkpoints, imported without the warnings of its own code."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it uses torch.jit.script
    import effdet
    from effdet.efficientdet import BiFpn

__all__ = ["BiFpn", "config_of", "detector", "in_fpnx_names"]


def config_of(model: str, size: tuple[int, int]) -> Any:
    """The config of an EfficientDet of that name for images of `size` (height, width)."""
    config = effdet.get_efficientdet_config(model)
    config.image_size = size
    return config


def detector(model: str, size: tuple[int, int], **changes: Any) -> nn.Module:
    """The whole EfficientDet, for images of `size`, with changes to its config."""
    config = config_of(model, size)
    config.update(changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return effdet.EfficientDet(config, pretrained_backbone=False).eval()


def in_fpnx_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an effdet BiFpn with fpnx's names, written out place by place."""
    nodes = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("cell."))
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "resample":
            renamed[f"extra_block.{['conv', 'bn'].index(parts[3])}.{parts[4]}"] = value
            continue
        j = int(parts[3])
        place = f"top_down.{nodes // 2 - 1 - j}" if j < nodes // 2 else f"bottom_up.{j - nodes // 2}"
        rest = ".".join(parts[4:])
        rest = rest.replace("combine.edge_weights", "weights").replace("after_combine.conv.", "")
        rest = re.sub(r"combine\.resample\.\d+\.conv\.", "projections.0.", rest)
        rest = rest.replace("projections.0.conv", "projections.0.0").replace("projections.0.bn", "projections.0.1")
        rest = rest.replace("conv_dw", "depthwise").replace("conv_pw", "pointwise.0")
        rest = re.sub(r"^bn\.", "pointwise.1.", rest)
        renamed[f"cells.{parts[1]}.{place}.{rest}"] = value
    return renamed
