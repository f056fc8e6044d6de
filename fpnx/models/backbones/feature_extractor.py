"""The part of a network that its taps need, read where the stages end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from fpnx.models.backbones.stage_search import Stages, TapPoint
from fpnx.models.backbones.tracing import Trace, leaves

__all__ = ["tapped"]


def tapped(network: nn.Module, stages: Stages) -> nn.Module:
    """The part of `network` that its taps need, in eval mode; forward gives `{"C2": (B, C, H, W), ...}`.

    It shares the network's parameters and keeps their names. Traced: an `fx.GraphModule`, without what lies behind
    the last tap. A network that several threads run at once must be one that could be traced.
    """
    if not stages.traced:
        return _Hooked(network, stages.taps).eval()
    trace = Trace(network)
    graph, outputs = trace.graph, dict[str, fx.Node]()
    named = {name: node for node, names in trace.names.items() for name in names}
    output = next(node for node in graph.nodes if node.op == "output")
    named |= {f"output[{i}]": node for i, node in enumerate(leaves(output.args[0])) if isinstance(node, fx.Node)}
    for level, tap in sorted(stages.taps.items()):
        node = named[tap.node]
        with graph.inserting_after(node):
            if tap.channels_last:
                node = graph.call_method("permute", (node, 0, 3, 1, 2))
        if tap.overwritten:
            with graph.inserting_after(node):
                node = graph.call_method("clone", (node,))
        outputs[f"C{level}"] = node
    graph.erase_node(output)
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max(order[node] for node in outputs.values())
    for node in reversed(list(graph.nodes)):
        if order[node] > last:
            graph.erase_node(node)
    graph.output(outputs)
    # What changes a tensor in place is used though nothing reads its result.
    graph.eliminate_dead_code(lambda node: _acts(network, node))
    body = fx.GraphModule(network, graph)
    # Tensors that the network's code made as it was traced are no parameters of it.
    body._non_persistent_buffers_set |= set(body._buffers) - set(network.state_dict())
    return body.eval()


class _Hooked(nn.Module):
    """A network as it is, under its own parameter names, read at the outputs of its modules or at its own."""

    def __init__(self, network: nn.Module, taps: Mapping[int, TapPoint]) -> None:
        super().__init__()
        # The network's registries are ours: names, devices and training mode are those of one module.
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = network.__dict__[registry]
        self.__dict__["_network"] = network
        self.__dict__["_taps"] = dict(taps)

    def train(self, mode: bool = True) -> _Hooked:
        self.__dict__["_network"].training = mode
        return super().train(mode)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        network, taps = self.__dict__["_network"], self.__dict__["_taps"]
        held: dict[str, Tensor] = {}
        hooked = {tap.node: tap for tap in taps.values() if not tap.node.startswith("output[")}
        stops = len(hooked) == len(taps)

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                held[name] = output.clone() if hooked[name].overwritten else output
                if stops and len(held) == len(taps):
                    raise _Enough

            return hook

        handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in hooked]
        try:
            outputs = network(images)
            held |= {f"output[{i}]": value for i, value in enumerate(leaves(outputs))}
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        maps = {f"C{level}": (held[tap.node], tap.channels_last) for level, tap in sorted(taps.items())}
        return {name: value.permute(0, 3, 1, 2) if last else value for name, (value, last) in maps.items()}


class _Enough(BaseException):
    """All taps are there: the rest of the network need not run."""


def _acts(network: nn.Module, node: fx.Node) -> bool:
    """Whether a node does something though nothing reads its result: checks a size, or changes a tensor in place."""
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = node.op.startswith("call_") and (re.search(r"[a-z]_$", name) or name == "setitem")
    return bool(writes) or node.is_impure() or bool(node.kwargs.get("inplace"))
