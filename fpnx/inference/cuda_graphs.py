"""CUDA graphs: a forward pass whose shape keeps coming is recorded once, and from then on started as a whole.

A network of a few hundred small operations keeps a fast GPU waiting for the next one to be put in order; a graph
takes one call. See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CudaGraphs"]

EAGER_FIRST = 3  # passes of a shape before it is recorded: cuDNN tries its algorithms in them
KEPT = 2  # shapes recorded at most, since each holds the memory of its maps
APART = 1e-5  # of a map's greatest magnitude: how far a replay may be from the pass that it stands for


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    levels: Mapping[str, Tensor]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.images.copy_(images)
        self.graph.replay()
        return {name: level.clone() for name, level in self.levels.items()}  # the next replay overwrites its own


class CudaGraphs:
    """`replays(images)` is `forward(images)`, for (B, 3, H, W) on the CUDA device of the current stream.

    For one thread and one stream, which is not the default one. What cannot be recorded, or gives other numbers
    once it is, goes on as it was.
    """

    def __init__(self, forward: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self._forward = forward
        self._met = Counter[tuple[int, ...]]()
        self._recorded: dict[tuple[int, ...], _Recorded | None] = {}
        self._most = KEPT

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        shape = tuple(images.shape)
        recorded = self._recorded.get(shape)
        if recorded is not None:
            return recorded(images)
        levels = self._forward(images)
        self._met[shape] += 1
        if self._met[shape] == EAGER_FIRST and len(self._recorded) < self._most:
            self._recorded[shape] = self._record(images, levels)
        return levels

    def forget(self) -> None:
        """Give back the memory of what is recorded, and record no more."""
        self._recorded.clear()
        self._most = 0

    def _record(self, images: Tensor, expected: Mapping[str, Tensor]) -> _Recorded | None:
        try:
            held, graph = images.clone(memory_format=torch.preserve_format), torch.cuda.CUDAGraph()
            # Other threads, which decode into pinned memory or serve other devices, may go on meanwhile.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                levels = self._forward(held)
            recorded = _Recorded(graph, held, levels)
            return recorded if _same(recorded(images), expected) else None
        except RuntimeError:  # it waits for the device somewhere, or memory does not suffice
            return None


def _same(levels: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return all(
        bool((levels[name] - level).abs().max() <= APART * level.abs().max()) for name, level in expected.items()
    )
