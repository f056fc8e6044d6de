"""Which images go together through the model, and how many at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fpnx.core.system import available_memory
from fpnx.extraction.plan import Plan

__all__ = ["Batches", "compute_threads"]

LANES = 16  # threads that compute; beyond that Python's own lock would hold them up
BYTES_A_PIXEL = 1024  # of network input, for all maps that are alive at once (VGG-16: 820, ResNet-50: 500)
MEMORY_SHARE = 0.5  # of the available memory that maps may take
CPU_CANDIDATES, GPU_CANDIDATES = (4, 2), (32, 64, 16)  # on CPU larger ones gain nothing, and take memory
TRIALS = 2  # batches by which each candidate is judged
BETTER = 0.95  # of the time per image that the first candidate takes, for another to be chosen instead
ENOUGH = 25  # images for each image in the trials: fewer are done before the choice could pay


def compute_threads(plan: Plan, images: int) -> int:
    """How many threads compute side by side: on CPU each takes a core or more, on CUDA one for each device.

    Batches that are computed one beside the other on a core each need no waiting for each other, so they are faster
    than one after the other on all cores; where memory is short, or images are fewer, there are less of them.
    """
    if plan.device.type != "cpu":
        return len(plan.devices)
    largest = max((height * width for height, width in plan.layout.shapes), default=1)
    fitting = int(available_memory() * MEMORY_SHARE) // (largest * BYTES_A_PIXEL * (plan.batch_size or 1))
    return max(1, min(plan.cpus, LANES, images, fitting))


class Batches(Iterator[list[int]]):
    """Pending images, in their order, in batches of one padded size each.

    Towards the end batches get smaller, so that all lanes end at about the same time. Where `batch_size` is left
    to fpnx, a few sizes are tried on the first images of each input size, and the fastest is kept.
    """

    def __init__(self, plan: Plan, pending: Sequence[int], lanes: int) -> None:
        self._plan, self._lanes = plan, lanes
        by_size: dict[tuple[int, int], list[int]] = {}
        for index in pending:
            size = plan.layout.padded_sizes[index]
            assert size is not None, "only images with a row are pending"
            by_size.setdefault(size, []).append(index)
        self.counts: Mapping[tuple[int, int], int] = {size: len(indices) for size, indices in by_size.items()}
        self._left = list(reversed(by_size.items()))
        self._start = 0
        self._trial: _Trial | None = None

    def __next__(self) -> list[int]:
        if not self._left:
            raise StopIteration
        input_size, indices = self._left[-1]
        if self._trial is None or self._trial.input_size != input_size:
            self._trial = _Trial(input_size, self.candidates(input_size, len(indices)))
        count = self._trial.next_size()
        if len(self._left) == 1:
            count = min(count, -(-(len(indices) - self._start) // self._lanes))
        batch = indices[self._start : self._start + count]
        self._start += count
        if self._start >= len(indices):
            self._left.pop()
            self._start = 0
        return batch

    def took(self, input_size: tuple[int, int], images: int, seconds: float) -> None:
        """Hears how long the model took for a batch."""
        if self._trial is not None and self._trial.input_size == input_size:
            self._trial.took(images, seconds)

    def trying(self, input_size: tuple[int, int]) -> bool:
        """Whether batch sizes for images of one size are being compared."""
        return self._trial is not None and self._trial.input_size == input_size and self._trial.chosen is None

    def candidates(self, input_size: tuple[int, int], images: int) -> tuple[int, ...]:
        """Batch sizes worth trying for images of one size, the likeliest first."""
        if self._plan.batch_size is not None:
            return (self._plan.batch_size,)
        height, width = input_size
        scale = 224 * 224 / (height * width)
        cpu = self._plan.device.type == "cpu"
        fitting = int(available_memory() * MEMORY_SHARE) // (height * width * BYTES_A_PIXEL * self._lanes)
        most = max(fitting, 1) if cpu else 1024  # a GPU's memory is found out by trying
        sizes = [max(1, min(round(n * scale), 2 * n, most)) for n in (CPU_CANDIDATES if cpu else GPU_CANDIDATES)]
        found = tuple(dict.fromkeys(sizes))
        if images >= ENOUGH * TRIALS * sum(found) // 4:
            return found
        return (min(found),) if cpu else found[:1]  # few end sooner, and in less memory, by the smallest


class _Trial:
    """Finds the fastest of a few batch sizes for images of one size, by the way."""

    def __init__(self, input_size: tuple[int, int], candidates: tuple[int, ...]) -> None:
        self.input_size, self._candidates = input_size, candidates
        self._plan = [size for size in candidates for _ in range(TRIALS)] if len(candidates) > 1 else []
        self._best: dict[int, float] = {}
        self.chosen: int | None = candidates[0] if len(candidates) == 1 else None

    def next_size(self) -> int:
        if self._plan:
            return self._plan.pop(0)
        return self.chosen or self._candidates[0]

    def took(self, images: int, seconds: float) -> None:
        if self.chosen is not None or images not in self._candidates:
            return
        self._best[images] = min(self._best.get(images, float("inf")), seconds / images)
        if not self._plan and len(self._best) == len(self._candidates):
            first = self._candidates[0]
            fastest = min(self._best, key=self._best.__getitem__)
            self.chosen = fastest if self._best[fastest] < BETTER * self._best[first] else first
