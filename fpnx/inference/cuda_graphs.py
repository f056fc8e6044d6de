"""CUDA graphs: the forward pass of a shape that is used again is captured once, and then replayed as a whole.

A network of a few hundred small kernels is limited by the time to launch them; a graph takes one launch. See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CudaGraphs"]

WARM_UP = 3  # eager passes of a shape before it is captured: cuDNN tries its algorithms in them
MAX_GRAPHS = 2  # captured shapes; each holds the memory of its maps
TOLERANCE = 1e-5  # difference of a replay from the eager pass, relative to a map's greatest magnitude


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    levels: Mapping[str, Tensor]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.images.copy_(images)
        self.graph.replay()
        return {name: level.clone() for name, level in self.levels.items()}  # the next replay overwrites these


class CudaGraphs:
    """Calls `forward(images)`, (B, 3, H, W) on the device of the current stream, through CUDA graphs.

    For one thread and one stream that is not the default stream. A shape that cannot be captured, or whose replay
    gives other numbers, stays eager.
    """

    def __init__(self, forward: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self._forward = forward
        self._passes = Counter[tuple[int, ...]]()
        self._graphs: dict[tuple[int, ...], _Captured | None] = {}
        self._max_graphs = MAX_GRAPHS

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        shape = tuple(images.shape)
        captured = self._graphs.get(shape)
        if captured is not None:
            return captured(images)
        levels = self._forward(images)
        self._passes[shape] += 1
        if self._passes[shape] == WARM_UP and len(self._graphs) < self._max_graphs:
            self._graphs[shape] = self._capture(images, levels)
        return levels

    def clear(self) -> None:
        """Free the memory of all graphs, and capture no more."""
        self._graphs.clear()
        self._max_graphs = 0

    def _capture(self, images: Tensor, expected: Mapping[str, Tensor]) -> _Captured | None:
        try:
            held, graph = images.clone(memory_format=torch.preserve_format), torch.cuda.CUDAGraph()
            # Other threads may allocate pinned memory or use other devices meanwhile.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                levels = self._forward(held)
            captured = _Captured(graph, held, levels)
            return captured if _same(captured(images), expected) else None
        except RuntimeError:  # it synchronises with the device, or memory does not suffice
            return None


def _same(levels: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return all(
        bool((levels[name] - level).abs().max() <= TOLERANCE * level.abs().max()) for name, level in expected.items()
    )
