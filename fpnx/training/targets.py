"""From labels to targets: boxes, masks and classes in pixels of the network's input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from fpnx.labels.annotations import ImageLabels, LabelSet, Segment, Task
from fpnx.labels.geometry import fit_to_image
from fpnx.labels.segments import scale_segment, segment_mask
from fpnx.labels.semantic import class_map
from fpnx.models.heads.base import Target

__all__ = ["IGNORED", "TargetMaker", "padded_target", "resized_target"]

IGNORED = 255  # class of pixels without a class


@dataclass(frozen=True)
class TargetMaker:
    """Makes targets from labels.

    Attributes:
        labels: names task and classes.
        masks: whether detection needs the outlines.
    """

    labels: LabelSet
    masks: bool = False

    @property
    def task(self) -> Task:
        """What the targets are for."""
        return self.labels.task

    def __call__(self, labels: ImageLabels, source: tuple[int, int], size: tuple[int, int]) -> Target:
        """The target of an image of `source` (height, width) pixels that is resized to `size`, without padding.

        Boxes are clipped to the image; those without area, and crowds, are left out. An object without an outline has
        its box as mask.

        Raises:
            ImageError: a mask that cannot be read, or is of another size than the image.
            FpnxError: outlines need faster-coco-eval, which is not installed.
        """
        if self.task == "classification":
            classes = torch.zeros(len(self.labels.categories))
            classes[torch.from_numpy(labels.classes)] = 1.0
            return Target(classes=classes)
        if self.task == "semantic":
            return Target(semantic=torch.from_numpy(_nearest(class_map(self.labels, labels, source), size)))
        objects = fit_to_image(labels, source).labels
        boxes = np.zeros((0, 4)) if objects.boxes is None else objects.boxes
        factors = size[1] / source[1], size[0] / source[0]
        kept = np.flatnonzero(~objects.crowd) if len(boxes) else np.zeros(0, np.int64)
        boxes = boxes[kept] * np.array([*factors, *factors])
        masks = None
        if self.masks:
            segments = objects.segments or (None,) * len(objects.classes)
            drawn = [_mask(segments[i], box, factors, size) for i, box in zip(kept.tolist(), boxes, strict=True)]
            masks = torch.from_numpy(np.stack(drawn) if drawn else np.zeros((0, *size), bool))
        return Target(
            boxes=torch.from_numpy(boxes.astype(np.float32)),
            labels=torch.from_numpy(objects.classes[kept]),
            masks=masks,
        )


def _mask(segment: Segment | None, box: np.ndarray, factors: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool of an object in an image of `size`."""
    if segment is not None:
        return segment_mask(scale_segment(segment, *factors, size), size)
    mask = np.zeros(size, bool)
    left, top, right, bottom = (round(value) for value in box.tolist())
    mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return mask


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The nearest pixels of a (H, W) map for one of `size`, as int64; centres of pixels are at halves."""
    rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip(size, values.shape, strict=True))
    picked: np.ndarray = values[rows.astype(np.int64)][:, columns.astype(np.int64)].astype(np.int64)
    return picked


def padded_target(target: Target, size: tuple[int, int]) -> Target:
    """A target for the input padded at the bottom and right to `size` (height, width)."""
    changed: dict[str, torch.Tensor] = {}
    for name, value in (("masks", 0), ("semantic", IGNORED)):
        held = getattr(target, name)
        if held is not None:
            height, width = held.shape[-2:]
            changed[name] = F.pad(held, (0, size[1] - width, 0, size[0] - height), value=value)
    return replace(target, **changed)


def resized_target(target: Target, before: tuple[int, int], size: tuple[int, int]) -> Target:
    """A target in pixels of an image of `before` (height, width), for the image resized to `size`."""
    changed: dict[str, torch.Tensor] = {}
    if target.boxes is not None:
        factors = torch.tensor([size[1] / before[1], size[0] / before[0]] * 2)
        changed["boxes"] = target.boxes * factors
    if target.masks is not None:
        masks = [_nearest(mask.numpy(), size) for mask in target.masks]
        changed["masks"] = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size))).bool()
    if target.semantic is not None:
        changed["semantic"] = torch.from_numpy(_nearest(target.semantic.numpy(), size))
    return replace(target, **changed)
