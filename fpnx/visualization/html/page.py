"""Writes the self-contained HTML page: no network access, a strict content security policy, names only as text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
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
from fpnx.visualization.figure import chosen_levels
from fpnx.visualization.html.encoding import PLAIN_MODES, LevelStatistics, encode_map, measure_statistics
from fpnx.visualization.image_maps import ImageMaps, describe_model
from fpnx.visualization.panels import colour_table

__all__ = ["PAGE_BYTES", "Page", "write_page"]

PAGE_BYTES = 50_000_000
TAIL_BYTES = 200_000  # reserved for what follows the images: the index and the script
PHOTO_SIDE = 640  # pixels of the longer side of a source image
MAX_SKIPPED_NOTES = 100


@dataclass(frozen=True)
class Page:
    """A page that was written, with the number of images in it and of those left out because of `limit_bytes`."""

    path: str
    bytes: int
    images: int
    left_out: int
    limit_bytes: int = PAGE_BYTES

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        return asdict(self)


def write_page(
    path: Path,
    images: Iterable[Sequence[ImageMaps]],
    stores: Sequence[Store],
    names: Sequence[str],
    config: VisualizeConfig,
    left_out: int,
    listener: Listener,
    limit_bytes: int = PAGE_BYTES,
) -> Page:
    """Write the page. Images that would make it larger than `limit_bytes` are left out; the page says how many.

    `images` yields, for each image, its maps in each store; `left_out` counts images that are left out already.

    Raises:
        FpnxError: where it cannot be written, or no image fits.
    """
    levels = [chosen_levels(store, config.levels) for store in stores]
    statistics = [
        measure_statistics(store, chosen, lambda done, total: listener.progress("maps measured", done, total))
        for store, chosen in zip(stores, levels, strict=True)
    ]
    skipped: list[str] = []
    count = over_limit = 0
    with atomic_write(path) as part, open(part, "w", encoding="utf-8") as file:
        written = file.write(_head())
        for maps_by_store in images:
            try:
                block = _data(f"image-{count}", _image_block(maps_by_store, levels, statistics))
            except FpnxError as error:
                skipped.append(f"{escape(maps_by_store[0].path)}: {error}")
                continue
            if over_limit or written + len(block) + TAIL_BYTES > limit_bytes:
                over_limit += 1
                continue
            written += file.write(block)
            count += 1
        if not count and over_limit:
            raise FpnxError(f"not one image fits into a page of {limit_bytes / 1e6:.0f} MB: take coarser --levels")
        notes = _notes(count, over_limit, left_out, skipped, limit_bytes)
        files = [
            _file_index(store, name, chosen, file_statistics)
            for store, name, chosen, file_statistics in zip(stores, names, levels, statistics, strict=True)
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
        written += file.write(_data("index", index) + _tail())
    return Page(str(path), path.stat().st_size, count, over_limit, limit_bytes)


def _image_block(
    maps_by_store: Sequence[ImageMaps],
    levels: Sequence[Sequence[str]],
    statistics: Sequence[dict[str, LevelStatistics]],
) -> dict[str, Any]:
    first = maps_by_store[0]
    files: list[dict[str, Any]] = []
    for maps, chosen, file_statistics in zip(maps_by_store, levels, statistics, strict=True):
        if maps.missing:
            files.append({"missing": escape(maps.missing)})
            continue
        encoded = {}
        for level in chosen:
            features = maps.read(level)
            covered_size = maps.covered_size(level, features.shape[1:])
            shares = [covered / side for covered, side in zip(covered_size, maps.source_size, strict=True)]
            encoded[level] = {**encode_map(features, file_statistics[level]), "reach": shares}
        files.append({"seen": list(maps.input_size), "maps": encoded})
    return {
        "name": escape(first.path),
        "size": list(first.source_size),
        "remark": escape(first.photo.note),
        "photo": _photo(first),
        "files": files,
    }


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
    store: Store, name: str, levels: Sequence[str], statistics: dict[str, LevelStatistics]
) -> dict[str, Any]:
    return {
        "name": escape(name),
        "about": describe_model(store.backbone, store.pyramid, store.levels, store.provenance.weights),
        "levels": {
            level: {
                "stride": store.stride(level),
                "ranges": {mode: _finite(values) for mode, values in statistics[level].ranges.items()},
                "explained": [float(share) for share in statistics[level].basis.explained],
                "channels": int(statistics[level].directions.shape[1]),
                "directions": int(statistics[level].directions.shape[0]),
                "error": statistics[level].error,
            }
            for level in levels
            if level in statistics
        },
    }


def _finite(values: Sequence[float]) -> list[float]:
    return [float(value) if np.isfinite(value) else 0.0 for value in values]


def _notes(count: int, over_limit: int, left_out: int, skipped: Sequence[str], limit_bytes: int) -> list[str]:
    notes = [f"{count} images, made by fpnx {__version__}."]
    if left_out:
        notes.append(f"{left_out} more images of the file are not in this page: --limit takes more.")
    if over_limit:
        notes.append(f"{over_limit} images were left out: a page is at most {limit_bytes / 1e6:.0f} MB.")
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
