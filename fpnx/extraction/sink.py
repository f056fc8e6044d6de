"""Where a run puts what it computes: the interface, and the sink that writes an HDF5 file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fpnx.core.events import Listener
from fpnx.core.provenance import Provenance
from fpnx.extraction.plan import Plan
from fpnx.store.reader import DONE, Store, open_store_file
from fpnx.store.writer import Writer, part_path

__all__ = ["Hdf5Sink", "Outcome", "Sink", "outcome_of"]

LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)  # smaller values lose digits in float16, and end as 0
IMAGES_LOOKED_AT = 8


@dataclass(frozen=True)
class Outcome:
    """What an output holds.

    Attributes:
        done: how many images have features.
        failed: (path, reason) of each failed image.
        nonfinite: NaN and infinite values by level.
        too_small: levels stored as float16 whose values, in the images looked at, are all too small for it.
    """

    done: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    too_small: tuple[str, ...] = ()


class Sink(Protocol):
    """Takes the features of images, one thread at a time.

    Attributes:
        status: (N,) uint8 by image: pending, done or failed as in a store.
    """

    status: np.ndarray

    def put(
        self,
        indices: Sequence[int],
        features: Mapping[str, np.ndarray],
        source_sizes: np.ndarray,
        nonfinite: Mapping[str, Sequence[int]],
    ) -> None:
        """Take what images of one padded size gave; the arguments are those of `Writer.put`."""

    def fail(self, index: int, reason: str) -> None:
        """Mark an image as failed."""

    def commit(self) -> None:
        """Make everything put so far durable."""

    def finish(self) -> None:
        """Commit, and give the output its final name."""

    def close(self) -> None:
        """Close without committing."""

    def outcome(self) -> Outcome:
        """What the output holds, after `close`."""


class Hdf5Sink(Writer):
    """A `Writer` that continues or begins the output of a plan."""

    @classmethod
    def open(cls, plan: Plan, provenance: Provenance, listener: Listener) -> Hdf5Sink:
        """Reopen the `.part` of the plan's output with `resume`, else create one.

        Raises:
            FpnxError: where the disk refuses.
        """
        if plan.config.resume and part_path(plan.output).exists():
            return cls.reopen(plan.output)
        sink = cls.create(plan.output, plan.layout, provenance)
        if not sink.space_is_claimed:
            listener.message("this file system cannot set space aside: free space was checked once, now")
        return sink

    def outcome(self) -> Outcome:
        """What the file, or the `.part` of an unfinished run, holds."""
        part = part_path(self.output)
        with open_store_file(part if part.exists() else self.output) as store:
            return outcome_of(store)


def outcome_of(store: Store) -> Outcome:
    """What a store holds."""
    return Outcome(
        done=int((store.status == DONE).sum()),
        failed=tuple(store.failures()),
        nonfinite=store.nonfinite_by_level(),
        too_small=_too_small(store),
    )


def _too_small(store: Store) -> tuple[str, ...]:
    """Levels whose values are all below float16's normal numbers in a few images, the first and others at a distance.

    The scale of a level is the network's, so that a few images tell. NaN counts as large: it is reported elsewhere.
    """
    if store.config.get("dtype") != "float16":
        return ()
    done = np.flatnonzero(store.status == DONE)
    looked_at = [store[i] for i in done[:: len(done) // IMAGES_LOOKED_AT + 1].tolist()]
    return tuple(
        level
        for level in store.levels
        if looked_at and all(np.abs(item[level]).max(initial=0) < LEAST_NORMAL for item in looked_at)
    )
