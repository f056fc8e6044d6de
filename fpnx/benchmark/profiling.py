"""Stage timing of the forward pass, its peak memory, and counts of parameters and operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fpnx.benchmark.timers import StageTimer
from fpnx.core.levels import level_number
from fpnx.inference.graph_fusion import FusedModel
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
    size = scaled_size(size, model.largest_scale)
    traceable = _TraceableModel(model)
    graph = fx.GraphModule(traceable, fx.Tracer().trace(traceable))
    graph.graph.eliminate_dead_code()
    measurement = _PeakMemoryModule(graph)
    on_meta = {name: value.to("meta") for name, value in measurement.state_dict().items()}
    with torch.no_grad():
        peak: int = torch.func.functional_call(measurement, on_meta, (torch.empty(1, 3, *size, device="meta"),))
    return peak


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


class _TraceableModel(nn.Module):
    """The computation of a model in a form that can be traced."""

    def __init__(self, model: PyramidModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any) -> dict[str, Any]:
        taps = self.model.body(images)
        if self.model.scales:
            return {name: taps[name] for name in self.model.fpn.taps_for(self.model.levels)}
        pyramid = self.model.fpn(taps, self.model.levels)
        return {name: pyramid[name] if name in pyramid else taps[name] for name in self.model.levels}


class _PeakMemoryModule(nn.Module):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> int:
        interpreter = _PeakMemoryInterpreter(self.module)
        interpreter.run(images)
        return interpreter.peak


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
    on_meta = {name: value.to("meta") for name, value in model.state_dict().items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, on_meta, (torch.empty(1, 3, *size, device="meta"),))
    by_module = counter.get_flop_counts()
    names = {module: name for name, module in model.named_modules()}

    def flops(module: nn.Module) -> int:
        return sum(by_module.get(f"{type(model).__name__}.{names[module]}", {}).values())

    costs = []
    if set(model.levels) & set(model.fpn.levels):
        for part, modules in model.fpn.parts().items():
            costs.append(Cost(part, sum(map(_parameters, modules)), sum(map(flops, modules))))
    backbone = counter.get_total_flops() - sum(cost.flops for cost in costs)
    return (Cost("backbone", _parameters(model.body), backbone), *costs)


def count_executed(executable: FusedModel, sizes: Iterable[tuple[int, int]]) -> int:
    """Operations of `executable` for one image at each of `sizes` (height, width): fewer than defined where the FPN is
    fused.

    Counted as in `count_costs`, by computing one image; convolutions with packed weights are not counted.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for size in sizes:
            image = torch.zeros(1, 3, *size, device=executable.device, dtype=executable.dtype)
            executable(image.contiguous(memory_format=torch.channels_last))
    return int(counter.get_total_flops())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
