"""`extract --boxes`: features of boxes in a file, in batches, resumed, in shards, of images that failed."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import MultiScaleRoIAlign

import fpnx
from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.extraction.run import run_extraction
from fpnx.extraction.upload import resolve_destination
from fpnx.inference.engine import Engine, Features, SplittingEngine
from fpnx.inference.engine_cache import EngineCache
from fpnx.inference.region_pooling import joined_regions
from fpnx.store.reader import DONE, FAILED
from tests.helpers.boxes import CLASSES, coco_file, labelled_pictures, random_boxes
from tests.helpers.files import noise_image
from tests.helpers.process import forked

TINY: dict[str, Any] = {"backbone": "mobilenet_v2", "weights": "random", "channels": 8, "device": "cpu"}
COUNTS = (3, 0, 7, 1, 2, 4, 5)
SIZES = ((200, 320), (320, 200), (240, 240))


class Messages(Listener):
    def __init__(self) -> None:
        self.lines = list[str]()

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "pictures"
    labelled_pictures(folder, COUNTS, SIZES)
    return folder


@pytest.fixture(scope="module")
def cache() -> EngineCache:
    """One model for all runs that differ in their images and batches only."""
    return EngineCache()


def run(
    cache: EngineCache, pictures: Path, output: Path, listener: Listener | None = None, **options: Any
) -> fpnx.Result:
    """An extraction of the regions of `pictures`, which are not resized."""
    every: dict[str, Any] = {**TINY, "boxes": pictures.with_suffix(".json"), "size": "native", **options}
    config = ExtractConfig(**every)
    return run_extraction(
        [pictures], resolve_destination(output, config), config, listener=listener, engine_cache=cache
    )


@pytest.fixture(scope="module")
def made(pictures: Path, cache: EngineCache) -> Path:
    """The file of an uninterrupted run of images of several sizes."""
    output = pictures.parent / "made.h5"
    run(cache, pictures, output)
    return output


def boxes_of(labels: Path) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Boxes and class ids of each image of a COCO file, without fpnx."""
    document = json.loads(labels.read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    found: dict[str, list[tuple[np.ndarray, int]]] = {name: [] for name in names.values()}
    for each in document["annotations"]:
        x, y, width, height = each["bbox"]
        found[names[each["image_id"]]].append((np.array([x, y, x + width, y + height]), each["category_id"]))
    return found


def test_features_are_those_of_torchvision_on_the_levels_of_the_model(pictures: Path, made: Path) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", channels=8, size="native")
    pooling = MultiScaleRoIAlign(list(model.levels), 7, sampling_ratio=2)
    expected, levels = boxes_of(pictures.with_suffix(".json")), set[int]()
    with fpnx.open(made) as store:
        assert [len(item.regions) for item in store] == list(COUNTS)
        for item in store:
            pixels = model.transform(pictures / item.path)[None]
            y, x = (new / old for new, old in zip(item.input_size, item.source_size, strict=True))
            boxes = np.array([box for box, _ in expected[item.path]]).reshape(-1, 4)
            rois = torch.from_numpy(boxes * [x, y, x, y]).float()
            with torch.no_grad():
                maps = OrderedDict(model(pixels))
                features = pooling(maps, [rois], [tuple(pixels.shape[2:])]).numpy()
            np.testing.assert_allclose(item.regions.box, boxes, atol=1e-9)
            assert item.regions.label.tolist() == [label for _, label in expected[item.path]]
            np.testing.assert_allclose(item.regions.features, features, atol=1e-5)
            levels |= set(item.regions.level.tolist())
    assert len(levels) >= 3, "boxes of several sizes"


def test_rows_stand_together_in_the_order_of_images(made: Path) -> None:
    with fpnx.open(made) as store:
        regions = store.regions
        assert regions.image.tolist() == np.repeat(range(len(COUNTS)), COUNTS).tolist()
        assert regions.names == CLASSES
        assert regions.features.shape == (sum(COUNTS), 8, 7, 7)
        third = regions.rows(2)
        assert (third.start, third.stop) == (3, 10)
        np.testing.assert_array_equal(regions.features[third], store[2].regions.features)
        np.testing.assert_array_equal(regions.box[third], store["02.png"].regions.box)


def test_maps_are_not_stored(made: Path) -> None:
    with fpnx.open(made) as store:
        assert store.has_regions
        with pytest.raises(FpnxError, match=r"no maps of P3 in .*made\.h5, which has regions: in Python"):
            store[0]["P3"]
        with pytest.raises(FpnxError, match="no maps of P3"):
            store.read("P3", [0])
    with h5py.File(made) as file:
        assert {level.shape[2:] for group in file["pyramids"].values() for level in group.values()} == {(0, 0)}
        assert file.attrs["format_version"] == 1


def test_the_file_verifies_also_against_its_images(pictures: Path, made: Path) -> None:
    found = fpnx.verify(made, against=pictures, device="cpu")
    assert (found.problems, found.compared) == ((), len(COUNTS))
    assert found.values == sum(COUNTS) * 8 * 49
    assert found.largest_difference < 1e-4


def damage(made: Path, copy: Path, name: str, index: Any, value: Any) -> tuple[str, ...]:
    """The problems of a copy with one value changed."""
    copy.write_bytes(made.read_bytes())
    with h5py.File(copy, "r+") as file:
        file[name][index] = value
    return fpnx.verify(copy).problems


def test_damage_is_found(pictures: Path, made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.h5"
    assert damage(made, copy, "regions/level", 0, 6) == ("00.png: a region of a level that the file does not have",)
    assert damage(made, copy, "regions/box", (3, 1), np.nan) == ("02.png: a box that is not finite",)
    assert damage(made, copy, "regions/label", 3, 4) == ("02.png: a region of a class without a name",)
    found = damage(made, copy, "regions/features", (4, 0, 0), np.inf)
    assert found == ("02.png: not as finite in its regions as the file says",)
    with pytest.raises(FpnxError, match="/regions/image is not in order"):
        damage(made, copy, "regions/image", 0, 5)
    copy.write_bytes(made.read_bytes())
    with h5py.File(copy, "r+") as file:
        file["regions/features"][5] += 1
    assert "02.png: computed again it differs" in fpnx.verify(copy, against=pictures, device="cpu").problems[0]


def same_regions(ours: Path, theirs: Path) -> None:
    with h5py.File(ours) as one, h5py.File(theirs) as other:
        for name in ("image", "box", "level", "label"):
            np.testing.assert_array_equal(one["regions"][name][:], other["regions"][name][:])
        np.testing.assert_allclose(one["regions/features"][:], other["regions/features"][:], atol=1e-5)
        assert one["regions"].attrs["names"] == other["regions"].attrs["names"]
        for name in ("path", "status", "source_size", "error"):
            np.testing.assert_array_equal(one["images"][name][:], other["images"][name][:])
        assert one.attrs["fingerprint"] == other.attrs["fingerprint"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_matter(pictures: Path, made: Path, cache: EngineCache, tmp_path: Path, batch_size: int) -> None:
    run(cache, pictures, tmp_path / "out.h5", batch_size=batch_size, workers=1, cpus=1)
    same_regions(tmp_path / "out.h5", made)


def test_shards_are_read_as_one_and_merged(pictures: Path, made: Path, cache: EngineCache, tmp_path: Path) -> None:
    for i in range(8):  # more than images, so that one is empty; another has no boxes
        run(cache, pictures, tmp_path / "out.h5", shard=f"{i}/8")
    pattern = str(tmp_path / "out.shard-*.h5")
    with fpnx.open(pattern) as joined, fpnx.open(made) as whole:
        assert joined.regions.image.tolist() == whole.regions.image.tolist()
        np.testing.assert_allclose(joined.regions.features[2:12], whole.regions.features[2:12], atol=1e-5)
        np.testing.assert_allclose(joined["05.png"].regions.features, whole["05.png"].regions.features, atol=1e-5)
    assert fpnx.verify(pattern).problems == ()
    fpnx.merge(tmp_path / "merged.h5", pattern)
    same_regions(tmp_path / "merged.h5", made)
    assert fpnx.verify(tmp_path / "merged.h5").problems == ()


def test_labels_are_matched_with_the_whole_list_in_every_shard(cache: EngineCache, tmp_path: Path) -> None:
    """`0.png` fits an image in each of two folders, so neither shard may take its boxes."""
    sizes = {"0.png": (64, 64), "b/1.png": (64, 64)}
    for name in ("a/0.png", "b/0.png", "b/1.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(1, (64, 64)).save(tmp_path / "set" / name)
    labels = coco_file(tmp_path / "l.json", {name: random_boxes(i, 2, (64, 64)) for i, name in enumerate(sizes)}, sizes)
    counts = []
    for i in range(3):
        heard = Messages()
        result = run(cache, tmp_path / "set", tmp_path / "out.h5", heard, boxes=labels, shard=f"{i}/3")
        assert f"boxes {labels}: 1 name not of one image for certain, such as 0.png" in heard.lines
        with fpnx.open(str(result.output)) as store:
            counts.append(len(store.regions))
    assert counts == [0, 0, 2]


class Interrupts(Listener):
    """Stops the run once some images are done, as a signal does."""

    def __init__(self, done: int) -> None:
        self.done = done

    def progress(self, what: str, done: int, total: int) -> None:
        if what == "images" and done >= self.done:
            os.kill(os.getpid(), signal.SIGINT)
            self.done = total + 1


def test_an_interrupted_run_is_resumed_to_the_same_file(
    pictures: Path, made: Path, cache: EngineCache, tmp_path: Path
) -> None:
    output, options = tmp_path / "out.h5", {"batch_size": 1, "commit_every": 0.0}
    with pytest.raises(Interrupted):
        run(cache, pictures, output, Interrupts(3), **options)
    with fpnx.open(tmp_path / "out.h5.part") as store:
        done = int((store.status == DONE).sum())
        assert 0 < done < len(COUNTS)
        with fpnx.open(made) as whole:
            for item in store:
                np.testing.assert_allclose(item.regions.features, whole[item.path].regions.features, atol=1e-5)
    result = run(cache, pictures, output, resume=True, **options)
    assert result.computed == len(COUNTS) - done
    same_regions(output, made)


def test_a_killed_run_is_resumed_to_the_same_file(
    pictures: Path, made: Path, cache: EngineCache, tmp_path: Path
) -> None:
    line = "--backbone mobilenet_v2 --weights random --channels 8 --device cpu --size native"
    timing = ["--boxes", str(pictures.with_suffix(".json")), "--batch-size", "1", "--commit-every", "0"]
    output, part = tmp_path / "out.h5", tmp_path / "out.h5.part"
    done = 0
    with forked("extract", pictures, "-o", output, *line.split(), *timing, cwd=tmp_path) as process:
        while process.poll() is None and not done:
            if part.exists():
                with fpnx.open(part) as store:
                    done = int((store.status == DONE).sum())
        process.kill()
    if not output.exists():
        with fpnx.open(part) as store, fpnx.open(made) as whole:
            for item in store:
                np.testing.assert_allclose(item.regions.features, whole[item.path].regions.features, atol=1e-5)
    run(cache, pictures, output, resume=True)
    same_regions(output, made)


def test_batches_that_do_not_fit_into_memory_are_halved_with_their_boxes(pictures: Path, made: Path) -> None:
    class Limited(Engine):
        def __call__(self, pixels: Sequence[Any], boxes: Sequence[np.ndarray] | None = None) -> Features:
            if len(pixels) > 1:
                raise MemoryError
            return super().__call__(pixels, boxes)

    model = fpnx.create_model("mobilenet_v2", weights="random", channels=8, size="native")
    engine = Limited(model, model.recipe, ExtractConfig(boxes="labels", size="native"), torch.device("cpu"))
    with fpnx.open(made) as store:
        items = [store[0], store[3], store[6]]  # of one size
        pixels = [np.asarray(Image.open(pictures / item.path).convert("RGB")) for item in items]
        results = list(SplittingEngine(engine, lambda text: None)(pixels, [item.regions.box for item in items]))
        assert [(piece.start, piece.stop) for piece, _ in results] == [(0, 1), (1, 2), (2, 3)]
        for item, (_, features) in zip(items, results, strict=True):
            assert features is not None
            joined = joined_regions(features.regions, item.regions.features.shape, "float32")
            np.testing.assert_allclose(joined, item.regions.features, atol=1e-5)


def test_other_boxes_or_another_size_are_another_run(
    pictures: Path, made: Path, cache: EngineCache, tmp_path: Path
) -> None:
    output = tmp_path / "out.h5"
    output.write_bytes(made.read_bytes())
    labels = tmp_path / "labels.json"
    labels.write_text(pictures.with_suffix(".json").read_text())
    assert run(cache, pictures, output, boxes=labels, resume=True).computed == 0  # the same boxes in another file
    with pytest.raises(FpnxError, match=r"another config \(regions\.size 7x7 → 3x3\)"):
        run(cache, pictures, output, boxes=labels, roi_size=3, resume=True)
    document = json.loads(labels.read_text())
    document["annotations"][0]["bbox"][2] *= 0.9
    labels.write_text(json.dumps(document))
    with pytest.raises(FpnxError, match=r"another config \(regions\.boxes [0-9a-f]{12}… → [0-9a-f]{12}…\)"):
        run(cache, pictures, output, boxes=labels, resume=True)
    with pytest.raises(FpnxError, match=r"another config \(regions "):
        run(cache, pictures, output, boxes=None, resume=True)


def test_failed_images_are_marked(cache: EngineCache, tmp_path: Path) -> None:
    labelled_pictures(tmp_path / "set", (2, 3, 1))
    (tmp_path / "set" / "01.png").write_bytes((tmp_path / "set" / "01.png").read_bytes()[:200])
    result = run(cache, tmp_path / "set", tmp_path / "out.h5", size=64)
    assert [path for path, _ in result.failed] == ["01.png"]
    with fpnx.open(tmp_path / "out.h5") as store:
        rows = store.regions.rows(1)
        assert (rows.start, rows.stop, store.status.tolist()) == (2, 5, [DONE, FAILED, DONE])
        assert np.isnan(store.regions.features[rows]).all()
        assert np.isnan(store.regions.box[rows]).all()
        assert store.regions.level[rows].tolist() == [0, 0, 0]
        assert np.isfinite(store.regions.features[:2]).all()
    assert fpnx.verify(tmp_path / "out.h5").problems == ()


def test_images_without_a_header_have_no_rows(cache: EngineCache, tmp_path: Path) -> None:
    labelled_pictures(tmp_path / "set", (2, 3, 1))
    (tmp_path / "set" / "01.png").write_bytes(b"no picture")
    run(cache, tmp_path / "set", tmp_path / "out.h5")
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store.regions.image.tolist() == [0, 0, 2]
    assert fpnx.verify(tmp_path / "out.h5").problems == ()


def test_boxes_follow_the_upright_image(cache: EngineCache, tmp_path: Path) -> None:
    """A photograph that EXIF turns has the features of the same picture turned in its pixels."""
    (tmp_path / "set").mkdir()
    upright = noise_image(3, (96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise
    upright.save(tmp_path / "set" / "a.png")
    upright.rotate(90, expand=True).save(tmp_path / "set" / "b.png", exif=exif)
    box = random_boxes(0, 4, (64, 96))
    names = ("a.png", "b.png")
    labels = coco_file(tmp_path / "l.json", dict.fromkeys(names, box), dict.fromkeys(names, (64, 96)))
    run(cache, tmp_path / "set", tmp_path / "out.h5", boxes=labels)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store[0].source_size == store[1].source_size == (64, 96)
        np.testing.assert_allclose(store[0].regions.features, store[1].regions.features, atol=1e-5)


def test_shares_of_the_image_are_boxes_too(cache: EngineCache, tmp_path: Path) -> None:
    """YOLO's files have shares; the boxes in the file are in pixels."""
    boxes = labelled_pictures(tmp_path / "set", (2, 3))
    (tmp_path / "labels").mkdir()
    for (name, of_image), (height, width) in zip(boxes.items(), [(64, 96), (96, 64)], strict=True):
        shares = of_image / [width, height, width, height]
        lines = [f"0 {(a + c) / 2} {(b + d) / 2} {c - a} {d - b}" for a, b, c, d in shares.tolist()]
        (tmp_path / "labels" / name).with_suffix(".txt").write_text("\n".join(lines))
    run(cache, tmp_path / "set", tmp_path / "coco.h5")
    run(cache, tmp_path / "set", tmp_path / "yolo.h5", boxes=tmp_path / "labels")
    with fpnx.open(tmp_path / "coco.h5") as coco, fpnx.open(tmp_path / "yolo.h5") as yolo:
        np.testing.assert_allclose(yolo.regions.box, coco.regions.box, atol=1e-4)
        np.testing.assert_allclose(yolo.regions.features[:], coco.regions.features[:], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"levels": "C2-C5", "roi_size": 1}, (1280, 1, 1)),
        ({"levels": "C4", "roi_size": "avg"}, (96, 1, 1)),
        ({"pyramid": "image", "tap": "C3", "levels": "P3-P4", "roi_size": (2, 3)}, (32, 2, 3)),
        ({"pyramid": "bifpn", "size": 128, "dtype": "float16"}, (8, 7, 7)),
    ],
    ids=["taps", "one tap", "image pyramid", "bifpn"],
)
def test_every_pyramid_has_regions(
    pictures: Path, tmp_path: Path, options: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    every: dict[str, Any] = {**TINY, "size": 64, **options}
    if "levels" in options:
        del every["channels"]
    fpnx.extract(pictures, tmp_path / "out.h5", boxes=pictures.with_suffix(".json"), **every)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store.regions.features.shape == (sum(COUNTS), *shape)
        assert store.regions.features.dtype == every.get("dtype", "float32")
        assert (np.abs(store.regions.features[:]).max(axis=(1, 2, 3)) > 0).all()
    assert fpnx.verify(tmp_path / "out.h5", against=pictures, device="cpu").problems == ()


def test_the_image_pyramid_pools_from_its_scaled_images(pictures: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pyramid": "image", "tap": "C3", "levels": "P2-P3", "size": 128}
    fpnx.extract(
        pictures, tmp_path / "out.h5", boxes=pictures.with_suffix(".json"),
        backbone="mobilenet_v2", weights="random", device="cpu", **options,
    )  # fmt: skip
    model = fpnx.create_model("mobilenet_v2", weights="random", **options)
    pooling = MultiScaleRoIAlign(["P2", "P3"], 7, sampling_ratio=2)
    with fpnx.open(tmp_path / "out.h5") as store:
        item = store[2]
        maps = {name: values[None] for name, values in model.features(pictures / item.path).items()}
        scale = np.array([128 / item.source_size[1], 128 / item.source_size[0]] * 2)
        rois = torch.from_numpy(item.regions.box * scale).float()
        expected = pooling(OrderedDict(maps), [rois], [(128, 128)])
        np.testing.assert_allclose(item.regions.features, expected.numpy(), atol=1e-5)
        assert set(item.regions.level.tolist()) <= {2, 3}


def test_what_is_left_out_is_said(cache: EngineCache, tmp_path: Path) -> None:
    boxes = labelled_pictures(tmp_path / "set", (2, 3, 0))
    document = json.loads((tmp_path / "set.json").read_text())
    document["annotations"][0]["iscrowd"] = 1
    document["annotations"][1]["bbox"] = [500.0, 500.0, 20.0, 20.0]
    document["annotations"][2]["bbox"][0] = -5.0
    document["annotations"][3]["bbox"][2] = 0.0
    document["images"].append({"id": 99, "file_name": "gone.png", "height": 64, "width": 64})
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(document))
    heard = Messages()
    result = run(cache, tmp_path / "set", tmp_path / "out.h5", heard, boxes=labels)
    said = [line.removeprefix(f"boxes {labels}: ") for line in heard.lines if str(labels) in line]
    assert said == [
        "1 empty boxes left out, such as annotation 1001 of 01.png",
        "1 region of many objects (iscrowd) left out",
        "1 name not among the images, such as gone.png",
        "1 image without boxes",
    ]
    assert result.image_notes == {"box_outside": 1}
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store.regions.image.tolist() == [0, 1, 1]
        assert store.regions.level.tolist()[0] == 0
        assert np.isnan(store.regions.box[0]).all()
        assert not store.regions.features[0].any()
        x1, y1, x2, y2 = boxes["01.png"][0].tolist()
        np.testing.assert_allclose(store.regions.box[1], [0, y1, x2 - x1 - 5, y2], atol=1e-9)  # cut at the edge
    assert fpnx.verify(tmp_path / "out.h5", against=tmp_path / "set", device="cpu").problems == ()


def test_values_that_are_not_finite_are_counted_by_level(pictures: Path, tmp_path: Path) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", channels=8, levels="P2-P3", size=64)
    state = model.state_dict()
    name = next(name for name in state if name.startswith("fpn.") and "layer_blocks.0" in name and "bias" in name)
    state[name][0] = 1e6
    model.load_state_dict(state)
    options: dict[str, Any] = {"boxes": pictures.with_suffix(".json"), "device": "cpu", "dtype": "float16"}
    result = fpnx.extract(pictures, tmp_path / "out.h5", backbone=model, size=64, **options)
    assert (result.nonfinite, result.too_large) == ({"P2": sum(COUNTS) * 49, "P3": 0}, ("P2",))
    assert fpnx.verify(tmp_path / "out.h5").problems == ()
    strict = fpnx.extract(pictures, tmp_path / "strict.h5", backbone=model, size=64, strict=True, **options)
    assert strict.stopped is not None
    assert re.search(r"\(NaN or infinite values: \d+ in P2; values beyond ±65504", strict.stopped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "png"}, "boxes give a file of features: leave out --format png"),
        ({"pool": "avg"}, "pool avg is for maps, and with boxes none are stored: take --roi-size instead"),
        ({"roi_size": "0"}, "roi size '0': take a number of cells such as 7"),
        ({"roi_size": "7x999"}, "roi size '7x999': take"),
        ({"levels": "C3,P3"}, "levels C3 and P3 have one stride"),
        ({"boxes": "gone.json"}, "labels gone.json: there is no such file"),
    ],
)
def test_what_does_not_go_together_is_refused(
    pictures: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    every: dict[str, Any] = {**TINY, "boxes": pictures.with_suffix(".json"), "size": 64, **options}
    with pytest.raises(FpnxError) as caught:
        fpnx.extract(pictures, tmp_path / "out.h5", **every)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_size_without_boxes_is_refused() -> None:
    with pytest.raises(FpnxError, match=r"roi size 3x3 is for boxes: give --boxes LABELS beside it"):
        ExtractConfig(roi_size=3)


def test_labels_without_boxes_of_these_images_are_refused(pictures: Path, tmp_path: Path) -> None:
    labels = coco_file(tmp_path / "l.json", {"99.png": random_boxes(0, 2, (64, 64))}, {"99.png": (64, 64)})
    with pytest.raises(FpnxError, match="none of the 7 images has labels"):
        fpnx.extract(pictures, tmp_path / "out.h5", boxes=labels, size=64, **TINY)


def test_without_boxes_the_config_of_a_file_has_no_regions(pictures: Path, tmp_path: Path) -> None:
    fpnx.extract(pictures, tmp_path / "out.h5", size=64, **TINY)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert "regions" not in store.config
        assert not {"boxes", "roi_size"} & set(store.provenance.options or {})
        assert not store.has_regions
        with pytest.raises(FpnxError, match=r"has no regions: fpnx extract --boxes LABELS makes a file of them"):
            store.regions  # noqa: B018
