"""Counts the operations of networks."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCounter"]


class FlopCounter(TorchDispatchMode):
    """Counts operations with torch's formulas, as `FlopCounterMode` does, which imports torch's compiler.

    Attributes:
        flops: so far.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by torch where the class is made: False leaves `__torch_dispatch__` as it is."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        made = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        return made
