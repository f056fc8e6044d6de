"""Traces networks into torch.fx graphs with named nodes, and runs networks on the meta device."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from fpnx.core.warning_filters import ignored_warnings
from fpnx.models.backbones.local_tracer import LocalTracer
from fpnx.models.torch_state import on_meta_device

__all__ = ["Trace", "for_shapes", "leaves", "meta_copy", "on_meta", "pads_by_size", "run_on_meta"]

# Traced as single nodes: torchvision's own blocks, as in `torchvision.models.feature_extraction`.
LEAF_MODULES = tuple(
    block for block in vars(torchvision.ops).values() if isinstance(block, type) and issubclass(block, nn.Module)
)

# Their results have the shapes of their inputs. On the meta device they take most of the time of a network.
SHAPE_KEEPING = frozenset({
    nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d, nn.Dropout, StochasticDepth,
    nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.SiLU,
})  # fmt: skip


class Trace:
    """The torch.fx graph of a network, and the names of every node, innermost module first.

    Until it is made, nothing else may use the network.

    Attributes:
        graph: the traced graph.
        names: node → its names: its own, then those of the modules that it ends.
    """

    def __init__(self, network: nn.Module) -> None:
        tracer = _Tracer()
        with ignored_warnings():  # the network's own code warns that shapes become constants
            self.graph = tracer.trace(network)
        self.network, self.names = network, tracer.names


class _Tracer(LocalTracer):
    """Records a name for every node; the last node of a module also gets the name of that module.

    Operations are named after their module and function (`features.relu`), with a number from the second call on
    (`features.relu_1`).
    """

    def __init__(self) -> None:
        super().__init__((math, torchvision.ops))
        self.names: dict[fx.Node, list[str]] = {}
        self._module = ""
        self._call_counts: dict[str, int] = {}
        self._creation_order: dict[fx.Node, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAF_MODULES) or pads_by_size(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outer, self._module = self._module, self.path_of_module(m)
        nodes_before = len(self._creation_order)
        try:
            if self.is_leaf_module(m, self._module):
                return self.create_proxy("call_module", self._module, args, kwargs)
            out = forward(*args, **kwargs)
            # A module that returns its input unchanged made no node that could take its name.
            if isinstance(out, fx.Proxy) and self._creation_order[out.node] >= nodes_before:
                self.names[out.node].append(self._numbered(self._module))
            return out
        finally:
            self._module = outer

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        if isinstance(proxy.node.type, str):  # under `from __future__ import annotations`; torch 2.6 cannot pickle it
            proxy.node.type = None
        self._creation_order[proxy.node] = len(self._creation_order)
        operation = [] if kind == "call_module" else [re.sub(r"_\d+$", "", str(proxy.node))]
        module = [self._module] if self._module else []
        self.names[proxy.node] = [self._numbered(".".join([*module, *operation]))]
        return proxy

    def _numbered(self, name: str) -> str:
        count = self._call_counts[name] = self._call_counts.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count - 1}"


def pads_by_size(module: nn.Module) -> bool:
    """Whether `module` is a convolution or pooling of timm that pads as TensorFlow does, by the size of its input."""
    kind = type(module)
    return kind.__module__.startswith("timm.") and kind.__name__ in ("Conv2dSame", "MaxPool2dSame", "AvgPool2dSame")


def on_meta(network: nn.Module) -> nn.Module:
    """A copy of `network` on the meta device: shapes and dtypes without data. No data is copied."""
    tensors = chain(
        network.parameters(),
        network.buffers(),
        (value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor)),
    )
    memo: dict[int, Any] = {}
    for tensor in tensors:
        meta = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(network, memo)


def for_shapes(network: nn.Module) -> nn.Module:
    """A copy of `network` on the meta device that gives the shapes of its results only: it skips `SHAPE_KEEPING`."""
    copied = on_meta(network)
    for module in copied.modules():
        if type(module) in SHAPE_KEEPING:
            module.forward = _unchanged
    return copied


def _unchanged(value: Tensor) -> Tensor:
    return value


def meta_copy(network: nn.Module) -> nn.Module:
    """The copy of `network` that `for_shapes` makes, made once, for running only."""
    if network not in _META_COPIES:
        _META_COPIES[network] = for_shapes(network)
    return _META_COPIES[network]


_META_COPIES: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def run_on_meta(network: Callable[[Tensor], Any], size: tuple[int, int], *, counted: bool = False) -> Any:
    """Run `network`, which is on the meta device, on one image (1, 3, H, W) of `size` (height, width).

    Args:
        counted: as for `on_meta_device`.
    """
    with on_meta_device(counted=counted):
        return network(torch.empty(1, 3, *size))


def leaves(value: Any) -> Iterator[Any]:
    """The items of nested lists, tuples and dicts, in order; any other value is its own leaf."""
    if isinstance(value, (Mapping, list, tuple)) and not isinstance(value, torch.Size):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(item)
    else:
        yield value
