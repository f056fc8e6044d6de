"""Scores of semantic segmentation: mean intersection over union, and the share of pixels that are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fpnx.evaluation.scores import ClassRow, Scores, finite_mean, share
from fpnx.labels.annotations import Category

__all__ = ["PixelCounts", "class_map"]


class PixelCounts:
    """A confusion matrix of pixels, which adds up over images.

    Attributes:
        counts: (labelled, predicted) int64 numbers of pixels.
        images: how many images were added.
    """

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, classes), np.int64)
        self.images = 0

    def add(self, labelled: np.ndarray, predicted: np.ndarray) -> None:
        """Add one image. Pixels labelled with no class, such as 255, are left out.

        Args:
            labelled, predicted: (H, W) indices of classes.
        """
        if labelled.shape != predicted.shape:
            raise ValueError(f"labels of {labelled.shape} pixels, predictions of {predicted.shape}")
        classes = len(self.counts)
        known = labelled < classes
        pairs = labelled[known].astype(np.int64) * classes + predicted[known]
        self.counts += np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
        self.images += 1

    def scores(self, categories: Sequence[Category]) -> Scores:
        """`mIoU`, the main score, `pixel_accuracy`, and of each class IoU and recall.

        The IoU of a class is its right pixels over all that are labelled or predicted as such. A class that is neither
        labelled nor predicted anywhere has none, and does not count in the mean.
        """
        right, labelled, predicted = self.counts.diagonal(), self.counts.sum(axis=1), self.counts.sum(axis=0)
        rows = tuple(
            ClassRow(
                category.id,
                category.name,
                int(labelled[i]),
                {
                    "IoU": share(right[i], labelled[i] + predicted[i] - right[i]),
                    "recall": share(right[i], labelled[i]),
                },
            )
            for i, category in enumerate(categories)
        )
        return Scores(
            task="semantic",
            main="mIoU",
            images=self.images,
            values={
                "mIoU": finite_mean([row.values["IoU"] for row in rows]),
                "pixel_accuracy": share(right.sum(), labelled.sum()),
            },
            classes=rows,
            counted="pixels",
        )


def class_map(logits: Tensor, input_size: tuple[int, int], source_size: tuple[int, int]) -> np.ndarray:
    """(H, W) int64, the class of each pixel of the source image.

    Logits are resized without the padding, bilinearly; one class after the other, to hold two maps of the source
    image's size and no more. The first of equal classes is taken.

    Args:
        logits: (classes, H, W) of the padded input's size.
        input_size: (height, width) of the image after resizing, before padding.
        source_size: (height, width) of the upright source image.
    """
    cut = logits[:, : input_size[0], : input_size[1]].detach().float()
    best = torch.full(source_size, -torch.inf, device=cut.device)
    classes = torch.zeros(source_size, dtype=torch.int64, device=cut.device)
    for i, values in enumerate(cut):
        resized = F.interpolate(values[None, None], size=source_size, mode="bilinear", align_corners=False)[0, 0]
        better = resized > best
        best = torch.where(better, resized, best)
        classes[better] = i
    found: np.ndarray = classes.cpu().numpy()
    return found
