"""Shapes of the results of common operations on meta tensors, without torch's own code for them.

For a single convolution of meta tensors torch imports its compiler and SymPy, which takes longer than the rest of the
preparation of a run.
"""

from __future__ import annotations

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
    operations whose shape is given here.

    Args:
        convolutions: False lets torch do them.
    """

    def __init__(self, *, convolutions: bool = True) -> None:
        super().__init__()
        self._rules = {func: rule for func, rule in RULES.items() if convolutions or rule is not _convolution}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self._rules.get(func)
        if rule is not None and args and _is_map(args[0]):
            shape = rule(*args, **kwargs)
            if shape is not None:
                return args[0].new_empty(shape)
        return func(*args, **kwargs)


def _is_map(x: Any) -> bool:
    """Whether `x` is a meta tensor (B, C, H, W) in torch's usual order of elements, which results then have, too."""
    return isinstance(x, Tensor) and x.is_meta and x.dim() == 4 and x.is_contiguous()


def _sum(first: Tensor, second: Any, **options: Any) -> Sequence[int] | None:
    same = _is_map(second) and (first.shape, first.dtype) == (second.shape, second.dtype)
    return first.shape if same and not options else None


def _convolution(
    x: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> Sequence[int] | None:
    if not _is_map(weight) or x.dtype is not weight.dtype or type(groups) is not int or groups < 1:
        return None
    if bias is not None and (bias.shape, bias.dtype) != (weight.shape[:1], weight.dtype):
        return None
    if x.shape[1] != weight.shape[1] * groups or len(weight) % groups:
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
    kernel, pads = _pair(kernel_size), _pair(padding)
    if ceil_mode or return_indices or kernel is None or pads is None:
        return None
    if any(2 * pad > side for pad, side in zip(pads, kernel, strict=True)):
        return None
    sides = _sides(x, kernel, kernel if stride is None else stride, padding, dilation)
    return None if sides is None else (*x.shape[:2], *sides)


def _sides(x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> tuple[int, ...] | None:
    """Height and width of what a window gives that moves over `x`; None where it does not fit."""
    steps, pads, gaps = _pair(stride), _pair(padding), _pair(dilation)
    if steps is None or pads is None or gaps is None or min(*kernel, *steps, *gaps) < 1 or min(pads) < 0:
        return None
    moves = zip(x.shape[2:], kernel, steps, pads, gaps, strict=True)
    sides = tuple((side + 2 * pad - gap * (length - 1) - 1) // step + 1 for side, length, step, pad, gap in moves)
    return sides if min(sides) > 0 else None


def _resizing(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: Any = False,
) -> Sequence[int] | None:
    sides = _pair(size)
    if sides is None or min(sides) < 1 or scale_factor is not None or recompute_scale_factor or antialias:
        return None
    if mode != "bilinear" and (mode, align_corners) != ("nearest", None):
        return None
    return (*x.shape[:2], *sides)


def _pair(value: Any) -> tuple[int, int] | None:
    """Two whole numbers from one or two; None for anything else."""
    both = (value, value) if type(value) is int else value
    if not isinstance(both, Sequence) or len(both) != 2 or any(type(each) is not int for each in both):
        return None
    return both[0], both[1]


RULES: dict[Any, Callable[..., Sequence[int] | None]] = {
    torch.add: _sum,
    Tensor.add: _sum,
    torch.conv2d: _convolution,
    F.max_pool2d: _pooling,
    torch.max_pool2d: _pooling,
    F.interpolate: _resizing,
}
