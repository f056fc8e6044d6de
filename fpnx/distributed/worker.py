"""What a worker does with a shard, whichever engine hands it out: the same as a run on one machine, and a ledger."""

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
from fpnx.distributed.quarantine import Attempt, AttemptLog, Quarantine, find_culprits
from fpnx.extraction.run import Result, run_extraction
from fpnx.extraction.upload import resolve_destination
from fpnx.images.listing import Listing, find_images
from fpnx.inference.engine_cache import EngineCache
from fpnx.store.reader import PENDING, open_store_file
from fpnx.store.writer import part_path

__all__ = ["ShardJob", "ShardReport", "Worker"]

DEATHS = 3  # of workers, from which on a shard is searched for the image to blame; and of searches, to give it up
TELL_EVERY = 1.0  # seconds
BUSY = 120.0  # seconds to wait for a lock: what a file server takes to forget a client that is gone

Tell = Callable[[int, int], bool]  # shard, images of it that are finished → whether to stop


@dataclass(frozen=True)
class ShardJob:
    """What all workers of a run are told; plain values.

    Attributes:
        run: a name of this run, under which deaths are counted.
        version: of the fpnx that hands it out.
        images: the file that `fpnx list` would write.
        output: `/shared/out.h5`, of which shards' names are made.
        shards: how many there are.
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
    """How the work on a shard ended; plain values.

    Attributes:
        shard: its number.
        state: "complete"; "stopped", by `strict`; "interrupted"; "failed"; "quarantined", where it was given up.
        reason: why it is not complete.
        worker: host and process.
        computed, seconds, timings: as `Result` has them.
        failed: how many of its images have failed.
        culprits: names of images that killed workers.
        messages: what a run on one machine would have said.
        elapsed: seconds from taking the shard to this report.
    """

    shard: int
    state: str
    reason: str = ""
    worker: str = ""
    computed: int = 0
    seconds: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    failed: int = 0
    culprits: Sequence[str] = ()
    messages: Sequence[str] = ()
    elapsed: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        return asdict(self)


class Worker:
    """Works on one shard after another with one model; `worker(3)` → a report, whatever happens, unless it dies.

    Args:
        job: what to do.
        tell: hears how far a shard is, about every second; gives back whether to stop.
    """

    def __init__(self, job: ShardJob, tell: Tell) -> None:
        self._job, self._tell = job, tell
        self._equipment = EngineCache()

    def __call__(self, index: int) -> ShardReport:
        started, ear = time.monotonic(), _Ear(index, self._tell)
        known: dict[str, Any] = {"shard": index, "worker": f"process {os.getpid()} on {socket.gethostname()}"}
        try:
            ear.heed()
            known |= self._told(self._work(index, ear), index)
        except Interrupted:
            known |= {"state": "interrupted", "reason": "interrupted"}
        except _GivenUpError as error:
            known |= {"state": "quarantined", "reason": str(error)}
        except FpnxError as error:
            known |= {"state": "failed", "reason": str(error)}
        except Exception as error:  # one shard's fault must not end the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
            known |= {"state": "failed", "reason": f"a fault of fpnx, please report it: {what}"}
        culprits = Quarantine(self._file(index)).culprits(self._job.run)
        return ShardReport(
            **known,
            culprits=[os.fsdecode(name) for name in culprits],
            messages=ear.messages,
            elapsed=time.monotonic() - started,
        )

    def _work(self, index: int, ear: _Ear) -> Result:
        """One attempt, written down in the ledger for as long as it goes on.

        Raises:
            _GivenUpError: where the search for the culprit died as often as the work.
        """
        if self._job.version != __version__:
            raise FpnxError(
                f"fpnx {__version__} is installed on {socket.gethostname()} and {self._job.version} where the run was "
                f"started: install one version everywhere"
            )
        file = self._file(index)
        ledger, quarantine = AttemptLog(file), Quarantine(file)
        before = ledger.attempts()
        deaths = [attempt for attempt in before if attempt.run == self._job.run]
        searches = sum(attempt.search for attempt in deaths)
        if searches >= DEATHS:
            raise _GivenUpError(
                f"killed its worker {len(deaths)} times, the last {searches} while its images were tried one by one"
            )
        search, fresh = len(deaths) - searches >= DEATHS, _nobody_knows(before, file)
        ledger.begin(self._job.run, search)
        try:
            blocked = self._search(index, quarantine, len(deaths), fresh, ear) if search else {}
            result = self._extract(index, fresh, blocked, ear)
        except BusyError:  # somebody works on it, and that is written in the ledger
            raise
        except BaseException:
            ledger.end()
            raise
        ledger.end()
        return result

    def _extract(self, index: int, fresh: bool, blocked: Mapping[bytes, str], ear: _Ear) -> Result:
        shard = Shard(index, self._job.shards)
        config = ExtractConfig(**self._job.options, shard=shard, resume=not fresh, overwrite=fresh)
        goal, patience = resolve_destination(self._job.output, config), time.monotonic() + BUSY
        while True:
            try:
                return run_extraction(
                    self._images, goal, config, listener=ear, equipment=self._equipment, blocked=blocked
                )
            except BusyError:  # a worker that is thought dead may take its time to die
                if time.monotonic() > patience:
                    raise
                time.sleep(TELL_EVERY)
                ear.heed()

    def _search(self, index: int, quarantine: Quarantine, deaths: int, fresh: bool, ear: _Ear) -> Mapping[bytes, str]:
        """The images that kill their process, by name; each is written down when it is found."""
        culprits = quarantine.culprits(self._job.run)
        quarantine.write(self._job.run, deaths, culprits)
        listing = find_images(self._images, None, Shard(index, self._job.shards))
        pending = listing.sources if fresh else _pending(part_path(self._file(index)), listing)
        suspects = [source for source in pending if source.name not in culprits]
        ear.message(f"shard {index} killed its worker {deaths} times: trying {len(suspects)} images in other processes")

        def found(name: bytes, reason: str) -> None:
            culprits[name] = reason
            quarantine.write(self._job.run, deaths, culprits)
            ear.message(f"{escape(name)} {reason}")

        if suspects:
            find_culprits(listing.root, suspects, self._job.options, found, ear.heed)
        return culprits

    def _told(self, result: Result, index: int) -> dict[str, Any]:
        return {
            "state": "complete" if result.complete else "stopped",
            "reason": result.stopped or "",
            "computed": result.computed,
            "seconds": result.seconds,
            "timings": dict(result.timings),
            "failed": len(result.failed),
        }

    @property
    def _images(self) -> list[str]:
        return [f"@{self._job.images}"]

    def _file(self, index: int) -> Path:
        return shard_path(Path(self._job.output), Shard(index, self._job.shards))


class _GivenUpError(Exception):
    """A shard that nobody should try again in this run."""


class _Ear(Listener):
    """Tells how far a shard is, hears whether to stop, and keeps messages for the report."""

    def __init__(self, shard: int, tell: Tell) -> None:
        self._shard, self._tell = shard, tell
        self._finished, self._told = 0, 0.0
        self.messages: list[str] = []

    def progress(self, what: str, done: int, total: int) -> None:
        if what == "images":
            self._finished = done
        if time.monotonic() - self._told >= TELL_EVERY or done == total:
            self.heed()

    def message(self, text: str) -> None:
        self.messages.append(text)

    def heed(self) -> None:
        """Raises Interrupted where the run is to stop."""
        self._told = time.monotonic()
        if self._tell(self._shard, self._finished):
            raise Interrupted("the run was stopped", signal.SIGTERM)


def _nobody_knows(attempts: Sequence[Attempt], file: Path) -> bool:
    """Whether to begin anew, because a worker on another host may still be writing what it left.

    It may be cut off and alive, and not every file system lets a host see another's locks. A new file in the place of
    the old takes that worker's work away from it: it goes on in a file that has lost its name, see `Writer.finish`.
    """
    return bool(attempts) and attempts[-1].host != socket.gethostname() and not file.exists()


def _pending(part: Path, listing: Listing) -> Sequence[Any]:
    """The images of an unfinished file that are not done; all of them where there is none."""
    if not part.exists():
        return listing.sources
    with open_store_file(part) as store:
        if len(store) != len(listing.sources):
            return listing.sources
        return [listing.sources[i] for i in np.flatnonzero(store.status == PENDING).tolist()]
