"""Sinks take the features of a run: the protocol, and the sink that writes an HDF5 file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fpnx.core.events import Listener
from fpnx.core.provenance import Provenance
from fpnx.extraction.plan import Plan
from fpnx.store.info import duplicate_count, too_large_levels
from fpnx.store.reader import DONE, Store, open_store_file
from fpnx.store.regions import RegionBatch
from fpnx.store.writer import Writer, part_path

__all__ = ["Hdf5Sink", "Outcome", "Sink", "outcome_of"]

SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)  # smaller values lose digits in float16, or become 0
MAX_SAMPLES = 8  # images whose values are read to find levels that are too small for float16


@dataclass(frozen=True)
class Outcome:
    """Summary of an output's contents.

    Attributes:
        done: number of images with features.
        failed: (path, reason) of each failed image.
        nonfinite: number of NaN and infinite values by level.
        too_small: levels stored as float16 whose values, in a sample of images, are all too small for it.
        too_large: levels stored as float16 with values that are too large for it, and became infinite.
        duplicates: number of images with the bytes of another one before them.
    """

    done: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    too_small: tuple[str, ...] = ()
    too_large: tuple[str, ...] = ()
    duplicates: int = 0


class Sink(Protocol):
    """Takes the features of images; only one thread calls it at a time.

    Attributes:
        status: (N,) uint8, PENDING, DONE or FAILED for each image, as in a store.
    """

    status: np.ndarray

    def put(
        self,
        indices: Sequence[int],
        features: Mapping[str, Any],
        source_sizes: np.ndarray,
        nonfinite: Mapping[str, Sequence[int]],
        regions: RegionBatch | None = None,
        digests: np.ndarray | None = None,
    ) -> None:
        """Take the features of images of one padded size; the arguments are those of `Writer.put`.

        `features` are what the engine gives: arrays, or for other engines one result for each image by name.
        """

    def fail(self, index: int, reason: str) -> None:
        """Mark an image as failed."""

    def commit(self) -> None:
        """Make everything put so far durable."""

    def finish(self) -> None:
        """Commit, and give the output its final name."""

    def close(self) -> None:
        """Close without committing."""

    def outcome(self) -> Outcome:
        """Summary of the output, after `close`."""


class Hdf5Sink(Writer):
    """Writes the features of a run to the HDF5 file of its plan; a `Writer` with an `outcome`."""

    @classmethod
    def open(cls, plan: Plan, provenance: Provenance, listener: Listener) -> Hdf5Sink:
        """Reopen the `.part` of the plan's output where the run continues it, else create one.

        Raises:
            FpnxError: where creating or writing it fails.
        """
        part = part_path(plan.output)
        continued = plan.config.resume if plan.update is None else plan.update.existing == part
        if continued and part.exists():
            return cls.reopen(plan.output)
        sink = cls.create(plan.output, plan.layout, provenance)
        if not sink.space_is_reserved:
            listener.message("this file system cannot reserve space: free space was checked once, at the start")
        return sink

    def outcome(self) -> Outcome:
        """Summary of the file, or of the `.part` of an unfinished run."""
        part = part_path(self.output)
        with open_store_file(part if part.exists() else self.output) as store:
            return outcome_of(store)


def outcome_of(store: Store) -> Outcome:
    """Summary of a store."""
    return Outcome(
        done=int((store.status == DONE).sum()),
        failed=tuple(store.failures()),
        nonfinite=store.nonfinite_by_level(),
        too_small=_too_small(store),
        too_large=too_large_levels(store),
        duplicates=duplicate_count(store),
    )


def _too_small(store: Store) -> tuple[str, ...]:
    """Levels whose values are all below float16's normal numbers in a few images, evenly spread over the store.

    A few images are enough, since the scale of a level depends on the network. NaN counts as large: it is reported as
    nonfinite.
    """
    if store.config.get("dtype") != "float16":
        return ()
    done = np.flatnonzero(store.status == DONE)
    samples = done[:: len(done) // MAX_SAMPLES + 1].tolist()
    too_small = []
    for level in store.levels:
        sizes = [np.abs(values).max() for i in samples if (values := store.stored_values(i, level)).size]
        if sizes and all(size < SMALLEST_NORMAL for size in sizes):
            too_small.append(level)
    return tuple(too_small)
