"""One self-contained HTML page to look through: no network, a strict policy, names only as text."""

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
from fpnx.visualization.html.encoding import PLAIN_MODES, Digest, digest, encoded
from fpnx.visualization.panels import colour_table
from fpnx.visualization.scene import Scene, about_model

__all__ = ["PAGE_BYTES", "Page", "write_page"]

PAGE_BYTES = 50_000_000
TAIL_BYTES = 200_000  # what comes after the images: facts of the files, the script
PHOTO_SIDE = 640  # pixels of the longer side of a source picture
BROKEN_IMAGES = 100  # named in the page


@dataclass(frozen=True)
class Page:
    """A page that was written: how many images it holds, and how many `limit_bytes` left no room for."""

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
    images: Iterable[Sequence[Scene]],
    stores: Sequence[Store],
    names: Sequence[str],
    config: VisualizeConfig,
    left_out: int,
    listener: Listener,
    limit_bytes: int = PAGE_BYTES,
) -> Page:
    """Write the page; images that would take it over `limit_bytes` are left out, and counted in it.

    `images` gives the scenes of each image, one a store; `left_out` counts those that are left out already.

    Raises:
        FpnxError: where it cannot be written, or not one image fits.
    """
    levels = [chosen_levels(store, config.levels) for store in stores]
    facts = [
        digest(store, chosen, lambda done, total: listener.progress("maps measured", done, total))
        for store, chosen in zip(stores, levels, strict=True)
    ]
    skipped: list[str] = []
    count = over = 0
    with atomic_write(path) as part, open(part, "w", encoding="utf-8") as file:
        written = file.write(_head())
        for scenes in images:
            try:
                block = _data(f"image-{count}", _image(scenes, levels, facts))
            except FpnxError as error:
                skipped.append(f"{escape(scenes[0].path)}: {error}")
                continue
            if over or written + len(block) + TAIL_BYTES > limit_bytes:
                over += 1
                continue
            written += file.write(block)
            count += 1
        if not count and over:
            raise FpnxError(f"not one image fits into a page of {limit_bytes / 1e6:.0f} MB: take coarser --levels")
        notes = _notes(count, over, left_out, skipped, limit_bytes)
        described = [
            _file(store, name, chosen, digests)
            for store, name, chosen, digests in zip(stores, names, levels, facts, strict=True)
        ]
        table = base64.b64encode(colour_table(config.colormap).tobytes()).decode()
        index = {
            "images": count,
            "files": described,
            "notes": notes,
            "colours": table,
            "mode": config.mode if config.mode in (*PLAIN_MODES, "pca") else "energy",
            "overlay": config.overlay,
            "perImage": config.per_image,
        }
        written += file.write(_data("index", index) + _tail())
    return Page(str(path), path.stat().st_size, count, over, limit_bytes)


def _image(
    scenes: Sequence[Scene], levels: Sequence[Sequence[str]], facts: Sequence[dict[str, Digest]]
) -> dict[str, Any]:
    first = scenes[0]
    files: list[dict[str, Any]] = []
    for scene, chosen, digests in zip(scenes, levels, facts, strict=True):
        if scene.missing:
            files.append({"missing": escape(scene.missing)})
            continue
        maps = {}
        for level in chosen:
            features = scene.read(level)
            reach = scene.reach(level, features.shape[1:])
            shares = [covered / side for covered, side in zip(reach, scene.source_size, strict=True)]
            maps[level] = {**encoded(features, digests[level]), "reach": shares}
        files.append({"seen": list(scene.input_size), "maps": maps})
    return {
        "name": escape(first.path),
        "size": list(first.source_size),
        "remark": escape(first.photo.remark),
        "photo": _photo(first),
        "files": files,
    }


def _photo(scene: Scene) -> str:
    """The source picture as a data: address; empty where there is none."""
    if scene.photo.picture is None:
        return ""
    picture = scene.photo.picture.copy()
    picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), reducing_gap=3.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _file(store: Store, name: str, levels: Sequence[str], facts: dict[str, Digest]) -> dict[str, Any]:
    return {
        "name": escape(name),
        "about": about_model(str(store.config.get("backbone", "unknown")), store.levels, store.provenance.weights),
        "levels": {
            level: {
                "stride": store.stride(level),
                "ranges": {mode: _finite(ends) for mode, ends in facts[level].ranges.items()},
                "explained": [float(share) for share in facts[level].basis.explained],
                "channels": int(facts[level].directions.shape[1]),
                "directions": int(facts[level].directions.shape[0]),
                "error": facts[level].error,
            }
            for level in levels
            if level in facts
        },
    }


def _finite(ends: Sequence[float]) -> list[float]:
    return [float(end) if np.isfinite(end) else 0.0 for end in ends]


def _notes(count: int, over: int, left_out: int, skipped: Sequence[str], limit_bytes: int) -> list[str]:
    notes = [f"{count} images, made by fpnx {__version__}."]
    if left_out:
        notes.append(f"{left_out} more images of the file are not in this page: --limit takes more.")
    if over:
        notes.append(f"{over} images were left out: a page is at most {limit_bytes / 1e6:.0f} MB.")
    notes += [f"Skipped: {one}" for one in skipped[:BROKEN_IMAGES]]
    return notes


def _head() -> str:
    style, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
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
    """A block of data that no browser runs; `<` is escaped, so that no name can end it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _resource(name: str) -> str:
    return resources.files("fpnx.visualization.html").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
