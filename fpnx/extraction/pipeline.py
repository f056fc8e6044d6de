"""The pipeline of threads between the image files and a sink: decoding, computing and writing at the same time.

The decode threads of `_BatchLoader` read and resize images, the compute threads run the model on batches of them, and
one writer thread puts the features into the sink. Bounded queues lie between them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from fpnx.core.errors import ImageError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.image_notes import ImageNotes
from fpnx.core.interrupts import StopRequest
from fpnx.core.system import keep_freed_memory, release_freed_memory
from fpnx.core.text import escape
from fpnx.extraction.batching import Batches, compute_threads
from fpnx.extraction.plan import Plan
from fpnx.extraction.regions import ImageBoxes
from fpnx.extraction.sink import Sink
from fpnx.images.decoding import PixelBudget, decode
from fpnx.inference.devices import arithmetic, slow_precision
from fpnx.inference.engine import Engine, Features, SplittingEngine
from fpnx.store.info import exceeds_float16
from fpnx.store.reader import DONE

__all__ = ["STAGES", "StageTimer", "run_pipeline"]

STAGES = ("decode", "resize", "forward", "write")
READ_AHEAD = 1  # decoded batches that wait, besides one for each compute thread
MAX_UNWRITTEN = 1  # computed batches of a compute thread that wait to be written, besides the current one
MIN_IMAGES_TO_PREPARE = 8  # images of one size for which rearranging the weights pays
POLL_SECONDS = 0.1  # a signal takes effect within this time

_Item = TypeVar("_Item")


class StageTimer:
    """Measures the seconds of each stage, summed over threads, and of the whole run."""

    def __init__(self) -> None:
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.images, self.seconds = 0, 0.0
        self._lock = threading.Lock()
        self._started = self._committed = time.perf_counter()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.stage_seconds[stage] += time.perf_counter() - started

    def measure_each(self, stage: str, items: Iterator[_Item]) -> Iterator[_Item]:
        """Yields `items`, and measures how long the iterator takes for each."""
        while True:
            with self.measure(stage):
                item = next(items, None)
            if item is None:
                return
            yield item

    def start(self) -> None:
        self._started = self._committed = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._started

    def record_commit(self) -> None:
        self._committed = time.perf_counter()

    def since_commit(self) -> float:
        return time.perf_counter() - self._committed


def run_pipeline(
    plan: Plan, sink: Sink, timer: StageTimer, notes: ImageNotes, stop: StopRequest, listener: Listener
) -> str | None:
    """Decode, compute and write all pending images; returns why it stopped early, or None.

    Threads: `plan.workers` that decode, one batch for each compute thread and one more in advance; compute threads,
    see `compute_threads`; one that writes. The calling thread reports progress and checks for signals.
    """
    pending = np.flatnonzero((sink.status != DONE) & (plan.layout.rows >= 0)).tolist()
    total = len(plan.listing.sources)
    finished = total - len(pending)
    listener.progress("images", finished, total)
    timer.start()
    keep_freed_memory()
    if plan.config.strict and plan.layout.errors:
        return _strict_stop_reason(plan, *next(iter(plan.layout.errors.items())))
    if not pending:
        return None
    if (note := slow_precision(plan.device, plan.precision)) is not None:
        listener.message(note)
    count = compute_threads(plan, len(pending))
    threads_before = torch.get_num_threads()
    with (
        arithmetic(plan.device, plan.precision),
        _WriterThread(plan, sink, timer) as writer,
        _BatchLoader(plan, pending, count, timer, notes) as loader,
    ):
        engines = [plan.engine_cache.engine(plan.recipe, plan.config, device) for device in plan.devices]
        plan.engine_cache.empty()
        torch_threads = max(1, plan.cpus // count) if plan.device.type == "cpu" else 1
        compute = [
            _ComputeThread(plan, loader, writer, engines[i % len(engines)], timer, torch_threads) for i in range(count)
        ]
        try:
            for thread in compute:
                thread.start()
            while any(thread.is_alive() for thread in compute) or not loader.events.empty():
                if stop.signum is not None:
                    return "interrupted"
                event = loader.next_event()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, str):
                    listener.message(event)
                elif isinstance(event, _BatchDone):
                    finished += event.images
                    timer.images += event.images
                    listener.progress("images", finished, total)
                    event.acknowledged.set()
                elif isinstance(event, _Failure) and plan.config.strict:
                    return _strict_stop_reason(plan, event.index, event.reason)
            return None
        except Interrupted:  # stop at once: queued writes are dropped
            writer.drop()
            raise
        finally:
            loader.close()
            for thread in compute:
                if thread.ident is not None:
                    thread.join()
            # torch.set_num_threads in a compute thread also sets the default of threads that start later.
            torch.set_num_threads(threads_before)
            release_freed_memory()


@dataclass(frozen=True)
class _DecodedImage:
    pixels: Any  # as `PyramidModel.resize` gives them
    source_size: tuple[int, int]
    digest: bytes
    boxes: ImageBoxes | None = None  # of a run with boxes


@dataclass(frozen=True)
class _Failure:
    index: int
    reason: str


@dataclass(frozen=True)
class _BatchDone:
    """A batch is computed. The compute thread waits until the calling thread, which checks for signals, has set
    `acknowledged`."""

    images: int
    acknowledged: threading.Event


_Decoded = tuple[int, _DecodedImage]  # with its index
_Event = _BatchDone | _Failure | str | BaseException  # str: a message to the user


class _BatchLoader:
    """Loads batches of decoded images for the compute threads, a bounded number in advance.

    Also holds the queue of events from the compute threads to the calling thread.
    """

    def __init__(self, plan: Plan, pending: Sequence[int], threads: int, timer: StageTimer, notes: ImageNotes) -> None:
        self.batches = Batches(plan, pending, threads)
        self.events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._plan, self._timer, self._notes = plan, timer, notes
        self._budget = PixelBudget(plan.config.max_pixels)
        self._decoders = ThreadPoolExecutor(plan.workers, "fpnx-decode", torch.set_num_threads, (1,))
        self._loading: deque[tuple[list[int], list[Future[_DecodedImage | ImageError]]]] = deque()
        self._depth, self._lock, self._closed = threads + READ_AHEAD, threading.Lock(), False

    def __enter__(self) -> _BatchLoader:
        with self._lock:
            self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._loading.clear()
        self._decoders.shutdown(cancel_futures=True)

    def take(self) -> tuple[list[int], list[_DecodedImage | ImageError]] | None:
        """The next batch, once it is decoded; None after the last."""
        with self._lock:
            if self._closed or not self._loading:
                return None
            indices, futures = self._loading.popleft()
            self._fill()
        try:
            return indices, [future.result() for future in futures]
        except CancelledError:  # closed in the meantime
            return None

    def report_done(self, images: int) -> None:
        """Report a computed batch, and wait until the calling thread has handled the event."""
        done = _BatchDone(images, threading.Event())
        self.events.put(done)
        while not (done.acknowledged.wait(POLL_SECONDS) or self._closed):
            pass

    def next_event(self) -> _Event | None:
        try:
            return self.events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return None

    def _fill(self) -> None:
        while len(self._loading) < self._depth:
            batch = next(self.batches, None)
            if batch is None:
                return
            self._loading.append((batch, [self._decoders.submit(self._load, index) for index in batch]))

    def _load(self, index: int) -> _DecodedImage | ImageError:
        try:
            return self._decoded(index)
        except ImageError as error:
            return error
        except MemoryError:
            return ImageError(
                "out of memory while it was read: lower --workers, or refuse such images with --max-pixels"
            )
        except Exception as error:  # one unusual file must not end a run of hours
            return ImageError(f"{type(error).__name__}: {error}")

    def _decoded(self, index: int) -> _DecodedImage:
        plan, kinds, digests = self._plan, set[str](), list[bytes]()
        with self._budget.share() as claim:
            with self._timer.measure("decode"):
                source, config = plan.listing.sources[index], plan.config
                picture = decode(
                    source, config.max_pixels, config.pixels, claim=claim, note=kinds.add, digest=digests.append
                )
            source_size = (picture.height, picture.width)
            size = plan.recipe.input_size(source_size, plan.config.max_pixels)
            if size != tuple(plan.layout.input_sizes[index].tolist()):
                raise ImageError("its header and its pixels disagree about the size")
            with self._timer.measure("resize"):
                pixels = plan.model.resize(picture, size, plan.recipe)
            boxes = None
            if plan.regions is not None:
                boxes, notes = plan.regions.of_image(index, source_size, size)
                kinds |= notes
            self._notes.add(kinds)
            return _DecodedImage(pixels, source_size, digests[0], boxes)


class _ComputeThread(threading.Thread):
    """Takes batches from the loader, runs an engine on them and hands the features to the writer thread.

    Args:
        plan, loader, writer, timer: of the run.
        engine: of this thread's device; several threads may share it.
        torch_threads: number of threads for PyTorch's operators on CPU.
    """

    def __init__(
        self,
        plan: Plan,
        loader: _BatchLoader,
        writer: _WriterThread,
        engine: Engine,
        timer: StageTimer,
        torch_threads: int,
    ) -> None:
        super().__init__(name="fpnx-compute", daemon=True)
        self._plan, self._loader, self._writer, self._timer = plan, loader, writer, timer
        self._engine, self._splitting_engine = engine, SplittingEngine(engine, loader.events.put)
        self._torch_threads = torch_threads
        self._writes: deque[Future[None]] = deque()

    def run(self) -> None:
        try:
            if self._engine.device.type == "cpu":
                torch.set_num_threads(self._torch_threads)  # of this thread only
            while (batch := self._loader.take()) is not None:
                self._compute(*batch)
                while len(self._writes) > MAX_UNWRITTEN:
                    self._writes.popleft().result()
                self._loader.report_done(len(batch[0]))
            while self._writes:
                self._writes.popleft().result()
        except BaseException as error:  # the calling thread raises it
            self._loader.events.put(error)

    def _compute(self, indices: list[int], images: list[_DecodedImage | ImageError]) -> None:
        for index, image in zip(indices, images, strict=True):
            if isinstance(image, ImageError):
                self._fail(index, str(image))
        decoded = [(i, image) for i, image in zip(indices, images, strict=True) if isinstance(image, _DecodedImage)]
        decoded = self._without_boxless(decoded)
        if not decoded:
            return
        size, batches = self._plan.layout.padded_sizes[indices[0]], self._loader.batches
        assert size is not None
        if batches.counts[size] >= MIN_IMAGES_TO_PREPARE:
            self._engine.prepare(size)
        started = time.perf_counter()
        boxes = [image.boxes.input for _, image in decoded if image.boxes is not None]
        results = self._splitting_engine([image.pixels for _, image in decoded], boxes or None)
        for piece, features in self._timer.measure_each("forward", results):
            piece_indices = [index for index, _ in decoded[piece]]
            if features is not None:
                self._writes.append(self._writer.put(decoded[piece], features))
                if batches.is_trying_sizes(size):
                    features.ready()
            for index, reason in _failures(piece_indices, features, self._plan.config.strict).items():
                self._fail(index, reason)
        batches.record_time(size, len(decoded), time.perf_counter() - started)

    def _without_boxless(self, decoded: list[_Decoded]) -> list[_Decoded]:
        """The images that need the network. Of images without boxes in a run with boxes no feature is stored."""
        boxless = [(i, image) for i, image in decoded if image.boxes is not None and not len(image.boxes.source)]
        if not boxless:
            return decoded
        nothing = Features({}, {level: [0] * len(boxless) for level in self._plan.layout.levels})
        self._writes.append(self._writer.put(boxless, nothing))
        return [(i, image) for i, image in decoded if image.boxes is None or len(image.boxes.source)]

    def _fail(self, index: int, reason: str) -> None:
        self._writes.append(self._writer.fail(index, reason))
        self._loader.events.put(_Failure(index, reason))


class _WriterThread:
    """The only thread that calls the sink; commits when `commit_every` seconds have passed since the last commit."""

    def __init__(self, plan: Plan, sink: Sink, timer: StageTimer) -> None:
        self._plan, self._sink, self._timer, self._commit_every = plan, sink, timer, plan.config.commit_every
        self._thread = ThreadPoolExecutor(1, "fpnx-write")

    def __enter__(self) -> _WriterThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def drop(self) -> None:
        """Cancel queued writes."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def put(self, images: Sequence[_Decoded], features: Features) -> Future[None]:
        """Queue the features of a batch for writing."""
        source_sizes = np.array([image.source_size for _, image in images], np.int32)
        boxes = [image.boxes for _, image in images if image.boxes is not None]
        digests = np.frombuffer(b"".join(image.digest for _, image in images), np.uint8).reshape(len(images), -1)
        indices = [index for index, _ in images]
        return self._thread.submit(self._put, indices, features, source_sizes, boxes, digests)

    def fail(self, index: int, reason: str) -> Future[None]:
        """Queue the mark of a failed image."""
        return self._thread.submit(self._write, lambda: self._sink.fail(index, reason))

    def _put(
        self,
        indices: Sequence[int],
        features: Features,
        source_sizes: np.ndarray,
        boxes: Sequence[ImageBoxes],
        digests: np.ndarray,
    ) -> None:
        regions = None
        with self._timer.measure("forward"):
            features.ready()
            if self._plan.regions is not None:
                regions = self._plan.regions.batch(boxes, features, self._plan.layout)
        self._write(
            lambda: self._sink.put(indices, features.arrays, source_sizes, features.nonfinite, regions, digests)
        )
        features.recycle()

    def _write(self, action: Callable[[], None]) -> None:
        with self._timer.measure("write"):
            action()
            if self._timer.since_commit() >= self._commit_every:
                self._sink.commit()
                self._timer.record_commit()


TOO_LARGE = "; values beyond ±65504 do not fit into float16: take --dtype float32"


def _failures(indices: Sequence[int], features: Features | None, strict: bool) -> dict[int, str]:
    """Why each image of a batch failed, by index; in a strict run also for NaN and infinite values."""
    if features is None:
        return dict.fromkeys(indices, "out of memory, even alone: take a smaller --size")
    if not strict:
        return {}
    features.ready()
    reasons: dict[int, str] = {}
    for position, index in enumerate(indices):
        bad = [f"{counts[position]} in {level}" for level, counts in features.nonfinite.items() if counts[position]]
        if bad:
            reasons[index] = f"NaN or infinite values: {', '.join(bad)}"
            arrays = [values for values in features.arrays.values() if isinstance(values, np.ndarray)]
            stored = [values[position] for values in arrays]
            stored += [regions.features for regions in features.regions.values()]
            too_large = any(map(exceeds_float16, stored))
            reasons[index] += TOO_LARGE if too_large else ""
    return reasons


def _strict_stop_reason(plan: Plan, index: int, reason: str) -> str:
    return f"{escape(plan.listing.sources[index].name)} failed ({reason}) and the run is strict"
