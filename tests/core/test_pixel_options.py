"""The options for bands and value ranges: what they take, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest

from fpnx.core.config import BenchmarkConfig, ExtractConfig, InputConfig
from fpnx.core.errors import FpnxError
from fpnx.core.pixel_options import PixelOptions


@pytest.mark.parametrize(
    ("bands", "value_range", "expected"),
    [
        ("4,3,2", "full", PixelOptions((4, 3, 2), "full")),
        (" 7 ", "Full", PixelOptions((7,), "full")),
        ([1, 1, 1], "0, 3000", PixelOptions((1, 1, 1), "0,3000")),
        ((3, 2, 1), (-0.5, 1), PixelOptions((3, 2, 1), "-0.5,1")),
        (None, "p1,P99.5", PixelOptions(None, "P1,P99.5")),
        (None, [1e-20, 1e20], PixelOptions(None, "1e-20,1e+20")),
        (None, None, PixelOptions()),
    ],
)
def test_values_are_kept_in_one_form(bands: Any, value_range: Any, expected: PixelOptions) -> None:
    config = ExtractConfig(bands=bands, value_range=value_range)
    assert config.pixels == expected
    assert InputConfig(bands=config.bands, value_range=config.value_range).pixels == expected
    assert BenchmarkConfig(bands=bands, value_range=value_range).runs()[0].pixels == expected
    assert ExtractConfig(**config.repeatable()).pixels == expected


def test_limits_and_percentiles() -> None:
    assert PixelOptions(None, "-5,10").limits == (-5, 10)
    assert PixelOptions(None, "P1,P99.5").percentiles == (1, 99.5)
    for value_range in (None, "full"):
        options = PixelOptions(None, value_range)
        assert (options.limits, options.percentiles, options.rescales) == (None, None, False)
    assert PixelOptions(None, "P1,P99").limits is None
    assert PixelOptions(None, "1,99").percentiles is None


@pytest.mark.parametrize("bands", ["", "1,2", "0,1,2", "1,2,3,4", "a", "1,,2", (1, 2), "1.5", "99999", "-1"])
def test_other_bands_are_refused(bands: Any) -> None:
    with pytest.raises(FpnxError, match=r"take one number, or three for red, green and blue"):
        ExtractConfig(bands=bands)


@pytest.mark.parametrize("value_range", ["", "1", "5,5", "9,3", "P1,99", "1,2,3", "nan,1", "0,inf", "half", (1,)])
def test_other_ranges_are_refused(value_range: Any) -> None:
    with pytest.raises(FpnxError, match=r"take full, two rising values such as 0,3000, or P1,P99"):
        ExtractConfig(value_range=value_range)


def test_percentiles_beyond_100_are_refused() -> None:
    with pytest.raises(FpnxError, match="percentiles go from P0 to P100"):
        ExtractConfig(value_range="P1,P101")
