"""What a model costs whatever the machine: parameters and floating-point operations, part by part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fpnx.executable import Executable
from fpnx.model import PyramidModel

__all__ = ["Cost", "count_costs", "count_executed"]


@dataclass(frozen=True)
class Cost:
    """One part of a model: its parameters, and the operations that one image takes there (a multiply-add is two)."""

    part: str
    parameters: int
    flops: int


def count_costs(model: PyramidModel, size: tuple[int, int]) -> tuple[Cost, ...]:
    """Backbone, laterals, outputs and top block for an input of `size` (height, width), without computing it.

    Parameters are all that the part holds; operations only those that the asked levels need: convolutions, matrix
    products and attention, as `torch.utils.flop_counter` counts them, not norms, activations and additions.

    Raises:
        RuntimeError: where the network cannot take that size.
    """
    on_meta = {name: value.to("meta") for name, value in model.state_dict().items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, on_meta, (torch.empty(1, 3, *size, device="meta"),))
    by_module = counter.get_flop_counts()

    def flops(name: str) -> int:
        return sum(by_module.get(f"{type(model).__name__}.fpn.{name}", {}).values())

    costs = []
    if set(model.levels) & set(model.fpn.levels):
        for part, name in (("laterals", "inner_blocks"), ("outputs", "layer_blocks"), ("top block", "extra_blocks")):
            if name == "extra_blocks" and model.fpn.top_block is None:
                continue
            blocks = getattr(model.fpn, name, nn.ModuleList())  # pooling has none
            count = sum(flops(f"{name}.{child}") for child, _ in blocks.named_children())
            costs.append(Cost(part, _parameters(blocks), count))
    backbone = counter.get_total_flops() - sum(cost.flops for cost in costs)
    return (Cost("backbone", _parameters(model.body), backbone), *costs)


def count_executed(executable: Executable, size: tuple[int, int]) -> int:
    """Operations of one image of `size` (height, width) in the executable form: fewer where levels are recombined.

    Counted likewise, by computing one image; weights that are packed already are not seen.
    """
    image = torch.zeros(1, 3, *size, device=executable.device, dtype=executable.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        executable(image.contiguous(memory_format=torch.channels_last))
    return int(counter.get_total_flops())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
