"""Reference implementations of detectron2's and mmdetection's heads, with their parameter names.

Written from the frameworks' definitions, with numpy loops for what fpnx takes from torchvision: RoIAlign, non-maximum
suppression, anchors, box coding, pasting of masks. They share no code with fpnx.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES, CHANNELS = 4, 16
MAX_RATIO = math.log(1000 / 16)


def convolution(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def parameters(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights and biases by the name of the layer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:])
        transposed = "deconv" in name or "upsample" in name
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[1] if transposed else shape[0], generator=generator)
    return state


def scaled(state: dict[str, Tensor], factors: dict[str, float]) -> dict[str, Tensor]:
    """The state with some layers' weights multiplied."""
    for name, factor in factors.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] * factor
    return state


def nms(boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, threshold: float) -> list[int]:
    """Positions of the boxes that are kept, best first."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        if all(groups[i] != groups[j] or overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def roi_align(feature: np.ndarray, box: np.ndarray, stride: int, side: int) -> np.ndarray:
    """(C, side, side): aligned, as many samples in a cell as it has pixels of the map, rounded up."""
    channels = len(feature)
    x1, y1, x2, y2 = (value / stride - 0.5 for value in box)
    cell_w, cell_h = (x2 - x1) / side, (y2 - y1) / side
    samples_x, samples_y = max(math.ceil(cell_w), 0), max(math.ceil(cell_h), 0)
    out = np.zeros((channels, side, side))
    if not (samples_x and samples_y):
        return out
    for row in range(side):
        for column in range(side):
            for i in range(samples_y):
                for j in range(samples_x):
                    y = y1 + row * cell_h + (i + 0.5) * cell_h / samples_y
                    x = x1 + column * cell_w + (j + 0.5) * cell_w / samples_x
                    out[:, row, column] += bilinear(feature, y, x)
    return out / (samples_x * samples_y)


def bilinear(feature: np.ndarray, y: float, x: float) -> np.ndarray:
    channels, height, width = feature.shape
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(channels)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    return (
        feature[:, top, left] * (1 - dy) * (1 - dx)
        + feature[:, top, right] * (1 - dy) * dx
        + feature[:, bottom, left] * dy * (1 - dx)
        + feature[:, bottom, right] * dy * dx
    )


def grid(cell: list[tuple[float, float]], height: int, width: int, stride: int) -> np.ndarray:
    """Anchors of (width, height) around the corner of each cell."""
    anchors = []
    for y in range(height):
        for x in range(width):
            for w, h in cell:
                anchors.append((x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2))
    return np.array(anchors)


def paste(cells: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """detectron2's `_do_paste_mask`, which mmdetection has too: (H, W) bool."""
    m = cells.shape[0]
    mask = np.zeros(size, bool)
    padded = np.pad(cells, 1)
    for row in range(size[0]):
        for column in range(size[1]):
            y = (row + 0.5 - box[1]) / (box[3] - box[1]) * m - 0.5
            x = (column + 0.5 - box[0]) / (box[2] - box[0]) * m - 0.5
            if -1 < y < m and -1 < x < m:
                mask[row, column] = bilinear(padded[None], y + 1, x + 1)[0] >= 0.5
    return mask


class Reference:
    """A framework's rules. Levels are P3 to P7 for RetinaNet, P2 to P6 otherwise."""

    retinanet_shapes: ClassVar[dict[str, tuple[int, ...]]]
    two_stage_shapes: ClassVar[dict[str, tuple[int, ...]]]
    mask_shapes: ClassVar[dict[str, tuple[int, ...]]]
    lower_limit = -math.inf
    clips_before_nms = True
    drops_empty = False

    def cell(self, side: float, octaves: list[float]) -> list[tuple[float, float]]:
        raise NotImplementedError

    def decode(self, deltas: np.ndarray, anchors: np.ndarray, stds: tuple[float, ...]) -> np.ndarray:
        boxes = []
        for (dx, dy, dw, dh), (x1, y1, x2, y2) in zip(deltas * np.array(stds), anchors, strict=True):
            w, h = x2 - x1, y2 - y1
            cx, cy = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h
            w *= math.exp(min(max(dw, self.lower_limit), MAX_RATIO))
            h *= math.exp(min(max(dh, self.lower_limit), MAX_RATIO))
            boxes.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        return np.array(boxes).reshape(-1, 4)

    def retinanet(self, state: dict[str, Tensor], levels: list[Tensor], size: tuple[int, int]) -> dict[str, np.ndarray]:
        found = []
        octaves = [1.0, 2 ** (1 / 3), 2 ** (2 / 3)]
        for i, level in enumerate(levels):
            logits, deltas = self.retinanet_outputs(state, level[None])
            scores = logits.permute(0, 2, 3, 1).reshape(-1, CLASSES).sigmoid().numpy()
            changes = deltas.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
            anchors = grid(self.cell(2 ** (5 + i), octaves), level.shape[1], level.shape[2], 2 ** (3 + i))
            candidates = [(scores[a, c], a, c) for a, c in zip(*np.nonzero(scores > 0.05), strict=True)]
            for score, anchor, label in sorted(candidates, key=lambda each: -each[0])[:1000]:
                box = self.decode(changes[anchor : anchor + 1], anchors[anchor : anchor + 1], (1, 1, 1, 1))[0]
                found.append((box, score, label, 3 + i))
        return self.finish(found, size)

    def finish(self, found: list[tuple], size: tuple[int, int]) -> dict[str, np.ndarray]:
        boxes = np.array([each[0] for each in found]).reshape(-1, 4)
        scores, labels, levels = (np.array([each[i] for each in found]) for i in (1, 2, 3))
        if self.clips_before_nms:
            boxes = clip(boxes, size)
            boxes, scores, labels, levels = (values[area(boxes) > 0] for values in (boxes, scores, labels, levels))
        kept = nms(boxes, scores, labels, 0.5)[:100]
        boxes, scores, labels, levels = clip(boxes[kept], size), scores[kept], labels[kept], levels[kept]
        filled = area(boxes) > 0
        return {"boxes": boxes[filled], "scores": scores[filled], "labels": labels[filled], "levels": levels[filled]}

    def two_stage(self, state: dict[str, Tensor], levels: list[Tensor], size: tuple[int, int]) -> dict[str, np.ndarray]:
        proposals = self.proposals(state, levels, size)
        pooled = np.stack([self.pool(levels, box, 7) for box in proposals])
        logits, deltas = self.box_outputs(state, torch.from_numpy(pooled).float().flatten(1))
        scores = logits.softmax(1)[:, :CLASSES].numpy()
        found = []
        for i, box in enumerate(proposals):
            for label in range(CLASSES):
                if scores[i, label] > 0.05:
                    changes = deltas[i, 4 * label : 4 * label + 4].double().numpy()[None]
                    decoded = clip(self.decode(changes, box[None], (0.1, 0.1, 0.2, 0.2)), size)[0]
                    found.append((decoded, scores[i, label], label))
        boxes = np.array([each[0] for each in found]).reshape(-1, 4)
        values, labels = (np.array([each[i] for each in found]) for i in (1, 2))
        kept = nms(boxes, values, labels, 0.5)[:100]
        if self.drops_empty:
            kept = [i for i in kept if area(boxes[i : i + 1])[0] > 0]
        levels = np.array([self.level(box) for box in boxes[kept]])
        return {"boxes": boxes[kept], "scores": values[kept], "labels": labels[kept], "levels": levels}

    def proposals(self, state: dict[str, Tensor], levels: list[Tensor], size: tuple[int, int]) -> np.ndarray:
        boxes, scores, places = [], [], []
        for i, level in enumerate(levels):
            logits, deltas = self.rpn_outputs(state, level[None])
            logits = logits.permute(0, 2, 3, 1).flatten().double().numpy()
            changes = deltas.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
            anchors = grid(self.cell(2 ** (5 + i), [1.0]), level.shape[1], level.shape[2], 2 ** (2 + i))
            best = np.argsort(-logits, kind="stable")[:1000]
            decoded = clip(self.decode(changes[best], anchors[best], (1, 1, 1, 1)), size)
            there = area(decoded) > 0
            boxes.append(decoded[there])
            scores.append(logits[best][there])
            places.append(np.full(int(there.sum()), i))
        joined = np.concatenate(boxes)
        return joined[nms(joined, np.concatenate(scores), np.concatenate(places), 0.7)[:1000]]

    def level(self, box: np.ndarray) -> int:
        scale = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        return min(max(math.floor(4 + math.log2(scale / 224 + 1e-8)), 2), 5)

    def pool(self, levels: list[Tensor], box: np.ndarray, side: int) -> np.ndarray:
        k = self.level(box)
        return roi_align(levels[k - 2].double().numpy(), box, 2**k, side)

    def masks(self, state: dict[str, Tensor], levels: list[Tensor], found: dict[str, np.ndarray]) -> np.ndarray:
        """(n, 28, 28) probabilities of the class of each box."""
        x = torch.from_numpy(np.stack([self.pool(levels, box, 14) for box in found["boxes"]])).float()
        logits = self.mask_outputs(state, x)
        return logits[torch.arange(len(x)), torch.from_numpy(found["labels"]).long()].sigmoid().numpy()

    def retinanet_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def rpn_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def box_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def mask_outputs(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        raise NotImplementedError


class Detectron2(Reference):
    clips_before_nms = False
    drops_empty = True
    retinanet_shapes: ClassVar = {
        **{f"head.{part}_subnet.{2 * i}": (CHANNELS, CHANNELS, 3, 3) for part in ("cls", "bbox") for i in range(4)},
        "head.cls_score": (9 * CLASSES, CHANNELS, 3, 3),
        "head.bbox_pred": (36, CHANNELS, 3, 3),
    }
    two_stage_shapes: ClassVar = {
        "proposal_generator.rpn_head.conv": (CHANNELS, CHANNELS, 3, 3),
        "proposal_generator.rpn_head.objectness_logits": (3, CHANNELS, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas": (12, CHANNELS, 1, 1),
        "roi_heads.box_head.fc1": (24, CHANNELS * 49),
        "roi_heads.box_head.fc2": (24, 24),
        "roi_heads.box_predictor.cls_score": (CLASSES + 1, 24),
        "roi_heads.box_predictor.bbox_pred": (4 * CLASSES, 24),
    }
    mask_shapes: ClassVar = {
        **{f"roi_heads.mask_head.mask_fcn{i}": (CHANNELS, CHANNELS, 3, 3) for i in range(1, 5)},
        "roi_heads.mask_head.deconv": (CHANNELS, CHANNELS, 2, 2),
        "roi_heads.mask_head.predictor": (CLASSES, CHANNELS, 1, 1),
    }

    def cell(self, side: float, octaves: list[float]) -> list[tuple[float, float]]:
        cells = []
        for octave in octaves:
            for ratio in (0.5, 1.0, 2.0):
                width = math.sqrt((side * octave) ** 2 / ratio)
                cells.append((width, ratio * width))
        return cells

    def retinanet_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for part, last in (("cls", "cls_score"), ("bbox", "bbox_pred")):
            y = x
            for i in range(4):
                y = F.relu(convolution(state, f"head.{part}_subnet.{2 * i}", y))
            outputs.append(convolution(state, f"head.{last}", y))
        return outputs[0], outputs[1]

    def rpn_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        start = "proposal_generator.rpn_head"
        x = F.relu(convolution(state, f"{start}.conv", x))
        return convolution(state, f"{start}.objectness_logits", x), convolution(state, f"{start}.anchor_deltas", x)

    def box_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        for name in ("fc1", "fc2"):
            x = F.relu(_linear(state, f"roi_heads.box_head.{name}", x))
        start = "roi_heads.box_predictor"
        return _linear(state, f"{start}.cls_score", x), _linear(state, f"{start}.bbox_pred", x)

    def mask_outputs(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        start = "roi_heads.mask_head"
        for i in range(1, 5):
            x = F.relu(convolution(state, f"{start}.mask_fcn{i}", x))
        x = F.relu(F.conv_transpose2d(x, state[f"{start}.deconv.weight"], state[f"{start}.deconv.bias"], stride=2))
        return convolution(state, f"{start}.predictor", x)


class MMDetection(Reference):
    lower_limit = -MAX_RATIO
    retinanet_shapes: ClassVar = {
        **{f"bbox_head.{part}_convs.{i}.conv": (CHANNELS, CHANNELS, 3, 3) for part in ("cls", "reg") for i in range(4)},
        "bbox_head.retina_cls": (9 * CLASSES, CHANNELS, 3, 3),
        "bbox_head.retina_reg": (36, CHANNELS, 3, 3),
    }
    two_stage_shapes: ClassVar = {
        "rpn_head.rpn_conv": (CHANNELS, CHANNELS, 3, 3),
        "rpn_head.rpn_cls": (3, CHANNELS, 1, 1),
        "rpn_head.rpn_reg": (12, CHANNELS, 1, 1),
        "roi_head.bbox_head.shared_fcs.0": (24, CHANNELS * 49),
        "roi_head.bbox_head.shared_fcs.1": (24, 24),
        "roi_head.bbox_head.fc_cls": (CLASSES + 1, 24),
        "roi_head.bbox_head.fc_reg": (4 * CLASSES, 24),
    }
    mask_shapes: ClassVar = {
        **{f"roi_head.mask_head.convs.{i}.conv": (CHANNELS, CHANNELS, 3, 3) for i in range(4)},
        "roi_head.mask_head.upsample": (CHANNELS, CHANNELS, 2, 2),
        "roi_head.mask_head.conv_logits": (CLASSES, CHANNELS, 1, 1),
    }

    def cell(self, side: float, octaves: list[float]) -> list[tuple[float, float]]:
        return [
            (side * octave / math.sqrt(ratio), side * octave * math.sqrt(ratio))
            for ratio in (0.5, 1.0, 2.0)
            for octave in octaves
        ]

    def retinanet_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for part in ("cls", "reg"):
            y = x
            for i in range(4):
                y = F.relu(convolution(state, f"bbox_head.{part}_convs.{i}.conv", y))
            outputs.append(convolution(state, f"bbox_head.retina_{part}", y))
        return outputs[0], outputs[1]

    def rpn_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(convolution(state, "rpn_head.rpn_conv", x))
        return convolution(state, "rpn_head.rpn_cls", x), convolution(state, "rpn_head.rpn_reg", x)

    def box_outputs(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        for i in range(2):
            x = F.relu(_linear(state, f"roi_head.bbox_head.shared_fcs.{i}", x))
        return _linear(state, "roi_head.bbox_head.fc_cls", x), _linear(state, "roi_head.bbox_head.fc_reg", x)

    def mask_outputs(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        start = "roi_head.mask_head"
        for i in range(4):
            x = F.relu(convolution(state, f"{start}.convs.{i}.conv", x))
        x = F.relu(F.conv_transpose2d(x, state[f"{start}.upsample.weight"], state[f"{start}.upsample.bias"], stride=2))
        return convolution(state, f"{start}.conv_logits", x)


def clip(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.clip(boxes, 0, [size[1], size[0], size[1], size[0]])


def area(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


REFERENCES: dict[str, Reference] = {"detectron2": Detectron2(), "mmdetection": MMDetection()}
