"""Which level tells classes apart: accuracy of simple classifiers on each level of one or several files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fpnx.analysis.classifiers import (
    Features,
    Folds,
    interval,
    linear_predictions,
    neighbor_predictions,
    stratified_folds,
)
from fpnx.analysis.sample_vectors import SampleVectors, by_size_levels, vector_folder
from fpnx.analysis.samples import Kind, Samples, labelled_samples
from fpnx.analysis.vectors import chosen_levels, matched_images, pooled
from fpnx.core.analysis_config import ProbeConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.text import escape, plural
from fpnx.store.reader import Store

__all__ = ["Accuracy", "Probe", "ProbeRow", "probe_stores"]

MAX_QUERIES = 10_000  # samples that nearest neighbours are measured on; others are neighbours only
SIZES = {"small": (0, 32), "medium": (32, 96), "large": (96, math.inf)}  # COCO's: root of the area in pixels
JOINED, BY_SIZE = "joined", "by size"  # rows of all levels side by side; of the level of Eq. 1 for each box


@dataclass(frozen=True)
class Accuracy:
    """The share of samples whose class was predicted right, each from samples of other folds.

    Attributes:
        samples: how many were predicted.
        share: of them right.
        low, high: ends of the 95 % interval.
        balanced: mean over classes of the share of its samples that are right.
        by_size: of boxes, the share by size: "small", "medium", "large"; NaN without boxes of a size.
    """

    samples: int
    share: float
    low: float
    high: float
    balanced: float
    by_size: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        sizes = {name: None if math.isnan(value) else value for name, value in self.by_size.items()}
        return {**asdict(self), "by_size": sizes}


@dataclass(frozen=True)
class ProbeRow:
    """One level of one file, or several joined.

    Attributes:
        file: number of the file, from 0 on.
        levels: the level; several where they are joined, or each box takes one of them.
        by_size: whether each box takes the level of Eq. 1 of the FPN paper.
        channels: length of a vector.
        linear: logistic regression.
        neighbors: nearest neighbours.
    """

    file: int
    levels: tuple[str, ...]
    by_size: bool
    channels: int
    linear: Accuracy
    neighbors: Accuracy

    @property
    def name(self) -> str:
        """The level, `"joined"`, or `"by size"`."""
        return BY_SIZE if self.by_size else self.levels[0] if len(self.levels) == 1 else JOINED


@dataclass(frozen=True)
class Probe:
    """What simple classifiers can tell from each level.

    Attributes:
        files: paths of the files.
        kind: what is classified: "images", "boxes" or "pixels".
        samples, images: how many, and of how many images.
        classes: samples of each class.
        folds, neighbors, l2, seed: as in the config.
        rows: the levels of each file.
        notes: what was left out, and remarks on the labels, a line each.
    """

    files: tuple[str, ...]
    kind: Kind
    samples: int
    images: int
    classes: dict[str, int]
    folds: int
    neighbors: int
    l2: float
    seed: int
    rows: tuple[ProbeRow, ...]
    notes: tuple[str, ...]

    @property
    def most_frequent(self) -> float:
        """The share of the most frequent class: the accuracy of always naming it."""
        return max(self.classes.values()) / self.samples

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        rows = [
            {
                "file": escape(self.files[row.file]),
                "name": row.name,
                "levels": list(row.levels),
                "channels": row.channels,
                "linear": row.linear.to_json(),
                "neighbors": row.neighbors.to_json(),
            }
            for row in self.rows
        ]
        return {
            "files": [escape(path) for path in self.files],
            "kind": self.kind,
            "samples": self.samples,
            "images": self.images,
            "classes": self.classes,
            "most_frequent": self.most_frequent,
            "folds": self.folds,
            "neighbors": self.neighbors,
            "l2": self.l2,
            "seed": self.seed,
            "rows": rows,
            "notes": list(self.notes),
        }


def probe_stores(stores: Sequence[Store], config: ProbeConfig, listener: Listener) -> Probe:
    """Probe the levels of files on the images that are done in all of them; the same samples and folds for all.

    Vectors beyond 1 GiB are in temporary files. A classifier holds at most 0.25 GiB of training vectors.

    Raises:
        FpnxError: for labels that do not fit, fewer than two classes, or too few samples.
    """
    levels, images = chosen_levels(stores, config.levels), matched_images(stores)
    found = labelled_samples(stores[0], images[0], config)
    _repeated_classes(found, np.ones(len(found), bool), config)  # refuses too few before anything is read
    pairs = list(zip(stores, levels, images, strict=True))
    width = sum(pooled(store, level, own[:1]).shape[1] for store, names, own in pairs for level in names)
    with vector_folder(len(found), width) as folder:
        vectors = [SampleVectors(store, names, own, found, folder, listener) for store, names, own in pairs]
        finite = np.logical_and.reduce([each.finite for each in vectors])
        kept, notes = _repeated_classes(found, finite, config)
        if not finite.all():
            notes.append(f"left out: {plural(int((~finite).sum()), 'vector')} with NaN or infinite values")
        samples = found.kept(kept, notes)
        views = [
            (number, *view) for number, (store, names, own) in enumerate(pairs)
            for view in _views(store, names, own, found, vectors[number], np.flatnonzero(kept))
        ]  # fmt: skip
        rows = tuple(_Classifiers(samples, config).rows(views, listener))
    counts = np.bincount(samples.classes).tolist()
    return Probe(
        files=tuple(store.path for store in stores),
        kind=samples.kind,
        samples=len(samples),
        images=len(np.unique(samples.images)),
        classes=dict(zip(samples.names, counts, strict=True)),
        folds=config.folds,
        neighbors=config.neighbors,
        l2=config.l2,
        seed=config.seed,
        rows=rows,
        notes=samples.notes,
    )


def _repeated_classes(samples: Samples, usable: np.ndarray, config: ProbeConfig) -> tuple[np.ndarray, list[str]]:
    """Which of the `usable` samples are of classes that are in two images or more, and notes on the others.

    A class in one image only is never in the training samples when it is to be predicted.

    Raises:
        FpnxError: for fewer than two such classes, or fewer images than folds.
    """
    if len(usable) and not usable.any():
        raise FpnxError(
            "every vector has NaN or infinite values at one of the levels: leave that level out with --levels (fpnx "
            "info names it)"
        )
    pairs = np.unique(np.stack([samples.images[usable], samples.classes[usable]]), axis=1)
    rare = np.bincount(pairs[1], minlength=len(samples.names)) == 1
    kept = usable & ~rare[samples.classes]
    classes, images = len(np.unique(samples.classes[kept])), len(np.unique(samples.images[kept]))
    if classes < 2:
        raise FpnxError(
            f"labels {escape(config.labels)}: {classes or 'no'} class in two images or more: take labels with at least "
            f"two such classes"
        )
    if images < config.folds:
        raise FpnxError(f"{plural(images, 'image')} and {config.folds} folds: take fewer --folds, or label more images")
    notes = []
    if rare.any():
        names = [escape(name) for name, alone in zip(samples.names, rare, strict=True) if alone]
        notes.append(f"classes in one image only, which are left out: {len(names)}, such as {names[0]}")
    return kept, notes


_View = tuple[tuple[str, ...], bool, Features]  # levels, whether by size, and their vectors


def _views(
    store: Store, levels: Sequence[str], images: np.ndarray, samples: Samples, vectors: SampleVectors, kept: np.ndarray
) -> list[_View]:
    """What is classified of one file: each level, all joined, and for boxes the level of their size."""
    views: list[_View] = [((level,), False, vectors.features([level], kept)) for level in levels]
    if len(levels) > 1:
        views.append((tuple(levels), False, vectors.features(levels, kept)))
    if samples.kind == "boxes" and (chosen := vectors.same_channels()):
        numbers = by_size_levels(store, images, samples, chosen)
        views.append((chosen, True, vectors.features_by_size(numbers, chosen, kept)))
    return views


class _Classifiers:
    """Accuracies of classifiers on samples, with the same folds for all features."""

    def __init__(self, samples: Samples, config: ProbeConfig) -> None:
        self._samples, self._config = samples, config
        self._folds = stratified_folds(samples.classes, samples.images, config.folds, config.seed)
        everything = np.arange(len(samples))
        self._queries = everything
        if len(samples) > MAX_QUERIES:
            random = np.random.default_rng(config.seed)
            self._queries = np.sort(random.choice(everything, MAX_QUERIES, replace=False))

    def rows(self, views: Sequence[tuple[int, tuple[str, ...], bool, Features]], listener: Listener) -> list[ProbeRow]:
        """A row for each of the features."""
        rows = []
        for done, (file, levels, by_size, features) in enumerate(views):
            folds = Folds(features, self._samples.classes, self._folds)
            linear = linear_predictions(folds, self._config.l2)
            near = neighbor_predictions(folds, self._config.neighbors, self._queries)
            rows.append(
                ProbeRow(
                    file,
                    levels,
                    by_size,
                    features.width,
                    self._accuracy(linear, np.arange(len(linear))),
                    self._accuracy(near, self._queries),
                )
            )
            listener.progress("levels", done + 1, len(views))
        return rows

    def _accuracy(self, predicted: np.ndarray, queries: np.ndarray) -> Accuracy:
        classes = self._samples.classes[queries]
        right = predicted == classes
        share, low, high = interval(right, self._samples.images[queries])
        counts = np.bincount(classes)
        recalls = np.bincount(classes, weights=right)[counts > 0] / counts[counts > 0]
        by_size = {}
        if self._samples.sides is not None:
            sides = self._samples.sides[queries]
            for name, (least, most) in SIZES.items():
                here = right[(sides >= least) & (sides < most)]
                by_size[name] = float(here.mean()) if len(here) else math.nan
        return Accuracy(len(queries), share, low, high, float(recalls.mean()), by_size)
