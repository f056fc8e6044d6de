"""Whether an ICC profile describes sRGB."""

from __future__ import annotations

import functools
import struct

__all__ = ["is_srgb"]

# Red, green and blue of sRGB in XYZ under D50, as profiles hold them, and the tone curve's value at one half.
PRIMARIES = {b"rXYZ": (0.4361, 0.2225, 0.0139), b"gXYZ": (0.3851, 0.7169, 0.0971), b"bXYZ": (0.1431, 0.0606, 0.7141)}
HALF, TOLERANCE, CURVE_TOLERANCE = 0.2140, 0.003, 0.01


@functools.lru_cache(maxsize=64)
def is_srgb(profile: bytes) -> bool:
    """Whether a profile has the primaries and the tone curve of sRGB, or its name; False for what is no profile."""
    try:
        tags = _tags(profile)
        if profile[16:20] != b"RGB ":
            return False
        if set(PRIMARIES) <= set(tags):
            colours = {name: [v / 65536 for v in struct.unpack(">3i", tags[name][8:20])] for name in PRIMARIES}
            close = all(
                abs(value - wanted) < TOLERANCE
                for name, values in colours.items()
                for value, wanted in zip(values, PRIMARIES[name], strict=True)
            )
            return close and abs(_curve_at_half(tags[b"gTRC"]) - HALF) < CURVE_TOLERANCE
        name = tags.get(b"desc", b"").replace(b"\0", b"")  # ASCII or UTF-16
    except (struct.error, KeyError, IndexError):
        return False
    return b"sRGB" in name


def _tags(profile: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack(">I", profile[128:132])
    entries = struct.iter_unpack(">4sII", profile[132 : 132 + 12 * min(count, 100)])
    return {name: profile[offset : offset + size] for name, offset, size in entries}


def _curve_at_half(curve: bytes) -> float:
    """The value of a tone curve at 0.5."""
    if curve[:4] == b"curv":
        (count,) = struct.unpack(">I", curve[8:12])
        if count == 0:
            return 0.5
        if count == 1:
            return float(0.5 ** (struct.unpack(">H", curve[12:14])[0] / 256))
        return float(struct.unpack(">H", curve[12 + 2 * (count // 2) :][:2])[0] / 65535)
    kind = struct.unpack(">H", curve[8:10])[0]
    gamma, *rest = (
        v / 65536 for v in struct.unpack(f">{(1, 3, 4, 5, 7)[kind]}i", curve[12:][: 4 * (1, 3, 4, 5, 7)[kind]])
    )
    a, b = (rest[0], rest[1]) if rest else (1.0, 0.0)
    offset = rest[2] if kind == 2 else rest[4] if kind == 4 else 0.0
    return float((a * 0.5 + b) ** gamma + offset)
