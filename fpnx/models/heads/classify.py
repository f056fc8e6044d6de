"""Classification of images: the average of each level, joined, and a linear layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpnx.models.heads.base import Geometry, Head, Prediction, Pyramid, Target, checked_settings

__all__ = ["ClassifyHead"]


class ClassifyHead(Head):
    """Classes of an image from the averages of all levels, which are joined in their order.

    The average of a level is that of the cells whose centre lies in the image, so that padding does not count.
    Losses: softmax cross-entropy, or binary cross-entropy where an image may have several classes. Keys: `head.weight`
    and `head.bias`, of a linear layer.

    Args:
        pyramid, classes: as for `Head`.
        multi_label: whether an image may have several classes, or none.
    """

    kind = "classify"
    task = "classification"
    summary = "average of each level, joined, and a linear layer"
    default_levels = ("P2", "P3", "P4", "P5")

    def __init__(self, pyramid: Pyramid, classes: int, *, multi_label: bool = False) -> None:
        super().__init__(pyramid, classes)
        self.multi_label = multi_label
        self.head = nn.Linear(sum(pyramid.channels.values()), classes)

    @classmethod
    def for_pyramid(cls, pyramid: Pyramid, classes: int, settings: Mapping[str, Any]) -> ClassifyHead:
        """A head for these levels; setting: `multi_label`."""
        return cls(pyramid, classes, **checked_settings(cls.kind, settings, {"multi_label": False}))

    def settings(self) -> dict[str, Any]:
        """`multi_label`."""
        return {"multi_label": self.multi_label}

    def losses(self, levels: Mapping[str, Tensor], geometry: Geometry, targets: Sequence[Target]) -> dict[str, Tensor]:
        """`{"classification": loss}`, the mean over images, and for several classes over classes too.

        Each target's `classes` is 1 for the classes of the image; without `multi_label` exactly one is.
        """
        logits = self._logits(levels, geometry)
        wanted = torch.stack([_classes_of(target) for target in targets]).to(logits)
        if self.multi_label:
            return {"classification": F.binary_cross_entropy_with_logits(logits, wanted)}
        return {"classification": F.cross_entropy(logits, wanted.argmax(1))}

    def predict(self, levels: Mapping[str, Tensor], geometry: Geometry) -> list[Prediction]:
        """(classes,) float32 logits of each image: softmax, or with `multi_label` sigmoid, gives probabilities."""
        return list(self._logits(levels, geometry).unbind())

    def _logits(self, levels: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        means = [_mean_of_image(levels[name], self.pyramid.strides[name], geometry.sizes) for name in self.levels]
        logits: Tensor = self.head(torch.cat(means, 1))
        return logits.float()


def _classes_of(target: Target) -> Tensor:
    assert target.classes is not None, "a target of classification has classes"
    return target.classes


def _mean_of_image(level: Tensor, stride: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(B, C) averages of (B, C, H, W) over the cells whose centre lies in the image, and over one at least."""
    means = []
    for cells, (height, width) in zip(level.float().unbind(), sizes, strict=True):
        rows, columns = (max(1, -(-(2 * side - stride) // (2 * stride))) for side in (height, width))
        means.append(cells[:, :rows, :columns].mean((1, 2)))
    return torch.stack(means)
