"""Writes the self-contained HTML page: no network access, a strict content security policy, names only as text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fpnx._version import __version__
from fpnx.core.config import VisualizeConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.files import atomic_write
from fpnx.core.text import escape
from fpnx.store.reader import Store
from fpnx.visualization.class_colours import class_colour, text_colour
from fpnx.visualization.figure import chosen_levels
from fpnx.visualization.html.encoding import (
    PLAIN_MODES,
    LevelStatistics,
    RoundedMap,
    coordinates,
    encode_map,
    measure_statistics,
    rice_codes,
    round_map,
    similarity_error,
)
from fpnx.visualization.image_maps import ImageMaps, describe_model
from fpnx.visualization.panels import colour_table
from fpnx.visualization.predicted_boxes import PredictedBox

__all__ = ["PAGE_BYTES", "Page", "write_page"]

PAGE_BYTES = 50_000_000
TAIL_BYTES = 200_000  # reserved for what follows the images: the index and the script
PHOTO_SIDE = 640  # pixels of the longer side of a source image
MAX_SKIPPED_NOTES = 100
SIMILARITY_STEPS = tuple(n / 127 for n in (1, 1.5, 2, 3, 4, 5, 6, 7, 10, 14, 20, 28))  # from fine to coarse
SIMILARITY_ERROR = 0.05  # of the cosine: images are left out before it becomes larger


@dataclass
class _ImageBlock:
    """The JSON values of an image, and the coordinates of its maps by position of the file and level."""

    values: dict[str, Any]
    exact: dict[tuple[int, str], np.ndarray]


@dataclass(frozen=True)
class Page:
    """A page that was written, with the number of images in it and of those left out because of `limit_bytes`.

    In each image, 95 % of the cosines between cells of a level are within `similarity_error` of the exact ones.
    """

    path: str
    bytes: int
    images: int
    left_out: int
    limit_bytes: int = PAGE_BYTES
    similarity_error: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        return asdict(self)


def write_page(
    path: Path,
    images: Iterable[Sequence[ImageMaps]],
    total: int,
    stores: Sequence[Store],
    names: Sequence[str],
    config: VisualizeConfig,
    left_out: int,
    listener: Listener,
    limit_bytes: int = PAGE_BYTES,
) -> Page:
    """Write the page, at most `limit_bytes` long, with similarity as exact as there is room for.

    Each image may take an equal share of the room that is left: its coordinates are rounded to the finest of
    `SIMILARITY_STEPS` that fits. Where even an error of `SIMILARITY_ERROR` takes more, later images are left out, and
    the page says how many. Only an image that does not fit alone is rounded more.

    `images` yields, for each of at most `total` images, its maps in each store; `left_out` counts images that are left
    out already.

    Raises:
        FpnxError: where it cannot be written, or no image fits.
    """
    levels = [chosen_levels(store, config.levels) for store in stores]
    statistics = [
        measure_statistics(store, chosen, lambda done, total: listener.progress("maps measured", done, total))
        for store, chosen in zip(stores, levels, strict=True)
    ]
    errors = [dict.fromkeys(file_statistics, 0.0) for file_statistics in statistics]
    skipped: list[str] = []
    boxes = _BoxIndex()
    count = 0
    with atomic_write(path) as part, open(part, "w", encoding="utf-8") as file:
        written = file.write(_head())
        for maps_by_store in images:
            try:
                block = _image_block(maps_by_store, levels, statistics)
                if maps_by_store[0].boxes is not None:
                    block.values["boxes"] = boxes.values(maps_by_store[0].boxes)
            except FpnxError as error:
                skipped.append(f"{escape(maps_by_store[0].path)}: {error}")
                continue
            room = limit_bytes - TAIL_BYTES - written
            fitting = _round_to_fit(block, room, room // max(1, total - count - len(skipped)), alone=not count)
            if fitting is None:
                break
            step, rounded = fitting
            for (position, level), exact in block.exact.items():
                block.values["files"][position]["maps"][level]["directions"] = rice_codes(rounded[position, level])
                errors[position][level] = max(errors[position][level], similarity_error(exact, step))
            written += file.write(_data(f"image-{count}", block.values))
            count += 1
        over_limit = max(0, total - count - len(skipped))
        if not count and over_limit:
            raise FpnxError(f"not one image fits into a page of {limit_bytes / 1e6:.0f} MB: take coarser --levels")
        largest_error = max((error for by_level in errors for error in by_level.values()), default=0.0)
        notes = _notes(count, over_limit, left_out, skipped, limit_bytes, largest_error)
        if config.predictions is not None:
            name = escape(os.path.basename(config.predictions))
            notes.insert(1, f"Boxes are from {name}: strong in the level that they come from, faint in the others.")
        files = [
            _file_index(store, name, chosen, file_statistics, file_errors)
            for store, name, chosen, file_statistics, file_errors in zip(
                stores, names, levels, statistics, errors, strict=True
            )
        ]
        table = base64.b64encode(colour_table(config.colormap).tobytes()).decode()
        index = {
            "images": count,
            "files": files,
            "notes": notes,
            "colours": table,
            "mode": config.mode if config.mode in (*PLAIN_MODES, "pca") else "energy",
            "overlay": config.overlay,
            "perImage": config.per_image,
        }
        if config.predictions is not None:
            index["boxes"] = boxes.to_json(config.threshold)
        written += file.write(_data("index", index) + _tail())
    return Page(str(path), path.stat().st_size, count, over_limit, limit_bytes, largest_error)


class _BoxIndex:
    """Predicted boxes as values of the page, and the classes and levels that they refer to."""

    def __init__(self) -> None:
        self._classes: dict[tuple[int, str], int] = {}
        self._levels: dict[str, int] = {}

    def values(self, boxes: Iterable[PredictedBox]) -> list[list[float]]:
        """x1, y1, x2, y2, score, position of the class, position of the level, of each box."""
        return [
            [
                *(round(value, 1) for value in box.box),
                round(box.score, 4),
                self._classes.setdefault((box.category, box.name), len(self._classes)),
                self._levels.setdefault(box.level, len(self._levels)),
            ]
            for box in boxes
        ]

    def to_json(self, score: float) -> dict[str, Any]:
        """The classes, each with its name, its colour and that of text on it; the levels; and the least score."""
        classes = []
        for number, name in self._classes:
            colour = class_colour(number)
            classes.append({"name": escape(name), "colour": _css(colour), "text": _css(text_colour(colour))})
        return {"classes": classes, "levels": [escape(level) for level in self._levels], "score": score}


def _css(colour: tuple[int, int, int]) -> str:
    return "#" + bytes(colour).hex()


def _image_block(
    maps_by_store: Sequence[ImageMaps],
    levels: Sequence[Sequence[str]],
    statistics: Sequence[dict[str, LevelStatistics]],
) -> _ImageBlock:
    first = maps_by_store[0]
    files: list[dict[str, Any]] = []
    exact: dict[tuple[int, str], np.ndarray] = {}
    for position, (maps, chosen, file_statistics) in enumerate(zip(maps_by_store, levels, statistics, strict=True)):
        if maps.missing:
            files.append({"missing": escape(maps.missing)})
            continue
        encoded = {}
        for level in chosen:
            features = maps.read(level)
            covered_size = maps.covered_size(level, features.shape[1:])
            shares = [covered / side for covered, side in zip(covered_size, maps.source_size, strict=True)]
            encoded[level] = {**encode_map(features, file_statistics[level]), "reach": shares, "directions": ""}
            exact[position, level] = coordinates(features, file_statistics[level].directions)
        files.append({"seen": list(maps.input_size), "maps": encoded})
    values = {
        "name": escape(first.path),
        "size": list(first.source_size),
        "remark": escape(first.photo.note),
        "photo": _photo(first),
        "files": files,
    }
    return _ImageBlock(values, exact)


def _round_to_fit(
    block: _ImageBlock, room: int, share: int, *, alone: bool
) -> tuple[float, dict[tuple[int, str], RoundedMap]] | None:
    """The finest of `SIMILARITY_STEPS` with which an image takes at most `share` bytes, and its maps rounded so.

    If none does within `SIMILARITY_ERROR`, the coarsest step within it, if that fits into `room`. `alone`: otherwise
    the finest step that fits into `room`, whatever the error. None where the image does not fit.
    """
    other_bytes = len(_data("image-000000", block.values))
    rounded: dict[float, dict[tuple[int, str], RoundedMap]] = {}

    def length(step: float) -> int:
        if step not in rounded:
            rounded[step] = {key: round_map(exact, step) for key, exact in block.exact.items()}
        return other_bytes + sum(-(-map_.code_bytes // 3) * 4 for map_ in rounded[step].values())

    def too_coarse(step: float) -> bool:
        return max((similarity_error(exact, step) for exact in block.exact.values()), default=0.0) > SIMILARITY_ERROR

    step = SIMILARITY_STEPS[0]
    if length(step) > share:
        within = SIMILARITY_STEPS[: max(1, bisect_right(SIMILARITY_STEPS, False, key=too_coarse))]
        step = within[-1]
        if length(step) <= share:
            step = within[bisect_left(within, True, key=lambda finer: length(finer) <= share)]
        elif alone:
            step = next((coarse for coarse in SIMILARITY_STEPS[len(within) - 1 :] if length(coarse) <= room), step)
    return (step, rounded[step]) if length(step) <= room else None


def _photo(maps: ImageMaps) -> str:
    """The source image as a data: URL; empty where it is missing."""
    if maps.photo.picture is None:
        return ""
    picture = maps.photo.picture.copy()
    picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), reducing_gap=3.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _file_index(
    store: Store,
    name: str,
    levels: Sequence[str],
    statistics: dict[str, LevelStatistics],
    errors: dict[str, float],
) -> dict[str, Any]:
    return {
        "name": escape(name),
        "about": describe_model(store.backbone, store.pyramid, store.levels, store.provenance.weights),
        "levels": {
            level: {
                "stride": store.stride(level),
                "ranges": {mode: _finite(values) for mode, values in statistics[level].ranges.items()},
                "explained": [float(share) for share in statistics[level].basis.explained],
                "channels": len(statistics[level].directions),
                "error": errors[level],
            }
            for level in levels
            if level in statistics
        },
    }


def _finite(values: Sequence[float]) -> list[float]:
    return [float(value) if np.isfinite(value) else 0.0 for value in values]


def _notes(
    count: int, over_limit: int, left_out: int, skipped: Sequence[str], limit_bytes: int, error: float
) -> list[str]:
    size = f"{limit_bytes / 1e6:.0f} MB"
    notes = [f"{count} images, made by fpnx {__version__}."]
    if over_limit:
        notes.append(
            f"These are {count} of {count + over_limit} images: a page is at most {size}. --images takes others, and "
            f"fewer --levels make room for more."
        )
    if left_out:
        notes.append(f"{left_out} more images of the file are not in this page: --limit takes more, --images others.")
    if count:
        notes.append(
            f"Similarity is computed from all channels, rounded: in each image, 95 % of a level's cosines are within "
            f"{error:.2g} of the exact ones."
        )
    if error > SIMILARITY_ERROR:
        notes.append(f"That is coarse, because one image alone fills {size}: fewer --levels make it finer.")
    notes += [f"Skipped: {text}" for text in skipped[:MAX_SKIPPED_NOTES]]
    return notes


def _head() -> str:
    style, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; script-src '{_csp_hash(script)}'; style-src '{_csp_hash(style)}'; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<title>fpnx</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{_resource('page.html')}"
    )


def _tail() -> str:
    return f"<script>{_resource('page.js')}</script>\n</body>\n</html>\n"


def _data(name: str, value: dict[str, Any]) -> str:
    """A block of JSON that browsers do not execute; `<` is escaped, so that no name can close the block."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _resource(name: str) -> str:
    return resources.files("fpnx.visualization.html").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
