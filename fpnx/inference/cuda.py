"""The engine for CUDA: uploads, kernels and downloads on three streams, with several batches in flight.

The calling thread enqueues work and does not wait; `Features.ready` waits. The caller bounds the batches in flight: the
pipeline keeps one batch that is not yet written beside the one that it starts.

Each stream waits for the one before it (`wait_stream`). Memory of one stream that another reads is marked as used
there (`record_stream`), so that the allocator does not reuse it too early. Pinned memory needs no mark: PyTorch's
pinned allocator waits for copies itself.
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
from fpnx.inference.region_pooling import LevelRegions
from fpnx.models.preprocessing import Recipe
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.torch_state import isolated_torch_state

__all__ = ["CudaEngine", "make_engine"]


class CudaEngine(Engine):
    """An `Engine` whose `__call__` returns before the device is done; casts and memory formats are changed on it."""

    def __init__(self, model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(model, recipe, config, device)
        self._in, self._compute, self._out = (torch.cuda.Stream(device) for _ in range(3))
        self._compute.wait_stream(torch.cuda.current_stream(device))  # until the weights are uploaded
        self._forward = CudaGraphs(self.executable)

    def _features(
        self,
        pixels: Sequence[np.ndarray],
        padded: tuple[int, int],
        boxes: Sequence[np.ndarray] | None,
        scaled_level: str | None = None,
    ) -> Features:
        sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        with isolated_torch_state(), torch.inference_mode(), torch.cuda.device(self.device):
            with torch.cuda.stream(self._in):
                uploaded = [self._upload(part) for part in self._stacks(pixels, sizes)]
            self._compute.wait_stream(self._in)
            with torch.cuda.stream(self._compute):
                images = torch.cat([self.recipe.pad(self.recipe.normalise(part), padded) for part in uploaded])
                levels = self._forward(images.to(self.dtype, memory_format=torch.channels_last))
                pooled = self.pooled_regions(levels, boxes, scaled_level)
                stored = {name: self.in_stored_form(name, level, sizes) for name, level in levels.items()}
                counts = {name: (~torch.isfinite(level)).sum(dim=(1, 2, 3)) for name, level in stored.items()}
                counts |= {name: level.nonfinite for name, level in pooled.items()}
            for part in uploaded:
                part.record_stream(self._compute)
            self._out.wait_stream(self._compute)
            with torch.cuda.stream(self._out):
                arrays = {name: _download(level, self._out) for name, level in stored.items()}
                regions = {
                    name: LevelRegions(part.places, _download(part.features, self._out))
                    for name, part in pooled.items()
                }
                nonfinite: Any = {name: _download(count, self._out) for name, count in counts.items()}
                done = torch.cuda.Event()
                done.record(self._out)
        return Features(arrays, nonfinite, regions, done.synchronize)

    def release(self) -> None:
        """Free memory that is only held for speed."""
        self._forward.clear()
        torch.cuda.empty_cache()

    def _stacks(self, pixels: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Sequence[np.ndarray]]:
        """Images that can be uploaded as one array: all of them, or single ones where their sizes differ."""
        return [pixels] if len(set(sizes)) == 1 else [[image] for image in pixels]

    def _upload(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images of one size on the device, (B, H, W, 3), copied through pinned memory."""
        # An array over the memory of a Pillow image is read-only, so it is not made a tensor.
        dtype = torch.from_numpy(np.empty(0, images[0].dtype)).dtype
        pinned = torch.empty((len(images), *images[0].shape), dtype=dtype, pin_memory=True)
        np.stack(images, out=pinned.numpy())
        return pinned.to(self.device, non_blocking=True)


def make_engine(model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> Engine:
    """The engine for a device."""
    kind = CudaEngine if device.type == "cuda" else Engine
    return kind(model, recipe, config, device)


def _download(values: Tensor, stream: torch.cuda.Stream) -> np.ndarray:
    """An array in pinned memory to which `values` are being copied."""
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    values.record_stream(stream)
    return pinned.numpy()
