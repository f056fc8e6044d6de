"""Where a network has its stages: one map for each stride, found by running it on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch import Tensor, fx, nn

from fpnx.models.backbones.tracing import Trace, leaves, run_on_meta

__all__ = ["PROBES", "NoStagesError", "Stages", "TapPoint", "find_stages"]

# Two sizes, neither square: strides are taken from differences, which no padding or valid convolution distorts.
PROBES = ((448, 672), (896, 1344))
LEVELS = {4: 2, 8: 3, 16: 4, 32: 5}  # stride → k of C_k


class NoStagesError(Exception):
    """A network that no pyramid can be built on; the message is the reason, without the network's name."""


@dataclass(frozen=True, kw_only=True)
class TapPoint:
    """Where one level is read.

    `node` is a module, an operation after the last module of its stage, or `output[i]` of the network itself.
    `channels_last` taps are (B, H, W, C); `overwritten` ones are changed in place by what comes after. `channels` 0:
    not known.
    """

    node: str
    channels: int = 0
    channels_last: bool = False
    overwritten: bool = False


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The taps of a network, by level number; `traced` where they are nodes of its graph, else they are hooked."""

    taps: Mapping[int, TapPoint]
    traced: bool


@dataclass(frozen=True)
class _Map:
    """One value of a network at two sizes: its names, innermost first, and what is known of it."""

    names: tuple[str, ...]
    stride: int
    channels: int
    channels_last: bool
    overwritten: bool = False


def find_stages(build: Callable[[tuple[int, int]], nn.Module], sizes: Sequence[tuple[int, int]] = PROBES) -> Stages:
    """The taps of a network at strides 4, 8, 16 and 32.

    At each stride: of all maps that every path from input to output passes, those that end the outermost module,
    and of these the last. A network that returns several maps is tapped at its outputs. Where the network cannot be
    traced, the outputs of its modules take the place of the graph's nodes.

    Args:
        build: (height, width) → the network in eval mode for inputs of that size, on the meta device.
        sizes: two of them, each side different.

    Raises:
        NoStagesError: fewer than two strides, or an order that is not from fine to coarse.
        Exception: whatever the network raises where it cannot take `sizes`.
    """
    networks = [build(size) for size in sizes]
    try:
        first = _Recorder(Trace(networks[0]))
        second = first if networks[1] is networks[0] else _Recorder(Trace(networks[1]))
    except Exception:  # control flow on data, compiled parts, …: torch.fx names no exception for them
        return Stages(taps=_chosen(_hooked_maps(networks, sizes)), traced=False)
    small = _Recording(first, sizes[0])
    large = _Recording(second, sizes[1])
    return Stages(taps=_chosen(_traced_maps(small, large)), traced=True)


class _Recorder(fx.Interpreter):
    """Runs a trace and notes each node's value and who changed whose memory."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(fx.GraphModule(trace.network, trace.graph), garbage_collect_values=False)
        self.names = {
            mine: trace.names.get(theirs, []) for mine, theirs in zip(self.graph.nodes, trace.graph.nodes, strict=True)
        }  # a graph module has a copy of the graph, with its nodes in the same order
        self.values: dict[fx.Node, Any] = {}
        self.writes: list[tuple[fx.Node, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        read = [value for node in n.all_input_nodes for value in leaves(self.values[node]) if _is_tensor(value)]
        before = [tensor._version for tensor in read]
        value = self.values[n] = super().run_node(n)
        changed = [tensor for tensor, version in zip(read, before, strict=True) if tensor._version != version]
        self.writes += [(n, _memory(tensor)) for tensor in changed]
        return value


class _Recording:
    """What a recorder noted of one run on the meta device; `values` in the order of the graph's nodes."""

    def __init__(self, recorder: _Recorder, size: tuple[int, int]) -> None:
        recorder.values, recorder.writes = {}, []
        run_on_meta(recorder.run, size)
        self.size, self.names = size, recorder.names
        self.values, self.writes = recorder.values, recorder.writes
        output = next(node for node in self.values if node.op == "output")
        self.outputs = [node for node in leaves(output.args[0]) if isinstance(node, fx.Node)]


def _traced_maps(small: _Recording, large: _Recording) -> list[_Map]:
    """Maps at the network's several outputs, or else at every node that all paths pass, in order."""
    order = {node: i for i, node in enumerate(small.values)}
    chosen: list[tuple[tuple[str, ...], fx.Node, Any]]
    twins = {large.names[node][0]: value for node, value in large.values.items() if large.names[node]}
    if len([node for node in small.outputs if _is_map(small.values[node])]) > 1:
        larger = [large.values[node] for node in large.outputs]
        chosen = [((f"output[{i}]",), node, larger[i]) for i, node in enumerate(small.outputs)]
    else:
        nodes = _on_every_path(small.values, small.outputs)
        named = [(tuple(small.names[node]), node) for node in nodes if small.names[node]]
        # By name, not by position: a network that is built for a size may have more nodes at another.
        chosen = [(names, node, twins.get(names[0])) for names, node in named]
    found = []
    for names, node, larger_value in chosen:
        measured = _measured(names, (small.values[node], larger_value), (small.size, large.size))
        if measured is not None:
            found.append((measured, node))
    # What comes after the last tap is not run: only a write before that changes a tap.
    last = max((order[node] for _, node in found), default=0)
    return [
        replace(measured, overwritten=any(
            where == _memory(small.values[node]) and order[node] < order[writer] <= last
            for writer, where in small.writes
        ))
        for measured, node in found
    ]  # fmt: skip


def _on_every_path(values: Mapping[fx.Node, Any], returned: Iterable[fx.Node]) -> list[fx.Node]:
    """Nodes that no tensor passes by, on its way from the input to what is returned."""
    needed: set[fx.Node] = set()
    waiting = list(returned)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [source for source in node.all_input_nodes if _holds_tensor(values[source])]
    kept = [node for node in values if node in needed and node.op != "get_attr"]
    order = {node: i for i, node in enumerate(kept)}
    reach, chosen = 0, []
    for i, node in enumerate(kept):
        if reach <= i:
            chosen.append(node)
        users = [order[user] for user in node.users if user in order and _holds_tensor(values[user])]
        reach = max(reach, *users) if users else reach
    return chosen


def _hooked_maps(networks: Sequence[nn.Module], sizes: Sequence[tuple[int, int]]) -> list[_Map]:
    """Maps at the network's several outputs, or else at every module that runs once, in order of their ends."""
    runs = [_observed(network, size) for network, size in zip(networks, sizes, strict=True)]
    outputs, calls = zip(*runs, strict=True)
    several = [i for i, value in enumerate(outputs[0]) if _is_map(value)]
    if len(several) > 1:
        each = [_measured((f"output[{i}]",), (outputs[0][i], outputs[1][i]), sizes) for i in several]
        return [found for found in each if found is not None]
    maps = []
    for name, (value, version) in calls[0].items():
        found = _measured((name,), (value, calls[1].get(name, (None, 0))[0]), sizes)
        if found is not None:
            maps.append(replace(found, overwritten=value._version != version))
    return maps


def _observed(network: nn.Module, size: tuple[int, int]) -> tuple[list[Any], dict[str, tuple[Any, int]]]:
    calls: dict[str, list[tuple[Any, int]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            entry = calls.pop(name, [])  # in order of their ends
            calls[name] = [*entry, (output, output._version if isinstance(output, Tensor) else 0)]

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in network.named_modules() if name]
    try:
        outputs = run_on_meta(network, size)
    finally:
        for handle in handles:
            handle.remove()
    once = {name: entry[0] for name, entry in calls.items() if len(entry) == 1 and _is_map(entry[0][0])}
    return list(leaves(outputs)), once


def _measured(names: tuple[str, ...], values: tuple[Any, Any], sizes: Sequence[tuple[int, int]]) -> _Map | None:
    """Stride and layout of a map from its growth between two sizes; None for what is no map of C2…C5."""
    small, large = values
    if not (_is_map(small) and _is_map(large)):
        return None
    for axes, channel in (((2, 3), 1), ((1, 2), 3)):
        growth = [large.shape[axis] - small.shape[axis] for axis in axes]
        sides = [sizes[1][i] - sizes[0][i] for i in (0, 1)]
        if large.shape[channel] == small.shape[channel] and all(growth):
            strides = {side / grown for side, grown in zip(sides, growth, strict=True)}
            if len(strides) == 1 and (stride := strides.pop()) in LEVELS:
                return _Map(names, int(stride), small.shape[channel], channel == 3)
    return None


def _chosen(maps: Sequence[_Map]) -> dict[int, TapPoint]:
    """At each stride the last of the outermost maps.

    Raises:
        NoStagesError: see `find_stages`.
    """
    best: dict[int, tuple[int, int]] = {}
    for i, found in enumerate(maps):
        depth = found.names[-1].count(".")
        if found.stride not in best or depth <= best[found.stride][0]:
            best[found.stride] = (depth, i)
    if len(best) < 2:
        there = f"maps at stride {next(iter(best))} only" if best else "no maps at strides 4, 8, 16 or 32"
        raise NoStagesError(f"has {there}, and a pyramid needs several (a plain vision transformer keeps one stride)")
    if [best[stride][1] for stride in sorted(best)] != sorted(i for _, i in best.values()):
        raise NoStagesError("does not go from fine to coarse: name a backbone, not a network with a decoder")
    chosen = {stride: maps[i] for stride, (_, i) in best.items()}
    taps = {}
    for stride, found in sorted(chosen.items()):
        others = [other.names[0] for other in chosen.values() if other is not found]
        # The outermost module that holds no other tap: `features.18`, where `features` is the whole network.
        node = next(
            (n for n in reversed(found.names) if not any(o.startswith(f"{n}.") for o in others)), found.names[0]
        )
        taps[LEVELS[stride]] = TapPoint(
            node=node, channels=found.channels, channels_last=found.channels_last, overwritten=found.overwritten
        )
    return taps


def _is_tensor(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _holds_tensor(value: Any) -> bool:
    return any(map(_is_tensor, leaves(value)))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
