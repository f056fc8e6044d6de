"""The objects found in one image, in pixels of the image itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

from fpnx.core.mask_runs import MaskRuns, encode_mask
from fpnx.models.heads.base import Detections

__all__ = ["MaskRuns", "SourceDetections", "to_source"]

MASK_THRESHOLD = 0.5  # of a probability, as with torchvision's Mask R-CNN
CELL_PADDING = 1  # cells around those of a box, as torchvision pastes them


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
        keypoints: (n, K, 3) float64 x, y, visibility; None for heads without keypoints.
        keypoint_scores: (n, K) float64; None for heads without keypoints.
    """

    image: str
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: tuple[MaskRuns, ...] | None = None
    proposals: np.ndarray | None = None
    levels: tuple[str, ...] = ()
    keypoints: np.ndarray | None = None
    keypoint_scores: np.ndarray | None = None


def to_source(
    image: str, detections: Detections, input_size: tuple[int, int], source_size: tuple[int, int]
) -> SourceDetections:
    """Detections in pixels of the source image. Those with numbers that are not finite are left out.

    Boxes are scaled by the ratios of width and height and clipped to the image. The cells of masks are pasted into the
    scaled boxes as torchvision does it, or sampled at the centres of pixels, and cut at 0.5.

    Args:
        image: name of the image.
        detections: in pixels of the network's input.
        input_size: (height, width) of the image after resizing, before padding.
        source_size: (height, width) of the upright source image.
    """
    boxes, scores = _array(detections.boxes), _array(detections.scores)
    keep = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    masks = proposals = keypoints = keypoint_scores = None
    kept = np.flatnonzero(keep).tolist()
    if detections.mask_cells is not None:
        scaled = torch.from_numpy(_scaled(boxes, input_size, source_size)).float()
        paste = _sampled if detections.masks_at_centres else _pasted
        masks = tuple(paste(detections.mask_cells[i].cpu(), scaled[i], source_size) for i in kept)
    if detections.proposals is not None:
        proposals = _array(detections.proposals)
        proposals = _scaled(proposals[np.isfinite(proposals).all(axis=1)], input_size, source_size)
    if detections.keypoints is not None:
        ratios = (source_size[1] / input_size[1], source_size[0] / input_size[0], 1.0)
        keypoints = _array(detections.keypoints)[keep] * np.array(ratios)
    if detections.keypoint_scores is not None:
        keypoint_scores = _array(detections.keypoint_scores)[keep]
    return SourceDetections(
        image=image,
        size=source_size,
        boxes=_scaled(boxes[keep], input_size, source_size),
        scores=scores[keep],
        classes=detections.labels.detach().cpu().numpy().astype(np.int64)[keep],
        masks=masks,
        proposals=proposals,
        levels=tuple(level for level, taken in zip(detections.levels, keep, strict=False) if taken),
        keypoints=keypoints,
        keypoint_scores=keypoint_scores,
    )


def _scaled(boxes: np.ndarray, input_size: tuple[int, int], source_size: tuple[int, int]) -> np.ndarray:
    """Boxes of the network's input → boxes of the source image, clipped to it."""
    (input_height, input_width), (height, width) = input_size, source_size
    ratios = np.array([width / input_width, height / input_height] * 2)
    clipped: np.ndarray = np.clip(boxes * ratios, 0, [width, height, width, height])
    return clipped


def _pasted(cells: Tensor, box: Tensor, size: tuple[int, int]) -> MaskRuns:
    """(M, M) probabilities of the cells of a box → the mask of an image of `size`, as torchvision pastes it.

    Only the pixels of the box are computed, so that memory does not grow with the image.
    """
    padded, scale = expand_masks(cells.float()[None, None], CELL_PADDING)
    left, top, right, bottom = expand_boxes(box[None], scale)[0].to(torch.int64).tolist()
    height, width = max(bottom - top + 1, 1), max(right - left + 1, 1)
    rows = slice(max(top, 0), min(bottom + 1, size[0]))
    columns = slice(max(left, 0), min(right + 1, size[1]))
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return encode_mask(np.zeros((0, 0), bool), 0, 0, size)
    values = F.interpolate(padded, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    part = values[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return encode_mask((part > MASK_THRESHOLD).numpy(), rows.start, columns.start, size)


def _sampled(cells: Tensor, box: Tensor, size: tuple[int, int]) -> MaskRuns:
    """As `_pasted`, but each pixel has the value of the cells at its centre, interpolated, and 0 outside of them."""
    left, top, right, bottom = box.tolist()
    rows = range(max(math.floor(top) - 1, 0), min(math.ceil(bottom) + 1, size[0]))
    columns = range(max(math.floor(left) - 1, 0), min(math.ceil(right) + 1, size[1]))
    if not (rows and columns and right > left and bottom > top):
        return encode_mask(np.zeros((0, 0), bool), 0, 0, size)
    y = (torch.arange(rows.start, rows.stop) + 0.5 - top) / (bottom - top) * 2 - 1
    x = (torch.arange(columns.start, columns.stop) + 0.5 - left) / (right - left) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)[None]
    values = F.grid_sample(cells.float()[None, None], grid, align_corners=False)[0, 0]
    return encode_mask((values >= MASK_THRESHOLD).numpy(), rows.start, columns.start, size)


def _array(values: Tensor) -> np.ndarray:
    """A tensor as float64 on the host."""
    return values.detach().to("cpu", torch.float64).numpy()
