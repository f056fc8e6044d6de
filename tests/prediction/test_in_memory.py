"""`fpnx.predict` without an output: typed predictions for images of any kind."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fpnx
from fpnx.core.errors import FpnxError, ImageError
from tests.helpers.shapes import draw_scenes, write_images
from tests.helpers.trained import CATEGORIES, SIDE, trained_file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_file(tmp_path_factory.mktemp("models") / "boxes.safetensors", "mask_rcnn", box_features=32)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path, draw_scenes(2, size=(60, 80)))


def test_one_image_of_any_kind_gives_one_prediction(weights: Path, images: Path) -> None:
    path = images / "0000.png"
    picture = Image.open(path).convert("RGB")
    array = np.asarray(picture)
    kinds = [path, str(path), picture, array, torch.from_numpy(array.copy()).permute(2, 0, 1)]
    found = fpnx.predict(kinds, weights=weights, size=SIDE, max_detections=5)
    assert isinstance(found, list)
    assert isinstance(fpnx.predict(picture, weights=weights, size=SIDE, max_detections=5), fpnx.Prediction)
    assert [each.image for each in found] == [str(path), str(path), "image 2", "image 3", "image 4"]
    first = found[0]
    assert len(first) == len(first.scores) == len(first.labels) == len(first.names) == 5
    assert first.boxes.shape == (5, 4)
    assert first.masks.shape == (5, 60, 80)
    assert first.masks.dtype == bool
    assert first.size == (60, 80)
    assert set(first.names) <= {"square", "circle", "triangle"}
    assert (np.diff(first.scores) <= 0).all()
    for other in found[1:]:
        np.testing.assert_array_equal(other.boxes, first.boxes)
        np.testing.assert_array_equal(other.masks, first.masks)


def test_a_folder_gives_a_list_as_written_to_a_file(weights: Path, images: Path, tmp_path: Path) -> None:
    options = {"weights": weights, "size": SIDE, "max_detections": 5}
    found = fpnx.predict(images, **options)
    result = fpnx.predict(images, tmp_path / "out.json", **options)
    assert isinstance(result, fpnx.PredictResult)
    assert [each.image for each in found] == ["0000.png", "0001.png"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert [each["file_name"] for each in written] == [each.image for each in found for _ in range(len(each))]
    scores = np.concatenate([each.scores for each in found])
    np.testing.assert_allclose([each["score"] for each in written], scores, atol=1e-4)


def test_a_predictor_is_built_once_and_gives_the_same(weights: Path, images: Path) -> None:
    options = {"weights": weights, "size": SIDE, "max_detections": 5}
    predictor = fpnx.Predictor(**options)
    assert (predictor.task, predictor.classes) == ("detection", {each.id: each.name for each in CATEGORIES})
    weights_file = weights.rename(weights.with_suffix(".moved"))
    try:
        first, again = predictor(images), predictor([Image.open(images / "0001.png")])
        alone = predictor(images / "0000.png")
    finally:
        weights_file.rename(weights)
    expected = fpnx.predict(images, **options)
    for found, each in zip([*first, alone, *again], [*expected, expected[0], expected[1]], strict=True):
        np.testing.assert_array_equal(found.boxes, each.boxes)
        np.testing.assert_array_equal(found.scores, each.scores)


def test_a_predictor_is_called_from_several_threads(weights: Path, images: Path) -> None:
    predictor = fpnx.Predictor(weights=weights, size=SIDE, max_detections=5)
    paths = [images / "0000.png", images / "0001.png"] * 4
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(predictor, paths))
    for found, path in zip(together, paths, strict=True):
        np.testing.assert_allclose(found.boxes, predictor(path).boxes, atol=1e-3)


def test_a_predictor_takes_no_options_of_files(weights: Path) -> None:
    with pytest.raises(FpnxError, match="draw is for a run that writes a file"):
        fpnx.Predictor(weights=weights, draw="found")
    with pytest.raises(TypeError, match="nonsense"):
        fpnx.Predictor(weights=weights, nonsense=1)


def test_a_notebook_shows_the_picture(weights: Path, images: Path) -> None:
    found = fpnx.predict(images / "0000.png", weights=weights, size=SIDE, max_detections=5)
    with Image.open(io.BytesIO(found._repr_png_())) as shown:
        assert shown.format == "PNG"
        assert max(shown.size) >= 640
    assert "5 objects" in repr(found)
    (images / "0000.png").unlink()
    assert found._repr_png_() is None  # the text is shown instead


@pytest.mark.parametrize(
    ("images_given", "options", "message"),
    [
        ("gone.png", {}, "gone.png"),
        (3, {}, "an object of type int is not an image"),
        (np.zeros((4, 4), np.uint8), {}, "an array .4, 4. of uint8 is not an image"),
        ("0000.png", {"labels": "x.json"}, "labels is for a run that writes a file: give output beside it"),
        ("0000.png", {"threshold": 2.0}, "threshold 2.0: take a score from 0 to 1"),
    ],
    ids=["missing", "number", "array", "labels", "threshold"],
)
def test_what_cannot_be_predicted_is_refused(
    images_given: object, options: dict, message: str, weights: Path, images: Path
) -> None:
    given = images / images_given if isinstance(images_given, str) else images_given
    with pytest.raises(FpnxError, match=message):
        fpnx.predict(given, weights=weights, **options)


def test_a_damaged_image_raises_its_name_and_reason(weights: Path, images: Path) -> None:
    (images / "0001.png").write_bytes((images / "0001.png").read_bytes()[:50])
    with pytest.raises(ImageError, match=r"0001\.png: "):
        fpnx.predict(images, weights=weights, size=SIDE)
