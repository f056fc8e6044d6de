"""One configuration of a benchmark: times its stages, its forward pass and end-to-end runs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpnx.benchmark.profiling import marked, peak_bytes, timed_body
from fpnx.benchmark.timers import PeakMemory, StageTimer
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.image_list import ImageList
from fpnx.core.system import available_memory
from fpnx.extraction.batching import Batches, compute_threads
from fpnx.extraction.plan import Plan
from fpnx.extraction.run import provenance_of, run_extraction
from fpnx.extraction.upload import resolve_destination
from fpnx.images.decoding import decode
from fpnx.inference.devices import arithmetic
from fpnx.inference.engine import Engine
from fpnx.inference.graph_fusion import FusedModel
from fpnx.store.file_layout import FileLayout
from fpnx.store.writer import Writer

__all__ = ["AFTER", "BEFORE", "DECODE", "RESIZE", "WRITE", "BenchmarkCase"]

DECODE, RESIZE, UPLOAD, DOWNLOAD, WRITE = "decode", "resize + normalise", "copy to device", "copy back", "write"
BEFORE, AFTER = (DECODE, RESIZE, UPLOAD), (DOWNLOAD, WRITE)  # stages before and after the forward pass
MIN_IMAGES, MIN_BATCHES = 32, 2  # of an end-to-end run
TARGET_SECONDS, MAX_BYTES = 1.5, 1 << 30  # of an end-to-end run, and what it may write to reach them
LONG_RUN_IMAGES = 10**6  # so that the batch size is that of a long run
MAX_BATCHES_IN_MEMORY = 4  # batches of features that a run holds: in the engine, in the queue, being written


class BenchmarkCase:
    """A plan with all that measuring it needs: a batch of its images, an engine and an output file.

    Attributes:
        size: (height, width) of the batch, with padding.
        files: the folder of images that an end-to-end run reads.
        images: number of images of an end-to-end run, in whole batches.
    """

    def __init__(self, plan: Plan, engine: Engine, folder: Path, name: str) -> None:
        self.plan, self.engine = plan, engine
        self.size = _most_common(plan)
        self.batch_size = Batches(plan, [], compute_threads(plan, MIN_IMAGES)).candidates(self.size, LONG_RUN_IMAGES)[0]
        self.images = 0
        self.files, self._folder, self._name = folder / "files", folder, name
        members = [i for i, size in enumerate(plan.layout.padded_sizes) if size == self.size]
        # of the same size before padding, too, so that a batch is one array
        members = [i for i in members if (plan.layout.input_sizes[i] == plan.layout.input_sizes[members[0]]).all()]
        self._members = [members[i % len(members)] for i in range(self.batch_size)]
        self._timer = StageTimer(plan.device)
        self._writer: Writer | None = None
        self._batches: list[Tensor] = []  # the network's input; of a pyramid of scaled images, one at each scale
        self._network = _Network(engine.executable, self._timer)

    def required_bytes(self) -> int:
        """Least memory of an extraction in bytes, without what is loaded already."""
        pixels = 5 * 3 * self.size[0] * self.size[1] * self.plan.model.work  # as uint8 and as float32
        features = sum(shape.bytes_per_image for shape in self.plan.shapes if shape.input_size == self.size)
        network = peak_bytes(self.plan.model, self.size)
        return int(self.batch_size * (network + pixels + MAX_BATCHES_IN_MEMORY * features))

    def memory_problem(self) -> str | None:
        """Why a batch cannot fit into memory; None where it may fit."""
        cuda = self.plan.device.type == "cuda"
        available = torch.cuda.mem_get_info(self.plan.device)[0] if cuda else available_memory()
        required = self.required_bytes()
        if required <= available:
            return None
        gigabytes = f"about {required / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB can be had"
        return f"does not fit: it needs {gigabytes}"

    def warm_up(self) -> None:
        """Run the first, slow iterations, and choose the number of images of an end-to-end run."""
        self.engine.prepare(self.size)
        self.features()  # packs the weights
        for _ in range(2):
            ms = self.stages()
            self.forward()
        reading, writing = (ms[DECODE] + ms[RESIZE]) / self.plan.workers, ms[WRITE]
        network = sum(ms.values()) - ms[DECODE] - ms[RESIZE] - writing
        image_bytes = sum(shape.bytes_per_image for shape in self.plan.shapes if shape.input_size == self.size)
        target = min(1000 * TARGET_SECONDS / max(reading, network, writing), MAX_BYTES / image_bytes)
        batches = math.ceil(max(target, MIN_IMAGES) / self.batch_size)
        self.images = max(batches, MIN_BATCHES) * self.batch_size + self._first_images()

    def stages(self) -> dict[str, float]:
        """Run one batch through all stages in sequence; returns milliseconds per image by stage."""
        sources, model, recipe = self.plan.listing.sources, self.plan.model, self.plan.recipe
        seconds_by_stage = dict.fromkeys(BEFORE, 0.0)
        pixels: list[Any] = []
        source_sizes = []
        for index in self._members:
            started = time.perf_counter()
            picture = decode(sources[index], self.plan.config.max_pixels, self.plan.config.pixels)
            decoded = time.perf_counter()
            height, width = self.plan.layout.input_sizes[index].tolist()
            pixels.append(model.resize(picture, (height, width), recipe))
            seconds_by_stage[DECODE] += decoded - started
            seconds_by_stage[RESIZE] += time.perf_counter() - decoded
            source_sizes.append((picture.height, picture.width))
        for stage, seconds in self._time_compute(pixels).items():
            seconds_by_stage[stage] = seconds_by_stage.get(stage, 0.0) + seconds
        seconds_by_stage[WRITE] = self._time_write(np.array(source_sizes, np.int32))
        return {stage: 1000 * seconds / self.batch_size for stage, seconds in seconds_by_stage.items()}

    def forward(self) -> float:
        """Run one batch through the network alone, as in an extraction; returns milliseconds per image."""
        assert self._batches, "stages() comes first"
        with torch.inference_mode(), arithmetic(self.plan.device, self.plan.precision):
            self._timer.start()
            for batch in self._batches:
                self.engine.executable(batch)
            self._timer.mark("forward")
        return 1000 * self._timer.seconds()["forward"] / self.batch_size

    def core_time(self) -> float:
        """Processor time of all stages in milliseconds per image, with one batch on each core at the same time.

        For CPU devices. Cores share caches and memory bandwidth, so a single busy core would need less time.
        """
        write_lock = threading.Lock()

        def run_batch(_: int) -> float:
            started = time.thread_time()
            features = self.engine(self._pixels())
            with write_lock:
                self._put(features.arrays)
            return time.thread_time() - started

        threads, threads_before = compute_threads(self.plan, self.images), torch.get_num_threads()
        try:
            with ThreadPoolExecutor(threads, "fpnx-core", torch.set_num_threads, (1,)) as executor:
                seconds = list(executor.map(run_batch, range(threads)))
        finally:
            # The workers set the number for themselves and for all threads that start later.
            torch.set_num_threads(threads_before)
        return 1000 * sum(seconds) / threads / self.batch_size

    def end_to_end(self, memory: bool = False) -> tuple[float, PeakMemory | None]:
        """Run a whole extraction into a new file; returns images/s and, with `memory`, the peak memory.

        The rate excludes the first batches: the start of a run takes as long for a million images.
        """
        output = self._folder / "measured.h5"
        config = replace(self.plan.config, batch_size=self.batch_size, limit=self.images, overwrite=True)
        peak, start = PeakMemory(self.plan.device), _StartListener(self._first_images())
        try:
            with peak if memory else nullcontext():
                result = run_extraction([self.files], resolve_destination(output, config), config, listener=start)
                ended = time.perf_counter()
        finally:
            output.unlink(missing_ok=True)
        if result.failed:
            raise FpnxError(f"{result.failed[0][0]}: {result.failed[0][1]}: measure with images that can be read")
        return (result.done - start.done) / (ended - start.since), peak if memory else None

    def features(self, engine: Engine | None = None) -> dict[str, np.ndarray]:
        """The features of the batch, (B, C, H, W) by level, from `engine` or from the engine of this case."""
        engine = engine or self.engine
        with arithmetic(engine.device, engine.precision):
            return dict(engine(self._pixels()).arrays)

    def _first_images(self) -> int:
        """Number of images of the first batches, as many batches as are computed at the same time."""
        return compute_threads(self.plan, MIN_IMAGES) * self.batch_size

    def close(self) -> None:
        """Close the output file and release the batch."""
        if self._writer is not None:
            self._writer.close()
        self._writer, self._batches = None, []

    def _pixels(self) -> list[Any]:
        sources, sizes = self.plan.listing.sources, self.plan.layout.input_sizes
        config = self.plan.config
        pictures = (decode(sources[i], config.max_pixels, config.pixels) for i in self._members)
        extents = (tuple(sizes[i].tolist()) for i in self._members)
        model, recipe = self.plan.model, self.plan.recipe
        return [model.resize(picture, size, recipe) for picture, size in zip(pictures, extents, strict=True)]

    def _time_compute(self, pixels: Sequence[Any]) -> dict[str, float]:
        """Seconds of each stage from pixels to arrays; keeps the network's inputs and the arrays."""
        timer = self._timer
        self._batches, self._arrays = [], {}
        with torch.inference_mode(), arithmetic(self.plan.device, self.plan.precision):
            timer.start()
            if self.plan.model.scales:
                for level, images, padded in self.engine.passes(pixels):
                    self._arrays[level] = next(iter(self._time_pass(images, padded).values()))
            else:
                self._arrays = self._time_pass(pixels, self.size)
        return timer.seconds()

    def _time_pass(self, pixels: Sequence[np.ndarray], padded: tuple[int, int]) -> dict[str, np.ndarray]:
        """The maps of one pass through the network, with a mark at the end of each stage."""
        recipe, timer = self.plan.recipe, self._timer
        sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        raw = torch.from_numpy(np.stack(pixels)).to(self.plan.device)
        timer.mark(UPLOAD)
        batch = recipe.pad(recipe.normalise(raw), padded).to(self.engine.dtype)
        self._batches.append(batch)
        timer.mark(RESIZE)
        levels = self._network(batch)
        stored = {name: self.engine.in_stored_form(name, level, sizes) for name, level in levels.items()}
        arrays = {name: level.cpu().numpy() for name, level in stored.items()}
        timer.mark(DOWNLOAD)
        return arrays

    def _time_write(self, source_sizes: np.ndarray) -> float:
        """Seconds of writing one batch to the disk, to a file with the layout of a run."""
        if self._writer is None:
            self._writer = Writer.create(
                self._folder / f"{self._name}.h5", _layout(self.plan, self._members), provenance_of(self.plan)
            )
        self._source_sizes = source_sizes
        started = time.perf_counter()
        self._put(self._arrays)
        self._writer.commit()
        return time.perf_counter() - started

    def _put(self, arrays: Mapping[str, np.ndarray]) -> None:
        assert self._writer is not None, "stages() comes first"
        finite = {level: [0] * self.batch_size for level in arrays}
        self._writer.put(range(self.batch_size), arrays, self._source_sizes, finite)


class _StartListener(Listener):
    """Records when the first `first` images of a run were done, and how many were done then."""

    def __init__(self, first: int) -> None:
        self._first, self.done, self.since = first, 0, 0.0

    def progress(self, what: str, done: int, total: int) -> None:
        if what == "images" and not self.done and done >= self._first:
            self.done, self.since = done, time.perf_counter()


class _Network:
    """A forward pass in its executable form, with a mark at the end of each stage."""

    def __init__(self, executable: FusedModel, timer: StageTimer) -> None:
        self._levels, self._neck, self._timer = executable.levels, executable.neck, timer
        self._body = timed_body(executable.body, timer)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        levels: dict[str, Tensor] = self._body(images)
        if self._neck is not None:
            with marked(self._neck.timed_blocks(), self._timer):
                levels = levels | self._neck(levels)
            self._timer.mark(self._neck.last_stage)
        return {name: levels[name] for name in self._levels}


def _most_common(plan: Plan) -> tuple[int, int]:
    counts = plan.layout.counts()
    if not any(counts.values()):
        raise FpnxError("none of the images can be measured: give others with --images")
    return max(counts, key=counts.__getitem__)


def _layout(plan: Plan, members: Sequence[int]) -> FileLayout:
    layout, indices = plan.layout, list(members)
    records = tuple(
        layout.images.records[index]._replace(name=b"%d" % position) for position, index in enumerate(members)
    )
    size = layout.padded_sizes[indices[0]]
    assert size is not None
    return replace(
        layout,
        images=ImageList(layout.images.root, records),
        input_sizes=layout.input_sizes[indices],
        padded_sizes=[size] * len(indices),
        rows=np.arange(len(indices)),
        shapes={size: layout.shapes[size]},
        errors={},
    )
