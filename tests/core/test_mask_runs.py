"""Masks as COCO's run-length encoding: hand-worked, and the bytes of pycocotools."""

from __future__ import annotations

import numpy as np
import pytest

from fpnx.core.mask_runs import decode_mask, encode_mask


def test_a_mask_by_hand() -> None:
    # Column by column: 0 1 1 0 | 0 0 1 0: runs of 1, 2, 3, 1, 1 pixels, each a character of 48 + the number; from
    # the fourth on 48 + the difference to the one before the last, of 5 bits: 1 - 2 = -1 is 31.
    mask = np.array([[0, 0], [1, 0], [1, 1], [0, 0]], bool)
    runs = encode_mask(mask, 0, 0, (4, 2))
    assert runs["size"] == [4, 2]
    assert [ord(c) - 48 for c in runs["counts"]] == [1, 2, 3, 31, 30]
    np.testing.assert_array_equal(decode_mask(runs), mask)
    np.testing.assert_array_equal(decode_mask({"size": [4, 2], "counts": [1, 2, 3, 1, 1]}), mask)


@pytest.mark.parametrize("seed", range(20))
def test_a_part_of_an_image_as_pycocotools_encodes_the_whole(seed: int) -> None:
    functions = pytest.importorskip("pycocotools.mask")
    draw = np.random.default_rng(seed)
    for _ in range(20):
        height, width = (int(n) for n in draw.integers(1, 40, 2))
        h, w = int(draw.integers(1, height + 1)), int(draw.integers(1, width + 1))
        top, left = int(draw.integers(0, height - h + 1)), int(draw.integers(0, width - w + 1))
        part = draw.random((h, w)) < draw.choice([0, 0.1, 0.5, 0.9, 1])
        whole = np.zeros((height, width), np.uint8)
        whole[top : top + h, left : left + w] = part
        runs = encode_mask(part, top, left, (height, width))
        assert runs["counts"] == functions.encode(np.asfortranarray(whole))["counts"].decode()
        np.testing.assert_array_equal(decode_mask(runs), whole)


def test_long_runs_and_empty_masks() -> None:
    empty = encode_mask(np.zeros((0, 0), bool), 0, 0, (20_000, 20_000))
    assert empty["counts"] == "PPQ_m;"  # 400 million, as pycocotools has it
    large = np.zeros((3000, 2000), bool)
    large[5:, 3:] = True
    np.testing.assert_array_equal(decode_mask(encode_mask(large, 0, 0, large.shape)), large)


@pytest.mark.parametrize("counts", [[3], "9", [10, -6]])
def test_runs_of_another_size_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match="for a mask of 2×2"):
        decode_mask({"size": [2, 2], "counts": counts})
