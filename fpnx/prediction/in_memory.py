"""Predictions for images of any kind in memory, without a file: `fpnx.Predictor`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, overload

import numpy as np
from PIL import Image
from torch import Tensor

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.predict_config import PredictConfig
from fpnx.core.text import escape
from fpnx.images.decoding import decode, pillow_limits
from fpnx.images.listing import find_images
from fpnx.images.reading import ImageSource
from fpnx.inference.devices import arithmetic, resolve_device, resolve_precision
from fpnx.labels.annotations import Task
from fpnx.models.pictures import to_picture
from fpnx.prediction.engine import FOUND, PredictionCache
from fpnx.prediction.predictions import Prediction, Reading, prediction_of
from fpnx.prediction.task_model import NOT_CLASSES
from fpnx.remote.client import connections

__all__ = ["Predictor", "predict_in_memory"]

# Options of a run that writes a file.
OF_FILES = ("labels", "draw", "shard", "resume", "overwrite", "commit_every", "max_failed", "strict", "dry_run")


class Predictor:
    """A model and its head, built once, for images in memory: `predictor(images)` is what is in them.

    Several threads may call it at the same time. It does not change afterwards: for other options make another one.

    Args:
        options: the fields of `PredictConfig` that are not of a run that writes a file, with its defaults:
            `weights="coco"`, `threshold=0.5`, `device="cuda"`, …

    Attributes:
        task: `"detection"`, `"classification"` or `"semantic"`.
        classes: number → name of each class that may be predicted.

    Raises:
        FpnxError: weights that cannot predict, or options that contradict each other.
        TypeError: an option that does not exist.
    """

    def __init__(self, **options: Any) -> None:
        self._config = config = _without_files(PredictConfig(**options))
        run, cache = config.run(), PredictionCache(config)
        self._device = resolve_device(config.device.split(",")[0])
        self._precision = resolve_precision(config.precision, self._device)
        with connections():
            self._model = cache.model(run)
        task_model = cache.task_model
        assert task_model is not None, "it is built with the model"
        self._recipe = self._model.recipe.sized(run)
        self._engine = cache.engine(self._recipe, run, self._device)
        self._reading = Reading(task_model.task, task_model.categories, task_model.multi_label, config.top)
        self.task: Task = task_model.task
        self.classes = {each.id: each.name for each in task_model.categories if each.name not in NOT_CLASSES}

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Prediction]: ...
    @overload
    def __call__(self, images: str | os.PathLike[str]) -> Prediction | list[Prediction]: ...
    @overload
    def __call__(self, images: Image.Image | np.ndarray | Tensor) -> Prediction: ...
    def __call__(self, images: Any) -> Prediction | list[Prediction]:
        """The prediction for an image, or a list of them for a list, a tuple or a folder.

        Args:
            images: one or several, each a path, a Pillow image of any mode, a uint8 array (H, W, 3) or a uint8 tensor
                (3, H, W). A folder, an archive or `"@list.txt"` stands for the images in it.

        Raises:
            ImageError: an image that cannot be read.
            FpnxError: anything else than images, or a size that the network cannot take.
        """
        with connections(), pillow_limits():
            return self._predictions(_Images(images, self._config))

    def _predictions(self, images: _Images) -> Prediction | list[Prediction]:
        with arithmetic(self._device, self._precision):
            found = [self._prediction(name, read) for name, read in images]
        return found[0] if images.single else found

    def _prediction(self, name: str, read: Callable[[], Image.Image]) -> Prediction:
        picture, recipe = read(), self._recipe
        source_size = (picture.height, picture.width)
        size = recipe.input_size(source_size, self._config.max_pixels, self._model.largest_scale)
        self._model.shapes(recipe.padded(size))  # refuses a size that the network cannot take
        (found,) = self._engine([self._model.resize(picture, size, recipe)]).arrays[FOUND]
        return prediction_of(name, found, self._reading, size, source_size, read)


def predict_in_memory(images: Any, options: Mapping[str, Any]) -> Prediction | list[Prediction]:
    """The prediction for an image, or a list of them for several images or a folder; see `Predictor`.

    Raises:
        ImageError: an image that cannot be read.
        FpnxError: anything else than images, or weights that cannot predict.
        TypeError: an option that does not exist.
    """
    config = _without_files(PredictConfig(**options))
    with connections(), pillow_limits():
        given = _Images(images, config)  # what is no image is refused before the model is built
        return Predictor(**options)._predictions(given)


def _without_files(config: PredictConfig) -> PredictConfig:
    """The options as they are.

    Raises:
        FpnxError: one of them is of a run that writes a file.
    """
    defaults = PredictConfig()
    for name in OF_FILES:
        if getattr(config, name) != getattr(defaults, name):
            option = name.replace("_", " ")
            raise FpnxError(f"{option} is for a run that writes a file: give output beside it, or leave {option} out")
    return config


class _Images:
    """Iterates over (name, function that reads it) of images of any kind.

    Attributes:
        single: whether one image was given, and not several.
    """

    def __init__(self, images: Any, config: PredictConfig) -> None:
        several = isinstance(images, (list, tuple))
        self.single = not several and not _stands_for_several(images)
        self._config = config
        self._items: list[tuple[str, Callable[[], Image.Image]]] = []
        for number, image in enumerate(images if several else [images]):
            if isinstance(image, (str, os.PathLike)):
                sources = find_images([image]).sources
                alone = len(sources) == 1 and not _stands_for_several(image)
                for source in sources:
                    name = os.fspath(image) if alone else os.fsdecode(source.name)
                    self._items.append((name, partial(self._read, source)))
            else:
                self._items.append((f"image {number}", partial(_same, to_picture(image, config.pixels))))
        if config.limit is not None:
            del self._items[config.limit :]

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
        return iter(self._items)

    def _read(self, source: ImageSource) -> Image.Image:
        try:
            return decode(source, self._config.max_pixels, self._config.pixels)
        except ImageError as error:
            raise ImageError(f"{escape(source.path)}: {error}") from error


def _same(picture: Image.Image) -> Image.Image:
    return picture


def _stands_for_several(image: Any) -> bool:
    """Whether a path is of a folder, an archive, or a list, and not of an image."""
    if not isinstance(image, (str, os.PathLike)):
        return False
    text = os.fsdecode(image)
    return text.startswith("@") or text.lower().endswith(".tar") or os.path.isdir(text)
