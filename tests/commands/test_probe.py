"""fpnx probe: which level tells classes apart, of images, boxes and pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import roi_align

import fpnx
from fpnx.analysis import sample_vectors
from fpnx.analysis.sample_vectors import SampleVectors, by_size_levels
from fpnx.analysis.samples import Samples, labelled_samples
from fpnx.core.analysis_config import ProbeConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from tests.helpers.stored import stored

Run = Callable[..., Any]
RANDOM = np.random.default_rng(4)
CLASSES = ("cat", "dog", "bird")


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """60 images in three folders: P3 tells nothing, P4 tells birds from others, P5 tells all three."""
    classes = np.arange(60) % 3
    noise = RANDOM.normal(size=(60, 4))
    features = {
        "P3": noise,
        "P4": RANDOM.normal(size=(60, 4)) + 9 * (classes == 2)[:, None],
        "P5": RANDOM.normal(size=(60, 4)) + 9 * np.eye(3)[classes][:, [0, 1, 2, 2]],
    }
    return stored(tmp_path / "out.h5", features, [f"{CLASSES[c]}/{i}.jpg" for i, c in enumerate(classes)])


def shares(result: fpnx.Probe, method: str = "linear") -> dict[str, float]:
    return {row.name: getattr(row, method).share for row in result.rows}


def test_folders_as_classes(animals: Path) -> None:
    result = fpnx.probe(animals, labels="folders")
    assert (result.kind, result.samples, result.images) == ("images", 60, 60)
    assert result.classes == {"bird": 20, "cat": 20, "dog": 20}
    assert result.most_frequent == 1 / 3
    for method in ("linear", "neighbors"):
        found = shares(result, method)
        assert list(found) == ["P3", "P4", "P5", "joined"]
        assert found["P3"] < 0.5
        assert 0.5 < found["P4"] < 0.85
        assert found["P5"] == 1
    rows = {row.name: row for row in result.rows}
    assert (rows["P5"].channels, rows["joined"].channels) == (4, 12)
    assert rows["P5"].linear.low == pytest.approx(60 / (60 + 1.96**2), abs=1e-4)
    assert all(row.linear.low <= row.linear.share <= row.linear.high for row in result.rows)
    assert fpnx.probe(animals, labels="folders") == result
    assert fpnx.probe(animals, labels="folders", seed=1) != result


def test_vectors_in_temporary_files_give_the_same(
    animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fpnx.probe(animals, labels="folders")
    monkeypatch.setattr(sample_vectors, "MEMORY_BYTES", 0)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert fpnx.probe(animals, labels="folders") == expected
    assert list((tmp_path / "temporary").iterdir()) == []


def test_files_side_by_side_have_the_same_samples(animals: Path, tmp_path: Path, fpnx: Run) -> None:
    import fpnx as package

    with package.open(animals) as store:
        names = [store.paths[i] for i in range(60)][::-1]
        values = store.read("P5")[::-1, :, 0, 0].copy()
    values[7] = np.inf
    stored(tmp_path / "b.h5", {"C5": 3 * values}, names, failed=[3, 4])
    result = package.probe([animals, tmp_path / "b.h5"], labels="folders")
    assert result.samples == 57
    assert "left out: 1 vector with NaN or infinite values" in result.notes
    found = {(row.file, row.name): row.linear for row in result.rows}
    assert found[1, "C5"] == found[0, "P5"]  # the same numbers, times 3, in another order
    code, out, _ = fpnx("probe", "out.h5", "b.h5", "--labels", "folders", "--plot", "levels.png")
    assert code == 0
    assert [line for line in out.splitlines() if line.endswith(".h5")] == ["out.h5", "b.h5"]
    with Image.open(tmp_path / "levels.png") as picture:
        assert picture.size[0] > 600


def test_a_table_of_classes_and_what_is_left_out(animals: Path, tmp_path: Path, fpnx: Run) -> None:
    with package_open(animals) as store:
        lines = [f"{path},{path.split('/')[0]}" for path in store.paths[:50]]
    lines += [f"{store.paths[50]},fish", "no/such.jpg,cat"]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    document = json.loads(fpnx("probe", "out.h5", "--labels", "labels.csv", "--json", "--levels", "P5")[1])
    assert (document["samples"], document["kind"]) == (50, "images")
    assert [row["name"] for row in document["rows"]] == ["P5"]
    assert document["rows"][0]["linear"]["by_size"] == {}
    notes = "\n".join(document["notes"])
    assert "images without labels: 9, such as " in notes
    assert "labels without an image: 1, such as no/such.jpg" in notes
    assert "classes in one image only, which are left out: 1, such as fish" in notes


package_open = fpnx.open
SIDE = 64


def scenes(tmp_path: Path, count: int = 12) -> Mapping[str, Any]:
    """Images of 128 × 64 pixels, whose network inputs have half that size, and their COCO file of two objects each.

    Channel 0 of P3 is 1 on cells of class 1, and there is padding to the right that is 100 everywhere.
    """
    maps = np.full((count, 2, 4, 12), 100.0)
    images, annotations = [], []
    for i in range(count):
        images.append({"id": i, "file_name": f"{i}.png", "width": 128, "height": 64})
        maps[i, :, :, :8] = 0.1 * RANDOM.normal(size=(2, 4, 8))
        for half in range(2):
            kind = int(RANDOM.integers(2)) if i else half
            box = [64 * half + 16, 16, 32, 32]  # 2 × 2 cells of P3
            maps[i, 0, 1:3, 4 * half + 1 : 4 * half + 3] += 9 * kind
            left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
            annotations.append(
                {"id": 2 * i + half, "image_id": i, "category_id": 5 + kind, "bbox": box, "area": 1024, "iscrowd": 0,
                 "segmentation": [[left, top, right, top, right, bottom, left, bottom]]}
            )  # fmt: skip
    annotations.append({**annotations[0], "id": 999, "iscrowd": 1})
    categories = [{"id": 5, "name": "round"}, {"id": 6, "name": "square"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return {"P3": maps}


@pytest.fixture
def scene_file(tmp_path: Path) -> Path:
    return stored(tmp_path / "out.h5", scenes(tmp_path), input_sizes=[(32, 64)] * 12, source_sizes=[(64, 128)] * 12)


def test_boxes(scene_file: Path, tmp_path: Path) -> None:
    result = fpnx.probe(scene_file, labels=str(tmp_path / "instances.json"))
    assert (result.kind, result.samples, result.images) == ("boxes", 24, 12)
    assert set(result.classes) == {"round", "square"}
    assert shares(result) == shares(result, "neighbors") == {"P3": 1}
    assert result.rows[0].linear.by_size["medium"] == 1  # 32² pixels
    assert np.isnan(result.rows[0].linear.by_size["small"])
    assert "left out: 1 region of many objects (crowds)" in result.notes


def test_a_box_has_the_average_over_it(scene_file: Path, tmp_path: Path) -> None:
    boxes = np.array([[16, 16, 48, 48], [0, 0, 128, 64], [100, 40, 128, 64], [17.5, 3, 90.1, 33.3]])
    samples = Samples("boxes", np.zeros(4, np.int64), np.zeros(4, np.int64), ("a",), boxes / [128, 64, 128, 64],
                      np.ones(4), ())  # fmt: skip
    with fpnx.open(scene_file) as store:
        vectors = SampleVectors(store, ["P3"], np.array([0]), samples, None, Listener())
        found = vectors.features(["P3"], np.arange(4)).rows(np.arange(4))
        valid = store[0]["P3"][:, :, :8]
    np.testing.assert_allclose(found[0], valid[:, 1:3, 1:3].mean(axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(found[1], valid.mean(axis=(1, 2)), atol=1e-5)
    expected = roi_align(
        torch.from_numpy(valid)[None], [torch.tensor(boxes / 2, dtype=torch.float32)], (1, 1), 1 / 8, aligned=True
    )
    np.testing.assert_allclose(found, expected[:, :, 0, 0].numpy(), atol=1e-5)
    assert abs(found).max() < 20  # without padding


def test_pixels_have_the_cell_over_them(scene_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    result = fpnx.probe(scene_file, labels=str(tmp_path / "instances.json"), task="semantic", cells=30)
    assert (result.kind, result.samples) == ("pixels", 360)
    assert set(result.classes) == {"background", "round", "square"}
    row = result.rows[0]
    assert row.neighbors.share > result.most_frequent  # squares are found; round ones look like the background
    places = np.array([[(17 + 0.5) / 128, 0.5 / 64], [127.5 / 128, 63.5 / 64], [(40 + 0.5) / 128, (30 + 0.5) / 64]])
    samples = Samples("pixels", np.zeros(3, np.int64), np.zeros(3, np.int64), ("a",), places, None, ())
    with fpnx.open(scene_file) as store:
        vectors = SampleVectors(store, ["P3"], np.array([0]), samples, None, Listener())
        found = vectors.features(["P3"], np.arange(3)).rows(np.arange(3))
        maps = store[0]["P3"]
    # Pixel 17 is at 8.75 of the input, in cell 1; pixel (40, 30) in cell (20 / 8, 15 / 8).
    np.testing.assert_array_equal(found, np.stack([maps[:, 0, 1], maps[:, 3, 7], maps[:, 1, 2]]))


def test_png_masks(scene_file: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    with fpnx.open(scene_file) as store:
        for i in range(12):
            values = np.kron(store[i]["P3"][0, :, :8] > 4, np.ones((16, 16))).astype(np.uint8)
            values[:, :8] = 255
            Image.fromarray(values).save(tmp_path / "masks" / f"{i}.png")
        samples = labelled_samples(store, np.arange(12), ProbeConfig(labels=str(tmp_path / "masks"), cells=20))
    assert len(samples) == 240
    assert samples.places is not None
    assert (samples.places[:, 0] > 8 / 128).all()  # 255 is no class
    result = fpnx.probe(scene_file, labels=str(tmp_path / "masks"))
    assert shares(result) == {"P3": 1}
    assert set(result.classes) == {"0", "1"}


def test_the_level_of_a_boxs_size(tmp_path: Path) -> None:
    numbers = np.zeros((1, 2))
    file = stored(tmp_path / "out.h5", {"P3": numbers, "P4": numbers, "P5": numbers}, source_sizes=[(400, 600)])
    # Eq. 1 in pixels of an image of 800 × 1200: sides 56, 111, 112, 224, 448, 2000 are of P2, P2, P3, P4, P5, P7.
    sides = np.array([28, 55.5, 56, 112, 224, 1000])
    samples = Samples("boxes", np.zeros(6, np.int64), np.zeros(6, np.int64), ("a",), np.zeros((6, 4)), sides, ())
    with fpnx.open(file) as store:
        found = by_size_levels(store, np.array([0]), samples, ("P3", "P4", "P5"))
    assert found.tolist() == [0, 0, 0, 1, 2, 2]


def test_boxes_of_several_levels_get_a_row_by_size(tmp_path: Path) -> None:
    maps = scenes(tmp_path)["P3"]
    features = {"P3": maps, "P4": RANDOM.normal(size=(12, 2, 2, 6))}
    file = stored(tmp_path / "out.h5", features, input_sizes=[(32, 64)] * 12, source_sizes=[(64, 128)] * 12)
    result = fpnx.probe(file, labels=str(tmp_path / "instances.json"))
    assert [row.name for row in result.rows] == ["P3", "P4", "joined", "by size"]
    # Boxes of 32 pixels in images of 64 are 400 of 800: of P4, which tells nothing.
    assert shares(result)["by size"] == shares(result)["P4"] < 0.9 < shares(result)["P3"]


def test_mistakes_are_one_line(animals: Path, tmp_path: Path, fpnx: Run) -> None:
    scenes(tmp_path)
    (tmp_path / "one.csv").write_text("path,label\n" + "".join(f"cat/{i}.jpg,cat\n" for i in range(0, 30, 3)))
    sizes = [(64, 128)] * 12
    animals_named = [f"{kind}/{i}.jpg" for kind in "ab" for i in range(5)]
    stored(tmp_path / "nan.h5", {"P3": np.full((10, 2), np.nan), "P4": np.ones((10, 2))}, animals_named)
    stored(tmp_path / "pooled.h5", {"P3": np.zeros((12, 2, 1, 1))}, pool="avg", source_sizes=sizes)
    stored(tmp_path / "few.h5", {"P3": np.zeros((4, 2))}, ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"])
    for arguments, message in [
        (["out.h5"], "no labels: name a label file or folder with --labels"),
        (["out.h5", "--labels", "missing.json"], "missing.json"),
        (["out.h5", "--labels", "folders", "--task", "detection"], "folders as classes can be used for classification"),
        (["out.h5", "--labels", "one.csv"], "1 class in two images or more"),
        (["few.h5", "--labels", "folders"], "4 images and 5 folds: take fewer --folds"),
        (["pooled.h5", "--labels", "instances.json"], "pooled.h5 is pooled, so that boxes have no place in it"),
        (["out.h5", "--labels", "folders", "--l2", "0"], "l2 0.0: take a number above 0"),
        (["out.h5", "--labels", "folders", "--plot", "a.jpg"], "take a name that ends in .png"),
        (["out.h5", "--labels", "folders", "--levels", "C2"], "no level 'C2' in out.h5"),
    ]:
        code, _, error = fpnx("probe", *arguments)
        assert code == 2, arguments
        assert message in error
        assert len(error.splitlines()) == 1
    with pytest.raises(FpnxError, match="every vector has NaN or infinite values at one of the levels: leave"):
        package_probe("nan.h5", labels="folders")
    with pytest.raises(FpnxError, match="no files"):
        package_probe([], labels="folders")


package_probe = fpnx.probe
