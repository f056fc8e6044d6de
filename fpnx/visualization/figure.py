"""Matplotlib figures of stored pyramids, without torch, pyplot or changes to global settings."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fpnx.core.config import PictureConfig
from fpnx.core.errors import FpnxError
from fpnx.core.levels import level_place, parse_levels
from fpnx.core.text import plural
from fpnx.images.decoding import pillow_limits
from fpnx.store.reader import Item
from fpnx.visualization.color_scale import ColorScales, measure_scales
from fpnx.visualization.image_maps import ImageMaps, item_maps
from fpnx.visualization.panels import (
    TILE_GAP,
    LevelMap,
    colour_table,
    compute_map,
    drawn_objects,
    render_panel,
    resized_source,
    tile_size,
)
from fpnx.visualization.predicted_boxes import count_by_level
from fpnx.visualization.predictions import tag_objects
from fpnx.visualization.text_layout import DPI, fit_text, text_width, write

__all__ = ["chosen_levels", "draw", "figure", "mode_in_words", "rendered"]

MARGIN, GAP = 16, 18
LINE_HEIGHT = 17  # pixels
MIN_COLUMN = 168  # pixels; a title fits above a narrower panel
BAR_HEIGHT = 9  # pixels of the colour bar
BOLD_WIDTH_FACTOR = 1.16  # bold text is at most this much wider
LABEL_SIZE = 10  # pixels, of a channel's number
TAG_SIZE = 11  # pixels, of the label of a box
NOTE_STEP = 14  # pixels from one note below a panel to the next
# Added to the size of a figure, and taken from that of a box of pixels: some versions of Matplotlib round figures down
# and boxes up, so that a rounding error would remove a row of the figure, or add a row or column to the box.
SLACK = 1e-6  # pixels
NOTE_COLOUR = "#555555"
MODE_DESCRIPTIONS = {
    "energy": "energy: L2 norm over channels",
    "mean": "mean over channels",
    "max": "max over channels",
    "std": "std: standard deviation over channels",
    "pca": "pca: three principal components as red, green and blue, cut at 1 and 99 %, with their shares of variance",
    "channels": "channels: the strongest by mean absolute value",
}


class NotebookFigure(Figure):
    """A figure that notebooks display without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        FigureCanvasAgg(self).print_png(buffer)
        return buffer.getvalue()


def figure(
    items: Item | Sequence[Item],
    *,
    levels: str | Sequence[str] | None = None,
    scales: Sequence[ColorScales] | None = None,
    **options: Any,
) -> Figure:
    """Figure of an image and its levels as heatmaps; several items, each of another file, give one row each.

    Args:
        items: `store["cats/01.jpg"]`, or the same image's item in each of several files.
        levels: the levels to draw, such as `"P3-P5"`; all where None.
        scales: for each item, the result of `fpnx.visualization.color_scale.measure_scales`. Where None, it is called
            here, which reads a bounded part of the file once; not with `per_image=True`.
        options: the fields of `fpnx.core.config.PictureConfig`: `mode="pca"`, `overlay=True`, `colormap="magma"`, …

    Returns:
        A matplotlib figure of 100 dots per inch with the Agg canvas, for `savefig` or a notebook.

    Raises:
        FpnxError: a level, mode, channel or point that does not exist.
        TypeError: an option that does not exist.
    """
    config = PictureConfig(**options)
    rows = [items] if isinstance(items, Item) else list(items)
    chosen = parse_levels(levels) if levels is not None else None
    shared: list[ColorScales | None] = list(scales) if scales is not None else [None] * len(rows)
    if scales is None and not config.per_image:
        shared = [measure_scales(item.store, config, chosen_levels(item, chosen)) for item in rows]
    with pillow_limits():
        return draw([item_maps(item) for item in rows], config, chosen, shared)


def chosen_levels(source: Any, levels: Iterable[str] | None) -> tuple[str, ...]:
    """Those of `levels` that `source` (a store, an item, …) has, or all of its levels.

    Raises:
        FpnxError: where it has none of `levels`.
    """
    wanted = source.levels if levels is None else tuple(levels)
    chosen = tuple(level for level in source.levels if level in wanted)
    if not chosen:
        raise FpnxError(f"no level {', '.join(wanted)} here: there are {', '.join(source.levels)}")
    return chosen


def draw(
    images: Sequence[ImageMaps],
    config: PictureConfig,
    levels: Iterable[str] | None,
    scales: Sequence[ColorScales | None],
) -> Figure:
    """The figure of one image: for each file its source, the C levels in a row and the P levels below."""
    table = colour_table(config.colormap)
    level_maps = [_level_maps(maps, config, levels, shared) for maps, shared in zip(images, scales, strict=True)]
    all_maps = [level_map for row in level_maps for level_map in row]
    source = next((maps.source_size for maps in images if not maps.missing), (1, 1))
    tile, side = tile_size(source, all_maps, config), max((level_map.grid_side for level_map in all_maps), default=1)
    panel = (side * (tile[0] + TILE_GAP) - TILE_GAP, side * (tile[1] + TILE_GAP) - TILE_GAP)
    columns = sorted({level_place(level_map.level) for level_map in all_maps})
    step = max(panel[1], MIN_COLUMN) + GAP
    canvas = _Canvas(2 * MARGIN + (len(columns) + 1) * step - GAP)
    canvas.paragraph(images[0].path, size=15, lines=3, fontweight="bold")
    canvas.paragraph(f"{mode_in_words(config)} · {_describe_scale(scales)}", lines=3)
    if any(maps.boxes for maps in images):
        canvas.paragraph("boxes: strong in the level that they come from, faint in the others", lines=2)
    for maps, maps_of_image in zip(images, level_maps, strict=True):
        canvas.y += 8
        canvas.paragraph(f"{maps.file} · {maps.model}" if len(images) > 1 and maps.file else maps.model, lines=4)
        if maps.missing:
            canvas.paragraph(maps.missing, lines=2, color=NOTE_COLOUR)
            continue
        by_kind = ([m for m in maps_of_image if (m.level[0] == "C") is is_tap] for is_tap in (True, False))
        rows, more_lines = [row for row in by_kind if row], 0
        for row in rows:
            top = canvas.y + 2 * LINE_HEIGHT + 14
            if row is rows[0]:
                more_lines = _draw_source(canvas, maps, config, panel, (MARGIN, top), step - GAP)
            for level_map in row:
                left = MARGIN + (columns.index(level_place(level_map.level)) + 1) * step
                pixels = render_panel(maps, level_map, tile, side, config, table)
                _draw_level(canvas, maps, level_map, pixels, table, tile, (left, top), step - GAP)
            canvas.y = top + panel[0] + BAR_HEIGHT + LINE_HEIGHT + 8
        canvas.y += NOTE_STEP * more_lines if len(rows) == 1 else 0  # a second row leaves them room
    return canvas.to_figure()


def mode_in_words(config: PictureConfig) -> str:
    """What the value of a cell is in a mode, in words."""
    if config.mode == "similarity":
        return f"similarity: cosine with the cell at {config.point}"
    if config.pick is not None:
        return f"channels {config.pick}"
    return MODE_DESCRIPTIONS[config.mode]


def _describe_scale(scales: Sequence[ColorScales | None]) -> str:
    measured = [shared for shared in scales if shared is not None]
    if not measured:
        return "a scale of its own for each image and level"
    return f"one scale a level{' and file' if len(measured) > 1 else ''}, {max(measured, key=lambda s: s.total)}"


def _level_maps(
    maps: ImageMaps, config: PictureConfig, levels: Iterable[str] | None, shared: ColorScales | None
) -> list[LevelMap]:
    if maps.missing:
        return []
    scales = shared.levels if shared is not None else {}
    return [compute_map(maps, level, config, scales.get(level)) for level in chosen_levels(maps, levels)]


def _draw_source(
    canvas: _Canvas,
    maps: ImageMaps,
    config: PictureConfig,
    panel: tuple[int, int],
    at: tuple[float, float],
    column: int,
) -> int:
    """Draw the source image; returns how many lines there are below it beside the first."""
    (height, width), input_size = maps.source_size, maps.input_size
    note = f"model input {input_size[0]}×{input_size[1]}"
    canvas.title(at, "source", f"{height}×{width}", note, column)
    pixels, below = resized_source(maps, panel), [maps.photo.note] if maps.photo.note else []
    missing = pixels is None
    if pixels is None:
        pixels = np.full((*panel, 3), 245, np.uint8)
    if maps.boxes is not None:
        objects = drawn_objects(maps.boxes)
        picture, left_out = tag_objects(Image.fromarray(pixels), objects, maps.source_size, TAG_SIZE, MIN_COLUMN)
        pixels = np.asarray(picture)
        below.insert(0, count_by_level(maps.boxes))
        if left_out:
            below.insert(1, f"{plural(left_out, 'label')} left out")
    elif missing:
        canvas.image(pixels, at)
        lines = fit_text(maps.photo.note, panel[1] - 16, 11, max(1, (panel[0] - 12) // 15))
        for number, line in enumerate(lines):
            canvas.text(at[0] + 8, at[1] + 18 + 15 * number, line, 11, color=NOTE_COLOUR)
        return 0
    mark = None
    if config.point is not None:
        x, y = config.position(maps.source_size)
        mark = (x / width * panel[1], y / height * panel[0])
    canvas.image(pixels, at, label="source", mark=mark)
    lines = [line for note in below for line in fit_text(note, column, 10.5, 1 if note == maps.photo.note else 3)]
    for number, line in enumerate(lines):
        canvas.text(at[0], at[1] + panel[0] + LINE_HEIGHT + NOTE_STEP * number, line, 10.5, color=NOTE_COLOUR)
    return max(0, len(lines) - 1)


def _draw_level(
    canvas: _Canvas,
    maps: ImageMaps,
    level_map: LevelMap,
    pixels: np.ndarray,
    table: np.ndarray,
    tile: tuple[int, int],
    at: tuple[float, float],
    column: int,
) -> None:
    note = f"stride {level_map.stride}"
    if maps.boxes and (own := [each for each in maps.boxes if each.level == level_map.level]):
        note += f" · {count_by_level(own).partition(':')[0]}"
    if level_map.nonfinite:
        note += f" · {level_map.nonfinite} cells not finite"
    canvas.title(at, level_map.level, f"{level_map.shape[0]}×{level_map.shape[1]}", note, column)
    canvas.image(pixels, at, label=level_map.level)
    side = level_map.grid_side
    for number, label in enumerate(level_map.labels):
        y, x = number // side * (tile[0] + TILE_GAP), number % side * (tile[1] + TILE_GAP)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
        canvas.text(at[0] + x + 3, at[1] + y + LABEL_SIZE + 2, label, LABEL_SIZE, bbox=box)
    below = at[1] + pixels.shape[0]
    if level_map.scale.basis is not None:
        shares = " · ".join(f"{c} {100 * s:.0f}" for c, s in zip("RGB", level_map.scale.basis.explained, strict=True))
        canvas.text(at[0], below + BAR_HEIGHT + 8, f"{shares} %", 10.5)
        return
    width = max(pixels.shape[1], MIN_COLUMN)
    canvas.image(np.broadcast_to(table[None], (1, 256, 3)), (at[0], below + 4), size=(BAR_HEIGHT, width))
    _draw_scale_labels(canvas, level_map, (at[0], below + 4 + BAR_HEIGHT + 13), width)


def _draw_scale_labels(canvas: _Canvas, level_map: LevelMap, at: tuple[float, float], width: int) -> None:
    low, high = level_map.scale.low, level_map.scale.high
    if not math.isfinite(low):
        canvas.text(at[0], at[1], "no finite value", 10.5)
        return
    first = ("≤ " if level_map.clipped[0] else "") + _format_number(low)
    last = ("≥ " if level_map.clipped[1] else "") + _format_number(high)
    middle = _format_number((low + high) / 2)
    canvas.text(at[0], at[1], first, 10.5)
    canvas.text(at[0] + width, at[1], last, 10.5, ha="right")
    if text_width(first + last + middle, 10.5) < width - 30:
        canvas.text(at[0] + width / 2, at[1], middle, 10.5, ha="center")


def _format_number(value: float) -> str:
    """Three significant digits, with an exponent only where it is shorter."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def rendered(figure: Figure) -> Image.Image:
    """A figure as a PIL image."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])


class _Canvas:
    """Collects drawing calls in pixels from the top left, and makes the figure once its height is known.

    Attributes:
        y: where the next paragraph is drawn; move it down after drawing at a position.
    """

    def __init__(self, width: float) -> None:
        self.width, self.y = int(width), float(MARGIN)
        self._draw_calls: list[Callable[[Figure, int], None]] = []

    def paragraph(self, text: str, size: float = 12, lines: int = 1, **style: Any) -> None:
        """Text over the whole width, below everything drawn so far."""
        width = (self.width - 2 * MARGIN) / (BOLD_WIDTH_FACTOR if "fontweight" in style else 1)
        for line in fit_text(text, width, size, lines):
            self.y += LINE_HEIGHT * size / 12
            self.text(MARGIN, self.y, line, size, **style)

    def title(self, at: tuple[float, float], name: str, size: str, note: str, column: int) -> None:
        """A bold name with a size beside it and a note below them, above a panel at `at`."""
        self.text(at[0], at[1] - LINE_HEIGHT - 7, name, 13, fontweight="bold")
        self.text(at[0] + text_width(name, 13) * BOLD_WIDTH_FACTOR + 8, at[1] - LINE_HEIGHT - 7, size, 12)
        self.text(at[0], at[1] - 7, fit_text(note, column, 10.5)[0], 10.5, color=NOTE_COLOUR)

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        """One line with its baseline at (x, y)."""
        self._draw_calls.append(lambda figure, _: write(figure, x, y, text, size, **style))

    def image(
        self,
        pixels: np.ndarray,
        at: tuple[float, float],
        size: tuple[int, int] | None = None,
        label: str = "",
        mark: tuple[float, float] | None = None,
    ) -> None:
        """Pixels with their top left at `at`, unscaled or at `size` (height, width), with a ring at `mark` (x, y)."""

        def draw_call(figure: Figure, total: int) -> None:
            height, width = size or pixels.shape[:2]
            left, top = round(at[0]), round(at[1])
            x, y = left + SLACK, total - top - height + SLACK
            box = (x / self.width, y / total, (width - 2 * SLACK) / self.width, (height - 2 * SLACK) / total)
            axes = figure.add_axes(box, label=label, xlim=(0, width), ylim=(height, 0))
            axes.set_axis_off()
            axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="auto", origin="upper")
            if mark is not None:
                for diameter, colour in ((9, "black"), (6, "white")):
                    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": colour, "clip_on": False}
                    axes.plot([mark[0]], [mark[1]], marker="o", markersize=diameter, markeredgewidth=1.5, **ring)
                axes.set(xlim=(0, width), ylim=(height, 0))

        self._draw_calls.append(draw_call)

    def to_figure(self) -> Figure:
        """The figure, with the height of its content."""
        total = int(self.y) + MARGIN
        size = ((self.width + SLACK) / DPI, (total + SLACK) / DPI)
        figure = NotebookFigure(figsize=size, dpi=DPI, facecolor="white", edgecolor="white")
        FigureCanvasAgg(figure)
        figure.set_layout_engine("none")  # so that rcParams do not change the figure
        for draw_call in self._draw_calls:
            draw_call(figure, total)
        return figure
