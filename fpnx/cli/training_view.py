"""A planned training and its result as text on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpnx.core.provenance import describe_pyramid
from fpnx.core.text import escape, plural
from fpnx.core.training_summary import TrainingSummary

if TYPE_CHECKING:
    from fpnx.training.result import TrainResult

__all__ = ["show_training", "show_training_plan"]

FAILURES_SHOWN = 20


def show_training_plan(plan: TrainingSummary) -> None:
    """Print what the labels hold, and what is going to be trained."""
    console = Console(highlight=False)
    for line in plan.label_lines:
        console.print(Text(line), soft_wrap=True)
    stored = "stored maps, the backbone is not run" if plan.stored else "images"
    table = Table.grid(padding=(0, 2))
    trained = [f"{name} {_count(part['trained'])}" for name, part in plan.parameters.items() if part["trained"]]
    frozen = [f"{name} {_count(part['frozen'])}" for name, part in plan.parameters.items() if part["frozen"]]
    before = f", {plan.epochs_before} done before" if plan.epochs_before else ""
    processes = f", {plan.processes} processes" if plan.processes > 1 else ""
    augmented = ", changed at random" if plan.augmented else ""
    rows = [
        ("source", f"{plan.source}: {stored}"),
        ("images", f"{plan.training} to train on{augmented}, {plan.validation} held out"),
        ("backbone", f"{plan.backbone}, {plan.weights.body}"),
        ("pyramid", f"{', '.join(plan.levels)}, {describe_pyramid(plan.pyramid, plan.weights)}"),
        ("recipe", plan.recipe),
        ("head", plan.head),
        ("parameters", f"{_count(plan.trained)} trained ({', '.join(trained)}); frozen: {', '.join(frozen) or 'none'}"),
        ("device", f"{plan.device}, {plan.precision}, batch {plan.batch_size}{processes}"),
        ("epochs", f"{plan.epochs}{before}, learning rate up to {plan.learning_rate:g}"),
        ("output", plan.output),
    ]
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(escape(value)))
    console.print(table)


def show_training(result: TrainResult) -> None:
    """Print the scores of the best epoch, images that were left out, and where the weights are."""
    console = Console(highlight=False)
    if result.scores is not None:
        console.print(f"scores of epoch {result.best} on {plural(result.scores.images, 'image')} held out")
        for line in result.scores.lines():
            console.print(Text(line), soft_wrap=True)
    for name, reason in list(result.failed.items())[:FAILURES_SHOWN]:
        console.print(Text(f"left out {escape(name)}: {escape(reason)}"), soft_wrap=True)
    if len(result.failed) > FAILURES_SHOWN:
        console.print(f"and {len(result.failed) - FAILURES_SHOWN} more were left out")
    console.print(
        f"{plural(len(result.epochs), 'epoch')} in {result.seconds:.1f} s, {result.images_per_second:.1f} images/s"
    )
    console.print(Text(f"weights of epoch {result.best} are in {escape(result.output)}"), soft_wrap=True)


def _count(number: int) -> str:
    """`"1.23 M"`, `"45 k"` or `"678"`."""
    if number >= 1_000_000:
        return f"{number / 1e6:.2f} M"
    return f"{number / 1e3:.0f} k" if number >= 10_000 else str(number)
