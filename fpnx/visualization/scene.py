"""One image as it is drawn: where its maps lie over the source picture, and what is known of both."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fpnx.core.config import InputConfig
from fpnx.core.errors import FpnxError, ImageError, StoreError
from fpnx.core.provenance import WeightsInfo
from fpnx.core.text import escape
from fpnx.images.decoding import decode
from fpnx.images.reading import locate
from fpnx.store.reader import Item

__all__ = ["Photo", "Scene", "about_model", "find_photo", "scene_of"]


@dataclass(frozen=True)
class Photo:
    """The upright source picture, or None and a `remark` that says why; also a remark where it is not as it was."""

    picture: Image.Image | None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One image's maps and where they lie.

    Attributes:
        path: stored path of the image.
        about: which backbone and pyramid made the maps, in words.
        source_size, input_size: (height, width) of the upright source, and of what the model saw without padding.
        levels: names, fine to coarse.
        strides: by level, in input pixels.
        pooled: whether a map's cells are bins over the whole input instead of strides.
        read: level → (C, H, W) features without padding.
        photo: the source picture.
        file: name of the file that the maps are from.
        missing: why there is nothing to draw, where there is nothing.
    """

    path: str
    about: str
    source_size: tuple[int, int]
    input_size: tuple[int, int]
    levels: tuple[str, ...]
    strides: Mapping[str, int]
    pooled: bool
    read: Callable[[str], np.ndarray]
    photo: Photo
    file: str = ""
    missing: str = ""

    def reach(self, level: str, shape: tuple[int, int]) -> tuple[float, float]:
        """(height, width) in source pixels that a map of `shape` cells covers; the last cells may overhang."""
        stride = self.strides[level]
        cells = [math.ceil(side / stride) if self.pooled else n for side, n in zip(self.input_size, shape, strict=True)]
        pixels = [source / seen for source, seen in zip(self.source_size, self.input_size, strict=True)]
        return cells[0] * stride * pixels[0], cells[1] * stride * pixels[1]

    def cell_at(self, level: str, shape: tuple[int, int], point: tuple[float, float]) -> tuple[int, int]:
        """(y, x) of the cell below `point`, (x, y) in source pixels.

        Raises:
            FpnxError: for a point outside the image.
        """
        height, width = self.source_size
        if not (0 <= point[0] <= width and 0 <= point[1] <= height):
            raise FpnxError(f"point {point[0]:g},{point[1]:g} is outside {escape(self.path)}, {width}×{height} pixels")
        tall, wide = self.reach(level, shape)
        y, x = int(point[1] / tall * shape[0]), int(point[0] / wide * shape[1])
        return min(y, shape[0] - 1), min(x, shape[1] - 1)


def scene_of(item: Item, photo: Photo | None = None) -> Scene:
    """The scene of a stored image; its picture is looked for where the file says it was.

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

    return Scene(
        path=item.path,
        about=about_model(str(store.config.get("backbone", "unknown")), store.levels, store.provenance.weights),
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
    """The source picture of a stored image, where it still is and still fits."""
    store, row = item.store, item.index
    path = os.fsencode(os.path.join(store.root, item.path))
    try:
        source = locate(path)
    except (OSError, ValueError, FpnxError) as error:
        return Photo(None, f"source not found ({getattr(error, 'strerror', None) or error}): {escape(path)}")
    changed = (source.bytes, source.mtime_ns) != (int(store.bytes[row]), int(store.mtimes_ns[row]))
    try:
        picture = decode(source, InputConfig.max_pixels)
    except ImageError as error:
        return Photo(None, f"source cannot be read ({error}): {escape(path)}")
    if (picture.height, picture.width) != item.source_size:
        return Photo(None, f"source is another picture now, {picture.width}×{picture.height} pixels: {escape(path)}")
    return Photo(picture, "file changed since extraction" if changed else "")


def about_model(backbone: str, levels: tuple[str, ...], weights: WeightsInfo) -> str:
    """`"resnet50: trained (…) · pyramid: untrained (random, seed 0)"`: which parts of a model are trained."""
    pyramid = "none in this file" if all(level.startswith("C") for level in levels) else str(weights.pyramid)
    return f"{escape(backbone)}: {weights.body} · pyramid: {pyramid}"
