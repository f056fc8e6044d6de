"""Renders one level of one image as a panel of pixels, aligned with the source image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image

from fpnx.core.config import PictureConfig
from fpnx.core.errors import FpnxError
from fpnx.core.text import did_you_mean
from fpnx.visualization.color_scale import ColorScale, value_range
from fpnx.visualization.heatmaps import Basis, heatmap, strongest_channels
from fpnx.visualization.image_maps import ImageMaps
from fpnx.visualization.predicted_boxes import PredictedBox
from fpnx.visualization.predictions import DrawnObject, outline_objects

__all__ = [
    "TILE_GAP",
    "LevelMap",
    "render_panel",
    "colour_table",
    "drawn_objects",
    "resized_source",
    "compute_map",
    "apply_colormap",
    "resample",
    "tile_size",
]

NOT_FINITE_GREY = 150  # grey level of values that are not finite
UNCOVERED_GREY = 236  # grey level of pixels that no cell covers
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
OVERLAY_OPACITY = 0.55  # of the heatmap over the source image
MIN_TILE = (8, 8)  # (height, width)
MIN_LABELLED_TILE = (16, 40)  # (height, width) of a tile with a channel number on it
FAINT = 0.45  # opacity of the boxes of other levels
THIN_BELOW = 96  # pixels of the shorter side of a tile, below which lines of boxes have one pixel
MOST_BOLD = 20  # boxes of a level; more have lines of one pixel
TILE_GAP = 2  # pixels between the tiles of a panel


@dataclass(frozen=True)
class LevelMap:
    """The heatmap of one level: one tile, or one for each channel, and the colour scale.

    Attributes:
        shape: (height, width) in cells.
        tiles: (H, W) values, or (H, W, 3) colours in 0..1.
        labels: channel numbers of the tiles in mode "channels".
        cell: (y, x) of the reference cell in mode "similarity".
        scale: the shared colour scale, or that of this map alone.
        clipped: whether values lie below the scale, and above it.
        nonfinite: how many cells have a value that is not finite.
    """

    level: str
    stride: int
    shape: tuple[int, int]
    tiles: tuple[np.ndarray, ...]
    scale: ColorScale
    labels: tuple[str, ...] = ()
    cell: tuple[int, int] | None = None
    clipped: tuple[bool, bool] = (False, False)
    nonfinite: int = 0

    @property
    def grid_side(self) -> int:
        """Number of tiles in a row of the panel."""
        return math.ceil(math.sqrt(len(self.tiles)))


def compute_map(maps: ImageMaps, level: str, config: PictureConfig, shared: ColorScale | None) -> LevelMap:
    """Read a level and compute its heatmap, on the scale `shared`, or on its own scale where that is None.

    Raises:
        FpnxError: a channel or a point that does not exist, features that cannot be read.
    """
    features = maps.read(level)
    shape: tuple[int, int] = features.shape[1:]
    labels: tuple[str, ...] = ()
    cell, basis = None, None
    if config.mode == "channels":
        numbers = strongest_channels(features, config.top, config.pick)
        tiles = tuple(np.asarray(features[number], np.float32) for number in numbers)
        labels = tuple(map(str, numbers))
    elif config.mode == "pca":
        basis = shared.basis if shared is not None and shared.basis is not None else Basis.fit(features)
        tiles = (basis.colours(features),)
    else:
        if config.mode == "similarity":
            cell = maps.cell_at(level, shape, config.position(maps.source_size))
        tiles = (heatmap(features, config.mode, cell=cell),)
    low, high = value_range(np.stack(tiles))
    if shared is None or basis is not None:
        scale, clipped = ColorScale(low, high, basis), (False, False)
    else:
        scale, clipped = shared, (low < shared.low, high > shared.high)
    finite = np.isfinite(np.stack(tiles)).reshape(len(tiles), *shape, -1).all(axis=(0, 3))
    nonfinite = int(finite.size - finite.sum())
    return LevelMap(level, maps.strides[level], shape, tiles, scale, labels, cell, clipped, nonfinite)


def tile_size(source: tuple[int, int], level_maps: Sequence[LevelMap], config: PictureConfig) -> tuple[int, int]:
    """(height, width) of every tile in pixels: the source's aspect ratio, with at least one pixel for each cell."""
    side = max((level_map.grid_side for level_map in level_maps), default=1)
    factor = config.panel / side / max(source)
    growth = max((n / (s * factor) for m in level_maps for n, s in zip(m.shape, source, strict=True)), default=1.0)
    factor *= min(max(growth, 1.0), 4.0)  # a larger factor would make panels of very long images too large
    smallest = MIN_TILE if side == 1 else MIN_LABELLED_TILE
    height, width = (max([smallest[axis], *(m.shape[axis] for m in level_maps)]) for axis in (0, 1))
    return max(round(source[0] * factor), height), max(round(source[1] * factor), width)


def render_panel(
    maps: ImageMaps, level_map: LevelMap, tile: tuple[int, int], side: int, config: PictureConfig, table: np.ndarray
) -> np.ndarray:
    """The pixels of a panel of `side` × `side` tiles, (height, width, 3) uint8, white where there is no tile."""
    step = (tile[0] + TILE_GAP, tile[1] + TILE_GAP)
    canvas = np.full((side * step[0] - TILE_GAP, side * step[1] - TILE_GAP, 3), 255, np.uint8)
    background = resized_source(maps, tile) if config.overlay else None
    span = side if len(level_map.tiles) == 1 else 1  # a single tile fills the panel
    size = (tile[0] * span + TILE_GAP * (span - 1), tile[1] * span + TILE_GAP * (span - 1))
    if span > 1 and background is not None:
        background = resized_source(maps, size)
    for number, values in enumerate(level_map.tiles):
        y, x = number // side * step[0], number % side * step[1]
        if values.ndim == 3:
            colours = np.where(np.isnan(values), NOT_FINITE_GREY, values * 255 + 0.5).astype(np.uint8)
        else:
            colours = apply_colormap(values, level_map.scale.low, level_map.scale.high, table)
        covered = maps.covered_size(level_map.level, level_map.shape)
        pixels, inside = resample(colours, covered, maps.source_size, size)
        if background is not None:
            grey = (
                background.astype(np.float32) @ LUMINANCE
            )  # in grey, so that its colours are not mistaken for the heatmap's
            mixed = OVERLAY_OPACITY * pixels.astype(np.float32) + (1 - OVERLAY_OPACITY) * grey[..., None]
            pixels = (mixed + 0.5).astype(np.uint8)
        pixels = np.where(inside[..., None], pixels, np.uint8(UNCOVERED_GREY))
        if maps.boxes:
            pixels = _with_boxes(pixels, maps, level_map.level)
        if level_map.cell is not None:
            _outline_cell(pixels, level_map.cell, level_map.shape, covered, maps.source_size)
        canvas[y : y + size[0], x : x + size[1]] = pixels
    return canvas


def drawn_objects(boxes: Sequence[PredictedBox]) -> list[DrawnObject]:
    """Predicted boxes as objects of a picture."""
    return [DrawnObject(box=each.box, label=each.label, colour=each.category) for each in boxes]


def _with_boxes(pixels: np.ndarray, maps: ImageMaps, level: str) -> np.ndarray:
    """A panel with the boxes of its level, and faintly those of other levels. Boxes without a level are its own."""
    own = [each for each in maps.boxes or () if each.level in (level, "")]
    others = [each for each in maps.boxes or () if each.level not in (level, "")]
    stroke = 2 if min(pixels.shape[:2]) >= THIN_BELOW and len(own) <= MOST_BOLD else 1
    picture = outline_objects(Image.fromarray(pixels), drawn_objects(others), maps.source_size, 1, FAINT)
    return np.array(outline_objects(picture, drawn_objects(own), maps.source_size, stroke))


def resized_source(maps: ImageMaps, size: tuple[int, int]) -> np.ndarray | None:
    """The source image at `size` (height, width), (height, width, 3) uint8; None where it is missing."""
    picture = maps.photo.picture
    if picture is None:
        return None
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))


def colour_table(name: str) -> np.ndarray:
    """(256, 3) uint8 table of a matplotlib colour map.

    Raises:
        FpnxError: for a name that matplotlib does not know.
    """
    if name not in matplotlib.colormaps:
        known = sorted(matplotlib.colormaps)
        raise FpnxError(
            f"colour map {name!r}: take a matplotlib name such as viridis or magma{did_you_mean(name, known)}"
        )
    return (matplotlib.colormaps[name](np.linspace(0.0, 1.0, 256))[:, :3] * 255 + 0.5).astype(np.uint8)


def apply_colormap(values: np.ndarray, low: float, high: float, table: np.ndarray) -> np.ndarray:
    """(H, W) values → (H, W, 3) uint8 from the first to the last colour; grey where a value is not finite."""
    finite = np.isfinite(values)
    if not math.isfinite(low):
        low = high = 0.0
    unit = np.where(finite, values, low).astype(np.float64) - low
    unit = np.clip(unit / (high - low), 0.0, 1.0) if high > low else np.zeros_like(unit)
    return np.where(finite[..., None], table[(unit * 255 + 0.5).astype(np.intp)], np.uint8(NOT_FINITE_GREY))


def resample(
    cells: np.ndarray, covered: tuple[float, float], source: tuple[float, float], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest-neighbour sampling of cells at the pixel centres of a tile that shows the whole source.

    Args:
        cells: (H, W, ...) values or colours.
        covered: (height, width) in source pixels that all cells cover together.
        source: (height, width) of the source; cells outside it are cut off.
        size: (height, width) of the tile.

    Returns:
        The tile (height, width, ...), and a mask of the pixels that a cell covers.
    """
    indices, inside = [], []
    for axis in (0, 1):
        centres = (np.arange(size[axis]) + 0.5) / size[axis] * source[axis]
        index = np.floor(centres / covered[axis] * cells.shape[axis]).astype(np.intp)
        inside.append(index < cells.shape[axis])
        indices.append(np.minimum(index, cells.shape[axis] - 1))
    return cells[np.ix_(*indices)], np.logical_and.outer(*inside)


def _outline_cell(
    pixels: np.ndarray,
    cell: tuple[int, int],
    shape: tuple[int, int],
    covered: tuple[float, float],
    source: tuple[int, int],
) -> None:
    """Draw a white outline inside a black one around a cell, in place."""
    bounds = []
    for axis in (0, 1):
        pitch = covered[axis] / shape[axis] / source[axis] * pixels.shape[axis]
        first, last = round(cell[axis] * pitch), round((cell[axis] + 1) * pitch)
        bounds.append((max(first, 0), min(max(last, first + 1), pixels.shape[axis])))
    for margin, shade in ((2, 0), (1, 255)):
        (top, bottom), (left, right) = ((a - margin, b + margin) for a, b in bounds)
        rows, columns = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
        outer = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        inner = (rows > top) & (rows < bottom - 1) & (columns > left) & (columns < right - 1)
        pixels[outer & ~inner] = shade
