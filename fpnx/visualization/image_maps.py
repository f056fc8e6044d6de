"""What is drawn of one image: its feature maps, where they lie on the source image, and the source image itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fpnx.core.config import InputConfig
from fpnx.core.errors import FpnxError, ImageError, StoreError
from fpnx.core.pixel_options import PixelOptions
from fpnx.core.provenance import WeightsInfo, describe_pyramid
from fpnx.core.text import escape
from fpnx.images.decoding import decode
from fpnx.images.reading import locate
from fpnx.store.reader import Item, Store
from fpnx.visualization.predicted_boxes import PredictedBox

__all__ = ["ImageMaps", "Photo", "describe_model", "find_photo", "item_maps"]


@dataclass(frozen=True)
class Photo:
    """The upright source image, or None where it is missing; `note` says why, or that the file has changed."""

    picture: Image.Image | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageMaps:
    """The feature maps of one image and their geometry.

    Attributes:
        path: stored path of the image.
        model: backbone and pyramid that computed the maps, and which of them are trained.
        source_size, input_size: (height, width) of the upright source, and of the model input without padding.
        levels: names, fine to coarse.
        strides: by level, in input pixels.
        pooled: whether a map's cells are pooling bins over the whole input.
        read: level → (C, H, W) features without padding.
        photo: the source image.
        file: name of the file that holds the maps.
        missing: why there is nothing to draw; empty otherwise.
        boxes: the predicted boxes that are drawn over the maps, best first; None where there are no predictions.
    """

    path: str
    model: str
    source_size: tuple[int, int]
    input_size: tuple[int, int]
    levels: tuple[str, ...]
    strides: Mapping[str, int]
    pooled: bool
    read: Callable[[str], np.ndarray]
    photo: Photo
    file: str = ""
    missing: str = ""
    boxes: tuple[PredictedBox, ...] | None = None

    def covered_size(self, level: str, shape: tuple[int, int]) -> tuple[float, float]:
        """(height, width) in source pixels that a map of `shape` cells covers; it may exceed the source."""
        stride = self.strides[level]
        cells = [math.ceil(side / stride) if self.pooled else n for side, n in zip(self.input_size, shape, strict=True)]
        scale = [source / side for source, side in zip(self.source_size, self.input_size, strict=True)]
        return cells[0] * stride * scale[0], cells[1] * stride * scale[1]

    def cell_at(self, level: str, shape: tuple[int, int], point: tuple[float, float]) -> tuple[int, int]:
        """(y, x) of the cell that contains `point`, (x, y) in source pixels.

        Raises:
            FpnxError: for a point outside the image.
        """
        height, width = self.source_size
        if not (0 <= point[0] <= width and 0 <= point[1] <= height):
            raise FpnxError(f"point {point[0]:g},{point[1]:g} is outside {escape(self.path)}, {width}×{height} pixels")
        covered_height, covered_width = self.covered_size(level, shape)
        y, x = int(point[1] / covered_height * shape[0]), int(point[0] / covered_width * shape[1])
        return min(y, shape[0] - 1), min(x, shape[1] - 1)


def item_maps(item: Item, photo: Photo | None = None) -> ImageMaps:
    """The maps of a stored image; without `photo`, its source image is read from the path in the file.

    Raises:
        StoreError: for sizes that no image has.
    """
    store = item.store
    if min(*item.source_size, *item.input_size) < 1:
        raise StoreError(f"{escape(store.path)} gives {escape(item.path)} a size of nothing: extract it again")

    def read(level: str) -> np.ndarray:
        try:
            height, width = item.valid(level)
            return item[level][:, :height, :width]
        except (OSError, RuntimeError, KeyError) as error:
            raise StoreError(
                f"{escape(item.path)}: {level} cannot be read from {escape(store.path)}: {error}"
            ) from error

    return ImageMaps(
        path=item.path,
        model=describe_model(store.backbone, store.pyramid, store.levels, store.provenance.weights),
        source_size=item.source_size,
        input_size=item.input_size,
        levels=item.levels,
        strides={level: item.stride(level) for level in item.levels},
        pooled=store.config.get("pool", "none") != "none",
        read=read,
        photo=photo or find_photo(item),
        file=os.path.basename(store.path),
    )


def find_photo(item: Item) -> Photo:
    """Read the source image of a stored image, if it is still there and has the stored size."""
    store, row = item.store, item.index
    path = os.fsencode(os.path.join(store.root_of(row), item.path))
    try:
        source = locate(path)
    except (OSError, ValueError, FpnxError) as error:
        return Photo(None, f"source not found ({getattr(error, 'strerror', None) or error}): {escape(path)}")
    digests: list[bytes] = []
    try:
        picture = decode(source, InputConfig.max_pixels, _pixel_options(store), digest=digests.append)
    except ImageError as error:
        return Photo(None, f"source cannot be read ({error}): {escape(path)}")
    if (picture.height, picture.width) != item.source_size:
        return Photo(None, f"source is another picture now, {picture.width}×{picture.height} pixels: {escape(path)}")
    changed = (source.bytes, source.mtime_ns) != (int(store.bytes[row]), int(store.mtimes_ns[row]))
    if store.digests[row].any():
        changed = digests != [store.digests[row].tobytes()]
    return Photo(picture, "file changed since extraction" if changed else "")


def _pixel_options(store: Store) -> PixelOptions:
    """How the pixels of a store's images were read."""
    recipe = store.config.get("recipe", {})
    bands = recipe.get("bands")
    return PixelOptions(tuple(bands) if bands else None, recipe.get("source_range"))


def describe_model(backbone: str, pyramid: str, levels: tuple[str, ...], weights: WeightsInfo) -> str:
    """`"resnet50: trained (…) · pyramid: untrained (random, seed 0)"`: which parts of a model are trained."""
    text = describe_pyramid(pyramid, weights)
    if all(level.startswith("C") for level in levels):
        text = "none in this file"
    return f"{escape(backbone)}: {weights.body} · pyramid: {text}"
