"""A folder of images → model → store: the whole pipeline."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import PIL
import torch
import torchvision

from fpnx._version import __version__
from fpnx.config import ExtractConfig, parse_extent
from fpnx.control import Listener, Stop, stoppable
from fpnx.disk import lock
from fpnx.engine import Engine, Features
from fpnx.errors import FpnxError, ImageError, Interrupted, shown
from fpnx.fitting import Fitting
from fpnx.images import Budget, Listing, decode, find, pillow_within_limits
from fpnx.planning import Plan, check_output, make_plan, real_output
from fpnx.store import DONE, PENDING, Store, open_store
from fpnx.writer import Writer, part_of

__all__ = ["Result", "extract"]

_Item = TypeVar("_Item")
STAGES = ("decode", "resize", "forward", "write")
DEFAULT_OUTPUT = "out.h5"


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        output: the file.
        images, done: how many there are in it, and how many hold features.
        failed: (path, reason) of each failed image.
        computed: how many this run computed.
        seconds: of computing, without loading the model.
        timings: milliseconds per computed image, by stage.
        nonfinite: NaN and infinite values, by level; in a strict run they are errors.
        stopped: why `strict` ended it early; None where it did not.
        complete: whether `output` has its final name.
        facts: what was planned, as plain values.
    """

    output: Path
    images: int
    done: int
    failed: tuple[tuple[str, str], ...]
    computed: int
    seconds: float
    timings: Mapping[str, float]
    nonfinite: Mapping[str, int]
    allowed_failures: int
    strict: bool = False
    stopped: str | None = None
    complete: bool = True
    dry_run: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def images_per_second(self) -> float:
        """Computed images over the seconds that it took."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    @property
    def exit_code(self) -> int:
        """0, or 1 where more images failed than allowed or `strict` stopped the run."""
        not_finite = self.strict and any(self.nonfinite.values())
        return 1 if self.stopped or not_finite or len(self.failed) > self.allowed_failures else 0

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        return {
            **self.facts,
            "dry_run": self.dry_run,
            "complete": self.complete,
            "done": self.done,
            "computed": self.computed,
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "ms_per_image": dict(self.timings),
            "nonfinite": dict(self.nonfinite),
            "stopped": self.stopped,
            "exit_code": self.exit_code,
        }


def extract(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = DEFAULT_OUTPUT,
    *,
    listener: Listener | None = None,
    **options: Any,
) -> Result:
    """Images → pyramid levels in an HDF5 file; `fpnx extract` as a function.

    Args:
        images: files, folders, or `"@list.txt"`.
        output: the file to make; the work goes on in `output` + `.part`.
        listener: hears of the progress.
        options: the fields of `fpnx.ExtractConfig`, with its defaults: `backbone="mobilenet_v2"`,
            `weights="random"`, `levels="P3-P5"`, `size=224`, `resume=True`, …

    Returns:
        How it ended; images that failed are in `result.failed` and do not raise.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; what was done is kept.
        TypeError: an option that does not exist.
    """
    config = ExtractConfig(**options)
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    target, hears = real_output(Path(output)), listener or Listener()
    check_output(target, config)
    with stoppable(hears) as stop, pillow_within_limits():
        listing = find(paths)
        if config.limit is not None:
            listing = Listing(listing.root, listing.sources[: config.limit], listing.skipped)
        with nullcontext(True) if config.dry_run else lock(target) as alone:
            if not alone:
                hears.message("files cannot be locked here: see to it that no second run writes this output")
            check_output(target, config)  # again: another run may have ended since
            plan = make_plan(target, config, listing, hears)
            hears.planned(plan)
            if config.dry_run:
                return _result(plan, None, _Clock(), dry_run=True)
            if config.resume and target.exists() and not part_of(target).exists():
                with open_store(target) as store:
                    _refuse_unfinished(target, store)
                    return _result(plan, store, _Clock())
            return _run(plan, stop, hears)


def _run(plan: Plan, stop: Stop, listener: Listener) -> Result:
    clock = _Clock()
    if plan.config.resume and part_of(plan.output).exists():
        writer = Writer.reopen(plan.output)
    else:
        writer = Writer.create(plan.output, plan.layout, _provenance(plan))
        if not writer.space_is_claimed:
            listener.message("this file system cannot set space aside: free space was checked once, now")
    try:
        stop.begin()
        stopped = _compute(plan, writer, clock, stop, listener)
        if stopped is None:
            writer.finish()
        else:
            writer.commit()
    finally:
        writer.close()
    clock.stop()
    with open_store(part_of(plan.output) if stopped else plan.output) as store:
        result = _result(plan, store, clock, stopped=stopped)
    if stop.signum is not None and stopped == "interrupted":
        raise Interrupted(
            f"interrupted: {result.done} of {result.images} images are done and kept: continue with --resume",
            stop.signum,
        )
    return result


def _compute(plan: Plan, writer: Writer, clock: _Clock, stop: Stop, listener: Listener) -> str | None:
    """Decode, forward and write, overlapped; returns why it stopped early, or None."""
    engine = Engine(plan.model, plan.recipe, plan.config, plan.device)
    pending = np.flatnonzero((writer.status != DONE) & (plan.layout.rows >= 0)).tolist()
    total = len(plan.listing.sources)
    finished = total - len(pending)
    listener.progress("images", finished, total)

    def load(index: int) -> _Loaded | ImageError:
        try:
            return _load(plan, index, budget, clock)
        except ImageError as error:
            return error
        except MemoryError:
            return ImageError("out of memory while it was read: lower --workers, or refuse such with --max-pixels")
        except Exception as error:  # one odd file must not end a run of hours
            return ImageError(f"{type(error).__name__}: {error}")

    def write(indices: Sequence[int], features: Features, sizes: np.ndarray) -> None:
        with clock("write"):
            writer.put(indices, features.arrays, sizes, features.nonfinite)
            commit_when_due()

    def fail(index: int, reason: str) -> None:
        writer.fail(index, reason)
        commit_when_due()

    def commit_when_due() -> None:
        if clock.since_commit() >= plan.config.commit_every:
            writer.commit()
            clock.committed()

    budget = Budget(plan.config.max_pixels)
    fitting = Fitting(engine, listener.message)
    decoders, scribe = ThreadPoolExecutor(plan.workers), ThreadPoolExecutor(1)
    writes: deque[Future[None]] = deque()
    try:
        clock.start()
        strict = plan.config.strict
        if strict and plan.layout.errors:
            return _strictly(plan, *next(iter(plan.layout.errors.items())))
        batches = list(_batches(plan, pending))
        load_batch: Callable[[list[int]], list[Future[_Loaded | ImageError]]]
        load_batch = lambda batch: [decoders.submit(load, index) for index in batch]  # noqa: E731
        waiting = deque(load_batch(batch) for batch in batches[:2])
        for position, batch in enumerate(batches):
            if stop.signum is not None:
                return "interrupted"
            loaded = [future.result() for future in waiting.popleft()]
            if position + 2 < len(batches):
                waiting.append(load_batch(batches[position + 2]))
            for index, image in zip(batch, loaded, strict=True):
                if isinstance(image, ImageError):
                    writes.append(scribe.submit(fail, index, str(image)))
                    if strict:
                        return _strictly(plan, index, str(image))
            good = [(i, image) for i, image in zip(batch, loaded, strict=True) if isinstance(image, _Loaded)]
            for piece, features in clock.over("forward", fitting([image.pixels for _, image in good])):
                indices = [index for index, _ in good[piece]]
                if features is not None:
                    sizes = np.array([image.source_size for _, image in good[piece]], np.int32)
                    writes.append(scribe.submit(write, indices, features, sizes))
                bad = _failures(indices, features, strict)
                for index, reason in bad.items():
                    writes.append(scribe.submit(fail, index, reason))
                if bad and strict:
                    return _strictly(plan, *next(iter(bad.items())))
            while len(writes) > 2:
                writes.popleft().result()
            finished += len(batch)
            clock.images += len(batch)
            listener.progress("images", finished, total)
        return None
    except Interrupted:  # at once: what is queued is dropped, and what is being written is not yet marked
        scribe.shutdown(wait=False, cancel_futures=True)
        writes.clear()
        raise
    finally:
        decoders.shutdown(cancel_futures=True)
        scribe.shutdown()
        for write_done in writes:
            write_done.result()


@dataclass(frozen=True)
class _Loaded:
    pixels: np.ndarray
    source_size: tuple[int, int]


def _load(plan: Plan, index: int, budget: Budget, clock: _Clock) -> _Loaded:
    with budget.share() as claim:
        with clock("decode"):
            picture = decode(plan.listing.sources[index], plan.config.max_pixels, claim)
        source = (picture.height, picture.width)
        size = plan.recipe.input_size(source, plan.config.max_pixels)
        if size != tuple(plan.layout.sizes[index].tolist()):
            raise ImageError("its header and its pixels disagree about the size")
        with clock("resize"):
            return _Loaded(plan.recipe.resize(picture, size), source)


def _failures(indices: Sequence[int], features: Features | None, strict: bool) -> dict[int, str]:
    """Why each image of a batch failed; in a strict run also for NaN and infinite values."""
    if features is None:
        return dict.fromkeys(indices, "out of memory, even alone: take a smaller --size")
    found: dict[int, str] = {}
    for position, index in enumerate(indices) if strict else ():
        bad = [f"{counts[position]} in {level}" for level, counts in features.nonfinite.items() if counts[position]]
        if bad:
            found[index] = f"NaN or infinite values: {', '.join(bad)}"
    return found


def _refuse_unfinished(output: Path, store: Store) -> None:
    pending = int((store.status == PENDING).sum())
    if pending:
        raise FpnxError(
            f"{shown(output)} is not finished ({pending} images are pending): rename it to "
            f"{shown(part_of(output).name)} and continue it with --resume, or start over with --overwrite"
        )


def _batches(plan: Plan, pending: Sequence[int]) -> Iterator[list[int]]:
    """Pending images in batches of one padded size each."""
    by_group: dict[str, list[int]] = {}
    for index in pending:
        by_group.setdefault(plan.layout.groups[index], []).append(index)
    for group, indices in by_group.items():
        extent = parse_extent(group)
        assert extent is not None
        step = plan.batch_size_for(extent)
        yield from (indices[i : i + step] for i in range(0, len(indices), step))


def _strictly(plan: Plan, index: int, reason: str) -> str:
    return f"{shown(plan.listing.sources[index].name)} failed ({reason}) and the run is strict"


def _result(
    plan: Plan, store: Store | None, clock: _Clock, *, stopped: str | None = None, dry_run: bool = False
) -> Result:
    failed = tuple(store.failures()) if store is not None else ()
    count = len(plan.listing.sources)
    return Result(
        output=plan.output,
        images=count,
        done=int((store.status == DONE).sum()) if store is not None else 0,
        failed=failed,
        computed=clock.images,
        seconds=clock.seconds,
        timings={stage: 1000 * clock.spent[stage] / max(clock.images, 1) for stage in STAGES},
        nonfinite=store.nonfinite_by_level() if store is not None else {},
        allowed_failures=0 if plan.config.strict else plan.config.allowed_failures(count),
        strict=plan.config.strict,
        stopped=stopped,
        complete=store is not None and stopped is None,
        dry_run=dry_run,
        facts=plan.facts(),
    )


def _provenance(plan: Plan) -> dict[str, Any]:
    facts = plan.facts()
    return {
        "versions": {
            "fpnx": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
            "h5py": h5py.__version__,
        },
        "options": plan.config.repeatable(),
        "command": [shown(argument) for argument in sys.argv[:64]],
        "weights": facts["weights"],
        "recipe": str(plan.recipe),
        "device": _device_name(plan.device),
        "precision": plan.precision,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


class _Clock:
    """Seconds spent in each stage, summed over threads, and over the whole run."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self.images, self.seconds = 0, 0.0
        self._lock = threading.Lock()
        self._started = self._commit = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.spent[stage] += time.perf_counter() - started

    def over(self, stage: str, items: Iterator[_Item]) -> Iterator[_Item]:
        """`items`, with the time that each takes to come."""
        while True:
            with self(stage):
                item = next(items, None)
            if item is None:
                return
            yield item

    def start(self) -> None:
        self._started = self._commit = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._started

    def committed(self) -> None:
        self._commit = time.perf_counter()

    def since_commit(self) -> float:
        return time.perf_counter() - self._commit
