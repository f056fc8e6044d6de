"""Batches from a file of stored maps: the backbone is not run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from fpnx.core.errors import ImageError
from fpnx.core.text import escape
from fpnx.labels.annotations import ImageLabels
from fpnx.models.heads.base import Geometry, Target
from fpnx.store.reader import Store
from fpnx.training.batches import Batch, Draw, empty_batch
from fpnx.training.model import check_maps
from fpnx.training.targets import TargetMaker, padded_target

__all__ = ["TapBatches"]


class TapBatches:
    """A `Source` of stored maps.

    Args:
        store: the file, or several as one.
        rows: of the images in it, all of which are done.
        labels: of each of these images.
        make: makes the targets.

    Attributes:
        names, labels, shapes, usable, left_out: as `ImageBatches` has them.
        levels: names of the maps to read, set before the first batch.
    """

    def __init__(
        self,
        store: Store,
        rows: Sequence[int],
        labels: Sequence[ImageLabels],
        make: TargetMaker,
    ) -> None:
        self.names = [escape(store.paths[row]) for row in rows]
        self.labels = labels
        self.shapes: list[Hashable] = [store.padded_sizes[row] for row in rows]
        self.usable = list(range(len(rows)))
        self.left_out: dict[str, str] = {}
        self._store, self._rows, self._make = store, list(rows), make
        self.levels: tuple[str, ...] = ()

    def batch(self, indices: Sequence[int], draw: Draw | None) -> Batch:
        """The batch of some images of one shape; those whose maps or labels cannot be used are in `failed`.

        Stored maps cannot be augmented, and `draw` has no effect.
        """
        padded: Any = self.shapes[indices[0]]
        rows = [self._rows[index] for index in indices]
        maps = {level: self._store.read(level, rows) for level in self.levels}
        places: list[int] = []
        targets: list[Target] = []
        failed: list[tuple[int, str]] = []
        sizes = [_pair(self._store.input_sizes[row]) for row in rows]
        source_sizes = [_pair(self._store.source_sizes[row]) for row in rows]
        for place, index in enumerate(indices):
            try:
                if not all(np.isfinite(values[place]).all() for values in maps.values()):
                    raise ImageError("its maps have NaN or infinite values: extract it again with --dtype float32")
                made = self._make(self.labels[index], source_sizes[place], sizes[place])
            except ImageError as error:
                failed.append((index, str(error)))
                continue
            places.append(place)
            targets.append(padded_target(made, padded))
        if not places:
            return empty_batch(failed)
        if failed:
            maps = {level: values[places] for level, values in maps.items()}
        return Batch(
            indices=tuple(indices[place] for place in places),
            inputs={level: torch.from_numpy(values.astype(np.float32, copy=False)) for level, values in maps.items()},
            geometry=Geometry(padded, tuple(sizes[place] for place in places)),
            targets=tuple(targets),
            source_sizes=tuple(source_sizes[place] for place in places),
            failed=tuple(failed),
        )

    def read_maps(self, levels: Sequence[str]) -> None:
        """Set the maps that batches hold.

        Raises:
            FpnxError: the file does not have them.
        """
        check_maps(self._store, tuple(levels))
        self.levels = tuple(levels)

    def close(self) -> None:
        """The store is closed by who opened it."""


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])
