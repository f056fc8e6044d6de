"""One extraction in this process: images are listed, the run is planned, and the pipeline fills a sink."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
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
from fpnx.core.image_notes import ImageNotes
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.plan_summary import PlanSummary
from fpnx.core.provenance import AS_GIVEN, Provenance
from fpnx.core.text import escape
from fpnx.extraction.pipeline import STAGES, StageTimer, run_pipeline
from fpnx.extraction.plan import Plan, make_plan
from fpnx.extraction.regions import read_boxes
from fpnx.extraction.sink import Hdf5Sink, Outcome, Sink, outcome_of
from fpnx.extraction.update import copy_features
from fpnx.extraction.upload import Destination, check_destination, scratch_folder, upload
from fpnx.images.decoding import pillow_limits
from fpnx.images.listing import find_images
from fpnx.inference.engine_cache import EngineCache
from fpnx.remote.client import connections
from fpnx.store.output_path import check_output, refuse_input
from fpnx.store.reader import PENDING, Store, open_store_file
from fpnx.store.writer import part_path

__all__ = ["Result", "compute", "library_versions", "planned_result", "provenance_of", "run_extraction"]


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        output: the file or folder, or its URL.
        images, done: number of images in it, and of those with features.
        failed: (path, reason) of each failed image.
        computed: number of images that this run computed.
        seconds: duration of the run without loading the model.
        timings: milliseconds per computed image, by stage.
        nonfinite: number of NaN and infinite values by level; in a strict run they are errors.
        allowed_failures: number of failed images up to which the run counts as successful.
        strict: whether the first failed image, or one with NaN or infinite values, stops the run.
        too_small: levels stored as float16 whose values, in a sample of images, are all too small for it.
        too_large: levels stored as float16 with values that are too large for it, and became infinite.
        stopped: why the run ended early; None where it did not.
        complete: whether `output` has its final name.
        duplicates: number of images with the bytes of another one before them; see `fpnx.store.info.duplicate_count`.
        dry_run: whether the run was only planned.
        image_notes: by kind of note, such as `"transparency"`, number of images that this run computed and that it is
            about; see `fpnx.core.image_notes`.
        lost: truncated archives, which may have had more images, one line each; each counts as a failed image.
        plan: summary of the plan.
        shard_results: of a distributed run, the engine and the result of each shard, as JSON has them; else None.
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
    too_large: tuple[str, ...] = ()
    stopped: str | None = None
    complete: bool = True
    duplicates: int = 0
    dry_run: bool = False
    lost: tuple[str, ...] = ()
    image_notes: Mapping[str, int] = field(default_factory=dict)
    plan: PlanSummary | None = field(default=None, repr=False)
    shard_results: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def images_per_second(self) -> float:
        """Computed images per second of the run."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    @property
    def exit_code(self) -> int:
        """1 where more images failed than allowed or the run stopped early, else 0."""
        has_nonfinite = self.strict and any(self.nonfinite.values())
        failures = len(self.failed) + len(self.lost)
        return 1 if self.stopped or has_nonfinite or failures > self.allowed_failures else 0

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            **(self.plan.to_json() if self.plan is not None else {}),
            **({"engine": dict(self.shard_results)} if self.shard_results is not None else {}),
            "dry_run": self.dry_run,
            "complete": self.complete,
            "done": self.done,
            "computed": self.computed,
            "duplicates": self.duplicates,
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
            "lost": list(self.lost),
            "image_notes": dict(self.image_notes),
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "ms_per_image": dict(self.timings),
            "nonfinite": dict(self.nonfinite),
            "too_small": list(self.too_small),
            "too_large": list(self.too_large),
            "stopped": self.stopped,
            "exit_code": self.exit_code,
        }


def run_extraction(
    images: Sequence[str | os.PathLike[str]],
    destination: Destination,
    config: ExtractConfig,
    *,
    listener: Listener | None = None,
    engine_cache: EngineCache | None = None,
    blocked: Mapping[bytes, str] | None = None,
) -> Result:
    """Extract the features of `images` to `destination`, in this process.

    Args:
        images: files, folders, archives, URLs, or `"@list.txt"`.
        destination: of the output, as `resolve_destination` gives it.
        config: the options.
        listener: receives the progress.
        engine_cache: holds the model and its engines, to share them between runs.
        blocked: by name, images that must not be opened, and why; they fail.

    Raises:
        FpnxError: for a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; the images that are done are kept.
    """
    listener, output, png = listener or Listener(), destination.local, config.format == "png"
    with connections(), scratch_folder(destination):
        if not png:
            check_output(output, config, may_exist=config.update)
        finished_url = check_destination(destination, config)
        with handle_signals(listener) as stop, pillow_limits():
            assert not isinstance(config.shard, str), "the config parses it"
            listing = find_images(images, config.limit, config.shard)
            if blocked:
                sources = tuple(replace(source, blocked=blocked.get(source.name, "")) for source in listing.sources)
                listing = replace(listing, sources=sources)
            for remark in (*listing.remarks, *listing.truncated):
                listener.message(remark)
            if not png:
                refuse_input(output, [config.weights, config.boxes or "", *(source.path for source in listing.sources)])
            with nullcontext(True) if config.dry_run else lock(output) as locked:
                if not locked:
                    listener.message("files cannot be locked here: see to it that no second run writes this output")
                if png:
                    from fpnx.extraction.png_sink import check_png_folder

                    check_png_folder(output, listing, config)
                else:  # again: another run may have ended in the meantime
                    check_output(output, config, may_exist=config.update)
                boxes = read_boxes(images, listing, config)
                for remark in () if boxes is None else boxes.remarks:
                    listener.message(remark)
                plan = make_plan(
                    output,
                    config,
                    listing,
                    listener,
                    engine_cache,
                    boxes=boxes,
                    destination=destination.url,
                    finished=finished_url,
                )
                if png:
                    config.check_channels({shape.level: shape.channels for shape in plan.shapes})
                listener.planned(plan.summary)
                with nullcontext() if plan.update is None else closing(plan.update):
                    if config.dry_run:
                        return planned_result(plan)
                    result = None if png else _finished_result(plan, finished_url)
                    if result is None:
                        result = compute(plan, _open_sink(plan, listener), stop, listener)
                if destination.url is not None and finished_url is None and result.complete:
                    upload(destination, plan.layout.config, listing.records, stop, listener)
                return result


def provenance_of(plan: Plan) -> Provenance:
    """The provenance that is stored in the output of `plan`: versions, options, weights, device, time."""
    return Provenance(
        versions=library_versions(),
        options=plan.config.repeatable() | ({} if plan.engine_cache.module is None else {"backbone": AS_GIVEN}),
        command=tuple(escape(argument) for argument in sys.argv[:64]),
        weights=plan.model.weights.info,
        recipe=str(plan.recipe),
        device=", ".join(map(_device_name, plan.devices)),
        precision=plan.precision,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        updated=plan.update.provenance() if plan.update is not None and plan.update.sources else None,
    )


def library_versions() -> dict[str, str]:
    """Versions of fpnx, Python and the libraries that numbers come from."""
    return {
        "fpnx": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "h5py": h5py.__version__,
    }


def _open_sink(plan: Plan, listener: Listener) -> Sink:
    """Open the sink for the output format of the plan."""
    if plan.config.format == "png":
        from fpnx.extraction.png_sink import PngSink

        return PngSink(plan, provenance_of(plan))
    return Hdf5Sink.open(plan, provenance_of(plan), listener)


def _finished_result(plan: Plan, url: str | None) -> Result | None:
    """The result of the run that has finished the output before, with `resume` or `update`; None where the run must go
    on.

    Args:
        plan: of this run.
        url: of a finished output in an object store.
    """
    if plan.update is not None and plan.update.existing == plan.output:
        part_path(plan.output).unlink(missing_ok=True)  # of a list that is no longer that of the run
    elif not plan.config.resume or part_path(plan.output).exists():
        return None
    output = plan.output if plan.output.exists() else url
    if output is None:
        return None
    with open_store_file(output) as store:
        _refuse_unfinished(plan.output, store)
        return _result(plan, outcome_of(store), StageTimer())


def planned_result(plan: Plan) -> Result:
    """The result of a dry run."""
    return _result(plan, Outcome(), StageTimer(), complete=False, dry_run=True)


def compute(plan: Plan, sink: Sink, stop: StopRequest, listener: Listener) -> Result:
    """Run the pipeline, then finish the sink, or commit what is done where the run stopped early.

    Raises:
        FpnxError: where the output cannot be written.
        Interrupted: on SIGINT or SIGTERM; the images that are done are kept.
    """
    timer, notes = StageTimer(), ImageNotes()
    try:
        stop.begin()
        stopped = None
        if plan.update is not None:
            assert isinstance(sink, Hdf5Sink)
            stopped = copy_features(plan.update, plan.layout, sink, plan.config.commit_every, stop, listener)
        stopped = stopped or run_pipeline(plan, sink, timer, notes, stop, listener)
        if stopped is None:
            sink.finish()
        else:
            sink.commit()
    finally:
        sink.close()
    timer.stop()
    result = _result(plan, sink.outcome(), timer, notes, complete=stopped is None, stopped=stopped)
    if stop.signum is not None and stopped == "interrupted":
        raise Interrupted(
            f"interrupted: {result.done} of {result.images} images are done and kept: continue with "
            f"{'--resume' if plan.update is None else '--update'}",
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
    timer: StageTimer,
    notes: ImageNotes | None = None,
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
        computed=timer.images,
        seconds=timer.seconds,
        timings={stage: 1000 * timer.stage_seconds[stage] / max(timer.images, 1) for stage in STAGES},
        nonfinite=outcome.nonfinite,
        allowed_failures=0 if plan.config.strict else plan.config.allowed_failures(count),
        strict=plan.config.strict,
        too_small=outcome.too_small,
        too_large=outcome.too_large,
        duplicates=outcome.duplicates,
        stopped=stopped,
        complete=complete,
        dry_run=dry_run,
        lost=plan.listing.truncated,
        image_notes=notes.to_json() if notes is not None else {},
        plan=plan.summary,
    )


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
