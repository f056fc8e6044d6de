"""Driver of a distributed extraction: lists the images once, cuts them into shards, and lets a backend work on them."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fpnx._version import __version__
from fpnx.core.config import DistributedConfig, ExtractConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.files import SMALLER_FEATURES, check_space, lock
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.sharding import Shard, shard_path
from fpnx.core.text import escape
from fpnx.distributed.placement import Node, Placement, place_actors
from fpnx.distributed.shard_files import (
    ShardStatus,
    choose_shard_count,
    find_shard_files,
    fixed_shard_count,
    list_path,
    read_shard_status,
    remove_shards,
    write_list,
)
from fpnx.distributed.worker import ShardJob, ShardReport
from fpnx.extraction.pipeline import STAGES
from fpnx.extraction.plan import Plan, decode_threads, make_plan
from fpnx.extraction.regions import read_boxes
from fpnx.extraction.run import Result
from fpnx.extraction.update import digest_reader
from fpnx.images.decoding import pillow_limits
from fpnx.images.listing import find_images
from fpnx.inference.devices import resolve_precision
from fpnx.inference.engine_cache import EngineCache
from fpnx.remote.client import connections
from fpnx.remote.urls import is_url
from fpnx.store.output_path import DEFAULT_OUTPUTS, check_output, real_output

__all__ = ["Backend", "RunningWork", "extract_distributed"]

POLL_INTERVAL = 0.5  # seconds between two checks for a signal
STOP_TIMEOUT = 30.0  # seconds that workers have to report after they were asked to stop
# Options of the whole run, which are not passed on to the extraction of a shard.
RUN_OPTIONS = {"limit", "shard", "dry_run", "resume", "overwrite", *(field.name for field in fields(DistributedConfig))}


class RunningWork(Protocol):
    """Shards that a backend is working on."""

    @property
    def running(self) -> bool:
        """Whether reports are still to come."""

    def next_report(self, timeout: float) -> ShardReport | None:
        """The next report, or None if none comes within `timeout` seconds. Only called while `running`."""

    def images_finished(self) -> Mapping[int, int]:
        """Number of finished images by shard, as last reported by the workers."""

    def stop(self) -> None:
        """Ask the workers to commit what they have and report; waiting shards are not begun."""


class Backend(Protocol):
    """Runs workers on the machines of a cluster."""

    def nodes(self) -> Sequence[Node]:
        """The machines of the cluster."""

    def submit(self, job: ShardJob, shards: Sequence[int], placement: Placement) -> RunningWork:
        """Start work on `shards`, in this order."""


def extract_distributed(
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None,
    config: ExtractConfig,
    listener: Listener,
    connect: Callable[[], AbstractContextManager[Backend]],
) -> Result:
    """Extract images into one file per shard, with the workers of a backend; existing shards of this run are continued.

    Args:
        images: files, folders, archives, addresses, or `"@list.txt"`.
        output: `/shared/out.h5`, from which the names of the shards' files are made; all machines must see it.
        config: options of the run.
        listener: receives the progress.
        connect: opens the backend; not called for a dry run.

    Raises:
        FpnxError: a request that cannot be carried out; most are found before any work is handed out.
        Interrupted: on SIGINT or SIGTERM; finished work is kept.
    """
    if output is not None and is_url(os.fsencode(output)):
        raise FpnxError(
            f"output {escape(os.fspath(output))}: workers continue each other's files, which must lie on a disk "
            "that all machines see: name a file there, and upload the shards when they are done"
        )
    target = real_output(Path(output or DEFAULT_OUTPUTS["h5"]).absolute())
    check_output(target, replace(config, resume=True, overwrite=False))  # only the name: no file of this name is made
    with connections(), handle_signals(listener) as stop, pillow_limits():
        listing = find_images(images, config.limit)
        for remark in (*listing.remarks, *listing.truncated):
            listener.message(remark)
        with contextlib.nullcontext(True) if config.dry_run else lock(target) as locked:
            if not locked:
                listener.message("files cannot be locked here: see to it that no second run writes these shards")
            count = fixed_shard_count(target, config)
            boxes = read_boxes(images, listing, config)
            for remark in () if boxes is None else boxes.remarks:
                listener.message(remark)
            local = replace(config, device="cpu")
            plan = make_plan(target, local, listing, listener, EngineCache(), boxes=boxes, handed_out=True)
            run = _DistributedRun(target, plan, config, listener)
            if count is not None:
                run.set_shard_count(count)  # refuses other images and options before the backend is started
            if config.dry_run:
                run.set_shard_count(count or choose_shard_count(len(listing.sources), 1))
                listener.planned(run.plan.summary)
                return run.result(0.0, dry_run=True)
            with connect() as backend:
                placement = place_actors(backend.nodes(), config)
                run.set_placement(placement)
                if count is None:
                    run.set_shard_count(choose_shard_count(len(listing.sources), placement.actors))
                run.check_space()
                listener.planned(run.plan.summary)
                return run.execute(lambda job, shards: backend.submit(job, shards, placement), stop)


class _DistributedRun:
    """State of one run: its plan, and the status and the report of each shard."""

    def __init__(self, target: Path, plan: Plan, config: ExtractConfig, listener: Listener) -> None:
        self.target, self.plan, self.config, self.listener = target, plan, config, listener
        self.count = 0
        self.status: list[ShardStatus] = []
        self.reports: dict[int, ShardReport] = {}
        self._last_shown: tuple[int, str] | None = None
        self._read_digests = digest_reader(plan.listing, config.max_pixels, plan.workers, listener)
        self._said = set[str]() if plan.regions is None else {*plan.regions.boxes.remarks}

    @property
    def total(self) -> int:
        """Number of images of all shards."""
        return len(self.plan.listing.sources)

    def set_shard_count(self, count: int) -> None:
        """Set the number of shards, and read the status of those that exist.

        Raises:
            FpnxError: they are of other images or another config.
        """
        self.count = count
        pattern = shard_path(self.target, Shard(0, count)).name.replace("-00000-of-", "-*-of-")
        self.plan = replace(
            self.plan, output=self.target.with_name(pattern), config=replace(self.plan.config, shards=count)
        )
        if self.config.overwrite:
            self.status = [ShardStatus() for _ in range(count)]
        else:
            self.read_status()

    def set_placement(self, placement: Placement) -> None:
        """Put the workers' device, processors and threads into the plan.

        Raises:
            FpnxError: their device does not have the precision that was asked for.
        """
        device = torch.device("cuda" if placement.gpus else "cpu")
        resolve_precision(self.config.precision, device)
        self.plan = replace(
            self.plan,
            config=replace(self.plan.config, actors=placement.actors, cpus=placement.cpus),
            devices=(device,),
            workers=decode_threads(self.config.workers, self.plan.listing, placement.cpus),
            cpus=placement.cpus,
        )

    def read_status(self) -> None:
        """Read the status of all shards from their files."""
        layout = self.plan.layout
        self.status = read_shard_status(self.target, self.count, layout.images, layout.config, self._read_digests)
        self.plan = replace(self.plan, done_before=sum(each.done for each in self.status))

    def check_space(self) -> None:
        """Raise FpnxError if the disk is too small for the rest, as far as its size is known."""
        needed = self.plan.layout.total_bytes()
        existing = sum(path.stat().st_size for paths in find_shard_files(self.target).values() for path in paths)
        check_space(self.target, needed - existing, self.plan.bytes_free, SMALLER_FEATURES)

    def execute(self, submit: Callable[[ShardJob, Sequence[int]], RunningWork], stop: StopRequest) -> Result:
        """Write the image list, have all unfinished shards worked on, and read what the files hold then."""
        todo = [index for index, each in enumerate(self.status) if not each.complete]
        started = time.monotonic()
        stop.begin()
        stopped = None
        if self.config.overwrite:
            remove_shards(self.target)
        if todo:
            write_list(self.target, self.plan.listing)
            self._show_progress({})
            stopped = self._collect_reports(submit(self._job(), todo), stop)
            self.read_status()
        result = self.result(time.monotonic() - started, stopped)
        if stop.signum is not None and stopped == "interrupted":
            raise Interrupted(
                f"interrupted: {result.done} of {result.images} images are done and kept: the same command goes on",
                stop.signum,
            )
        return result

    def result(self, seconds: float, stopped: str | None = None, dry_run: bool = False) -> Result:
        """The result of all shards together."""
        failed = tuple(failure for each in self.status for failure in each.failed)
        computed = sum(report.computed for report in self.reports.values())
        milliseconds = dict.fromkeys(STAGES, 0.0)
        for report in self.reports.values():
            for stage, per_image in report.timings.items():
                milliseconds[stage] += per_image * report.computed
        nonfinite: dict[str, int] = {}
        for each in self.status:
            for level, values in (each.nonfinite or {}).items():
                nonfinite[level] = nonfinite.get(level, 0) + values
        notes: Counter[str] = Counter()
        for report in self.reports.values():
            notes.update(report.image_notes)
        complete = all(each.complete for each in self.status)
        return Result(
            output=self.plan.output,
            images=self.total,
            done=sum(each.done for each in self.status),
            failed=failed,
            lost=self.plan.listing.truncated,
            image_notes=dict(notes),
            computed=computed,
            seconds=seconds,
            timings={stage: value / max(computed, 1) for stage, value in milliseconds.items()},
            nonfinite=nonfinite,
            too_large=tuple(dict.fromkeys(level for each in self.status for level in each.too_large)),
            allowed_failures=0 if self.config.strict else self.config.allowed_failures(self.total),
            strict=self.config.strict,
            stopped=stopped or (None if complete or dry_run else self._why_unfinished()),
            complete=complete and not dry_run,
            dry_run=dry_run,
            plan=self.plan.summary,
            shard_results=self._engine_json(),
        )

    def _job(self) -> ShardJob:
        options = {
            field.name: getattr(self.config, field.name)
            for field in fields(self.config)
            if field.name not in RUN_OPTIONS
        }
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        options |= {"device": self.plan.device.type, "cpus": self.plan.cpus}
        if os.path.isfile(self.config.weights):
            options["weights"] = os.path.abspath(self.config.weights)
        if self.config.boxes is not None:
            options["boxes"] = self.config.repeatable()["boxes"]
        return ShardJob(
            run=secrets.token_hex(8),
            version=__version__,
            images=os.fspath(list_path(self.target)),
            output=os.fspath(self.target),
            shards=self.count,
            options=options,
        )

    def _collect_reports(self, work: RunningWork, stop: StopRequest) -> str | None:
        """Collect reports and show progress until the work ends; returns why it ended early, or None."""
        stopped: str | None = None
        deadline = float("inf")
        while work.running and time.monotonic() < deadline:
            report = work.next_report(POLL_INTERVAL)
            if report is not None:
                self._add_report(report)
                if report.state == "stopped" and stopped is None:
                    stopped = report.reason
            if stop.signum is not None:
                stopped = "interrupted"
            if stopped is not None and deadline == float("inf"):
                work.stop()
                deadline = time.monotonic() + STOP_TIMEOUT
            self._show_progress(work.images_finished())
        return stopped

    def _add_report(self, report: ShardReport) -> None:
        self.reports[report.shard] = report
        for message in report.messages:
            if message not in self._said:  # each worker says what is left out of the boxes
                self.listener.message(message)
        if report.state in ("failed", "quarantined"):
            self.listener.message(f"shard {report.shard}: {report.reason}")

    def _show_progress(self, images_finished: Mapping[int, int]) -> None:
        reports = self.reports.values()
        finished = {index: each.finished for index, each in enumerate(self.status)} | dict(images_finished)
        complete = sum(each.complete for each in self.status) + sum(each.state == "complete" for each in reports)
        failed = sum(len(each.failed) for each in self.status) + sum(each.failed for each in reports)
        text = f"shards {complete} of {self.count}, actors {self.plan.config.actors}"
        text += f", failed {failed}" if failed else ""
        images = min(sum(finished.values()), self.total)
        if (images, text) != self._last_shown:
            self._last_shown = (images, text)
            self.listener.status(text)
            self.listener.progress("images", images, self.total)

    def _why_unfinished(self) -> str:
        unfinished = [index for index, each in enumerate(self.status) if not each.complete]
        reasons = {index: self.reports[index].reason for index in unfinished if index in self.reports}
        first = next(iter(reasons), unfinished[0])
        return (
            f"{len(unfinished)} of {self.count} shards are not finished, such as shard {first} "
            f"({reasons.get(first) or 'no worker reported on it'})"
        )

    def _engine_json(self) -> dict[str, Any]:
        config = self.plan.config
        return {
            "name": config.engine,
            "actors": config.actors,
            "cpus": config.cpus,
            "shards": [
                {
                    "shard": index,
                    "file": os.fspath(shard_path(self.target, Shard(index, self.count))),
                    "complete": each.complete,
                    "done": each.done,
                    "failed": len(each.failed),
                }
                | self._report_json(index)
                for index, each in enumerate(self.status)
            ],
        }

    def _report_json(self, index: int) -> dict[str, Any]:
        report = self.reports.get(index)
        if report is None:
            return {}
        values = report.to_json()
        return {name: values[name] for name in ("state", "reason", "worker", "computed", "elapsed", "culprits")}
