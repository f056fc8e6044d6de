"""Pictures of a comparison and of a probe."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fpnx.analysis.comparison import Comparison
from fpnx.analysis.probing import Probe, ProbeRow
from fpnx.core.files import atomic_write
from fpnx.core.text import escape

__all__ = ["draw_comparison", "draw_probe"]

CELL = 0.55  # inches
DARK_BELOW = 0.6  # of the colour scale, on which white is easier to read


def draw_comparison(result: Comparison, path: Path) -> None:
    """Write the matrices of CKA and RSA, side by side, to `path` (PNG, SVG or PDF).

    Raises:
        FpnxError: where the file cannot be written.
    """
    rows, columns = map(len, result.levels)
    width, height = max(2.2, CELL * columns), max(1.6, CELL * rows)
    figure = Figure(figsize=(2 * width + 3.2, height + 1.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _matrix(left, result.cka, result, f"linear CKA, {result.images} images")
    image = _matrix(right, result.rsa, result, f"RSA, Spearman, {result.rsa_images} images")
    left.set_ylabel(_short(result.files[0]))
    left.set_xlabel(_short(result.files[1]))
    right.set_xlabel(_short(result.files[1]))
    figure.colorbar(image, ax=[left, right], shrink=0.9)
    with atomic_write(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower())


def draw_probe(result: Probe, path: Path) -> None:
    """Write a chart of the accuracies to `path` (PNG, SVG or PDF): a dot with its 95 % interval for each level.

    Raises:
        FpnxError: where the file cannot be written.
    """
    names = list(dict.fromkeys(row.name for row in result.rows))
    figure = Figure(
        figsize=(9, 1.7 + 0.3 * len(names) * (0.6 + 0.4 * len(result.files))), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("linear classifier", f"{result.neighbors} nearest neighbours")
    for axes, title, method in zip(panels, titles, ("linear", "neighbors"), strict=True):
        for number, file in enumerate(result.files):
            rows = [row for row in result.rows if row.file == number]
            _dots(axes, rows, method, names, number, len(result.files), _short(file))
        axes.axvline(result.most_frequent, color="0.5", lw=1, ls=":")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("accuracy, with 95 % interval")
        axes.set_xlim(0, 1)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    what = f"{result.samples} {result.kind}" + (f" in {result.images} images" if result.kind != "images" else "")
    figure.suptitle(f"{what}, {len(result.classes)} classes; dotted: the most frequent class", fontsize=10)
    with atomic_write(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower())


def _dots(
    axes: Axes, rows: Sequence[ProbeRow], method: str, names: Sequence[str], number: int, files: int, label: str
) -> None:
    """The accuracies of one file; those of several files stand one below the other."""
    scores = [getattr(row, method) for row in rows]
    places = [names.index(row.name) + (number - (files - 1) / 2) * 0.7 / files for row in rows]
    spans = [[score.share - score.low for score in scores], [score.high - score.share for score in scores]]
    shares = [score.share for score in scores]
    axes.errorbar(shares, places, xerr=spans, fmt="o", ms=4, capsize=2, lw=1.2, color=f"C{number % 10}", label=label)


def _matrix(axes: Axes, values: np.ndarray, result: Comparison, title: str) -> object:
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(result.levels[1])), result.levels[1])
    axes.set_yticks(range(len(result.levels[0])), result.levels[0])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        text = "–" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"
        color = "white" if value < DARK_BELOW else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return image


def _short(path: str) -> str:
    """The last part of a path, without signs that matplotlib would read as formulas."""
    return escape(os.path.basename(path)).replace("$", r"\$")[:60]
