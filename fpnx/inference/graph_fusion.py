"""The fused form of a model: same results as its definition, with norms, activations and additions fused."""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections import deque
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth

from fpnx.core.system import release_freed_memory
from fpnx.inference.fpn_fusion import FusedFpn
from fpnx.inference.neck_fusion import FusedNeck, fuse_neck
from fpnx.inference.packed_conv import SIZES_PACKED, PackedConv2d, can_pack, is_activation, is_norm, packing
from fpnx.models.backbones.local_tracer import LocalTracer
from fpnx.models.backbones.one_stride import BlockMaps
from fpnx.models.backbones.tracing import for_shapes, run_on_meta
from fpnx.models.pyramid_model import PyramidModel

__all__ = ["FusedModel", "fuse_model"]

COMPOSITE = (nn.Sequential, SqueezeExcitation)  # traced into; any other module of a body is one node
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d, StochasticDepth)  # do nothing in eval mode
ADDITIONS = (operator.add, operator.iadd, torch.add)
FUNCTIONS = {F.relu: nn.ReLU, torch.relu: nn.ReLU, F.relu6: nn.ReLU6, F.silu: nn.SiLU, F.hardswish: nn.Hardswish}
SIDE = 256  # of the image with which shapes are propagated through a body that takes any size


class FusedModel(nn.Module):
    """Computes what `model(images)` does: (B, 3, H, W) → `{"P2": (B, C, H/4, W/4), ...}`.

    Maps are channels last, in the dtype that it was made for. What `levels` do not need is not computed. It holds
    copies of the parameters: the model is not changed, and may be deleted.
    """

    def __init__(
        self,
        body: nn.Module,
        neck: FusedFpn | FusedNeck | None,
        levels: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.body, self.neck, self.levels = body, neck, levels
        self.device, self.dtype = device, dtype
        self._packing, self._sizes = threading.Lock(), deque[tuple[int, int]](maxlen=SIZES_PACKED)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        taps: dict[str, Tensor] = self.body(images)
        levels = taps if self.neck is None else taps | self.neck(taps)
        return {name: levels[name] for name in self.levels}

    @property
    def packed(self) -> tuple[tuple[int, int], ...]:
        """Sizes (height, width) of images for which weights are packed; other sizes use the plain weights."""
        return tuple(self._sizes)

    def pack(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the levels, and pack the weights for images of this size on the way.

        Worth it where several batches of that size follow, of about as many images, in as many threads: others take up
        to a sixth longer. Weights for the last sizes are kept. Several threads may call this; one of them packs. Where
        oneDNN's operators do not work, nothing is packed.
        """
        size = (images.shape[2], images.shape[3])
        packable = self.device.type == "cpu" and can_pack(self.dtype) and size not in self._sizes
        if not packable or not self._packing.acquire(blocking=False):
            return self(images)
        try:
            with torch.inference_mode(), packing():
                levels: dict[str, Tensor] = self(images)
            if not self._sizes:
                release_freed_memory()  # the plain weights
            if size not in self._sizes:
                self._sizes.append(size)
            return levels
        finally:
            self._packing.release()


def fuse_model(
    model: PyramidModel,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    recombined: bool = True,
) -> FusedModel:
    """The fused form of `model`; takes about a second.

    Of a pyramid of the image at several scales it is the part that runs at each scale: an image to the tap.

    Args:
        model: in eval mode; read, never changed.
        device, dtype: where, and in which type, it computes. Norms are folded in float32 before the cast.
        recombined: let an FPN be computed in another order where that takes clearly fewer operations.
    """
    device = torch.device(device)
    assert not model.training, "a fused model is for inference"
    levels = model.fpn.taps_for(model.levels) if model.scales else model.levels  # scaled images go one by one
    p_levels = tuple(name for name in levels if name in model.fpn.levels)
    neck = fuse_neck(model.fpn, p_levels, model.channels, recombined) if p_levels else None
    needed = set(levels).difference(p_levels) | set(neck.taps if neck is not None else ())
    body: nn.Module
    if isinstance(model.body, fx.GraphModule):
        body = _fuse(_inline(model.body, needed), model.size or (SIDE, SIDE))
    elif isinstance(model.body, BlockMaps):
        body = copy.deepcopy(model.body)
    else:
        body = _Serialized(copy.deepcopy(model.body))
    for module in (body, neck):
        if module is not None:
            _prepare(module, device, dtype)
    return FusedModel(body, neck, levels, device, dtype).eval().requires_grad_(False)


class _Serialized(nn.Module):
    """A body that could not be traced. Its taps are read by hooks, so one thread runs it at a time."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self._lock = body, threading.Lock()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with self._lock:
            taps: dict[str, Tensor] = self.body(images)
        return taps


def _prepare(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    module.to(device, dtype).to(memory_format=torch.channels_last)
    for part in module.modules():
        if isinstance(part, PackedConv2d):
            part.prepare(device, dtype)


def _inline(body: fx.GraphModule, taps: set[str]) -> fx.GraphModule:
    """A copy of `body` that returns `taps` only, with composite modules replaced by the nodes of their layers."""
    graph, modules, copied = fx.Graph(), dict(body.named_modules()), dict[fx.Node, Any]()
    for node in body.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if node.op == "output":
            graph.output({name: copied[value] for name, value in node.args[0].items() if name in taps})
        elif isinstance(module, IDENTITIES):
            copied[node] = copied[node.args[0]]
        elif isinstance(module, COMPOSITE):
            copied[node] = _splice(graph, module, node.target, copied[node.args[0]])
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return fx.GraphModule(_held(body, graph), graph)


def _splice(graph: fx.Graph, module: nn.Module, path: str, x: fx.Node) -> Any:
    """Insert the nodes of a composite module, applied to `x`, into `graph`."""
    copied: dict[fx.Node, Any] = {}
    parameters = {id(parameter): parameter for parameter in (*module.parameters(), *module.buffers())}
    for node in _Tracer().trace(copy.deepcopy(module, parameters)).nodes:  # others may be using `module`
        if node.op == "placeholder":
            copied[node] = x
        elif node.op == "output":
            return copied[node.args[0]]
        elif node.op == "call_module" and isinstance(module.get_submodule(node.target), IDENTITIES):
            copied[node] = copied[node.args[0]]
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copied[node].target = f"{path}.{node.target}"
    raise AssertionError("a graph without output")


class _Tracer(LocalTracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, FrozenBatchNorm2d) or super().is_leaf_module(module, path)


def _held(body: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """Copies of the modules and parameters that `graph` names."""
    held: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in held:
            module = body.get_submodule(node.target)
            held[node.target] = PackedConv2d(module) if PackedConv2d.takes(module) else copy.deepcopy(module)
        elif node.op == "get_attr":
            held[node.target] = copy.deepcopy(_attribute(body, node.target))
    return held


def _fuse(body: fx.GraphModule, size: tuple[int, int]) -> fx.GraphModule:
    """Fold norms, then additions, then activations into the convolutions before them."""
    graph, uses = body.graph, dict[Any, int]()
    for node in graph.nodes:
        uses[node.target] = uses.get(node.target, 0) + 1
    shapes = _shapes(body, size)
    for node in list(graph.nodes):
        convolution = _convolution(body, node)
        if convolution is None or uses[node.target] > 1:
            continue
        after = _only_user(node)
        if after is not None and (norm := _norm(body, after)) is not None:
            convolution.fold(norm)
            _replace(after, node)
            after = _only_user(node)
        if after is not None and (activation := _activation(body, after)) is not None:
            convolution.activate(activation)
            _replace(after, node)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs:
            _fuse_addition(body, node, uses, shapes, order)
    _drop_unused_attributes(body)
    graph.lint()
    body.recompile()
    body.delete_all_unused_submodules()
    return body


def _fuse_addition(
    body: fx.GraphModule,
    addition: fx.Node,
    uses: Mapping[Any, int],
    shapes: Mapping[str, Any],
    order: Mapping[Any, int],
) -> None:
    """convolution(x) + other → one node, where `other` is computed before and has the same shape."""
    terms = addition.args
    if not all(isinstance(term, fx.Node) for term in terms) or terms[0] is terms[1]:
        return
    if addition.target is operator.iadd and _only_user(terms[0]) is not addition:
        return  # another node reads the first term after it was changed in place
    last, other = sorted(terms, key=order.__getitem__, reverse=True)
    assert isinstance(last, fx.Node)
    assert isinstance(other, fx.Node)
    convolution = _convolution(body, last)
    if convolution is None or uses[last.target] > 1 or _only_user(last) is not addition:
        return
    same = shapes.get(last.name) is not None and shapes.get(last.name) == shapes.get(other.name)
    if convolution.activation is not None or not same:
        return
    last.args = (*last.args, other)
    _replace(addition, last)
    # The sum may overwrite `other` where that is the result of a convolution and this is its last use.
    last_use = all(user is last or (order[user] < order[last] and _convolution(body, user)) for user in other.users)
    convolution.accumulates = _convolution(body, other) is not None and last_use and last.args[0] is not other
    after = _only_user(last)
    if after is not None and type(activation := _activation(body, after)) is nn.ReLU:
        convolution.activate(activation)
        _replace(after, last)


def _shapes(body: fx.GraphModule, size: tuple[int, int]) -> dict[str, torch.Size]:
    """Shape of each node's result for an image of `size`, by the node's name, where it is a tensor."""
    interpreter = _ShapeInterpreter(for_shapes(body))
    run_on_meta(interpreter.run, size)
    return interpreter.shapes


class _ShapeInterpreter(fx.Interpreter):
    def __init__(self, body: Any) -> None:
        super().__init__(body)
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = value.shape
        return value


def _drop_unused_attributes(body: fx.GraphModule) -> None:
    """Delete parameters and buffers that nothing reads any longer, such as those of norms that were functions."""
    nodes = body.graph.find_nodes(op="get_attr")
    called = {str(node.target) for node in body.graph.find_nodes(op="call_module")}
    read = {node.target for node in nodes if node.users}
    for node in nodes:
        if not node.users:
            body.graph.erase_node(node)
    for path in {node.target for node in nodes} - read:
        *holders, name = path.split(".")
        if not any(".".join(holders[:end]) in called for end in range(1, len(holders) + 1)):
            delattr(body.get_submodule(".".join(holders)), name)


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(body: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return body.get_submodule(str(node.target)) if node.op == "call_module" else None


def _convolution(body: fx.GraphModule, node: fx.Node) -> PackedConv2d | None:
    module = _module(body, node)
    return module if isinstance(module, PackedConv2d) else None


def _norm(body: fx.GraphModule, node: fx.Node) -> Any:
    """The batch norm that `node` applies with the statistics of training, for `PackedConv2d.fold`; None for any other
    node."""
    if node.op == "call_function" and node.target is F.batch_norm:
        call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        names = ("running_mean", "running_var", "weight", "bias")
        given = {name: call.arguments[name] for name in names}
        known = all(each is None or getattr(each, "op", "") == "get_attr" for each in given.values())
        if (
            call.arguments["training"] is not False
            or not known
            or None in (given["running_mean"], given["running_var"])
        ):
            return None
        values = {name: None if each is None else _attribute(body, each.target) for name, each in given.items()}
        return SimpleNamespace(**values, eps=call.arguments["eps"])
    module = _module(body, node)
    return module if is_norm(module) else None


def _attribute(body: nn.Module, path: str) -> Any:
    """The parameter or buffer of this path."""
    holder, _, name = path.rpartition(".")
    return getattr(body.get_submodule(holder), name)


def _activation(body: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The activation that `node` applies, as a module; None for any other node."""
    if node.op == "call_function" and node.target in FUNCTIONS:
        made: nn.Module = FUNCTIONS[node.target]()
        return made
    module = _module(body, node)
    return module if is_activation(module) else None
