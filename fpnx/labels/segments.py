"""Outlines of objects, polygons and run-length encodings, as masks.

The mask functions are those of faster-coco-eval, which agree with pycocotools. A pixel belongs to a polygon by COCO's
rule; polygons are in continuous coordinates, with (0, 0) at the outer corner of the first pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.mask_runs import encode_mask
from fpnx.labels.annotations import Segment

__all__ = ["is_drawable", "scale_segment", "segment_box", "segment_mask", "segment_rle"]

MIN_POLYGON = 6  # numbers: three points
FAR = 4  # sizes of the image: coordinates farther off are moved there, since drawing takes time by length
MAX_PIXELS = 1 << 28  # of a run-length encoding


def is_drawable(segment: Any) -> bool:
    """Whether a value is an outline: polygons of three points or more, or a run-length encoding that fills its size."""
    if isinstance(segment, Mapping):
        return _is_rle(segment)
    return isinstance(segment, list) and bool(segment) and all(map(_is_polygon, segment))


def segment_box(segment: Segment) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 around an outline.

    Raises:
        FpnxError: for a run-length encoding, where faster-coco-eval is not installed.
    """
    if isinstance(segment, Mapping):
        x, y, width, height = _functions().toBbox(_rle(segment)).tolist()
        return x, y, x + width, y + height
    xs = [float(x) for polygon in segment for x in polygon[::2]]
    ys = [float(y) for polygon in segment for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def scale_segment(segment: Segment, x: float, y: float, size: tuple[int, int]) -> Segment:
    """An outline with its coordinates multiplied; a run-length encoding with its mask resized to `size`.

    Args:
        segment: the outline.
        x, y: factors of polygons.
        size: (height, width) of the result, for run-length encodings.

    Raises:
        FpnxError: for a run-length encoding of another size, where faster-coco-eval is not installed.
    """
    if not isinstance(segment, Mapping):
        factors = np.array([x, y])
        return [(np.reshape(polygon, (-1, 2)) * factors).ravel().tolist() for polygon in segment]
    return segment if tuple(segment["size"]) == size else encode_mask(_resized(_decoded(segment), size), 0, 0, size)


def segment_mask(segment: Segment, size: tuple[int, int]) -> np.ndarray:
    """The mask of an outline.

    Args:
        segment: polygons in pixels of an image of `size`, or a run-length encoding of that size.
        size: (height, width).

    Returns:
        (height, width) bool.

    Raises:
        ImageError: for a run-length encoding of another size.
        FpnxError: where faster-coco-eval is not installed.
    """
    if isinstance(segment, Mapping) and tuple(segment["size"]) != size:
        theirs, ours = ("×".join(map(str, each)) for each in (segment["size"], size))
        raise ImageError(f"a mask of {theirs} pixels (height × width) for an image of {ours}")
    return _decoded(segment_rle(segment, size))


def segment_rle(segment: Segment, size: tuple[int, int]) -> dict[str, Any]:
    """An outline as COCO's compressed run-length encoding, `{"size": [height, width], "counts": bytes}`.

    Args:
        segment: polygons in pixels of an image of `size`, or a run-length encoding.
        size: (height, width), for polygons.

    Raises:
        FpnxError: where faster-coco-eval is not installed.
    """
    if isinstance(segment, Mapping):
        return _rle(segment)
    height, width = size
    near = np.array([[-FAR * width, -FAR * height], [(1 + FAR) * width, (1 + FAR) * height]], np.float64)
    polygons = [np.clip(np.reshape(each, (-1, 2)), *near).ravel().tolist() for each in segment]
    runs: dict[str, Any] = _functions().merge(_functions().frPyObjects(polygons, height, width))
    return runs


def _functions() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise FpnxError(
            "masks of objects need faster-coco-eval, which is not installed: pip install 'fpnx[train]'"
        ) from None
    return mask


def _rle(segment: Mapping[str, Any]) -> dict[str, Any]:
    """A run-length encoding in its compressed form."""
    height, width = segment["size"]
    if isinstance(segment["counts"], list):
        runs: dict[str, Any] = _functions().frPyObjects(dict(segment), height, width)
        return runs
    return {"size": [height, width], "counts": segment["counts"]}


def _decoded(segment: Mapping[str, Any]) -> np.ndarray:
    """(H, W) bool of a run-length encoding."""
    try:
        mask: np.ndarray = _functions().decode(_rle(segment))
    except (ValueError, RuntimeError) as error:
        raise ImageError(f"a run-length encoding that cannot be decoded ({error})") from error
    return mask.astype(bool)


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The nearest pixels of a mask, for a mask of another size; centres of pixels are at halves."""
    rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip(size, mask.shape, strict=True))
    return mask[rows.astype(np.int64)][:, columns.astype(np.int64)]


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < MIN_POLYGON or len(polygon) % 2:
        return False
    try:
        return math.isfinite(sum(polygon))  # one value that is not finite makes the sum so
    except (TypeError, ValueError, OverflowError):
        return False


def _is_rle(segment: Mapping[str, Any]) -> bool:
    size, counts = segment.get("size"), segment.get("counts")
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        return False
    if size[0] * size[1] > MAX_PIXELS:
        return False
    if isinstance(counts, str):
        return bool(counts) and counts.isascii()
    if not isinstance(counts, list) or any(type(n) is not int or n < 0 for n in counts):
        return False
    return sum(counts) == size[0] * size[1]
