"""The objects found in one image, in pixels of the image itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fpnx.evaluation.coco_library import mask_functions
from fpnx.models.heads.base import Detections

__all__ = ["MaskRuns", "SourceDetections", "to_source"]

MASK_THRESHOLD = 0.5  # of a probability, as with torchvision's Mask R-CNN


class MaskRuns(TypedDict):
    """A mask in COCO's compressed run-length encoding: `size` is [height, width]."""

    size: list[int]
    counts: str


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceDetections:
    """The objects that a head found in one image, best first, in pixels of the upright source image.

    Attributes:
        image: name of the image.
        size: (height, width) of the source image.
        boxes: (n, 4) float64, x1, y1, x2, y2, within the image.
        scores: (n,) float64, 0 to 1.
        classes: (n,) int64 indices of the classes.
        masks: n masks of the source image's size; None for heads without masks.
        proposals: (m, 4) float64 boxes of the region proposal network, best first; None for heads without one.
        levels: (n,) names of the levels that the boxes come from; empty where the head does not say.
    """

    image: str
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: tuple[MaskRuns, ...] | None = None
    proposals: np.ndarray | None = None
    levels: tuple[str, ...] = ()


def to_source(
    image: str, detections: Detections, input_size: tuple[int, int], source_size: tuple[int, int]
) -> SourceDetections:
    """Detections in pixels of the source image. Those with numbers that are not finite are left out.

    Boxes are scaled by the ratios of width and height and clipped to the image. Masks are resized without the padding,
    bilinearly, and cut at 0.5.

    Args:
        image: name of the image.
        detections: in pixels of the network's input.
        input_size: (height, width) of the image after resizing, before padding.
        source_size: (height, width) of the upright source image.

    Raises:
        FpnxError: for masks, where faster-coco-eval is not installed.
    """
    boxes, scores = _array(detections.boxes), _array(detections.scores)
    keep = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    masks = proposals = None
    if detections.masks is not None:
        masks = tuple(_mask_runs(detections.masks[i], input_size, source_size) for i in np.flatnonzero(keep).tolist())
    if detections.proposals is not None:
        proposals = _array(detections.proposals)
        proposals = _scaled(proposals[np.isfinite(proposals).all(axis=1)], input_size, source_size)
    return SourceDetections(
        image=image,
        size=source_size,
        boxes=_scaled(boxes[keep], input_size, source_size),
        scores=scores[keep],
        classes=detections.labels.detach().cpu().numpy().astype(np.int64)[keep],
        masks=masks,
        proposals=proposals,
        levels=tuple(level for level, kept in zip(detections.levels, keep, strict=False) if kept),
    )


def _scaled(boxes: np.ndarray, input_size: tuple[int, int], source_size: tuple[int, int]) -> np.ndarray:
    """Boxes of the network's input → boxes of the source image, clipped to it."""
    (input_height, input_width), (height, width) = input_size, source_size
    ratios = np.array([width / input_width, height / input_height] * 2)
    clipped: np.ndarray = np.clip(boxes * ratios, 0, [width, height, width, height])
    return clipped


def _mask_runs(mask: Tensor, input_size: tuple[int, int], source_size: tuple[int, int]) -> MaskRuns:
    """(H, W) probabilities of the padded input → the mask of the source image."""
    cut = mask[: input_size[0], : input_size[1]].float()[None, None]
    resized = F.interpolate(cut, size=source_size, mode="bilinear", align_corners=False)[0, 0]
    pixels = (resized > MASK_THRESHOLD).to(torch.uint8).cpu().numpy()
    runs = mask_functions().encode(np.asfortranarray(pixels))
    counts = runs["counts"]
    return {"size": list(source_size), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _array(values: Tensor) -> np.ndarray:
    """A tensor as float64 on the host."""
    return values.detach().to("cpu", torch.float64).numpy()
