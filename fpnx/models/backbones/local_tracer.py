"""A torch.fx tracer that changes nothing outside of the network that it traces."""

from __future__ import annotations

import builtins
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as symbolic_trace

__all__ = ["LocalTracer"]


class LocalTracer(fx.Tracer):
    """Makes the graphs that `torch.fx.Tracer` makes, without its changes to the whole process.

    torch's tracer replaces `nn.Module.__call__`, `nn.Module.__getattr__` and functions such as `math.floor` while it
    runs, so that modules in other threads fail (https://github.com/pytorch/pytorch/issues/112775). This one gives the
    modules of the traced network other classes meanwhile: subclasses of their own that record calls and parameters, and
    whose methods are copies that find the functions that become nodes in namespaces of their own. Until it returns,
    nothing else may use the network or change it.

    Functions that become nodes are those of `autowrap_modules`, and those registered by `torch.fx.wrap`, where methods
    and plain functions call them. In methods that are reached through `super()` they are called as they are.
    """

    def __init__(self, autowrap_modules: Sequence[ModuleType] = ()) -> None:
        super().__init__(autowrap_modules=tuple(autowrap_modules))
        # torch has one for the whole process, so that names would depend on other traces.
        self._qualname_counter = defaultdict[str, int](int)
        self._nodes = {
            id(value)
            for module in autowrap_modules
            for name, value in vars(module).items()
            if not name.startswith("_") and callable(value)
        }

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:
        """The graph of `root`; constants that its code makes become attributes of `root`."""
        self.root, self.root_module_name = root, type(root).__name__
        self.graph = fx.Graph(tracer_cls=type(self))
        self.submodule_paths: dict[nn.Module, str] | None = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {
            value: f"{path}.{name}" if path else name
            for module, path in self.submodule_paths.items()
            for name, value in vars(module).items()
            if isinstance(value, (Tensor, torch.ScriptObject))
        }
        with self._recording_classes():
            function, args = self.create_args_for_root(type(root).forward, True, concrete_args)
            returned = function.__annotations__.get("return")
            self.create_node("output", "output", (self.create_arg(function(*args)),), {}, type_expr=returned)
        self.submodule_paths = None
        return self.graph

    @contextmanager
    def _recording_classes(self) -> Iterator[None]:
        """Within the context, calls and parameters of the network's modules are recorded."""
        assert self.submodule_paths is not None
        classes = {module: type(module) for module in self.submodule_paths}
        recording: dict[type, type] = {}
        parameters: dict[str, fx.Proxy] = {}
        namespaces = _Namespaces(self._nodes)
        try:
            for module, kind in classes.items():
                if kind not in recording:
                    recording[kind] = self._recording_class(kind, parameters, namespaces)
                object.__setattr__(module, "__class__", recording[kind])
            yield
        finally:
            for module, kind in classes.items():
                object.__setattr__(module, "__class__", kind)

    def _recording_class(self, kind: type, parameters: dict[str, fx.Proxy], namespaces: _Namespaces) -> type:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.call_module(module, super(made, module).__call__, args, kwargs)  # type: ignore[arg-type]

        def get(module: nn.Module, name: str) -> Any:
            value = super(made, module).__getattr__(name)  # type: ignore[arg-type]
            return self.getattr(name, value, parameters)

        about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        members = {**namespaces.methods(kind), **about, "__call__": call, "__getattr__": get}
        # Not by calling the metaclass: the network's own code must not see the class, in a registry for example.
        made = type.__new__(type(kind), kind.__name__, (_Unregistered, kind), members)
        return made


class _Unregistered:
    """Keeps `__init_subclass__` of other bases from being called."""

    def __init_subclass__(cls) -> None:
        pass


class _Namespaces:
    """Copies of functions and methods, for which calls of certain functions become nodes of a graph.

    Only what reaches such a call is copied, so that other code keeps its global variables. Code of torch is not
    looked into: its functions make nodes of their own.

    Args:
        nodes: ids of the functions, besides those that `torch.fx.wrap` has registered.
    """

    def __init__(self, nodes: set[int]) -> None:
        self._nodes, self._registered = nodes, defaultdict[int, set[str]](set)
        for namespace, name in list(symbolic_trace._wrapped_fns_to_patch):
            self._registered[namespace].add(name)
        self._copies: dict[FunctionType, FunctionType] = {}
        self._without: set[FunctionType] = set()  # reach no such call

    def methods(self, kind: type) -> dict[str, Any]:
        """Those methods of a class, inherited ones included, that are copied."""
        found: dict[str, Any] = {}
        for base in kind.__mro__:
            if not _of_torch(base.__module__):
                found = {**vars(base), **found}
        copies = {name: self._method(value) for name, value in found.items()}
        return {name: copied for name, copied in copies.items() if copied is not found[name]}

    def _method(self, value: Any) -> Any:
        if isinstance(value, (staticmethod, classmethod)):
            copied = self._copied(value.__func__)
            return value if copied is value.__func__ else type(value)(copied)
        if type(value) is property:
            copied = self._copied(value.fget)
            return value if copied is value.fget else property(copied, value.fset, value.fdel)
        return self._copied(value)

    def _copied(self, function: Any) -> Any:
        """A copy of a Python function; the value itself where it is something else or needs none."""
        if not isinstance(function, FunctionType):
            return function
        if function not in self._copies and self._reaches_node(function, set()):
            self._copy(function)
        return self._copies.get(function, function)

    def _reaches_node(self, function: Any, seen: set[FunctionType]) -> bool:
        if not isinstance(function, FunctionType) or function in seen or function in self._without:
            return False
        if function in self._copies:
            return True
        if _of_torch(function.__module__) or _of_torch(function.__globals__.get("__name__")):
            return False
        first = not seen
        seen.add(function)
        values = [value for _, value in _cells(function)]
        uses = self._uses(function.__globals__, _names(function.__code__))
        found = any(is_node or self._reaches_node(value, seen) for value, is_node in uses)
        found = found or any(self._reaches_node(value, seen) for value in values)
        if first and not found:
            self._without |= seen
        return found

    def _uses(self, namespace: dict[str, Any], names: set[str]) -> Iterator[tuple[Any, bool]]:
        """The values of global variables, and whether a call makes a node; those of modules follow."""
        for name in names:
            value = namespace.get(name)
            yield value, name in self._registered.get(id(namespace), ()) or id(value) in self._nodes
            if isinstance(value, ModuleType) and not _of_torch(value.__name__):
                yield from self._uses(vars(value), names - {name})

    def _copy(self, function: FunctionType) -> None:
        namespace: dict[str, Any] = {}
        inner = {i: value for i, value in _cells(function) if isinstance(value, FunctionType)}
        cells = tuple(CellType() if i in inner else cell for i, cell in enumerate(function.__closure__ or ()))
        copied = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, cells or None)
        self._copies[function] = copied  # before others are copied, which may call it
        namespace |= function.__globals__
        namespace |= self._changes(function.__globals__, _names(function.__code__))
        for i, value in inner.items():
            cells[i].cell_contents = self._copied(value)
        copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
        copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
        vars(copied).update(vars(function))

    def _changes(self, namespace: dict[str, Any], names: set[str]) -> dict[str, Any]:
        """What stands for global variables in a copy, where it is something else."""
        changes: dict[str, Any] = {}
        for name in names:
            value = namespace.get(name)
            if name in self._registered.get(id(namespace), ()):
                changes[name] = symbolic_trace._create_wrapped_func(value or getattr(builtins, name))
            elif id(value) in self._nodes:
                changes[name] = symbolic_trace._create_wrapped_func(value)
            elif isinstance(value, ModuleType) and not _of_torch(value.__name__):
                if inner := self._changes(vars(value), names - {name}):
                    changes[name] = ModuleType(value.__name__)
                    vars(changes[name]).update({**vars(value), **inner})
            elif (copied := self._copied(value)) is not value:
                changes[name] = copied
        return changes


def _of_torch(name: Any) -> bool:
    return name == "torch" or str(name).startswith("torch.")


def _names(code: CodeType) -> set[str]:
    """Names of global variables and attributes in `code` and in the functions within it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _cells(function: FunctionType) -> list[tuple[int, Any]]:
    """Index and content of the filled cells of a function's closure."""
    filled = []
    for i, cell in enumerate(function.__closure__ or ()):
        with suppress(ValueError):  # it is empty
            filled.append((i, cell.cell_contents))
    return filled
