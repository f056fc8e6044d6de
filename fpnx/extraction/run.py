"""A folder of images → model → store: the whole pipeline."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import h5py
import PIL
import torch
import torchvision

from fpnx._version import __version__
from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.files import lock
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.plan_summary import PlanSummary
from fpnx.core.provenance import Provenance
from fpnx.core.text import escape
from fpnx.extraction.pipeline import STAGES, StageClock, run_pipeline
from fpnx.extraction.plan import Plan, make_plan
from fpnx.extraction.sink import Hdf5Sink, Outcome, Sink, outcome_of
from fpnx.extraction.upload import Destination, check_destination, scratch_folder, upload
from fpnx.images.decoding import pillow_limits
from fpnx.images.listing import find_images
from fpnx.inference.engine_cache import EngineCache
from fpnx.remote.client import connections
from fpnx.store.output_path import check_output
from fpnx.store.reader import PENDING, Store, open_store_file
from fpnx.store.writer import part_path

__all__ = ["Result", "provenance_of", "run_extraction"]


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        output: the file, or its address.
        images, done: how many there are in it, and how many hold features.
        failed: (path, reason) of each failed image.
        computed: how many this run computed.
        seconds: of computing, without loading the model.
        timings: milliseconds per computed image, by stage.
        nonfinite: NaN and infinite values, by level; in a strict run they are errors.
        too_small: levels stored as float16 whose values, in the images looked at, are all too small for it.
        stopped: why `strict` ended it early; None where it did not.
        complete: whether `output` has its final name.
        lost: archives that may have had more images, a line each; each counts as a failed image.
        plan: what was planned.
        engine: of a run on many workers, what each shard came to; else None.
    """

    output: Path | str
    images: int
    done: int
    failed: tuple[tuple[str, str], ...]
    computed: int
    seconds: float
    timings: Mapping[str, float]
    nonfinite: Mapping[str, int]
    allowed_failures: int
    strict: bool = False
    too_small: tuple[str, ...] = ()
    stopped: str | None = None
    complete: bool = True
    dry_run: bool = False
    lost: tuple[str, ...] = ()
    plan: PlanSummary | None = field(default=None, repr=False)
    engine: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def images_per_second(self) -> float:
        """Computed images over the seconds that it took."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    @property
    def exit_code(self) -> int:
        """0, or 1 where more images failed than allowed or `strict` stopped the run."""
        not_finite = self.strict and any(self.nonfinite.values())
        failures = len(self.failed) + len(self.lost)
        return 1 if self.stopped or not_finite or failures > self.allowed_failures else 0

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        return {
            **(self.plan.to_json() if self.plan is not None else {}),
            **({"engine": dict(self.engine)} if self.engine is not None else {}),
            "dry_run": self.dry_run,
            "complete": self.complete,
            "done": self.done,
            "computed": self.computed,
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
            "lost": list(self.lost),
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "ms_per_image": dict(self.timings),
            "nonfinite": dict(self.nonfinite),
            "too_small": list(self.too_small),
            "stopped": self.stopped,
            "exit_code": self.exit_code,
        }


def run_extraction(
    images: Sequence[str | os.PathLike[str]],
    goal: Destination,
    config: ExtractConfig,
    *,
    listener: Listener | None = None,
    equipment: EngineCache | None = None,
    blocked: Mapping[bytes, str] | None = None,
) -> Result:
    """Images → `goal`, in this process.

    Args:
        images: files, folders, archives, addresses, or `"@list.txt"`.
        goal: where the output is made, as `goal_of` gives it.
        config: what is asked for.
        listener: receives the progress.
        equipment: lends its model, for runs of many parts.
        blocked: by name, images that must not be opened, and why; they fail.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; what was done is kept.
    """
    hears, target, draws = listener or Listener(), goal.local, config.format == "png"
    with connections(), scratch_folder(goal):
        if not draws:
            check_output(target, config)
        finished = check_destination(goal, config)
        with handle_signals(hears) as stop, pillow_limits():
            assert not isinstance(config.shard, str), "the config has parsed it"
            listing = find_images(images, config.limit, config.shard)
            if blocked:
                sources = tuple(replace(source, blocked=blocked.get(source.name, "")) for source in listing.sources)
                listing = replace(listing, sources=sources)
            for remark in (*listing.remarks, *listing.truncated):
                hears.message(remark)
            with nullcontext(True) if config.dry_run else lock(target) as alone:
                if not alone:
                    hears.message("files cannot be locked here: see to it that no second run writes this output")
                if draws:
                    from fpnx.extraction.png_sink import check_png_folder

                    check_png_folder(target, listing, config)
                else:
                    check_output(target, config)  # again: another run may have ended since
                plan = make_plan(target, config, listing, hears, equipment, destination=goal.url, finished=finished)
                if draws:
                    config.check_channels({shape.level: shape.channels for shape in plan.shapes})
                hears.planned(plan.summary)
                if config.dry_run:
                    return _result(plan, Outcome(), StageClock(), complete=False, dry_run=True)
                result = None if draws else _finished(plan, finished)
                if result is None:
                    result = _run(plan, _sink(plan, hears), stop, hears)
                if goal.url is not None and finished is None and result.complete:
                    upload(goal, plan.layout.config, listing.records, stop, hears)
                return result


def provenance_of(plan: Plan) -> Provenance:
    """How the output of `plan` is made, as its file says it."""
    return Provenance(
        versions={
            "fpnx": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
            "h5py": h5py.__version__,
        },
        options=plan.config.repeatable(),
        command=tuple(escape(argument) for argument in sys.argv[:64]),
        weights=plan.model.weights.info,
        recipe=str(plan.recipe),
        device=", ".join(map(_device_name, plan.devices)),
        precision=plan.precision,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _sink(plan: Plan, listener: Listener) -> Sink:
    """The sink for the plan's format."""
    if plan.config.format == "png":
        from fpnx.extraction.png_sink import PngSink

        return PngSink(plan, provenance_of(plan))
    return Hdf5Sink.open(plan, provenance_of(plan), listener)


def _finished(plan: Plan, address: str | None) -> Result | None:
    """How the run ended that a complete output is of; None where there is none to go on from."""
    if not plan.config.resume or part_path(plan.output).exists():
        return None
    output = plan.output if plan.output.exists() else address
    if output is None:
        return None
    with open_store_file(output) as store:
        _refuse_unfinished(plan.output, store)
        return _result(plan, outcome_of(store), StageClock())


def _run(plan: Plan, sink: Sink, stop: StopRequest, listener: Listener) -> Result:
    clock = StageClock()
    try:
        stop.begin()
        stopped = run_pipeline(plan, sink, clock, stop, listener)
        if stopped is None:
            sink.finish()
        else:
            sink.commit()
    finally:
        sink.close()
    clock.stop()
    result = _result(plan, sink.outcome(), clock, complete=stopped is None, stopped=stopped)
    if stop.signum is not None and stopped == "interrupted":
        raise Interrupted(
            f"interrupted: {result.done} of {result.images} images are done and kept: continue with --resume",
            stop.signum,
        )
    return result


def _refuse_unfinished(output: Path, store: Store) -> None:
    pending = int((store.status == PENDING).sum())
    if pending:
        raise FpnxError(
            f"{escape(output)} is not finished ({pending} images are pending): rename it to "
            f"{escape(part_path(output).name)} and continue it with --resume, or start over with --overwrite"
        )


def _result(
    plan: Plan,
    outcome: Outcome,
    clock: StageClock,
    *,
    complete: bool = True,
    stopped: str | None = None,
    dry_run: bool = False,
) -> Result:
    count = len(plan.listing.sources)
    return Result(
        output=plan.destination or plan.output,
        images=count,
        done=outcome.done,
        failed=outcome.failed,
        computed=clock.images,
        seconds=clock.seconds,
        timings={stage: 1000 * clock.spent[stage] / max(clock.images, 1) for stage in STAGES},
        nonfinite=outcome.nonfinite,
        allowed_failures=0 if plan.config.strict else plan.config.allowed_failures(count),
        strict=plan.config.strict,
        too_small=outcome.too_small,
        stopped=stopped,
        complete=complete,
        dry_run=dry_run,
        lost=plan.listing.truncated,
        plan=plan.summary,
    )


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
