"""Masks in COCO's compressed run-length encoding, with numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

__all__ = ["MaskRuns", "decode_mask", "encode_mask"]

CHARACTERS = 7  # of one number at most: 5 bits each


class MaskRuns(TypedDict):
    """A mask in COCO's compressed run-length encoding: `size` is [height, width]."""

    size: list[int]
    counts: str


def encode_mask(part: np.ndarray, top: int, left: int, size: tuple[int, int]) -> MaskRuns:
    """Encode a mask that is 0 outside of one rectangle.

    Args:
        part: (h, w) bool, the mask within the rectangle.
        top, left: of the rectangle, which lies within the image.
        size: (height, width) of the image.
    """
    height, width = size
    framed = np.zeros((part.shape[0] + 2, part.shape[1]), np.int8)
    framed[1:-1] = part
    steps = np.diff(framed, axis=0).T  # columns one after the other, as COCO counts
    (columns, rows), (last_columns, last_rows) = np.nonzero(steps == 1), np.nonzero(steps == -1)
    starts = (left + columns) * height + top + rows
    ends = (left + last_columns) * height + top + last_rows
    if len(starts):  # a run that goes on in the next column is one run
        apart = ends[:-1] != starts[1:]
        starts, ends = starts[np.append(True, apart)], ends[np.append(apart, True)]
    bounds = np.stack([starts, ends], axis=1).ravel()
    counts = np.diff(bounds, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return {"size": [height, width], "counts": _compressed(counts)}


def decode_mask(runs: Mapping[str, Any]) -> np.ndarray:
    """(height, width) bool; `counts` is compressed text, or a list of numbers.

    Raises:
        ValueError: the runs are not those of a mask of that size.
    """
    height, width = (int(side) for side in runs["size"])
    counts = runs["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    numbers = _expanded(counts) if isinstance(counts, str) else np.asarray(counts, np.int64)
    if (numbers < 0).any() or numbers.sum() != height * width:
        raise ValueError(f"runs of {int(numbers.sum())} pixels for a mask of {height}×{width}")
    values = np.arange(len(numbers)) % 2 == 1
    mask: np.ndarray = np.repeat(values, numbers).reshape(width, height).T
    return mask


def _compressed(counts: np.ndarray) -> str:
    """Numbers as text: from the fourth on, the difference to the one before the last; 5 bits a character."""
    rest = counts.astype(np.int64)
    rest[3:] -= counts[1:-2]
    characters = np.zeros((len(rest), CHARACTERS), np.uint8)
    open_ = np.ones(len(rest), bool)
    for place in range(CHARACTERS):
        bits = rest & 0x1F
        rest = rest >> 5
        more = np.where(bits & 0x10, rest != -1, rest != 0)
        characters[:, place] = np.where(open_, (bits | np.where(more, 0x20, 0)) + 48, 0)
        open_ &= more
    return characters[characters > 0].tobytes().decode("ascii")


def _expanded(text: str) -> np.ndarray:
    numbers: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            if len(numbers) > 2:
                value += numbers[-2]
            numbers.append(value)
            value = shift = 0
    return np.array(numbers, np.int64)
