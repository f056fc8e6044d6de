"""Bar chart of a benchmark: the stages of each configuration, stacked."""

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

COLORMAPS = (("C", "Blues"), ("lateral", "Oranges"), ("output", "Greens"), ("top", "Reds"))


def draw_stages(result: BenchmarkResult, path: str) -> None:
    """Write a bar chart to `path` (PNG, SVG or PDF): one bar of median milliseconds per image by stage for each case.

    A black line marks the end-to-end time per image, which is shorter where stages overlap.

    Raises:
        FpnxError: where nothing was measured, or the file cannot be written.
    """
    cases = [case for case in result.cases if case.stages or case.forward]
    if not cases:
        raise FpnxError(f"plot {escape(path)}: nothing was measured that could be drawn")
    figure = Figure(figsize=(11, 1.9 + 0.75 * len(cases)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    stages = list(dict.fromkeys(stage for case in cases for stage in case.stages))
    colours = _colours(stages)
    left = [0.0] * len(cases)
    for stage in stages:
        widths = [percentiles(c.stages[stage]).median if stage in c.stages else 0.0 for c in cases]
        axes.barh(range(len(cases)), widths, left=left, height=0.6, color=colours[stage], label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    unstaged = [i for i, case in enumerate(cases) if not case.stages]
    if unstaged:
        widths = [percentiles(cases[i].forward).median for i in unstaged]
        axes.barh(unstaged, widths, height=0.6, color="none", edgecolor="0.4", hatch="//", label="forward pass as one")
    for i, case in enumerate(cases):
        if case.end_to_end:
            ms = 1000 / percentiles(case.end_to_end).median
            axes.plot([ms, ms], [i - 0.4, i + 0.4], color="black", lw=2, label=None if i else "files to file")
    axes.set_yticks(range(len(cases)), [case.name.replace(" batch", "\nbatch") for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("ms per image (median); stages one after the other")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    height, width = cases[0].size
    axes.set_title(f"fpnx benchmark, {height}×{width}, {result.machine['device']}", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    try:
        figure.savefig(path)
    except OSError as error:
        raise FpnxError(f"plot {escape(path)}: {error.strerror}") from error


def _colours(stages: list[str]) -> dict[str, tuple[float, float, float, float]]:
    """A colour for each stage: shades of one colour map for each part of the pipeline."""
    colormap_names = {stage: "Greys" for stage in stages if stage in BEFORE}
    colormap_names |= {stage: "Purples" for stage in stages if stage in AFTER}
    for stage in stages:
        if stage not in colormap_names:
            colormap_names[stage] = next(name for prefix, name in COLORMAPS if stage.startswith(prefix))
    colours = {}
    for name in set(colormap_names.values()):
        members = [stage for stage in stages if colormap_names[stage] == name]
        for i, stage in enumerate(members):
            colours[stage] = colormaps[name](0.4 + 0.45 * (i + 0.5) / len(members))
    return colours
