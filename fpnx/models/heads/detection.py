"""Detection heads: torchvision's own modules and losses, fed with pyramid levels instead of images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet, retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from fpnx.core.errors import FpnxError
from fpnx.core.levels import level_of_stride
from fpnx.models.heads.base import (
    Detections,
    Geometry,
    Head,
    Prediction,
    Pyramid,
    Target,
    checked_settings,
    norm_groups,
)
from fpnx.models.heads.one_stage import anchor_counts, keep_all_candidates, one_stage_detections

__all__ = ["FasterRcnnHead", "FcosHead", "MaskRcnnHead", "RetinaNetHead"]

WIDEST = 256  # channels of torchvision's heads; wider levels are brought to them
PADDING = 32  # torchvision pads images to multiples of this
ASPECT_RATIOS = (0.5, 1.0, 2.0)
ALL_SIDES = (32, 64, 128, 256, 512)  # sides of the anchors of a single level, in pixels: those of five levels
OCTAVE_SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # of RetinaNet's anchors
COARSEST_POOLED = 32  # stride of the coarsest level that boxes are pooled from; the next is for proposals alone
BOX_SIDE, MASK_SIDE = 7, 14  # cells of pooled boxes and masks
BOX_FEATURES = 1024  # width of Faster R-CNN's two layers on pooled boxes
BOX_SAMPLES = 512  # proposals of an image on which these are trained


class _DetectionHead(Head):
    """What all detection heads share: levels of one width, targets in torchvision's form.

    torchvision's heads take levels with equal channels. Where a level has another width than the head, each level goes
    through a 1×1 convolution first (`adapters.{level}.*`), which torchvision's detectors do not have.

    Index 0 of torchvision's classes is the background: a head for n classes has n + 1 there.
    """

    task = "detection"
    score_threshold: float
    nms_threshold: float
    max_detections: int

    def __init__(self, pyramid: Pyramid, classes: int, channels: int | None) -> None:
        super().__init__(pyramid, classes)
        widths = set(pyramid.channels.values())
        self.channels = channels or (min(widths) if len(widths) == 1 and min(widths) <= WIDEST else WIDEST)
        self.strides = [pyramid.strides[name] for name in self.levels]
        self.adapters = nn.ModuleDict()
        if widths != {self.channels}:
            self.adapters.update({n: nn.Conv2d(c, self.channels, 1) for n, c in pyramid.channels.items()})

    def _features(self, levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The levels at the head's width."""
        taken = {name: levels[name] for name in self.levels}
        return {name: self.adapters[name](x) for name, x in taken.items()} if self.adapters else taken

    def _backbone(self) -> nn.Module:
        """What torchvision's detectors ask of a backbone: the number of its channels."""
        backbone = nn.Identity()
        backbone.out_channels = self.channels
        return backbone


class _OneStageHead(_DetectionHead):
    """FCOS and RetinaNet: torchvision's detector gives anchors, losses and candidates; `head` has the parameters."""

    head: nn.Module

    def __init__(self, pyramid: Pyramid, classes: int, channels: int | None, convolutions: int) -> None:
        super().__init__(pyramid, classes, channels)
        self.convolutions = convolutions

    @classmethod
    def for_pyramid(cls, pyramid: Pyramid, classes: int, settings: Mapping[str, Any]) -> Head:
        """A head for these levels; settings: `channels` and `convolutions`."""
        return cls(pyramid, classes, **checked_settings(cls.kind, settings, {"channels": None, "convolutions": 4}))

    def settings(self) -> dict[str, Any]:
        """`channels` and `convolutions`."""
        return {"channels": self.channels, "convolutions": self.convolutions}

    def losses(self, levels: Mapping[str, Tensor], geometry: Geometry, targets: Sequence[Target]) -> dict[str, Tensor]:
        """torchvision's losses: `classification`, `bbox_regression`, and with FCOS `bbox_ctrness`."""
        outputs, anchors, counts = self._outputs(levels, geometry)
        device = anchors[0].device
        with _float32(device):
            prepared = [_in_torchvisions_form(target, device) for target in targets]
            return self._losses(prepared, outputs, anchors, counts)

    def predict(self, levels: Mapping[str, Tensor], geometry: Geometry) -> list[Prediction]:
        """Detections of each image, each with the level of its location or anchor."""
        outputs, anchors, counts = self._outputs(levels, geometry)
        outputs["cls_logits"][..., 0] = -math.inf  # the background, which is no class
        (detector,) = self._detector
        detector.score_thresh = self.score_threshold
        limits = self.nms_threshold, self.max_detections
        with _float32(anchors[0].device):
            found = one_stage_detections(detector, outputs, anchors, counts, geometry.sizes, self.levels, limits)
        return [replace(each, labels=each.labels - 1) for each in found]

    def _outputs(
        self, levels: Mapping[str, Tensor], geometry: Geometry
    ) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """The head's outputs in float32, the anchors of each image, and the number of anchors of each level."""
        features = list(self._features(levels).values())
        outputs = {name: value.float() for name, value in self.head(features).items()}
        (detector,) = self._detector
        anchors = detector.anchor_generator(_image_list(geometry, features[0].device), features)
        return outputs, anchors, anchor_counts(detector, features)

    def _keep(self, detector: nn.Module) -> None:
        """Keep torchvision's detector, with its defaults, out of the modules of this one: it has `head` again."""
        self.score_threshold = detector.score_thresh
        self.nms_threshold, self.max_detections = keep_all_candidates(detector)
        self._detector = (detector,)

    def _losses(
        self, targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: list[Tensor], counts: list[int]
    ) -> dict[str, Tensor]:
        raise NotImplementedError


class FcosHead(_OneStageHead):
    """FCOS (Tian et al. 2019, arXiv 1904.01355), as torchvision has it: no anchors, a box for each location.

    Each level is responsible for boxes by their size in its strides. Where strides do not double from level to level,
    the finer level takes the boxes of the ones that are missing; a single level takes all. Keys: those of torchvision's
    FCOS behind its backbone, `head.classification_head.*` and `head.regression_head.*`. Group norms have 32 groups
    where the width is divisible by 32 and larger, as torchvision's.

    Args:
        pyramid, classes: as for `Head`.
        channels: width of the head; None: that of the levels where all have the same and at most 256, else 256.
        convolutions: before the last, in both parts.

    Attributes:
        score_threshold, nms_threshold, max_detections: of `predict`: least score, largest overlap (IoU) of two boxes of
            a class, most boxes of an image.
    """

    kind = "fcos"
    summary = "FCOS: no anchors, a box for each location"
    default_levels = ("P3", "P4", "P5", "P6", "P7")
    default_top_block = "p5"

    def __init__(self, pyramid: Pyramid, classes: int, *, channels: int | None = None, convolutions: int = 4) -> None:
        super().__init__(pyramid, classes, channels, convolutions)
        arguments = {"num_convs": convolutions, "norm_layer": partial(nn.GroupNorm, norm_groups(self.channels))}
        self.head = _FcosHead(WIDEST, 1, classes + 1, num_convs=0)
        self.head.classification_head = FCOSClassificationHead(self.channels, 1, classes + 1, **arguments)
        self.head.regression_head = FCOSRegressionHead(self.channels, 1, **arguments)
        sides = _contiguous(self.strides)
        anchors = _Anchors([(side,) for side in sides], [(1.0,)] * len(sides), self.strides)
        self._keep(FCOS(self._backbone(), classes + 1, anchor_generator=anchors, head=self.head))

    def loss_counts(self, losses: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """The locations within objects, over which torchvision's FCOS takes the mean of each loss."""
        return dict.fromkeys(losses, float(self.head.locations))

    def _losses(
        self, targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: list[Tensor], counts: list[int]
    ) -> dict[str, Tensor]:
        (detector,) = self._detector
        losses: dict[str, Tensor] = detector.compute_loss(targets, outputs, anchors, counts)
        return losses


class RetinaNetHead(_OneStageHead):
    """RetinaNet (Lin et al. 2017, arXiv 1708.02002), as torchvision has it: nine anchors for each location.

    Anchors have sides of 4 strides, at 3 scales within an octave and 3 aspect ratios. A single level has the anchors of
    five. Keys: those of torchvision's RetinaNet behind its backbone, `head.classification_head.*` and
    `head.regression_head.*`.

    Args:
        pyramid, classes: as for `Head`.
        channels: width of the head; None: that of the levels where all have the same and at most 256, else 256.
        convolutions: before the last, in both parts, at most 4.

    Attributes:
        score_threshold, nms_threshold, max_detections: as for `FcosHead`.
    """

    kind = "retinanet"
    summary = "RetinaNet: nine anchors for each location"
    default_levels = ("P3", "P4", "P5", "P6", "P7")
    default_top_block = "p5"

    def __init__(self, pyramid: Pyramid, classes: int, *, channels: int | None = None, convolutions: int = 4) -> None:
        super().__init__(pyramid, classes, channels, convolutions)
        sides = [ALL_SIDES] if len(self.levels) == 1 else [(4 * stride,) for stride in self.strides]
        sizes = [tuple(int(side * scale) for side in each for scale in OCTAVE_SCALES) for each in sides]
        anchors = _Anchors(sizes, [ASPECT_RATIOS] * len(sizes), self.strides)
        self.head = retinanet.RetinaNetHead(self.channels, anchors.num_anchors_per_location()[0], classes + 1)
        for part in (self.head.classification_head, self.head.regression_head):
            if convolutions > len(part.conv):
                raise FpnxError(f"head retinanet: setting convolutions {convolutions}: it has at most {len(part.conv)}")
            part.conv = part.conv[:convolutions]
        self._keep(RetinaNet(self._backbone(), classes + 1, anchor_generator=anchors, head=self.head))

    def _losses(
        self, targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: list[Tensor], counts: list[int]
    ) -> dict[str, Tensor]:
        (detector,) = self._detector
        losses: dict[str, Tensor] = detector.compute_loss(targets, outputs, anchors)
        return losses


class FasterRcnnHead(_DetectionHead):
    """Faster R-CNN (Ren et al. 2015, arXiv 1506.01497) on a pyramid (arXiv 1612.03144), as torchvision has it.

    A region proposal network takes all levels, with anchors of 8 strides and 3 aspect ratios; a single level has the
    anchors of five. Boxes are pooled from the level that Eq. 1 of the FPN paper names, among those with strides up to
    32. Keys: those of torchvision's Faster R-CNN behind its backbone, `rpn.*` and `roi_heads.*`.

    Which anchors and proposals are trained on is drawn from torch's random generator.

    Args:
        pyramid, classes: as for `Head`.
        channels: width of the levels; None: their own where all have the same and at most 256, else 256.
        box_features: width of the two layers on pooled boxes.
        box_samples: proposals of an image on which these layers are trained, a quarter of them objects.

    Attributes:
        score_threshold, nms_threshold, max_detections: as for `FcosHead`.
    """

    kind = "faster_rcnn"
    summary = "Faster R-CNN: proposals, then a class and a box for each"
    default_levels = ("P2", "P3", "P4", "P5", "P6")
    default_top_block = "pool"

    def __init__(
        self,
        pyramid: Pyramid,
        classes: int,
        *,
        channels: int | None = None,
        box_features: int = BOX_FEATURES,
        box_samples: int = BOX_SAMPLES,
    ) -> None:
        super().__init__(pyramid, classes, channels)
        self.box_features, self.box_samples = box_features, box_samples
        sides = [ALL_SIDES] if len(self.levels) == 1 else [(8 * stride,) for stride in self.strides]
        anchors = _Anchors(sides, [ASPECT_RATIOS] * len(sides), self.strides)
        strides = {name: s for name, s in pyramid.strides.items() if name in self.levels and s <= COARSEST_POOLED}
        self._pooled = strides or {self.levels[0]: self.strides[0]}
        detector = self._build(
            self._backbone(),
            rpn_anchor_generator=anchors,
            rpn_head=_RpnHead(self.channels, anchors.num_anchors_per_location()[0]),
            box_roi_pool=_roi_pool(self._pooled, BOX_SIDE),
            box_head=TwoMLPHead(self.channels * BOX_SIDE**2, box_features),
            box_predictor=_BoxPredictor(box_features, classes + 1),
            box_batch_size_per_image=box_samples,
        )
        self.rpn, self.roi_heads = detector.rpn, detector.roi_heads

    @classmethod
    def for_pyramid(cls, pyramid: Pyramid, classes: int, settings: Mapping[str, Any]) -> FasterRcnnHead:
        """A head for these levels; settings: `channels`, `box_features` and `box_samples`."""
        defaults = {"channels": None, "box_features": BOX_FEATURES, "box_samples": BOX_SAMPLES}
        return cls(pyramid, classes, **checked_settings(cls.kind, settings, defaults))

    def settings(self) -> dict[str, Any]:
        """`channels`, `box_features` and `box_samples`."""
        return {"channels": self.channels, "box_features": self.box_features, "box_samples": self.box_samples}

    @property
    def score_threshold(self) -> float:
        return float(self.roi_heads.score_thresh)

    @score_threshold.setter
    def score_threshold(self, value: float) -> None:
        self.roi_heads.score_thresh = value

    @property
    def nms_threshold(self) -> float:
        return float(self.roi_heads.nms_thresh)

    @nms_threshold.setter
    def nms_threshold(self, value: float) -> None:
        self.roi_heads.nms_thresh = value

    @property
    def max_detections(self) -> int:
        return int(self.roi_heads.detections_per_img)

    @max_detections.setter
    def max_detections(self, value: int) -> None:
        self.roi_heads.detections_per_img = value

    def losses(self, levels: Mapping[str, Tensor], geometry: Geometry, targets: Sequence[Target]) -> dict[str, Tensor]:
        """torchvision's losses: `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`, `loss_box_reg`."""
        features = self._features(levels)
        device = next(iter(features.values())).device
        prepared = [_in_torchvisions_form(target, device) for target in targets]
        for target in prepared if self.needs_masks else ():
            if not len(target["boxes"]):
                target.setdefault("masks", torch.zeros(0, *geometry.padded, dtype=torch.bool, device=device))
        proposals, of_proposals = self.rpn(_image_list(geometry, device), features, prepared)
        _, of_boxes = self.roi_heads(_in_float32(features), proposals, list(geometry.sizes), prepared)
        return {**of_proposals, **of_boxes}

    def predict(self, levels: Mapping[str, Tensor], geometry: Geometry) -> list[Prediction]:
        """Detections and proposals of each image; each box with the level that Eq. 1 names for its size."""
        features = self._features(levels)
        proposals, _ = self.rpn(_image_list(geometry, next(iter(features.values())).device), features)
        found, _ = self.roi_heads(_in_float32(features), proposals, list(geometry.sizes))
        return [self._detections(each, boxes) for each, boxes in zip(found, proposals, strict=True)]

    def _detections(self, found: Mapping[str, Tensor], proposals: Tensor) -> Detections:
        places = self.roi_heads.box_roi_pool.map_levels([found["boxes"]]).tolist()
        names = list(self._pooled)
        return Detections(
            boxes=found["boxes"],
            scores=found["scores"],
            labels=found["labels"] - 1,
            mask_cells=found["masks"][:, 0] if "masks" in found else None,
            proposals=proposals,
            levels=tuple(names[i] for i in places),
        )

    def _build(self, *arguments: Any, **options: Any) -> nn.Module:
        """torchvision's detector."""
        return FasterRCNN(*arguments, **options)


class MaskRcnnHead(FasterRcnnHead):
    """Mask R-CNN (He et al. 2017, arXiv 1703.06870), as torchvision has it: Faster R-CNN with a mask for each box.

    Losses are those of Faster R-CNN and `loss_mask`. Keys: those of torchvision's Mask R-CNN behind its backbone.

    Args:
        pyramid, classes, channels, box_features, box_samples: as for `FasterRcnnHead`.
    """

    kind = "mask_rcnn"
    summary = "Mask R-CNN: Faster R-CNN with a mask for each box"
    needs_masks = True

    def _build(self, *arguments: Any, **options: Any) -> nn.Module:
        return MaskRCNN(
            *arguments,
            **options,
            mask_roi_pool=_roi_pool(self._pooled, MASK_SIDE),
            mask_predictor=_MaskPredictor(256, 256, self.classes + 1),
        )


class _FcosHead(FCOSHead):
    """torchvision's, which notes how many locations are within objects."""

    locations = 0

    def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]) -> Any:
        self.locations = int(sum((each >= 0).sum() for each in matched_idxs))
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)


class _Anchors(AnchorGenerator):
    """torchvision's anchors, at the strides of the levels, in float32 whatever the levels are computed in.

    torchvision takes the input's side divided by the level's cells for the stride. For inputs in multiples of 32, which
    its detectors pad to, that is the true one up to stride 32, and what its weights are trained with above. For other
    inputs it would be wrong.
    """

    def __init__(self, sides: Sequence[Sequence[float]], ratios: Sequence[Sequence[float]], strides: Sequence[int]):
        super().__init__(tuple(map(tuple, sides)), tuple(map(tuple, ratios)))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        size = image_list.tensors.shape[-2:]
        grids = [level.shape[-2:] for level in feature_maps]
        steps = [
            tuple(_step(side, cells, stride) for side, cells in zip(size, grid, strict=True))
            for grid, stride in zip(grids, self.strides, strict=True)
        ]
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors(grids, steps))
        return [anchors for _ in image_list.image_sizes]


def _step(side: int, cells: int, stride: int) -> int:
    """Pixels from one anchor to the next along a side of the input."""
    if stride <= PADDING or stride & (stride - 1):
        return stride
    return (-(-side // PADDING) * PADDING) // cells


def _contiguous(strides: Sequence[int]) -> list[float]:
    """Sides of FCOS's locations, fine to coarse: the strides, or half the next side where strides more than double."""
    sides: list[float] = []
    for stride in reversed(strides):
        sides.insert(0, max(stride, sides[0] / 2) if sides else stride)
    return sides


class _LevelMapper(LevelMapper):
    """Eq. 1 of the FPN paper for levels that need not be contiguous: a missing one is replaced by the next finer."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__(numbers[0], numbers[-1])
        every = range(numbers[0], numbers[-1] + 1)
        self.places = [max(i for i, there in enumerate(numbers) if there <= k) for k in every]

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        found: Tensor = super().__call__(boxlists)
        return torch.tensor(self.places, device=found.device)[found]


def _roi_pool(strides: Mapping[str, int], side: int) -> MultiScaleRoIAlign:
    """Pooling from levels of these strides to side × side cells; torchvision would guess strides from sizes."""
    pool = MultiScaleRoIAlign(list(strides), side, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides.values()]
    pool.map_levels = _LevelMapper([level_of_stride(stride) for stride in strides.values()])
    return pool


# Boxes are decoded from these outputs, which half precision is too coarse for.
class _RpnHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [each.float() for each in objectness], [each.float() for each in deltas]


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class _MaskPredictor(MaskRCNNPredictor):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)
        return logits.float()


def _in_float32(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: level.float() for name, level in features.items()}


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Without automatic mixed precision."""
    with torch.autocast(device.type, enabled=False):
        yield


def _image_list(geometry: Geometry, device: torch.device) -> ImageList:
    """The images as torchvision's modules ask for them: they only look at sizes."""
    tensors = torch.zeros((), device=device).expand(len(geometry.sizes), 3, *geometry.padded)
    return ImageList(tensors, list(geometry.sizes))


def _in_torchvisions_form(target: Target, device: torch.device) -> dict[str, Tensor]:
    """A target as torchvision's modules take it: classes from 1 on, and no boxes without area."""
    boxes = torch.zeros(0, 4) if target.boxes is None else target.boxes
    labels = torch.zeros(0, dtype=torch.int64) if target.labels is None else target.labels
    boxes = boxes.to(device, torch.float32).reshape(-1, 4)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    prepared = {"boxes": boxes[kept], "labels": labels.to(device)[kept] + 1}
    if target.masks is not None:
        prepared["masks"] = target.masks.to(device)[kept]
    return prepared
