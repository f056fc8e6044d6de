"""Stage timing of the forward pass, its peak memory, and counts of parameters and operations."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fpnx.benchmark.timers import StageTimer
from fpnx.core.levels import level_number
from fpnx.inference.graph_fusion import FusedModel
from fpnx.models.backbones.local_tracer import LocalTracer
from fpnx.models.backbones.tracing import for_shapes, on_meta, run_on_meta
from fpnx.models.flop_counter import FlopCounter
from fpnx.models.preprocessing import scaled_size
from fpnx.models.pyramid_model import PyramidModel

__all__ = ["MERGE", "TOP", "marked", "peak_bytes", "timed_body", "Cost", "count_costs", "count_executed"]

MERGE = "lateral + top-down"
TOP = "top block"


def timed_body(body: nn.Module, timer: StageTimer) -> nn.Module:
    """A copy of `body` with the same parameters, that returns its taps and marks the end of `"C2"`, `"C3"`, ….

    An operation belongs to the finest tap that needs it. A body that could not be traced is one stage, `"backbone"`.
    """
    if not isinstance(body, fx.GraphModule):
        return _UntracedBody(body, timer)
    taps: dict[str, fx.Node] = next(node for node in body.graph.nodes if node.op == "output").args[0]
    stages = _stages(taps)
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    names = {stage: f"mark_{stage}" for stage in stages.values()}
    nodes = [node for node in body.graph.nodes if node in stages or node.op == "placeholder"]
    for node, after in zip(nodes, [*nodes[1:], None], strict=True):
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if node in stages and (after is None or stages.get(after) != stages[node]):
            graph.call_module(names[stages[node]])
    graph.output({name: copied[node] for name, node in taps.items()})
    holder = nn.Module()
    for name, value in (*body.named_children(), *body.named_parameters(recurse=False), *_constants(body)):
        setattr(holder, name, value)
    for stage, name in names.items():
        holder.add_module(name, _StageMark(timer, stage))
    return fx.GraphModule(holder, graph).eval()


@contextmanager
def marked(blocks: Sequence[tuple[str, nn.Module]], timer: StageTimer) -> Iterator[None]:
    """Within the context, each of `blocks` (stage, module) is timed as its stage, and what comes before it as
    `"lateral + top-down"`."""
    hooks = []
    for stage, block in blocks:
        hooks.append(block.register_forward_pre_hook(_before(timer)))
        hooks.append(block.register_forward_hook(_after(timer, stage)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def peak_bytes(model: PyramidModel, size: tuple[int, int]) -> int:
    """Peak bytes of live float32 maps for one image of `size` (height, width), found on the meta device.

    0 for a body that could not be traced, whose memory is not known before it runs.
    """
    if not isinstance(model.body, fx.GraphModule):
        return 0
    levels = model.fpn.taps_for(model.levels) if model.scales else model.levels
    size = scaled_size(size, model.largest_scale)
    meta_model = _copy(model, on_meta)
    meta_model.levels = levels
    graph = fx.GraphModule(meta_model, LocalTracer().trace(meta_model))
    graph.graph.eliminate_dead_code()
    interpreter = _PeakMemoryInterpreter(graph)
    run_on_meta(interpreter.run, size)
    return interpreter.peak


def _copy(model: PyramidModel, of: Callable[[nn.Module], nn.Module]) -> PyramidModel:
    """A copy of `model` with copies `of` its parts, which nothing else uses."""
    copied = copy.copy(model)
    copied.__dict__["_modules"] = {"body": of(model.body), "fpn": of(model.fpn)}
    return copied


def _stages(taps: Mapping[str, fx.Node]) -> dict[fx.Node, str]:
    stages: dict[fx.Node, str] = {}
    for tap in sorted(taps, key=level_number):
        stack = [taps[tap]]
        while stack:
            node = stack.pop()
            if node not in stages and node.op != "placeholder":
                stages[node] = tap
                stack += node.all_input_nodes
    return stages


def _constants(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers(recurse=False)
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield name, value


def _before(timer: StageTimer) -> Callable[..., None]:
    return lambda *_: timer.mark(MERGE)


def _after(timer: StageTimer, stage: str) -> Callable[..., None]:
    return lambda *_: timer.mark(stage)


class _StageMark(nn.Module):
    def __init__(self, timer: StageTimer, stage: str) -> None:
        super().__init__()
        self._timer, self._stage = timer, stage

    def forward(self) -> None:
        self._timer.mark(self._stage)


class _UntracedBody(nn.Module):
    def __init__(self, body: nn.Module, timer: StageTimer) -> None:
        super().__init__()
        self._body, self._timer = body, timer

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        taps: dict[str, Tensor] = self._body(images)
        self._timer.mark("backbone")
        return taps


class _PeakMemoryInterpreter(fx.Interpreter):
    """Runs a graph and records the peak bytes of live tensors."""

    peak = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        live = [value for value in (*self.env.values(), result) if isinstance(value, Tensor)]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in live}
        self.peak = max(self.peak, sum(storages.values()))
        return result


@dataclass(frozen=True)
class Cost:
    """One part of a model: its number of parameters, and its operations for one image (a multiply-add is two)."""

    part: str
    parameters: int
    flops: int


def count_costs(model: PyramidModel, size: tuple[int, int]) -> tuple[Cost, ...]:
    """Costs of the backbone and of the neck's parts for an input of `size` (height, width), found on the meta device.

    All parameters of a part count, but only operations that the requested levels need: convolutions, matrix products
    and attention, as `torch.utils.flop_counter` counts them; not norms, activations and additions.

    Raises:
        RuntimeError: where the network does not accept that size.
    """
    meta_model, flops = _copy(model, for_shapes), Counter[nn.Module]()
    parts = meta_model.fpn.parts() if set(model.levels) & set(model.fpn.levels) else {}
    with FlopCounter() as counter:
        for module in itertools.chain.from_iterable(parts.values()):
            module.register_forward_pre_hook(lambda module, *_: flops.subtract({module: counter.flops}))
            module.register_forward_hook(lambda module, *_: flops.update({module: counter.flops}))
        run_on_meta(meta_model, size, counted=True)
    costs = [
        Cost(part, sum(map(_parameters, modules)), sum(flops[module] for module in modules))
        for part, modules in parts.items()
    ]
    backbone = counter.flops - sum(cost.flops for cost in costs)
    return (Cost("backbone", _parameters(model.body), backbone), *costs)


def count_executed(executable: FusedModel, sizes: Iterable[tuple[int, int]]) -> int:
    """Operations of `executable` for one image at each of `sizes` (height, width): fewer than defined where the FPN is
    fused.

    Counted as in `count_costs`, by computing one image; convolutions with packed weights are not counted.
    """
    with torch.no_grad(), FlopCounter() as counter:
        for size in sizes:
            image = torch.zeros(1, 3, *size, device=executable.device, dtype=executable.dtype)
            executable(image.contiguous(memory_format=torch.channels_last))
    return counter.flops


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
