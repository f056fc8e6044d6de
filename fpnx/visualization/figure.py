"""Stored arrays → heatmaps → matplotlib figures. No torch, no pyplot, no global settings."""

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
from fpnx.images.decoding import pillow_limits
from fpnx.store.reader import Item
from fpnx.visualization.color_scale import ColorScales, measure_scales
from fpnx.visualization.panels import BETWEEN, Map, assembled, colour_table, covered, map_of, tile_size
from fpnx.visualization.scene import Scene, scene_of
from fpnx.visualization.text_layout import DPI, fit_text, text_width, write

__all__ = ["chosen_levels", "draw", "figure", "mode_in_words", "rendered"]

MARGIN, GAP = 16, 18
LINE = 17  # pixels from one line of text to the next
LEAST_COLUMN = 168  # so that a title fits above a narrow panel
BAR = 9
BOLD = 1.16  # how much wider bold letters are, at most
NUMBER = 10  # pixels of a channel's number
# A figure is larger by this many pixels, and a box of pixels smaller: many a release of Matplotlib rounds figures down
# and boxes up, where a rounding error would cost the figure a row, or give the box a row or column more.
SLACK = 1e-6
DIM = "#555555"
WORDS = {
    "energy": "energy: L2 norm over channels",
    "mean": "mean over channels",
    "max": "max over channels",
    "std": "std: standard deviation over channels",
    "pca": "pca: three principal components as red, green and blue, cut at 1 and 99 %, with their shares of variance",
    "channels": "channels: the strongest by mean absolute value",
}


class Picture(Figure):
    """A figure that a notebook shows as it is, also without pyplot."""

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
    """An image's source and its levels as heatmaps; several items, of one file each, make a row each.

    Args:
        items: `store["cats/01.jpg"]`, or one item a file.
        levels: which of the file's levels; all where None.
        scales: for each item, what `fpnx.visualization.color_scale.measure_scales` gave; where None, and `per_image` is
            not asked for, that is called, which reads a bounded part of the file once.
        options: the fields of `fpnx.core.config.PictureConfig`: `mode="pca"`, `overlay=True`, `colormap="magma"`, …

    Returns:
        A matplotlib figure of 100 dots an inch, drawn by Agg: `savefig` it, or let a notebook show it.

    Raises:
        FpnxError: a level, mode, channel or point that is not there.
        TypeError: an option that does not exist.
    """
    config = PictureConfig(**options)
    rows = [items] if isinstance(items, Item) else list(items)
    chosen = parse_levels(levels) if levels is not None else None
    shared: list[ColorScales | None] = list(scales) if scales is not None else [None] * len(rows)
    if scales is None and not config.per_image:
        shared = [measure_scales(item.store, config, chosen_levels(item, chosen)) for item in rows]
    with pillow_limits():
        return draw([scene_of(item) for item in rows], config, chosen, shared)


def chosen_levels(has: Any, levels: Iterable[str] | None) -> tuple[str, ...]:
    """Those of `levels` that `has.levels` has, or all.

    Raises:
        FpnxError: where it has none of them.
    """
    wanted = has.levels if levels is None else tuple(levels)
    chosen = tuple(level for level in has.levels if level in wanted)
    if not chosen:
        raise FpnxError(f"no level {', '.join(wanted)} here: there are {', '.join(has.levels)}")
    return chosen


def draw(
    scenes: Sequence[Scene],
    config: PictureConfig,
    levels: Iterable[str] | None,
    scales: Sequence[ColorScales | None],
) -> Figure:
    """The figure of one image: for each scene its source, the C levels in a row and the P levels below."""
    table = colour_table(config.colormap)
    maps = [_maps(scene, config, levels, shared) for scene, shared in zip(scenes, scales, strict=True)]
    every = [found for row in maps for found in row]
    source = next((scene.source_size for scene in scenes if not scene.missing), (1, 1))
    tile, side = tile_size(source, every, config), max((found.side for found in every), default=1)
    panel = (side * (tile[0] + BETWEEN) - BETWEEN, side * (tile[1] + BETWEEN) - BETWEEN)
    columns = sorted({level_place(found.level) for found in every})
    step = max(panel[1], LEAST_COLUMN) + GAP
    page = _Page(2 * MARGIN + (len(columns) + 1) * step - GAP)
    page.paragraph(scenes[0].path, size=15, lines=3, fontweight="bold")
    page.paragraph(f"{mode_in_words(config)} · {_scale_in_words(scales)}", lines=3)
    for scene, row_of_maps in zip(scenes, maps, strict=True):
        page.y += 8
        several = len(scenes) > 1
        page.paragraph(f"{scene.file} · {scene.about}" if several and scene.file else scene.about, lines=4)
        if scene.missing:
            page.paragraph(scene.missing, lines=2, color=DIM)
            continue
        by_kind = ([m for m in row_of_maps if (m.level[0] == "C") is tap] for tap in (True, False))
        rows = [row for row in by_kind if row]
        for row in rows:
            top = page.y + 2 * LINE + 14
            if row is rows[0]:
                _draw_source(page, scene, config, panel, (MARGIN, top), step - GAP)
            for found in row:
                left = MARGIN + (columns.index(level_place(found.level)) + 1) * step
                pixels = assembled(scene, found, tile, side, config, table)
                _draw_level(page, found, pixels, table, tile, (left, top), step - GAP)
            page.y = top + panel[0] + BAR + LINE + 8
    return page.finished()


def mode_in_words(config: PictureConfig) -> str:
    """What a cell shows."""
    if config.mode == "similarity":
        return f"similarity: cosine with the cell at {config.point}"
    if config.pick is not None:
        return f"channels {config.pick}"
    return WORDS[config.mode]


def _scale_in_words(scales: Sequence[ColorScales | None]) -> str:
    given = [shared for shared in scales if shared is not None]
    if not given:
        return "a scale of its own for each image and level"
    return f"one scale a level{' and file' if len(given) > 1 else ''}, {max(given, key=lambda s: s.total)}"


def _maps(scene: Scene, config: PictureConfig, levels: Iterable[str] | None, shared: ColorScales | None) -> list[Map]:
    if scene.missing:
        return []
    scales = shared.levels if shared is not None else {}
    return [map_of(scene, level, config, scales.get(level)) for level in chosen_levels(scene, levels)]


def _draw_source(
    page: _Page,
    scene: Scene,
    config: PictureConfig,
    panel: tuple[int, int],
    at: tuple[float, float],
    column: int,
) -> None:
    (height, width), seen = scene.source_size, scene.input_size
    note = f"model input {seen[0]}×{seen[1]}"
    page.title(at, "source", f"{height}×{width}", note, column)
    pixels = covered(scene, panel)
    if pixels is None:
        page.image(np.full((*panel, 3), 245, np.uint8), at)
        lines = fit_text(scene.photo.remark, panel[1] - 16, 11, max(1, (panel[0] - 12) // 15))
        for number, line in enumerate(lines):
            page.text(at[0] + 8, at[1] + 18 + 15 * number, line, 11, color=DIM)
        return
    mark = None
    if config.point is not None:
        x, y = config.position(scene.source_size)
        mark = (x / width * panel[1], y / height * panel[0])
    page.image(pixels, at, label="source", mark=mark)
    if scene.photo.remark:
        page.text(at[0], at[1] + panel[0] + LINE, fit_text(scene.photo.remark, column, 10.5)[0], 10.5, color=DIM)


def _draw_level(
    page: _Page,
    found: Map,
    pixels: np.ndarray,
    table: np.ndarray,
    tile: tuple[int, int],
    at: tuple[float, float],
    column: int,
) -> None:
    note = f"stride {found.stride}"
    if found.broken:
        note += f" · {found.broken} cells not finite"
    page.title(at, found.level, f"{found.shape[0]}×{found.shape[1]}", note, column)
    page.image(pixels, at, label=found.level)
    side = found.side
    for number, label in enumerate(found.labels):
        y, x = number // side * (tile[0] + BETWEEN), number % side * (tile[1] + BETWEEN)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
        page.text(at[0] + x + 3, at[1] + y + NUMBER + 2, label, NUMBER, bbox=box)
    below = at[1] + pixels.shape[0]
    if found.scale.basis is not None:
        shares = " · ".join(f"{c} {100 * s:.0f}" for c, s in zip("RGB", found.scale.basis.explained, strict=True))
        page.text(at[0], below + BAR + 8, f"{shares} %", 10.5)
        return
    width = max(pixels.shape[1], LEAST_COLUMN)
    page.image(np.broadcast_to(table[None], (1, 256, 3)), (at[0], below + 4), size=(BAR, width))
    _numbers(page, found, (at[0], below + 4 + BAR + 13), width)


def _numbers(page: _Page, found: Map, at: tuple[float, float], width: int) -> None:
    low, high = found.scale.low, found.scale.high
    if not math.isfinite(low):
        page.text(at[0], at[1], "no finite value", 10.5)
        return
    ends = [("≤ " if found.clipped[0] else "") + _number(low), ("≥ " if found.clipped[1] else "") + _number(high)]
    middle = _number((low + high) / 2)
    page.text(at[0], at[1], ends[0], 10.5)
    page.text(at[0] + width, at[1], ends[1], 10.5, ha="right")
    if text_width("".join([*ends, middle]), 10.5) < width - 30:
        page.text(at[0] + width / 2, at[1], middle, 10.5, ha="center")


def _number(value: float) -> str:
    """Three significant digits, with an exponent only where it is shorter."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def rendered(figure: Figure) -> Image.Image:
    """The pixels of a figure as a picture."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])


class _Page:
    """A figure that grows downwards, in pixels from its left top; made once its height is known."""

    def __init__(self, width: float) -> None:
        self.width, self.y = int(width), float(MARGIN)
        self._strokes: list[Callable[[Figure, int], None]] = []

    def paragraph(self, text: str, size: float = 12, lines: int = 1, **style: Any) -> None:
        """Text over the whole width, below what there is."""
        width = (self.width - 2 * MARGIN) / (BOLD if "fontweight" in style else 1)
        for line in fit_text(text, width, size, lines):
            self.y += LINE * size / 12
            self.text(MARGIN, self.y, line, size, **style)

    def title(self, at: tuple[float, float], name: str, size: str, note: str, column: int) -> None:
        """A bold name with a size beside it, and a note below, above a panel at `at`."""
        self.text(at[0], at[1] - LINE - 7, name, 13, fontweight="bold")
        self.text(at[0] + text_width(name, 13) * BOLD + 8, at[1] - LINE - 7, size, 12)
        self.text(at[0], at[1] - 7, fit_text(note, column, 10.5)[0], 10.5, color=DIM)

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        """One line with its baseline at (x, y)."""
        self._strokes.append(lambda figure, _: write(figure, x, y, text, size, **style))

    def image(
        self,
        pixels: np.ndarray,
        at: tuple[float, float],
        size: tuple[int, int] | None = None,
        label: str = "",
        mark: tuple[float, float] | None = None,
    ) -> None:
        """Pixels with their left top at `at`, one to one or at `size` (height, width); `mark` (x, y) gets a ring."""

        def stroke(figure: Figure, full: int) -> None:
            height, width = size or pixels.shape[:2]
            left, top = round(at[0]), round(at[1])
            x, y = left + SLACK, full - top - height + SLACK
            box = (x / self.width, y / full, (width - 2 * SLACK) / self.width, (height - 2 * SLACK) / full)
            axes = figure.add_axes(box, label=label, xlim=(0, width), ylim=(height, 0))
            axes.set_axis_off()
            axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="auto", origin="upper")
            if mark is not None:
                for diameter, colour in ((9, "black"), (6, "white")):
                    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": colour, "clip_on": False}
                    axes.plot([mark[0]], [mark[1]], marker="o", markersize=diameter, markeredgewidth=1.5, **ring)
                axes.set(xlim=(0, width), ylim=(height, 0))

        self._strokes.append(stroke)

    def finished(self) -> Figure:
        """The figure, as high as what is on it."""
        full = int(self.y) + MARGIN
        size = ((self.width + SLACK) / DPI, (full + SLACK) / DPI)
        figure = Picture(figsize=size, dpi=DPI, facecolor="white", edgecolor="white")
        FigureCanvasAgg(figure)
        figure.set_layout_engine("none")  # a user's own settings must not move anything
        for stroke in self._strokes:
            stroke(figure, full)
        return figure
