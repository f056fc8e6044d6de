"""One process, or several that torchrun started, each with a share of every batch.

Several are joined by Accelerate: it reads torchrun's environment on one machine or many, chooses gloo or NCCL, and
gathers any object. Lightning Fabric was tried beside it: it takes three times as long to import, prints banners on
every start, sets environment variables, and gathers tensors only. Gradients are added up here, after they are weighted
by what each process's losses are means over, which the wrappers of both do not do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.inference.devices import resolve_device

__all__ = ["Processes", "joined_processes", "process_rank"]


class Processes:
    """This process alone.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
        device: of this one.
    """

    rank, count = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes."""

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in the order of their ranks."""
        return items

    def wait(self) -> None:
        """Until all processes are here."""


class _Joined(Processes):
    """One of several processes."""

    def __init__(self, state: Any) -> None:
        super().__init__(state.device)
        self.rank, self.count = state.process_index, state.num_processes
        self._state = state

    def sum(self, values: Tensor) -> Tensor:
        from accelerate.utils import reduce

        total: Tensor = reduce(values.to(self.device), "sum")
        return total.to(values.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        chosen = list(parameters)
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in chosen]
        flat = self.sum(torch.cat([part.flatten() for part in parts]))
        for each, values in zip(chosen, flat.split([each.numel() for each in chosen]), strict=True):
            each.grad = values.view_as(each)

    def gather(self, items: list[Any]) -> list[Any]:
        from accelerate.utils import gather_object

        found: list[Any] = gather_object(items)
        return found

    def wait(self) -> None:
        self._state.wait_for_everyone()


def process_rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if _count() > 1 else 0


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """The processes of this run: those that torchrun started, or this one.

    Args:
        device: as `--device` takes it; several processes on CUDA take a device each.

    Raises:
        FpnxError: Accelerate is not installed, or the device does not exist.
    """
    if _count() <= 1:
        yield Processes(resolve_device(device))
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise FpnxError(
            f"{_count()} processes need Accelerate to train together: pip install 'fpnx[train]', or start one"
        ) from error
    if device not in ("auto", "cpu", "cuda"):
        raise FpnxError(f"device {device}: torchrun's processes take a device each: take auto, cpu or cuda")
    on_cpu = resolve_device(device).type == "cpu"
    state = PartialState(cpu=on_cpu)
    try:
        yield _Joined(state)
    finally:
        state.destroy_process_group()


def _count() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1
