"""Text in figures: font fallback, text width, and fitting text into lines."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from fpnx.core.text import escape

__all__ = ["DPI", "fit_text", "pillow_runs", "printable", "text_width", "write"]

DPI = 100
FAMILIES = (  # the first comes with matplotlib; the others are used, where installed, for scripts that it lacks
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
    """The text with escapes for characters that are not printable or that no installed font has."""
    return "".join(c if _font_of(c) is not None else c.encode("unicode_escape").decode() for c in escape(text))


def text_width(text: str, size: float) -> float:
    """Width in pixels of a printable text at a font size of `size` pixels."""
    return sum(_advance(c) for c in text) * size


def fit_text(text: str, width: float, size: float, lines: int = 1) -> list[str]:
    """Break a text into at most `lines` lines of at most `width` pixels; text that does not fit is cut in the middle.

    Lines break after a space or a separator where there is one, else anywhere.
    """
    text = printable(text)
    fitted = _break_lines(text, width, size)
    dropped = max(1, len(text) // 100)
    while len(fitted) > lines and dropped < len(text):
        kept = len(text) - dropped
        fitted = _break_lines(f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}", width, size)
        dropped += max(1, len(text) // 100)
    return fitted[:lines]


def write(figure: Figure, x: float, y: float, text: str, size: float = 12, **style: Any) -> None:
    """Draw text with its baseline at pixel (x, y) from the top left of a figure of 100 dots per inch."""
    figure_width, figure_height = figure.get_size_inches() * DPI
    figure.text(
        x / figure_width,
        1 - y / figure_height,
        text,
        fontsize=size * 72 / DPI,
        fontfamily=_families(),
        parse_math=False,
        usetex=False,
        **{"color": "black", "va": "baseline", "fontstyle": "normal", "fontweight": "normal", **style},
    )


def pillow_runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """A printable text in parts, each with the Pillow font that has its characters, of `size` pixels."""
    runs: list[tuple[str, str]] = []
    for character in text:
        font = _font_of(character)
        path = (font or _fonts()[0]).fname
        if runs and runs[-1][0] == path:
            runs[-1] = (path, runs[-1][1] + character)
        else:
            runs.append((path, character))
    return [(_pillow_font(path, size), part) for path, part in runs]


def _break_lines(text: str, width: float, size: float) -> list[str]:
    lines, line, used, break_at = [], "", 0.0, 0
    for character in text:
        used += _advance(character) * size
        if used > width and line:
            end = break_at if break_at > len(line) // 2 else len(line)
            lines.append(line[:end].rstrip())
            line = line[end:].lstrip()
            used, break_at = text_width(line + character, size), 0
        line += character
        if character in " /_-·,":
            break_at = len(line)
    return [*lines, line]


@lru_cache(maxsize=1)
def _families() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [family for family in FAMILIES if family in installed]


@lru_cache(maxsize=1)
def _fonts() -> list[FT2Font]:
    paths = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in _families()]
    return [FT2Font(path) for path in paths]


@lru_cache(maxsize=32)
def _pillow_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=4096)
def _font_of(character: str) -> FT2Font | None:
    return next((font for font in _fonts() if ord(character) in font.get_charmap()), None)


@lru_cache(maxsize=4096)
def _advance(character: str) -> float:
    """Width of a character in units of the font size."""
    font = _font_of(character)
    if font is None:
        return 1.0
    font.set_size(100, 72)
    return font.load_char(ord(character)).linearHoriAdvance / 65536 / 100
