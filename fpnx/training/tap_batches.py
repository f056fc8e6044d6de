"""Batches from a file of stored maps: the backbone is not run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.labels.annotations import ImageLabels
from fpnx.models.heads.base import Geometry
from fpnx.store.reader import Store
from fpnx.training.batches import Batch, Draw
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
        """The batch of some images of one shape; stored maps cannot be augmented, and `draw` has no effect."""
        rows = [self._rows[index] for index in indices]
        maps = {level: _as_tensor(self._store.read(level, rows)) for level in self.levels}
        sizes = [_pair(self._store.input_sizes[row]) for row in rows]
        source_sizes = [_pair(self._store.source_sizes[row]) for row in rows]
        padded: Any = self.shapes[indices[0]]
        targets = tuple(
            padded_target(self._make(self.labels[index], source, size), padded)
            for index, source, size in zip(indices, source_sizes, sizes, strict=True)
        )
        return Batch(
            indices=tuple(indices),
            inputs=maps,
            geometry=Geometry(padded, tuple(sizes)),
            targets=targets,
            source_sizes=tuple(source_sizes),
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


def _as_tensor(values: np.ndarray) -> Tensor:
    """float32, whatever is stored."""
    if not np.isfinite(values).all():
        raise FpnxError("a stored map has NaN or infinite values: extract it again with --dtype float32")
    return torch.from_numpy(values.astype(np.float32, copy=False))


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])
