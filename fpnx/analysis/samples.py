"""What a probe classifies: images, boxes, or pixels of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fpnx.core.analysis_config import ProbeConfig
from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.text import escape, plural
from fpnx.labels.annotations import LabelSet
from fpnx.labels.geometry import fit_to_image
from fpnx.labels.matching import match_labels
from fpnx.labels.reading import read_labels
from fpnx.labels.semantic import class_map
from fpnx.store.reader import Store

__all__ = ["Kind", "Samples", "labelled_samples"]

Kind = Literal["images", "boxes", "pixels"]
KINDS: dict[str, Kind] = {"classification": "images", "detection": "boxes", "semantic": "pixels"}  # by task


@dataclass(frozen=True, eq=False)
class Samples:
    """Things with a class, in the order of their images.

    Attributes:
        kind: what they are.
        images: (n,) int64, positions of their images in the list of images that was given.
        classes: (n,) int64, indices into `names`.
        names: of the classes.
        places: of boxes (n, 4) x1, y1, x2, y2, of pixels (n, 2) x, y of their centres, as shares of the image's width
            and height; None for images.
        sides: (n,) float64, of boxes the root of the area in pixels of the source; else None.
        notes: what was left out of the labels, and remarks on them, a line each.
    """

    kind: Kind
    images: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    places: np.ndarray | None
    sides: np.ndarray | None
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.classes)

    def kept(self, mask: np.ndarray, notes: Sequence[str] = ()) -> Samples:
        """The samples that `mask` chooses; classes without any are removed."""
        used, classes = np.unique(self.classes[mask], return_inverse=True)
        return Samples(
            self.kind,
            self.images[mask],
            classes.astype(np.int64),
            tuple(self.names[number] for number in used.tolist()),
            None if self.places is None else self.places[mask],
            None if self.sides is None else self.sides[mask],
            (*self.notes, *notes),
        )


def labelled_samples(store: Store, images: np.ndarray, config: ProbeConfig) -> Samples:
    """The samples of images of a file.

    Args:
        store: the file, for names and sizes.
        images: (n,) indices of images in it that are done.
        config: the options.

    Raises:
        FpnxError: for labels that cannot be read, or fit no image.
    """
    names = [store.paths[index] for index in images.tolist()]
    label_set = read_labels(config.labels, names, store.root, config.task)  # type: ignore[arg-type]
    matched = match_labels(label_set, names, store.root)
    notes = [f"left out: {each.count} {reason}, such as {each.example}" for reason, each in label_set.dropped.items()]
    for what, found in (
        ("images without labels", matched.unlabelled),
        ("labels without an image", matched.absent),
        ("labels that fit several images", matched.ambiguous),
    ):
        if found:
            notes.append(f"{what}: {len(found)}, such as {escape(found[0])}")
    collect = {"images": _classified, "boxes": _boxed, "pixels": _pixels}[KINDS[label_set.task]]
    sizes = store.source_sizes[images]
    labelled = [(place, position) for place, position in enumerate(matched.indices) if position is not None]
    samples = collect(label_set, labelled, sizes, config)
    return Samples(
        KINDS[label_set.task],
        *samples[:2],
        tuple(category.name for category in label_set.categories),
        *samples[2:4],
        (*notes, *samples[4], *label_set.remarks),
    )


_Collected = tuple[np.ndarray, np.ndarray, "np.ndarray | None", "np.ndarray | None", list[str]]


def _classified(
    labels: LabelSet, labelled: Sequence[tuple[int, int]], sizes: np.ndarray, config: ProbeConfig
) -> _Collected:
    one = [(place, position) for place, position in labelled if len(labels.images[position].classes) == 1]
    notes = []
    if len(one) < len(labelled):
        notes.append(f"left out: {plural(len(labelled) - len(one), 'image')} with several classes or none")
    classes = [int(labels.images[position].classes[0]) for _, position in one]
    return np.array([place for place, _ in one], np.int64), np.array(classes, np.int64), None, None, notes


def _boxed(labels: LabelSet, labelled: Sequence[tuple[int, int]], sizes: np.ndarray, config: ProbeConfig) -> _Collected:
    images, classes, places, sides, outside, crowds = [], [], [], [], 0, 0
    for place, position in labelled:
        height, width = sizes[place].tolist()
        fitted = fit_to_image(labels.images[position], (height, width))
        outside += sum(map(len, fitted.dropped.values()))
        crowds += int(fitted.labels.crowd.sum())
        single = ~fitted.labels.crowd
        assert fitted.labels.boxes is not None, "labels for detection have boxes"
        boxes = fitted.labels.boxes[single]
        images.append(np.full(len(boxes), place, np.int64))
        classes.append(fitted.labels.classes[single])
        places.append(boxes / [width, height, width, height])
        sides.append(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))
    notes = [f"boxes outside of their image: {outside}"] if outside else []
    if crowds:
        notes.append(f"left out: {plural(crowds, 'region')} of many objects (crowds)")
    return np.concatenate(images), np.concatenate(classes), np.concatenate(places), np.concatenate(sides), notes


def _pixels(
    labels: LabelSet, labelled: Sequence[tuple[int, int]], sizes: np.ndarray, config: ProbeConfig
) -> _Collected:
    """`config.cells` pixels of each image, drawn from those that have a class."""
    random = np.random.default_rng(config.seed)
    images, classes, places, failed = [], [], [], list[str]()
    for place, position in labelled:
        height, width = sizes[place].tolist()
        try:
            known = class_map(labels, labels.images[position], (height, width)).reshape(-1)
        except ImageError as error:
            failed.append(f"{escape(labels.images[position].name)} ({error})")
            continue
        candidates = np.flatnonzero(known != 255)
        chosen = random.choice(candidates, min(config.cells, len(candidates)), replace=False)
        images.append(np.full(len(chosen), place, np.int64))
        classes.append(known[chosen].astype(np.int64))
        places.append(np.stack([(chosen % width + 0.5) / width, (chosen // width + 0.5) / height], axis=1))
    notes = [f"masks that cannot be used: {len(failed)}, such as {failed[0]}"] if failed else []
    if not images:
        raise FpnxError(f"labels {escape(labels.path)}: no mask can be used: {failed[0]}")
    return np.concatenate(images), np.concatenate(classes), np.concatenate(places), None, notes
