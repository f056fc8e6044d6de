"""Everything that people see: results to stdout, progress and messages to stderr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpnx.core.plan_summary import LevelShape, PlanSummary
from fpnx.core.text import escape, format_bytes, plural

if TYPE_CHECKING:
    from fpnx.commands.merge import Merged
    from fpnx.commands.visualize import VisualizeResult
    from fpnx.core.provenance import WeightsInfo
    from fpnx.extraction.run import Result
    from fpnx.store.reader import Store
    from fpnx.store.verify import Verification

__all__ = [
    "show_info",
    "show_merged",
    "show_plan",
    "show_pictures",
    "show_result",
    "show_verification",
    "show_details",
    "show_overview",
]

SIZES_SHOWN = 3
FAILURES_SHOWN = 20
LARGE = 20e9  # bytes of output above which smaller ways are worth a line
UNTRAINED = "P levels are a random projection of C: store C levels, or use trained weights"


def show_result(result: Result) -> None:
    """The timing table, failed images with their reasons, and where the output is."""
    console = _stdout()
    if result.dry_run:
        console.print("dry run: nothing was computed or written")
        return
    if result.computed:
        table = Table(title=Text("time per image"), box=None, title_justify="left", pad_edge=False)
        for name, justify in (("stage", "left"), ("ms", "right"), ("share", "right")):
            table.add_column(name, justify=justify)
        total = sum(result.timings.values()) or 1.0
        for stage, spent in result.timings.items():
            table.add_row(stage, f"{spent:.1f}", f"{100 * spent / total:.0f} %")
        console.print(table)
        console.print(
            f"{plural(result.computed, 'image')} in {result.seconds:.1f} s, {result.images_per_second:.1f} images/s "
            f"(stages overlap)"
        )
    bad = {level: count for level, count in result.nonfinite.items() if count}
    if bad:
        console.print(f"NaN or infinite values: {', '.join(f'{n} in {level}' for level, n in bad.items())}")
    if result.too_small:
        levels = ", ".join(result.too_small)
        console.print(f"values of {levels} are too small for float16 (all below 6.1e-05): store --dtype float32")
    _show_failures(console, result.failed)
    for line in result.lost:
        console.print(Text(line), soft_wrap=True)
    if result.stopped:
        console.print(Text(f"stopped: {result.stopped}; what was done is kept: continue with --resume"))
    else:
        console.print(Text(f"{result.done} of {result.images} images are in {escape(result.output)}"), soft_wrap=True)


def show_pictures(result: VisualizeResult) -> None:
    """How many pictures were drawn, where they are, and what is not among them."""
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
        room = f"; {page.left_out} found no room in {format_bytes(page.limit_bytes)}" if page.left_out else ""
        line = f"images in {escape(page.path)}: {page.images}, {format_bytes(page.bytes)}{room}"
        console.print(Text(line), soft_wrap=True)


def show_merged(result: Merged) -> None:
    """What was merged, and where it is."""
    failed = f", {result.failed} of them failed" if result.failed else ""
    line = f"{result.images} images of {result.shards} shards are in {escape(result.output)}{failed}"
    _stdout().print(Text(f"{line} ({format_bytes(result.bytes)})"), soft_wrap=True)


def show_info(store: Store) -> None:
    """What a file holds, and a snippet that reads it."""
    from fpnx.store.info import level_shapes, reading_snippet, store_facts  # loads h5py

    console, origin = _stdout(), store.provenance
    facts = store_facts(store)
    counts = facts["images"]
    _facts(
        console,
        ("file", f"{escape(store.path)}{'' if store.complete else ' (unfinished)'}"),
        ("images", f"{counts['done']} done, {counts['failed']} failed, {counts['pending']} pending"),
        *([("shard", str(store.shard_slice))] if store.shard_slice else []),
        *([("shards", str(facts["shards"]))] if facts["shards"] else []),
        ("root", escape(store.root)),
        ("backbone", f"{store.config['backbone']}, {origin.weights.body}"),
        ("pyramid", f"{', '.join(store.levels)}, {origin.weights.pyramid}"),
        *_checkpoint(origin.weights),
        ("recipe", origin.recipe),
        ("stored as", f"{store.config['dtype']}, pool {store.config['pool']}"),
        ("computed in", f"{origin.precision} on {origin.device}"),
        ("made by", ", ".join(f"{k} {v}" for k, v in origin.versions.items())),
        ("started", origin.time),
    )
    _show_levels(console, level_shapes(store))
    _show_failures(console, store.failures())
    bad = {level: count for level, count in store.nonfinite_by_level().items() if count}
    if bad:
        console.print(f"NaN or infinite values: {', '.join(f'{n} in {level}' for level, n in bad.items())}")
    console.print("\nread them as one:\n" if facts["shards"] else "\nread it with h5py alone:\n")
    console.print(Text(reading_snippet(store)), soft_wrap=True)


def show_verification(found: Verification) -> None:
    """What was looked at, and what is wrong."""
    console = _stdout()
    console.print(Text(f"{escape(found.file)}: {found.done} done, {found.failed} failed, {found.pending} pending"))
    shards = f" in {found.shards} shards" if found.shards else ""
    console.print(f"{found.values} values read{shards}", end="")
    if found.compared:
        console.print(
            f", {found.compared} images computed again, largest difference {found.largest_difference:.1g}", end=""
        )
    console.print()
    for problem in found.problems[:FAILURES_SHOWN]:
        console.print(Text(f"  {problem}"), soft_wrap=True)
    if len(found.problems) > FAILURES_SHOWN:
        console.print(f"  and {len(found.problems) - FAILURES_SHOWN} more: --json lists them all")
    if found.problems:
        console.print("does not verify")
    elif found.compared:
        console.print("verified: whole, finite as counted, and the same when computed again")
    else:
        console.print("verified: whole, finite as counted; values not compared (--against IMAGES does)")


def show_plan(plan: PlanSummary) -> None:
    console, config, weights = _stdout(), plan.config, plan.weights
    passed = f", {plural(plan.skipped, 'other file')} passed over" if plan.skipped else ""
    before = f", {plan.done_before} done before" if plan.done_before else ""
    batch = f"batch {plan.batch_size or 'auto'}, {plan.workers} decoding threads"
    engine = f"{config.engine}: shards {config.shards}, actors {config.actors}, processors of each {config.cpus}"
    pyramid = f"{', '.join(plan.level_names)}, {weights.pyramid}" if plan.has_pyramid else "none asked for"
    rows = [
        ("images", f"{plan.images} in {escape(plan.root)}{passed}{before}"),
        *([("shard", str(plan.shard))] if plan.shard else []),
        ("backbone", f"{plan.backbone}, {weights.body}"),
        ("pyramid", pyramid),
        *_checkpoint(weights),
        ("recipe", plan.recipe_text),
        *([("engine", engine)] if config.engine != "local" else []),
        ("device", f"{','.join(plan.devices)}, {plan.precision}, {batch}"),
        ("output", _output_line(plan)),
        *([("scratch", f"{escape(plan.scratch)}: worked on there, then sent whole")] if plan.scratch else []),
    ]
    _facts(console, *rows)
    if plan.has_pyramid and weights.pyramid.trained is False:
        console.print(f"note: {UNTRAINED}", soft_wrap=True)
    if plan.bytes_needed > LARGE and config.format != "png":
        console.print(_smaller_ways(plan), soft_wrap=True)
    _show_levels(console, plan.levels)


def _output_line(plan: PlanSummary) -> str:
    """What is made, in which form, and whether there is room for it."""
    config = plan.config
    if config.format == "png":
        return f"{escape(plan.output)}, a picture an image, {config.mode}"
    pool = "" if config.pool == "none" else f", pool {config.pool}"
    needed = f"{format_bytes(plan.bytes_needed)} needed, " if plan.levels else ""  # else workers look at sizes
    free = "free space unknown" if plan.bytes_free is None else f"{format_bytes(plan.bytes_free)} free"
    return f"{escape(plan.output)}, {config.dtype}{pool}, {needed}{free}"


def _smaller_ways(plan: PlanSummary) -> str:
    item = 2 if plan.config.dtype == "float16" else 4
    pooled = sum(shape.images * shape.channels for shape in plan.levels) * item
    half = plan.feature_bytes // 2 if item == 4 else plan.feature_bytes
    grid, vector = format_bytes(49 * pooled), format_bytes(pooled)
    return f"smaller: --dtype float16 {format_bytes(half)}, --pool 7x7 {grid}, --pool avg {vector}"


def _show_levels(console: Console, levels: Sequence[LevelShape]) -> None:
    images = {shape.input_size: shape.images for shape in levels}
    by_count = sorted(images, key=lambda size: -images[size])
    chosen = set(by_count[:SIZES_SHOWN])
    table = Table(box=None, pad_edge=False)
    columns = ["level", "stride", "channels", "height × width", "MB per image"]
    if len(images) > 1:
        columns = ["input", "images", *columns]
    for name in columns:
        table.add_column(name, justify="left" if name in ("level", "input") else "right")
    for shape in levels:
        if shape.input_size not in chosen:
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


def _facts(console: Console, *rows: tuple[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(escape(value)))
    console.print(table)


def _checkpoint(weights: WeightsInfo) -> list[tuple[str, str]]:
    """Rows on a file of parameters: whose layout it has, and what is not in the file itself."""
    if not weights.layout:
        return []
    told: dict[str, list[str]] = {}
    for name, (value, by) in weights.settings.items():
        text = " ".join(f"{v:g}" for v in value) if isinstance(value, (list, tuple)) else str(value)
        told.setdefault(by, []).append(f"{name.replace('_', ' ')} {text}")
    rows = [("layout", f"{weights.layout}, {weights.heads_ignored} tensors of heads ignored")]
    rows += [(f"by {who}", ", ".join(facts)) for who, facts in told.items() if who in ("default", "option")]
    return rows + ([("note", weights.note)] if weights.note else [])


def _stdout() -> Console:
    return Console(highlight=False)


LEVELS = ("C2", "C3", "C4", "C5")


def show_overview(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """One line a backbone, as soon as it is known: channels at strides 4 to 32, parameters, kinds of weights."""
    console, refused = Console(highlight=False), []
    width = max(map(len, (*names, "backbone")))

    def line(name: str, cells: Iterable[str], parameters: str, weights: str) -> None:
        text = "".join([f"{name:<{width}}", *(f"{cell:>8}" for cell in cells), f"{parameters:>12}", f"  {weights}"])
        console.print(Text(text), soft_wrap=True)

    for i, row in enumerate(rows):
        if "refused" in row:
            refused.append(f"no pyramid: {row['name']} {row['refused']}")
            continue
        if i == len(refused):
            line("backbone", [f"{level} /{2 ** int(level[1:])}" for level in LEVELS], "parameters", "weights")
        channels = {tap["level"]: str(tap["channels"]) for tap in row["taps"]}
        cells = [channels.get(level, "–" if channels else "") for level in LEVELS]
        line(row["name"], cells, _millions(row["parameters"]), ", ".join(row["weights"]))
    if len(refused) < len(names):
        console.print("\nchannels at each stride; parameters of the whole classifier; weights are also names and files")
    for reason in refused:
        console.print(Text(reason), soft_wrap=True)
    console.print("fpnx models NAME tells more of one; fpnx models timm/ lists timm's, where that is installed")


def show_details(found: Mapping[str, Any]) -> None:
    """Taps, parameters, operations, and every weight name with its file."""
    console = Console(highlight=False)
    height, width = found["input_size"]
    table = Table(box=None, pad_edge=False)
    for name in ("level", "stride", "channels", "height × width", "tapped at"):
        table.add_column(name, justify="right" if name in ("stride", "channels", "height × width") else "left")
    for tap in found["taps"]:
        table.add_row(
            tap["level"], str(tap["stride"]), str(tap["channels"]), f"{tap['height']} × {tap['width']}", tap["node"]
        )
    parameters, gflops = found["parameters"], found["gflops"]
    whole = f" ({_millions(parameters['published'])} with its head)" if parameters["published"] else ""
    console.print(Text(f"{found['name']} at {height}×{width}"))
    console.print(table)
    side = found["only_squares_in_multiples_of"]
    if side:
        console.print(f"takes squares in multiples of {side} only")
    console.print(
        f"parameters: body {_millions(parameters['body'])}{whole}, "
        f"pyramid of {found['pyramid_channels']} channels {_millions(parameters['pyramid'])}"
    )
    console.print(
        f"GFLOPs: body {gflops['body']:.2f}, pyramid {gflops['pyramid']:.2f} (a multiply-add counts as 2)", end="\n\n"
    )
    console.print(Text("--weights random: trains nothing; recipe " + found["recipe"]), soft_wrap=True)
    for each in found["weights"]:
        also = f" (also: {', '.join(each['also'])})" if each["also"] else ""
        lines = [
            f"--weights {each['name']}{also}",
            f"  trained: {' and '.join(each['trains'])}",
            f"  recipe:  {each['recipe']}",
            f"  from:    {each['url']}",
            f"  file:    {escape(each['file'])}{' (is there)' if each['there'] else ''}",
        ]
        console.print(Text("\n".join(lines)), soft_wrap=True)


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} M"
