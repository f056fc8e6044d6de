"""Which values of an image file are read, and how they become 0..255: `--bands` and `--value-range`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fpnx.core.errors import FpnxError

__all__ = ["FULL", "PixelOptions", "parse_bands", "parse_value_range"]

FULL = "full"
MAX_BAND = 65535  # a TIFF has no more samples per pixel


@dataclass(frozen=True)
class PixelOptions:
    """How the values of an image file become an 8-bit RGB image.

    Attributes:
        bands: one band for grey, or three for red, green and blue, counted from 1; None: those that the file says.
        value_range: `"full"`, `"LO,HI"` (values that become 0 and 255) or `"P1,P99"` (percentiles of the image); None:
            as `"full"`, but signed values are refused, since their zero is in the middle of their range.
    """

    bands: tuple[int, ...] | None = None
    value_range: str | None = None

    @property
    def limits(self) -> tuple[float, float] | None:
        """The values that become 0 and 255, where the option gives them."""
        if self.value_range in (None, FULL) or self.percentiles is not None:
            return None
        low, high = str(self.value_range).split(",")
        return float(low), float(high)

    @property
    def percentiles(self) -> tuple[float, float] | None:
        """The percentiles that become 0 and 255, where the option gives them."""
        if not str(self.value_range).startswith("P"):
            return None
        low, high = str(self.value_range).replace("P", "").split(",")
        return float(low), float(high)

    @property
    def rescales(self) -> bool:
        """Whether values are mapped otherwise than by the full range of their type."""
        return self.value_range not in (None, FULL)


def parse_bands(bands: str | Iterable[int]) -> tuple[int, ...]:
    """`"4,3,2"` or a sequence → band numbers from 1, in the same order.

    Raises:
        FpnxError: for anything else than one or three numbers.
    """
    parts = [str(part).strip() for part in (bands.split(",") if isinstance(bands, str) else bands)]
    numbers = tuple(int(part) for part in parts if re.fullmatch(r"\d{1,5}", part, re.ASCII))
    if len(numbers) != len(parts) or len(numbers) not in (1, 3) or not all(1 <= n <= MAX_BAND for n in numbers):
        raise FpnxError(f"bands {bands!r}: take one number, or three for red, green and blue, such as 4,3,2; from 1")
    return numbers


def parse_value_range(value: str | Iterable[float]) -> str:
    """`"full"`, `"0,3000"`, `"P1,P99"` or a pair of numbers → the same as canonical text.

    Raises:
        FpnxError: for anything else, or where the first is not below the second.
    """
    parts = [str(part).strip().upper() for part in (value.split(",") if isinstance(value, str) else value)]
    if parts == [FULL.upper()]:
        return FULL
    percent = "P" if len(parts) == 2 and all(part.startswith("P") for part in parts) else ""
    try:
        low, high = (float(part.removeprefix(percent)) for part in parts)
    except ValueError:
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise FpnxError(f"value range {value!r}: take full, two rising values such as 0,3000, or P1,P99")
    if percent and not 0 <= low < high <= 100:
        raise FpnxError(f"value range {value!r}: percentiles go from P0 to P100")
    return f"{percent}{_number(low)},{percent}{_number(high)}"


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
