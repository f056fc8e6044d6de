"""Text in pictures: which fonts have its letters, how wide it is, and how it is made to fit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from fpnx.core.text import escape

__all__ = ["DPI", "fit_text", "printable", "text_width", "write"]

DPI = 100
FAMILIES = (  # the first comes with matplotlib; the others, where a machine has them, for the scripts that it lacks
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Hiragino Sans",
    "PingFang SC",
    "Yu Gothic",
    "Microsoft YaHei",
    "Noto Sans Devanagari",
    "Noto Sans Arabic",
    "Arial Unicode MS",
)


def printable(text: str) -> str:
    """A text that can be drawn: what is not printable, or what no font here has, becomes an escape."""
    return "".join(c if _font_of(c) is not None else c.encode("unicode_escape").decode() for c in escape(text))


def text_width(text: str, size: float) -> float:
    """Width in pixels of a printable text whose letters are `size` pixels high."""
    return sum(_advance(c) for c in text) * size


def fit_text(text: str, width: float, size: float, lines: int = 1) -> list[str]:
    """A text in at most `lines` lines of at most `width` pixels; what is too much goes out of its middle.

    Lines end after a space or a separator where there is one, else anywhere.
    """
    text = printable(text)
    broken = _broken(text, width, size)
    dropped = max(1, len(text) // 100)
    while len(broken) > lines and dropped < len(text):
        kept = len(text) - dropped
        broken = _broken(f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}", width, size)
        dropped += max(1, len(text) // 100)
    return broken[:lines]


def write(figure: Figure, x: float, y: float, text: str, size: float = 12, **style: Any) -> None:
    """Put text at pixel (x, y) from the left top of a figure of 100 dots an inch; y is its baseline."""
    wide, high = figure.get_size_inches() * DPI
    figure.text(
        x / wide,
        1 - y / high,
        text,
        fontsize=size * 72 / DPI,
        fontfamily=_families(),
        parse_math=False,
        usetex=False,
        **{"color": "black", "va": "baseline", "fontstyle": "normal", "fontweight": "normal", **style},
    )


def _broken(text: str, width: float, size: float) -> list[str]:
    lines, line, used, stop = [], "", 0.0, 0
    for letter in text:
        used += _advance(letter) * size
        if used > width and line:
            end = stop if stop > len(line) // 2 else len(line)
            lines.append(line[:end].rstrip())
            line = line[end:].lstrip()
            used, stop = text_width(line + letter, size), 0
        line += letter
        if letter in " /_-·,":
            stop = len(line)
    return [*lines, line]


@lru_cache(maxsize=1)
def _families() -> list[str]:
    there = {font.name for font in font_manager.fontManager.ttflist}
    return [family for family in FAMILIES if family in there]


@lru_cache(maxsize=1)
def _fonts() -> list[FT2Font]:
    paths = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in _families()]
    return [FT2Font(path) for path in paths]


@lru_cache(maxsize=4096)
def _font_of(letter: str) -> FT2Font | None:
    return next((font for font in _fonts() if ord(letter) in font.get_charmap()), None)


@lru_cache(maxsize=4096)
def _advance(letter: str) -> float:
    """Width of a letter in units of its height."""
    font = _font_of(letter)
    if font is None:
        return 1.0
    font.set_size(100, 72)
    return font.load_char(ord(letter)).linearHoriAdvance / 65536 / 100
