"""ICC profiles that are sRGB, and those that are not: made by hand, and by LittleCMS."""

from __future__ import annotations

import struct

import pytest
from PIL import ImageCms

from fpnx.images.color_profile import is_srgb

SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
ADOBE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


PARAMETRIC = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
GAMMA = b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(2.2 * 256))
LINEAR = b"curv" + bytes(8)
TABLE = b"curv\0\0\0\0" + struct.pack(">I1025H", 1025, *(round(65535 * (i / 1024) ** 2.2) for i in range(1025)))


def profile(
    primaries: tuple[tuple[float, ...], ...], curve: bytes, space: bytes = b"RGB ", name: bytes = b"x"
) -> bytes:
    tags = {b"desc": b"desc\0\0\0\0" + name, b"gTRC": curve}
    tags |= {
        tag: b"XYZ \0\0\0\0" + fixed(*xyz) for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=False)
    }
    table, data = b"", b""
    for tag, content in tags.items():
        table += struct.pack(">4sII", tag, 132 + 12 * len(tags) + len(data), len(content))
        data += content
    return bytes(16) + space + bytes(108) + struct.pack(">I", len(tags)) + table + data


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (profile(SRGB, PARAMETRIC), True),
        (profile(SRGB, GAMMA), True),
        (profile(SRGB, TABLE), True),
        (profile(SRGB, LINEAR), False),
        (profile(ADOBE, GAMMA, name=b"sRGB"), False),
        (profile(DISPLAY_P3, PARAMETRIC), False),
        (profile((), b"", name=b"\0s\0R\0G\0B\0 \0v\0004"), True),
        (profile((), b"", name=b"scanner"), False),
        (profile(SRGB, PARAMETRIC, b"GRAY"), False),
        (profile(SRGB, b"para")[:300], False),
        (b"", False),
        (b"no profile at all" * 20, False),
    ],
    ids=["sRGB", "gamma", "table", "linear", "adobe", "p3", "named", "unnamed", "grey", "cut", "empty", "text"],
)
def test_profiles(made: bytes, expected: bool) -> None:
    assert is_srgb(made) is expected


def test_the_profile_of_littlecms() -> None:
    assert is_srgb(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
