"""The engine for CUDA: copies in, computing and copies out on streams of their own, several batches in flight.

The calling thread puts work in order and does not wait; `Features.ready` is where somebody does. What is in flight
is bounded by whoever calls: the pipeline keeps one batch that is not yet written beside the one that it starts.

Every hand-over between streams has an order and an owner: the next stream waits for the one before
(`wait_stream`), and memory of one stream that another reads is said to be in use there (`record_stream`), lest the
allocator give it away. Pinned memory needs no such care: PyTorch's pinned allocator itself waits for copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpnx.core.config import ExtractConfig
from fpnx.inference.cuda_graphs import CudaGraphs
from fpnx.inference.engine import Engine, Features
from fpnx.models.preprocessing import Recipe
from fpnx.models.pyramid_model import PyramidModel

__all__ = ["CudaEngine", "make_engine"]


class CudaEngine(Engine):
    """An `Engine` whose `__call__` returns before the device has computed; casts and layouts are made there."""

    def __init__(self, model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(model, recipe, config, device)
        self._in, self._compute, self._out = (torch.cuda.Stream(device) for _ in range(3))
        self._compute.wait_stream(torch.cuda.current_stream(device))  # the weights are on their way there
        self._forward = CudaGraphs(self.executable)

    def __call__(self, pixels: Sequence[np.ndarray]) -> Features:
        """Images of one padded size, each (h, w, 3), 0..255 → their features, once `ready()` has returned."""
        sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        with torch.inference_mode(), torch.cuda.device(self.device):
            with torch.cuda.stream(self._in):
                arrived = [self._staged(part) for part in self._stacks(pixels, sizes)]
            self._compute.wait_stream(self._in)
            with torch.cuda.stream(self._compute):
                padded = self.recipe.padded(sizes[0])
                images = torch.cat([self.recipe.pad(self.recipe.normalise(part), padded) for part in arrived])
                levels = self._forward(images.to(self.dtype, memory_format=torch.channels_last))
                stored = {name: self.in_stored_form(name, level, sizes) for name, level in levels.items()}
                counts = {name: (~torch.isfinite(level)).sum(dim=(1, 2, 3)) for name, level in stored.items()}
            for part in arrived:
                part.record_stream(self._compute)
            self._out.wait_stream(self._compute)
            with torch.cuda.stream(self._out):
                arrays = {name: _fetched(level, self._out) for name, level in stored.items()}
                nonfinite: Any = {name: _fetched(count, self._out) for name, count in counts.items()}
                done = torch.cuda.Event()
                done.record(self._out)
        return Features(arrays, nonfinite, done.synchronize)

    def release(self) -> None:
        """Give memory back that is only kept for speed."""
        self._forward.forget()
        torch.cuda.empty_cache()

    def _stacks(self, pixels: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Sequence[np.ndarray]]:
        """The images that can be copied as one array: all of them, or each alone where padding makes up for sizes."""
        return [pixels] if len(set(sizes)) == 1 else [[image] for image in pixels]

    def _staged(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images of one size on the device, (B, H, W, 3), by way of pinned memory."""
        first = torch.from_numpy(images[0])
        pinned = torch.empty((len(images), *first.shape), dtype=first.dtype, pin_memory=True)
        np.stack(images, out=pinned.numpy())
        return pinned.to(self.device, non_blocking=True)


def make_engine(model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> Engine:
    """The engine for a device."""
    kind = CudaEngine if device.type == "cuda" else Engine
    return kind(model, recipe, config, device)


def _fetched(values: Tensor, stream: torch.cuda.Stream) -> np.ndarray:
    """A view on pinned memory to which `values` are being copied."""
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    values.record_stream(stream)
    return pinned.numpy()
