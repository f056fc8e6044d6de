"""An extraction on many workers: the images are listed once and cut into shards, which an engine hands out."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fpnx._version import __version__
from fpnx.core.config import EngineConfig, ExtractConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.files import check_space, disk_error, lock, replace_file
from fpnx.core.image_list import ImageList, list_fingerprint
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.sharding import Shard, ShardSlice, shard_path
from fpnx.core.text import escape
from fpnx.distributed.placement import Node, Placement, place_actors
from fpnx.distributed.quarantine import AttemptLog, Quarantine
from fpnx.distributed.worker import ShardJob, ShardReport
from fpnx.extraction.pipeline import STAGES
from fpnx.extraction.plan import Plan, decode_threads, make_plan
from fpnx.extraction.run import Result
from fpnx.images.decoding import pillow_limits
from fpnx.images.listing import find_images
from fpnx.images.manifest import is_manifest, manifest_lines
from fpnx.inference.devices import resolve_precision
from fpnx.inference.engine_cache import EngineCache
from fpnx.remote.client import connections
from fpnx.remote.urls import is_url
from fpnx.store.output_path import DEFAULT_OUTPUTS, check_output, real_output
from fpnx.store.reader import DONE, PENDING, open_store_file
from fpnx.store.writer import check_same_run, part_path

__all__ = ["Backend", "RunningWork", "extract_distributed", "list_path", "shards_beside", "shards_for"]

SHARD_IMAGES = 1024  # at most: what a death can cost, and long enough to hide what handing out costs
HEED = 0.5  # seconds within which a signal is heard
GRACE = 30.0  # seconds that workers have to come back when they are told to stop
# Options that are the run's as a whole; those of its shards are other or none.
NOT_THEIRS = {"limit", "shard", "dry_run", "resume", "overwrite", *(each.name for each in fields(EngineConfig))}


class RunningWork(Protocol):
    """Shards that are being worked on."""

    def next(self, seconds: float) -> ShardReport | bool:
        """The next report; True where none came in time, False where none will come any more."""

    def finished(self) -> Mapping[int, int]:
        """Images that are finished, by shard, as workers last told."""

    def stop(self) -> None:
        """Have workers come back with what they have; shards that wait are not begun."""


class Backend(Protocol):
    """Who works on shards: what an engine gives."""

    def nodes(self) -> Sequence[Node]:
        """The machines that there are."""

    def hand_out(self, job: ShardJob, shards: Sequence[int], seats: Placement) -> RunningWork:
        """Start on `shards`, in their order."""


@dataclass
class ShardStatus:
    """How far a shard is, as its file says: images that are done, failed, and whether it has its final name."""

    done: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    complete: bool = False
    nonfinite: Mapping[str, int] | None = None

    @property
    def finished(self) -> int:
        """Images that nothing is left to do for."""
        return self.done + len(self.failed)


def extract_distributed(
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None,
    config: ExtractConfig,
    listener: Listener,
    engine: Callable[[], AbstractContextManager[Backend]],
) -> Result:
    """Images → one file for each shard, by the workers of `engine`; what is there of the same run is gone on with.

    Raises:
        FpnxError: a request that cannot be carried out; found before anything is handed out, where it can be.
        Interrupted: on SIGINT or SIGTERM; what was done is kept.
    """
    if output is not None and is_url(os.fsencode(output)):
        raise FpnxError(
            f"output {escape(os.fspath(output))}: workers go on with each other's files, on a disk that all of them "
            "see: name a file there, and send the shards when they are done"
        )
    target = real_output(Path(output or DEFAULT_OUTPUTS["h5"]).absolute())
    check_output(target, replace(config, resume=True, overwrite=False))  # its name alone: no file of it is made
    with connections(), handle_signals(listener) as stop, pillow_limits():
        listing = find_images(images, config.limit)
        for remark in (*listing.remarks, *listing.truncated):
            listener.message(remark)
        with contextlib.nullcontext(True) if config.dry_run else lock(target) as alone:
            if not alone:
                listener.message("files cannot be locked here: see to it that no second run writes these shards")
            count = _count(target, config, () if config.overwrite else shards_beside(target))
            plan = make_plan(target, replace(config, device="cpu"), listing, listener, EngineCache(), handed_out=True)
            run = _Campaign(target, plan, config, listener)
            if count is not None:
                run.cut(count)  # refuses other images and other options, before anything is started
            if config.dry_run:
                run.cut(count or shards_for(len(listing.sources), 1))
                listener.planned(run.plan.summary)
                return run.result(0.0, dry_run=True)
            with engine() as crew:
                seats = place_actors(crew.nodes(), config)
                run.seat(seats)
                if count is None:
                    run.cut(shards_for(len(listing.sources), seats.actors))
                run.check_space()
                listener.planned(run.plan.summary)
                return run.carry_out(lambda job, shards: crew.hand_out(job, shards, seats), stop)


def shards_for(images: int, actors: int) -> int:
    """Shards of at most `SHARD_IMAGES` images, the same number for each actor, and none empty."""
    rounds = -(-images // (SHARD_IMAGES * actors))
    return min(max(1, actors * rounds), images)


def shards_beside(output: Path) -> dict[Shard, list[Path]]:
    """The shards' files of `output` that are there, finished and not."""
    form = rf"{re.escape(output.stem)}\.shard-(\d{{5}})-of-(\d{{5}}){re.escape(output.suffix)}(\.part)?"
    found: dict[Shard, list[Path]] = {}
    for name in sorted(os.listdir(output.parent)):
        if match := re.fullmatch(form, name, re.ASCII):
            found.setdefault(Shard(int(match[1]), int(match[2])), []).append(output.with_name(name))
    return found


def list_path(output: Path) -> Path:
    """`out.h5` → `out.list.txt`, which all its shards are cut from."""
    return output.with_name(f"{output.stem}.list.txt")


class _Campaign:
    """One run: what was asked for, the shards, and how far each is."""

    def __init__(self, target: Path, plan: Plan, config: ExtractConfig, listener: Listener) -> None:
        self.target, self.plan, self.config, self.listener = target, plan, config, listener
        self.count = 0
        self.standing: list[ShardStatus] = []
        self.reports: dict[int, ShardReport] = {}
        self._shown: tuple[int, str] | None = None

    @property
    def total(self) -> int:
        """Images of all shards."""
        return len(self.plan.listing.sources)

    def cut(self, count: int) -> None:
        """Settle the number of shards, and look at what is there of them.

        Raises:
            FpnxError: for shards of other images or another config.
        """
        self.count = count
        pattern = shard_path(self.target, Shard(0, count)).name.replace("-00000-of-", "-*-of-")
        self.plan = replace(
            self.plan, output=self.target.with_name(pattern), config=replace(self.plan.config, shards=count)
        )
        if self.config.overwrite:
            self.standing = [ShardStatus() for _ in range(count)]
        else:
            self.look()

    def seat(self, seats: Placement) -> None:
        """Settle who works.

        Raises:
            FpnxError: for a precision that they do not have.
        """
        device = torch.device("cuda" if seats.gpus else "cpu")
        resolve_precision(self.config.precision, device)
        self.plan = replace(
            self.plan,
            config=replace(self.plan.config, actors=seats.actors, cpus=seats.cpus),
            devices=(device,),
            workers=decode_threads(self.config, self.plan.listing, seats.cpus),
            cpus=seats.cpus,
        )

    def look(self) -> None:
        """Read from every shard's file how far it is."""
        images = self.plan.layout.images
        whole = list_fingerprint(images.records)
        self.standing = []
        for index in range(self.count):
            shard = Shard(index, self.count)
            place = shard.slice(self.total)
            own = ImageList(
                images.root, images.records[place.start : place.stop], ShardSlice.of(shard, self.total, whole)
            )
            self.standing.append(self._look_at(shard_path(self.target, shard), own))
        self.plan = replace(self.plan, done_before=sum(each.done for each in self.standing))

    def check_space(self) -> None:
        """Raise FpnxError where the disk is too small for what is to come, as far as that is known."""
        needed = self.plan.layout.total_bytes()
        there = sum(path.stat().st_size for paths in shards_beside(self.target).values() for path in paths)
        check_space(self.target, needed - there, self.plan.bytes_free)

    def carry_out(self, hand_out: Callable[[ShardJob, Sequence[int]], RunningWork], stop: StopRequest) -> Result:
        """Write the list, have all shards worked on, and see what came of it."""
        todo = [index for index, each in enumerate(self.standing) if not each.complete]
        started = time.monotonic()
        stop.begin()
        stopped = None
        if self.config.overwrite:
            _remove(self.target)
        if todo:
            self._write_list()
            self._tell({})
            stopped = self._follow(hand_out(self._job(), todo), stop)
            self.look()
        result = self.result(time.monotonic() - started, stopped)
        if stop.signum is not None and stopped == "interrupted":
            raise Interrupted(
                f"interrupted: {result.done} of {result.images} images are done and kept: the same command goes on",
                stop.signum,
            )
        return result

    def result(self, seconds: float, stopped: str | None = None, dry_run: bool = False) -> Result:
        """All shards as one."""
        failed = tuple(failure for each in self.standing for failure in each.failed)
        computed = sum(report.computed for report in self.reports.values())
        spent = dict.fromkeys(STAGES, 0.0)
        for report in self.reports.values():
            for stage, ms in report.timings.items():
                spent[stage] += ms * report.computed
        nonfinite: dict[str, int] = {}
        for each in self.standing:
            for level, values in (each.nonfinite or {}).items():
                nonfinite[level] = nonfinite.get(level, 0) + values
        complete = all(each.complete for each in self.standing)
        return Result(
            output=self.plan.output,
            images=self.total,
            done=sum(each.done for each in self.standing),
            failed=failed,
            lost=self.plan.listing.truncated,
            computed=computed,
            seconds=seconds,
            timings={stage: value / max(computed, 1) for stage, value in spent.items()},
            nonfinite=nonfinite,
            allowed_failures=0 if self.config.strict else self.config.allowed_failures(self.total),
            strict=self.config.strict,
            stopped=stopped or (None if complete or dry_run else self._unfinished()),
            complete=complete and not dry_run,
            dry_run=dry_run,
            plan=self.plan.summary,
            engine=self._facts(),
        )

    def _look_at(self, file: Path, own: ImageList) -> ShardStatus:
        path = next((path for path in (file, part_path(file)) if path.exists()), None)
        if path is None:
            return ShardStatus()
        with open_store_file(path) as store:
            check_same_run(store, self.plan.layout.config, own)
            pending = bool((store.status == PENDING).any())
            if path == file and pending:
                raise FpnxError(
                    f"{escape(file)} is not finished, for all its name: rename it to {escape(part_path(file).name)} "
                    f"and give the same command again, or start over with --overwrite"
                )
            return ShardStatus(
                done=int((store.status == DONE).sum()),
                failed=tuple(store.failures()),
                complete=path == file,
                nonfinite=store.nonfinite_by_level(),
            )

    def _write_list(self) -> None:
        """The list that every worker reads its slice of, unless the very same is there."""
        path, listing = list_path(self.target), self.plan.listing
        if path.exists() and not is_manifest(os.fsencode(path)):
            raise FpnxError(f"{escape(path)} is in the way of the list of images: move it, or name another with -o")
        try:
            replace_file(path, manifest_lines(listing.root, listing.records.records, listing.skipped))
        except OSError as error:
            raise disk_error(error, path, 0) from error

    def _job(self) -> ShardJob:
        known = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        options = {name: list(v) if isinstance(v, tuple) else v for name, v in known.items() if name not in NOT_THEIRS}
        options |= {"device": self.plan.device.type, "cpus": self.plan.cpus}
        if os.path.isfile(self.config.weights):
            options["weights"] = os.path.abspath(self.config.weights)
        return ShardJob(
            run=secrets.token_hex(8),
            version=__version__,
            images=os.fspath(list_path(self.target)),
            output=os.fspath(self.target),
            shards=self.count,
            options=options,
        )

    def _follow(self, work: RunningWork, stop: StopRequest) -> str | None:
        """Show how the work goes on until it ends; why it ended early, or None."""
        stopped: str | None = None
        until = float("inf")
        while time.monotonic() < until:
            event = work.next(HEED)
            if event is False:
                break
            if isinstance(event, ShardReport):
                self._hear(event)
                if event.state == "stopped" and stopped is None:
                    stopped = event.reason
            if stop.signum is not None:
                stopped = "interrupted"
            if stopped is not None and until == float("inf"):
                work.stop()
                until = time.monotonic() + GRACE
            self._tell(work.finished())
        return stopped

    def _hear(self, report: ShardReport) -> None:
        self.reports[report.shard] = report
        for message in report.messages:
            self.listener.message(message)
        if report.state in ("failed", "quarantined"):
            self.listener.message(f"shard {report.shard}: {report.reason}")

    def _tell(self, told: Mapping[int, int]) -> None:
        finished = {index: each.finished for index, each in enumerate(self.standing)} | dict(told)
        ended = sum(each.complete for each in self.standing) + sum(r.state == "complete" for r in self.reports.values())
        failed = sum(len(each.failed) for each in self.standing) + sum(r.failed for r in self.reports.values())
        standing = f"shards {ended} of {self.count}, actors {self.plan.config.actors}"
        standing += f", failed {failed}" if failed else ""
        shown_now = (min(sum(finished.values()), self.total), standing)
        if shown_now != self._shown:
            self._shown = shown_now
            self.listener.status(standing)
            self.listener.progress("images", shown_now[0], self.total)

    def _unfinished(self) -> str:
        missing = [index for index, each in enumerate(self.standing) if not each.complete]
        why = {index: self.reports[index].reason for index in missing if index in self.reports}
        first = next(iter(why), missing[0])
        return (
            f"{len(missing)} of {self.count} shards are not finished, such as shard {first} "
            f"({why.get(first) or 'no worker came back with it'})"
        )

    def _facts(self) -> dict[str, Any]:
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
                | self._reported(index)
                for index, each in enumerate(self.standing)
            ],
        }

    def _reported(self, index: int) -> dict[str, Any]:
        report = self.reports.get(index)
        if report is None:
            return {}
        told = report.to_json()
        return {name: told[name] for name in ("state", "reason", "worker", "computed", "elapsed", "culprits")}


def _count(target: Path, config: ExtractConfig, there: Iterable[Shard]) -> int | None:
    """How many shards there are to be: as many as there are already, or as were asked for; None: neither.

    Raises:
        FpnxError: for shards of several cuts, or another number than was asked for.
    """
    counts = sorted({shard.count for shard in there})
    if len(counts) > 1:
        raise FpnxError(
            f"beside {escape(target)} are shards of {' and '.join(map(str, counts))}: remove those of all but one, or "
            f"start over with --overwrite"
        )
    if counts and config.shards not in ("auto", counts[0]):
        raise FpnxError(
            f"--shards {config.shards}: the shards that are there are of {counts[0]}: leave the option out to go on "
            f"with them, or start over with --overwrite"
        )
    if counts:
        return counts[0]
    return config.shards if isinstance(config.shards, int) else None


def _remove(target: Path) -> None:
    """Take away the shards that are there, and what is kept beside them.

    Raises:
        FpnxError: where somebody is working on one.
    """
    for shard, paths in shards_beside(target).items():
        file = shard_path(target, shard)
        with lock(file):
            for path in (*paths, AttemptLog(file).path, Quarantine(file).path):
                path.unlink(missing_ok=True)
