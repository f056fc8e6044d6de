"""From the values of an image file, integers or floats of any width, to 0..255."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fpnx.core.errors import ImageError
from fpnx.core.pixel_options import PixelOptions

__all__ = ["SampleType", "map_to_bytes"]

BLOCK = 1 << 20  # values that are mapped at once, so that copies in float64, and wide indices, stay small


@dataclass(frozen=True)
class SampleType:
    """The type of a file's values: `kind` as in NumPy (`"u"`, `"i"` or `"f"`), and bits, which may be 12 or 1."""

    kind: str
    bits: int

    @property
    def full_range(self) -> tuple[float, float]:
        """The smallest and the largest value; 0 and 1 for floats."""
        if self.kind == "f":
            return 0.0, 1.0
        return (
            (0.0, 2.0**self.bits - 1) if self.kind == "u" else (-(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1)
        )

    def __str__(self) -> str:
        return {"u": f"{self.bits}-bit", "i": f"signed {self.bits}-bit", "f": f"{self.bits}-bit floating-point"}[
            self.kind
        ]


def map_to_bytes(values: np.ndarray, sample: SampleType, options: PixelOptions) -> tuple[np.ndarray, bool]:
    """Map values to 0..255, rounded to the nearest; values outside the range that the options give become 0 or 255.

    Args:
        values: integers or floats, of any shape.
        sample: their type in the file.
        options: the range; by default that of the type, 0 to 1 for floats and for signed integers.

    Returns:
        uint8 of the same shape, and whether some values are NaN, which became 0.

    Raises:
        ImageError: without a range in the options, for floats and signed integers outside 0..1.
    """
    low, high = _limits(values, sample, options)
    result = np.empty(values.shape, np.uint8)
    if values.dtype.itemsize <= 2 and values.dtype.kind in "ui":
        index = np.dtype(f"u{values.dtype.itemsize}")
        table = np.arange(1 << 8 * index.itemsize, dtype=index).view(values.dtype.newbyteorder("="))
        mapped = _mapped(table, low, high).astype(np.uint8)
        for source, target in zip(_blocks(values), _blocks(result), strict=True):
            target[...] = mapped[np.ascontiguousarray(source, table.dtype).view(index)]
        return result, False
    nans = False
    for source, target in zip(_blocks(values), _blocks(result), strict=True):
        nans = nans or (sample.kind == "f" and bool(np.isnan(source).any()))
        target[...] = _mapped(source, low, high)
    return result, nans


def _limits(values: np.ndarray, sample: SampleType, options: PixelOptions) -> tuple[float, float]:
    if options.limits is not None:
        return options.limits
    if options.percentiles is not None:
        return _percentiles(values, options.percentiles)
    if sample.kind == "u" or (sample.kind == "i" and options.value_range is not None):
        return sample.full_range
    for block in _blocks(values):
        if not (block.min() >= 0 and block.max() <= 1):  # also for NaN
            full = "" if sample.kind == "f" else "full, "
            raise ImageError(
                f"{sample} values outside 0..1, whose scale is unknown: give --value-range {full}LO,HI or P1,P99"
            )
    return 0.0, 1.0


def _mapped(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` → 0, `high` → 255, linear between, clipped beyond; NaN → 0."""
    if not high > low:  # percentiles of an image of one value
        return np.where(values > high, 255, 0)
    exact = values.dtype == np.float32 and (low, high) == (0.0, 1.0)
    scaled = values.astype(np.float32 if exact else np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled -= low
        scaled *= 255
        scaled /= high - low
        np.rint(scaled, out=scaled)
    np.clip(scaled, 0, 255, out=scaled)
    return np.nan_to_num(scaled, copy=False, nan=0.0)


def _percentiles(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Two percentiles of the finite values, linear between neighbours, as `numpy.percentile`.

    Raises:
        ImageError: no value is finite.
    """
    if values.dtype.itemsize <= 2 and values.dtype.kind in "ui":  # counting needs no copy that is sorted
        lowest = int(np.iinfo(values.dtype).min)
        counts = np.zeros(1 << 8 * values.dtype.itemsize, np.int64)
        for block in _blocks(values):
            counts += np.bincount(block.astype(np.int64).ravel() - lowest, minlength=len(counts))
        ends = np.cumsum(counts)
        found = []
        for percentile in percentiles:
            position = percentile / 100 * (int(ends[-1]) - 1)
            below = int(np.searchsorted(ends, int(position), side="right")) + lowest
            above = int(np.searchsorted(ends, int(np.ceil(position)), side="right")) + lowest
            found.append(below + (above - below) * (position - int(position)))
        return found[0], found[1]
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ImageError("no value is a finite number")
    low, high = np.percentile(finite.astype(np.float64, copy=False), percentiles, overwrite_input=True)
    return float(low), float(high)


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """`values`, cut along the first axis into views of about `BLOCK` values."""
    rows = max(1, BLOCK * len(values) // max(values.size, 1))
    for start in range(0, len(values), rows):
        yield values[start : start + rows]
