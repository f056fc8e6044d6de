"""The graph of a network, with a name for every step, and runs of it on tensors without data."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn

__all__ = ["Trace", "leaves", "on_meta", "run_on_meta"]

# Kept whole when tracing: torchvision's own blocks, as `torchvision.models.feature_extraction` does.
LEAVES = tuple(
    block for block in vars(torchvision.ops).values() if isinstance(block, type) and issubclass(block, nn.Module)
)


class Trace:
    """The graph of a network, and for every node the names that it goes by, innermost first."""

    def __init__(self, network: nn.Module) -> None:
        tracer = _Tracer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that become constants: they belong to the network's own code
            self.graph = tracer.trace(network)
        self.network, self.names = network, tracer.names


class _Tracer(fx.Tracer):
    """Notes names as it traces: a node that ends a module bears that module's name too.

    Other operations are named for their module and themselves (`features.relu`), numbered from the second on
    (`features.relu_1`).
    """

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, torchvision.ops))
        self.names: dict[fx.Node, list[str]] = {}
        self._module = ""
        self._times: dict[str, int] = {}
        self._made: dict[fx.Node, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outer, self._module = self._module, self.path_of_module(m)
        before = len(self._made)
        try:
            if self.is_leaf_module(m, self._module):
                return self.create_proxy("call_module", self._module, args, kwargs)
            out = forward(*args, **kwargs)
            if isinstance(out, fx.Proxy) and self._made[out.node] >= before:  # else: its input, untouched
                self.names[out.node].append(self._counted(self._module))
            return out
        finally:
            self._module = outer

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        if isinstance(proxy.node.type, str):  # under `from __future__ import annotations`; torch 2.6 cannot pickle it
            proxy.node.type = None
        self._made[proxy.node] = len(self._made)
        own = [] if kind == "call_module" else [re.sub(r"_\d+$", "", str(proxy.node))]
        self.names[proxy.node] = [self._counted(".".join([*([self._module] if self._module else []), *own]))]
        return proxy

    def _counted(self, name: str) -> str:
        times = self._times[name] = self._times.get(name, 0) + 1
        return name if times == 1 else f"{name}_{times - 1}"


def on_meta(network: nn.Module) -> nn.Module:
    """A copy of `network` on the meta device, which holds no data; nothing real is copied on the way."""
    tensors = chain(
        network.parameters(),
        network.buffers(),
        (value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor)),
    )
    twins: dict[int, Any] = {}
    for tensor in tensors:
        twin = tensor.detach().to("meta")
        twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(network, twins)


def run_on_meta(network: Callable[[Tensor], Any], size: tuple[int, int]) -> Any:
    """What `network`, on the meta device, gives for one image of `size` (height, width)."""
    with torch.no_grad(), torch.device("meta"):
        return network(torch.empty(1, 3, *size))


def leaves(value: Any) -> Iterator[Any]:
    """What nested lists, tuples and dicts hold, in order."""
    if isinstance(value, (Mapping, list, tuple)) and not isinstance(value, torch.Size):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(item)
    else:
        yield value
