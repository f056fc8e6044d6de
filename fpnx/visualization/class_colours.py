"""Colours of classes: by their numbers alone, so that a class has one colour in all pictures and runs."""

from __future__ import annotations

import colorsys
import functools

__all__ = ["class_colour", "text_colour"]

GOLDEN = 0.618033988749895  # of the circle of hues from one number to the next: any few in a row are far apart
SATURATIONS, VALUES = (0.85, 0.55, 1.0), (0.95, 0.8)


@functools.lru_cache(maxsize=4096)
def class_colour(number: int) -> tuple[int, int, int]:
    """(red, green, blue), 0..255, of the class of this number; black is that of number 0."""
    if number == 0:
        return 0, 0, 0
    hue = (number * GOLDEN) % 1
    saturation, value = SATURATIONS[number % len(SATURATIONS)], VALUES[number // len(SATURATIONS) % len(VALUES)]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def text_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on a background (by its luminance, as WCAG has it)."""
    linear = [(part / 255) ** 2.2 for part in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
