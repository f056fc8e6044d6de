"""Predictions for images of any kind in memory, without a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from PIL import Image

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.predict_config import PredictConfig
from fpnx.core.text import escape
from fpnx.images.decoding import decode, pillow_limits
from fpnx.images.listing import find_images
from fpnx.images.reading import ImageSource
from fpnx.inference.devices import arithmetic, resolve_device, resolve_precision
from fpnx.models.pictures import to_picture
from fpnx.prediction.engine import FOUND, PredictionCache
from fpnx.prediction.predictions import Prediction, Reading, prediction_of
from fpnx.remote.client import connections

__all__ = ["predict_in_memory"]

# Options of a run that writes a file.
OF_FILES = ("labels", "draw", "shard", "resume", "overwrite", "commit_every", "max_failed", "strict", "dry_run")


def predict_in_memory(images: Any, config: PredictConfig) -> Prediction | list[Prediction]:
    """The prediction for an image, or a list of them for several images or a folder.

    Args:
        images: one or several, each a path, a Pillow image of any mode, a uint8 array (H, W, 3) or a uint8 tensor
            (3, H, W). A folder, an archive or `"@list.txt"` stands for the images in it.
        config: the options.

    Raises:
        ImageError: an image that cannot be read.
        FpnxError: anything else than images, or weights that cannot predict.
    """
    defaults = PredictConfig()
    for name in OF_FILES:
        if getattr(config, name) != getattr(defaults, name):
            option = name.replace("_", " ")
            raise FpnxError(f"{option} is for a run that writes a file: give output beside it, or leave {option} out")
    single = not isinstance(images, (list, tuple)) and not _stands_for_several(images)
    given = list(images) if isinstance(images, (list, tuple)) else [images]
    with connections(), pillow_limits():
        found = list(_predictions(_Images(given, config), config))
    return found[0] if single else found


class _Images:
    """Iterates over (name, function that reads it) of images of any kind."""

    def __init__(self, given: Sequence[Any], config: PredictConfig) -> None:
        self._config = config
        self._items: list[tuple[str, Callable[[], Image.Image]]] = []
        for number, image in enumerate(given):
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


def _predictions(images: _Images, config: PredictConfig) -> Iterator[Prediction]:
    run, cache = config.run(), PredictionCache(config)
    device = resolve_device(config.device.split(",")[0])
    model = cache.model(run)
    recipe, predictor = model.recipe.sized(run), cache.predictor
    assert predictor is not None, "it is built with the model"
    engine = cache.engine(recipe, run, device)
    reading = Reading(predictor.task, predictor.categories, predictor.multi_label, config.top)
    with arithmetic(device, resolve_precision(config.precision, device)):
        for name, read in images:
            picture = read()
            source_size = (picture.height, picture.width)
            size = recipe.input_size(source_size, config.max_pixels, model.largest_scale)
            model.shapes(recipe.padded(size))  # refuses a size that the network cannot take
            (found,) = engine([model.resize(picture, size, recipe)]).arrays[FOUND]
            yield prediction_of(name, found, reading, size, source_size, read)


def _same(picture: Image.Image) -> Image.Image:
    return picture


def _stands_for_several(image: Any) -> bool:
    """Whether a path is of a folder, an archive, or a list, and not of an image."""
    if not isinstance(image, (str, os.PathLike)):
        return False
    text = os.fsdecode(image)
    return text.startswith("@") or text.lower().endswith(".tar") or os.path.isdir(text)
