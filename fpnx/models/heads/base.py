"""The interface of heads: modules that turn pyramid levels into predictions, and levels with targets into losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.models.necks.base import seeded_generator
from fpnx.models.torch_state import isolated_torch_state

__all__ = ["Detections", "Geometry", "Head", "Prediction", "Pyramid", "Target", "checked_settings", "norm_groups"]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a batch of network inputs, all (height, width) in pixels.

    Attributes:
        padded: of the input tensor, the same for all images of the batch.
        sizes: of each image after resizing, before padding.
    """

    padded: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a head should predict for one image, in pixels of the network's input.

    Attributes:
        boxes: (n, 4) float32, x1, y1, x2, y2.
        labels: (n,) int64, class indices from 0.
        masks: (n, H, W) bool of the padded input's size; None for heads without masks.
        classes: (classes,) float32 of 0 and 1, for classification; None otherwise.
        semantic: (H, W) int64 class indices of the padded input's size, 255 where there is none; None otherwise.
    """

    boxes: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None
    classes: Tensor | None = None
    semantic: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Detections:
    """The objects that a head found in one image, best first, in pixels of the network's input.

    Attributes:
        boxes: (n, 4) float32, x1, y1, x2, y2.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64, class indices from 0.
        proposals: (m, 4) float32 boxes of the region proposal network, best first; None for heads without one.
        levels: (n,) names of the levels that the boxes come from; empty where the head does not say.
        mask_cells: (n, M, M) float32 probabilities of the cells of each box, from which a mask of any size is made;
            None for heads without masks.
        masks_at_centres: whether a pixel's value is that at its centre within the box, as detectron2 and mmdetection
            have it; else cells are resized to whole pixels and pasted, as torchvision does it.
        keypoints: (n, K, 3) float32 x, y, visibility; None for heads without keypoints.
        keypoint_scores: (n, K) float32; None for heads without keypoints.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_cells: Tensor | None = None
    masks_at_centres: bool = False
    keypoints: Tensor | None = None
    keypoint_scores: Tensor | None = None
    proposals: Tensor | None = None
    levels: tuple[str, ...] = ()


GROUPS = 32  # of group norms, where the width is divisible by it

# Of one image: detections; (classes,) float32 logits; or (classes, H, W) float32 logits of the padded input's size.
Prediction: TypeAlias = "Detections | Tensor"


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """What a head is built on.

    Attributes:
        channels: channels of each level, by name, fine to coarse.
        strides: stride of each level, by name.
    """

    channels: Mapping[str, int]
    strides: Mapping[str, int]


class Head(nn.Module):
    """Turns levels `{"P3": (B, C, H, W), ...}` into predictions, or levels and targets into losses.

    A subclass stands in `fpnx.models.heads.registry.HEADS` under its `kind`. Its `state_dict` has the names that
    torchvision's detectors have behind the backbone: `rpn.*`, `roi_heads.*` or `head.*`.

    Args:
        pyramid: the levels that it takes.
        classes: number of classes, background not counted.

    Attributes:
        kind: the name of the head, as `--head` takes it.
        task: `"classification"`, `"detection"` or `"semantic"`.
        summary: what it is, in a few words for lists.
        needs_masks: whether its targets have masks.
        default_levels: the levels that it takes by default, fine to coarse.
        default_top_block: the top block of an FPN below it, where none is asked for; None: the neck's own choice.
        pyramid: the levels that this head takes, with channels and strides.
        levels: their names, fine to coarse.
        classes: number of classes, background not counted.
    """

    kind: ClassVar[str]
    task: ClassVar[str]
    summary: ClassVar[str] = ""
    needs_masks: ClassVar[bool] = False
    default_levels: ClassVar[tuple[str, ...]] = ()
    default_top_block: ClassVar[str | None] = None
    pyramid: Pyramid
    levels: tuple[str, ...]
    classes: int

    def __init__(self, pyramid: Pyramid, classes: int) -> None:
        super().__init__()
        self.pyramid, self.levels, self.classes = pyramid, tuple(pyramid.channels), classes

    @classmethod
    def for_pyramid(cls, pyramid: Pyramid, classes: int, settings: Mapping[str, Any]) -> Head:
        """A head for these levels; `settings` are those that `settings()` of another one returned, or empty.

        Its parameters are drawn from torch's own generator: `create_head` in `fpnx.models.heads.registry` does not.
        """
        raise NotImplementedError

    def initialize(self, seed: int) -> None:
        """Draw all parameters from `seed`, as the modules' own code does; no other random generator is used."""
        with isolated_torch_state(seeded_generator(seed, f"head.{self.kind}").initial_seed()):
            fresh = self.for_pyramid(self.pyramid, self.classes, self.settings())
        self.load_state_dict(fresh.state_dict())

    def settings(self) -> dict[str, Any]:
        """What parameters do not show, as plain values for a saved file; `for_pyramid` takes them."""
        raise NotImplementedError

    def losses(self, levels: Mapping[str, Tensor], geometry: Geometry, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses by name, each a scalar; their sum is minimised. Needs training mode."""
        raise NotImplementedError

    def loss_counts(self, losses: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """What each of the losses of the last call of `losses` is a mean over: its images, unless a head says more.

        Several processes weight their losses by it, so that together they have those of the joint batch.
        """
        return dict.fromkeys(losses, float(images))

    def predict(self, levels: Mapping[str, Tensor], geometry: Geometry) -> list[Prediction]:
        """One prediction for each image. Needs eval mode."""
        raise NotImplementedError


def checked_settings(kind: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with the values in `settings`, for the head `kind`. A default of None stands for a whole number.

    Raises:
        FpnxError: a setting that the head does not have, a value of another type, or a number below 1.
    """
    for name, value in settings.items():
        if name not in defaults:
            known = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise FpnxError(f"head {kind} has no setting {escape(str(name))!r}: {known}")
        default = defaults[name]
        expected = int if default is None else type(default)
        if value is None and default is None:
            continue
        if type(value) is not expected or (expected is int and value < 1):
            wanted = "a whole number from 1 on" if expected is int else "true or false"
            raise FpnxError(f"head {kind}: setting {name} {escape(str(value))[:40]}: take {wanted}")
    return {**defaults, **settings}


def norm_groups(channels: int) -> int:
    """Number of groups of a group norm: 32, or for other widths the largest divisor of 32 with equal groups.

    A group has two channels at least, since a map of one cell would be 0 with one.
    """
    groups = math.gcd(GROUPS, channels)
    return groups if groups < channels else max(1, channels // 2)
