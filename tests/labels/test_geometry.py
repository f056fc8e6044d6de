"""Boxes and outlines in pixels of their image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fpnx.labels.annotations import ImageLabels
from fpnx.labels.geometry import fit_to_image

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def labels(boxes: list[list[float]], **more: Any) -> ImageLabels:
    count = len(boxes)
    return ImageLabels(name="a.jpg", classes=np.arange(count), boxes=np.array(boxes, np.float64).reshape(-1, 4),
                       crowd=np.zeros(count, bool), **more)  # fmt: skip


def test_boxes_are_clipped_and_those_outside_are_dropped() -> None:
    boxes = [[10, 5, 30, 20], [-5, -5, 5, 5], [90, 40, 300, 400], [100, 0, 120, 10], [-9, -9, 0, -1],
             [0, 0, 1e300, 1e300], [99.9, 10, 100.2, 20]]  # fmt: skip
    fitted = fit_to_image(labels(boxes, size=(50, 100)), (50, 100))
    expected = [[10, 5, 30, 20], [0, 0, 5, 5], [90, 40, 100, 50], [0, 0, 100, 50], [99.9, 10, 100, 20]]
    np.testing.assert_array_equal(fitted.labels.boxes, expected)
    assert fitted.labels.classes.tolist() == fitted.kept.tolist() == [0, 1, 2, 5, 6]
    assert fitted.dropped == {"boxes outside of their image": (3, 4)}
    assert fitted.clipped == 3  # the last one is off by rounding only
    assert (fitted.swapped, fitted.scale, fitted.other_size) == (False, 1, False)


def test_shares_become_pixels() -> None:
    entry = labels([[0.25, 0, 0.75, 0.5], [0, 0, 1, 1]], relative=True, segments=([[0, 0, 0.5, 0, 0.5, 1]], None))
    fitted = fit_to_image(entry, (50, 200)).labels
    np.testing.assert_array_equal(fitted.boxes, [[50, 0, 150, 25], [0, 0, 200, 50]])
    assert fitted.segments == ([[0, 0, 100, 0, 100, 50]], None)
    assert (fitted.relative, fitted.size) == (False, (50, 200))
    again = fit_to_image(fitted, (50, 200))
    np.testing.assert_array_equal(again.labels.boxes, fitted.boxes)
    assert again.labels.segments == fitted.segments


def test_a_photograph_that_its_exif_orientation_turns() -> None:
    """The labels say the size before turning; the boxes are those of the upright picture."""
    rle = {"size": [100, 50], "counts": [0, 5000]}
    before = {"size": [50, 100], "counts": [0, 5000]}
    entry = labels([[10, 60, 40, 90], [0, 0, 5, 5]], size=(50, 100), segments=(rle, before))
    fitted = fit_to_image(entry, (100, 50))
    assert (fitted.swapped, fitted.other_size, fitted.dropped, fitted.lost_outlines) == (True, False, {}, 1)
    np.testing.assert_array_equal(fitted.labels.boxes, entry.boxes)
    assert fitted.labels.segments == (rle, None)


def test_a_smaller_copy_of_the_image_that_was_labelled() -> None:
    entry = labels([[100, 200, 300, 333]], size=(333, 500), areas=np.array([1000.0]),
                   segments=([[0, 0, 500, 0, 500, 333]],))  # fmt: skip
    fitted = fit_to_image(entry, (133, 200))
    assert fitted.scale == pytest.approx(0.4)
    np.testing.assert_allclose(fitted.labels.boxes, [[40, 200 * 133 / 333, 120, 133]])
    assert fitted.labels.areas is not None
    np.testing.assert_allclose(fitted.labels.areas, [1000 * 0.4 * 133 / 333])
    np.testing.assert_allclose(fitted.labels.segments[0], [[0, 0, 200, 0, 200, 133]])


def test_sizes_of_another_shape_change_nothing() -> None:
    for size in ((333, 500), (50, 100)):
        fitted = fit_to_image(labels([[1, 2, 3, 4]], size=(400, 400)), size)
        assert (fitted.other_size, fitted.scale, fitted.swapped) == (True, 1, False)
        np.testing.assert_array_equal(fitted.labels.boxes, [[1, 2, 3, 4]])
    rounded = fit_to_image(labels([[1, 2, 3, 4]], size=(333, 500)), (334, 500))
    assert (rounded.other_size, rounded.scale) == (False, 1)


def test_a_mask_of_a_larger_copy_is_resized() -> None:
    mask = np.zeros((8, 12), bool)
    mask[2:6, 4:8] = True
    ends = np.flatnonzero(np.diff(mask.flatten("F"))) + 1
    counts = np.diff([0, *ends, mask.size]).tolist()
    entry = labels([[4, 2, 8, 6]], size=(8, 12), segments=({"size": [8, 12], "counts": counts},))
    fitted = fit_to_image(entry, (4, 6)).labels
    np.testing.assert_array_equal(fitted.boxes, [[2, 1, 4, 3]])
    from pycocotools import mask as reference

    np.testing.assert_array_equal(reference.decode(fitted.segments[0]), mask[::2, ::2])


def test_no_boxes() -> None:
    assert fit_to_image(labels([]), (5, 5)).labels.boxes is not None
    assert fit_to_image(ImageLabels(name="a", classes=np.array([3])), (5, 5)).labels.classes.tolist() == [3]
