"""Room for workers on the machines of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError

__all__ = ["Node", "Placement", "place_actors"]

MOST_CPUS = 16  # of an actor: lanes beyond that would wait for each other


@dataclass(frozen=True)
class Node:
    """What a machine of a cluster offers."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Placement:
    """Room for workers: how many, and what each has."""

    actors: int
    cpus: int
    gpus: int


def place_actors(nodes: Sequence[Node], config: ExtractConfig) -> Placement:
    """How many actors to start, and with what.

    With GPUs each actor takes one and its share of that machine's processors; without, as few actors as can use all
    processors, since each holds a model: one a machine, unless `actors` or `cpus` say otherwise.

    Raises:
        FpnxError: for more than the cluster has.
    """
    gpus = sum(node.gpus for node in nodes)
    if config.device == "cuda" and not gpus:
        raise FpnxError("device cuda: the cluster has no GPU: take --device cpu or auto")
    on_gpus = gpus > 0 and config.device != "cpu"
    able = [node for node in nodes if (node.gpus if on_gpus else node.cpus) > 0]
    if not able:
        raise FpnxError("the cluster has no processor to compute on: add machines to it, or unset RAY_ADDRESS")
    if on_gpus:
        share = min(node.cpus // node.gpus for node in able)
        cpus = config.cpus if isinstance(config.cpus, int) else max(1, min(share, MOST_CPUS))
        room = sum(min(node.gpus, node.cpus // cpus) for node in able)
        actors = config.actors if isinstance(config.actors, int) else room
    else:
        wanted = config.actors if isinstance(config.actors, int) else 1
        largest = config.cpus if isinstance(config.cpus, int) else min(MOST_CPUS, min(node.cpus for node in able))
        least = config.cpus if isinstance(config.cpus, int) else 1
        sizes = range(largest, least - 1, -1)
        cpus = next((size for size in sizes if _fitting(able, size) >= wanted), least)
        room = _fitting(able, cpus)
        actors = config.actors if isinstance(config.actors, int) else room
    if actors > room or room == 0:
        kind = f"{gpus} GPUs" if on_gpus else f"{sum(node.cpus for node in able)} processors"
        raise FpnxError(
            f"{actors or 'one'} actors of {cpus} processors: the cluster has room for {room} "
            f"({kind} on {len(able)} machines): take fewer --actors, or fewer --cpus for each"
        )
    return Placement(actors, cpus, 1 if on_gpus else 0)


def _fitting(nodes: Sequence[Node], cpus: int) -> int:
    return sum(node.cpus // cpus for node in nodes)
