"""Scores of a network on the images that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fpnx.evaluation.classification import classification_scores
from fpnx.evaluation.detection_scores import detection_scores
from fpnx.evaluation.detections import to_source
from fpnx.evaluation.scores import Scores
from fpnx.evaluation.semantic import PixelCounts, class_map
from fpnx.labels.geometry import fit_to_image
from fpnx.models.heads.base import Detections
from fpnx.models.torch_state import isolated_torch_state
from fpnx.training.batches import Batch, Source, read_ahead, share_of
from fpnx.training.network import Network
from fpnx.training.processes import Processes
from fpnx.training.targets import TargetMaker

__all__ = ["validation_scores"]


def validation_scores(
    network: Network,
    source: Source,
    batches: Sequence[Sequence[int]],
    make: TargetMaker,
    processes: Processes,
    autocast: Any,
) -> tuple[Scores, list[tuple[int, str]]]:
    """The scores of a network in eval mode, and (index, reason) of images that could not be read.

    Each process computes a share of each batch; all of them get the scores of all images.
    """
    found: list[tuple[int, Any]] = []
    failed: list[tuple[int, str]] = []
    shares = [share_of(batch, processes.rank, processes.count) for batch in batches]
    for batch in read_ahead(source, shares, None):
        failed += batch.failed
        if not batch.indices:
            continue
        with isolated_torch_state(), autocast():
            predictions = network.predict(batch.to(processes.device).inputs, batch.geometry)
        found += [
            (index, _in_source_pixels(prediction, source, batch, place, make))
            for place, (index, prediction) in enumerate(zip(batch.indices, predictions, strict=True))
        ]
    ordered = sorted(processes.gather(found), key=lambda item: item[0])
    return _scores(make, source, ordered), processes.gather(failed)


def _in_source_pixels(
    prediction: Detections | Tensor, source: Source, batch: Batch, place: int, make: TargetMaker
) -> Any:
    """A prediction as it is scored: detections in the source image, logits, or a confusion matrix of pixels."""
    size, source_size = batch.geometry.sizes[place], batch.source_sizes[place]
    index = batch.indices[place]
    if isinstance(prediction, Detections):
        return to_source(source.names[index], prediction, size, source_size)
    if make.task == "classification":
        return prediction.float().cpu().numpy()
    counts = PixelCounts(len(make.labels.categories))
    labelled = make(source.labels[index], source_size, source_size).semantic
    assert labelled is not None
    counts.add(labelled.numpy(), class_map(prediction, size, source_size))
    return counts


def _scores(make: TargetMaker, source: Source, found: Sequence[tuple[int, Any]]) -> Scores:
    labels = make.labels
    truth = [source.labels[index] for index, _ in found]
    values = [value for _, value in found]
    if labels.task == "detection":
        fitted = [fit_to_image(each, value.size).labels for each, value in zip(truth, values, strict=True)]
        return detection_scores(labels.categories, fitted, values)
    if labels.task == "classification":
        logits = np.stack(values) if values else np.zeros((0, len(labels.categories)), np.float32)
        return classification_scores(labels.categories, truth, logits, multi_label=labels.multi_label)
    total = PixelCounts(len(labels.categories))
    for each in values:
        total.counts += each.counts
        total.images += each.images
    return total.scores(labels.categories)
