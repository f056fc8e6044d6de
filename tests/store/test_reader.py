"""The HDF5 file: its datasets and attributes, and the reader."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import fpnx
from fpnx.core.config import fingerprint
from fpnx.core.errors import FpnxError, NotDoneError, StoreError
from fpnx.store.reader import DONE, Box, Store, different_fields, valid_extent
from fpnx.store.writer import Writer, part_path
from fpnx.visualization.image_maps import find_photo
from tests.helpers.files import noise_image
from tests.helpers.layouts import LEVELS, PROVENANCE, features_of, layout_of

OPTIONS: dict[str, Any] = {"weights": "random", "backbone": "mobilenet_v2", "channels": 8}


@pytest.fixture
def made(photos: Path, tmp_path: Path) -> Path:
    (photos / "bad.jpg").write_bytes(b"")
    fpnx.extract(photos, tmp_path / "made.h5", size="64x96", levels="C3,P3-P6", **OPTIONS)
    return tmp_path / "made.h5"


@pytest.fixture
def store(made: Path) -> Iterator[Store]:
    with fpnx.open(made) as opened:
        yield opened


def test_datasets_and_attributes_of_a_file(made: Path, photos: Path) -> None:
    with h5py.File(made) as file:
        assert (file.attrs["format"], file.attrs["format_version"]) == ("fpnx", 1)
        assert fingerprint(json.loads(file.attrs["config"])) == file.attrs["fingerprint"]
        assert file.attrs["root"] == str(photos)
        provenance = json.loads(file.attrs["provenance"])
        assert provenance["weights"]["pyramid"]["trained"] is False
        assert provenance["versions"]["torch"]
        images = {name: (dataset.shape, str(dataset.dtype)) for name, dataset in file["images"].items()}
        assert images == {
            "path": ((7,), "object"),
            "group": ((7,), "object"),
            "bytes": ((7,), "int64"),
            "mtime_ns": ((7,), "int64"),
            "source_size": ((7, 2), "int32"),
            "input_size": ((7, 2), "int32"),
            "status": ((7,), "uint8"),
            "error": ((7,), "|S240"),
            "row": ((7,), "int64"),
            "digest": ((7, 16), "uint8"),
        }
        assert file["stats/nonfinite"].shape == (7, 5)
        assert list(file["pyramids"]) == ["64x96"]
        level = file["pyramids/64x96/P3"]
        assert (level.shape, level.dtype, dict(level.attrs)["stride"], level.attrs["channels"]) == (
            (7, 8, 8, 12), np.float32, 8, 8,
        )  # fmt: skip
        assert "padding" in level.attrs["valid"]
        assert isinstance(file.get("P3", getlink=True), h5py.SoftLink)
        assert np.array_equal(file["P6"][:], level.file["pyramids/64x96/P6"][:], equal_nan=True)
        plist = level.id.get_create_plist()
        assert plist.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
        assert plist.get_layout() == h5py.h5d.CONTIGUOUS
        assert file["images/bytes"][0] == (photos / "a.jpg").stat().st_size


def test_digests_are_those_of_the_image_files(made: Path, photos: Path) -> None:
    with fpnx.open(made) as store:
        done = [path for path in store.paths if path != "bad.jpg"]
        expected = {path: hashlib.sha256((photos / path).read_bytes()).digest()[:16] for path in done}
        assert {path: digest.tobytes() for path, digest in zip(store.paths, store.digests, strict=True)} == {
            **expected, "bad.jpg": bytes(16),
        }  # fmt: skip
    with h5py.File(made, "r+") as file:
        del file["images/digest"]  # as in a file of an earlier version
    with fpnx.open(made) as store:
        assert not store.digests.any()
        assert store.digests.shape == (7, 16)


def test_reading(store: Store, photos: Path) -> None:
    assert store.levels == ("C3", "P3", "P4", "P5", "P6")
    assert len(store) == 7
    assert [item.path for item in store] == ["a.jpg", "b.JPG", "below/a.jpg", "below/e.jpeg", "c.png", "d.webp"]
    assert store["below/a.jpg"].index == store[3].index == store[-4].index == 3
    assert store[b"a.jpg"].path == "a.jpg"
    assert "a.jpg" in store
    assert "bad.jpg" in store
    assert "nothing.jpg" not in store
    item = store["b.JPG"]
    assert (item.source_size, item.input_size) == ((96, 64), (64, 96))
    assert item["C3"].shape == (32, 8, 12)
    assert item["P6"].shape == (8, 1, 2)
    assert store.stride("P6") == 64
    with pytest.raises(NotDoneError, match=r"bad\.jpg failed: empty file"):
        store["bad.jpg"]
    with pytest.raises(LookupError, match="holds 7 other images"):
        store["nothing.jpg"]
    with pytest.raises(IndexError):
        store[7]
    with pytest.raises(FpnxError, match="it has C3, P3"):
        item["P2"]


def test_an_image_is_found_by_a_name_in_another_normalisation(photos: Path, tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"  # as typed, and as macOS writes into archives
    noise_image(0, (40, 30)).save(photos / decomposed)
    for shard in ("0/2", "1/2"):
        fpnx.extract(photos, tmp_path / "out.h5", size=64, levels="P4", shard=shard, **OPTIONS)
    for path in (tmp_path / "out.shard-00000-of-00002.h5", tmp_path / "out.shard-*.h5"):
        with fpnx.open(path) as store:
            if decomposed not in store.paths:
                continue
            assert store[composed].path == store[decomposed].path == decomposed
            assert composed in store
            with pytest.raises(NotDoneError, match=r"caf\u00e8\.png is not in"):
                store["caf\u00e8.png"]
    fpnx.extract(photos, tmp_path / "out.h5", size=64, levels="P4", **OPTIONS)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert store[composed].path == decomposed
    (photos / decomposed).rename(photos / composed)  # as after a copy to another disk
    result = fpnx.verify(tmp_path / "out.h5", against=photos, sample=20)
    assert (result.problems, result.compared) == ((), 7)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert find_photo(store[composed]).picture is not None


def test_boxes(store: Store) -> None:
    item = store["b.JPG"]  # 64 wide, 96 high, stretched to 96 wide, 64 high
    assert item.box("P3", 0, 0) == Box(0.0, 0.0, 8 * 64 / 96, 8 * 96 / 64)
    assert item.box("P4", 3, 5) == pytest.approx(Box(80 * 64 / 96, 48 * 96 / 64, 64.0, 96.0))
    assert item.box("P6", 0, 1) == Box(64 * 64 / 96, 0.0, 64.0, 96.0)
    with pytest.raises(FpnxError, match="8×12 cells"):
        item.box("P3", 8, 0)


def test_invalid_image_keys_and_cells_are_refused(store: Store) -> None:
    for key in (True, 1.0, None):
        with pytest.raises(TypeError, match=f"image {key!r}: take a stored name or an index"):
            store[key]  # type: ignore[index]
    item = next(iter(store))
    with pytest.raises(TypeError, match=r"cell \(1\.5, 0\): take whole numbers"):
        item.box(store.levels[0], 1.5, 0)  # type: ignore[arg-type]


def test_boxes_tile_the_image(photos: Path, tmp_path: Path) -> None:
    for pool in ("none", "3x2"):
        fpnx.extract(photos, tmp_path / f"{pool}.h5", short_side=72, levels="P3", pool=pool, **OPTIONS)
        with fpnx.open(tmp_path / f"{pool}.h5") as store:
            for item in store:
                height, width = item.valid("P3")
                assert item.box("P3", height - 1, width - 1)[2:] == item.source_size[::-1]
                if pool == "none":
                    for x in range(width - 1):
                        assert item.box("P3", 0, x).right == pytest.approx(item.box("P3", 0, x + 1).left)


def test_reading_from_a_closed_store_is_refused(made: Path) -> None:
    with fpnx.open(made) as store:
        item = store[0]
    with pytest.raises(StoreError, match="has been closed"):
        item["P3"]


def test_unknown_attributes_and_datasets_are_ignored(made: Path) -> None:
    with h5py.File(made, "r+") as file:
        file.attrs["tomorrow"] = "x"
        file["images/labels"] = np.arange(7)
    with fpnx.open(made) as store:
        assert len(list(store)) == 6


def test_a_future_version_is_refused(made: Path) -> None:
    with h5py.File(made, "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(StoreError, match="format version 2, this fpnx reads 1: update fpnx"):
        fpnx.open(made)


@pytest.mark.parametrize("keep", [10, 2000, 20000, 0.5, 0.99])
def test_truncated_files(made: Path, keep: float) -> None:
    content = made.read_bytes()
    made.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(StoreError) as raised:
        fpnx.open(made)
    assert "\n" not in str(raised.value)


def test_names_with_any_bytes_are_kept(photos: Path, tmp_path: Path) -> None:
    names = [b"bad\xff\xfe.jpg", b"new\nline.jpg", "caf\u00e9.jpg".encode(), b"cafe\xcc\x81.jpg", b"[b]x.jpg"]
    for name in names:
        (photos / os.fsdecode(name)).write_bytes((photos / "a.jpg").read_bytes())
    fpnx.extract(photos, tmp_path / "names.h5", size=64, levels="P5", **OPTIONS)
    with fpnx.open(tmp_path / "names.h5") as store:
        for name in names:
            assert os.fsencode(store[name].path) == name
            assert store[os.fsdecode(name)]["P5"].shape == (8, 2, 2)
    with h5py.File(tmp_path / "names.h5") as file:
        read = [os.fsencode(name) for name in file["images/path"].asstr(errors="surrogateescape")]
        assert set(names) < set(read)


@pytest.mark.parametrize(
    ("size", "stride", "shape", "valid"),
    [
        ((800, 1066), 32, (25, 34), (25, 34)),
        ((800, 1060), 8, (100, 136), (100, 133)),
        ((63, 63), 4, (14, 15), (14, 15)),
    ],
)
def test_valid_extent(size: tuple[int, int], stride: int, shape: tuple[int, int], valid: tuple[int, int]) -> None:
    assert valid_extent(size, stride, shape) == valid


def test_different_fields() -> None:
    old = {"seed": 0, "recipe": {"height": 224, "mean": [1]}, "weights": "a" * 64}
    new = {"seed": 1, "recipe": {"height": 225, "mean": [1]}, "weights": "b" * 64, "pool": "avg"}
    differences = different_fields(old, new)
    assert differences == [
        "pool None → avg",
        "recipe.height 224 → 225",
        "seed 0 → 1",
        f"weights {'a' * 12}… → {'b' * 12}…",
    ]


def filled(output: Path, groups: list[str], failed: tuple[int, ...] = (), pending: tuple[int, ...] = ()) -> Path:
    """A file in which image i holds i + 1 in P4; a `.part` where images are pending."""
    layout = layout_of(groups, {i: "no header" for i, group in enumerate(groups) if not group})
    writer = Writer.create(output, layout, PROVENANCE)
    for i in range(len(groups)):
        if i in failed:
            writer.fail(i, f"no {i}")
        elif i not in pending and layout.rows[i] >= 0:
            features = features_of([i], layout.padded_sizes[i] or (0, 0))
            writer.put([i], features, np.array([[7, 7]]), {level: [0] for level in LEVELS})
    if not pending:
        writer.finish()
        return output
    writer.commit()
    writer.close()
    return part_path(output)


def images_of(values: np.ndarray) -> list[int]:
    """Which images `values` of P4 are of; each has one value in all its cells."""
    assert all((value == value.flat[0]).all() for value in values)
    return [int(value.flat[0]) - 1 for value in values]


@pytest.mark.parametrize("packed", [False, True])
def test_reading_many_images(tmp_path: Path, packed: bool) -> None:
    path = filled(tmp_path / "made.h5", ["64x96"] * 9)
    if packed:  # as h5repack does, so that rows are no longer at one place in the file
        with h5py.File(path, "r+") as file:
            values, attributes = file["P4"][:], dict(file["P4"].attrs)
            del file["pyramids/64x96/P4"]
            again = file.create_dataset("pyramids/64x96/P4", data=values, chunks=(2, 2, 4, 6), compression="gzip")
            again.attrs.update(attributes)
    with fpnx.open(path) as store:
        whole = store.read("P4")
        assert (whole.shape, whole.dtype) == ((9, 2, 4, 6), np.float32)
        assert images_of(whole) == list(range(9))
        for indices, expected in (
            ([0, 5, 7], [0, 5, 7]),
            ([7, 0, 5], [7, 0, 5]),
            ([-1, 3, -9], [8, 3, 0]),
            ([4, 4, 2, 4, 3, 3], [4, 4, 2, 4, 3, 3]),
            ([5, 4, 3, 0, 1, 2, 8], [5, 4, 3, 0, 1, 2, 8]),
            (np.array([6, 2], np.uint8), [6, 2]),
            (range(2, 5), [2, 3, 4]),
            (slice(2, 5), [2, 3, 4]),
            (slice(None, None, -2), [8, 6, 4, 2, 0]),
            (slice(-3, 100), [6, 7, 8]),
            (np.arange(9) % 4 == 1, [1, 5]),
            ([True, *[False] * 7, True], [0, 8]),
            ([], []),
            (slice(5, 2), []),
            (np.zeros(9, bool), []),
        ):
            read = store.read("P4", indices)
            assert images_of(read) == expected, indices
            assert read.shape == (len(expected), 2, 4, 6)
            out = np.full_like(read, np.nan)
            assert store.read("P4", indices, out=out) is out
            assert np.array_equal(out, read)


def test_an_index_is_the_position_among_all_images(tmp_path: Path) -> None:
    path = filled(tmp_path / "made.h5", ["64x64", "", "96x64", "64x64", "96x64", "64x64"], failed=(3,))
    with fpnx.open(path) as store:
        done = [item.index for item in store]
        assert done == [0, 2, 4, 5]
        for size, expected in (((64, 64), [5, 0]), ((96, 64), [4, 2])):
            indices = [index for index in reversed(done) if store.padded_sizes[index] == size]
            assert images_of(store.read("P4", indices)) == indices == expected


def test_images_that_cannot_be_read_together(tmp_path: Path) -> None:
    with fpnx.open(filled(tmp_path / "a.h5", ["64x64", "96x64"])) as store:
        with pytest.raises(FpnxError, match=r"differ in size \(1\.png has 6×4 cells, 0\.png has 4×4 cells\).*padded_s"):
            store.read("P4", [1, 0])
        assert store.read("P5", []).shape[0] == 0
    part = filled(tmp_path / "b.h5", ["64x64"] * 9, failed=(2,), pending=(1, 4, 5, 6, 7))
    with fpnx.open(part) as store:
        assert images_of(store.read("P4", store.status == DONE)) == [0, 3, 8]
        with pytest.raises(NotDoneError, match=r"^2\.png failed: no 2; 4\.png is not done yet: read those whose"):
            store.read("P4", [0, 4, 2, 4])
        with pytest.raises(NotDoneError, match=r"5\.png is not done yet; 6\.png is not done yet; and 1 more: read"):
            store.read("P4")


def test_strides_and_cells_are_read_once_from_the_file(tmp_path: Path) -> None:
    with fpnx.open(filled(tmp_path / "made.h5", ["64x64"] * 3)) as store:
        before = [(item.stride("P4"), item.valid("P4"), item.box("P4", 1, 2)) for item in store]
        store.close()  # nothing can be read from the file any more
        item = fpnx.Item(store, 1)
        assert (item.stride("P4"), item.valid("P4"), item.box("P4", 1, 2)) == before[1]
        assert before[1][:2] == (16, (4, 4))
        with pytest.raises(StoreError, match="has been closed"):
            item.stride("P5")  # was never read
        with pytest.raises(FpnxError, match="no level 'P9'"):
            item.stride("P9")


def test_invalid_indices_and_arrays_are_refused(tmp_path: Path) -> None:
    with fpnx.open(filled(tmp_path / "made.h5", ["64x64"] * 3)) as store:
        for beyond in (3, -4, 2**40):
            with pytest.raises(IndexError, match=rf"image {beyond}: .*made\.h5 holds 3"):
                store.read("P4", [0, beyond])
        with pytest.raises(IndexError, match=r"a mask of 2 values: .*made\.h5 holds 3 images"):
            store.read("P4", [True, False])
        mixed = ([True, 1, 0], (0, np.True_, 2), [False, 1])  # NumPy makes the numbers 1, 1, 0 of the first
        for indices in (1, "0.png", ["0.png"], [0.0], [[0]], [[0], [1, 2]], [2**70], None, *mixed):
            with pytest.raises(TypeError, match="take a slice, a list of indices, or a boolean mask"):
                store.read("P4", indices)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"images slice\(None, None, 0\): the step of a slice cannot be 0"):
            store.read("P4", slice(None, None, 0))
        with pytest.raises(FpnxError, match=r"no level 'P9' in .*: it has P4, P5"):
            store.read("P9")
        fixed = np.zeros((3, 2, 4, 4), np.float32)
        fixed.flags.writeable = False
        for out, reason in (
            (np.zeros((2, 2, 4, 4), np.float32), r"out is \(2, 2, 4, 4\) of float32: take an array \(3, 2, 4, 4\)"),
            (np.zeros((3, 2, 4, 4)), "of float64: take an array .* of float32"),
            (np.zeros((3, 2, 4, 8), np.float32)[..., ::2], "not C-contiguous"),
            (fixed, "read-only"),
            ([0], "out is list: take a NumPy array"),
        ):
            with pytest.raises(FpnxError, match=reason):
                store.read("P4", out=out)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="has been closed"):
        store.read("P4")


def test_pooled_features_of_images_of_different_sizes_are_one_array(photos: Path, tmp_path: Path) -> None:
    fpnx.extract(photos, tmp_path / "pooled.h5", size="native", levels="P3", pool="2x3", **OPTIONS)
    with fpnx.open(tmp_path / "pooled.h5") as store:
        assert len(store.sizes) > 1
        values = store.read("P3", slice(None, None, -1))
        assert values.shape == (6, 8, 2, 3)
        for value, item in zip(values, reversed(list(store)), strict=True):
            assert np.array_equal(value, item["P3"])


def test_pickled_stores_and_items_open_the_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "made.h5", ["64x64"] * 3)
    monkeypatch.chdir(tmp_path)
    with fpnx.open("made.h5") as store:
        pickled, closed_item = pickle.dumps((store, store[2])), store[1]
    monkeypatch.chdir("/")
    again, item = pickle.loads(pickled)
    assert (again.path, item.path, item.index, item.store is again) == ("made.h5", "2.png", 2, True)
    assert images_of(again.read("P4")) == [0, 1, 2]
    assert images_of(copy.deepcopy(item)["P4"][None]) == [2]
    again.close()
    with pytest.raises(StoreError, match=r"made\.h5 has been closed: pickle it inside its with block"):
        pickle.dumps(closed_item)
    filled(tmp_path / "other.h5", ["64x64"] * 2)
    os.replace(tmp_path / "other.h5", tmp_path / "made.h5")
    with pytest.raises(StoreError, match=r"made\.h5 is another file than when it was opened"):
        pickle.loads(pickled)
    (tmp_path / "made.h5").unlink()
    with pytest.raises(StoreError, match=r"made\.h5 does not exist"):
        pickle.loads(pickled)


def test_items_in_spawned_processes(tmp_path: Path) -> None:
    with (
        fpnx.open(filled(tmp_path / "made.h5", ["64x64"] * 3)) as store,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        assert pool.map(mean_of_p4, list(store)) == [1, 2, 3]
        assert pool.apply(len, (store,)) == 3


def mean_of_p4(item: fpnx.Item) -> float:
    return float(item["P4"].mean())
