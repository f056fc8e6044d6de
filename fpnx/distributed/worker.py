"""Works on one shard at a time, for any backend: extraction as on one machine, with a log of attempts."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fpnx._version import __version__
from fpnx.core.config import ExtractConfig
from fpnx.core.errors import BusyError, FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.sharding import Shard, shard_path
from fpnx.core.text import escape
from fpnx.distributed.attempts import Attempt, AttemptLog
from fpnx.distributed.quarantine import Quarantine, find_culprits
from fpnx.extraction.run import Result, run_extraction
from fpnx.extraction.upload import resolve_destination
from fpnx.images.listing import Listing, find_images
from fpnx.inference.engine_cache import EngineCache
from fpnx.store.reader import PENDING, open_store_file
from fpnx.store.writer import part_path

__all__ = ["ProgressCallback", "ShardJob", "ShardReport", "Worker"]

# After this many worker deaths on a shard its images are tried one by one; after this many more it is given up.
MAX_DEATHS = 3
PROGRESS_INTERVAL = 1.0  # seconds
LOCK_TIMEOUT = 120.0  # seconds to wait for a shard's lock: a file server may keep a dead client's lock for that long

ProgressCallback = Callable[[int, int], bool]  # (shard, number of its finished images) → whether to stop


@dataclass(frozen=True)
class ShardJob:
    """What every worker of a run needs to know; all values can be written as JSON.

    Attributes:
        run: random name of this run; worker deaths are counted for each run.
        version: fpnx version of the driver.
        images: path of the image list, in the format of `fpnx list`.
        output: `/shared/out.h5`, from which the names of the shards' files are made.
        shards: number of shards.
        options: of `fpnx.extract`, for each shard.
    """

    run: str
    version: str
    images: str
    output: str
    shards: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ShardReport:
    """How the work on a shard ended; all values can be written as JSON.

    Attributes:
        shard: its number.
        state: "complete", "stopped" (by `strict`), "interrupted", "failed" or "quarantined" (given up).
        reason: why it is not complete.
        worker: process and host.
        computed, seconds, timings: as in `Result`.
        failed: number of its images that failed.
        image_notes: as in `Result`.
        culprits: names of images that killed their process.
        messages: for the user.
        elapsed: seconds that the worker spent on the shard.
    """

    shard: int
    state: str
    reason: str = ""
    worker: str = ""
    computed: int = 0
    seconds: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    failed: int = 0
    image_notes: Mapping[str, int] = field(default_factory=dict)
    culprits: Sequence[str] = ()
    messages: Sequence[str] = ()
    elapsed: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All fields as values for JSON."""
        return asdict(self)


class Worker:
    """Works on one shard after another and keeps the model; `worker(3)` returns the report of shard 3.

    Errors are part of the report and are not raised.

    Args:
        job: what to do.
        on_progress: called about every second with a shard and the number of its finished images; returns whether to
            stop.
    """

    def __init__(self, job: ShardJob, on_progress: ProgressCallback) -> None:
        self._job, self._on_progress = job, on_progress
        self._engine_cache = EngineCache()

    def __call__(self, index: int) -> ShardReport:
        started, listener = time.monotonic(), _ShardListener(index, self._on_progress)
        fields: dict[str, Any] = {"shard": index, "worker": f"process {os.getpid()} on {socket.gethostname()}"}
        try:
            listener.check_stop()
            fields |= _result_fields(self._work(index, listener))
        except Interrupted:
            fields |= {"state": "interrupted", "reason": "interrupted"}
        except _QuarantinedError as error:
            fields |= {"state": "quarantined", "reason": str(error)}
        except FpnxError as error:
            fields |= {"state": "failed", "reason": str(error)}
        except Exception as error:  # a bug that shows in one shard must not end the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
            fields |= {"state": "failed", "reason": f"internal error of fpnx, please report it: {what}"}
        culprits = Quarantine(self._file(index)).culprits(self._job.run)
        return ShardReport(
            **fields,
            culprits=[os.fsdecode(name) for name in culprits],
            messages=listener.messages,
            elapsed=time.monotonic() - started,
        )

    def _work(self, index: int, listener: _ShardListener) -> Result:
        """One attempt at a shard, which is in the attempt log while it runs.

        Raises:
            _QuarantinedError: too many workers died on this shard, also while searching for the cause.
        """
        if self._job.version != __version__:
            raise FpnxError(
                f"fpnx {__version__} is installed on {socket.gethostname()} and {self._job.version} where the run was "
                f"started: install one version everywhere"
            )
        file = self._file(index)
        log, quarantine = AttemptLog(file), Quarantine(file)
        attempts = log.attempts()
        deaths = [attempt for attempt in attempts if attempt.run == self._job.run]
        searches = sum(attempt.search for attempt in deaths)
        if searches >= MAX_DEATHS:
            raise _QuarantinedError(
                f"killed its worker {len(deaths)} times, the last {searches} while its images were tried one by one"
            )
        search, start_over = len(deaths) - searches >= MAX_DEATHS, _must_start_over(attempts, file)
        log.begin(self._job.run, search)
        try:
            blocked = self._search(index, quarantine, len(deaths), start_over, listener) if search else {}
            result = self._extract(index, start_over, blocked, listener)
        except BusyError:  # another worker has the lock; its attempt is in the same log, which must stay
            raise
        except BaseException:
            log.end()
            raise
        log.end()
        return result

    def _extract(self, index: int, start_over: bool, blocked: Mapping[bytes, str], listener: _ShardListener) -> Result:
        shard = Shard(index, self._job.shards)
        config = ExtractConfig(**self._job.options, shard=shard, resume=not start_over, overwrite=start_over)
        destination, deadline = resolve_destination(self._job.output, config), time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                return run_extraction(
                    self._images,
                    destination,
                    config,
                    listener=listener,
                    engine_cache=self._engine_cache,
                    blocked=blocked,
                )
            except BusyError:  # a worker that was declared dead may still run for a while
                if time.monotonic() > deadline:
                    raise
                time.sleep(PROGRESS_INTERVAL)
                listener.check_stop()

    def _search(
        self, index: int, quarantine: Quarantine, deaths: int, start_over: bool, listener: _ShardListener
    ) -> Mapping[bytes, str]:
        """Name and reason of each image that kills its process; each is written to `quarantine` at once."""
        culprits = quarantine.culprits(self._job.run)
        quarantine.write(self._job.run, deaths, culprits)
        listing = find_images(self._images, None, Shard(index, self._job.shards))
        pending = listing.sources if start_over else _pending(part_path(self._file(index)), listing)
        suspects = [source for source in pending if source.name not in culprits]
        listener.message(
            f"shard {index} killed its worker {deaths} times: trying {len(suspects)} images in other processes"
        )

        def add_culprit(name: bytes, reason: str) -> None:
            culprits[name] = reason
            quarantine.write(self._job.run, deaths, culprits)
            listener.message(f"{escape(name)} {reason}")

        if suspects:
            find_culprits(listing.root, suspects, self._job.options, add_culprit, listener.check_stop)
        return culprits

    @property
    def _images(self) -> list[str]:
        return [f"@{self._job.images}"]

    def _file(self, index: int) -> Path:
        return shard_path(Path(self._job.output), Shard(index, self._job.shards))


class _QuarantinedError(Exception):
    """A shard that must not be tried again in this run."""


class _ShardListener(Listener):
    """Passes progress on to the driver, asks it whether to stop, and collects messages for the report."""

    def __init__(self, shard: int, on_progress: ProgressCallback) -> None:
        self._shard, self._on_progress = shard, on_progress
        self._finished, self._last_call = 0, 0.0
        self.messages: list[str] = []

    def progress(self, what: str, done: int, total: int) -> None:
        if what == "images":
            self._finished = done
        if time.monotonic() - self._last_call >= PROGRESS_INTERVAL or done == total:
            self.check_stop()

    def message(self, text: str) -> None:
        self.messages.append(text)

    def check_stop(self) -> None:
        """Report progress, and raise Interrupted if the run is to stop."""
        self._last_call = time.monotonic()
        if self._on_progress(self._shard, self._finished):
            raise Interrupted("the run was stopped", signal.SIGTERM)


def _result_fields(result: Result) -> dict[str, Any]:
    """The fields of a `ShardReport` that come from `result`."""
    return {
        "state": "complete" if result.complete else "stopped",
        "reason": result.stopped or "",
        "computed": result.computed,
        "seconds": result.seconds,
        "timings": dict(result.timings),
        "failed": len(result.failed),
        "image_notes": dict(result.image_notes),
    }


def _must_start_over(attempts: Sequence[Attempt], file: Path) -> bool:
    """Whether a worker on another host may still be writing the unfinished file of a shard.

    It may have lost its connection and still run, and not every file system shows one host the locks of another. If the
    shard starts over in a new file, that worker writes on to a file without a name, see `Writer.finish`.
    """
    return bool(attempts) and attempts[-1].host != socket.gethostname() and not file.exists()


def _pending(part: Path, listing: Listing) -> Sequence[Any]:
    """The pending images of the unfinished file `part`; all images if there is no such file."""
    if not part.exists():
        return listing.sources
    with open_store_file(part) as store:
        if len(store) != len(listing.sources):
            return listing.sources
        return [listing.sources[i] for i in np.flatnonzero(store.status == PENDING).tolist()]
