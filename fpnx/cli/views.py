"""Results as text on stdout: of extract, visualize, merge, info and verify, and the plan of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpnx.core.image_notes import note_lines
from fpnx.core.plan_summary import LevelShape, PlanSummary, RegionSummary
from fpnx.core.provenance import WeightsInfo, describe_pyramid
from fpnx.core.text import escape, format_bytes, other_files, plural

if TYPE_CHECKING:
    from fpnx.commands.merge import Merged
    from fpnx.commands.visualize import VisualizeResult
    from fpnx.extraction.run import Result
    from fpnx.prediction.run import PredictResult
    from fpnx.store.reader import Store
    from fpnx.store.verify import Verification

__all__ = [
    "show_info",
    "show_merged",
    "show_plan",
    "show_pictures",
    "show_predictions",
    "show_result",
    "show_verification",
]

SIZES_SHOWN = 3
FAILURES_SHOWN = 20
LARGE_OUTPUT = 20e9  # bytes; above it, options that need less space are shown
UNTRAINED = "P levels are a random projection of C: take --pyramid image, {taps}, or weights with a trained pyramid"


def show_result(result: Result) -> None:
    """Print the timing table, failed images with their reasons, and where the output is."""
    console = _stdout()
    if result.dry_run:
        console.print("dry run: nothing was computed or written")
        return
    _show_run(console, result)
    if result.duplicates:
        console.print(_duplicates_line(result.duplicates))
    if result.stopped:
        option = "--update" if result.plan is not None and result.plan.update is not None else "--resume"
        console.print(Text(f"stopped: {result.stopped}; what was done is kept: continue with {option}"))
    else:
        console.print(Text(f"{result.done} of {result.images} images are in {escape(result.output)}"), soft_wrap=True)


def show_predictions(result: PredictResult) -> None:
    """Print how the run went, the scores and the worst images, and where the output and the pictures are."""
    console, run = _stdout(), result.run
    if run.dry_run:
        console.print("dry run: nothing was computed or written")
        return
    _show_run(console, run)
    if run.stopped:
        console.print(Text(f"stopped: {run.stopped}; what was done is kept: continue with --resume"))
        return
    if result.scores is not None:
        console.print(f"scores of {plural(result.scores.images, 'image')}:")
        for line in result.scores.lines():
            console.print(Text(f"  {line}"), soft_wrap=True)
    if result.worst:
        console.print("worst images:")
        for each in result.worst:
            console.print(Text(f"  {escape(each.image)}: {each.errors}"), soft_wrap=True)
    what = {"detection": plural(result.found, "object"), "classification": "classes", "semantic": "masks"}[result.task]
    line = f"{what} of {run.done} of {plural(run.images, 'image')} in {escape(result.output)}"
    if result.pictures is not None:
        line += f", pictures in {escape(result.pictures)}"
    console.print(Text(line), soft_wrap=True)


def _show_run(console: Console, result: Result) -> None:
    """Print the time of each stage, and what went wrong."""
    if result.computed:
        table = Table(title=Text("time per image"), box=None, title_justify="left", pad_edge=False)
        for name, justify in (("stage", "left"), ("ms", "right"), ("share", "right")):
            table.add_column(name, justify=justify)
        total = sum(result.timings.values()) or 1.0
        for stage, milliseconds in result.timings.items():
            table.add_row(stage, f"{milliseconds:.1f}", f"{100 * milliseconds / total:.0f} %")
        console.print(table)
        console.print(
            f"{plural(result.computed, 'image')} in {result.seconds:.1f} s, {result.images_per_second:.1f} images/s "
            f"(stages overlap)"
        )
    _show_nonfinite(console, result.nonfinite, result.too_large)
    if result.too_small:
        levels = ", ".join(result.too_small)
        console.print(f"values of {levels} are too small for float16 (all below 6.1e-05): store --dtype float32")
    for line in note_lines(result.image_notes):
        console.print(Text(line), soft_wrap=True)
    _show_failures(console, result.failed)
    for line in result.lost:
        console.print(Text(line), soft_wrap=True)


def show_pictures(result: VisualizeResult) -> None:
    """Print how many pictures were drawn, where they are, and which images were skipped."""
    console = _stdout()
    for path, reason in result.skipped[:FAILURES_SHOWN]:
        console.print(Text(f"skipped {escape(path)}: {escape(reason)}"), soft_wrap=True)
    if len(result.skipped) > FAILURES_SHOWN:
        console.print(f"and {len(result.skipped) - FAILURES_SHOWN} more were skipped")
    if result.left_out:
        console.print(f"{result.left_out} more images were left out: --limit takes more, --images picks")
    if result.folder is not None:
        console.print(Text(f"pictures in {escape(result.folder)}: {len(result.pictures)}"), soft_wrap=True)
    if (page := result.page) is not None:
        of_all = f" of {page.images + page.left_out}" if page.left_out else ""
        line = f"images in {escape(page.path)}: {page.images}{of_all}, {format_bytes(page.bytes)}"
        console.print(Text(line), soft_wrap=True)
        if page.left_out:
            console.print(
                f"a page is at most {format_bytes(page.limit_bytes)}: --images takes others, fewer --levels make room "
                f"for more",
                soft_wrap=True,
            )


def show_merged(result: Merged) -> None:
    """Print how many images and files were merged, and where they are."""
    failed = f", {result.failed} of them failed" if result.failed else ""
    files = plural(result.files, "shard" if result.shards == result.files else "file")
    line = f"{plural(result.images, 'image')} of {files} are in {escape(result.output)}{failed}"
    _stdout().print(Text(f"{line} ({format_bytes(result.bytes)})"), soft_wrap=True)
    if result.repeated:
        _stdout().print(f"{plural(result.repeated, 'image')} in several files, taken once")


def show_info(store: Store) -> None:
    """Print what a file holds, and Python code that reads it."""
    from fpnx.store.info import level_shapes, reading_snippet, store_facts  # loads h5py

    console, provenance = _stdout(), store.provenance
    facts = store_facts(store)
    counts = facts["images"]
    _show_rows(
        console,
        ("file", f"{escape(store.path)}{'' if store.complete else ' (unfinished)'}"),
        ("images", f"{counts['done']} done, {counts['failed']} failed, {counts['pending']} pending"),
        *([("duplicates", _duplicates_line(facts["duplicates"]))] if facts["duplicates"] else []),
        *([("shard", str(store.shard_slice))] if store.shard_slice else []),
        *([("shards", str(facts["shards"]))] if facts["shards"] else []),
        *([("files", str(facts["files"]))] if facts["files"] > facts["shards"] else []),
        ("root", escape(store.root)),
        ("backbone", f"{store.config['backbone']}, {provenance.weights.body}"),
        ("pyramid", f"{', '.join(store.levels)}, {describe_pyramid(store.pyramid, provenance.weights)}"),
        *_checkpoint(provenance.weights),
        ("recipe", provenance.recipe),
        *([("regions", _regions_line(store.regions.summary()))] if store.has_regions else []),
        ("stored as", f"{store.config['dtype']}{'' if store.has_regions else ', pool ' + store.config['pool']}"),
        ("computed in", f"{provenance.precision} on {provenance.device}"),
        ("made by", ", ".join(f"{k} {v}" for k, v in provenance.versions.items())),
        ("started", provenance.time),
    )
    if not store.has_regions:
        _show_levels(console, level_shapes(store))
    _show_failures(console, store.failures())
    _show_nonfinite(console, store.nonfinite_by_level(), facts["too_large"])
    console.print("\nread them as one:\n" if facts["files"] else "\nread it with h5py alone:\n")
    console.print(Text(reading_snippet(store)), soft_wrap=True)


def show_verification(result: Verification) -> None:
    """Print what was checked, and the problems."""
    console = _stdout()
    console.print(Text(f"{escape(result.file)}: {result.done} done, {result.failed} failed, {result.pending} pending"))
    files = f" in {plural(result.files, 'shard' if result.shards == result.files else 'file')}" if result.files else ""
    console.print(f"{result.values} values read{files}", end="")
    if result.hashed:
        console.print(f", bytes of {plural(result.hashed, 'image')} compared", end="")
    if result.compared:
        console.print(
            f", {result.compared} images computed again, largest difference {result.largest_difference:.1g}", end=""
        )
    console.print()
    for problem in result.problems[:FAILURES_SHOWN]:
        console.print(Text(f"  {problem}"), soft_wrap=True)
    if len(result.problems) > FAILURES_SHOWN:
        console.print(f"  and {len(result.problems) - FAILURES_SHOWN} more: --json lists them all")
    if result.problems:
        console.print("does not verify")
    elif result.compared:
        console.print("verified: complete, finite as counted, and the same when computed again")
    else:
        console.print(
            "verified: complete, finite as counted; values not compared (--against IMAGES does)", soft_wrap=True
        )


def show_plan(plan: PlanSummary) -> None:
    """Print what a run is going to do: images, model, device, output, and the shapes of the levels."""
    console, config, weights = _stdout(), plan.config, plan.weights
    skipped = f", {other_files(plan.skipped)}" if plan.skipped else ""
    before = f", {plan.done_before} done before" if plan.done_before else ""
    batch = f"batch {plan.batch_size or 'auto'}, {plan.workers} decoding threads"
    predicts = plan.head is not None
    engine = f"{config.engine}: shards {config.shards}, actors {config.actors}, processors of each {config.cpus}"
    pyramid = "none asked for"
    if plan.has_pyramid:
        pyramid = f"{', '.join(plan.level_names)}, {describe_pyramid(plan.pyramid, weights)}"
        if plan.work != 1:
            pyramid += f", {plan.work:g} times the work of one pass"
    rows = [
        ("images", f"{plan.images} in {escape(plan.root)}{skipped}{before}"),
        *([("update", ", ".join(f"{count} {what}" for what, count in plan.update.items()))] if plan.update else []),
        *([("shard", str(plan.shard))] if plan.shard else []),
        ("backbone", f"{plan.backbone}, {weights.body}"),
        *([] if predicts and weights.pyramid.trained is False else [("pyramid", pyramid)]),
        *([("head", str(plan.head))] if predicts else []),
        *_checkpoint(weights, predicts),
        *([("regions", _regions_line(plan.regions))] if plan.regions else []),
        ("recipe", plan.recipe_text),
        *([("engine", engine)] if config.engine != "local" else []),
        ("device", f"{','.join(plan.devices)}, {plan.precision}, {batch}"),
        ("output", escape(plan.output) if predicts else _output_line(plan)),
        *([("scratch", f"{escape(plan.scratch)}: written there, then uploaded")] if plan.scratch else []),
    ]
    _show_rows(console, *rows)
    if predicts:
        return
    if plan.has_pyramid and weights.pyramid.trained is False:
        named = f" (--weights {plan.trained_pyramid})" if plan.trained_pyramid else ""
        taps = "its map as a C level" if plan.pyramid == "simple" else "--levels C2-C5"
        console.print(f"note: {UNTRAINED.format(taps=taps)}{named}", soft_wrap=True)
    if plan.bytes_needed > LARGE_OUTPUT and config.format != "png":
        console.print(_smaller_outputs(plan), soft_wrap=True)
    if plan.regions is None:
        _show_levels(console, plan.levels)


def _regions_line(regions: RegionSummary) -> str:
    """Number, shape and size of the features of boxes."""
    shape = f"{regions.channels}×{regions.height}×{regions.width}"
    counts = f"{plural(regions.count, 'region')} in {plural(regions.images, 'image')}"
    return f"{counts}, {shape} each, {format_bytes(regions.bytes_per_region)}"


def _duplicates_line(count: int) -> str:
    """How many images are there more than once."""
    return f"{plural(count, 'image')} with the same bytes as another one"


def _output_line(plan: PlanSummary) -> str:
    """The output, how it is stored, and the space it needs."""
    config = plan.config
    if config.format == "png":
        return f"{escape(plan.output)}, a picture an image, {config.mode}"
    pool = "" if config.pool == "none" else f", pool {config.pool}"
    needed = (
        f"{format_bytes(plan.bytes_needed)} needed, " if plan.levels else ""
    )  # with an engine, the workers read the sizes
    free = "free space unknown" if plan.bytes_free is None else f"{format_bytes(plan.bytes_free)} free"
    return f"{escape(plan.output)}, {config.dtype}{pool}, {needed}{free}"


def _smaller_outputs(plan: PlanSummary) -> str:
    """Options with which the output is smaller, and its size with each."""
    item_bytes = 2 if plan.config.dtype == "float16" else 4
    if plan.regions is not None:
        half = plan.feature_bytes * 2 // item_bytes
        vectors = plan.regions.count * plan.regions.channels * item_bytes
        return f"smaller: --dtype float16 {format_bytes(half)}, --roi-size avg {format_bytes(vectors)}"
    pooled = sum(shape.images * shape.channels for shape in plan.levels) * item_bytes
    half = plan.feature_bytes // 2 if item_bytes == 4 else plan.feature_bytes
    grid, vector = format_bytes(49 * pooled), format_bytes(pooled)
    return f"smaller: --dtype float16 {format_bytes(half)}, --pool 7x7 {grid}, --pool avg {vector}"


def _show_levels(console: Console, levels: Sequence[LevelShape]) -> None:
    """Print the shapes of the levels, for the most frequent input sizes."""
    images = {shape.input_size: shape.images for shape in levels}
    shown = sorted(images, key=lambda size: -images[size])[:SIZES_SHOWN]
    table = Table(box=None, pad_edge=False)
    columns = ["level", "stride", "channels", "height × width", "MB per image"]
    if len(images) > 1:
        columns = ["input", "images", *columns]
    for name in columns:
        table.add_column(name, justify="left" if name in ("level", "input") else "right")
    for shape in levels:
        if shape.input_size not in shown:
            continue
        cells = [
            shape.level,
            str(shape.stride),
            str(shape.channels),
            f"{shape.height} × {shape.width}",
            f"{shape.bytes_per_image / 1e6:.{3 if shape.bytes_per_image >= 1000 else 6}f}",
        ]
        if len(images) > 1:
            cells = [f"{shape.input_size[0]}×{shape.input_size[1]}", str(shape.images), *cells]
        table.add_row(*cells)
    console.print(table)
    if len(images) > SIZES_SHOWN:
        console.print(f"and {plural(len(images) - SIZES_SHOWN, 'other input size')}")


def _show_failures(console: Console, failures: Iterable[tuple[str, str]]) -> None:
    failed = list(failures)
    if not failed:
        return
    console.print(f"{plural(len(failed), 'image')} failed:")
    for path, reason in failed[:FAILURES_SHOWN]:
        console.print(Text(f"  {escape(path)}: {escape(reason)}"), soft_wrap=True)
    if len(failed) > FAILURES_SHOWN:
        console.print(f"  and {len(failed) - FAILURES_SHOWN} more: fpnx info --json lists them all")


def _show_rows(console: Console, *rows: tuple[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(escape(value)))
    console.print(table)


def _checkpoint(weights: WeightsInfo, predicts: bool = False) -> list[tuple[str, str]]:
    """Rows about a file of parameters: its layout, and the settings that the file itself does not hold."""
    if not weights.layout:
        return []
    settings: dict[str, list[str]] = {}
    for name, (value, decided_by) in weights.settings.items():
        if value is None:  # such as a norm's epsilon: as the network has it
            continue
        text = " ".join(f"{v:g}" for v in value) if isinstance(value, (list, tuple)) else str(value)
        settings.setdefault(decided_by, []).append(f"{name.replace('_', ' ')} {text}")
    where = [f"{name} {value}" for name, value in (("key", weights.key), ("prefix", weights.prefix)) if value]
    others = "other tensors" if weights.prefix else "tensors of heads"
    ignored = [f"{weights.heads_ignored} {others} ignored"] if weights.heads_ignored or not predicts else []
    rows = [("layout", ", ".join([weights.layout, *where, *ignored]))]
    rows += [(f"by {source}", ", ".join(settings[source])) for source in settings if source in ("default", "option")]
    return rows + ([("note", weights.note)] if weights.note else [])


def _show_nonfinite(console: Console, counts: Mapping[str, int], too_large: Sequence[str]) -> None:
    """Print how many values of each level are NaN or infinite, if there are any, and whether float16 is the reason."""
    nonfinite = [f"{count} in {level}" for level, count in counts.items() if count]
    if nonfinite:
        console.print(f"NaN or infinite values: {', '.join(nonfinite)}")
    if too_large:
        levels = ", ".join(too_large)
        console.print(f"values of {levels} are beyond float16's ±65504 and stored as inf: store --dtype float32")


def _stdout() -> Console:
    return Console(highlight=False)
