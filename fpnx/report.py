"""Everything that people see: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fpnx.control import Listener
from fpnx.errors import counted, in_bytes, shown

if TYPE_CHECKING:
    from fpnx.extraction import Result
    from fpnx.merging import Merged
    from fpnx.pictures import Pictures
    from fpnx.planning import Plan
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

    def planned(self, plan: Plan) -> None:
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
            table.add_column(name, justify=justify)
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
    console = _stdout()
    facts = store_facts(store)
    counts = facts["images"]
    weights = facts["provenance"]["weights"]
    _facts(
        console,
        ("file", f"{shown(store.path)}{'' if store.complete else ' (unfinished)'}"),
        ("images", f"{counts['done']} done, {counts['failed']} failed, {counts['pending']} pending"),
        *([("shard", str(store.cut))] if store.cut else []),
        *([("shards", str(facts["shards"]))] if facts["shards"] else []),
        ("root", shown(store.root)),
        ("backbone", f"{facts['config']['backbone']}, {_part(weights['backbone'])}"),
        ("pyramid", f"{', '.join(store.levels)}, {_part(weights['pyramid'])}"),
        *_checkpoint(weights),
        ("recipe", facts["provenance"]["recipe"]),
        ("stored as", f"{facts['config']['dtype']}, pool {facts['config']['pool']}"),
        ("computed in", f"{facts['provenance']['precision']} on {facts['provenance']['device']}"),
        ("made by", ", ".join(f"{k} {v}" for k, v in facts["provenance"]["versions"].items())),
        ("started", facts["provenance"]["time"]),
    )
    _show_levels(console, facts["levels"])
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


def store_facts(store: Store) -> dict[str, Any]:
    """What `show_info` shows, as plain values."""
    states = {name: int((store.status == value).sum()) for value, name in enumerate(("pending", "done", "failed"))}
    levels = []
    for size in store.sizes:
        for level in store.levels:
            dataset = store.dataset(size, level)
            count, channels, height, width = dataset.shape
            levels.append(
                {
                    "input_size": size,
                    "images": count,
                    "level": level,
                    "stride": int(dataset.attrs["stride"]),
                    "channels": channels,
                    "height": height,
                    "width": width,
                    "bytes_per_image": channels * height * width * dataset.dtype.itemsize,
                }
            )
    return {
        "file": store.path,
        "complete": store.complete,
        "images": {"total": len(store), **states},
        "shard": store.cut.to_json() if store.cut else None,
        "shards": len(store.shards),
        "root": store.root,
        "levels": levels,
        "failed": [{"path": path, "reason": reason} for path, reason in store.failures()],
        "config": store.config,
        "fingerprint": store.fingerprint,
        "provenance": store.provenance,
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


def _show_plan(plan: Plan) -> None:
    console = _stdout()
    facts = plan.facts()
    weights, config = facts["weights"], plan.config
    passed = f", {counted(facts['skipped'], 'other file')} passed over" if facts["skipped"] else ""
    before = f", {facts['done_before']} done before" if facts["done_before"] else ""
    pyramid = not all(level.startswith("C") for level in plan.model.levels)
    batch = f"batch {plan.batch_size or 'auto'}, {plan.workers} decoding threads"
    engine = f"{config.engine}: shards {config.shards}, actors {config.actors}, processors of each {config.cpus}"
    needed = f"{in_bytes(facts['bytes_needed'])} needed, " if plan.layout.shapes else ""  # workers look at sizes
    rows = [
        ("images", f"{facts['images']} in {shown(facts['root'])}{passed}{before}"),
        *([("shard", str(plan.listing.cut))] if plan.listing.cut else []),
        ("backbone", f"{facts['backbone']}, {_part(weights['backbone'])}"),
        (
            "pyramid",
            f"{', '.join(plan.model.levels)}, {_part(weights['pyramid'])}" if pyramid else "none asked for",
        ),
        *_checkpoint(weights),
        ("recipe", facts["recipe"]["text"]),
        *([("engine", engine)] if config.engine != "local" else []),
        ("device", f"{facts['device']}, {facts['precision']}, {batch}"),
        ("output", f"{shown(plan.output)}, a picture an image, {config.mode}")
        if config.format == "png"
        else (
            "output",
            f"{shown(facts['output'])}, {config.dtype}{'' if config.pool == 'none' else f', pool {config.pool}'}, "
            f"{needed}{'free space unknown' if plan.bytes_free is None else f'{in_bytes(plan.bytes_free)} free'}",
        ),
        *([("scratch", f"{shown(facts['scratch'])}: worked on there, then sent whole")] if plan.destination else []),
    ]
    _facts(console, *rows)
    if pyramid and weights["pyramid"]["trained"] is False:
        console.print(f"note: {UNTRAINED}", soft_wrap=True)
    if facts["bytes_needed"] > LARGE and config.format != "png":
        console.print(_smaller_ways(plan), soft_wrap=True)
    _show_levels(console, facts["levels"])


def _smaller_ways(plan: Plan) -> str:
    features, counts = plan.layout.feature_bytes(), plan.layout.counts()
    item = 2 if plan.config.dtype == "float16" else 4
    channels = {level: shape[0] for shapes in plan.layout.shapes.values() for level, shape in shapes.items()}
    pooled = sum(counts.values()) * sum(channels.values()) * item
    half = features // 2 if item == 4 else features
    return (
        f"smaller: --dtype float16 {in_bytes(half)}, --pool 7x7 {in_bytes(49 * pooled)}, --pool avg {in_bytes(pooled)}"
    )


def _show_levels(console: Console, levels: Iterable[Mapping[str, Any]]) -> None:
    rows = list(levels)
    sizes = list(dict.fromkeys(row["input_size"] for row in rows))
    by_count = sorted(sizes, key=lambda size: -next(r["images"] for r in rows if r["input_size"] == size))
    chosen = set(by_count[:SIZES_SHOWN])
    table = Table(box=None, pad_edge=False)
    columns = ["level", "stride", "channels", "height × width", "MB per image"]
    if len(sizes) > 1:
        columns = ["input", "images", *columns]
    for name in columns:
        table.add_column(name, justify="left" if name in ("level", "input") else "right")
    for row in rows:
        if row["input_size"] not in chosen:
            continue
        cells = [
            row["level"],
            str(row["stride"]),
            str(row["channels"]),
            f"{row['height']} × {row['width']}",
            f"{row['bytes_per_image'] / 1e6:.{3 if row['bytes_per_image'] >= 1000 else 6}f}",
        ]
        if len(sizes) > 1:
            cells = [row["input_size"].replace("x", "×"), str(row["images"]), *cells]
        table.add_row(*cells)
    console.print(table)
    if len(sizes) > SIZES_SHOWN:
        console.print(f"and {counted(len(sizes) - SIZES_SHOWN, 'other input size')}")


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


def _part(part: Mapping[str, Any]) -> str:
    state = {True: "trained", False: "untrained", None: "from file"}[part["trained"]]
    return f"{state} ({shown(part['source'])})"


def _checkpoint(weights: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows on a file of parameters: whose layout it has, and what did not stand in it."""
    if not weights.get("layout"):
        return []
    told: dict[str, list[str]] = {}
    for fact, each in weights["settled"].items():
        value = each["value"]
        text = " ".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)
        told.setdefault(each["by"], []).append(f"{fact.replace('_', ' ')} {text}")
    rows = [("layout", f"{weights['layout']}, {weights['heads_ignored']} tensors of heads ignored")]
    rows += [(f"by {who}", ", ".join(facts)) for who, facts in told.items() if who in ("default", "option")]
    return rows + ([("note", weights["note"])] if weights.get("note") else [])


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())


def _stdout() -> Console:
    return Console(highlight=False)
