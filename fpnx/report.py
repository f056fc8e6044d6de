"""Everything that people see: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fpnx.control import Listener
from fpnx.errors import counted, in_bytes, shown
from fpnx.plan_summary import LevelShape, PlanSummary

if TYPE_CHECKING:
    from fpnx.extraction import Result
    from fpnx.merging import Merged
    from fpnx.pictures import Pictures
    from fpnx.provenance import WeightsInfo
    from fpnx.store import Store
    from fpnx.verification import Verification

__all__ = [
    "Terminal",
    "complain",
    "show_info",
    "show_json",
    "show_merged",
    "show_pictures",
    "show_result",
    "show_verification",
]

SIZES_SHOWN = 3
FAILURES_SHOWN = 20
SHOW_CURSOR = "\x1b[?25h"
LARGE = 20e9  # bytes of output above which smaller ways are worth a line
SECONDS_BETWEEN_LINES = 15.0
UNTRAINED = "P levels are a random projection of C: store C levels, or use trained weights"


class Terminal(Listener):
    """Shows a run as it goes: a bar on a terminal, a line now and then elsewhere. With `json`, no header."""

    def __init__(self, json: bool = False) -> None:
        self._json = json
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._started = self._told = time.monotonic()
        self._first, self._note = 0, ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def standing(self, text: str) -> None:
        self._note = text

    def planned(self, plan: PlanSummary) -> None:
        self.close()
        if not self._json:
            _show_plan(plan)

    def message(self, text: str) -> None:
        self._console.print(Text(f"fpnx: {text}"), soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._console.is_terminal:
            self._advance(what, done, total)
        elif done in (0, total) or now - self._told >= SECONDS_BETWEEN_LINES:
            if done > 0:
                note = f" ({self._note})" if self._note else ""
                self._console.print(f"{done} of {total} {what}{note}", highlight=False)
            self._told = now

    def _advance(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        if not self._bar.tasks or self._bar.tasks[-1].description != what:
            for task in self._bar.tasks:
                self._bar.update(task.id, visible=False)
            self._bar.add_task(what, total=total, completed=done, speed="", note="")
            self._started, self._first = time.monotonic(), done
        seconds = time.monotonic() - self._started
        speed = f"{(done - self._first) / seconds:.1f} {what}/s" if seconds > 0.5 and done > self._first else ""
        self._bar.update(self._bar.tasks[-1].id, completed=done, speed=speed, note=self._note)

    def stopping(self, signum: int, at_once: bool) -> None:
        # Plain writes to descriptors, since the signal may have struck in the midst of a buffered one.
        if not at_once:
            _write(2, "\nfpnx: stopping after this batch (again to stop at once)\n")
            return
        text = "interrupted at once: what was committed is kept: continue with --resume"
        if self._json:
            _write(1, json.dumps({"error": text}) + "\n")
        _write(2, f"{SHOW_CURSOR if self._console.is_terminal else ''}\nfpnx: {text}\n")
        os._exit(128 + signum)  # nothing is left to tidy: a file that is being written is whole at every moment

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def complain(text: str, json_wanted: bool = False) -> None:
    """One line on stderr; with `json_wanted` also a document on stdout."""
    line = " ".join(text.split())
    if json_wanted:
        show_json({"error": line})
    print(f"fpnx: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)


def show_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2))


def show_result(result: Result) -> None:
    """The timing table, failed images with their reasons, and where the output is."""
    console = _stdout()
    if result.dry_run:
        console.print("dry run: nothing was computed or written")
        return
    if result.computed:
        table = Table(title=Text("time per image"), box=None, title_justify="left", pad_edge=False)
        for name, justify in (("stage", "left"), ("ms", "right"), ("share", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        total = sum(result.timings.values()) or 1.0
        for stage, spent in result.timings.items():
            table.add_row(stage, f"{spent:.1f}", f"{100 * spent / total:.0f} %")
        console.print(table)
        console.print(
            f"{counted(result.computed, 'image')} in {result.seconds:.1f} s, {result.images_per_second:.1f} images/s "
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
        console.print(Text(f"{result.done} of {result.images} images are in {shown(result.output)}"), soft_wrap=True)


def show_pictures(result: Pictures) -> None:
    """How many pictures were drawn, where they are, and what is not among them."""
    console = _stdout()
    for path, reason in result.skipped[:FAILURES_SHOWN]:
        console.print(Text(f"skipped {shown(path)}: {shown(reason)}"), soft_wrap=True)
    if len(result.skipped) > FAILURES_SHOWN:
        console.print(f"and {len(result.skipped) - FAILURES_SHOWN} more were skipped")
    if result.left_out:
        console.print(f"{result.left_out} more images were left out: --limit takes more, --images picks")
    if result.folder is not None:
        console.print(Text(f"pictures in {shown(result.folder)}: {len(result.pictures)}"), soft_wrap=True)
    if (page := result.page) is not None:
        room = f"; {page.left_out} found no room in {in_bytes(page.limit_bytes)}" if page.left_out else ""
        line = f"images in {shown(page.path)}: {page.images}, {in_bytes(page.bytes)}{room}"
        console.print(Text(line), soft_wrap=True)


def show_merged(result: Merged) -> None:
    """What was merged, and where it is."""
    failed = f", {result.failed} of them failed" if result.failed else ""
    line = f"{result.images} images of {result.shards} shards are in {shown(result.output)}{failed}"
    _stdout().print(Text(f"{line} ({in_bytes(result.bytes)})"), soft_wrap=True)


def show_info(store: Store) -> None:
    """What a file holds, and a snippet that reads it."""
    console, origin = _stdout(), store.provenance
    facts = store_facts(store)
    counts = facts["images"]
    _facts(
        console,
        ("file", f"{shown(store.path)}{'' if store.complete else ' (unfinished)'}"),
        ("images", f"{counts['done']} done, {counts['failed']} failed, {counts['pending']} pending"),
        *([("shard", str(store.cut))] if store.cut else []),
        *([("shards", str(facts["shards"]))] if facts["shards"] else []),
        ("root", shown(store.root)),
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
    console.print(Text(f"{shown(found.file)}: {found.done} done, {found.failed} failed, {found.pending} pending"))
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


def level_shapes(store: Store) -> list[LevelShape]:
    """Every level of a store at every network-input size."""
    shapes = []
    for size in store.sizes:
        for level in store.levels:
            dataset = store.dataset(size, level)
            count, channels, height, width = dataset.shape
            bytes_per_image = channels * height * width * dataset.dtype.itemsize
            stride = int(dataset.attrs["stride"])
            shapes.append(LevelShape(size, count, level, stride, channels, height, width, bytes_per_image))
    return shapes


def store_facts(store: Store) -> dict[str, Any]:
    """What `show_info` shows, as plain values."""
    states = {name: int((store.status == value).sum()) for value, name in enumerate(("pending", "done", "failed"))}
    return {
        "file": store.path,
        "complete": store.complete,
        "images": {"total": len(store), **states},
        "shard": store.cut.to_json() if store.cut else None,
        "shards": len(store.shards),
        "root": store.root,
        "levels": [shape.to_json() for shape in level_shapes(store)],
        "failed": [{"path": path, "reason": reason} for path, reason in store.failures()],
        "config": store.config,
        "fingerprint": store.fingerprint,
        "provenance": store.provenance.to_json(),
    }


def reading_snippet(store: Store) -> str:
    """Python that reads this very file with h5py alone; or a set of shards with fpnx."""
    level = store.levels[0]
    if store.shards:
        one = f"item = next(iter(store)); print(item.path, item[{level!r}].shape)"
        return f"import fpnx\n\nwith fpnx.open({store.path!r}) as store:\n    {one}\n"
    lines = [
        "import h5py",
        "",
        f"with h5py.File({str(store.path)!r}, {'r'!r}{'' if store.complete else ', locking=False'}) as f:",
        '    names = f["images/path"].asstr(errors="surrogateescape")[:]',
        '    done = f["images/status"][:] == 1',
    ]
    if len(store.sizes) == 1:
        shape = store.dataset(store.sizes[0], level).shape
        lines.append(f'    i = done.argmax(); print(names[i], f["{level}"][i].shape)  # {shape[1:]}')
    elif store.sizes:
        lines += [
            '    groups, rows = f["images/group"].asstr()[:], f["images/row"][:]',
            f'    i = done.argmax(); print(names[i], f["pyramids"][groups[i]]["{level}"][rows[i]].shape)',
        ]
    return "\n".join(lines) + "\n"


def _show_plan(plan: PlanSummary) -> None:
    console, config, weights = _stdout(), plan.config, plan.weights
    passed = f", {counted(plan.skipped, 'other file')} passed over" if plan.skipped else ""
    before = f", {plan.done_before} done before" if plan.done_before else ""
    batch = f"batch {plan.batch_size or 'auto'}, {plan.workers} decoding threads"
    engine = f"{config.engine}: shards {config.shards}, actors {config.actors}, processors of each {config.cpus}"
    pyramid = f"{', '.join(plan.level_names)}, {weights.pyramid}" if plan.has_pyramid else "none asked for"
    rows = [
        ("images", f"{plan.images} in {shown(plan.root)}{passed}{before}"),
        *([("shard", str(plan.shard))] if plan.shard else []),
        ("backbone", f"{plan.backbone}, {weights.body}"),
        ("pyramid", pyramid),
        *_checkpoint(weights),
        ("recipe", plan.recipe_text),
        *([("engine", engine)] if config.engine != "local" else []),
        ("device", f"{','.join(plan.devices)}, {plan.precision}, {batch}"),
        ("output", _output_line(plan)),
        *([("scratch", f"{shown(plan.scratch)}: worked on there, then sent whole")] if plan.scratch else []),
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
        return f"{shown(plan.output)}, a picture an image, {config.mode}"
    pool = "" if config.pool == "none" else f", pool {config.pool}"
    needed = f"{in_bytes(plan.bytes_needed)} needed, " if plan.levels else ""  # else workers look at sizes
    free = "free space unknown" if plan.bytes_free is None else f"{in_bytes(plan.bytes_free)} free"
    return f"{shown(plan.output)}, {config.dtype}{pool}, {needed}{free}"


def _smaller_ways(plan: PlanSummary) -> str:
    item = 2 if plan.config.dtype == "float16" else 4
    pooled = sum(shape.images * shape.channels for shape in plan.levels) * item
    half = plan.feature_bytes // 2 if item == 4 else plan.feature_bytes
    return (
        f"smaller: --dtype float16 {in_bytes(half)}, --pool 7x7 {in_bytes(49 * pooled)}, --pool avg {in_bytes(pooled)}"
    )


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
        console.print(f"and {counted(len(images) - SIZES_SHOWN, 'other input size')}")


def _show_failures(console: Console, failures: Iterable[tuple[str, str]]) -> None:
    failed = list(failures)
    if not failed:
        return
    console.print(f"{counted(len(failed), 'image')} failed:")
    for path, reason in failed[:FAILURES_SHOWN]:
        console.print(Text(f"  {shown(path)}: {shown(reason)}"), soft_wrap=True)
    if len(failed) > FAILURES_SHOWN:
        console.print(f"  and {len(failed) - FAILURES_SHOWN} more: fpnx info --json lists them all")


def _facts(console: Console, *rows: tuple[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(shown(value)))
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


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())


def _stdout() -> Console:
    return Console(highlight=False)
