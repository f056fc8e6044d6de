"""Heads of detectron2's and mmdetection's detectors, computed by the rules of these frameworks.

RetinaNet, Faster R-CNN and Mask R-CNN with the heads of the model zoos. Layers are torchvision's modules. What differs
from torchvision: anchors are not rounded; the background is the last class; RoIAlign is aligned and takes as many
samples as a box needs; masks are sampled at the centres of pixels. Sources: of detectron2 0.6
modeling/anchor_generator.py, box_regression.py, proposal_generator/proposal_utils.py, meta_arch/retinanet.py and
roi_heads/fast_rcnn.py; of mmdetection 3 models/task_modules, models/dense_heads and models/roi_heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

from fpnx.core.errors import FpnxError
from fpnx.models.heads.base import Detections, Geometry, Head, Prediction, Pyramid
from fpnx.models.torch_state import isolated_torch_state, on_meta_device

__all__ = ["FRAMEWORKS", "framework_head"]

RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
SIDES = (32, 64, 128, 256, 512)  # of anchors on each level, in pixels
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # of RetinaNet's anchors on a level
LIMIT = math.log(1000 / 16)  # of changes of width and height
FIRST_SIDE = 56  # pixels; boxes of twice this side are pooled from the second level, of four times from the third
BEFORE_NMS, PROPOSALS = 1000, 1000  # boxes of a level, and of an image
PROPOSAL_NMS, NMS = 0.7, 0.5  # largest overlap (IoU)
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the second stage's box changes; 1 / mmdetection's standard deviations
BOX_SIDE, MASK_SIDE = 7, 14  # cells of pooled boxes


@dataclass(frozen=True)
class _Rules:
    """What differs between the frameworks.

    Attributes:
        sides_first: whether a cell's anchors are ordered by their sides, and then by their ratios.
        limits_below: whether changes of width and height have a lower limit, too.
        clips_first: whether RetinaNet's boxes are cut off at the image's edge before overlapping ones are removed.
        drops_empty: whether boxes without area are left out in the end.
        eps: is added to a side in units of `FIRST_SIDE` before its level is taken.
        names: patterns of parameters and what they are here.
        ignored: pattern of names that are no parameters of the head.
    """

    sides_first: bool
    limits_below: bool
    clips_first: bool
    drops_empty: bool
    eps: float
    names: Mapping[str, str]
    ignored: str


FRAMEWORKS: dict[str, _Rules] = {
    "detectron2": _Rules(
        sides_first=True,
        limits_below=False,
        clips_first=False,
        drops_empty=True,
        eps=4e-8,
        names={
            r"head\.cls_subnet\.(\d+)\.(\w+)": r"head.classification_head.conv.{half}.0.\2",
            r"head\.bbox_subnet\.(\d+)\.(\w+)": r"head.regression_head.conv.{half}.0.\2",
            r"head\.cls_score\.(\w+)": r"head.classification_head.cls_logits.\1",
            r"head\.bbox_pred\.(\w+)": r"head.regression_head.bbox_reg.\1",
            r"proposal_generator\.rpn_head\.conv\.(\w+)": r"rpn.conv.0.0.\1",
            r"proposal_generator\.rpn_head\.conv\.conv(\d+)\.(\w+)": r"rpn.conv.\1.0.\2",
            r"proposal_generator\.rpn_head\.objectness_logits\.(\w+)": r"rpn.cls_logits.\1",
            r"proposal_generator\.rpn_head\.anchor_deltas\.(\w+)": r"rpn.bbox_pred.\1",
            r"roi_heads\.box_head\.fc1\.(\w+)": r"box_head.fc6.\1",
            r"roi_heads\.box_head\.fc2\.(\w+)": r"box_head.fc7.\1",
            r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(\w+)": r"box_predictor.\1.\2",
            r"roi_heads\.mask_head\.mask_fcn(\d+)\.(\w+)": r"mask_head.{before}.0.\2",
            r"roi_heads\.mask_head\.deconv\.(\w+)": r"mask_predictor.conv5_mask.\1",
            r"roi_heads\.mask_head\.predictor\.(\w+)": r"mask_predictor.mask_fcn_logits.\1",
        },
        ignored=r"(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+|pixel_(mean|std)",
    ),
    "mmdetection": _Rules(
        sides_first=False,
        limits_below=True,
        clips_first=True,
        drops_empty=False,
        eps=1e-6,
        names={
            r"bbox_head\.cls_convs\.(\d+)\.conv\.(\w+)": r"head.classification_head.conv.\1.0.\2",
            r"bbox_head\.reg_convs\.(\d+)\.conv\.(\w+)": r"head.regression_head.conv.\1.0.\2",
            r"bbox_head\.retina_cls\.(\w+)": r"head.classification_head.cls_logits.\1",
            r"bbox_head\.retina_reg\.(\w+)": r"head.regression_head.bbox_reg.\1",
            r"rpn_head\.rpn_conv\.(\w+)": r"rpn.conv.0.0.\1",
            r"rpn_head\.rpn_cls\.(\w+)": r"rpn.cls_logits.\1",
            r"rpn_head\.rpn_reg\.(\w+)": r"rpn.bbox_pred.\1",
            r"roi_head\.bbox_head\.shared_fcs\.0\.(\w+)": r"box_head.fc6.\1",
            r"roi_head\.bbox_head\.shared_fcs\.1\.(\w+)": r"box_head.fc7.\1",
            r"roi_head\.bbox_head\.fc_cls\.(\w+)": r"box_predictor.cls_score.\1",
            r"roi_head\.bbox_head\.fc_reg\.(\w+)": r"box_predictor.bbox_pred.\1",
            r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(\w+)": r"mask_head.\1.0.\2",
            r"roi_head\.mask_head\.upsample\.(\w+)": r"mask_predictor.conv5_mask.\1",
            r"roi_head\.mask_head\.conv_logits\.(\w+)": r"mask_predictor.mask_fcn_logits.\1",
        },
        ignored=r"data_preprocessor\..*",
    ),
}


def framework_head(framework: str, state: Mapping[str, Tensor], pyramid: Pyramid) -> Head:
    """The head in a checkpoint of detectron2 or mmdetection, in eval mode on the CPU.

    Args:
        framework: one of `FRAMEWORKS`.
        state: the parameters without those of the backbone and the neck, by the framework's names.
        pyramid: the levels, fine to coarse.

    Raises:
        FpnxError: it is none of RetinaNet, Faster and Mask R-CNN, or is built in another way.
    """
    rules = FRAMEWORKS[framework]
    renamed, unknown = {}, []
    for name, value in state.items():
        if (new := _renamed(name, rules)) is not None:
            renamed[new] = value
        elif not re.fullmatch(rules.ignored, name) and not name.endswith("num_batches_tracked"):
            unknown.append(name)
    one_stage = "head.classification_head.cls_logits.weight" in renamed
    if not one_stage and "box_predictor.cls_score.weight" not in renamed:
        named = f" ({unknown[0]}, …)" if unknown else ""
        raise FpnxError(f"its head is none of RetinaNet, Faster and Mask R-CNN as {framework} names them{named}")
    if unknown:
        raise FpnxError(f"its head has what {framework}'s own RetinaNet, Faster and Mask R-CNN have not: {unknown[0]}")
    try:
        with on_meta_device():
            head = _RetinaNet(rules, renamed, pyramid) if one_stage else _TwoStage(rules, renamed, pyramid)
        head.to_empty(device="cpu")
        head.load_state_dict(renamed)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split("\n\t")[-1].split())
        raise FpnxError(f"its head is not built as {framework}'s own: {reason}") from error
    return head.eval()


class _FrameworkHead(Head):
    """What both kinds share.

    Attributes:
        score_threshold, max_detections: least score, and most boxes of an image.
    """

    task = "detection"

    def __init__(self, rules: _Rules, pyramid: Pyramid, classes: int) -> None:
        super().__init__(pyramid, classes)
        self._rules = rules
        self.score_threshold, self.max_detections = 0.05, 100

    def _anchors(self, levels: Sequence[Tensor], octaves: Sequence[float]) -> list[Tensor]:
        """The anchors of each level, (cells × anchors of a cell, 4)."""
        anchors = []
        for name, level, side in zip(self.levels, levels, SIDES, strict=True):
            stride = self.pyramid.strides[name]
            cells = _cell_anchors([side * octave for octave in octaves], self._rules.sides_first).to(level.device)
            y, x = torch.meshgrid(
                *(torch.arange(n, device=level.device) * float(stride) for n in level.shape[2:]), indexing="ij"
            )
            shifts = torch.stack((x, y, x, y), dim=2).reshape(-1, 1, 4)
            anchors.append((shifts + cells).reshape(-1, 4))
        return anchors

    def _best(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The best boxes of an image, after non-maximum suppression, and their positions in what was given."""
        keep = batched_nms(boxes, scores, labels, NMS)[: self.max_detections]
        if self._rules.drops_empty:
            keep = keep[_has_area(clip_boxes_to_image(boxes[keep], size))]
        found = {"boxes": clip_boxes_to_image(boxes[keep], size), "scores": scores[keep], "labels": labels[keep]}
        return found, keep


class _RetinaNet(_FrameworkHead):
    kind = "retinanet"

    def __init__(self, rules: _Rules, state: Mapping[str, Tensor], pyramid: Pyramid) -> None:
        per_cell = len(RATIOS) * len(OCTAVES)
        _check(pyramid, state["head.regression_head.bbox_reg.weight"].shape[0] // 4, per_cell)
        classes, channels = state["head.classification_head.cls_logits.weight"].shape[:2]
        super().__init__(rules, pyramid, classes // per_cell)
        self.head = RetinaNetHead(channels, per_cell, self.classes)

    def predict(self, levels: Mapping[str, Tensor], geometry: Geometry) -> list[Prediction]:
        """The detections of each image, each with the level of its anchor."""
        features = [levels[name].float() for name in self.levels]
        outputs, anchors = self.head(features), self._anchors(features, OCTAVES)
        counts = [len(each) for each in anchors]
        logits, deltas = (outputs[name].split(counts, dim=1) for name in ("cls_logits", "bbox_regression"))
        return [
            self._of_image([each[i] for each in logits], [each[i] for each in deltas], anchors, size)
            for i, size in enumerate(geometry.sizes)
        ]

    def _of_image(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], size: tuple[int, int]
    ) -> Detections:
        boxes, scores, labels, places = [], [], [], []
        for level, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
            probabilities = level_logits.sigmoid().flatten()
            sure = torch.where(probabilities > self.score_threshold)[0]
            values, order = probabilities[sure].topk(min(BEFORE_NMS, len(sure)))
            cells = torch.div(sure[order], self.classes, rounding_mode="floor")
            decoded = _decoded(level_deltas[cells], level_anchors[cells], (1.0,) * 4, self._rules)
            boxes.append(clip_boxes_to_image(decoded, size) if self._rules.clips_first else decoded)
            scores.append(values)
            labels.append(sure[order] % self.classes)
            places.append(torch.full_like(order, level))
        joined = [torch.cat(each) for each in (boxes, scores, labels, places)]
        if self._rules.clips_first:
            filled = _has_area(joined[0])
            joined = [values[filled] for values in joined]
        found, keep = self._best(joined[0], joined[1], joined[2], size)
        return Detections(**found, levels=tuple(self.levels[i] for i in joined[3][keep].tolist()))


class _TwoStage(_FrameworkHead):
    kind = "faster_rcnn"

    def __init__(self, rules: _Rules, state: Mapping[str, Tensor], pyramid: Pyramid) -> None:
        _check(pyramid, state["rpn.cls_logits.weight"].shape[0], len(RATIOS))
        count, width = state["box_predictor.cls_score.weight"].shape
        super().__init__(rules, pyramid, count - 1)
        channels = next(iter(pyramid.channels.values()))
        depth = sum(re.fullmatch(r"rpn\.conv\.\d+\.0\.weight", name) is not None for name in state)
        self.rpn = RPNHead(channels, len(RATIOS), conv_depth=depth)
        self.box_head = TwoMLPHead(channels * BOX_SIDE**2, width)
        self.box_predictor = FastRCNNPredictor(width, count)
        self.box_predictor.bbox_pred = nn.Linear(width, state["box_predictor.bbox_pred.weight"].shape[0])
        self.mask_head: nn.Module | None = None
        self.mask_predictor: nn.Module | None = None
        if "mask_predictor.mask_fcn_logits.weight" in state:
            inputs, hidden = state["mask_predictor.conv5_mask.weight"].shape[:2]
            depth = sum(re.fullmatch(r"mask_head\.\d+\.0\.weight", name) is not None for name in state)
            self.mask_head = MaskRCNNHeads(channels, [inputs] * depth, 1)
            self.mask_predictor = MaskRCNNPredictor(inputs, hidden, self.classes)
            self.kind = "mask_rcnn"  # type: ignore[misc]

    def predict(self, levels: Mapping[str, Tensor], geometry: Geometry) -> list[Prediction]:
        """The detections of each image, each with the level that it is pooled from."""
        features = [levels[name].float() for name in self.levels]
        proposals = self._proposals(features, geometry.sizes)
        pooled = self.box_head(self._pooled(features, proposals, BOX_SIDE))
        logits, deltas = self.box_predictor(pooled)
        counts = [len(each) for each in proposals]
        found = [
            self._of_image(of_logits, of_deltas, boxes, size)
            for of_logits, of_deltas, boxes, size in zip(
                logits.split(counts), deltas.split(counts), proposals, geometry.sizes, strict=True
            )
        ]
        return [self._detections(each, [f[i : i + 1] for f in features], proposals[i]) for i, each in enumerate(found)]

    def _proposals(self, features: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Boxes that may be objects, of each image."""
        objectness, deltas = self.rpn(features)
        anchors = self._anchors(features, (1.0,))
        flat = [each.permute(0, 2, 3, 1).flatten(1) for each in objectness]
        changes = [each.permute(0, 2, 3, 1).reshape(len(each), -1, 4) for each in deltas]
        proposals = []
        for i, size in enumerate(sizes):
            boxes, scores, places = [], [], []
            for level, (logits, change, anchor) in enumerate(zip(flat, changes, anchors, strict=True)):
                best, order = logits[i].topk(min(BEFORE_NMS, logits.shape[1]))
                decoded = clip_boxes_to_image(_decoded(change[i][order], anchor[order], (1.0,) * 4, self._rules), size)
                filled = _has_area(decoded)
                boxes.append(decoded[filled])
                scores.append(best[filled])
                places.append(torch.full((int(filled.sum()),), level, device=best.device))
            joined = torch.cat(boxes)
            keep = batched_nms(joined, torch.cat(scores), torch.cat(places), PROPOSAL_NMS)
            proposals.append(joined[keep[:PROPOSALS]])
        return proposals

    def _of_image(self, logits: Tensor, deltas: Tensor, proposals: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        scores = logits.softmax(1)[:, :-1]  # the last is the background
        changes = deltas.reshape(len(deltas), -1, 4).expand(-1, self.classes, 4)  # one for all classes, or one for each
        boxes = _decoded(changes.reshape(-1, 4), proposals.repeat_interleave(self.classes, 0), BOX_WEIGHTS, self._rules)
        boxes = clip_boxes_to_image(boxes, size).reshape(-1, self.classes, 4)
        rows, labels = torch.where(scores > self.score_threshold)
        found, _ = self._best(boxes[rows, labels], scores[rows, labels], labels, size)
        return found

    def _detections(self, found: dict[str, Tensor], features: list[Tensor], proposals: Tensor) -> Detections:
        levels = tuple(self.levels[i] for i in self._places(found["boxes"]).tolist())
        cells = None
        if self.mask_head is not None and self.mask_predictor is not None:
            logits = self.mask_predictor(self.mask_head(self._pooled(features, [found["boxes"]], MASK_SIDE)))
            cells = logits[torch.arange(len(logits), device=logits.device), found["labels"]].sigmoid()
        return Detections(**found, levels=levels, mask_cells=cells, masks_at_centres=True, proposals=proposals)

    def _pooled(self, features: list[Tensor], boxes: list[Tensor], side: int) -> Tensor:
        """The features of boxes of all images, (n, C, side, side), each from the level for its size."""
        joined = torch.cat(boxes)
        images = torch.cat([torch.full((len(each), 1), i) for i, each in enumerate(boxes)]).to(joined)
        rows, places = torch.cat([images, joined], dim=1), self._places(joined)
        pooled = joined.new_zeros((len(joined), features[0].shape[1], side, side))
        for place, name in enumerate(self.levels[:-1]):
            there = places == place
            if there.any():
                scale = 1 / self.pyramid.strides[name]
                pooled[there] = roi_align(features[place], rows[there], side, scale, sampling_ratio=-1, aligned=True)
        return pooled

    def _places(self, boxes: Tensor) -> Tensor:
        """The position of the level for each box, by Eq. 1 of the FPN paper."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        places = torch.floor(torch.log2(sides / FIRST_SIDE + self._rules.eps))
        return places.clamp(0, len(self.levels) - 2).long()


def _renamed(name: str, rules: _Rules) -> str | None:
    for pattern, new in rules.names.items():
        if match := re.fullmatch(pattern, name):
            # detectron2 counts activations among the layers of RetinaNet, and layers of masks from 1.
            if "{half}" in new:
                new = new.replace("{half}", str(int(match[1]) // 2))
            elif "{before}" in new:
                new = new.replace("{before}", str(int(match[1]) - 1))
            return match.expand(new)
    return None


def _check(pyramid: Pyramid, per_cell: int, expected: int) -> None:
    if per_cell != expected or len(pyramid.channels) != len(SIDES):
        raise FpnxError(
            f"its {per_cell} anchors a cell on {len(pyramid.channels)} levels are not the framework's {expected} on "
            f"{len(SIDES)}, and their sides are not in the file"
        )


def _cell_anchors(sides: Sequence[float], sides_first: bool) -> Tensor:
    """The anchors of a cell around (0, 0), (anchors, 4)."""
    pairs = [(s, r) for s in sides for r in RATIOS] if sides_first else [(s, r) for r in RATIOS for s in sides]
    halves = [(side / math.sqrt(ratio) / 2, side * math.sqrt(ratio) / 2) for side, ratio in pairs]
    with isolated_torch_state():
        return torch.tensor([(-w, -h, w, h) for w, h in halves], dtype=torch.float32)


def _decoded(deltas: Tensor, anchors: Tensor, weights: Sequence[float], rules: _Rules) -> Tensor:
    """Boxes from their changes against anchors (R-CNN's box coding)."""
    size = anchors[:, 2:] - anchors[:, :2]
    centre = anchors[:, :2] + 0.5 * size
    changes = deltas / deltas.new_tensor(weights)
    growth = changes[:, 2:].clamp(-LIMIT if rules.limits_below else None, LIMIT)
    centre, half = changes[:, :2] * size + centre, 0.5 * growth.exp() * size
    return torch.cat([centre - half, centre + half], dim=1)


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
