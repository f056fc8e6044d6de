"""Keeps the process's torch settings out of fpnx's computations, and fpnx's out of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fpnx.models.meta_shapes import MetaShapes

__all__ = ["isolated_torch_state", "on_meta_device"]

# Functions that make tensors on the default device: of the default dtype, or of one that follows from the values.
FLOAT_FACTORIES = frozenset({
    torch.empty, torch.empty_permuted, torch.empty_strided, torch.eye, torch.linspace, torch.logspace, torch.normal,
    torch.ones, torch.rand, torch.randn, torch.scalar_tensor, torch.zeros, torch.bartlett_window, torch.blackman_window,
    torch.hamming_window, torch.hann_window, torch.kaiser_window, torch.fft.fftfreq, torch.fft.rfftfreq,
})  # fmt: skip
VALUE_FACTORIES = frozenset({torch.arange, torch.as_tensor, torch.asarray, torch.full, torch.range, torch.tensor})
FACTORIES = FLOAT_FACTORIES | VALUE_FACTORIES | {
    torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices
}  # fmt: skip
RANDOM = frozenset({
    torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.rand, torch.randint, torch.randn,
    torch.randperm, Tensor.bernoulli, Tensor.bernoulli_, Tensor.cauchy_, Tensor.exponential_, Tensor.geometric_,
    Tensor.log_normal_, Tensor.multinomial, Tensor.normal_, Tensor.random_, Tensor.uniform_,
    nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.orthogonal_, nn.init.sparse_,
    nn.init.trunc_normal_, nn.init.uniform_, nn.init.xavier_normal_, nn.init.xavier_uniform_,
})  # fmt: skip
AUTOCAST_DEVICES = ("cpu", "cuda")
CHANGED = FACTORIES | RANDOM


@contextmanager
def isolated_torch_state(seed: int | None = None) -> Iterator[None]:
    """Within the context this thread computes in float32 on the CPU, whatever the process's settings are.

    Where code names no dtype or device, the process's default dtype and device, or a `torch.device` context, are not
    taken. Random numbers come from a generator of the context's own, so that the process's is neither read nor
    advanced. Autocast, inference mode and `no_grad` around it are off. Nothing outside of this thread changes.

    What remains of the process's settings: the default dtype in `torch.Tensor(...)` with sizes and in code that asks
    for `torch.get_default_dtype()`; the default generator in dropout and in `torch.rand_like` and its kind; backend
    flags and the number of threads, which change no more than rounding.

    Args:
        seed: of the generator.
    """
    with _isolated("cpu", seed):
        yield


@contextmanager
def on_meta_device(*, counted: bool = False) -> Iterator[None]:
    """As `isolated_torch_state`, but new tensors are on the meta device, and no gradients are recorded.

    `torch.device("meta")` as a context would be visible to compiled code in other threads.

    Args:
        counted: let a `TorchDispatchMode` within the context see convolutions.
    """
    with _isolated("meta"), torch.no_grad(), MetaShapes(convolutions=not counted):
        yield


@contextmanager
def _isolated(device: str, seed: int | None = None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # turns gradients on, too
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        generator = torch.Generator(device="cpu")
        if seed is not None:
            generator.manual_seed(seed)
        stack.enter_context(_Defaults(device, generator))
        yield


class _Defaults(TorchFunctionMode):
    """Gives the functions above a device, float32 and a generator where they are called without."""

    def __init__(self, device: str, generator: torch.Generator) -> None:
        super().__init__()
        self.device, self.generator = device, generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in CHANGED and torch.get_default_dtype() is torch.float32:  # nearly every call of a network
            return func(*args, **kwargs)
        values = [
            item for value in (*args, *kwargs.values()) for item in (value if type(value) in (list, tuple) else [value])
        ]
        if any(isinstance(value, fx.Proxy) for value in values):  # is being traced, and must be recorded as it is
            return func(*args, **kwargs)
        tensors = [value for value in values if isinstance(value, Tensor)]
        if func in FACTORIES and not tensors:
            if kwargs.get("device") is None:
                kwargs["device"] = self.device
            if func in FLOAT_FACTORIES and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
        if func in RANDOM and kwargs.get("generator") is None:
            device = tensors[0].device if tensors else torch.device(kwargs.get("device") or self.device)
            if device.type == "cpu" and not any(isinstance(value, torch.Generator) for value in args):
                kwargs["generator"] = self.generator
        made = func(*args, **kwargs)
        return self._in_float32(made, func, args, kwargs, tensors)

    def _in_float32(self, made: Any, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """`made`, in float32 where it has the default dtype for want of another."""
        default = torch.get_default_dtype()
        if default is torch.float32 or not isinstance(made, Tensor) or made.dtype is not default:
            return made
        named = any(isinstance(value, (torch.dtype, np.ndarray, np.generic)) for value in (*args, *kwargs.values()))
        if (
            named
            or func in (Tensor.double, Tensor.type)
            or any(t.is_floating_point() or t.is_complex() for t in tensors)
        ):
            return made
        if func in VALUE_FACTORIES:
            return func(*args, **{**kwargs, "dtype": torch.float32})
        if not tensors:
            return made
        # Integers become float32 before the operation, as they do where float32 is the default.
        args = [_as_float32(value) for value in args]
        again: Tensor = func(*args, **{name: _as_float32(value) for name, value in kwargs.items()})
        return again.float()


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is not torch.bool else value
