"""The head of a published detector: torchvision's own modules, built as the names and shapes of parameters say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from fpnx.core.errors import FpnxError
from fpnx.core.levels import level_of_stride
from fpnx.models.heads.base import Detections, Geometry, Head, Prediction, Pyramid
from fpnx.models.heads.one_stage import anchor_counts, keep_all_candidates, one_stage_detections
from fpnx.models.torch_state import isolated_torch_state, on_meta_device

__all__ = ["DetectorHead", "detector_head", "has_detector_head"]

RATIOS = (0.5, 1.0, 2.0)
SIDES = (32, 64, 128, 256, 512)  # of anchors, in pixels
GROUPS = 32
BOX_SIDE, MASK_SIDE, KEYPOINT_SIDE = 7, 14, 14  # cells of pooled boxes
# Detectors whose proposals are not those of torchvision's defaults.
PROPOSALS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        "rpn_pre_nms_top_n_test": 150,
        "rpn_post_nms_top_n_test": 150,
        "rpn_score_thresh": 0.05,
    },
    "fasterrcnn_mobilenet_v3_large_fpn": {"rpn_score_thresh": 0.05},
}


class DetectorHead(Head):
    """All of one of torchvision's detectors but its backbone: what it finds is what torchvision's detector finds.

    For prediction only; `detector_head` makes it. Labels are torchvision's: index 0 is the background.

    Args:
        pyramid: the levels that it takes.
        classes: number of classes, background counted.
        network: a `FasterRCNN`, `RetinaNet` or `FCOS` of torchvision; its backbone is not used.

    Attributes:
        score_threshold, max_detections: least score, and most boxes of an image.
    """

    kind = "detector"
    task = "detection"
    summary = "a published detector's head"

    def __init__(self, pyramid: Pyramid, classes: int, network: nn.Module) -> None:
        super().__init__(pyramid, classes)
        self.network = network
        self._limits: Any = network.roi_heads if isinstance(network, FasterRCNN) else network
        self._overlap, self._most = (0.0, 0) if isinstance(network, FasterRCNN) else keep_all_candidates(network)

    @property
    def score_threshold(self) -> float:
        """Boxes with a lower score, or the same, are left out."""
        return float(self._limits.score_thresh)

    @score_threshold.setter
    def score_threshold(self, value: float) -> None:
        self._limits.score_thresh = value

    @property
    def max_detections(self) -> int:
        """At most so many boxes of an image."""
        return self._most or int(self._limits.detections_per_img)

    @max_detections.setter
    def max_detections(self, value: int) -> None:
        if self._most:
            self._most = value
        else:
            self._limits.detections_per_img = value

    def predict(self, levels: Mapping[str, Tensor], geometry: Geometry) -> list[Prediction]:
        """The detections of each image, each with the level of its anchor, or that it is pooled from."""
        features = {name: levels[name].float() for name in self.levels}
        # Only the shape of the images is read.
        images = ImageList(torch.empty((len(geometry.sizes), 3, *geometry.padded), device="meta"), list(geometry.sizes))
        network: Any = self.network
        if not isinstance(network, FasterRCNN):
            return list(self._one_stage(images, list(features.values())))
        proposals, _ = network.rpn(images, features)
        found, _ = network.roi_heads(features, proposals, images.image_sizes)
        return [self._two_stage(each, boxes) for each, boxes in zip(found, proposals, strict=True)]

    def _one_stage(self, images: ImageList, features: list[Tensor]) -> list[Detections]:
        """What RetinaNet and FCOS do behind their backbone."""
        network: Any = self.network
        outputs, anchors = network.head(features), network.anchor_generator(images, features)
        counts = anchor_counts(network, features)
        limits = self._overlap, self._most
        return one_stage_detections(network, outputs, anchors, counts, images.image_sizes, self.levels, limits)

    def _two_stage(self, found: Mapping[str, Tensor], proposals: Tensor) -> Detections:
        """What Faster, Mask or Keypoint R-CNN finds in an image, with the level by Eq. 1 for each box."""
        network: Any = self.network
        places = network.roi_heads.box_roi_pool.map_levels([found["boxes"]]).tolist()
        cells = found.get("masks")
        return Detections(
            boxes=found["boxes"],
            scores=found["scores"],
            labels=found["labels"],
            mask_cells=None if cells is None else cells[:, 0],
            keypoints=found.get("keypoints"),
            keypoint_scores=found.get("keypoints_scores"),
            proposals=proposals,
            levels=tuple(self.levels[i] for i in places),
        )


def has_detector_head(names: Iterable[str]) -> bool:
    """Whether parameters of these names are those of a torchvision detector's head."""
    return any(name.startswith(("roi_heads.box_predictor.", "head.classification_head.")) for name in names)


def detector_head(state: Mapping[str, Tensor], pyramid: Pyramid, detector: str | None = None) -> DetectorHead:
    """A head with the parameters of one of torchvision's detectors, in eval mode on the CPU.

    Depth, widths, norms and classes are read from the parameters. What they do not show is as in torchvision's own
    functions: anchors, thresholds, numbers of proposals.

    Args:
        state: the parameters without those of the backbone: `rpn.*` and `roi_heads.*`, or `head.*`. Other names, and
            those of old versions of torchvision, are allowed.
        pyramid: the levels, fine to coarse.
        detector: name of torchvision's function, where it is known.

    Raises:
        FpnxError: they are of no such detector, or of one with other anchors or shapes.
    """
    state = {name: value for name, value in state.items() if name.startswith(("rpn.", "roi_heads.", "head."))}
    with on_meta_device():  # parameters need not be drawn
        if "roi_heads.box_predictor.cls_score.weight" in state:
            network, classes = _two_stage(state, pyramid, PROPOSALS.get(detector or "", {}))
        elif "head.regression_head.bbox_ctrness.weight" in state:
            network, classes = _fcos(state, pyramid)
        elif "head.classification_head.cls_logits.weight" in state:
            network, classes = _retinanet(state, pyramid)
        else:
            raise FpnxError("it has no head of torchvision's Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS")
    network.to_empty(device="cpu")
    try:
        missing, unexpected = network.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[-1].split())
        raise FpnxError(f"its head is not built as torchvision's: {reason}") from error
    names = [name for name in (*missing, *unexpected) if not name.endswith("num_batches_tracked")]
    if names:
        first = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        raise FpnxError(f"its head is not built as torchvision's: {len(names)} names do not fit ({first})")
    return DetectorHead(pyramid, classes, network).eval()


class _Levels(nn.Module):
    """Stands where torchvision's detectors have a backbone, which they ask for the number of its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


def _two_stage(state: Mapping[str, Tensor], pyramid: Pyramid, options: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Faster, Mask or Keypoint R-CNN, and its number of classes."""
    channels, levels = _width(pyramid), list(pyramid.channels)
    per_cell = state["rpn.head.cls_logits.weight"].shape[0]
    if per_cell == len(RATIOS) and len(levels) == len(SIDES):
        sides: tuple[tuple[int, ...], ...] = tuple((side,) for side in SIDES)
    elif per_cell == len(RATIOS) * len(SIDES):  # as with MobileNetV3
        sides = (SIDES,) * len(levels)
    else:
        raise FpnxError(
            f"its {per_cell} anchors a cell on {len(levels)} levels are not those of torchvision's detectors (3 on 5 "
            "levels, or 15), and their sides are not in the file"
        )
    classes, width = state["roi_heads.box_predictor.cls_score.weight"].shape
    network = FasterRCNN(
        _Levels(channels),
        rpn_anchor_generator=_anchors(sides, RATIOS),
        rpn_head=RPNHead(channels, per_cell, conv_depth=max(1, _count(state, r"rpn\.head\.conv\.(\d+)\.0\.weight"))),
        box_roi_pool=_pool(pyramid, BOX_SIDE),
        box_head=_box_head(state, channels, width),
        box_predictor=FastRCNNPredictor(width, classes),
        **options,
    )
    heads: Any = network.roi_heads
    if "roi_heads.mask_predictor.mask_fcn_logits.weight" in state:
        inputs, hidden = state["roi_heads.mask_predictor.conv5_mask.weight"].shape[:2]
        norm = nn.BatchNorm2d if "roi_heads.mask_head.0.1.weight" in state else None
        depth = _count(state, r"roi_heads\.mask_head\.(?:(\d+)\.0|mask_fcn(\d+))\.weight")
        heads.mask_roi_pool = _pool(pyramid, MASK_SIDE)
        heads.mask_head = MaskRCNNHeads(channels, [inputs] * depth, 1, norm_layer=norm)
        heads.mask_predictor = MaskRCNNPredictor(inputs, hidden, classes)
    if "roi_heads.keypoint_predictor.kps_score_lowres.weight" in state:
        inputs, keypoints = state["roi_heads.keypoint_predictor.kps_score_lowres.weight"].shape[:2]
        depth = _count(state, r"roi_heads\.keypoint_head\.(\d+)\.weight")
        heads.keypoint_roi_pool = _pool(pyramid, KEYPOINT_SIDE)
        heads.keypoint_head = KeypointRCNNHeads(channels, [inputs] * depth)
        heads.keypoint_predictor = KeypointRCNNPredictor(inputs, keypoints)
    return network, classes


def _box_head(state: Mapping[str, Tensor], channels: int, width: int) -> nn.Module:
    """The layers between pooled boxes and their classes."""
    if "roi_heads.box_head.fc6.weight" in state:
        return TwoMLPHead(channels * BOX_SIDE**2, width)
    convolutions = [
        value.shape[0] for name, value in state.items() if re.fullmatch(r"roi_heads\.box_head\.\d+\.0\.weight", name)
    ]
    linear = [
        value.shape[0] for name, value in state.items() if re.fullmatch(r"roi_heads\.box_head\.\d+\.weight", name)
    ]
    norm = nn.BatchNorm2d if "roi_heads.box_head.0.1.weight" in state else None
    if not linear:
        raise FpnxError("its head is not built as torchvision's: roi_heads.box_head has no linear layer")
    return FastRCNNConvFCHead((channels, BOX_SIDE, BOX_SIDE), convolutions, linear, norm_layer=norm)


def _retinanet(state: Mapping[str, Tensor], pyramid: Pyramid) -> tuple[nn.Module, int]:
    sides = tuple(tuple(int(side * 2 ** (i / 3)) for i in range(3)) for side in SIDES)
    _check_levels(pyramid, len(sides))
    anchors = _anchors(sides, RATIOS)
    per_cell, channels = anchors.num_anchors_per_location()[0], _width(pyramid)
    outputs, coordinates = (
        state[f"head.{part}.weight"].shape[0] for part in ("classification_head.cls_logits", "regression_head.bbox_reg")
    )
    if coordinates != 4 * per_cell:
        raise FpnxError(
            f"its {coordinates // 4} anchors a cell are not the {per_cell} of torchvision's RetinaNet, and their sides "
            "are not in the file"
        )
    classes = outputs // per_cell
    norm = partial(nn.GroupNorm, GROUPS) if "head.classification_head.conv.0.1.weight" in state else None
    head = RetinaNetHead(channels, per_cell, classes, norm_layer=norm)
    return RetinaNet(_Levels(channels), classes, anchor_generator=anchors, head=head), classes


def _fcos(state: Mapping[str, Tensor], pyramid: Pyramid) -> tuple[nn.Module, int]:
    _check_levels(pyramid, len(SIDES))
    classes, channels = state["head.classification_head.cls_logits.weight"].shape[:2]
    depth = _count(state, r"head\.regression_head\.conv\.(\d+)\.weight") // 2  # a convolution and a norm each
    head = FCOSHead(channels, 1, classes, num_convs=depth)
    anchors = _anchors([(2**k,) for k in range(3, 8)], (1.0,))
    return FCOS(_Levels(_width(pyramid)), classes, anchor_generator=anchors, head=head), classes


def _anchors(sides: Sequence[tuple[int, ...]], ratios: tuple[float, ...]) -> AnchorGenerator:
    with isolated_torch_state():  # on the CPU: they are computed, not loaded
        return AnchorGenerator(tuple(sides), (ratios,) * len(sides))


def _pool(pyramid: Pyramid, side: int) -> MultiScaleRoIAlign:
    """Pools boxes from all levels but the last, which is for proposals alone.

    torchvision finds the strides from the first images; here they are given, so that all batches are alike.
    """
    levels = list(pyramid.channels)[:-1]
    pool = MultiScaleRoIAlign(levels, side, sampling_ratio=2)
    pool.scales = [1 / pyramid.strides[name] for name in levels]
    first, last = (level_of_stride(pyramid.strides[name]) for name in (levels[0], levels[-1]))
    pool.map_levels = LevelMapper(first, last, pool.canonical_scale, pool.canonical_level)
    return pool


def _width(pyramid: Pyramid) -> int:
    widths = set(pyramid.channels.values())
    assert len(widths) == 1, "levels of torchvision's detectors have one width"
    return widths.pop()


def _check_levels(pyramid: Pyramid, count: int) -> None:
    if len(pyramid.channels) != count:
        raise FpnxError(f"torchvision's one-stage detectors have {count} levels, it has {', '.join(pyramid.channels)}")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many names match."""
    return sum(re.fullmatch(pattern, name) is not None for name in state)
