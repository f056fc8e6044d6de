"""One level of one image → pixels: cells in colours, placed over the source to the pixel."""

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
from fpnx.visualization.heatmaps import Basis, heatmap, strongest
from fpnx.visualization.scene import Scene

__all__ = ["BETWEEN", "Map", "assembled", "colour_table", "covered", "map_of", "painted", "placed", "tile_size"]

BROKEN = 150  # grey of a value that is not finite
EMPTY = 236  # grey of what no cell covers
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
OVERLAY = 0.55  # share of the map over the picture
LABELLED = (16, 40)  # (height, width) that a tile with a number on it has at least
BETWEEN = 2  # pixels between the tiles of one panel


@dataclass(frozen=True)
class Map:
    """What one level shows: one tile, or one for each channel; and its scale.

    Attributes:
        shape: (height, width) in cells.
        tiles: (H, W) values, or (H, W, 3) colours in 0..1.
        labels: of the tiles, where there are several.
        cell: (y, x) that the others are compared with.
        scale: of this map: the file's, or its own.
        clipped: whether values lie below and above the scale.
        broken: how many cells are not finite.
    """

    level: str
    stride: int
    shape: tuple[int, int]
    tiles: tuple[np.ndarray, ...]
    scale: ColorScale
    labels: tuple[str, ...] = ()
    cell: tuple[int, int] | None = None
    clipped: tuple[bool, bool] = (False, False)
    broken: int = 0

    @property
    def side(self) -> int:
        """How many tiles stand beside each other."""
        return math.ceil(math.sqrt(len(self.tiles)))


def map_of(scene: Scene, level: str, config: PictureConfig, shared: ColorScale | None) -> Map:
    """Read a level and compute what it shows, on the scale `shared`, or on its own where that is None.

    Raises:
        FpnxError: a channel or a point that is not there, features that cannot be read.
    """
    features = scene.read(level)
    shape: tuple[int, int] = features.shape[1:]
    labels: tuple[str, ...] = ()
    cell, basis = None, None
    if config.mode == "channels":
        numbers = strongest(features, config.top, config.pick)
        tiles = tuple(np.asarray(features[number], np.float32) for number in numbers)
        labels = tuple(map(str, numbers))
    elif config.mode == "pca":
        basis = shared.basis if shared is not None and shared.basis is not None else Basis.of(features)
        tiles = (basis.colours(features),)
    else:
        if config.mode == "similarity":
            cell = scene.cell_at(level, shape, config.position(scene.source_size))
        tiles = (heatmap(features, config.mode, cell=cell),)
    low, high = value_range(np.stack(tiles))
    if shared is None or basis is not None:
        scale, clipped = ColorScale(low, high, basis), (False, False)
    else:
        scale, clipped = shared, (low < shared.low, high > shared.high)
    finite = np.isfinite(np.stack(tiles)).reshape(len(tiles), *shape, -1).all(axis=(0, 3))
    return Map(level, scene.strides[level], shape, tiles, scale, labels, cell, clipped, int(finite.size - finite.sum()))


def tile_size(source: tuple[int, int], maps: Sequence[Map], config: PictureConfig) -> tuple[int, int]:
    """(height, width) of every tile in pixels: the source's aspect, and a pixel for each cell at least."""
    side = max((found.side for found in maps), default=1)
    factor = config.panel / side / max(source)
    grown = max((n / (s * factor) for m in maps for n, s in zip(m.shape, source, strict=True)), default=1.0)
    factor *= min(max(grown, 1.0), 4.0)  # beyond that, of a very long picture, the aspect gives way
    room = (8, 8) if side == 1 else LABELLED
    least = [max([room[axis], *(found.shape[axis] for found in maps)]) for axis in (0, 1)]
    return max(round(source[0] * factor), least[0]), max(round(source[1] * factor), least[1])


def assembled(
    scene: Scene, found: Map, tile: tuple[int, int], side: int, config: PictureConfig, table: np.ndarray
) -> np.ndarray:
    """The pixels of a panel of `side` × `side` tiles, (height, width, 3) uint8, white where there is none."""
    step = (tile[0] + BETWEEN, tile[1] + BETWEEN)
    canvas = np.full((side * step[0] - BETWEEN, side * step[1] - BETWEEN, 3), 255, np.uint8)
    behind = covered(scene, tile) if config.overlay else None
    own = side if len(found.tiles) == 1 else 1  # one tile alone fills the panel
    size = (tile[0] * own + BETWEEN * (own - 1), tile[1] * own + BETWEEN * (own - 1))
    if own > 1 and behind is not None:
        behind = covered(scene, size)
    for number, values in enumerate(found.tiles):
        y, x = number // side * step[0], number % side * step[1]
        if values.ndim == 3:
            colours = np.where(np.isnan(values), BROKEN, values * 255 + 0.5).astype(np.uint8)
        else:
            colours = painted(values, found.scale.low, found.scale.high, table)
        reach = scene.reach(found.level, found.shape)
        pixels, inside = placed(colours, reach, scene.source_size, size)
        if behind is not None:
            grey = behind.astype(np.float32) @ LUMINANCE  # its own colours would be taken for the map's
            mixed = OVERLAY * pixels.astype(np.float32) + (1 - OVERLAY) * grey[..., None]
            pixels = (mixed + 0.5).astype(np.uint8)
        pixels = np.where(inside[..., None], pixels, np.uint8(EMPTY))
        if found.cell is not None:
            _outline(pixels, found.cell, found.shape, reach, scene.source_size)
        canvas[y : y + size[0], x : x + size[1]] = pixels
    return canvas


def covered(scene: Scene, size: tuple[int, int]) -> np.ndarray | None:
    """The source picture at `size` (height, width), (height, width, 3) uint8; None where there is none."""
    picture = scene.photo.picture
    if picture is None:
        return None
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))


def colour_table(name: str) -> np.ndarray:
    """(256, 3) uint8 of a matplotlib colour map.

    Raises:
        FpnxError: for a name that it does not know.
    """
    if name not in matplotlib.colormaps:
        known = sorted(matplotlib.colormaps)
        raise FpnxError(
            f"colour map {name!r}: take a matplotlib name such as viridis or magma{did_you_mean(name, known)}"
        )
    return (matplotlib.colormaps[name](np.linspace(0.0, 1.0, 256))[:, :3] * 255 + 0.5).astype(np.uint8)


def painted(values: np.ndarray, low: float, high: float, table: np.ndarray) -> np.ndarray:
    """(H, W) values → (H, W, 3) uint8 between the first and last colour; grey where a value is not finite."""
    finite = np.isfinite(values)
    if not math.isfinite(low):
        low = high = 0.0
    unit = np.where(finite, values, low).astype(np.float64) - low
    unit = np.clip(unit / (high - low), 0.0, 1.0) if high > low else np.zeros_like(unit)
    return np.where(finite[..., None], table[(unit * 255 + 0.5).astype(np.intp)], np.uint8(BROKEN))


def placed(
    cells: np.ndarray, reach: tuple[float, float], source: tuple[float, float], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cells → pixels of a tile that shows the whole source, each pixel that of the cell below its middle.

    Args:
        cells: (H, W, ...) values or colours.
        reach: (height, width) in source pixels that the cells cover together.
        source: (height, width) of the source; what reaches beyond it is cut off.
        size: (height, width) of the tile.

    Returns:
        (height, width, ...) of the tile, and a mask of the pixels that a cell covers.
    """
    indices, inside = [], []
    for axis in (0, 1):
        middles = (np.arange(size[axis]) + 0.5) / size[axis] * source[axis]
        index = np.floor(middles / reach[axis] * cells.shape[axis]).astype(np.intp)
        inside.append(index < cells.shape[axis])
        indices.append(np.minimum(index, cells.shape[axis] - 1))
    return cells[np.ix_(*indices)], np.logical_and.outer(*inside)


def _outline(
    pixels: np.ndarray,
    cell: tuple[int, int],
    shape: tuple[int, int],
    reach: tuple[float, float],
    source: tuple[int, int],
) -> None:
    """Draw a white line inside a black one around a cell, in place."""
    ends = []
    for axis in (0, 1):
        pitch = reach[axis] / shape[axis] / source[axis] * pixels.shape[axis]
        first, last = round(cell[axis] * pitch), round((cell[axis] + 1) * pitch)
        ends.append((max(first, 0), min(max(last, first + 1), pixels.shape[axis])))
    for margin, shade in ((2, 0), (1, 255)):
        (top, bottom), (left, right) = ((a - margin, b + margin) for a, b in ends)
        rows, columns = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
        outer = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        inner = (rows > top) & (rows < bottom - 1) & (columns > left) & (columns < right - 1)
        pixels[outer & ~inner] = shade
