"""Runs of predictions: their outputs, failed images, resuming after kills, shards, scores."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from fpnx.commands.predict import predict_to_file
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.mask_runs import decode_mask
from fpnx.evaluation.detections import to_source
from fpnx.evaluation.semantic import class_map
from fpnx.models.heads.base import Geometry
from fpnx.models.heads.trained_file import load_trained
from tests.helpers.process import forked
from tests.helpers.shapes import draw_scenes, write_coco, write_folders, write_images, write_masks
from tests.helpers.trained import SIDE, trained_file

SMALL = {"size": SIDE, "device": "cpu", "max_detections": 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained file of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("fcos", "mask_rcnn", "classify", "semantic"):
        settings = {"box_features": 32} if kind == "mask_rcnn" else {"convolutions": 1} if kind == "fcos" else {}
        trained_file(folder / f"{kind}.safetensors", kind, **settings)
    return folder


def predicted_alone(file: Path, image: Path) -> tuple:
    """What the head of a trained file gives for one image, by its definition, and the model."""
    trained = load_trained(file)
    picture = Image.open(image).convert("RGB")
    recipe = trained.model.recipe
    pixels = torch.from_numpy(np.array(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))[None]
    if trained.task == "detection":
        trained.head.max_detections = SMALL["max_detections"]
    with torch.no_grad():
        levels = trained.model(recipe.normalise(pixels))
        (found,) = trained.head.predict(levels, Geometry(padded=(SIDE, SIDE), sizes=((SIDE, SIDE),)))
    return found, trained, picture


def test_objects_are_coco_results_in_source_pixels(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(3, size=(90, 120)))
    result = predict_to_file(images, tmp_path / "out.json", weights=models / "mask_rcnn.safetensors", **SMALL)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [result["image_id"] for result in found] == sorted(result["image_id"] for result in found)
    assert {each["file_name"]: each["image_id"] for each in found} == {f"{i:04}.png": i for i in range(3)}
    expected, trained, picture = predicted_alone(models / "mask_rcnn.safetensors", images / "0001.png")
    source = to_source("", expected, (SIDE, SIDE), (picture.height, picture.width))
    ours = [each for each in found if each["image_id"] == 1]
    assert len(ours) == len(source.scores) > 10
    for i, each in enumerate(ours):
        x1, y1, x2, y2 = source.boxes[i].tolist()
        np.testing.assert_allclose(each["bbox"], (x1, y1, x2 - x1, y2 - y1), atol=0.02)
        assert each["score"] == pytest.approx(source.scores[i], abs=1e-4)
        category = trained.categories[source.classes[i]]
        assert (each["category_id"], each["category_name"]) == (category.id, category.name)
        assert each["level"] in ("P2", "P3", "P4", "P5")
        assert (decode_mask(each["segmentation"]) != decode_mask(source.masks[i])).mean() < 0.01
    assert result.found == len(found)
    assert result.to_json()["head"].startswith("mask_rcnn")


def test_classes_are_a_table(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(3))
    predict_to_file(images, tmp_path / "out.csv", weights=models / "classify.safetensors", top=2, **SMALL)
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{i:04}.png" for i in range(3) for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 3
    logits, trained, _ = predicted_alone(models / "classify.safetensors", images / "0002.png")
    expected = logits.softmax(0)
    for row, place in zip(rows[4:], expected.argsort(descending=True), strict=False):
        assert float(row["score"]) == pytest.approx(float(expected[place]), abs=1e-4)
        category = trained.categories[place]
        assert (row["label"], row["category_id"]) == (category.name, str(category.id))


def test_masks_are_pngs_with_the_numbers_of_classes(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(2, size=(50, 90)))
    result = predict_to_file(images, tmp_path / "masks", weights=models / "semantic.safetensors", **SMALL)
    logits, trained, _ = predicted_alone(models / "semantic.safetensors", images / "0000.png")
    expected = np.array([each.id for each in trained.categories])[class_map(logits, (SIDE, SIDE), (50, 90))]
    with Image.open(tmp_path / "masks" / "0000.png.png") as mask:
        assert mask.mode == "P"
        assert (np.asarray(mask) == expected).mean() > 0.999
    assert json.loads((tmp_path / "masks" / "classes.json").read_text()) == {
        "2": "square",
        "5": "circle",
        "9": "triangle",
    }
    assert (result.task, result.run.done) == ("semantic", 2)
    with pytest.raises(FpnxError, match="masks exists: continue it with --resume"):
        predict_to_file(images, tmp_path / "masks", weights=models / "semantic.safetensors", **SMALL)


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        ("fcos", "out.csv", "boxes are written as COCO results"),
        ("classify", "out.json", "classes are written as a table"),
        ("semantic", "out.json", "masks are a PNG for each image: name a folder"),
        ("fcos", "s3://bucket/out.json", "predictions are written to a disk"),
        ("fcos", "nowhere/out.json", "does not exist"),
    ],
)
def test_outputs_of_another_kind_are_refused(
    kind: str, output: str, message: str, models: Path, tmp_path: Path
) -> None:
    images = write_images(tmp_path, draw_scenes(1))
    target = output if output.startswith("s3") else tmp_path / output
    with pytest.raises(FpnxError, match=message):
        predict_to_file(images, target, weights=models / f"{kind}.safetensors", **SMALL)


def test_failed_images_are_recorded_and_the_others_done(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(3))
    (images / "0001.png").write_bytes((images / "0001.png").read_bytes()[:60])
    result = predict_to_file(images, tmp_path / "out.json", weights=models / "fcos.safetensors", **SMALL)
    assert result.exit_code == 1
    assert [path for path, _ in result.run.failed] == ["0001.png"]
    assert {each["image_id"] for each in json.loads((tmp_path / "out.json").read_text())} == {0, 2}
    document = json.loads((tmp_path / "out.run.json").read_text())
    assert document["result"]["failed"][0]["path"] == "0001.png"
    assert document["provenance"]["weights"]["name"] == "fcos.safetensors"
    assert not (tmp_path / "out.json.part").exists()


def test_an_output_that_exists_is_kept(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(2))
    weights = models / "fcos.safetensors"
    predict_to_file(images, tmp_path / "out.json", weights=weights, **SMALL)
    before = (tmp_path / "out.json").read_bytes()
    with pytest.raises(FpnxError, match=r"out\.json exists: continue it with --resume, replace it with --overwrite"):
        predict_to_file(images, tmp_path / "out.json", weights=weights, **SMALL)
    again = predict_to_file(images, tmp_path / "out.json", weights=weights, resume=True, **SMALL)
    assert (again.run.computed, again.run.done, again.found) == (0, 2, len(json.loads(before)))
    with pytest.raises(FpnxError, match=r"of a run with other settings \(score_threshold"):
        predict_to_file(images, tmp_path / "out.json", weights=weights, resume=True, threshold=0.9, **SMALL)
    assert (tmp_path / "out.json").read_bytes() == before
    predict_to_file(images, tmp_path / "out.json", weights=weights, overwrite=True, threshold=0.9, **SMALL)
    assert len(json.loads((tmp_path / "out.json").read_bytes())) < len(json.loads(before))


def test_a_foreign_file_is_not_taken_for_a_finished_run(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(1))
    (tmp_path / "out.json").write_text("[]")
    with pytest.raises(FpnxError, match="does not say how it was made"):
        predict_to_file(images, tmp_path / "out.json", weights=models / "fcos.safetensors", resume=True, **SMALL)
    assert (tmp_path / "out.json").read_text() == "[]"


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_run_killed_twice_and_resumed_gives_what_an_uninterrupted_one_gives(
    count: int, models: Path, tmp_path: Path
) -> None:
    images = write_images(tmp_path, draw_scenes(count))
    weights, part = models / "mask_rcnn.safetensors", tmp_path / "killed.json.part"
    command = ["predict", images, "-o", tmp_path / "killed.json", "--weights", weights, "--size", SIDE, "--resume"]
    command += ["--commit-every", 0, "--threshold", 0.3, "--batch-size", 2, "--max-detections", 3, "--cpus", 1]
    for least in (count // 5, count // 2):
        killed_after(command, part, least)
        assert not (tmp_path / "killed.json").exists()
        assert lines_of(part) < count
    with open(part, "ab") as journal:  # a crash in the middle of a line
        journal.write(b'{"image":3,"size":[64,')
    options = {**SMALL, "threshold": 0.3, "max_detections": 3, "batch_size": 2, "cpus": 1}
    resumed = predict_to_file(images, tmp_path / "killed.json", weights=weights, resume=True, **options)
    assert resumed.run.computed <= count - count // 2
    assert not part.exists()
    predict_to_file(images, tmp_path / "whole.json", weights=weights, **options)
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def killed_after(command: list[object], part: Path, images: int) -> None:
    """Run a command line until its journal has so many images, and kill it."""
    with forked(*command, cwd=part.parent) as started:
        while started.poll() is None and lines_of(part) < images:
            time.sleep(0.002)
        started.kill()
    assert started.returncode == -signal.SIGKILL, "it ended before it was killed"


def lines_of(part: Path) -> int:
    """How many images a journal has."""
    return max(0, part.read_bytes().count(b"\n") - 1) if part.exists() else 0


def test_a_damaged_journal_is_refused(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(1))
    part = tmp_path / "out.json.part"
    for content, message in (
        (b"", "is empty"),
        (b"{}\n", "no journal of fpnx predict"),
        (b"{}\n{}\n", "damaged in line 1"),
    ):
        part.write_bytes(content)
        with pytest.raises(FpnxError, match=message):
            predict_to_file(images, tmp_path / "out.json", weights=models / "fcos.safetensors", resume=True, **SMALL)
        assert part.read_bytes() == content


def test_a_line_that_was_changed_is_found(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(2))
    part = tmp_path / "out.json.part"
    options = {"weights": models / "fcos.safetensors", **SMALL}
    (tmp_path / "out.run.json").mkdir()  # so that the run cannot end
    with pytest.raises(FpnxError):
        predict_to_file(images, tmp_path / "out.json", overwrite=True, **options)
    first, one, *others = part.read_bytes().splitlines(keepends=True)
    for changed in (
        one.replace(b'"bbox":[', b'"bbox":["x",', 1),
        one.replace(b'"score":0.', b'"score":NaN', 1),
        b'{"image":0}\n',
    ):
        assert changed != one
        part.write_bytes(b"".join((first, changed, *others)))
        with pytest.raises(FpnxError, match="damaged in line 2: start over with --overwrite"):
            predict_to_file(images, tmp_path / "out.json", resume=True, **options)
    part.write_bytes(first + one + others[0].replace(b"0.", b"1.", 1))  # the last line: that image is computed again
    (tmp_path / "out.run.json").rmdir()
    assert predict_to_file(images, tmp_path / "out.json", resume=True, **options).run.computed == 1


@pytest.mark.parametrize("limit", [3_000, 8_000])
def test_a_full_disk_is_one_line_and_nothing_is_lost(limit: int, models: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    images = write_images(tmp_path, draw_scenes(6))
    options = {"weights": models / "fcos.safetensors", "batch_size": 1, "commit_every": 0, **SMALL}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(FpnxError, match=r"cannot write .*out\.json.*: File too large"):
            predict_to_file(images, tmp_path / "out.json", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    result = predict_to_file(images, tmp_path / "out.json", resume=True, **options)
    predict_to_file(images, tmp_path / "whole.json", **options)
    assert result.run.done == 6
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_an_input_is_not_replaced(models: Path, tmp_path: Path) -> None:
    labels = write_coco(tmp_path, draw_scenes(2))
    weights = shutil.copy(models / "fcos.safetensors", tmp_path / "model.safetensors")
    options = {"weights": weights, "labels": labels, "overwrite": True, **SMALL}
    (tmp_path / "link.json").symlink_to(labels)
    for output in (weights, labels, tmp_path / "link.json", tmp_path / "images" / "0001.png"):
        before = Path(output).read_bytes()
        with pytest.raises(FpnxError, match="is read by this run, and would be lost: name another with -o"):
            predict_to_file(tmp_path / "images", output, **options)
        assert Path(output).read_bytes() == before


def test_shards_together_are_the_whole(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(5))
    weights = models / "fcos.safetensors"
    predict_to_file(images, tmp_path / "whole.json", weights=weights, batch_size=1, **SMALL)
    joined = []
    for i in range(2):
        result = predict_to_file(images, tmp_path / "out.json", weights=weights, batch_size=1, shard=f"{i}/2", **SMALL)
        assert result.output.name == f"out.shard-0000{i}-of-00002.json"
        joined += json.loads(result.output.read_text())
    assert joined == json.loads((tmp_path / "whole.json").read_text())


def test_without_any_object_the_results_are_an_empty_list(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(1))
    predict_to_file(images, tmp_path / "out.json", weights=models / "fcos.safetensors", threshold=1.0, **SMALL)
    assert (tmp_path / "out.json").read_text() == "[]\n"


def test_pictures_are_drawn_beside_the_results(models: Path, tmp_path: Path) -> None:
    for kind, output in (("mask_rcnn", "out.json"), ("classify", "out.csv"), ("semantic", "masks")):
        images = write_images(tmp_path, draw_scenes(2))
        predict_to_file(
            images, tmp_path / output, weights=models / f"{kind}.safetensors", draw=tmp_path / kind, **SMALL
        )
        for i in range(2):
            with Image.open(tmp_path / kind / f"{i:04}.png.png") as picture:
                assert max(picture.size) >= 640
                assert picture.text["Title"] == f"{i:04}.png"


def test_pictures_that_are_missing_are_drawn_by_resume(models: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path, draw_scenes(2))
    weights, drawn = models / "semantic.safetensors", tmp_path / "found"
    predict_to_file(images, tmp_path / "masks", weights=weights, draw=drawn, **SMALL)
    expected = (drawn / "0000.png.png").read_bytes()
    with pytest.raises(FpnxError, match=r"2 of the pictures are there already, such as .*0000\.png\.png"):
        predict_to_file(images, tmp_path / "other", weights=weights, draw=drawn, **SMALL)
    (images / "0001.png").rename(tmp_path / "kept.png")
    (images / "0001.png").write_bytes(b"\x89PNG")  # so that the run does not end
    shutil.rmtree(tmp_path / "masks")
    shutil.rmtree(drawn)
    with pytest.raises(FpnxError):
        fail_at_the_end(images, tmp_path / "masks", weights)
    predict_to_file(images, tmp_path / "masks", weights=weights, draw=drawn, resume=True, **SMALL)
    assert (drawn / "0000.png.png").read_bytes() == expected


def fail_at_the_end(images: Path, output: Path, weights: Path) -> None:
    """A run whose images are done, and whose output cannot be written in the end."""
    output.mkdir()
    (output / "classes.json").mkdir()
    try:
        predict_to_file(images, output, weights=weights, overwrite=True, **SMALL)
    finally:
        (output / "classes.json").rmdir()


def test_scores_are_those_of_pycocotools_on_the_written_file(models: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    evaluator = pytest.importorskip("pycocotools.cocoeval")
    labels = write_coco(tmp_path, draw_scenes(6))
    result = predict_to_file(
        tmp_path / "images",
        tmp_path / "out.json",
        weights=models / "mask_rcnn.safetensors",
        labels=labels,
        draw=tmp_path / "found",
        **SMALL,
    )
    truth = coco.COCO(str(labels))
    truth.dataset.setdefault("info", {})  # pycocotools before 2.0.11 wants it
    found = truth.loadRes(str(tmp_path / "out.json"))
    assert result.scores is not None
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        evaluation = evaluator.COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for name, value in zip(("AP", "AP50", "AP75"), evaluation.stats, strict=False):
            assert result.scores.values[f"{prefix}{name}"] == pytest.approx(value, abs=1e-6)
    assert result.scores.values["AP50"] > 0
    assert {each["image_id"] for each in json.loads((tmp_path / "out.json").read_text())} == set(range(100, 106))
    assert result.worst
    assert all(Path(each.picture).is_file() for each in result.worst)
    assert "wrong" in result.worst[0].errors


def test_proposals_are_scored(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    labels = write_coco(tmp_path, draw_scenes(4))
    weights = models / "mask_rcnn.safetensors"
    result = predict_to_file(tmp_path / "images", tmp_path / "out.json", weights=weights, labels=labels, **SMALL)
    objects = recalled = 0
    for i, scene in enumerate(draw_scenes(4)):
        found, _, picture = predicted_alone(weights, tmp_path / "images" / f"{i:04}.png")
        proposals = to_source("", found, (SIDE, SIDE), (picture.height, picture.width)).proposals
        truth = torch.from_numpy(np.array([shape.box for shape in scene.shapes], np.float64))
        best = torch.from_numpy(proposals[:20]), truth
        overlap = box_iou(*best).max(dim=0).values
        objects += len(truth)
        recalled += sum(float((overlap >= t).sum()) for t in np.arange(0.5, 1, 0.05))
    assert result.scores is not None
    # Greedy matching gives an object at most one proposal, and a proposal at most one object.
    assert result.scores.values["proposal_AR20"] == pytest.approx(recalled / objects / 10, abs=0.02)
    assert "proposals" not in (tmp_path / "out.json").read_text()


def test_labels_that_changed_are_not_taken_for_those_of_the_run(models: Path, tmp_path: Path) -> None:
    labels = write_coco(tmp_path, draw_scenes(2))
    options = {"weights": models / "fcos.safetensors", "labels": labels, "resume": True, **SMALL}
    predict_to_file(tmp_path / "images", tmp_path / "out.json", **options)
    document = json.loads(labels.read_text())
    document["annotations"][0]["bbox"][2] += 1
    labels.write_text(json.dumps(document))
    with pytest.raises(FpnxError, match=r"of a run with other settings .*content of labels"):
        predict_to_file(tmp_path / "images", tmp_path / "out.json", **options)


def test_labels_that_are_left_out_are_said(models: Path, tmp_path: Path) -> None:
    labels = write_coco(tmp_path, draw_scenes(2))
    document = json.loads(labels.read_text())
    for box in ([1, 1, 0, 5], [900, 900, 5, 5]):
        document["annotations"].append({**document["annotations"][0], "id": 90 + len(box) * box[0], "bbox": box})
    labels.write_text(json.dumps(document))
    said: list[str] = []

    class Ear(Listener):
        def message(self, text: str) -> None:
            said.append(text)

    predict_to_file(
        tmp_path / "images", tmp_path / "out.json", weights=models / "fcos.safetensors", labels=labels,
        listener=Ear(), **SMALL,
    )  # fmt: skip
    assert "labels left out: empty boxes (1)" in said
    assert "labels left out: boxes outside of their image (1)" in said


def test_classes_are_scored_with_folders_as_labels(models: Path, tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "classes", draw_scenes(9))
    result = predict_to_file(
        folder, tmp_path / "out.csv", weights=models / "classify.safetensors", labels="folders", **SMALL
    )
    with open(tmp_path / "out.csv", newline="") as file:
        first = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    right = [row["path"].split("/")[0] == row["label"] for row in first]
    assert len(right) == 9
    assert result.scores is not None
    assert result.scores.values["accuracy"] == pytest.approx(sum(right) / 9)
    assert len(result.worst) == right.count(False)
    assert all(f"taken for {each['label']}" in {w.image: w.errors for w in result.worst}[each["path"]]
               for each, ok in zip(first, right, strict=True) if not ok)  # fmt: skip


def test_masks_are_scored_with_masks_as_labels(models: Path, tmp_path: Path) -> None:
    scenes = draw_scenes(3, size=(60, 80))
    masks = write_masks(tmp_path, scenes)
    (masks / "classes.txt").write_text("background\nsquare\ncircle\ntriangle\n")
    result = predict_to_file(
        tmp_path / "images",
        tmp_path / "masks_found",
        weights=models / "semantic.safetensors",
        labels=masks,
        draw=tmp_path / "found",
        **SMALL,
    )
    right = total = 0
    names = json.loads((tmp_path / "masks_found" / "classes.json").read_text())
    wanted = {"square": 1, "circle": 2, "triangle": 3}
    for scene in scenes:
        with Image.open(tmp_path / "masks_found" / f"{scene.name}.png") as mask:
            ids = np.asarray(mask)
        predicted = np.vectorize(lambda value: wanted[names[str(value)]])(ids)
        right += int((predicted == scene.classes).sum())
        total += scene.classes.size
    assert result.scores is not None
    assert result.scores.values["pixel_accuracy"] == pytest.approx(right / total)
    assert len(result.worst) == 3


def test_labels_without_a_predicted_class_are_refused(models: Path, tmp_path: Path) -> None:
    labels = write_coco(tmp_path, draw_scenes(2))
    document = json.loads(labels.read_text())
    for category in document["categories"]:
        category["name"] = f"other {category['name']}"
    labels.write_text(json.dumps(document))
    with pytest.raises(FpnxError, match="none of their classes is predicted: they have other square, other circle"):
        predict_to_file(
            tmp_path / "images", tmp_path / "out.json", weights=models / "fcos.safetensors", labels=labels, **SMALL
        )
