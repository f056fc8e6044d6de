"""Scores of boxes, masks and proposals: pycocotools' numbers, and cases worked by hand."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as masks_of_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpnx import FpnxError
from fpnx.evaluation import detection_scores as module
from fpnx.evaluation.detection_scores import detection_scores
from fpnx.evaluation.detections import SourceDetections
from fpnx.evaluation.scores import Scores
from fpnx.labels.annotations import Category, ImageLabels
from fpnx.labels.geometry import fit_to_image

# Ids with gaps, and two classes of one name. Class 3 has no objects, and only class 4 is a crowd somewhere.
CATEGORIES = tuple(
    Category(number, name) for number, name in ((2, "a"), (3, "b"), (7, "b"), (90, "never there"), (91, "e"))
)
CROWDED = 4
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def runs_of_box(box: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    mask = np.zeros(size, np.uint8)
    x1, y1, x2, y2 = np.round(box).astype(int)
    mask[y1:y2, x1:x2] = 1
    runs = masks_of_coco.encode(np.asfortranarray(mask))
    return {"size": list(size), "counts": runs["counts"].decode()}


def random_case(seed: int) -> tuple[list[ImageLabels], list[SourceDetections]]:
    """Images of several sizes; some without objects, without detections, or without both. Many scores are equal."""
    draw = np.random.default_rng(seed)
    truth, found = [], []
    for number in range(16):
        height, width = draw.integers(150, 300, 2)
        count = 0 if number in (3, 4) else int(draw.integers(1, 12))
        corners = draw.uniform(0, [width - 8, height - 8], (count, 2))
        sides = np.exp(draw.uniform(np.log(6), np.log(180), (count, 2)))
        boxes = np.concatenate([corners, np.minimum(corners + sides, [width, height])], axis=1)
        classes = draw.choice([0, 1, 2, CROWDED], count)
        crowd = (classes == CROWDED) & (draw.random(count) < 0.5)
        segments = tuple(runs_of_box(box, (height, width)) for box in boxes)
        areas = None if number % 2 else draw.uniform(10, 12000, count)
        truth.append(
            ImageLabels(name=f"{number}.jpg", boxes=boxes, classes=classes, crowd=crowd, segments=segments, areas=areas)
        )
        extra = 0 if number in (4, 5) else int(draw.integers(0, 130))
        near = np.repeat(boxes, 2, axis=0) + draw.normal(0, 4, (2 * count, 4))
        guesses = np.sort(draw.uniform(0, [width, height], (extra, 2, 2)), axis=1).reshape(extra, 4)
        all_boxes = np.concatenate([near, guesses]) if number != 5 else np.empty((0, 4))
        all_boxes = np.clip(all_boxes, 0, [width, height, width, height])
        all_boxes = all_boxes[(all_boxes[:, 2] > all_boxes[:, 0] + 1) & (all_boxes[:, 3] > all_boxes[:, 1] + 1)]
        found.append(
            SourceDetections(
                image=f"{number}.jpg",
                size=(int(height), int(width)),
                boxes=all_boxes,
                scores=np.sort(np.round(draw.random(len(all_boxes)), 1))[::-1],
                classes=draw.choice([0, 1, 2, CROWDED], len(all_boxes)),
                masks=tuple(runs_of_box(box, (height, width)) for box in all_boxes),
                proposals=all_boxes[draw.permutation(len(all_boxes))],
            )
        )
    return truth, found


def by_pycocotools(
    kind: str, truth: Sequence[ImageLabels], found: Sequence[SourceDetections], proposals: bool = False
) -> COCOeval:
    """The same objects and detections, given to pycocotools."""
    images, annotations, results = [], [], []
    for number, (labels, image) in enumerate(zip(truth, found, strict=True), 1):
        images.append({"id": number, "height": image.size[0], "width": image.size[1]})
        for i, (x1, y1, x2, y2) in enumerate(labels.boxes):
            area = masks_of_coco.area(labels.segments[i]) if labels.areas is None else labels.areas[i]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": CATEGORIES[labels.classes[i]].id,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(area), "iscrowd": int(labels.crowd[i]),
                    "segmentation": labels.segments[i],
                }
            )  # fmt: skip
        for i, (x1, y1, x2, y2) in enumerate(image.proposals if proposals else image.boxes):
            result = {
                "image_id": number,
                "category_id": 2 if proposals else CATEGORIES[image.classes[i]].id,
                "score": 1 - i / 1e4 if proposals else image.scores[i],
            }
            results.append(
                {**result, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                if kind == "bbox"
                else {**result, "segmentation": image.masks[i]}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        classes = [{"id": category.id, "name": category.name} for category in CATEGORIES]
        coco.dataset = {"images": images, "annotations": annotations, "categories": classes}
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results), kind)
        if proposals:
            run.params.useCats = 0
            run.params.maxDets = [20, 100, 1000]
        run.evaluate()
        run.accumulate()
        if not proposals:
            run.summarize()
    return run


def same(value: float | None, expected: float) -> bool:
    return value is None if expected == -1 else value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "start"), [("bbox", ""), ("segm", "mask_")])
def test_the_numbers_are_those_of_pycocotools(kind: str, start: str, seed: int) -> None:
    truth, found = random_case(seed)
    reference = by_pycocotools(kind, truth, found)
    scores = detection_scores(CATEGORIES, truth, found)
    assert scores.main == "mask_AP"
    assert scores.value == scores.values["mask_AP"]
    for name, expected in zip(NAMES, reference.stats, strict=True):
        assert same(scores.values[start + name], expected), name
    column = "AP" if kind == "bbox" else "mask AP"
    for k, row in enumerate(scores.classes):
        values = reference.eval["precision"][:, :, k, 0, -1]
        assert (row.id, row.name) == (CATEGORIES[k].id, CATEGORIES[k].name)
        assert same(row.values[column], values[values > -1].mean() if (values > -1).any() else -1)
        assert row.count == sum(((t.classes == k) & ~t.crowd).sum() for t in truth)
    assert scores.classes[3].values[column] is None


@pytest.mark.parametrize(("seed", "at_once"), [(0, 256), (1, 3)])
def test_recall_of_proposals_is_that_of_pycocotools(seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROPOSAL_IMAGES", at_once)
    truth, found = random_case(seed)
    recall = by_pycocotools("bbox", truth, found, proposals=True).eval["recall"]
    values = detection_scores(CATEGORIES, truth, found).values
    for place, limit in enumerate((20, 100, 1000)):
        assert same(values[f"proposal_AR{limit}"], recall[:, 0, 0, place].mean())
    for number, size in enumerate("sml", 1):
        assert same(values[f"proposal_AR100{size}"], recall[:, 0, number, 1].mean())
        assert same(values[f"proposal_AR1000{size}"], recall[:, 0, number, 2].mean())
    assert values["proposal_AR20"] < values["proposal_AR100"]


SIZE = (100, 200)
SQUARE, OTHER = [10.0, 10.0, 50.0, 50.0], [60.0, 20.0, 100.0, 60.0]


def labels(*boxes: list[float], classes: Sequence[int] = (), crowd: Sequence[bool] = (), **more: Any) -> ImageLabels:
    return ImageLabels(
        name="a.jpg",
        boxes=np.array(boxes).reshape(-1, 4),
        classes=np.array(classes or [0] * len(boxes), np.int64),
        crowd=np.array(crowd or [False] * len(boxes), bool),
        **more,
    )


def detections(*boxes: list[float], scores: Sequence[float] = (), classes: Sequence[int] = ()) -> SourceDetections:
    return SourceDetections(
        image="a.jpg",
        size=SIZE,
        boxes=np.array(boxes).reshape(-1, 4),
        scores=np.array(scores or np.linspace(0.9, 0.1, len(boxes))),
        classes=np.array(classes or [0] * len(boxes), np.int64),
    )


def one(truth: ImageLabels, found: SourceDetections) -> Scores:
    return detection_scores(CATEGORIES, [truth], [found])


def test_by_hand() -> None:
    # Precision is 1 up to a recall of 1/2, and nothing is found beyond: 51 of the 101 recalls.
    scores = one(labels(SQUARE, OTHER), detections(SQUARE))
    assert (scores.main, scores.images) == ("AP", 1)
    assert scores.values["AP"] == pytest.approx(51 / 101)
    assert scores.values["AR100"] == 0.5
    assert (scores.values["APs"], scores.values["APl"]) == (None, None)
    # An overlap of 30 × 40 of 40 × 40: found at 0.5, 0.55, 0.6, 0.65, 0.7 and 0.75.
    scores = one(labels(SQUARE), detections([10, 10, 40, 50]))
    assert scores.values["AP50"] == scores.values["AP75"] == 1
    assert scores.values["AP"] == pytest.approx(0.6)
    # The right box of a wrong class is worth nothing.
    scores = one(labels(SQUARE), detections(SQUARE, classes=[1]))
    assert scores.value == 0
    assert scores.classes[1].values["AP"] is None


def test_crowds_do_not_count() -> None:
    crowd = labels(SQUARE, OTHER, crowd=[False, True])
    inside = [65.0, 25.0, 75.0, 35.0]
    scores = one(crowd, detections(SQUARE, inside))
    assert scores.value == 1
    assert scores.classes[0].count == 1
    assert one(crowd, detections(inside, SQUARE)).value == pytest.approx(1)
    assert one(labels(SQUARE), detections(inside, SQUARE)).value == pytest.approx(0.5)


def test_nothing_labelled_nothing_found_and_no_images() -> None:
    assert one(labels(SQUARE), detections()).value == 0
    assert one(labels(), detections(SQUARE)).value is None
    assert one(labels(), detections()).value is None
    assert detection_scores(CATEGORIES, [], []).value is None
    absent = one(labels(), replace(detections(), masks=(), proposals=np.empty((0, 4))))
    assert absent.main == "mask_AP"
    assert set(absent.values.values()) == {None}
    assert one(labels(SQUARE), replace(detections(), proposals=np.empty((0, 4)))).values["proposal_AR100"] == 0


def test_sizes_go_by_the_area_of_the_labels_then_of_the_outline_then_of_the_box() -> None:
    large = [0.0, 0.0, 200.0, 100.0]
    polygon = [[0.0, 0, 30, 0, 30, 30, 0, 30]]
    boxes_only = labels(large)
    outlined = replace(boxes_only, segments=(polygon,))
    said = replace(outlined, areas=np.array([2000.0]))
    unsaid = replace(outlined, areas=np.array([np.nan]))
    for truth, size in ((boxes_only, "l"), (outlined, "s"), (said, "m"), (unsaid, "s")):
        values = one(truth, detections(large)).values
        assert [letter for letter in "sml" if values[f"AR{letter}"] is not None] == [size]


def test_shares_of_the_image_are_taken_as_such() -> None:
    box = [0.1, 0.2, 0.5, 0.6]  # of 200 × 100
    found = detections([20, 20, 100, 60])
    mask = np.zeros(SIZE, np.uint8)
    mask[20:60, 20:100] = 1
    runs = masks_of_coco.encode(np.asfortranarray(mask))
    found = replace(found, masks=({"size": list(SIZE), "counts": runs["counts"].decode()},))
    polygon = [[0.1, 0.2, 0.5, 0.2, 0.5, 0.6, 0.1, 0.6]]
    scores = one(fit_to_image(labels(box, relative=True, segments=(polygon,)), SIZE).labels, found)
    assert scores.values["AP"] == scores.values["mask_AP"] == pytest.approx(1)


def test_outlines_of_every_kind_are_one_mask() -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[10:50, 10:50] = 1
    compressed = masks_of_coco.encode(np.asfortranarray(mask))["counts"].decode()
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    halves = [[10.0, 10, 30, 10, 30, 50, 10, 50], [30.0, 10, 50, 10, 50, 50, 30, 50]]
    found = replace(detections(SQUARE), masks=({"size": list(SIZE), "counts": compressed},))
    for segment in (halves, {"size": list(SIZE), "counts": counts}, {"size": list(SIZE), "counts": compressed}):
        assert one(labels(SQUARE, segments=(segment,)), found).value == pytest.approx(1)


def test_objects_without_an_outline_do_not_count_for_masks() -> None:
    polygon = [[10.0, 10, 50, 10, 50, 50, 10, 50]]
    found = detections(SQUARE, OTHER)
    found = replace(found, masks=tuple(runs_of_box(box, SIZE) for box in found.boxes))
    scores = one(labels(SQUARE, OTHER, segments=(polygon, None)), found)
    assert scores.values["mask_AP"] == pytest.approx(1)
    missed = replace(found, boxes=found.boxes[:1], scores=found.scores[:1], classes=found.classes[:1])
    missed = replace(missed, masks=found.masks[:1])
    scores = one(labels(SQUARE, OTHER, segments=(polygon, None)), missed)
    assert scores.values["mask_AP"] == pytest.approx(1)
    assert scores.values["AP"] == pytest.approx(51 / 101)


def test_the_missing_library_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(FpnxError, match=r"^scores of boxes .* not installed: pip install 'fpnx\[train\]'$"):
        one(labels(SQUARE), detections(SQUARE))
