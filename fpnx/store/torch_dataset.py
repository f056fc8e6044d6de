"""PyTorch Dataset of the features in a store, and a sampler of batches of one shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.text import escape
from fpnx.store.reader import DONE, Store
from fpnx.store.shard_set import open_store

__all__ = ["PyramidDataset", "ShapeBatchSampler"]


class PyramidDataset(Dataset[dict[str, Any]]):
    """Stored pyramids for training heads: the images that are done, in the order of the store.

    `data[i]` → `{"P3": (C, H, W) tensor in the stored dtype, ..., "path": str, "index": row in the store}` and, where
    `target` is given, `"target": target(path)`. The file is opened in each worker process on first use.

    Args:
        path: a file that `fpnx extract` wrote, or a run's shards as a glob or as paths in any order.
        levels: `"P2-P5"`, `"C3,P3"` or a sequence of names; None takes all levels in the file.
        target: function from a stored path to its label.

    Raises:
        FpnxError: for a file that cannot be read, or a level that it does not have.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        levels: str | Iterable[str] | None = None,
        target: Callable[[str], Any] | None = None,
    ) -> None:
        self.path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else [os.fspath(shard) for shard in path]
        if target is not None and not callable(target):
            raise FpnxError(f"target {target!r}: take a function from a stored path to its label")
        self.target = target
        with open_store(self.path) as store:
            self.levels = store.levels if levels is None else parse_levels(levels)
            for level in self.levels:
                if level not in store.levels:
                    raise FpnxError(f"no level {level!r} in {escape(store.path)}: it has {', '.join(store.levels)}")
            self.indices: list[int] = np.flatnonzero(store.status == DONE).tolist()
            self.sizes: list[Hashable] = [store.padded_sizes[index] for index in self.indices]
        self._opened: tuple[int, Store] | None = None

    @property
    def store(self) -> Store:
        """The store, opened in this process: an HDF5 handle cannot be used after a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), open_store(self.path))
        return self._opened[1]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i}: {escape(self.store.path)} holds {len(self)} that are done")
        item = self.store[self.indices[i]]
        sample: dict[str, Any] = {level: torch.from_numpy(item[level]) for level in self.levels}
        sample |= {"path": item.path, "index": item.index}
        if self.target is not None:
            sample["target"] = self.target(item.path)
        return sample

    def batch_sampler(self, batch_size: int, shuffle: bool = False, seed: int = 0) -> ShapeBatchSampler:
        """A sampler for `DataLoader(batch_sampler=...)`, with batches of images of one shape."""
        return ShapeBatchSampler(self.sizes, batch_size, shuffle, seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class ShapeBatchSampler(Sampler[list[int]]):
    """Sampler of batches of images of one shape; each epoch is shuffled differently, but reproducibly.

    Each iteration is the next epoch; `set_epoch` sets the epoch of the next iteration.

    Args:
        shapes: a hashable key of each image's shape; equal keys may share a batch.
        batch_size: images per batch; the last batch of each shape may be smaller.
        shuffle: shuffle the images of each shape, and the batches.
        seed: of the shuffling; each epoch adds 1.
    """

    def __init__(self, shapes: Sequence[Hashable], batch_size: int, shuffle: bool = False, seed: int = 0) -> None:
        if batch_size < 1:
            raise FpnxError(f"batch size {batch_size}: take 1 or more")
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0
        self._by_shape: dict[Hashable, list[int]] = {}
        for i, shape in enumerate(shapes):
            self._by_shape.setdefault(shape, []).append(i)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator(device="cpu").manual_seed(self.seed + self.epoch)
        self.epoch += 1
        batches = []
        for indices in self._by_shape.values():
            ordered = [indices[i] for i in _permutation(len(indices), generator)] if self.shuffle else indices
            batches += [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        if self.shuffle:
            batches = [batches[i] for i in _permutation(len(batches), generator)]
        return iter(batches)

    def __len__(self) -> int:
        return sum(-(-len(indices) // self.batch_size) for indices in self._by_shape.values())


def _permutation(count: int, generator: torch.Generator) -> list[int]:
    return cast("list[int]", torch.randperm(count, generator=generator, device="cpu").tolist())
