"""Shapes of the results of common operations on meta tensors, without torch's own code for them.

For a single convolution of meta tensors torch imports its compiler and SymPy, which takes longer than the rest of the
preparation of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["MetaShapes"]


class MetaShapes(TorchFunctionMode):
    """Within the context convolutions, poolings, resizings and sums of meta tensors give new tensors of their shape.

    Where torch would refuse the arguments, or they are unusual, torch is called. A `TorchDispatchMode` does not see
    these operations.

    Args:
        convolutions: False lets torch do them.
    """

    def __init__(self, *, convolutions: bool = True) -> None:
        super().__init__()
        self._rules = (
            RULES if convolutions else {func: rule for func, rule in RULES.items() if rule is not _convolution}
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self._rules.get(func)
        if rule is not None and args and isinstance(args[0], Tensor) and args[0].is_meta:
            shape = rule(*args, **kwargs)
            if shape is not None:
                return args[0].new_empty(shape)
        return func(*args, **kwargs)


def _sum(first: Tensor, second: Any, **options: Any) -> Sequence[int] | None:
    plain = not options and isinstance(second, Tensor) and second.is_meta
    return first.shape if plain and (first.shape, first.dtype) == (second.shape, second.dtype) else None


def _convolution(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Sequence[int] | None:
    if isinstance(padding, str) or x.dim() != 4 or x.dtype is not weight.dtype:
        return None
    if x.shape[1] != weight.shape[1] * groups:
        return None
    sides = _sides(x, weight.shape[2:], stride, padding, dilation)
    return None if sides is None else (len(x), len(weight), *sides)


def _pooling(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Sequence[int] | None:
    kernel = _pair(kernel_size)
    too_much = any(2 * pad > side for pad, side in zip(_pair(padding), kernel, strict=True))
    if ceil_mode or return_indices or too_much or x.dim() != 4:
        return None
    sides = _sides(x, kernel, kernel if stride is None else stride, padding, dilation)
    return None if sides is None else (*x.shape[:2], *sides)


def _sides(x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> tuple[int, ...] | None:
    """Height and width of what a window gives that moves over `x`; None where it does not fit."""
    moves = zip(x.shape[2:], kernel, _pair(stride), _pair(padding), _pair(dilation), strict=True)
    sides = tuple((side + 2 * pad - gap * (length - 1) - 1) // step + 1 for side, length, step, pad, gap in moves)
    return sides if min(sides) > 0 else None


def _resizing(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **options: Any
) -> Sequence[int] | None:
    if x.dim() != 4 or mode not in ("nearest", "bilinear") or (size is None) is (scale_factor is None):
        return None
    if size is None:
        size = [math.floor(side * scale) for side, scale in zip(x.shape[2:], _pair(scale_factor), strict=True)]
    return (*x.shape[:2], *_pair(size)) if min(_pair(size)) > 0 else None


def _pair(value: Any) -> tuple[Any, Any]:
    first, second = value if isinstance(value, Sequence) and len(value) == 2 else (value, value)
    return first, second


RULES: dict[Any, Callable[..., Sequence[int] | None]] = {
    torch.add: _sum,
    Tensor.add: _sum,
    Tensor.__add__: _sum,
    torch.conv2d: _convolution,
    F.max_pool2d: _pooling,
    torch.max_pool2d: _pooling,
    F.interpolate: _resizing,
}
