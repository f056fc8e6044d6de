"""The boxes of a run: read from labels, found for its images, and put into pixels of the network's input."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.image_notes import BOX_OUTSIDE, OTHER_LABEL_SIZE
from fpnx.core.text import escape, plural
from fpnx.images.listing import Listing, find_images
from fpnx.inference.engine import Features
from fpnx.inference.region_pooling import RegionPooling, joined_regions
from fpnx.labels.annotations import ImageLabels, LabelSet
from fpnx.labels.geometry import fit_to_image
from fpnx.labels.matching import Matched, match_labels
from fpnx.labels.reading import read_labels
from fpnx.store.file_layout import FileLayout
from fpnx.store.regions import RegionBatch, RegionLayout

__all__ = ["ImageBoxes", "PlannedRegions", "RunBoxes", "read_boxes", "scaled_boxes"]


@dataclass(frozen=True, eq=False)
class RunBoxes:
    """The boxes of the images of a run.

    Attributes:
        by_image: index of an image → its labels; images without boxes are left out.
        ids: (classes,) int64, id of each class in the label file.
        names: of the classes, by id.
        sha256: of all boxes in the labels, in hexadecimal.
        remarks: what is left out, a line each.
    """

    by_image: Mapping[int, ImageLabels]
    ids: np.ndarray
    names: Mapping[int, str]
    sha256: str
    remarks: tuple[str, ...] = ()


class ImageBoxes(NamedTuple):
    """The boxes of one image, (n, 4) float64 each: in pixels of the upright source, and of the network's input.

    They are clipped to the image; those outside of it are NaN.
    """

    source: np.ndarray
    input: np.ndarray


@dataclass(frozen=True, eq=False)
class PlannedRegions:
    """The boxes of a run, and how each becomes a feature.

    Attributes:
        boxes: of the images.
        pooling: chooses the level of a box and pools from it.
    """

    boxes: RunBoxes
    pooling: RegionPooling

    def identity(self) -> dict[str, Any]:
        """What stored values depend on, for the fingerprint."""
        return {"boxes": self.boxes.sha256, **self.pooling.identity()}

    def layout(
        self, rows: np.ndarray, shapes: Mapping[tuple[int, int], Mapping[str, tuple[int, int, int]]]
    ) -> RegionLayout:
        """The rows of the boxes of all images that have a row themselves.

        Args:
            rows: (N,) row of each image; -1 where it has none.
            shapes: of the levels' maps, by padded size.
        """
        images = [index for index in sorted(self.boxes.by_image) if rows[index] >= 0]
        classes = [self.boxes.by_image[index].classes[_usable(self.boxes.by_image[index])] for index in images]
        channels = max((shape[0] for levels in shapes.values() for shape in levels.values()), default=0)
        return RegionLayout(
            image=np.repeat(np.array(images, np.int64), [len(of_image) for of_image in classes]),
            label=self.boxes.ids[np.concatenate([*classes, np.empty(0, np.int64)])],
            names=self.boxes.names,
            shape=(channels, *self.pooling.shape),
        )

    def of_image(
        self, index: int, source_size: tuple[int, int], input_size: tuple[int, int]
    ) -> tuple[ImageBoxes, set[str]]:
        """The boxes of an image, and the kinds of notes about them, see `fpnx.core.image_notes`.

        Args:
            index: of the image.
            source_size: (height, width) of the upright source.
            input_size: (height, width) of the network's input without padding.
        """
        labels = self.boxes.by_image.get(index)
        if labels is None or labels.boxes is None:
            return ImageBoxes(np.empty((0, 4)), np.empty((0, 4))), set()
        fitted = fit_to_image(replace(labels, segments=()), source_size)
        boxes, source = fitted.labels.boxes, np.full(labels.boxes.shape, np.nan)
        assert boxes is not None
        source[fitted.kept] = boxes
        source = source[_usable(labels)]
        outside = bool(np.isnan(source).any())
        notes = {kind for kind, holds in ((BOX_OUTSIDE, outside), (OTHER_LABEL_SIZE, fitted.other_size)) if holds}
        return ImageBoxes(source, scaled_boxes(source, source_size, input_size)), notes

    def batch(self, boxes: Sequence[ImageBoxes], features: Features, layout: FileLayout) -> RegionBatch:
        """The rows of a batch of images, once its features are ready.

        Args:
            boxes: of each image.
            features: of the batch.
            layout: of the file.
        """
        assert layout.regions is not None
        levels = self.pooling.levels(np.concatenate([of_image.input for of_image in boxes]))
        source = np.concatenate([of_image.source for of_image in boxes])
        shape = (len(levels), *layout.regions.shape)
        return RegionBatch(source, levels, joined_regions(features.regions, shape, layout.dtype))


def scaled_boxes(boxes: np.ndarray, source_size: tuple[int, int], input_size: tuple[int, int]) -> np.ndarray:
    """Boxes (n, 4) in pixels of an upright image → in pixels of the network's input; sizes are (height, width)."""
    y, x = (new / old for new, old in zip(input_size, source_size, strict=True))
    return boxes * np.array([x, y, x, y])


def read_boxes(images: Sequence[str | os.PathLike[str]], listing: Listing, config: ExtractConfig) -> RunBoxes | None:
    """The boxes of `config.boxes` for the images of a run; None where the config has none.

    Labels are matched with the whole list of images, also in a shard, so that each shard finds what the others do.

    Args:
        images: inputs of the run, as `find_images` takes them.
        listing: the images that were found in them.
        config: the options.

    Raises:
        FpnxError: for labels that cannot be read, have no boxes, or are of other images.
    """
    if config.boxes is None:
        return None
    whole = listing if listing.shard_slice is None else find_images(images, config.limit)
    names, root = [os.fsdecode(source.name) for source in whole.sources], os.fsdecode(whole.root)
    labels = read_labels(config.boxes, names, root, "detection")
    matched = match_labels(labels, names, root)
    entries = {i: labels.images[at] for i, at in enumerate(matched.indices) if at is not None}
    found = {i: entry for i, entry in entries.items() if entry.boxes is not None and _usable(entry).any()}
    where = f"boxes {escape(config.boxes)}"
    if not found:
        raise FpnxError(f"{where}: none in these {plural(len(names), 'image')}: give images that have boxes")
    first = 0 if listing.shard_slice is None else listing.shard_slice.first
    return RunBoxes(
        by_image={i - first: entry for i, entry in found.items() if first <= i < first + len(listing.sources)},
        ids=np.array([category.id for category in labels.categories], np.int64),
        names={category.id: category.name for category in labels.categories},
        sha256=_content_hash(labels),
        remarks=tuple(f"{where}: {remark}" for remark in _remarks(labels, matched, len(names) - len(found))),
    )


def _remarks(labels: LabelSet, matched: Matched, without: int) -> Iterator[str]:
    """What is left out, a line each."""
    yield from labels.remarks
    for reason, dropped in labels.dropped.items():
        yield f"{dropped.count} {reason} left out, such as {dropped.example}"
    if crowds := sum(int(image.crowd.sum()) for image in labels.images):
        yield f"{plural(crowds, 'region')} of many objects (iscrowd) left out"
    for found, why in ((matched.absent, "not among the images"), (matched.ambiguous, "not of one image for certain")):
        if found:
            yield f"{plural(len(found), 'name')} {why}, such as {escape(found[0])}"
    if without:
        yield f"{plural(without, 'image')} without boxes"


def _usable(labels: ImageLabels) -> np.ndarray:
    """(n,) bool: boxes of single objects; regions of many objects are left out."""
    return ~labels.crowd


def _content_hash(labels: LabelSet) -> str:
    """sha256 (hex) of all boxes and classes in labels, in whatever order the images are."""
    digest = hashlib.sha256(json.dumps([[each.id, each.name] for each in labels.categories]).encode())
    for image in sorted(labels.images, key=lambda image: image.name):
        if image.boxes is not None:
            digest.update(json.dumps([image.name, image.size, image.relative, image.classes.tolist()]).encode())
            digest.update(image.boxes.astype("<f8").tobytes() + image.crowd.tobytes())
    return digest.hexdigest()
