"""What a training is about: images or stored maps, their labels, what is held out, and the model that fits them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.events import Listener
from fpnx.core.system import usable_cpus
from fpnx.core.text import escape, plural
from fpnx.core.train_config import TrainConfig
from fpnx.extraction.plan import decode_threads
from fpnx.images.decoding import upright_sizes
from fpnx.images.listing import find_images
from fpnx.labels.annotations import ImageLabels, LabelSet
from fpnx.labels.matching import Matched, match_labels
from fpnx.labels.reading import read_labels
from fpnx.labels.summary import summarize
from fpnx.models.heads.base import Head
from fpnx.models.heads.registry import default_head, find_head
from fpnx.models.pyramid_model import PyramidModel
from fpnx.store.joined_store import is_store, open_store
from fpnx.store.reader import DONE, Store
from fpnx.training.batches import Source
from fpnx.training.image_batches import ImageBatches
from fpnx.training.model import model_for_images, model_of_store
from fpnx.training.notes import notes_on
from fpnx.training.split import held_out
from fpnx.training.tap_batches import TapBatches
from fpnx.training.targets import TargetMaker

__all__ = ["TrainingData", "open_data"]

# Options that only some heads have.
HEADS_WITH = {"convolutions": ("fcos", "retinanet"), "box_samples": ("faster_rcnn", "mask_rcnn")}


@dataclass(kw_only=True)
class TrainingData:
    """Images or maps with labels, and the model for them.

    Attributes:
        labels: of all images, with those of the validation; names the classes.
        head: kind of the head.
        model: its levels are those of the head, its recipe is the preprocessing.
        make: makes targets.
        source: the labelled images.
        training, validation: indices in `source`.
        stored: whether maps are read, and the backbone is not run.
        augments: whether images are changed at random.
        where: the folder or file, in words.
        label_lines, label_facts: what the labels hold.
        identity: what the data are, as plain values; a run is only continued with the same.
    """

    labels: LabelSet
    head: str
    model: PyramidModel
    make: TargetMaker
    source: Source
    training: list[int]
    validation: list[int]
    stored: bool
    augments: bool
    where: str
    label_lines: tuple[str, ...]
    label_facts: Mapping[str, Any]
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Labelled:
    """The images that have labels.

    Attributes:
        labels: names the classes.
        places: of the images among all names.
        each: the labels of each of these images.
        validation: positions in `places` of those that have labels for validation; None where none are set apart.
        sets: (what for, labels, matches) of each label file.
    """

    labels: LabelSet
    places: list[int]
    each: list[ImageLabels]
    validation: list[int] | None
    sets: Sequence[tuple[str, LabelSet, Matched]]

    def described(self, sizes: Sequence[tuple[int, int] | None]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """What the labels hold, in lines and as values for JSON; `sizes` are those of the images at `places`."""
        known = dict(zip(self.places, sizes, strict=True))
        lines: list[str] = []
        facts: dict[str, Any] = {}
        for name, labels, matched in self.sets:
            summary = summarize(labels, matched, [known.get(place) for place in range(len(matched.images))])
            lines += [*([f"for {name}:"] if facts else []), *summary.lines()]
            facts |= {name: summary.to_json()} if facts else summary.to_json()
        return tuple(lines), facts


@contextmanager
def open_data(
    inputs: Sequence[str | os.PathLike[str]], config: TrainConfig, listener: Listener
) -> Iterator[TrainingData]:
    """Find and read what a training is about.

    Args:
        inputs: images, or a file of maps, or several as one.
        config: the options.
        listener: receives messages.

    Raises:
        FpnxError: nothing fits, or cannot be trained.
    """
    stores = [path for path in inputs if is_store(path)]
    if stores and len(stores) < len(inputs):
        raise FpnxError(f"{escape(stores[0])} is a file of maps, and other inputs are not: give maps or images")
    if stores:
        with open_store(inputs[0] if len(inputs) == 1 else list(inputs)) as store:
            yield _from_store(store, config, listener)
        return
    data = _from_images(inputs, config, listener)
    try:
        yield data
    finally:
        data.source.close()


def _from_images(inputs: Sequence[str | os.PathLike[str]], config: TrainConfig, listener: Listener) -> TrainingData:
    listing = find_images(inputs)
    names = [os.fsdecode(source.name) for source in listing.sources]
    found = _labelled(names, os.fsdecode(listing.root), config, listener)
    kind = _head(config, found.labels)
    model = model_for_images(config, kind)
    make = TargetMaker(found.labels, masks=kind.needs_masks)
    workers = decode_threads(config.workers, listing, usable_cpus())
    images = [listing.sources[place] for place in found.places]
    sizes: list[tuple[int, int] | str] = []
    with closing(upright_sizes(images, config.max_pixels, workers)) as measured:
        for size in measured:
            sizes.append(str(size) if isinstance(size, ImageError) else size)
            listener.progress("headers", len(sizes), len(images))
    source = ImageBatches(images, found.each, sizes, model, make, max_pixels=config.max_pixels, workers=workers)
    return _data(found, kind, model, make, source, config, escape(listing.root), names, sizes)


def _from_store(store: Store, config: TrainConfig, listener: Listener) -> TrainingData:
    if config.unfreeze != 0:
        raise FpnxError(
            f"unfreeze {config.unfreeze} beside a file of maps, for which the backbone is not run: give the images"
        )
    done = np.flatnonzero(store.status == DONE).tolist()
    if not done:
        raise FpnxError(f"{escape(store.path)} has no image that is done: continue it with fpnx extract --resume")
    names = [store.paths[row] for row in done]
    found = _labelled(names, store.root, config, listener)
    kind = _head(config, found.labels)
    model = model_of_store(store, config, kind)
    make = TargetMaker(found.labels, masks=kind.needs_masks)
    rows = [done[place] for place in found.places]
    source = TapBatches(store, rows, found.each, make)
    sizes = [(int(height), int(width)) for height, width in store.source_sizes[rows]]
    return _data(found, kind, model, make, source, config, escape(store.path), names, sizes)


def _data(
    found: _Labelled,
    kind: type[Head],
    model: PyramidModel,
    make: TargetMaker,
    source: ImageBatches | TapBatches,
    config: TrainConfig,
    where: str,
    names: Sequence[str],
    sizes: Sequence[tuple[int, int] | str],
) -> TrainingData:
    usable, stored = list(source.usable), isinstance(source, TapBatches)
    if not usable:
        raise FpnxError(f"none of the {plural(len(found.places), 'labelled image')} in {where} can be read")
    if found.validation is None:
        share = config.held_out or 0.0
        chosen = held_out([source.names[i] for i in usable], [found.each[i] for i in usable], share, config.seed)
        validation = [usable[i] for i in chosen]
    else:
        validation = [i for i in found.validation if i in set(usable)]
    kept = set(validation)
    training = [i for i in usable if i not in kept]
    if not training:
        raise FpnxError("all labelled images are for validation, and none is left to train on: take other --labels")
    known = [None if isinstance(size, str) else size for size in sizes]
    lines, facts = found.described(known)
    notes = notes_on(found.labels, [(found.each[i], known[i]) for i in training], model)
    lines = (*lines, *(f"note: {note}" for note in notes))
    facts["remarks"] = [*facts["remarks"], *notes]
    return TrainingData(
        labels=found.labels,
        head=kind.kind,
        model=model,
        make=make,
        source=source,
        training=training,
        validation=validation,
        stored=stored,
        augments=not stored and config.augment != "none",
        where=where,
        label_lines=lines,
        label_facts=facts,
        identity={
            "source": "maps" if stored else "images",
            "images": _digest([names[place] for place in found.places]),
            "labels": _digest([_plain(each) for each in found.each]),
            "validation": _digest([names[found.places[i]] for i in validation]),
            "classes": [[category.id, category.name] for category in found.labels.categories],
            "model": model.identity(),
            "recipe": model.recipe.to_json(),
        },
    )


def _head(config: TrainConfig, labels: LabelSet) -> type[Head]:
    kind = find_head(config.head or default_head(labels.task, labels.has_segments))
    if kind.task != labels.task:
        raise FpnxError(
            f"head {kind.kind} is for {kind.task}, and {escape(labels.path)} for {labels.task}: take another head, or "
            "other labels"
        )
    if kind.needs_masks and not labels.has_segments:
        raise FpnxError(
            f"head {kind.kind} needs outlines, and {escape(labels.path)} has boxes only: take --head faster_rcnn"
        )
    for name, heads in HEADS_WITH.items():
        value = getattr(config, name)
        if value is not None and kind.kind not in heads:
            raise FpnxError(
                f"{name.replace('_', ' ')} {value} beside head {kind.kind}: it is for {' and '.join(heads)}"
            )
    return kind


def _labelled(names: list[str], root: str, config: TrainConfig, listener: Listener) -> _Labelled:
    task: Any = config.task or (find_head(config.head).task if config.head else None)
    labels = read_labels(config.labels or "", names, root, task)
    matched = match_labels(labels, names, root)
    by_place = {place: labels.images[i] for place, i in enumerate(matched.indices) if i is not None}
    if isinstance(config.val, float):
        places = sorted(by_place)
        return _Labelled(labels, places, [by_place[place] for place in places], None, [("training", labels, matched)])
    others = read_labels(config.val, names, root, labels.task)
    of_others = match_labels(others, names, root)
    translate = _class_translation(others, labels)
    apart = {
        place: replace(others.images[i], classes=translate(others.images[i].classes))
        for place, i in enumerate(of_others.indices)
        if i is not None
    }
    both = len(by_place.keys() & apart.keys())
    if both:
        listener.message(f"{plural(both, 'image')} in the labels of both: only for validation")
    joined = by_place | apart
    places = sorted(joined)
    validation = [position for position, place in enumerate(places) if place in apart]
    sets = [("training", labels, matched), ("validation", others, of_others)]
    return _Labelled(labels, places, [joined[place] for place in places], validation, sets)


def _class_translation(others: LabelSet, labels: LabelSet) -> Callable[[np.ndarray], np.ndarray]:
    """From indices of classes of one label set to those of another, by their names.

    Raises:
        FpnxError: a class that the other one does not have.
    """
    known = {category.name: i for i, category in enumerate(labels.categories)}
    missing = [category.name for category in others.categories if category.name not in known]
    if missing:
        raise FpnxError(
            f"class {escape(missing[0])} of {escape(others.path)} is not in {escape(labels.path)}: both need the same"
        )
    table = np.array([known[category.name] for category in others.categories], np.int64)
    return lambda classes: table[classes]


def _plain(labels: ImageLabels) -> list[Any]:
    """The annotations of an image as values for JSON."""
    segments = [dict(each) if isinstance(each, Mapping) else each for each in labels.segments]
    boxes = None if labels.boxes is None else labels.boxes.tolist()
    return [labels.classes.tolist(), boxes, labels.crowd.tolist(), segments, labels.mask_file]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()
