"""Decoding, computing and writing at the same time: threads with small bounded queues between them."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from fpnx.core.errors import ImageError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.interrupts import StopRequest
from fpnx.core.system import keep_freed_memory, release_freed_memory
from fpnx.core.text import escape
from fpnx.extraction.batching import Batches, compute_threads
from fpnx.extraction.plan import Plan
from fpnx.extraction.sink import Sink
from fpnx.images.decoding import PixelBudget, decode
from fpnx.inference.devices import arithmetic, slow_precision
from fpnx.inference.engine import Engine, Features, Fitting
from fpnx.store.reader import DONE

__all__ = ["STAGES", "StageClock", "run_pipeline"]

STAGES = ("decode", "resize", "forward", "write")
AHEAD = 1  # decoded batches that wait, besides one for each lane
UNWRITTEN = 1  # computed batches of a lane that wait to be written, besides the one in hand
WORTH_PREPARING = 8  # images of a size for which laying out the weights pays
HEED = 0.1  # seconds within which a signal is heard

_Item = TypeVar("_Item")


class StageClock:
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


def run_pipeline(plan: Plan, sink: Sink, clock: StageClock, stop: StopRequest, listener: Listener) -> str | None:
    """Decode, forward and write, overlapped; returns why it stopped early, or None.

    Threads: `plan.workers` that decode, ahead of need by a batch for each lane and one more; lanes that compute,
    see `compute_threads`; one that writes. The calling thread hears of what was done, and of signals.
    """
    pending = np.flatnonzero((sink.status != DONE) & (plan.layout.rows >= 0)).tolist()
    total = len(plan.listing.sources)
    finished = total - len(pending)
    listener.progress("images", finished, total)
    clock.start()
    keep_freed_memory()
    if plan.config.strict and plan.layout.errors:
        return _strictly(plan, *next(iter(plan.layout.errors.items())))
    if not pending:
        return None
    if (remark := slow_precision(plan.device, plan.precision)) is not None:
        listener.message(remark)
    count = compute_threads(plan, len(pending))
    threads_before = torch.get_num_threads()
    with (
        arithmetic(plan.device, plan.precision),
        _Scribe(plan, sink, clock) as scribe,
        _Feed(plan, pending, count, clock) as feed,
    ):
        engines = [plan.equipment.engine(plan.recipe, plan.config, device) for device in plan.devices]
        plan.equipment.empty()
        threads = max(1, plan.cpus // count) if plan.device.type == "cpu" else 1
        lanes = [_Lane(plan, feed, scribe, engines[i % len(engines)], clock, threads) for i in range(count)]
        try:
            for lane in lanes:
                lane.start()
            while any(lane.is_alive() for lane in lanes) or not feed.events.empty():
                if stop.signum is not None:
                    return "interrupted"
                event = feed.next_event()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, str):
                    listener.message(event)
                elif isinstance(event, _Done):
                    finished += event.images
                    clock.images += event.images
                    listener.progress("images", finished, total)
                    event.heard.set()
                elif isinstance(event, _Failure) and plan.config.strict:
                    return _strictly(plan, event.index, event.reason)
            return None
        except Interrupted:  # at once: what is queued is dropped, and what is being written is not yet marked
            scribe.drop()
            raise
        finally:
            feed.close()
            for lane in lanes:
                if lane.ident is not None:
                    lane.join()
            # Each lane set its own number, and with it that of the threads to come.
            torch.set_num_threads(threads_before)
            release_freed_memory()


@dataclass(frozen=True)
class _Loaded:
    pixels: np.ndarray
    source_size: tuple[int, int]


@dataclass(frozen=True)
class _Failure:
    index: int
    reason: str


@dataclass(frozen=True)
class _Done:
    """A lane's word that a batch is computed; it goes on when the calling thread, which heeds signals, has heard it."""

    images: int
    heard: threading.Event


_Event = _Done | _Failure | str | BaseException  # str: a message to the user


class _Feed:
    """Batches of decoded images for the lanes, read ahead by a bounded number; and what lanes have to tell."""

    def __init__(self, plan: Plan, pending: Sequence[int], lanes: int, clock: StageClock) -> None:
        self.batches = Batches(plan, pending, lanes)
        self.events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._plan, self._clock = plan, clock
        self._budget = PixelBudget(plan.config.max_pixels)
        self._decoders = ThreadPoolExecutor(plan.workers, "fpnx-decode", torch.set_num_threads, (1,))
        self._waiting: deque[tuple[list[int], list[Future[_Loaded | ImageError]]]] = deque()
        self._ahead, self._lock, self._closed = lanes + AHEAD, threading.Lock(), False

    def __enter__(self) -> _Feed:
        with self._lock:
            self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._waiting.clear()
        self._decoders.shutdown(cancel_futures=True)

    def take(self) -> tuple[list[int], list[_Loaded | ImageError]] | None:
        """The next batch, once it is decoded; None when there is no more."""
        with self._lock:
            if self._closed or not self._waiting:
                return None
            indices, futures = self._waiting.popleft()
            self._read_ahead()
        try:
            return indices, [future.result() for future in futures]
        except CancelledError:  # closed meanwhile
            return None

    def tell_done(self, images: int) -> None:
        done = _Done(images, threading.Event())
        self.events.put(done)
        while not (done.heard.wait(HEED) or self._closed):
            pass

    def next_event(self) -> _Event | None:
        try:
            return self.events.get(timeout=HEED)
        except queue.Empty:
            return None

    def _read_ahead(self) -> None:
        while len(self._waiting) < self._ahead:
            batch = next(self.batches, None)
            if batch is None:
                return
            self._waiting.append((batch, [self._decoders.submit(self._load, index) for index in batch]))

    def _load(self, index: int) -> _Loaded | ImageError:
        try:
            return self._decoded(index)
        except ImageError as error:
            return error
        except MemoryError:
            return ImageError("out of memory while it was read: lower --workers, or refuse such with --max-pixels")
        except Exception as error:  # one odd file must not end a run of hours
            return ImageError(f"{type(error).__name__}: {error}")

    def _decoded(self, index: int) -> _Loaded:
        plan = self._plan
        with self._budget.share() as claim:
            with self._clock("decode"):
                picture = decode(plan.listing.sources[index], plan.config.max_pixels, claim)
            source = (picture.height, picture.width)
            size = plan.recipe.input_size(source, plan.config.max_pixels)
            if size != tuple(plan.layout.input_sizes[index].tolist()):
                raise ImageError("its header and its pixels disagree about the size")
            with self._clock("resize"):
                return _Loaded(plan.recipe.resize(picture, size), source)


class _Lane(threading.Thread):
    """Takes batches through an engine, on `threads` cores of its own, until there is none left."""

    def __init__(
        self, plan: Plan, feed: _Feed, scribe: _Scribe, engine: Engine, clock: StageClock, threads: int
    ) -> None:
        super().__init__(name="fpnx-lane", daemon=True)
        self._plan, self._feed, self._scribe, self._clock = plan, feed, scribe, clock
        self._engine, self._fitting = engine, Fitting(engine, feed.events.put)
        self._threads = threads
        self._writes: deque[Future[None]] = deque()

    def run(self) -> None:
        try:
            if self._engine.device.type == "cpu":
                torch.set_num_threads(self._threads)  # of this thread alone
            while (taken := self._feed.take()) is not None:
                self._compute(*taken)
                while len(self._writes) > UNWRITTEN:
                    self._writes.popleft().result()
                self._feed.tell_done(len(taken[0]))
            while self._writes:
                self._writes.popleft().result()
        except BaseException as error:  # the calling thread raises it
            self._feed.events.put(error)

    def _compute(self, batch: list[int], loaded: list[_Loaded | ImageError]) -> None:
        for index, image in zip(batch, loaded, strict=True):
            if isinstance(image, ImageError):
                self._fail(index, str(image))
        good = [(i, image) for i, image in zip(batch, loaded, strict=True) if isinstance(image, _Loaded)]
        if not good:
            return
        size, batches = self._plan.layout.padded_sizes[batch[0]], self._feed.batches
        assert size is not None
        if batches.counts[size] >= WORTH_PREPARING:
            self._engine.prepare(size)
        started = time.perf_counter()
        for piece, features in self._clock.over("forward", self._fitting([image.pixels for _, image in good])):
            indices = [index for index, _ in good[piece]]
            if features is not None:
                sizes = np.array([image.source_size for _, image in good[piece]], np.int32)
                self._writes.append(self._scribe.put(indices, features, sizes))
                if batches.trying(size):
                    features.ready()
            for index, reason in _failures(indices, features, self._plan.config.strict).items():
                self._fail(index, reason)
        batches.took(size, len(good), time.perf_counter() - started)

    def _fail(self, index: int, reason: str) -> None:
        self._writes.append(self._scribe.fail(index, reason))
        self._feed.events.put(_Failure(index, reason))


class _Scribe:
    """The one thread that writes, and commits when it is time to."""

    def __init__(self, plan: Plan, sink: Sink, clock: StageClock) -> None:
        self._sink, self._clock, self._every = sink, clock, plan.config.commit_every
        self._thread = ThreadPoolExecutor(1, "fpnx-scribe")

    def __enter__(self) -> _Scribe:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def drop(self) -> None:
        """Forget what is queued, and do not wait for what is being written."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def put(self, indices: Sequence[int], features: Features, sizes: np.ndarray) -> Future[None]:
        return self._thread.submit(self._put, indices, features, sizes)

    def fail(self, index: int, reason: str) -> Future[None]:
        return self._thread.submit(self._timed, lambda: self._sink.fail(index, reason))

    def _put(self, indices: Sequence[int], features: Features, sizes: np.ndarray) -> None:
        with self._clock("forward"):
            features.ready()
        self._timed(lambda: self._sink.put(indices, features.arrays, sizes, features.nonfinite))
        features.give_back()

    def _timed(self, work: Callable[[], None]) -> None:
        with self._clock("write"):
            work()
            if self._clock.since_commit() >= self._every:
                self._sink.commit()
                self._clock.committed()


def _failures(indices: Sequence[int], features: Features | None, strict: bool) -> dict[int, str]:
    """Why each image of a batch failed; in a strict run also for NaN and infinite values."""
    if features is None:
        return dict.fromkeys(indices, "out of memory, even alone: take a smaller --size")
    if not strict:
        return {}
    features.ready()
    found: dict[int, str] = {}
    for position, index in enumerate(indices):
        bad = [f"{counts[position]} in {level}" for level, counts in features.nonfinite.items() if counts[position]]
        if bad:
            found[index] = f"NaN or infinite values: {', '.join(bad)}"
    return found


def _strictly(plan: Plan, index: int, reason: str) -> str:
    return f"{escape(plan.listing.sources[index].name)} failed ({reason}) and the run is strict"
