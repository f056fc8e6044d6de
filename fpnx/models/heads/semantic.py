"""Semantic segmentation: the head of panoptic feature pyramids (Kirillov et al. 2019, arXiv 1901.02446)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpnx.models.heads.base import Geometry, Head, Prediction, Pyramid, Target, checked_settings, norm_groups

__all__ = ["SemanticHead"]

FINEST = 4  # stride to which all levels are brought
IGNORED = 255  # the class of pixels without one


class SemanticHead(Head):
    """A class for each pixel, from all levels at stride 4 (section 3.1 of the paper).

    For each level, as often as it takes to come to stride 4 and once at least: 3×3 convolution, group norm, ReLU,
    bilinear upsampling by 2. The sum of all levels goes through a 1×1 convolution to classes, which is upsampled to
    the input. Levels whose strides are not 4 times a power of 2 come to the stride of the finest one. A map of
    odd size is upsampled by 2 and then cut to the size of the finer level, so that cells stay where they are. Keys:
    `head.blocks.{level}.{i}.*` and `head.classifier.*`.

    Args:
        pyramid, classes: as for `Head`.
        channels: of the convolutions.
    """

    kind = "semantic"
    task = "semantic"
    summary = "panoptic FPN's head: all levels at stride 4, summed, a class for each pixel"
    default_levels = ("P2", "P3", "P4", "P5")

    def __init__(self, pyramid: Pyramid, classes: int, *, channels: int = 128) -> None:
        super().__init__(pyramid, classes)
        self.channels = channels
        finest = min(pyramid.strides[name] for name in self.levels)
        is_power = all(math.log2(pyramid.strides[name] / FINEST).is_integer() for name in self.levels)
        self.stride = min(FINEST, finest) if is_power else finest
        self.steps = {name: round(math.log2(pyramid.strides[name] / self.stride)) for name in self.levels}
        self.head = nn.Module()
        self.head.blocks = nn.ModuleDict()
        for name in self.levels:
            inputs = [pyramid.channels[name], *[channels] * (self.steps[name] - 1)]
            self.head.blocks[name] = nn.ModuleList(_block(width, channels) for width in inputs)
        self.head.classifier = nn.Conv2d(channels, classes, 1)

    @classmethod
    def for_pyramid(cls, pyramid: Pyramid, classes: int, settings: Mapping[str, Any]) -> SemanticHead:
        """A head for these levels; setting: `channels`."""
        return cls(pyramid, classes, **checked_settings(cls.kind, settings, {"channels": 128}))

    def settings(self) -> dict[str, Any]:
        """`channels`."""
        return {"channels": self.channels}

    def losses(self, levels: Mapping[str, Tensor], geometry: Geometry, targets: Sequence[Target]) -> dict[str, Tensor]:
        """`{"semantic": loss}`: cross-entropy, the mean over all pixels that have a class; 0 where none has."""
        logits = self._logits(levels, geometry)
        classes = torch.stack([_semantic_of(target) for target in targets]).to(logits.device)
        total = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")
        self._pixels = (classes != IGNORED).sum()
        return {"semantic": total / self._pixels.clamp(min=1)}

    def loss_counts(self, losses: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """The pixels that have a class."""
        return dict.fromkeys(losses, float(self._pixels))

    def predict(self, levels: Mapping[str, Tensor], geometry: Geometry) -> list[Prediction]:
        """(classes, H, W) float32 logits of each image, of the padded input's size."""
        return list(self._logits(levels, geometry).unbind())

    def _logits(self, levels: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        total: Tensor | None = None
        for name in self.levels:
            x, stride = levels[name], self.pyramid.strides[name]
            for block in self.head.blocks[name]:
                factor = 2 if stride > self.stride else 1
                stride //= factor
                x = _upsampled(block(x), factor, _cells(geometry.padded, stride))
            total = x if total is None else total + x
        assert total is not None
        logits: Tensor = self.head.classifier(total)
        return _upsampled(logits.float(), self.stride, geometry.padded)


def _semantic_of(target: Target) -> Tensor:
    assert target.semantic is not None, "a target of semantic segmentation has a class for each pixel"
    return target.semantic


def _block(in_channels: int, channels: int) -> nn.Sequential:
    norm = nn.GroupNorm(norm_groups(channels), channels)
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), norm, nn.ReLU())


def _cells(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width) of a map of this stride."""
    return -(-size[0] // stride), -(-size[1] // stride)


def _upsampled(x: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """A map upsampled bilinearly by `factor` and cut to `size`, or continued to it by its last row and column."""
    if factor > 1:
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    missing = [max(0, wanted - there) for wanted, there in zip(size, x.shape[-2:], strict=True)]
    if any(missing):  # of networks that drop a last odd row
        x = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
    return x[..., : size[0], : size[1]]
