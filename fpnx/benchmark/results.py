"""What a benchmark found: every sample, and what the samples say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fpnx.benchmark.case import AFTER, BEFORE, DECODE, RESIZE, WRITE
from fpnx.benchmark.profiling import Cost
from fpnx.benchmark.timers import Percentiles, percentiles
from fpnx.core.plan_summary import LevelShape

__all__ = ["CaseResult", "BenchmarkResult"]


@dataclass(kw_only=True)
class CaseResult:
    """One configuration, or the plain script, and its samples.

    Attributes:
        reason: why there are no samples: it does not fit into memory, or failed; else None.
        executed: operations of one image as they are executed, a multiply-add as two; None: as `costs` has them.
        stages: milliseconds per image by stage, in their order.
        forward: milliseconds per image of the network alone, measured as one.
        core: milliseconds of processor time per image, all stages together, while every core is at them.
        end_to_end: images/s from files to a file, from the first batches on.
        images: of one end-to-end run.
        rss, added, cuda: peak bytes of an end-to-end run; see `PeakMemory`.
        errors: relative error of each level against float32, ‖a − b‖ / ‖b‖.
    """

    backbone: str
    precision: str
    batch_size: int
    size: tuple[int, int]
    images: int = 0
    plain_script: bool = False
    reason: str | None = None
    shapes: Sequence[LevelShape] = ()
    costs: Sequence[Cost] = ()
    executed: int | None = None
    stages: dict[str, list[float]] = field(default_factory=dict)
    forward: list[float] = field(default_factory=list)
    core: list[float] = field(default_factory=list)
    end_to_end: list[float] = field(default_factory=list)
    rss: int | None = None
    added: int | None = None
    cuda: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as `"resnet50 float32 batch 8"`."""
        return " ".join(self.title)

    @property
    def title(self) -> tuple[str, str, str]:
        """The name in three lines."""
        return self.backbone, "plain script" if self.plain_script else self.precision, f"batch {self.batch_size}"

    @property
    def flops(self) -> int:
        """Floating-point operations for one image, as the model is defined."""
        return sum(cost.flops for cost in self.costs)

    @property
    def bytes_per_image(self) -> int:
        """What is stored of one image."""
        return sum(shape.bytes_per_image for shape in self.shapes)

    @property
    def forward_stages(self) -> list[str]:
        """The stages that make up the forward pass."""
        return [stage for stage in self.stages if stage not in (*BEFORE, *AFTER)]

    def add_stages(self, sample: Mapping[str, float]) -> None:
        """Take one sample of every stage."""
        for stage in (*BEFORE, *sorted(set(sample) - {*BEFORE, *AFTER}, key=_place), *AFTER):
            self.stages.setdefault(stage, []).append(sample[stage])

    def accounted(self) -> Percentiles:
        """The forward pass's stages together, over the forward pass measured as one beside them."""
        # An interruption can leave the last sample of some stages behind.
        sums = map(sum, zip(*(self.stages[stage] for stage in self.forward_stages), strict=False))
        return percentiles([together / whole for together, whole in zip(sums, self.forward, strict=False)])

    def achieved(self) -> Percentiles:
        """FLOP/s of the forward pass, of the operations that are executed."""
        return percentiles([1000 * (self.executed or self.flops) / ms for ms in self.forward])

    def allowed(self, cpus: int) -> Percentiles:
        """Images/s that the stages' own processor time allows on `cpus` cores."""
        return percentiles([1000 * cpus / ms for ms in self.core])

    def busy(self, workers: int, disk: float) -> dict[str, float]:
        """Share of an end-to-end run in which each part works, by what its stages take alone; at most 1.

        Args:
            workers: decoding threads.
            disk: bytes/s that it can take.
        """
        rate = percentiles(self.end_to_end).median
        ms = {stage: percentiles(samples).median for stage, samples in self.stages.items()}
        reading, writing = ms[DECODE] + ms[RESIZE], ms[WRITE]
        shares = {
            "network": rate * (sum(ms.values()) - reading - writing) / 1000,
            "decoding": rate * reading / 1000 / workers,
            "writing": rate * max(writing / 1000, self.bytes_per_image / disk),
        }
        return {name: min(share, 1.0) for name, share in shares.items()}

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values, with every sample."""
        facts = asdict(self)
        facts["summary"] = {
            "stages_ms": {stage: asdict(percentiles(samples)) for stage, samples in self.stages.items()},
            "forward_ms": asdict(percentiles(self.forward)) if self.forward else None,
            "images_per_second": asdict(percentiles(self.end_to_end)) if self.end_to_end else None,
            "stages_over_forward": asdict(self.accounted()) if self.stages and self.forward else None,
        }
        return {"name": self.name, **facts}


@dataclass(kw_only=True)
class BenchmarkResult:
    """A whole benchmark.

    Attributes:
        machine: processor, memory, device, threads, versions.
        facts: what was measured on: images, weights, recipe, seconds, notes.
        rounds: how many were asked for, or chosen.
        ceilings: FLOP/s of a large matrix product, by precision.
        disk: bytes/s of writing to the disk.
        interrupted: the signal that ended it early; None where it ran to its end.
    """

    machine: Mapping[str, Any]
    facts: dict[str, Any]
    columns: list[CaseResult]
    rounds: int = 0
    workers: int = 1
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    disk: list[float] = field(default_factory=list)
    interrupted: int | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 and the signal."""
        return 128 + self.interrupted if self.interrupted is not None else 0

    def ratios(self, column: CaseResult) -> dict[str, Percentiles]:
        """`column` over the first that was measured, each sample against the one taken beside it:
        `"forward"`, of times turned round, and `"end to end"`; above 1 is faster."""
        first = next((one for one in self.columns if one.forward), column)
        found = {}
        forward = [a / b for a, b in zip(first.forward, column.forward, strict=False)]
        whole = [b / a for a, b in zip(first.end_to_end, column.end_to_end, strict=False)]
        for name, samples in (("forward", forward), ("end to end", whole)):
            if samples:
                found[name] = percentiles(samples)
        return found

    def bottleneck(self, column: CaseResult) -> str | None:
        """One line that names what an end-to-end run spends its time on; None without the samples for it."""
        if not (column.stages and column.end_to_end and self.disk):
            return None
        busy = column.busy(self.workers, percentiles(self.disk).high)
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in busy.items())
        most = max(busy, key=busy.__getitem__)
        detail = ""
        if most == "network":
            ms = {stage: percentiles(column.stages[stage]).median for stage in column.forward_stages}
            heaviest = max(ms, key=ms.__getitem__)
            detail = f", most of it in {heaviest} ({100 * ms[heaviest] / sum(ms.values()):.0f} % of the forward pass)"
        return f"{most}{detail}; busy: {shares}"

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values, with every sample."""
        columns = []
        for column in self.columns:
            ratios = {name: asdict(ratio) for name, ratio in self.ratios(column).items()}
            columns.append({**column.to_json(), "ratios": ratios, "bottleneck": self.bottleneck(column)})
        return {
            "machine": dict(self.machine),
            **self.facts,
            "rounds": self.rounds,
            "workers": self.workers,
            "configurations": columns,
            "ceilings_flops": self.ceilings,
            "disk_bytes_per_second": self.disk,
            "interrupted": self.interrupted is not None,
            "exit_code": self.exit_code,
        }


def _place(stage: str) -> tuple[int, str]:
    """Where a stage of the forward pass stands: taps, lateral and top-down, outputs, top block."""
    kinds = ("C", "backbone", "lateral", "output", "top", "neck")
    return next(i for i, kind in enumerate(kinds) if stage.startswith(kind)), stage
