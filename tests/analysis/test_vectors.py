"""Vectors of stored images: averages over cells without padding, and images matched by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fpnx
from fpnx.analysis import vectors
from fpnx.analysis.vectors import chosen_levels, matched_images, pooled
from fpnx.core.errors import FpnxError
from tests.helpers.stored import stored


def test_padding_is_not_in_the_average(tmp_path: Path) -> None:
    maps = np.zeros((3, 2, 2, 3))
    maps[:, 0] = [[1, 2, 90], [3, 4, 90]]
    maps[:, 1] = [[5, 90, 90], [90, 90, 90]]
    # The last column is padding of the first image, all but one cell of the second, nothing of the third.
    path = stored(tmp_path / "a.h5", {"P3": maps}, input_sizes=[(16, 16), (8, 3), (16, 24)])
    with fpnx.open(path) as store:
        expected = [[2.5, (5 + 3 * 90) / 4], [1, 5], [(1 + 2 + 3 + 4 + 180) / 6, (5 + 5 * 90) / 6]]
        np.testing.assert_allclose(pooled(store, "P3", np.array([0, 1, 2])), expected, rtol=1e-6)


def test_pooled_files_have_no_padding(tmp_path: Path) -> None:
    maps = np.arange(8.0).reshape(1, 2, 2, 2)
    path = stored(tmp_path / "a.h5", {"P3": maps}, input_sizes=[(8, 8)], pool="2x2")
    with fpnx.open(path) as store:
        assert pooled(store, "P3", np.array([0])).tolist() == [[1.5, 5.5]]


def test_images_of_several_sizes_in_any_order(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fpnx.extract(
        photos,
        tmp_path / "a.h5",
        backbone="mobilenet_v2",
        weights="random",
        size="native",
        levels="C3",
        dtype="float16",
    )
    monkeypatch.setattr(vectors, "READ_BYTES", 1)  # an image at a time
    with fpnx.open(tmp_path / "a.h5") as store:
        assert len(store.sizes) > 1
        order = np.array([4, 0, 5, 2, 1, 3, 0])
        found = pooled(store, "C3", order)
        for row, index in zip(found, order, strict=True):
            item = store[int(index)]
            height, width = item.valid("C3")
            expected = item["C3"].astype(np.float64)[:, :height, :width].mean(axis=(1, 2))
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-7)


def test_no_images_have_vectors_of_the_right_length(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.h5", {"P3": np.ones((2, 5))})
    with fpnx.open(path) as store:
        assert pooled(store, "P3", np.array([], np.int64)).shape == (0, 5)


def test_images_are_matched_by_name_whatever_their_order(tmp_path: Path) -> None:
    numbers = np.zeros((4, 1))
    a = stored(tmp_path / "a.h5", {"P3": numbers}, ["a", "é", "c", "d"], failed=[3])
    b = stored(tmp_path / "b.h5", {"P3": numbers}, ["d", "c", "x", "é"])  # decomposed, as macOS writes it
    with fpnx.open(a) as first, fpnx.open(b) as second:
        assert [column.tolist() for column in matched_images([first, second])] == [[1, 2], [3, 1]]
        assert [column.tolist() for column in matched_images([first])] == [[0, 1, 2]]


def test_files_without_an_image_in_common_are_refused(tmp_path: Path) -> None:
    a = stored(tmp_path / "a.h5", {"P3": np.zeros((1, 1))}, ["a.png"])
    b = stored(tmp_path / "b.h5", {"P3": np.zeros((1, 1))}, ["b.png"])
    none = stored(tmp_path / "c.h5", {"P3": np.zeros((1, 1))}, ["a.png"], failed=[0])
    with fpnx.open(a) as first, fpnx.open(b) as second, fpnx.open(none) as third:
        with pytest.raises(FpnxError, match=r"no image is in every file .*a\.h5 has a\.png.*matched by their stored"):
            matched_images([first, second])
        with pytest.raises(FpnxError, match=r"c\.h5 has no image that is done"):
            matched_images([first, third])


def test_levels_of_several_files(tmp_path: Path) -> None:
    a = stored(tmp_path / "a.h5", {"P3": np.zeros((1, 1)), "P4": np.zeros((1, 1))})
    b = stored(tmp_path / "b.h5", {"P4": np.zeros((1, 1)), "P5": np.zeros((1, 1))})
    with fpnx.open(a) as first, fpnx.open(b) as second:
        assert chosen_levels([first, second], None) == [("P3", "P4"), ("P4", "P5")]
        assert chosen_levels([first, second], "P3-P5") == [("P3", "P4"), ("P4", "P5")]
        with pytest.raises(FpnxError, match=r"b\.h5 has no level P3: it has P4, P5"):
            chosen_levels([first, second], "P3")
        with pytest.raises(FpnxError, match=r"no level 'C2' in .*a\.h5: it has P3, P4"):
            chosen_levels([first, second], "C2,P4")
