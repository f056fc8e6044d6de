"""Random changes of training images and their targets: size, crop, flip, colour, by torchvision.transforms.v2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from fpnx.models.heads.base import Target
from fpnx.training.targets import IGNORED

__all__ = ["augmented"]

SIZES = {"classification": (1.0, 1.6), "detection": (0.6, 1.6), "semantic": (0.6, 1.6)}  # relative to the input
COLOUR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}
SMALLEST_BOX = 2.0  # pixels of a side; what a crop leaves of an object may be less, and is left out
GREY = 124  # beside an image that is smaller than the input

Resize = Callable[[tuple[int, int]], np.ndarray]
MakeTarget = Callable[[tuple[int, int]], Target]


def augmented(task: str, size: tuple[int, int], resize: Resize, target_at: MakeTarget) -> tuple[np.ndarray, Target]:
    """A random version of an image, and its target.

    The image is resized to a random multiple of `size`, cropped or padded to it at a random place, flipped in half of
    the cases, and changed in colour. Random numbers are torch's: seed them outside.

    Args:
        task: of the target.
        size: (height, width) of the result.
        resize: gives the pixels (height, width, 3), 0..255, of a size.
        target_at: gives the target for the image of a size.

    Returns:
        (height, width, 3) uint8 pixels, and the target for them.
    """
    least, most = SIZES[task]
    factor = math.exp(math.log(least) + (math.log(most) - math.log(least)) * torch.rand(1).item())
    scaled = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    pixels, target = resize(scaled), target_at(scaled)
    image = tv_tensors.Image(torch.from_numpy(np.array(pixels).round().astype(np.uint8)).permute(2, 0, 1))
    fill = {tv_tensors.Image: GREY, tv_tensors.Mask: 0 if target.semantic is None else IGNORED, "others": 0}
    steps: list[nn.Module] = [
        v2.RandomCrop(size, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(**COLOUR),
    ]
    if target.boxes is not None:
        steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=SMALLEST_BOX)]
    changed, values = v2.Compose(steps)(image, _wrapped(target, scaled))
    return changed.permute(1, 2, 0).contiguous().numpy(), _unwrapped(values, target)


def _wrapped(target: Target, size: tuple[int, int]) -> dict[str, Any]:
    """The parts of a target, as transforms take them; parts that do not depend on places are left out."""
    values: dict[str, Any] = {}
    if target.boxes is not None:
        values["boxes"] = tv_tensors.BoundingBoxes(target.boxes, format="XYXY", canvas_size=size)
        values["labels"] = target.labels
    if target.masks is not None:
        values["masks"] = tv_tensors.Mask(target.masks)
    if target.semantic is not None:
        values["semantic"] = tv_tensors.Mask(target.semantic)
    return values


def _unwrapped(values: dict[str, Any], target: Target) -> Target:
    plain: dict[str, Tensor] = {
        name: value.as_subclass(Tensor) if isinstance(value, tv_tensors.TVTensor) else value
        for name, value in values.items()
    }
    if "boxes" in plain:
        plain["boxes"] = plain["boxes"].reshape(-1, 4)
    return Target(classes=target.classes, **plain)
