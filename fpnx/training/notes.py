"""What may be wrong with the data of a training, said before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape, plural
from fpnx.labels.annotations import ImageLabels, LabelSet
from fpnx.labels.geometry import fit_to_image
from fpnx.models.pyramid_model import PyramidModel

__all__ = ["notes_on"]

MANY = 0.1  # of the objects, or more, are worth a note
NAMED = 5  # classes


def notes_on(
    labels: LabelSet, images: Sequence[tuple[ImageLabels, tuple[int, int] | None]], model: PyramidModel
) -> list[str]:
    """Notes on the images to train on, a line each.

    Args:
        labels: name task and classes.
        images: labels and (height, width) of each upright image to train on.
        model: whose levels the head takes.

    Raises:
        FpnxError: no object can be trained on.
    """
    counts = np.zeros(len(labels.categories), np.int64)
    objects = small = 0
    finest = min(model.stride(name) for name in model.levels)
    recipe = model.recipe
    for each, size in images:
        counts[np.unique(each.classes)] += 1
        if labels.task != "detection" or each.boxes is None or size is None:
            continue
        fitted = fit_to_image(replace(each, segments=()), size).labels
        assert fitted.boxes is not None
        boxes = fitted.boxes[~fitted.crowd]
        height, width = recipe.input_size(size, None, model.largest_scale)
        sides = (boxes[:, 2:] - boxes[:, :2]) * (width / size[1], height / size[0])
        objects += len(boxes)
        small += int((sides.prod(1) < finest**2).sum())
    if labels.task == "detection" and not objects:
        raise FpnxError(
            f"the {plural(len(images), 'image')} to train on have no object (regions of many objects, crowd and "
            "difficult, do not count): take other --labels, or another --val"
        )
    return [*_on_classes(labels, counts), *_on_sizes(objects, small, finest)]


def _on_classes(labels: LabelSet, counts: np.ndarray) -> list[str]:
    """`counts`: images to train on, by class."""
    if labels.task != "detection" and len(labels.categories) == 1 and not labels.multi_label:
        return ["there is one class, so there is nothing to tell apart"]
    labelled = np.zeros(len(counts), bool)
    for each in labels.images:
        labelled[each.classes] = True
    missing = [labels.categories[i].name for i in np.flatnonzero(labelled & (counts == 0))]
    if not missing:
        return []
    named = ", ".join(map(escape, missing[:NAMED])) + (", …" if len(missing) > NAMED else "")
    return [f"{plural(len(missing), 'class')} without an image to train on: {named}"]


def _on_sizes(objects: int, small: int, finest: int) -> list[str]:
    if small < max(1, MANY * objects):
        return []
    return [
        f"objects smaller than a cell of the finest level ({finest}×{finest} pixels of the network's input): "
        f"{small} of {objects}; they are hardly learned: take a larger --size, or finer --levels"
    ]
