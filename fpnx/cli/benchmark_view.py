"""Tables of a benchmark's results for a terminal, split to fit its width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpnx.benchmark.results import BenchmarkResult, CaseResult
from fpnx.benchmark.timers import Percentiles, percentiles
from fpnx.core.provenance import ModelPart

__all__ = ["show_benchmark"]

NOTHING = "–"
MAX_STAGE_DEVIATION = 0.1  # of the stages' sum from the forward pass, before a line explains it


def show_benchmark(result: BenchmarkResult) -> None:
    """Machine, shapes, costs, stages, throughput, comparison and bottlenecks, on stdout."""
    console = Console(highlight=False)
    _show_head(console, result)
    _show_shapes(console, result)
    _show_costs(console, result)
    staged = [case for case in result.cases if case.stages]
    if staged:
        title = "time per image and stage: median, 10th to 90th percentile, share of all stages"
        labels = list(dict.fromkeys(stage for case in staged for stage in case.stages))
        _show_side_by_side(console, title, "ms  10th–90th   %", staged, _stage_rows(labels))
    title = "throughput: median, 10th to 90th percentile"
    _show_side_by_side(console, title, "", result.cases, _throughput_rows(result))
    _show_lines(console, result)


def _show_head(console: Console, result: BenchmarkResult) -> None:
    machine, facts = result.machine, result.facts
    per = facts["samples_per_round"]
    memory = f", {machine['memory_bytes'] / 1e9:.1f} GB free" if machine["memory_bytes"] else ""
    device = f"{machine['device']} ({machine['gpu']})" if "gpu" in machine else machine["device"]
    weights = {name: str(ModelPart.from_json(part)) for name, part in facts["weights"].items()}
    chosen = f"{result.rounds} rounds in {facts.get('seconds', 0):.0f} s, every configuration in turn; in each round "
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("machine", f"{machine['processor']}, {machine['cpus']} CPUs{memory}"),
        ("device", f"{device}, {machine['torch_threads']} threads, {result.workers} decoding threads"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
        ("images", f"{facts['images']}; {facts['recipe']}"),
        ("weights", f"backbone {weights['backbone']}, pyramid {weights['pyramid']}"),
        ("files", f"in {facts['folder']} (TMPDIR), synced to the disk"),
        ("measured", f"{chosen}{per['stages']} times stages and forward pass, once end to end"),
    ):
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)


def _show_shapes(console: Console, result: BenchmarkResult) -> None:
    """One table for all backbones whose levels have the same shapes."""
    cases_by_shape: dict[tuple[Any, ...], list[CaseResult]] = {}
    for case in result.cases:
        key = (case.size, *((s.level, s.channels, s.height, s.width) for s in case.shapes))
        cases_by_shape.setdefault(key, []).append(case)
    for columns in cases_by_shape.values():
        names = ", ".join(dict.fromkeys(case.network for case in columns))
        height, width = columns[0].size
        table = _table(console, f"levels of {names} at {height}×{width}, as stored in {result.facts['dtype']}")
        for name in ("level", "stride", "channels", "height × width", "elements", "MB per image"):
            table.add_column(name, justify="left" if name == "level" else "right")
        for s in columns[0].shapes:
            area = f"{s.height} × {s.width}"
            elements = f"{s.channels * s.height * s.width:,}"
            size = f"{s.bytes_per_image / 1e6:.3f}"
            table.add_row(s.level, str(s.stride), str(s.channels), area, elements, size)
        table.add_row("all", "", "", "", "", f"{columns[0].bytes_per_image / 1e6:.3f}")
        console.print(table)


def _show_costs(console: Console, result: BenchmarkResult) -> None:
    table = _table(console, "parameters, and operations for one image (a multiply-add is two)")
    for name in ("network", "part", "parameters", "GFLOP", "share"):
        table.add_column(name, justify="left" if name in ("network", "part") else "right")
    seen = set()
    for case in result.cases:
        if (case.network, case.size) in seen:
            continue
        seen.add((case.network, case.size))
        total = max(case.flops, 1)
        for i, cost in enumerate(case.costs):
            numbers = f"{cost.parameters:,}", f"{cost.flops / 1e9:.3f}", f"{100 * cost.flops / total:.0f} %"
            table.add_row("" if i else case.network, cost.part, *numbers)
        parameters = sum(cost.parameters for cost in case.costs)
        table.add_row("", "all", f"{parameters:,}", f"{case.flops / 1e9:.3f}", "")
    console.print(table)


Rows = Sequence[tuple[str, Callable[[CaseResult], str]]]


def _stage_rows(stages: Sequence[str]) -> Rows:
    def cell(stage: str) -> Callable[[CaseResult], str]:
        def show(case: CaseResult) -> str:
            if stage not in case.stages:
                return ""
            whole = sum(percentiles(samples).median for samples in case.stages.values())
            statistics = percentiles(case.stages[stage])
            return f"{_range(statistics)} {100 * statistics.median / max(whole, 1e-9):>3.0f}"

        return show

    def forward(case: CaseResult) -> str:
        statistics, whole = (
            percentiles(case.forward),
            sum(percentiles(samples).median for samples in case.stages.values()),
        )
        return f"{_range(statistics)} {100 * statistics.median / max(whole, 1e-9):>3.0f}"

    def together(case: CaseResult) -> str:
        return f"{_range(_percent(case.accounted()))}   {NOTHING}"

    return [
        *((stage, cell(stage)) for stage in stages),
        ("forward as one", forward),
        ("its stages, % of it", together),
    ]


def _throughput_rows(result: BenchmarkResult) -> Rows:
    disk, cpus = percentiles(result.disk) if result.disk else None, result.machine.get("cpus", 1)

    def ceiling(case: CaseResult) -> Percentiles | None:
        samples = result.ceilings.get(case.precision)
        return percentiles(samples) if samples else None

    def share(what: Percentiles, whole: Percentiles | None) -> str:
        return f"{100 * what.median / whole.high:.0f}" if whole else NOTHING

    def reached(case: CaseResult) -> str:
        return f"{100 * percentiles(case.end_to_end).median / case.allowed(cpus).median:.0f}"

    def written(case: CaseResult) -> Percentiles:
        return percentiles([rate * case.bytes_per_image for rate in case.end_to_end])

    def ratio(name: str) -> Callable[[CaseResult], str]:
        return lambda case: _range(statistics) if (statistics := result.ratios(case).get(name)) else NOTHING

    rows: list[tuple[str, Callable[[CaseResult], str]]] = [
        ("forward, images/s", lambda c: _range(percentiles([1000 / ms for ms in c.forward]))),
        ("files to file, images/s", lambda c: _range(percentiles(c.end_to_end))),
        ("achieved, GFLOP/s", lambda c: _range(_over(c.achieved(), 1e9))),
        ("matrix product, GFLOP/s", lambda c: _range(_over(w, 1e9)) if (w := ceiling(c)) else NOTHING),
        ("achieved of product, %", lambda c: share(c.achieved(), ceiling(c))),
        ("core time, ms", lambda c: _range(percentiles(c.core)) if c.core else NOTHING),
        ("core limit, images/s", lambda c: _range(c.allowed(cpus)) if c.core else NOTHING),
        ("reached of limit, %", lambda c: reached(c) if c.core else NOTHING),
        ("written, MB/s", lambda c: _range(_over(written(c), 1e6))),
        ("disk, MB/s", lambda _: _range(_over(disk, 1e6)) if disk else NOTHING),
        ("written of disk, %", lambda c: share(written(c), disk)),
        ("peak RSS, MB", lambda c: f"{c.rss / 1e6:.0f}" if c.rss else NOTHING),
        ("added by this run, MB", lambda c: f"{c.added / 1e6:.0f}" if c.added is not None else NOTHING),
    ]
    if any(case.cuda is not None for case in result.cases):
        rows.append(("peak on CUDA, MB", lambda c: f"{c.cuda / 1e6:.0f}" if c.cuda is not None else NOTHING))
    if sum(bool(case.forward) for case in result.cases) > 1:
        rows.append(("forward, × the first", ratio("forward")))
        rows.append(("files to file, × first", ratio("end to end")))
    for level in dict.fromkeys(level for case in result.cases for level in case.errors):
        rows.append((f"error of {level}", _error(level)))

    def guarded(cell: Callable[[CaseResult], str]) -> Callable[[CaseResult], str]:
        return lambda case: cell(case) if case.forward and case.end_to_end else _missing(case)

    return [(label, guarded(cell)) for label, cell in rows]


def _error(level: str) -> Callable[[CaseResult], str]:
    return lambda case: f"{case.errors[level]:.1e}" if level in case.errors else NOTHING


def _missing(case: CaseResult) -> str:
    return "does not fit" if case.reason and case.reason.startswith("does not fit") else NOTHING


def _show_side_by_side(console: Console, title: str, unit: str, columns: Sequence[CaseResult], rows: Rows) -> None:
    """A row for each of `rows` and a column for each case, in as many tables as the width requires."""
    cells = {label: [cell(case) for case in columns] for label, cell in rows}
    heads = ["\n".join([*case.title, *([unit] if unit else [])]) for case in columns]
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
    """(first, end) of each group of columns that fits into `room` characters, with at least one column."""
    first, used = 0, 0
    for i, width in enumerate(widths):
        if i > first and used + width + 2 > room:
            yield first, i
            first, used = i, 0
        used += width + 2
    yield first, len(widths)


def _show_lines(console: Console, result: BenchmarkResult) -> None:
    """Bottlenecks, configurations that were not measured, deviations and notes, one line each."""
    lines = []
    for case in result.cases:
        if case.reason is not None:
            lines.append(f"{case.name}: {case.reason}")
            continue
        bottleneck = result.bottleneck(case)
        if bottleneck is not None:
            lines.append(f"bottleneck of {case.name}: {bottleneck}")
        if case.stages and case.forward and abs(case.accounted().median - 1) > MAX_STAGE_DEVIATION:
            lines.append(
                f"{case.name}: the stages add up to {100 * case.accounted().median:.0f} % of the forward pass; "
                f"the difference is the overhead of the timers and drift of the machine between the two measurements"
            )
    if any(case.errors for case in result.cases):
        lines.append("error: ‖a − b‖ / ‖b‖ against float32, over one batch")
    lines += result.facts["notes"]
    if result.interrupted is not None:
        lines.append("interrupted: this is what had been measured")
    console.print()
    for line in lines:
        console.print(Text(line))


def _table(console: Console, title: str) -> Table:
    console.print(Text(f"\n{title}", style="bold"))
    return Table(box=None, pad_edge=False)


def _range(statistics: Percentiles) -> str:
    return f"{_number(statistics.median):>4} {_number(statistics.low):>4}–{_number(statistics.high):<4}"


def _number(value: float) -> str:
    """At most four characters with three significant digits; thousands above 9999."""
    if value >= 9999.5:
        return f"{value / 1000:.0f}k"
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _over(statistics: Percentiles, unit: float) -> Percentiles:
    return Percentiles(statistics.median / unit, statistics.low / unit, statistics.high / unit, statistics.samples)


def _percent(statistics: Percentiles) -> Percentiles:
    return _over(statistics, 0.01)
