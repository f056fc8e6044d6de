"""Parsing and validation of option values: channels, sizes, points, numbers and choices; errors are one line."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fpnx.core.errors import FpnxError
from fpnx.core.option import declared_option
from fpnx.core.text import did_you_mean, escape

__all__ = [
    "PLOTS",
    "auto_or_whole",
    "check_choice",
    "check_fields",
    "check_plot",
    "check_whole",
    "checked_size",
    "freeze",
    "parse_blocks",
    "parse_channels",
    "format_size",
    "parse_pool",
    "parse_roi_size",
    "parse_size",
    "point_text",
    "several",
    "three_numbers",
]

PLOTS = (".png", ".svg", ".pdf")  # endings of charts that are written

SIZES = ("recipe", "native")
MAX_ROI_SIDE = 64  # cells


def parse_channels(channels: str | Iterable[int]) -> tuple[int, ...]:
    """`"3,17"`, `"0-8"` or a sequence of numbers → channel numbers, in the same order.

    Raises:
        FpnxError: for other text, or more than 100 channels.
    """
    chosen: list[int] = []
    for part in channels.split(",") if isinstance(channels, str) else channels:
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(part).strip(), re.ASCII)
        if match is None:
            raise FpnxError(f"channel {part!r}: take numbers and ranges such as 3,17 or 0-8")
        chosen += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not 1 <= len(chosen) <= 100:
        raise FpnxError(f"{len(chosen)} channels: take from 1 to 100 numbers, such as 3,17 or 0-8")
    return tuple(chosen)


def parse_blocks(blocks: str | int | Sequence[int]) -> tuple[int, ...]:
    """`"5,11"`, 11 or a sequence of numbers → numbers of blocks, in the same order; negative ones count from the end.

    Raises:
        FpnxError: for anything else.
    """
    parts = [blocks] if isinstance(blocks, int) else blocks.split(",") if isinstance(blocks, str) else list(blocks)
    for part in parts or [""]:
        if isinstance(part, bool) or not re.fullmatch(r"\s*-?\d{1,4}\s*", str(part), re.ASCII):
            raise FpnxError(f"block {str(part)!r}: take numbers such as 11, -1 or 5,8,11")
    return tuple(map(int, parts))


def parse_size(text: str) -> tuple[int, int] | None:
    """`"480x640"` → (480, 640), height × width; None for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", text)
    return (int(match[1]), int(match[2])) if match else None


def format_size(size: tuple[int, int]) -> str:
    """(480, 640) → `"480x640"`, as files and options write height × width."""
    return f"{size[0]}x{size[1]}"


def parse_pool(pool: str) -> tuple[int, int] | None:
    """(height, width) to which each level is pooled: `"avg"` and `"max"` give (1, 1), `"7x7"` (7, 7), `"none"` None."""
    return None if pool == "none" else parse_size(pool) or (1, 1)


def parse_roi_size(size: str | int | tuple[int, int]) -> str:
    """A size of region features in the form of the config: `"7x7"`, or `"avg"`.

    Raises:
        FpnxError: for anything else, or more than 64 cells a side.
    """
    text = "x".join(map(str, size)) if isinstance(size, (tuple, list)) else str(size)
    if text == "avg":
        return text
    pair = parse_size(f"{text}x{text}" if text.isascii() and text.isdigit() else text)
    if pair is None or max(pair) > MAX_ROI_SIDE:
        raise FpnxError(
            f"roi size {size!r}: take a number of cells such as 7, height x width such as 7x7, none over "
            f"{MAX_ROI_SIDE}, or avg"
        )
    return format_size(pair)


def three_numbers(what: str, value: str | Iterable[float]) -> tuple[float, ...]:
    """Three finite numbers, from a sequence or a comma-separated text."""
    parts = value.split(",") if isinstance(value, str) else list(value)
    try:
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise FpnxError(f"{what} {value!r}: take three numbers such as 123.675,116.28,103.53")
    return numbers


def checked_size(size: str | int | tuple[int, int]) -> str | tuple[int, int]:
    """A size in the form of the config: `"recipe"`, `"native"` or (height, width)."""
    text = "x".join(map(str, size)) if isinstance(size, (tuple, list)) else str(size)
    if text.isascii() and text.isdigit():
        text = f"{text}x{text}"
    if text in SIZES:
        return text
    pair = parse_size(text)
    if pair is None:
        raise FpnxError(
            f"size {size!r}: take recipe, native, a side such as 224, or height x width such as 480x640, "
            "none over 99999"
        )
    return pair


def point_text(point: str | tuple[float, float]) -> str:
    """A point in the form of the config: `"120,80"` in source pixels, or `"50%,50%"`; x first."""
    text = ",".join(map(str, point)) if isinstance(point, (tuple, list)) else str(point)
    if not re.fullmatch(r"\s*\d+(\.\d*)?%?\s*,\s*\d+(\.\d*)?%?\s*", text, re.ASCII):
        raise FpnxError(f"point {text!r}: take x and y in source pixels such as 120,80, or shares such as 50%,50%")
    text = "".join(text.split())
    if any(float(part[:-1]) > 100 for part in text.split(",") if part.endswith("%")):
        raise FpnxError(f"point {text!r}: shares go from 0% to 100%")
    return text


def several(what: str, value: Any) -> tuple[Any, ...]:
    """The values of an option that takes several, repeated or comma-separated; duplicates are refused."""
    parts = [value] if isinstance(value, (str, int)) else list(value or ())
    values = [item.strip() if isinstance(item, str) else item
             for part in parts for item in (part.split(",") if isinstance(part, str) else [part])]  # fmt: skip
    if "" in values:
        raise FpnxError(f"{what} {value!r}: a value is empty: put one there, or leave it out")
    duplicate = next((item for item in values if values.count(item) > 1), None)
    if duplicate is not None:
        raise FpnxError(f"{what} {duplicate} is given twice: name each once")
    return tuple(values)


def auto_or_whole(what: str, value: str | int, most: int) -> str | int:
    """`"auto"`, or a whole number from 1 to `most`."""
    if value == "auto":
        return value
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    check_whole(what, number, 1, most, "auto or ")
    return number


TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    tuple: "a pair",
    Iterable: "several",
}


def check_fields(config: Any) -> None:
    """Refuse values of another type than their fields, or that are none of their option's choices.

    A path is converted where text is accepted, a numpy number to one of Python.

    Raises:
        FpnxError: with the field, the value and the accepted types or choices.
    """
    kinds = _kinds(type(config))  # type: ignore[arg-type]
    for each in fields(config):
        value, accepted, name = getattr(config, each.name), kinds[each.name], each.name.replace("_", " ")
        if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a numpy number
            value = value.item()
            freeze(config, each.name, value)
        if isinstance(value, os.PathLike) and str in accepted:
            value = os.fspath(value)
            freeze(config, each.name, value)
        if not any(_is_of(value, kind) for kind in accepted):
            accepted_types = " or ".join(TYPE_NAMES[kind] for kind in accepted if kind in TYPE_NAMES)
            example = "" if each.default in (None, "") else f", such as {each.default!r}"
            raise FpnxError(f"{name} {escape(repr(value))[:80]}: take {accepted_types}{example}")
        declared = declared_option(each)
        if declared is not None and declared.choices and value is not None:
            check_choice(name, value, declared.choices)


@functools.cache
def _kinds(config: type) -> dict[str, tuple[Any, ...]]:
    """The types of each field, without type arguments."""
    hints = get_type_hints(config)
    unions = {
        name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,) for name, hint in hints.items()
    }
    return {name: tuple(get_origin(kind) or kind for kind in kinds) for name, kinds in unions.items()}


def _is_of(value: object, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, (tuple, list))
    if kind is Iterable:
        return isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    return isinstance(value, kind)


def freeze(config: object, name: str, value: object) -> None:
    """Set a field of a frozen config; only for its own `__post_init__`."""
    object.__setattr__(config, name, value)


def check_plot(name: str) -> None:
    """Refuse a name for a plot that does not end in one of `PLOTS`."""
    if not name.lower().endswith(PLOTS):
        raise FpnxError(f"plot {escape(name)}: take a name that ends in {', '.join(PLOTS)}")


def check_whole(what: str, value: object, least: int, most: int, prefix: str = "") -> None:
    """Raise FpnxError unless `value` is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise FpnxError(f"{what} {value!r}: take {prefix}a whole number from {least} to {most}")


def check_choice(what: str, value: object, choices: Collection[str]) -> None:
    """Raise FpnxError unless `value` is one of `choices`; the message names the nearest one."""
    if value not in choices:
        raise FpnxError(f"{what} {value!r}: take one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
