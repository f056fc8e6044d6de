"""Placement of actors on the machines of a cluster: how many, with how many processors and GPUs each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError

__all__ = ["Node", "Placement", "place_actors"]

MAX_CPUS = 16  # for one actor: more threads would only wait for each other


@dataclass(frozen=True)
class Node:
    """Resources of one machine of a cluster."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Placement:
    """Number of actors, and the processors and GPUs of each."""

    actors: int
    cpus: int
    gpus: int


def place_actors(nodes: Sequence[Node], config: ExtractConfig) -> Placement:
    """Choose how many actors to start and what each gets; `config.actors` and `config.cpus` override the choice.

    With GPUs, each actor gets one, and its share of that machine's processors. Without, one actor per machine gets all
    of its processors: each actor holds a model, so few actors save memory.

    Raises:
        FpnxError: the cluster has no such device, or has too few of them.
    """
    gpus = sum(node.gpus for node in nodes)
    if config.device == "cuda" and not gpus:
        raise FpnxError("device cuda: the cluster has no GPU: take --device cpu or auto")
    on_gpus = gpus > 0 and config.device != "cpu"
    usable = [node for node in nodes if (node.gpus if on_gpus else node.cpus) > 0]
    if not usable:
        raise FpnxError("the cluster has no processor to compute on: add machines to it, or unset RAY_ADDRESS")
    if on_gpus:
        share = min(node.cpus // node.gpus for node in usable)
        cpus = config.cpus if isinstance(config.cpus, int) else max(1, min(share, MAX_CPUS))
        room = sum(min(node.gpus, node.cpus // cpus) for node in usable)
        actors = config.actors if isinstance(config.actors, int) else room
    else:
        wanted = config.actors if isinstance(config.actors, int) else 1
        largest = config.cpus if isinstance(config.cpus, int) else min(MAX_CPUS, min(node.cpus for node in usable))
        least = config.cpus if isinstance(config.cpus, int) else 1
        sizes = range(largest, least - 1, -1)
        cpus = next((size for size in sizes if _room(usable, size) >= wanted), least)
        room = _room(usable, cpus)
        actors = config.actors if isinstance(config.actors, int) else room
    if actors > room or room == 0:
        kind = f"{gpus} GPUs" if on_gpus else f"{sum(node.cpus for node in usable)} processors"
        raise FpnxError(
            f"{actors or 'one'} actors of {cpus} processors: the cluster has room for {room} "
            f"({kind} on {len(usable)} machines): take fewer --actors, or fewer --cpus for each"
        )
    return Placement(actors, cpus, 1 if on_gpus else 0)


def _room(nodes: Sequence[Node], cpus: int) -> int:
    """How many actors with `cpus` processors fit on `nodes`."""
    return sum(node.cpus // cpus for node in nodes)
