"""One picture of a benchmark: the stages of each configuration, stacked."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fpnx.benchmark.case import AFTER, BEFORE
from fpnx.benchmark.results import BenchmarkResult
from fpnx.benchmark.timers import percentiles
from fpnx.core.errors import FpnxError
from fpnx.core.text import escape

__all__ = ["draw_stages"]

FAMILIES = (("C", "Blues"), ("lateral", "Oranges"), ("output", "Greens"), ("top", "Reds"))


def draw_stages(findings: BenchmarkResult, path: str) -> None:
    """Write a bar for each configuration to `path` (PNG, SVG or PDF): median milliseconds per image by stage, and
    a line where a whole run, in which stages overlap, gets to.

    Raises:
        FpnxError: where there is nothing to draw, or the file cannot be written.
    """
    columns = [column for column in findings.columns if column.stages or column.forward]
    if not columns:
        raise FpnxError(f"plot {escape(path)}: nothing was measured that could be drawn")
    figure = Figure(figsize=(11, 1.9 + 0.75 * len(columns)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    stages = list(dict.fromkeys(stage for column in columns for stage in column.stages))
    colours = _colours(stages)
    left = [0.0] * len(columns)
    for stage in stages:
        widths = [percentiles(c.stages[stage]).median if stage in c.stages else 0.0 for c in columns]
        axes.barh(range(len(columns)), widths, left=left, height=0.6, color=colours[stage], label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    plain = [i for i, column in enumerate(columns) if not column.stages]
    if plain:
        widths = [percentiles(columns[i].forward).median for i in plain]
        axes.barh(plain, widths, height=0.6, color="none", edgecolor="0.4", hatch="//", label="forward pass as one")
    for i, column in enumerate(columns):
        if column.end_to_end:
            ms = 1000 / percentiles(column.end_to_end).median
            axes.plot([ms, ms], [i - 0.4, i + 0.4], color="black", lw=2, label=None if i else "files to file")
    axes.set_yticks(range(len(columns)), [column.name.replace(" batch", "\nbatch") for column in columns])
    axes.invert_yaxis()
    axes.set_xlabel("ms per image (median); stages one after the other")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    height, width = columns[0].size
    axes.set_title(f"fpnx benchmark, {height}×{width}, {findings.machine['device']}", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    try:
        figure.savefig(path)
    except OSError as error:
        raise FpnxError(f"plot {escape(path)}: {error.strerror}") from error


def _colours(stages: list[str]) -> dict[str, tuple[float, float, float, float]]:
    """A colour for each stage: one family for each part of the network, greys and purples around it."""
    families = {stage: "Greys" if stage in BEFORE else "Purples" for stage in stages if stage in (*BEFORE, *AFTER)}
    for stage in stages:
        if stage not in families:
            families[stage] = next(name for start, name in FAMILIES if stage.startswith(start))
    colours = {}
    for family in set(families.values()):
        members = [stage for stage in stages if families[stage] == family]
        for i, stage in enumerate(members):
            colours[stage] = colormaps[family](0.4 + 0.45 * (i + 0.5) / len(members))
    return colours
