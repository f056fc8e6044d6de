"""Batches from image files: decoding, augmentation, the recipe of the weights; the backbone runs at each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from fpnx.core.errors import ImageError
from fpnx.core.text import escape
from fpnx.images.decoding import PixelBudget, decode
from fpnx.images.reading import ImageSource
from fpnx.labels.annotations import ImageLabels
from fpnx.models.heads.base import Geometry, Target
from fpnx.models.preprocessing import scaled_size
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.torch_state import isolated_torch_state
from fpnx.training.augmentation import augmented
from fpnx.training.batches import Batch, Draw, Inputs, empty_batch, random_seed
from fpnx.training.targets import TargetMaker, padded_target, resized_target

__all__ = ["ImageBatches"]


@dataclass(frozen=True)
class _Sample:
    """One image: its pixels at each scale of the pyramid, (height, width, 3) each."""

    index: int
    pixels: tuple[np.ndarray, ...]
    size: tuple[int, int]
    source_size: tuple[int, int]
    target: Target


class ImageBatches:
    """A `Source` of image files.

    Args:
        images: the files.
        labels: of each image.
        sizes: (height, width) of each upright image; the reason where it cannot be read.
        model: whose input the batches are, by its recipe.
        make: makes the targets.
        max_pixels: of an image and of the input.
        workers: threads that decode.

    Attributes:
        names, labels, shapes: see `Source`; images that cannot be read have no shape, None.
        usable: indices of the others.
        left_out: name → reason, of those that cannot be read.
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        labels: Sequence[ImageLabels],
        sizes: Sequence[tuple[int, int] | str],
        model: PyramidModel,
        make: TargetMaker,
        *,
        max_pixels: int,
        workers: int,
    ) -> None:
        self.names = [escape(image.name) for image in images]
        self.labels = labels
        self._images, self._model, self._recipe, self._make = images, model, model.recipe, make
        self._max_pixels, self._budget = max_pixels, PixelBudget(max_pixels)
        self._threads = ThreadPoolExecutor(workers, "fpnx-decode", torch.set_num_threads, (1,))
        self.left_out: dict[str, str] = {}
        self.shapes: list[Hashable] = [
            self._padded_size(name, size) for name, size in zip(self.names, sizes, strict=True)
        ]
        self.usable = [i for i, shape in enumerate(self.shapes) if shape is not None]

    def batch(self, indices: Sequence[int], draw: Draw | None) -> Batch:
        """The batch of some images of one shape; those that cannot be read are in `failed`."""
        loaded = list(self._threads.map(lambda index: self._load(index, draw), indices))
        samples = [each for each in loaded if isinstance(each, _Sample)]
        failed = tuple(each for each in loaded if not isinstance(each, _Sample))
        if not samples:
            return empty_batch(failed)
        padded = self._recipe.padded(samples[0].size)
        return Batch(
            indices=tuple(sample.index for sample in samples),
            inputs=self._inputs(samples, padded),
            geometry=Geometry(padded, tuple(sample.size for sample in samples)),
            targets=tuple(padded_target(sample.target, padded) for sample in samples),
            source_sizes=tuple(sample.source_size for sample in samples),
            failed=failed,
        )

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _padded_size(self, name: str, size: tuple[int, int] | str) -> tuple[int, int] | None:
        """The padded input size of an image; None where the model cannot take it."""
        if isinstance(size, str):
            self.left_out[name] = size
            return None
        try:
            resized = self._recipe.input_size(size, self._max_pixels, self._model.largest_scale)
            return self._model.padded_size(resized, self._recipe)
        except ImageError as error:
            self.left_out[name] = str(error)
            return None

    def _load(self, index: int, draw: Draw | None) -> _Sample | tuple[int, str]:
        try:
            with self._budget.share() as claim:
                picture = decode(self._images[index], self._max_pixels, self._recipe.pixels, claim=claim)
                source_size = (picture.height, picture.width)
                size = self._recipe.input_size(source_size, self._max_pixels, self._model.largest_scale)
                if self._recipe.padded(size) != self.shapes[index]:
                    raise ImageError("its header and its pixels disagree about the size")

                def target_at(wanted: tuple[int, int]) -> Target:
                    return self._make(self.labels[index], source_size, wanted)

                if draw is None:
                    pixels = self._model.resize(picture, size, self._recipe)
                    pixels = pixels if isinstance(pixels, tuple) else (pixels,)
                    return _Sample(index, pixels, size, source_size, target_at(size))
                with isolated_torch_state(random_seed(draw.seed, draw.epoch, self.names[index])):
                    pixels, target = self._augmented(picture, size, target_at)
                return _Sample(index, pixels, size, source_size, target)
        except ImageError as error:
            return index, str(error)

    def _augmented(
        self, picture: Image.Image, size: tuple[int, int], target_at: Callable[[tuple[int, int]], Target]
    ) -> tuple[tuple[np.ndarray, ...], Target]:
        """A random version of a picture at each scale, and its target for the input of `size`."""
        recipe, scales = self._recipe, tuple(self._model.scales.values()) or (1.0,)
        largest = scaled_size(size, max(scales))
        pixels, target = augmented(
            self._make.task,
            largest,
            lambda wanted: recipe.resize(picture, wanted),
            target_at,
        )
        if largest == size and len(scales) == 1:
            return (pixels,), target
        whole = Image.fromarray(pixels)
        images = tuple(recipe.resize(whole, scaled_size(size, scale)) for scale in scales)
        return images, resized_target(target, largest, size)

    def _inputs(self, samples: Sequence[_Sample], padded: tuple[int, int]) -> Inputs:
        scales = self._model.scales
        if not scales:
            return self._recipe.batch([sample.pixels[0] for sample in samples], padded)
        return {
            name: self._recipe.batch([sample.pixels[i] for sample in samples], scaled_size(padded, scale))
            for i, (name, scale) in enumerate(scales.items())
        }
