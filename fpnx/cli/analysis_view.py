"""Results of compare, export and probe as text on stdout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpnx.core.text import escape, format_bytes, plural

if TYPE_CHECKING:
    import numpy as np

    from fpnx.analysis.comparison import Comparison
    from fpnx.analysis.export import Exported
    from fpnx.analysis.probing import Accuracy, Probe, ProbeRow

__all__ = ["show_comparison", "show_exported", "show_probe"]

CANNOT_HOLD = {  # why a name is another one in an export
    "npy": "are not UTF-8, or hold control characters",
    "safetensors": "are not UTF-8, hold control characters, are too long, or equal but for case",
    "hloc": "hold spaces, are not UTF-8, or are no plain paths: hloc finds these images only under the new names",
}


def show_comparison(result: Comparison) -> None:
    """Print the matrices, what they are of, and which images were left out."""
    console = _stdout()
    first, second = (escape(path) for path in result.files)
    places = "rows and columns" if first == second else "rows"
    console.print(Text(f"{places}: {first}"), soft_wrap=True)
    if first != second:
        console.print(Text(f"columns: {second}"), soft_wrap=True)
    _show_matrix(console, f"linear CKA (unbiased), {plural(result.images, 'image')}", result.cka, result)
    drawn = f" of {result.images}, seed {result.seed}" if result.rsa_images < result.images else ""
    title = f"RSA (Spearman, Euclidean distances), {plural(result.rsa_images, 'image')}{drawn}"
    _show_matrix(console, title, result.rsa, result)
    for path, levels in dict(zip(result.files, result.constant, strict=True)).items():
        if levels:
            console.print(Text(f"–: vectors of {', '.join(levels)} of {escape(path)} are the same for all images"))
    if any(result.unmatched):
        console.print(
            f"in one file only: {result.unmatched[0]} images of the first, {result.unmatched[1]} of the second"
        )
    if result.nonfinite:
        console.print(f"left out: {plural(result.nonfinite, 'image')} with NaN or infinite values")


def show_exported(result: Exported) -> None:
    """Print what was written, and which images have other names or no features."""
    console = _stdout()
    levels = ", ".join(f"{level} {channels}" for level, channels in result.levels.items())
    where = f"{escape(result.folder)} ({format_bytes(result.bytes)})"
    console.print(Text(f"{plural(result.images, 'image')} in {where}, channels: {levels}"), soft_wrap=True)
    if result.left_out:
        console.print(f"left out: {plural(result.left_out, 'image')} without features, failed or pending")
    if result.nonfinite:
        console.print(f"NaN or infinite values are in {plural(result.nonfinite, 'image')}, and written as they are")
    if result.renamed:
        new, old = next(iter(result.renamed.items()))
        line = (
            f"{plural(len(result.renamed), 'name')} changed, as they {CANNOT_HOLD[result.to]}: {escape(old)} is {new}"
        )
        others = "; export.json has all" if len(result.renamed) > 1 else ""
        console.print(Text(line + others), soft_wrap=True)


def show_probe(result: Probe) -> None:
    """Print the accuracies of all levels, and what was left out."""
    console = _stdout()
    for note in result.notes:
        console.print(Text(note), soft_wrap=True)
    where = "" if result.kind == "images" else f" in {plural(result.images, 'image')}"
    what = f"{result.samples} {result.kind}{where}, {len(result.classes)} classes, {result.folds} folds"
    console.print(f"{what}; the most frequent class has {_share(result.most_frequent)} of them", soft_wrap=True)
    for number, path in enumerate(result.files):
        console.print(Text(escape(path)), soft_wrap=True)
        _show_accuracies(console, result, [row for row in result.rows if row.file == number])
    asked = result.rows[0].neighbors.samples
    if asked < result.samples:
        console.print(f"nearest neighbours are measured on {asked} of these, drawn with seed {result.seed}")


def _show_accuracies(console: Console, result: Probe, rows: Sequence[ProbeRow]) -> None:
    """Print the rows of one file: for boxes the linear accuracy by size too, for pixels its mean over classes."""
    sizes = list(rows[0].linear.by_size)
    balanced = ["balanced"] if result.kind == "pixels" else []
    table = Table(box=None, pad_edge=False)
    table.add_column("level", no_wrap=True)
    for name in ("width", "linear", "95 %", *sizes, *balanced, f"{result.neighbors} nearest", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        parts = [_share(row.linear.by_size[name]) for name in sizes]
        parts += [_share(row.linear.balanced) for _ in balanced]
        table.add_row(row.name, str(row.channels), *_shares(row.linear), *parts, *_shares(row.neighbors))
    console.print(table)


def _shares(accuracy: Accuracy) -> tuple[str, str]:
    return _share(accuracy.share), f"{_share(accuracy.low)}–{_share(accuracy.high)}"


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.2f}"


def _show_matrix(console: Console, title: str, matrix: np.ndarray, result: Comparison) -> None:
    console.print(Text(title), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name in ("", *result.levels[1]):
        table.add_column(name, justify="right" if name else "left")
    for level, values in zip(result.levels[0], matrix.tolist(), strict=True):
        table.add_row(level, *("–" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}" for value in values))
    console.print(table)


def _stdout() -> Console:
    return Console(highlight=False)
