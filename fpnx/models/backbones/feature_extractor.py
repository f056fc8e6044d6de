"""Cuts a network down to the part that its taps need."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from fpnx.models.backbones.stage_search import Stages, TapPoint
from fpnx.models.backbones.tracing import Trace, leaves

__all__ = ["create_feature_extractor"]


def create_feature_extractor(network: nn.Module, stages: Stages) -> nn.Module:
    """The part of `network` that its taps need, in eval mode; forward gives `{"C2": (B, C, H, W), ...}`.

    It shares the network's parameters and keeps their names. Traced networks become an `fx.GraphModule` that ends at
    the last tap. Others are read by forward hooks, and only one thread at a time may run them.
    """
    if not stages.traced:
        return _HookedNetwork(network, stages.taps).eval()
    trace = Trace(network)
    graph, outputs = trace.graph, dict[str, fx.Node]()
    node_of_name = {name: node for node, names in trace.names.items() for name in names}
    output = next(node for node in graph.nodes if node.op == "output")
    returned = enumerate(leaves(output.args[0]))
    node_of_name |= {f"output[{i}]": node for i, node in returned if isinstance(node, fx.Node)}
    for level, tap in sorted(stages.taps.items()):
        node = node_of_name[tap.node]
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
    # In-place operations must stay although no node reads their result.
    graph.eliminate_dead_code(lambda node: _has_side_effects(network, node))
    body = fx.GraphModule(network, graph)
    # Constants that the network's code created during tracing do not belong in the state dict.
    body._non_persistent_buffers_set |= set(body._buffers) - set(network.state_dict())
    return body.eval()


class _HookedNetwork(nn.Module):
    """A network read by forward hooks on its modules, or at its own outputs. It keeps its own parameter names."""

    def __init__(self, network: nn.Module, taps: Mapping[int, TapPoint]) -> None:
        super().__init__()
        # The registries are shared with the network, so that both have the same names, devices and parameters.
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = network.__dict__[registry]
        self.__dict__["_network"] = network
        self.__dict__["_taps"] = dict(taps)

    def train(self, mode: bool = True) -> _HookedNetwork:
        self.__dict__["_network"].training = mode
        return super().train(mode)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        network, taps = self.__dict__["_network"], self.__dict__["_taps"]
        outputs: dict[str, Tensor] = {}
        hooked = {tap.node: tap for tap in taps.values() if not tap.node.startswith("output[")}
        stop_early = len(hooked) == len(taps)

        def save_output(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                outputs[name] = output.clone() if hooked[name].overwritten else output
                if stop_early and len(outputs) == len(taps):
                    raise _AllTapsRead

            return hook

        handles = [network.get_submodule(name).register_forward_hook(save_output(name)) for name in hooked]
        try:
            returned = network(images)
            outputs |= {f"output[{i}]": value for i, value in enumerate(leaves(returned))}
        except _AllTapsRead:
            pass
        finally:
            for handle in handles:
                handle.remove()
        maps = {f"C{level}": (outputs[tap.node], tap.channels_last) for level, tap in sorted(taps.items())}
        return {name: value.permute(0, 3, 1, 2) if last else value for name, (value, last) in maps.items()}


class _AllTapsRead(BaseException):
    """Ends a forward pass once all taps have been read."""


def _has_side_effects(network: nn.Module, node: fx.Node) -> bool:
    """Whether a node does more than return a value: it checks a size, or changes a tensor in place."""
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.op.startswith("call_") and (re.search(r"[a-z]_$", name) or name == "setitem")
    return bool(in_place) or node.is_impure() or bool(node.kwargs.get("inplace"))
