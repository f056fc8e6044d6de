"""Batches of pending images: which images go through the model together, how many at once, in how many threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fpnx.core.system import available_memory
from fpnx.extraction.plan import Plan
from fpnx.models.preprocessing import scaled_size

__all__ = ["Batches", "compute_threads"]

MAX_COMPUTE_THREADS = 16  # with more threads, Python's global interpreter lock slows them down
BYTES_PER_PIXEL = 1024  # of network input, for all feature maps in memory at once (VGG-16: 820, ResNet-50: 500)
MEMORY_SHARE = 0.5  # of the available memory that feature maps may take
CPU_CANDIDATES, GPU_CANDIDATES = (4, 2), (32, 64, 16)  # batch sizes; larger ones on CPU only take more memory
TRIALS = 2  # batches that are timed for each candidate size
FASTER = 0.95  # another size than the first is chosen if its time per image is below this share of the first's
MIN_IMAGES_PER_TRIAL_IMAGE = 25  # with fewer images than this for each one in the trials, trials do not pay


def compute_threads(plan: Plan, images: int) -> int:
    """Number of threads that compute at the same time: on CPU one for each core or more, on CUDA one for each device.

    On CPU, one batch for each core is faster than one batch on all cores, since the threads do not wait for each
    other. There are fewer threads where memory is short or there are fewer images.
    """
    if plan.device.type != "cpu":
        return len(plan.devices)
    largest = max((height * width for height, width in plan.layout.shapes), default=1) * plan.model.largest_scale**2
    fitting = int(available_memory() * MEMORY_SHARE / (largest * BYTES_PER_PIXEL * (plan.batch_size or 1)))
    return max(1, min(plan.cpus, MAX_COMPUTE_THREADS, images, fitting))


class Batches(Iterator[list[int]]):
    """Iterator over batches of pending images, in their order; the images of a batch have one padded size.

    Towards the end batches get smaller, so that all threads finish at about the same time. Where the plan has no batch
    size, a few sizes are timed on the first images of each input size, and the fastest is kept.

    Args:
        plan: of the run.
        pending: indices of the images.
        threads: how many threads compute.
    """

    def __init__(self, plan: Plan, pending: Sequence[int], threads: int) -> None:
        self._plan, self._threads = plan, threads
        by_size: dict[tuple[int, int], list[int]] = {}
        for index in pending:
            size = plan.layout.padded_sizes[index]
            assert size is not None, "only images with a row are pending"
            by_size.setdefault(size, []).append(index)
        self.counts: Mapping[tuple[int, int], int] = {size: len(indices) for size, indices in by_size.items()}
        self._remaining = list(reversed(by_size.items()))
        self._start = 0
        self._trial: _BatchSizeTrial | None = None

    def __next__(self) -> list[int]:
        if not self._remaining:
            raise StopIteration
        input_size, indices = self._remaining[-1]
        if self._trial is None or self._trial.input_size != input_size:
            self._trial = _BatchSizeTrial(input_size, self.candidates(input_size, len(indices)))
        count = self._trial.next_size()
        if len(self._remaining) == 1:
            count = min(count, -(-(len(indices) - self._start) // self._threads))
        batch = indices[self._start : self._start + count]
        self._start += count
        if self._start >= len(indices):
            self._remaining.pop()
            self._start = 0
        return batch

    def record_time(self, input_size: tuple[int, int], images: int, seconds: float) -> None:
        """Record how long the model took for a batch of `images` images."""
        if self._trial is not None and self._trial.input_size == input_size:
            self._trial.record_time(images, seconds)

    def is_trying_sizes(self, input_size: tuple[int, int]) -> bool:
        """Whether batch sizes for images of one input size are still being compared."""
        return self._trial is not None and self._trial.input_size == input_size and self._trial.chosen is None

    def candidates(self, input_size: tuple[int, int], images: int) -> tuple[int, ...]:
        """Batch sizes to compare for images of one input size; the one that is most often the fastest comes first."""
        if self._plan.batch_size is not None:
            return (self._plan.batch_size,)
        height, width = scaled_size(input_size, self._plan.model.largest_scale)
        scale = 224 * 224 / (height * width)
        cpu = self._plan.device.type == "cpu"
        fitting = int(available_memory() * MEMORY_SHARE) // (height * width * BYTES_PER_PIXEL * self._threads)
        limit = max(fitting, 1) if cpu else 1024  # what fits into a GPU's memory is found by trying
        sizes = [max(1, min(round(n * scale), 2 * n, limit)) for n in (CPU_CANDIDATES if cpu else GPU_CANDIDATES)]
        distinct = tuple(dict.fromkeys(sizes))
        if images >= MIN_IMAGES_PER_TRIAL_IMAGE * TRIALS * sum(distinct) // 4:
            return distinct
        return (min(distinct),) if cpu else distinct[:1]  # on CPU, the smallest size ends sooner and takes less memory


class _BatchSizeTrial:
    """Times a few batch sizes on the first images of one input size, and chooses the fastest."""

    def __init__(self, input_size: tuple[int, int], candidates: tuple[int, ...]) -> None:
        self.input_size, self._candidates = input_size, candidates
        self._to_try = [size for size in candidates for _ in range(TRIALS)] if len(candidates) > 1 else []
        self._best_seconds: dict[int, float] = {}  # per image, by batch size
        self.chosen: int | None = candidates[0] if len(candidates) == 1 else None

    def next_size(self) -> int:
        if self._to_try:
            return self._to_try.pop(0)
        return self.chosen or self._candidates[0]

    def record_time(self, images: int, seconds: float) -> None:
        best = self._best_seconds
        if self.chosen is not None or images not in self._candidates:
            return
        best[images] = min(best.get(images, float("inf")), seconds / images)
        if not self._to_try and len(best) == len(self._candidates):
            first = self._candidates[0]
            fastest = min(best, key=best.__getitem__)
            self.chosen = fastest if best[fastest] < FASTER * best[first] else first
