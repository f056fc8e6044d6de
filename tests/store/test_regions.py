"""Regions in a file: written where their image is, marked where it failed, read one image or all at a time."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fpnx
from fpnx.core.errors import FpnxError, StoreError
from fpnx.store.file_layout import FileLayout
from fpnx.store.reader import open_store_file
from fpnx.store.regions import RegionBatch, RegionLayout, first_rows
from fpnx.store.writer import Writer, part_path
from tests.helpers.layouts import LEVELS, PROVENANCE, layout_of

IMAGE = np.array([0, 0, 2, 3, 3, 3])  # image 1 has no box


def layout(dtype: str = "float32") -> FileLayout:
    """Four images of two sizes, and six boxes with features (2, 3, 3)."""
    maps = layout_of(["64x64", "96x64", "64x64", "64x64"], dtype=dtype)
    return replace(
        maps,
        config={**maps.config, "regions": {"boxes": "0" * 64, "size": "3x3"}},
        shapes={size: dict.fromkeys(LEVELS, (2, 0, 0)) for size in maps.shapes},
        regions=RegionLayout(IMAGE, np.array([5, 6, 5, 5, 6, 6]), {5: "cat", 6: "dög"}, (2, 3, 3)),
    )


def batch(rows: list[int]) -> RegionBatch:
    """Rows that tell their number."""
    return RegionBatch(
        boxes=np.array([[row, row, row + 10.5, row + 20] for row in rows], np.float64).reshape(-1, 4),
        levels=np.array([4 + row % 2 for row in rows], np.int64),
        features=np.array([np.full((2, 3, 3), 1 + row) for row in rows], np.float32).reshape(-1, 2, 3, 3),
    )


def put(writer: Writer, indices: list[int]) -> None:
    rows = [row for index in indices for row in np.flatnonzero(index == IMAGE).tolist()]
    nothing = {level: np.zeros((len(indices), 2, 0, 0), np.float32) for level in LEVELS}
    counts = {level: [0] * len(indices) for level in LEVELS}
    writer.put(indices, nothing, np.full((len(indices), 2), 64), counts, batch(rows))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A file of three images that are done and image 2, which failed."""
    writer = Writer.create(tmp_path / "out.h5", layout(), PROVENANCE)
    put(writer, [0, 3])
    put(writer, [1])
    writer.fail(2, "too bad")
    writer.finish()
    return tmp_path / "out.h5"


def test_rows_are_where_their_image_is(finished: Path) -> None:
    with fpnx.open(finished) as store:
        assert (store.has_regions, repr(store.regions)) == (True, "Regions(6, 2×3×3)")
        for index, rows in ((0, [0, 1]), (1, []), (3, [3, 4, 5])):
            of_image, expected = store[index].regions, batch(rows)
            np.testing.assert_array_equal(of_image.box, expected.boxes)
            np.testing.assert_array_equal(of_image.features, expected.features)
            assert of_image.level.tolist() == expected.levels.tolist()
            assert of_image.image.tolist() == [index] * len(rows)
        assert [store.regions.names[label] for label in store[3].regions.label] == ["cat", "dög", "dög"]
        assert store.regions.features[3:5].shape == (2, 2, 3, 3)
        np.testing.assert_array_equal(store.stored_values(3, "P5"), batch([3, 5]).features)


def test_rows_of_a_failed_image_are_marked(finished: Path) -> None:
    with fpnx.open(finished) as store:
        assert np.isnan(store.regions.features[2]).all()
        assert np.isnan(store.regions.box[2]).all()
        assert (store.regions.level[2], store.regions.label[2], store.error(2)) == (0, 5, "too bad")
    assert fpnx.verify(finished).problems == ()


def test_h5py_alone_reads_them(finished: Path) -> None:
    with h5py.File(finished) as file:
        assert {name: (data.dtype.str, data.shape) for name, data in file["regions"].items()} == {
            "image": ("<i8", (6,)),
            "box": ("<f8", (6, 4)),
            "level": ("<i8", (6,)),
            "label": ("<i8", (6,)),
            "features": ("<f4", (6, 2, 3, 3)),
        }
        assert file["regions"].attrs["names"] == '{"5": "cat", "6": "d\\u00f6g"}'
        for data in file["regions"].values():
            assert data.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        assert file["P4"].shape == (3, 2, 0, 0) if "P4" in file else len(file["pyramids"]) == 2


def test_a_file_of_regions_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    writer = Writer.create(tmp_path / "out.h5", layout("float16"), PROVENANCE)
    with open_store_file(part_path(tmp_path / "out.h5")) as store:
        assert store.regions.box.tolist() == [[0] * 4] * 6
        put(writer, [3])
        writer.commit()
        store.refresh()
        np.testing.assert_array_equal(store[3].regions.box, batch([3, 4, 5]).boxes)
        assert store[3].regions.features.dtype == np.float16
        np.testing.assert_array_equal(store[3].regions.features, batch([3, 4, 5]).features)
    writer.close()
    again = Writer.reopen(tmp_path / "out.h5")
    put(again, [0, 1, 2])
    again.finish()
    with fpnx.open(tmp_path / "out.h5") as store:
        np.testing.assert_array_equal(store.regions.features[:], batch(list(range(6))).features)


def test_rows_of_other_images_are_a_mistake(tmp_path: Path) -> None:
    writer = Writer.create(tmp_path / "out.h5", layout(), PROVENANCE)
    with pytest.raises(AssertionError, match="regions of other images"):
        writer.put([0], {}, np.ones((1, 2)), {level: [0] for level in LEVELS}, batch([0, 1, 2]))
    writer.close()


def test_the_estimated_size_covers_the_file(tmp_path: Path) -> None:
    planned = layout()
    assert planned.feature_bytes() == 6 * 2 * 3 * 3 * 4
    Writer.create(tmp_path / "out.h5", planned, PROVENANCE).close()
    assert part_path(tmp_path / "out.h5").stat().st_size <= planned.total_bytes()


def test_first_rows_of_each_image() -> None:
    assert first_rows(IMAGE, 4).tolist() == [0, 2, 2, 3, 6]
    assert first_rows(np.empty(0, np.int64), 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.move("regions", "elsewhere"), "/regions is missing"),
        (lambda file: file["regions"].move("box", "elsewhere"), "/regions/box is missing"),
        (lambda file: file["regions/image"].write_direct(np.arange(6)[::-1].copy()), "/regions/image is not in order"),
        (lambda file: file["regions"].attrs.__setitem__("names", "{}}"), "attribute names is not JSON"),
        (lambda file: file["regions"].attrs.__setitem__("names", '{"a": "b"}'), "/regions names no classes"),
    ],
)
def test_damaged_regions_are_refused(finished: Path, change: Any, message: str) -> None:
    with h5py.File(finished, "r+") as file:
        change(file)
    with pytest.raises(StoreError, match=message), fpnx.open(finished) as store:
        store.regions  # noqa: B018


def test_a_link_to_another_file_is_not_followed(finished: Path) -> None:
    with h5py.File(finished, "r+") as file:
        del file["regions/features"]
        file["regions/features"] = h5py.ExternalLink("other.h5", "/features")
    with fpnx.open(finished) as store, pytest.raises(StoreError, match="is a link to another place"):
        store.regions  # noqa: B018


def test_the_dataset_gives_regions(finished: Path) -> None:
    data = fpnx.PyramidDataset(finished, regions=True, target={f"{i}.png": i for i in range(4)})
    assert len(data) == 3
    samples = list(DataLoader(data, batch_size=2, collate_fn=list, num_workers=1))
    assert [sample["path"] for pair in samples for sample in pair] == ["0.png", "1.png", "3.png"]
    last = samples[1][0]
    assert set(last) == {"regions", "boxes", "levels", "labels", "path", "index", "target"}
    assert (last["regions"].shape, last["labels"].tolist(), last["target"]) == ((3, 2, 3, 3), [5, 6, 6], 3)
    np.testing.assert_array_equal(last["boxes"], batch([3, 4, 5]).boxes)
    assert last["levels"].dtype == torch.int64
    assert pickle.loads(pickle.dumps(data))[2]["index"] == 3
    assert [len(sample["regions"]) for sample in data.__getitems__([2, 0, 1])] == [3, 2, 0]


def test_a_dataset_of_maps_refuses_a_file_of_regions_and_the_reverse(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FpnxError, match=r"no maps of P4 in .*, which has regions: in Python read item\.regions"):
        fpnx.PyramidDataset(finished)
    with pytest.raises(FpnxError, match="leave out levels, or regions=True"):
        fpnx.PyramidDataset(finished, regions=True, levels="P4")
    writer = Writer.create(tmp_path / "maps.h5", layout_of(["64x64"]), PROVENANCE)
    writer.close()
    with pytest.raises(FpnxError, match="has no regions: fpnx extract --boxes LABELS"):
        fpnx.PyramidDataset(part_path(tmp_path / "maps.h5"), regions=True)
