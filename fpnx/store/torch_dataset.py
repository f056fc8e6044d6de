"""PyTorch Dataset of the features in a store, and a sampler of batches of one shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.text import escape
from fpnx.store.joined_store import open_store
from fpnx.store.reader import DONE, Store

__all__ = ["PyramidDataset", "ShapeBatchSampler"]


class PyramidDataset(Dataset[dict[str, Any]]):
    """Stored pyramids for training heads: the images that are done, in the order of the store.

    `data[i]` → `{"P3": (C, H, W) tensor in the stored dtype, ..., "path": str, "index": row in the store}` and, where
    `target` is given, its `"target"`. The file is opened in each worker process on first use. A DataLoader fetches
    whole batches with `Store.read`; the tensors of a batch then share memory: clone one that you keep alone.

    Args:
        path: a file that `fpnx extract` wrote, or several as one, as a glob or as paths: those of a run's shards in any
            order, or files with the same config. An image that is in several is taken once; see `fpnx.open`.
        levels: `"P2-P5"`, `"C3,P3"` or a sequence of names; None takes all levels in the file.
        target: the label of each stored path: a dict, or a function. For worker processes that are spawned it must be
            picklable: a dict, or a function at the top level of a module, not a lambda.
        regions: read a file of regions (`fpnx extract --boxes`). A sample then has no maps, but of the n boxes of its
            image `"regions"` (n, C, h, w) in the stored dtype, `"boxes"` (n, 4) float64 in pixels of the upright
            source, `"levels"` and `"labels"` (n,) int64, see `fpnx.store.regions.Regions`.

    Raises:
        FpnxError: for a file that cannot be read, a level that it does not have, or an image without label.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        levels: str | Iterable[str] | None = None,
        target: Callable[[str], Any] | Mapping[str, Any] | None = None,
        regions: bool = False,
    ) -> None:
        self.path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else [os.fspath(each) for each in path]
        if not (target is None or isinstance(target, Mapping) or callable(target)):
            raise FpnxError(f"target {target!r}: take a dict from stored paths to labels, or a function")
        if regions and levels is not None:
            raise FpnxError("levels are maps, and a file of regions has none: leave out levels, or regions=True")
        self.target, self.regions = target, regions
        with open_store(self.path) as store:
            if regions and not store.has_regions:
                store.regions  # noqa: B018 - raises with the reason
            self.levels = () if regions else store.levels if levels is None else parse_levels(levels)
            for level in self.levels:
                store.check_level(level)
            self.indices: list[int] = np.flatnonzero(store.status == DONE).tolist()
            self.sizes: list[Hashable] = [store.padded_sizes[index] for index in self.indices]
            if isinstance(target, Mapping):
                _check_labels(target, [store.paths[index] for index in self.indices])
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
        item = self.store[self._index(i)]
        return self._sample(item.index, {level: torch.from_numpy(item[level]) for level in self.levels})

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The samples at `positions`, as `__getitem__` gives each; a DataLoader calls this for a batch."""
        if type(self).__getitem__ is not PyramidDataset.__getitem__:  # a subclass makes samples of its own
            return [self[i] for i in positions]
        indices = [self._index(i) for i in positions]
        by_size: dict[Hashable, list[int]] = {}
        for place, index in enumerate(indices):
            by_size.setdefault(self.store.padded_sizes[index], []).append(place)
        features: list[dict[str, Any]] = [{} for _ in indices]
        for level in self.levels:
            for places in by_size.values():
                batch = torch.from_numpy(self.store.read(level, [indices[place] for place in places]))
                for place, tensor in zip(places, batch, strict=True):
                    features[place][level] = tensor
        return [self._sample(index, levels) for index, levels in zip(indices, features, strict=True)]

    def _index(self, i: int) -> int:
        """Index in the store of the image at position `i` of this dataset."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i}: {escape(self.store.path)} holds {len(self)} that are done")
        return self.indices[i]

    def _sample(self, index: int, features: dict[str, Any]) -> dict[str, Any]:
        path = self.store.paths[index]
        sample = {**features, "path": path, "index": index}
        if self.regions:
            regions = self.store[index].regions
            values = {
                "regions": regions.features,
                "boxes": regions.box,
                "levels": regions.level,
                "labels": regions.label,
            }
            sample |= {name: torch.from_numpy(array) for name, array in values.items()}
        if self.target is not None:
            sample["target"] = self.target[path] if isinstance(self.target, Mapping) else self.target(path)
        return sample

    def batch_sampler(self, batch_size: int, shuffle: bool = False, seed: int = 0) -> ShapeBatchSampler:
        """A sampler for `DataLoader(batch_sampler=...)`, with batches of images of one shape."""
        return ShapeBatchSampler(self.sizes, batch_size, shuffle, seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def _check_labels(labels: Mapping[str, Any], paths: Sequence[str]) -> None:
    unlabelled = []
    for path in paths:
        try:
            labels[path]
        except KeyError:
            unlabelled.append(path)
    if unlabelled:
        others = f" and {len(unlabelled) - 1} others" if unlabelled[1:] else ""
        raise FpnxError(f"target has no label for {escape(unlabelled[0])}{others}: its keys are stored paths")


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
