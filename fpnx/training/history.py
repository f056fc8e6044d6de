"""The log of a training, a JSON line for each epoch, and its plot."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from fpnx.core.errors import FpnxError
from fpnx.core.files import replace_file
from fpnx.core.text import escape
from fpnx.training.loop import Epoch

__all__ = ["draw_history", "write_log"]

MOST_SCORES = 6  # scores of the plot, the first ones


def write_log(path: str, epochs: Sequence[Epoch]) -> None:
    """Write one JSON object on a line for each epoch; the file is replaced, and is whole at any moment.

    Raises:
        FpnxError: where it cannot be written.
    """
    try:
        replace_file(Path(path), [json.dumps(each.to_json()).encode() + b"\n" for each in epochs])
    except OSError as error:
        raise FpnxError(f"log {escape(path)}: {error.strerror or error}") from error


def draw_history(path: str, epochs: Sequence[Epoch]) -> None:
    """Draw losses and scores over epochs into a PNG, SVG or PDF.

    Raises:
        FpnxError: where it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = [each.number for each in epochs]
    scored = [each for each in epochs if each.scores]
    known = [
        name for name in (scored[0].scores if scored else {}) if any(each.scores[name] is not None for each in scored)
    ]
    names = [name for name in known if _is_shown(name)][:MOST_SCORES]
    figure = Figure(figsize=(5.5 * (2 if names else 1), 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
    for name in epochs[0].losses if epochs else {}:
        panels[0].plot(numbers, [each.losses.get(name, 0.0) for each in epochs], marker=".", label=name)
    panels[0].set_title("loss", loc="left")
    for name in names:
        values = [each.scores[name] for each in scored]
        values = [float("nan") if value is None else value for value in values]
        panels[1].plot([each.number for each in scored], values, marker=".", label=name)
    if names:
        panels[1].set_title("scores on the images held out", loc="left")
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(0, 1.05 * panel.dataLim.y1 if panel.dataLim.y1 > 0 else 1)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=os.path.splitext(path)[1][1:].lower())
    try:
        replace_file(Path(path), [drawn.getvalue()])
    except OSError as error:
        raise FpnxError(f"plot {escape(path)}: {error.strerror or error}") from error


def _is_shown(name: str) -> bool:
    return not name.endswith(("ARs", "ARm", "ARl", "AR1", "AR10"))
