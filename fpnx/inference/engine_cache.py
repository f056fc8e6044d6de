"""A model and its engines, kept from one run to the next."""

from __future__ import annotations

from typing import Any

import torch

from fpnx.core.config import ExtractConfig
from fpnx.core.system import release_freed_memory
from fpnx.inference.cuda import make_engine
from fpnx.inference.engine import Engine
from fpnx.models.factory import build_model
from fpnx.models.preprocessing import Recipe
from fpnx.models.pyramid_model import PyramidModel

__all__ = ["EngineCache"]


class EngineCache:
    """What runs that differ in their images alone can share: it is built when it is first asked for, and kept.

    A run of another config gets, and leaves behind, equipment of its own.
    """

    def __init__(self) -> None:
        self._model: PyramidModel | None = None
        self._options: dict[str, Any] = {}
        self._engines: dict[torch.device, Engine] = {}
        self._emptied = False

    def model(self, config: ExtractConfig) -> PyramidModel:
        """The model that `config` asks for; see `build_model`."""
        options = config.repeatable()
        if self._model is None or options != self._options:
            self._engines.clear()
            self._model, self._options, self._emptied = build_model(config), options, False
        return self._model

    def engine(self, recipe: Recipe, config: ExtractConfig, device: torch.device) -> Engine:
        """What runs that model on `device`."""
        model = self.model(config)
        if device not in self._engines:
            if self._emptied:
                model = self._model = build_model(config)
                self._emptied = False
            self._engines[device] = make_engine(model, recipe, config, device)
        return self._engines[device]

    def empty(self) -> None:
        """Drop the model's parameters, of which the engines have copies of their own; shapes can still be asked for."""
        if self._model is not None and not self._emptied:
            self._model.to("meta")
            self._emptied = True
            release_freed_memory()
