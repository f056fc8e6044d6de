"""The engine of predictions: the pyramid as extraction computes it, and the head behind it; or a whole classifier."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from fpnx.core.config import ExtractConfig
from fpnx.core.predict_config import PredictConfig
from fpnx.inference.engine import Engine, Features, count_nonfinite
from fpnx.inference.engine_cache import EngineCache
from fpnx.models.heads.base import Detections, Geometry, Prediction
from fpnx.models.preprocessing import Recipe, scaled_size
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.torch_state import isolated_torch_state
from fpnx.prediction.task_model import TaskModel, build_task_model

__all__ = ["FOUND", "PredictionCache", "PredictionEngine"]

FOUND = "found"  # the name of the predictions in `Features.arrays`


class PredictionEngine(Engine):
    """Computes predictions: `{"found": [Detections | Tensor, ...]}`, one for each image, on the CPU.

    The pyramid is computed in the config's precision, the head in float32. Several threads may call it at the same
    time.

    Args:
        task_model: the model and its head, which are not changed.
        recipe, config, device: as for `Engine`.
    """

    def __init__(self, task_model: TaskModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> None:
        self._network = None if task_model.network is None else _on_device(task_model.network, device)
        super().__init__(task_model.model, recipe, config, device)
        self._head: Any = None if task_model.head is None else _on_device(task_model.head, device)

    def __call__(self, pixels: Sequence[Any], boxes: Sequence[Any] | None = None) -> Features:
        """Predictions of images of one padded size, with pixels as `PyramidModel.resize` gives them.

        `boxes` are for engines that pool regions, and None here.
        """
        with isolated_torch_state(), torch.inference_mode():
            if self._head is None:
                logits = self.levels(pixels, self.recipe.padded(pixels[0].shape[:2]))["logits"].float()
                return Features({FOUND: list(logits.cpu())}, {"logits": count_nonfinite(logits[:, :, None, None])})
            levels, geometry = self._pyramid(pixels)
            nonfinite = {name: count_nonfinite(level) for name, level in levels.items()}
            found = self._head.predict({name: level.float() for name, level in levels.items()}, geometry)
            return Features({FOUND: [_on_cpu(each) for each in found]}, nonfinite)

    def _pyramid(self, pixels: Sequence[Any]) -> tuple[dict[str, Tensor], Geometry]:
        if not self._scales:
            padded = self.recipe.padded(pixels[0].shape[:2])
            sizes = tuple((image.shape[0], image.shape[1]) for image in pixels)
            return self.levels(pixels, padded), Geometry(padded=padded, sizes=sizes)
        levels: dict[str, Tensor] = {}
        sizes, coarsest = (), min(self._scales, key=lambda name: self._scales[name])
        for name, images, padded in self.passes(pixels):
            (levels[name],) = self.levels(images, padded).values()
            if name == coarsest:
                scale = self._scales[name]
                sizes = tuple(scaled_size(image.shape[:2], 1 / scale) for image in images)
        return levels, Geometry(padded=self.recipe.padded(sizes[0]), sizes=sizes)

    def _executable(self, model: PyramidModel, device: torch.device) -> Any:
        return super()._executable(model, device) if self._network is None else _Logits(self._network, self.dtype)


class PredictionCache(EngineCache):
    """An `EngineCache` whose engines predict.

    Args:
        config: the options of the run.
    """

    def __init__(self, config: PredictConfig) -> None:
        super().__init__()
        self._config = config
        self.task_model: TaskModel | None = None

    def build(self, config: ExtractConfig) -> PyramidModel:
        """Build the model, and the head with it."""
        self.task_model = build_task_model(config)
        self.task_model.limit(self._config)
        return self.task_model.model

    def make(self, model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> Engine:
        """Make the engine that runs the model and the head on `device`."""
        assert self.task_model is not None, "the model is built first"
        return PredictionEngine(self.task_model, recipe, config, device)


class _Logits(nn.Module):
    """A classifier in the form in which engines run models."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(images)}

    def pack(self, images: Tensor) -> dict[str, Tensor]:
        return self(images)


def _on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module on a device, with the memory format that levels have."""
    return copy.deepcopy(module).to(device).to(memory_format=torch.channels_last).eval()


def _on_cpu(found: Prediction) -> Prediction:
    if isinstance(found, Tensor):
        return found.cpu()
    values = {each.name: getattr(found, each.name) for each in fields(Detections)}
    return Detections(**{name: v.cpu() if isinstance(v, Tensor) else v for name, v in values.items()})
