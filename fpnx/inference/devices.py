"""Devices and precisions by name, and the torch settings that a precision needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fpnx.core.errors import FpnxError
from fpnx.inference.packed_conv import native_on_cpu

__all__ = ["arithmetic", "compute_dtype", "resolve_device", "resolve_precision", "slow_precision"]

AMPERE = (8, 0)  # lowest compute capability with TF32


@contextmanager
def arithmetic(device: torch.device, precision: str, *, steady: bool = True) -> Iterator[None]:
    """Torch settings for `precision` on CUDA: no TF32 (10 bits of mantissa) unless `precision` is `"tf32"`.

    The settings are those of the whole process, so one context stands around all threads that compute. They are
    restored at the end.

    Args:
        steady: whether shapes stay the same, so that cuDNN may choose algorithms by timing them.
    """
    if device.type != "cuda":
        yield
        return
    settings = [*_tf32_settings(precision == "tf32"), (torch.backends.cudnn, "benchmark", steady)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _tf32_settings(tf32: bool) -> list[tuple[Any, str, Any]]:
    """TF32 settings as this torch names them: 2.9 has new names, and refuses the old ones once a new one was used."""
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):
        kind = "tf32" if tf32 else "ieee"
        chosen: list[tuple[Any, str, Any]] = [
            (products, "fp32_precision", kind),
            (cudnn.conv, "fp32_precision", kind),
        ]
    else:
        chosen = [(products, "allow_tf32", tf32), (cudnn, "allow_tf32", tf32)]
    return chosen


def slow_precision(device: torch.device, precision: str) -> str | None:
    """A remark on a precision that this CPU emulates; None where it has instructions for it."""
    if device.type != "cpu" or precision == "float32" or native_on_cpu(getattr(torch, precision)):
        return None
    return f"this processor has no {precision} arithmetic: float32 is several times as fast on it"


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:1` or `mps` stands for here.

    Raises:
        FpnxError: where there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"this machine has {count} CUDA devices" if count else "no CUDA device can be used here"
            raise FpnxError(f"device {name}: {there}: take --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise FpnxError("device mps: no Metal device can be used here: take --device cpu or auto")
    return device


def resolve_precision(name: str, device: torch.device | None = None) -> str:
    """The compute precision that `name` stands for; `"auto"` is float32.

    Raises:
        FpnxError: where `device` does not have it.
    """
    if name == "tf32" and device is not None:
        if device.type != "cuda":
            raise FpnxError("precision tf32 is of CUDA devices: take float32, or bfloat16 where the processor has it")
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < AMPERE:
            raise FpnxError(f"precision tf32: {torch.cuda.get_device_name(device)} does not have it: take float32")
    return "float32" if name == "auto" else name


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of tensors in `precision`; for `"tf32"` float32."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    return dtype
