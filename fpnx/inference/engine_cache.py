"""Cache of a model and its engines, shared by runs with the same options."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fpnx.core.config import ExtractConfig
from fpnx.core.system import release_freed_memory
from fpnx.inference.cuda import make_engine
from fpnx.inference.engine import Engine
from fpnx.models.factory import build_model
from fpnx.models.preprocessing import Recipe
from fpnx.models.pyramid_model import PyramidModel

__all__ = ["EngineCache"]


class EngineCache:
    """Holds one model and its engines for runs that differ in their images only.

    They are built at first use. A run with another config replaces them.

    Args:
        module: a network of the caller's own, or a model, instead of the config's backbone; see `build_model`.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module
        self._model: PyramidModel | None = None
        self._options: dict[str, Any] = {}
        self._engines: dict[torch.device, Engine] = {}
        self._model_is_empty = False

    def model(self, config: ExtractConfig) -> PyramidModel:
        """The model that `config` asks for; see `build_model`."""
        options = config.repeatable()
        if self._model is None or options != self._options:
            self._engines.clear()
            self._model, self._options, self._model_is_empty = self.build(config), options, False
        return self._model

    def engine(self, recipe: Recipe, config: ExtractConfig, device: torch.device) -> Engine:
        """The engine that runs that model on `device`."""
        model = self.model(config)
        if device not in self._engines:
            if self._model_is_empty:
                model = self._model = self.build(config)
                self._model_is_empty = False
            self._engines[device] = self.make(model, recipe, config, device)
        return self._engines[device]

    def build(self, config: ExtractConfig) -> PyramidModel:
        """Build the model."""
        return build_model(config, self.module)

    def make(self, model: PyramidModel, recipe: Recipe, config: ExtractConfig, device: torch.device) -> Engine:
        """Make the engine that runs `model` on `device`."""
        return make_engine(model, recipe, config, device)

    def empty(self) -> None:
        """Free the model's parameters, of which the engines have copies. Shapes can still be computed."""
        if self._model is not None and not self._model_is_empty:
            self._model.to("meta")
            self._model_is_empty = True
            release_freed_memory()
