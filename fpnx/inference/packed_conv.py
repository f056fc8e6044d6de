"""Convolutions for inference: norm folded in, activation and addition fused, weights packed for oneDNN."""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fpnx.inference.winograd import WinogradConvolution
from fpnx.models.backbones.tracing import pads_by_size

__all__ = [
    "SIZES_PACKED",
    "PackedConv2d",
    "can_pack",
    "fuse_sequence",
    "is_activation",
    "is_norm",
    "native_on_cpu",
    "packing",
]

# Activations that oneDNN fuses into a convolution: (name, scalars, algorithm).
FUSED: dict[type[nn.Module], Callable[[Any], tuple[str, list[float], str]]] = {
    nn.ReLU: lambda _: ("relu", [], ""),
    nn.ReLU6: lambda _: ("hardtanh", [0.0, 6.0], ""),
    nn.Hardtanh: lambda module: ("hardtanh", [module.min_val, module.max_val], ""),
    nn.LeakyReLU: lambda module: ("leaky_relu", [module.negative_slope], ""),
    nn.SiLU: lambda _: ("swish", [], ""),
    nn.Hardswish: lambda _: ("hardswish", [], ""),
    nn.Sigmoid: lambda _: ("sigmoid", [], ""),
}


SIZES_PACKED = 2  # by convolution; a packed weight is for one map size, and up to ten times slower with another

_PACKING = threading.local()


class PackedConv2d(nn.Module):
    """activation(convolution(x) [+ other]) for inference; float32 parameters until `prepare`.

    `convolution` is read, never changed. Not for training, and without a useful `state_dict`. Once its weight is packed
    for one map size, only the packed weight is held, until a map of another size comes. Where Winograd's way is faster,
    packing transforms the weight for it, once for all sizes.

    Attributes:
        activation: a module applied at the end, or None.
        accumulates: whether `other` may be overwritten with the result.
        winograd: the weight as Winograd's way takes it, once it is packed for a map size for which that is faster.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self._plain: Tensor | None = convolution.weight.detach().float().clone()
        self.bias = None if convolution.bias is None else convolution.bias.detach().float().clone()
        self.stride, self.dilation, self.groups = convolution.stride, convolution.dilation, convolution.groups
        self.padding: Any = convolution.padding
        self._padded_for = convolution.kernel_size if pads_by_size(convolution) else None
        self.activation: nn.Module | None = None
        self.accumulates = False
        self._fused: tuple[str, list[float], str] = ("none", [], "")
        self._packed: dict[tuple[int, int], Tensor | WinogradConvolution] = {}
        self.winograd: WinogradConvolution | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> PackedConv2d:
        """From float32 parameters, with stride 1."""
        made = cls(nn.Conv2d(1, 1, 1, device="meta"))  # whose parameters are not drawn
        made._plain, made.bias, made.padding = weight, bias, padding
        return made

    @staticmethod
    def takes(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether `module` is a convolution that this class computes exactly."""
        known = type(module) is nn.Conv2d or (isinstance(module, nn.Conv2d) and pads_by_size(module))
        return known and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    @property
    def weight(self) -> Tensor:
        """(out, in / groups, height, width), in channels-last layout once prepared."""
        weight = self._plain
        if weight is None:  # two threads may both unpack it: the result is the same
            packed = next(each for each in self._packed.values() if isinstance(each, Tensor))
            weight = packed.to_dense().contiguous(memory_format=torch.channels_last)
            self._plain = weight
        return weight

    def fold(self, norm: Any) -> None:
        """Fold in the norm that follows, by its statistics: y = (x - mean) / sqrt(variance + eps) · scale + shift."""
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        bias = shift if self.bias is None else self.bias.double() * scale + shift
        self._plain = (self.weight.double() * scale.view(-1, 1, 1, 1)).float()
        self.bias = bias.float()

    def activate(self, module: nn.Module) -> None:
        """Apply a copy of `module` at the end, in place where it can; `is_activation(module)` must hold."""
        copied: Any = copy.deepcopy(module)
        if hasattr(copied, "inplace"):
            copied.inplace = True
        self.activation, self._fused = copied, FUSED[type(module)](module)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the parameters to a device and dtype."""
        self._plain = self.weight.to(device, dtype, memory_format=torch.channels_last)
        self.bias = None if self.bias is None else self.bias.to(device, dtype)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self._padded_for is not None:
            x = self._padded(x, self._padded_for)
        size = (x.shape[2], x.shape[3])
        weight = self._packed.get(size)
        if weight is None and getattr(_PACKING, "on", False):
            weight = self._pack(x, size)
        if isinstance(weight, WinogradConvolution):
            return weight(x, self.bias, self.padding, other, self.activation, accumulates=self.accumulates)
        if weight is not None:
            return self._forward_packed(weight, x, other)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if other is not None:
            y = y.add_(other)
        return y if self.activation is None else self.activation(y)

    def _padded(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """`x` with zeros around it, so that the result has ceil(side / stride) rows and columns; of an odd number the
        end has one more."""
        edges: list[int] = []
        for side, length, stride, dilation in zip(x.shape[2:], kernel, self.stride, self.dilation, strict=True):
            needed = (math.ceil(side / stride) - 1) * stride + (length - 1) * dilation + 1
            missing = max(needed - side, 0)
            edges = [missing // 2, missing - missing // 2, *edges]
        return F.pad(x, edges) if any(edges) else x

    def _forward_packed(self, weight: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
        geometry = (weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        if other is None:
            y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, *geometry, *self._fused)
            return y
        unary: tuple[Any, ...] = ("relu" if self.activation is not None else None, [], None)
        if self.accumulates:
            y = torch.ops.mkldnn._convolution_pointwise_.binary(other, x, *geometry, "add", 1.0, *unary)
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(x, other, *geometry, "add", None, *unary)
        return y

    def _pack(self, x: Tensor, size: tuple[int, int]) -> Tensor | WinogradConvolution:
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        packed: Tensor | WinogradConvolution
        if self._takes_winograd(x, size):
            packed = self.winograd = self.winograd or WinogradConvolution(self.weight)
        else:
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(x.shape))
        # A new dictionary: other threads may be reading the old one.
        before = self._packed
        kept = list(before.items())[1 - SIZES_PACKED :] if len(before) >= SIZES_PACKED else before
        self._packed = {**dict(kept), size: packed}
        if not before and isinstance(packed, Tensor):  # most runs have a single size
            self._plain = None
        return packed

    def _takes_winograd(self, x: Tensor, size: tuple[int, int]) -> bool:
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.weight.shape[2:] == (3, 3)
        return (
            plain and x.dtype is torch.float32 and WinogradConvolution.is_faster(self.weight.shape, self.padding, size)
        )


@contextmanager
def packing() -> Iterator[None]:
    """Inside this context, in this thread, convolutions pack their weights for the map sizes that they are given.

    From then on they use the packed weights for maps of that size, in any thread; other sizes use the plain weights.
    """
    _PACKING.on = True
    try:
        yield
    finally:
        _PACKING.on = False


def is_norm(module: nn.Module | None) -> bool:
    """Whether `PackedConv2d.fold` takes `module`: a batch norm with running statistics, in eval mode."""
    if isinstance(module, FrozenBatchNorm2d):
        return True
    if module is None or type(module) is not nn.BatchNorm2d:
        return False
    return not module.training and module.running_var is not None


def is_activation(module: nn.Module | None) -> bool:
    """Whether `module` is an activation that can be fused into a convolution."""
    return type(module) in FUSED


def native_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for `dtype`, so that oneDNN does not convert to another."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if name is None:
        return dtype is torch.float32
    asks = getattr(torch.ops.mkldnn, name, None)
    return bool(asks is not None and asks())


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed and fused convolutions work here. The operators are private to PyTorch, so they are
    tried on small convolutions and compared with plain ones."""
    if not torch.backends.mkldnn.is_available() or not native_on_cpu(dtype):
        return False
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, 16, 9, 9, generator=generator).to(dtype) for _ in range(2))
    x, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
    near = functools.partial(torch.allclose, atol=1e-4 if dtype is torch.float32 else 3e-2)
    layer = nn.Conv2d(16, 16, 3, padding=1, device="meta").to_empty(device="cpu")
    layer.weight = nn.Parameter(torch.randn(16, 16, 3, 3, generator=generator) / 12)
    layer.bias = nn.Parameter(torch.randn(16, generator=generator))
    try:
        for accumulates in (False, True):
            plain, tried = PackedConv2d(layer), PackedConv2d(layer)
            tried.accumulates = accumulates
            for made in (plain, tried):
                made.activate(nn.ReLU())
                made.prepare(x.device, dtype)
            with torch.inference_mode(), packing():
                tried(x)
                tried(x)
            with torch.inference_mode():
                sums = [made(x, other.clone()) for made in (tried, plain)]
                if not (near(tried(x), plain(x)) and near(*sums) and torch.equal(tried.weight, plain.weight)):
                    return False
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or not for these arguments
        return False
    return True


def fuse_sequence(block: nn.Module) -> nn.Module:
    """A convolution, or a sequence that begins with one, as a packed convolution with the norm and activation that
    follow folded in; a copy of any other module."""
    parts = list(block) if isinstance(block, nn.Sequential) else [block]
    if not PackedConv2d.takes(parts[0]):
        return copy.deepcopy(block)
    after = parts[1:]
    made = PackedConv2d(parts[0])
    if after and is_norm(after[0]):
        made.fold(after.pop(0))
    if after and is_activation(after[0]):
        made.activate(after.pop(0))
    return nn.Sequential(made, *copy.deepcopy(after)) if after else made
