"""What a benchmark found, on a terminal: tables that fit its width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpnx.benchmark.results import BenchmarkResult, CaseResult
from fpnx.benchmark.timers import Percentiles, percentiles
from fpnx.core.provenance import ModelPart

__all__ = ["show_findings"]

NOTHING = "–"
ADDS_UP = 0.1  # how far the stages of the forward pass may be from it before a line says why


def show_findings(findings: BenchmarkResult) -> None:
    """Machine, shapes, costs, stages, throughput, comparison and bottlenecks, on stdout."""
    console = Console(highlight=False)
    _show_head(console, findings)
    _show_shapes(console, findings)
    _show_costs(console, findings)
    staged = [column for column in findings.columns if column.stages]
    if staged:
        title = "time per image and stage: median, 10th to 90th percentile, share of all stages"
        labels = list(dict.fromkeys(stage for column in staged for stage in column.stages))
        _show_side_by_side(console, title, "ms  10th–90th   %", staged, _stage_rows(labels))
    title = "throughput: median, 10th to 90th percentile"
    _show_side_by_side(console, title, "", findings.columns, _throughput_rows(findings))
    _show_lines(console, findings)


def _show_head(console: Console, findings: BenchmarkResult) -> None:
    machine, facts = findings.machine, findings.facts
    per = facts["samples_per_round"]
    memory = f", {machine['memory_bytes'] / 1e9:.1f} GB free" if machine["memory_bytes"] else ""
    device = f"{machine['device']} ({machine['gpu']})" if "gpu" in machine else machine["device"]
    weights = {name: str(ModelPart.from_json(part)) for name, part in facts["weights"].items()}
    chosen = f"{findings.rounds} rounds in {facts.get('seconds', 0):.0f} s, every configuration in turn; in each round "
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("machine", f"{machine['processor']}, {machine['cpus']} CPUs{memory}"),
        ("device", f"{device}, {machine['torch_threads']} threads, {findings.workers} decoding threads"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
        ("images", f"{facts['images']}; {facts['recipe']}"),
        ("weights", f"backbone {weights['backbone']}, pyramid {weights['pyramid']}"),
        ("files", f"in {facts['folder']} (TMPDIR), until they are on the disk"),
        ("measured", f"{chosen}{per['stages']} times stages and forward pass, once end to end"),
    ):
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)


def _show_shapes(console: Console, findings: BenchmarkResult) -> None:
    """One table for all backbones whose levels are alike."""
    alike: dict[tuple[Any, ...], list[CaseResult]] = {}
    for column in findings.columns:
        key = (column.size, *((s.level, s.channels, s.height, s.width) for s in column.shapes))
        alike.setdefault(key, []).append(column)
    for columns in alike.values():
        names = ", ".join(dict.fromkeys(column.backbone for column in columns))
        height, width = columns[0].size
        table = _table(console, f"levels of {names} at {height}×{width}, as stored in {findings.facts['dtype']}")
        for name in ("level", "stride", "channels", "height × width", "elements", "MB per image"):
            table.add_column(name, justify="left" if name == "level" else "right")
        for s in columns[0].shapes:
            area = f"{s.height} × {s.width}"
            elements = f"{s.channels * s.height * s.width:,}"
            size = f"{s.bytes_per_image / 1e6:.3f}"
            table.add_row(s.level, str(s.stride), str(s.channels), area, elements, size)
        table.add_row("all", "", "", "", "", f"{columns[0].bytes_per_image / 1e6:.3f}")
        console.print(table)


def _show_costs(console: Console, findings: BenchmarkResult) -> None:
    table = _table(console, "parameters, and operations for one image (a multiply-add is two)")
    for name in ("backbone", "part", "parameters", "GFLOP", "share"):
        table.add_column(name, justify="left" if name in ("backbone", "part") else "right")
    seen = set()
    for column in findings.columns:
        if (column.backbone, column.size) in seen:
            continue
        seen.add((column.backbone, column.size))
        total = max(column.flops, 1)
        for i, cost in enumerate(column.costs):
            numbers = f"{cost.parameters:,}", f"{cost.flops / 1e9:.3f}", f"{100 * cost.flops / total:.0f} %"
            table.add_row("" if i else column.backbone, cost.part, *numbers)
        parameters = sum(cost.parameters for cost in column.costs)
        table.add_row("", "all", f"{parameters:,}", f"{column.flops / 1e9:.3f}", "")
    console.print(table)


Rows = Sequence[tuple[str, Callable[[CaseResult], str]]]


def _stage_rows(stages: Sequence[str]) -> Rows:
    def cell(stage: str) -> Callable[[CaseResult], str]:
        def show(column: CaseResult) -> str:
            if stage not in column.stages:
                return ""
            whole = sum(percentiles(samples).median for samples in column.stages.values())
            found = percentiles(column.stages[stage])
            return f"{_range(found)} {100 * found.median / max(whole, 1e-9):>3.0f}"

        return show

    def forward(column: CaseResult) -> str:
        found, whole = (
            percentiles(column.forward),
            sum(percentiles(samples).median for samples in column.stages.values()),
        )
        return f"{_range(found)} {100 * found.median / max(whole, 1e-9):>3.0f}"

    def together(column: CaseResult) -> str:
        return f"{_range(_percent(column.accounted()))}   {NOTHING}"

    return [
        *((stage, cell(stage)) for stage in stages),
        ("forward as one", forward),
        ("its stages, % of it", together),
    ]


def _throughput_rows(findings: BenchmarkResult) -> Rows:
    disk, cpus = percentiles(findings.disk) if findings.disk else None, findings.machine.get("cpus", 1)

    def ceiling(column: CaseResult) -> Percentiles | None:
        samples = findings.ceilings.get(column.precision)
        return percentiles(samples) if samples else None

    def share(what: Percentiles, whole: Percentiles | None) -> str:
        return f"{100 * what.median / whole.high:.0f}" if whole else NOTHING

    def reached(column: CaseResult) -> str:
        return f"{100 * percentiles(column.end_to_end).median / column.allowed(cpus).median:.0f}"

    def written(column: CaseResult) -> Percentiles:
        return percentiles([rate * column.bytes_per_image for rate in column.end_to_end])

    def ratio(name: str) -> Callable[[CaseResult], str]:
        return lambda column: _range(found) if (found := findings.ratios(column).get(name)) else NOTHING

    rows: list[tuple[str, Callable[[CaseResult], str]]] = [
        ("forward, images/s", lambda c: _range(percentiles([1000 / ms for ms in c.forward]))),
        ("files to file, images/s", lambda c: _range(percentiles(c.end_to_end))),
        ("achieved, GFLOP/s", lambda c: _range(_over(c.achieved(), 1e9))),
        ("matrix product, GFLOP/s", lambda c: _range(_over(w, 1e9)) if (w := ceiling(c)) else NOTHING),
        ("achieved of its best, %", lambda c: share(c.achieved(), ceiling(c))),
        ("core time, ms", lambda c: _range(percentiles(c.core)) if c.core else NOTHING),
        ("it allows, images/s", lambda c: _range(c.allowed(cpus)) if c.core else NOTHING),
        ("reached of that, %", lambda c: reached(c) if c.core else NOTHING),
        ("written, MB/s", lambda c: _range(_over(written(c), 1e6))),
        ("disk, MB/s", lambda _: _range(_over(disk, 1e6)) if disk else NOTHING),
        ("written of its best, %", lambda c: share(written(c), disk)),
        ("peak RSS, MB", lambda c: f"{c.rss / 1e6:.0f}" if c.rss else NOTHING),
        ("of it for this run, MB", lambda c: f"{c.added / 1e6:.0f}" if c.added is not None else NOTHING),
    ]
    if any(column.cuda is not None for column in findings.columns):
        rows.append(("peak on CUDA, MB", lambda c: f"{c.cuda / 1e6:.0f}" if c.cuda is not None else NOTHING))
    if sum(bool(column.forward) for column in findings.columns) > 1:
        rows.append(("forward, × the first", ratio("forward")))
        rows.append(("files to file, × first", ratio("end to end")))
    for level in dict.fromkeys(level for column in findings.columns for level in column.errors):
        rows.append((f"error of {level}", _error(level)))

    def guarded(cell: Callable[[CaseResult], str]) -> Callable[[CaseResult], str]:
        return lambda column: cell(column) if column.forward and column.end_to_end else _missing(column)

    return [(label, guarded(cell)) for label, cell in rows]


def _error(level: str) -> Callable[[CaseResult], str]:
    return lambda column: f"{column.errors[level]:.1e}" if level in column.errors else NOTHING


def _missing(column: CaseResult) -> str:
    return "does not fit" if column.reason and column.reason.startswith("does not fit") else NOTHING


def _show_side_by_side(console: Console, title: str, unit: str, columns: Sequence[CaseResult], rows: Rows) -> None:
    """A row for each of `rows`, a column for each configuration, in as many tables as the width asks for."""
    cells = {label: [cell(column) for column in columns] for label, cell in rows}
    heads = ["\n".join([*column.title, *([unit] if unit else [])]) for column in columns]
    widths = [
        max(len(line) for line in (*head.splitlines(), *(row[i] for row in cells.values())))
        for i, head in enumerate(heads)
    ]
    for first, last in _pages(widths, console.width - max(map(len, cells)) - 1):
        table = _table(console, title if first == 0 else f"{title} (continued)")
        table.add_column("", no_wrap=True)
        for head in heads[first:last]:
            table.add_column(Text(head), justify="right", no_wrap=True)
        for label, row in cells.items():
            table.add_row(label, *(Text(cell) for cell in row[first:last]))
        console.print(table)


def _pages(widths: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each stretch of columns that fits into `room`, at least one at a time."""
    first, used = 0, 0
    for i, width in enumerate(widths):
        if i > first and used + width + 2 > room:
            yield first, i
            first, used = i, 0
        used += width + 2
    yield first, len(widths)


def _show_lines(console: Console, findings: BenchmarkResult) -> None:
    """Bottlenecks, what did not fit, what does not add up, what is to be known."""
    lines = []
    for column in findings.columns:
        if column.reason is not None:
            lines.append(f"{column.name}: {column.reason}")
            continue
        bottleneck = findings.bottleneck(column)
        if bottleneck is not None:
            lines.append(f"bottleneck of {column.name}: {bottleneck}")
        if column.stages and column.forward and abs(column.accounted().median - 1) > ADDS_UP:
            lines.append(
                f"{column.name}: the stages add up to {100 * column.accounted().median:.0f} % of the forward pass; "
                f"the rest is what the marks cost and how the machine drifted between the two, which run in turn"
            )
    if any(column.errors for column in findings.columns):
        lines.append("error: ‖a − b‖ / ‖b‖ against float32, over one batch")
    lines += findings.facts["notes"]
    if findings.interrupted is not None:
        lines.append("interrupted: this is what had been measured")
    console.print()
    for line in lines:
        console.print(Text(line))


def _table(console: Console, title: str) -> Table:
    console.print(Text(f"\n{title}", style="bold"))
    return Table(box=None, pad_edge=False)


def _range(found: Percentiles) -> str:
    return f"{_number(found.median):>4} {_number(found.low):>4}–{_number(found.high):<4}"


def _number(value: float) -> str:
    """At most four characters, three digits that count; thousands above 9999."""
    if value >= 9999.5:
        return f"{value / 1000:.0f}k"
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _over(found: Percentiles, unit: float) -> Percentiles:
    return Percentiles(found.median / unit, found.low / unit, found.high / unit, found.samples)


def _percent(found: Percentiles) -> Percentiles:
    return _over(found, 0.01)
