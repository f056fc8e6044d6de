"""What a training step takes: batches of inputs with targets, their order, and reading them ahead in a thread."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from torch import Tensor

from fpnx.labels.annotations import ImageLabels
from fpnx.models.heads.base import Geometry, Target
from fpnx.store.torch_dataset import ShapeBatchSampler

__all__ = [
    "Batch",
    "Draw",
    "Inputs",
    "Source",
    "batches_of_epoch",
    "empty_batch",
    "random_seed",
    "read_ahead",
    "share_of",
]

AHEAD = 2  # batches that are read before they are needed

# What the network takes: normalised images (B, 3, H, W); for an image pyramid one such tensor for each level; or maps.
Inputs: TypeAlias = "Tensor | Mapping[str, Tensor]"


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of an image come from, so that they are the same whatever ran before.

    Attributes:
        seed: of the run.
        epoch: counted from 0.
    """

    seed: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one padded size.

    Attributes:
        indices: of the images in the source; those that could not be read are left out.
        inputs: of the network, or of its neck.
        geometry: sizes of the inputs.
        targets: what the head should predict, for each image.
        source_sizes: (height, width) of each upright source image.
        failed: (index, reason) of each image that could not be read.
    """

    indices: tuple[int, ...]
    inputs: Inputs
    geometry: Geometry
    targets: tuple[Target, ...]
    source_sizes: tuple[tuple[int, int], ...]
    failed: tuple[tuple[int, str], ...] = ()

    def to(self, device: object) -> Batch:
        """The batch on a device."""
        inputs = self.inputs
        moved = inputs.to(device) if isinstance(inputs, Tensor) else {k: v.to(device) for k, v in inputs.items()}
        return replace(self, inputs=moved, targets=tuple(_moved(target, device) for target in self.targets))


def empty_batch(failed: Sequence[tuple[int, str]] = ()) -> Batch:
    """A batch without images."""
    return Batch(
        indices=(), inputs={}, geometry=Geometry((0, 0), ()), targets=(), source_sizes=(), failed=tuple(failed)
    )


class Source(Protocol):
    """Labelled images, or their stored maps.

    Attributes:
        names: of the images, in a fixed order.
        labels: of each image.
        shapes: a key for each image; those with equal keys may share a batch.
        left_out: name → reason, of images that are known not to be readable; they are never asked for.
    """

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[ImageLabels]: ...
    @property
    def shapes(self) -> Sequence[Hashable]: ...
    @property
    def left_out(self) -> Mapping[str, str]: ...

    def batch(self, indices: Sequence[int], draw: Draw | None) -> Batch:
        """The batch of some images of one shape; `draw` None: without augmentation."""

    def close(self) -> None:
        """Free threads and files."""


def random_seed(*parts: object) -> int:
    """A seed of 63 bits from what it is for, such as the run's seed, the epoch and the image."""
    digest = hashlib.sha256(":".join(map(str, ("fpnx training", *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def batches_of_epoch(source: Source, chosen: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the batches of an epoch, shuffled; the number of batches is the same in each."""
    sampler = ShapeBatchSampler([source.shapes[i] for i in chosen], batch_size, shuffle=True, seed=random_seed(seed))
    sampler.set_epoch(epoch)
    return [[chosen[i] for i in batch] for batch in sampler]


def share_of(batch: Sequence[int], rank: int, count: int) -> list[int]:
    """The part of a joint batch that the process `rank` of `count` computes; may be empty."""
    return list(batch[rank::count])


def read_ahead(source: Source, batches: Sequence[Sequence[int]], draw: Draw | None) -> Iterator[Batch]:
    """The batches in order, read in a thread, which ends when the iterator is closed."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for indices in batches:
                if not put(source.batch(indices, draw) if indices else empty_batch()):
                    return
        except BaseException as error:  # raised again where the batches are taken
            put(error)

    thread = threading.Thread(target=read, name="fpnx-batches", daemon=True)
    thread.start()
    try:
        for _ in batches:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def _moved(target: Target, device: object) -> Target:
    move: Callable[[Tensor | None], Tensor | None] = lambda value: None if value is None else value.to(device)  # noqa: E731
    return Target(
        boxes=move(target.boxes),
        labels=move(target.labels),
        masks=move(target.masks),
        classes=move(target.classes),
        semantic=move(target.semantic),
    )
