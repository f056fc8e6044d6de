"""Finds the stages of a network: the last feature map at each stride, measured on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch import Tensor, fx, nn

from fpnx.models.backbones.tracing import Trace, leaves, run_on_meta

__all__ = ["PROBE_SIZES", "NoStagesError", "Stages", "TapPoint", "find_stages"]

# Two sizes (height, width), not square: a stride is the ratio of two differences, so padding does not change it.
PROBE_SIZES = ((448, 672), (896, 1344))
LEVEL_OF_STRIDE = {4: 2, 8: 3, 16: 4, 32: 5}  # stride → k of the tap C_k


class NoStagesError(Exception):
    """The network has no stages for a pyramid. The message is the reason, without the network's name."""


@dataclass(frozen=True, kw_only=True)
class TapPoint:
    """Where in a network one tap is read.

    Attributes:
        node: a module, an operation after the last module of its stage, or `output[i]` of the network itself.
        channels: number of channels; 0 if unknown.
        channels_last: whether the map is (B, H, W, C).
        overwritten: whether a later operation changes the map in place.
    """

    node: str
    channels: int = 0
    channels_last: bool = False
    overwritten: bool = False


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The taps of a network, by level number, one at the end of each stage.

    Attributes:
        traced: the taps are nodes of its torch.fx graph; if not, they are read by forward hooks.
        stride: of a network whose maps all have one stride, that stride; its only tap is that of the nearest level.
        blocks: then, number of blocks of which maps can be taken.
    """

    taps: Mapping[int, TapPoint]
    traced: bool
    stride: int | None = None
    blocks: int = 0


@dataclass(frozen=True)
class _FeatureMap:
    """A feature map of a network: its names, innermost module first, and its properties."""

    names: tuple[str, ...]
    stride: int
    channels: int
    channels_last: bool
    overwritten: bool = False


def find_stages(
    build: Callable[[tuple[int, int]], nn.Module], sizes: Sequence[tuple[int, int]] = PROBE_SIZES
) -> Stages:
    """Find the taps of a network at strides 4, 8, 16 and 32.

    Candidates are the maps that every path from input to output passes through. At each stride the tap is the last
    candidate that ends an outermost module. A network that returns several maps is tapped at its outputs. A network
    that cannot be traced is tapped at the outputs of its modules.

    Args:
        build: (height, width) → the network in eval mode for inputs of that size, on the meta device.
        sizes: two sizes (height, width) that differ in both sides.

    Raises:
        NoStagesError: fewer than two strides, or an order that is not from fine to coarse.
        Exception: any error of the network's own, if it cannot take `sizes`.
    """
    networks = [build(size) for size in sizes]
    try:
        first = _RecordingInterpreter(Trace(networks[0]))
        second = first if networks[1] is networks[0] else _RecordingInterpreter(Trace(networks[1]))
    except Exception:  # such as control flow on data; torch.fx documents no exception type
        return Stages(taps=_choose_taps(_hooked_maps(networks, sizes)), traced=False)
    small = _RecordedRun(first, sizes[0])
    large = _RecordedRun(second, sizes[1])
    return Stages(taps=_choose_taps(_traced_maps(small, large)), traced=True)


class _RecordingInterpreter(fx.Interpreter):
    """Runs a traced network and records the value of every node and all in-place writes."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(fx.GraphModule(trace.network, trace.graph), garbage_collect_values=False)
        self.names = {
            copy: trace.names.get(node, []) for copy, node in zip(self.graph.nodes, trace.graph.nodes, strict=True)
        }  # a graph module holds a copy of the graph, with its nodes in the same order
        self.values: dict[fx.Node, Any] = {}
        self.writes: list[tuple[fx.Node, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        inputs = [value for node in n.all_input_nodes for value in leaves(self.values[node]) if _is_tensor(value)]
        versions = [tensor._version for tensor in inputs]
        value = self.values[n] = super().run_node(n)
        changed = [tensor for tensor, version in zip(inputs, versions, strict=True) if tensor._version != version]
        self.writes += [(n, _storage_id(tensor)) for tensor in changed]
        return value


class _RecordedRun:
    """Names, values, in-place writes and outputs of one run on the meta device, in the order of the graph's nodes."""

    def __init__(self, interpreter: _RecordingInterpreter, size: tuple[int, int]) -> None:
        interpreter.values, interpreter.writes = {}, []
        run_on_meta(interpreter.run, size)
        self.size, self.names = size, interpreter.names
        self.values, self.writes = interpreter.values, interpreter.writes
        output = next(node for node in self.values if node.op == "output")
        self.outputs = [node for node in leaves(output.args[0]) if isinstance(node, fx.Node)]


def _traced_maps(small: _RecordedRun, large: _RecordedRun) -> list[_FeatureMap]:
    """The network's outputs if it returns several maps, else the maps that all paths pass through, in order."""
    order = {node: i for i, node in enumerate(small.values)}
    candidates: list[tuple[tuple[str, ...], fx.Node, Any]]
    large_values = {large.names[node][0]: value for node, value in large.values.items() if large.names[node]}
    if len([node for node in small.outputs if _is_map(small.values[node])]) > 1:
        large_outputs = [large.values[node] for node in large.outputs]
        candidates = [((f"output[{i}]",), node, large_outputs[i]) for i, node in enumerate(small.outputs)]
    else:
        nodes = _on_every_path(small.values, small.outputs)
        named = [(tuple(small.names[node]), node) for node in nodes if small.names[node]]
        # Matched by name, not by position: networks built for different sizes may have different numbers of nodes.
        candidates = [(names, node, large_values.get(names[0])) for names, node in named]
    maps = []
    for names, node, large_value in candidates:
        feature_map = _measure_map(names, (small.values[node], large_value), (small.size, large.size))
        if feature_map is not None:
            maps.append((feature_map, node))
    # Nothing runs after the last tap, so only writes before it can change a tap.
    last = max((order[node] for _, node in maps), default=0)
    return [
        replace(feature_map, overwritten=any(
            storage == _storage_id(small.values[node]) and order[node] < order[writer] <= last
            for writer, storage in small.writes
        ))
        for feature_map, node in maps
    ]  # fmt: skip


def _on_every_path(values: Mapping[fx.Node, Any], returned: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that every path from the input to the returned values passes through."""
    needed: set[fx.Node] = set()
    pending = list(returned)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += [source for source in node.all_input_nodes if _holds_tensor(values[source])]
    nodes = [node for node in values if node in needed and node.op != "get_attr"]
    order = {node: i for i, node in enumerate(nodes)}
    last_user, on_every_path = 0, []  # the last node that uses a value of the nodes so far
    for i, node in enumerate(nodes):
        if last_user <= i:
            on_every_path.append(node)
        users = [order[user] for user in node.users if user in order and _holds_tensor(values[user])]
        last_user = max(last_user, *users) if users else last_user
    return on_every_path


def _hooked_maps(networks: Sequence[nn.Module], sizes: Sequence[tuple[int, int]]) -> list[_FeatureMap]:
    """The network's outputs if it returns several maps, else those of modules that run once, in order of their ends."""
    runs = [_run_with_hooks(network, size) for network, size in zip(networks, sizes, strict=True)]
    outputs, calls = zip(*runs, strict=True)
    several = [i for i, value in enumerate(outputs[0]) if _is_map(value)]
    if len(several) > 1:
        measured = [_measure_map((f"output[{i}]",), (outputs[0][i], outputs[1][i]), sizes) for i in several]
        return [feature_map for feature_map in measured if feature_map is not None]
    maps = []
    for name, (value, version) in calls[0].items():
        feature_map = _measure_map((name,), (value, calls[1].get(name, (None, 0))[0]), sizes)
        if feature_map is not None:
            maps.append(replace(feature_map, overwritten=value._version != version))
    return maps


def _run_with_hooks(network: nn.Module, size: tuple[int, int]) -> tuple[list[Any], dict[str, tuple[Any, int]]]:
    """The outputs of the network, and name → (map, version of its memory) of every module that runs once."""
    calls: dict[str, list[tuple[Any, int]]] = {}

    def record_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            earlier = calls.pop(name, [])  # keeps `calls` in the order in which modules end
            calls[name] = [*earlier, (output, output._version if isinstance(output, Tensor) else 0)]

        return hook

    handles = [module.register_forward_hook(record_output(name)) for name, module in network.named_modules() if name]
    try:
        outputs = run_on_meta(network, size)
    finally:
        for handle in handles:
            handle.remove()
    once = {name: runs[0] for name, runs in calls.items() if len(runs) == 1 and _is_map(runs[0][0])}
    return list(leaves(outputs)), once


def _measure_map(
    names: tuple[str, ...], values: tuple[Any, Any], sizes: Sequence[tuple[int, int]]
) -> _FeatureMap | None:
    """Measure stride and channel axis of a value from its shapes at two input sizes; None if it cannot be a tap."""
    small, large = values
    if not (_is_map(small) and _is_map(large)):
        return None
    for axes, channel_axis in (((2, 3), 1), ((1, 2), 3)):
        growth = [large.shape[axis] - small.shape[axis] for axis in axes]
        input_growth = [sizes[1][i] - sizes[0][i] for i in (0, 1)]
        if large.shape[channel_axis] == small.shape[channel_axis] and all(growth):
            strides = {inputs / outputs for inputs, outputs in zip(input_growth, growth, strict=True)}
            if len(strides) == 1 and (stride := strides.pop()) in LEVEL_OF_STRIDE:
                return _FeatureMap(names, int(stride), small.shape[channel_axis], channel_axis == 3)
    return None


def _choose_taps(maps: Sequence[_FeatureMap]) -> dict[int, TapPoint]:
    """Choose at each stride the last of the outermost maps.

    Raises:
        NoStagesError: see `find_stages`.
    """
    best: dict[int, tuple[int, int]] = {}
    for i, feature_map in enumerate(maps):
        depth = feature_map.names[-1].count(".")
        if feature_map.stride not in best or depth <= best[feature_map.stride][0]:
            best[feature_map.stride] = (depth, i)
    if len(best) < 2:
        strides = f"maps at stride {next(iter(best))} only" if best else "no maps at strides 4, 8, 16 or 32"
        raise NoStagesError(
            f"has {strides}, and a pyramid needs several (of vision transformers take one of timm that is "
            "for any size, such as timm/vit_base_patch16_224)"
        )
    if [best[stride][1] for stride in sorted(best)] != sorted(i for _, i in best.values()):
        raise NoStagesError("does not go from fine to coarse: name a backbone, not a network with a decoder")
    chosen = {stride: maps[i] for stride, (_, i) in best.items()}
    taps = {}
    for stride, tap in sorted(chosen.items()):
        others = [other.names[0] for other in chosen.values() if other is not tap]
        # The outermost module without another tap in it: `features.18`, where `features` is the whole network.
        node = next((n for n in reversed(tap.names) if not any(o.startswith(f"{n}.") for o in others)), tap.names[0])
        taps[LEVEL_OF_STRIDE[stride]] = TapPoint(
            node=node, channels=tap.channels, channels_last=tap.channels_last, overwritten=tap.overwritten
        )
    return taps


def _is_tensor(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _holds_tensor(value: Any) -> bool:
    return any(map(_is_tensor, leaves(value)))


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
