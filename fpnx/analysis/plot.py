"""Pictures of a comparison."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fpnx.analysis.comparison import Comparison
from fpnx.core.files import atomic_write
from fpnx.core.text import escape

__all__ = ["draw_comparison"]

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
