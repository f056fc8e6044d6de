"""Indices of many images, and the runs in which their rows are read. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from fpnx.core.errors import FpnxError

__all__ = ["Indices", "checked_out", "image_indices", "row_runs"]

Indices: TypeAlias = slice | Sequence[int] | Sequence[bool] | np.ndarray


def image_indices(indices: Indices, count: int, file: str) -> np.ndarray:
    """(n,) int64, the images that `indices` chooses out of `count` in `file`, from 0 on.

    Raises:
        IndexError: for an index or mask that does not fit the number of images.
        TypeError: for anything but a slice, whole numbers, or a mask.
        ValueError: for a slice whose step is 0.
    """
    if isinstance(indices, slice):
        if indices.step == 0:
            raise ValueError(f"images {indices!r}: the step of a slice cannot be 0; leave it out for all images")
        return np.arange(count)[indices]
    try:
        values = np.asarray(indices)
    except ValueError:  # lists of different lengths
        values = np.empty((0, 0))
    if values.ndim != 1 or (values.size and values.dtype.kind not in "biu") or _is_mixed(indices, values):
        raise TypeError(
            f"images {indices!r:.200}: take a slice, a list of indices, or a boolean mask; store[i] reads one"
        )
    if values.dtype.kind == "b":
        if len(values) != count:
            raise IndexError(f"a mask of {len(values)} values: {file} holds {count} images")
        return np.flatnonzero(values)
    beyond = [value for value in values.tolist() if not -count <= value < count]
    if beyond:
        raise IndexError(f"image {beyond[0]}: {file} holds {count}")
    values = values.astype(np.int64)
    return np.where(values < 0, values + count, values)


def _is_mixed(indices: Any, values: np.ndarray) -> bool:
    """Whether `indices` has both truth values and numbers, of which NumPy makes numbers: an index or a mask?"""
    if not isinstance(indices, (list, tuple)) or values.dtype.kind not in "iu":
        return False
    return any(isinstance(value, (bool, np.bool_)) for value in indices)


def checked_out(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """`out`, or a new array.

    Raises:
        FpnxError: where it has another shape or dtype, or cannot be filled in place.
    """
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise FpnxError(f"out is {type(out).__name__}: take a NumPy array {shape} of {dtype}")
    if out.shape != shape or out.dtype != dtype:
        raise FpnxError(f"out is {out.shape} of {out.dtype}: take an array {shape} of {dtype}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise FpnxError("out is read-only, or not C-contiguous: take one as np.empty makes it")
    return out


def row_runs(rows: np.ndarray, places: np.ndarray) -> tuple[list[tuple[int, int, int]], tuple[np.ndarray, np.ndarray]]:
    """How `result[places]` becomes the rows `rows`, one or more.

    Returns:
        (first row, first place, count) of each run to read: consecutive rows that belong to consecutive places, in the
        order of the file; then, for rows that occur repeatedly, the places to fill and those to copy from.
    """
    unique, firsts, inverse = np.unique(rows, return_index=True, return_inverse=True)
    targets = places[firsts]
    breaks = (np.flatnonzero((np.diff(unique) != 1) | (np.diff(targets) != 1)) + 1).tolist()
    runs = [
        (int(unique[start]), int(targets[start]), end - start)
        for start, end in zip([0, *breaks], [*breaks, len(unique)], strict=True)
    ]
    repeated = np.delete(np.arange(len(rows)), firsts)
    return runs, (places[repeated], targets[inverse[repeated]])
