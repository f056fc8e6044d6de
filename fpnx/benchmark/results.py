"""Results of a benchmark: all samples, and statistics of them."""

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
    """The samples of one configuration, or of a script that it is compared with.

    Attributes:
        pyramid: the kind of pyramid.
        reason: why there are no samples: it does not fit into memory, or failed; None otherwise.
        executed: operations executed for one image (a multiply-add is two); None where they are those of `costs`.
        stages: milliseconds per image by stage, in the order of the pipeline.
        forward: milliseconds per image of the whole forward pass.
        core: milliseconds of processor time per image over all stages, with all cores busy.
        end_to_end: images/s from image files to the HDF5 file, without the first batches.
        images: of one end-to-end run.
        baseline: `"plain"` or `"openvino"` where the samples are those of that script, else None.
        rss, added, cuda: peak bytes of an end-to-end run, as in `PeakMemory`.
        errors: relative error of each level against float32: ‖a − b‖ / ‖b‖.
    """

    backbone: str
    pyramid: str
    precision: str
    batch_size: int
    size: tuple[int, int]
    images: int = 0
    baseline: str | None = None
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
        """Name of the configuration, such as `"resnet50 float32 batch 8"`, or `"resnet50 pafpn float32 batch 8"`."""
        return " ".join(self.title)

    @property
    def title(self) -> tuple[str, str, str]:
        """Network, precision and batch size, the three parts of the name."""
        return self.network, f"{self.baseline} script" if self.baseline else self.precision, f"batch {self.batch_size}"

    @property
    def network(self) -> str:
        """The backbone, and the kind of pyramid where it is no FPN."""
        return self.backbone if self.pyramid == "fpn" else f"{self.backbone} {self.pyramid}"

    @property
    def flops(self) -> int:
        """Floating-point operations for one image, as the model is defined."""
        return sum(cost.flops for cost in self.costs)

    @property
    def bytes_per_image(self) -> int:
        """Bytes stored for one image."""
        return sum(shape.bytes_per_image for shape in self.shapes)

    @property
    def forward_stages(self) -> list[str]:
        """The stages of the forward pass."""
        return [stage for stage in self.stages if stage not in (*BEFORE, *AFTER)]

    def add_stages(self, sample: Mapping[str, float]) -> None:
        """Add one sample of every stage."""
        for stage in (*BEFORE, *sorted(set(sample) - {*BEFORE, *AFTER}, key=_stage_order), *AFTER):
            self.stages.setdefault(stage, []).append(sample[stage])

    def accounted(self) -> Percentiles:
        """Sum of the forward pass's stages, divided by the whole forward pass measured next to them."""
        # After an interruption some stages may have one sample less.
        sums = map(sum, zip(*(self.stages[stage] for stage in self.forward_stages), strict=False))
        return percentiles([total / whole for total, whole in zip(sums, self.forward, strict=False)])

    def achieved(self) -> Percentiles:
        """FLOP/s of the forward pass, from the executed operations."""
        return percentiles([1000 * (self.executed or self.flops) / ms for ms in self.forward])

    def allowed(self, cpus: int) -> Percentiles:
        """Upper limit of images/s on `cpus` cores, from the processor time of all stages."""
        return percentiles([1000 * cpus / ms for ms in self.core])

    def busy(self, workers: int, disk: float) -> dict[str, float]:
        """Share of an end-to-end run in which each part is busy, from the times of its stages alone; at most 1.

        Args:
            workers: decoding threads.
            disk: bytes/s of the disk.
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
        """The results as JSON values, with all samples."""
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
    """The results of a benchmark.

    Attributes:
        machine: processor, memory, device, threads, versions.
        facts: images, weights, recipe, seconds and notes.
        cases: one for each configuration, then those of the scripts of `--baseline`.
        rounds: how many were measured.
        workers: decoding threads.
        ceilings: samples of the FLOP/s of a large matrix product, by precision.
        disk: samples of the bytes/s of writing to the disk.
        interrupted: the signal that ended the benchmark early; None otherwise.
    """

    machine: Mapping[str, Any]
    facts: dict[str, Any]
    cases: list[CaseResult]
    rounds: int = 0
    workers: int = 1
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    disk: list[float] = field(default_factory=list)
    interrupted: int | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the signal."""
        return 128 + self.interrupted if self.interrupted is not None else 0

    def ratios(self, case: CaseResult) -> dict[str, Percentiles]:
        """Speed of `case` over that of the first measured case, from samples of the same round; above 1 is faster.

        The keys are `"forward"` and `"end to end"`.
        """
        first = next((other for other in self.cases if other.forward), case)
        ratios = {}
        forward = [a / b for a, b in zip(first.forward, case.forward, strict=False)]
        whole = [b / a for a, b in zip(first.end_to_end, case.end_to_end, strict=False)]
        for name, samples in (("forward", forward), ("end to end", whole)):
            if samples:
                ratios[name] = percentiles(samples)
        return ratios

    def bottleneck(self, case: CaseResult) -> str | None:
        """One line that names the part that limits an end-to-end run; None where samples are missing."""
        if not (case.stages and case.end_to_end and self.disk):
            return None
        busy = case.busy(self.workers, percentiles(self.disk).high)
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in busy.items())
        busiest = max(busy, key=busy.__getitem__)
        detail = ""
        if busiest == "network":
            ms = {stage: percentiles(case.stages[stage]).median for stage in case.forward_stages}
            slowest = max(ms, key=ms.__getitem__)
            detail = f", most of it in {slowest} ({100 * ms[slowest] / sum(ms.values()):.0f} % of the forward pass)"
        return f"{busiest}{detail}; busy: {shares}"

    def to_json(self) -> dict[str, Any]:
        """The results as JSON values, with all samples."""
        configurations = []
        for case in self.cases:
            ratios = {name: asdict(ratio) for name, ratio in self.ratios(case).items()}
            configurations.append({**case.to_json(), "ratios": ratios, "bottleneck": self.bottleneck(case)})
        return {
            "machine": dict(self.machine),
            **self.facts,
            "rounds": self.rounds,
            "workers": self.workers,
            "configurations": configurations,
            "ceilings_flops": self.ceilings,
            "disk_bytes_per_second": self.disk,
            "interrupted": self.interrupted is not None,
            "exit_code": self.exit_code,
        }


def _stage_order(stage: str) -> tuple[int, str]:
    """Sort key of a stage of the forward pass: taps, lateral and top-down, outputs, top block, or the neck."""
    kinds = ("C", "backbone", "lateral", "output", "top", "neck")
    return next(i for i, kind in enumerate(kinds) if stage.startswith(kind)), stage
