"""The detections of torchvision's RetinaNet and FCOS from the outputs of their heads, each with its level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from fpnx.models.heads.base import Detections

__all__ = ["anchor_counts", "keep_all_candidates", "one_stage_detections"]


def keep_all_candidates(detector: Any) -> tuple[float, int]:
    """Make `postprocess_detections` give all candidates of a level: overlaps are removed when all levels are joined.

    Returns:
        The detector's largest overlap (IoU), and its number of boxes of an image.
    """
    limits = float(detector.nms_thresh), int(detector.detections_per_img)
    detector.nms_thresh, detector.detections_per_img = math.inf, None
    return limits


def anchor_counts(detector: Any, features: Sequence[Tensor]) -> list[int]:
    """Number of anchors, or locations, of each level."""
    per_cell = detector.anchor_generator.num_anchors_per_location()
    return [n * level.shape[-2] * level.shape[-1] for n, level in zip(per_cell, features, strict=True)]


def one_stage_detections(
    detector: Any,
    outputs: Mapping[str, Tensor],
    anchors: Sequence[Tensor],
    counts: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    levels: Sequence[str],
    limits: tuple[float, int],
) -> list[Detections]:
    """What `detector.postprocess_detections` gives for all levels, with the level of each box.

    Args:
        detector: a `RetinaNet` or `FCOS` of torchvision, after `keep_all_candidates`.
        outputs: of its head, (B, anchors of all levels, …) by name.
        anchors: of each image, (anchors of all levels, 4).
        counts: number of anchors of each level, see `anchor_counts`.
        sizes: (height, width) of each image.
        levels: their names.
        limits: the largest overlap, and the number of boxes of an image.
    """
    values = {name: value.split(list(counts), 1) for name, value in outputs.items()}
    boxes = [each.split(list(counts)) for each in anchors]
    candidates: list[list[dict[str, Tensor]]] = [
        detector.postprocess_detections(
            {name: [each[i]] for name, each in values.items()}, [[each[i]] for each in boxes], list(sizes)
        )
        for i in range(len(levels))
    ]
    return [_best([level[i] for level in candidates], levels, limits) for i in range(len(sizes))]


def _best(candidates: Sequence[Mapping[str, Tensor]], levels: Sequence[str], limits: tuple[float, int]) -> Detections:
    """The best of the candidates of all levels of an image, after non-maximum suppression over all levels."""
    overlap, most = limits
    boxes, scores, labels = (torch.cat([each[name] for each in candidates]) for name in ("boxes", "scores", "labels"))
    names = [name for name, each in zip(levels, candidates, strict=True) for _ in each["scores"]]
    keep = batched_nms(boxes, scores, labels, overlap)[:most]
    return Detections(
        boxes=boxes[keep], scores=scores[keep], labels=labels[keep], levels=tuple(names[i] for i in keep.tolist())
    )
