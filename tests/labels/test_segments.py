"""Outlines as masks, against pycocotools."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as reference

from fpnx.core.errors import ImageError
from fpnx.core.mask_runs import encode_mask
from fpnx.labels.segments import scale_segment, segment_box, segment_mask, segment_rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def random_polygons(seed: int, size: tuple[int, int]) -> list[list[float]]:
    draw = np.random.default_rng(seed)
    count = draw.integers(1, 4)
    return [(draw.uniform(-0.3, 1.3, (draw.integers(3, 9), 2)) * size[::-1]).ravel().tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_filled_as_pycocotools_does(seed: int) -> None:
    size = (37, 53)
    polygons = random_polygons(seed, size)
    expected = reference.decode(reference.merge(reference.frPyObjects(polygons, *size)))
    mask = segment_mask(polygons, size)
    assert (mask.dtype, mask.shape) == (bool, size)
    np.testing.assert_array_equal(mask, expected)
    runs = segment_rle(polygons, size)
    np.testing.assert_array_equal(reference.decode(runs), expected)
    for same in (runs, encode_mask(mask, 0, 0, size), {**runs, "counts": runs["counts"].decode()}):
        np.testing.assert_array_equal(segment_mask(same, size), expected)


def test_a_rectangle_covers_its_pixels() -> None:
    mask = segment_mask([[2, 1, 6, 1, 6, 4, 2, 4]], (6, 8))
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(mask, expected)
    scaled = scale_segment([[2, 1, 6, 1, 6, 4, 2, 4]], 2, 3, (18, 16))
    np.testing.assert_array_equal(segment_mask(scaled, (18, 16)), expected.repeat(3, 0).repeat(2, 1))


def test_runs_go_down_the_columns_zeros_first() -> None:
    mask = segment_mask({"size": [3, 2], "counts": [1, 3, 2]}, (3, 2))
    np.testing.assert_array_equal(mask, [[False, True], [True, False], [True, False]])
    assert segment_box({"size": [3, 2], "counts": [1, 3, 2]}) == (0, 0, 2, 3)
    assert segment_box([[1, 5, 3, 2, 2, 9], [0, 3, 1, 3, 1, 4]]) == (0, 2, 3, 9)


@pytest.mark.parametrize("far", [1e9, 1e300, -1e300])
def test_points_far_away_take_no_time(far: float) -> None:
    started = time.monotonic()
    mask = segment_mask([[0.0, 0.0, far, 0.0, far, far, 0.0, far]], (40, 50))
    assert time.monotonic() - started < 5
    assert mask.all() == (far > 0)


@pytest.mark.parametrize("counts", ["zzzzzzzzzzzzzzzzzz", "0", "P", "\x7f\x01"])
def test_runs_that_do_not_fill_the_mask(counts: str) -> None:
    with pytest.raises(ImageError, match="a run-length encoding that cannot be decoded"):
        segment_mask({"size": [5, 7], "counts": counts}, (5, 7))


def test_a_mask_of_another_size() -> None:
    runs: Any = {"size": [5, 7], "counts": [35]}
    with pytest.raises(ImageError, match=r"a mask of 5×7 pixels .* for an image of 7×5"):
        segment_mask(runs, (7, 5))
