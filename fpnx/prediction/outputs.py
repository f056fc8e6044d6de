"""The files that predictions are written to: COCO results, tables of classes, masks; and what is beside each output."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fpnx.core.config import OutputConfig
from fpnx.core.errors import FpnxError
from fpnx.core.files import replace_file
from fpnx.core.predict_config import PredictConfig
from fpnx.core.text import escape
from fpnx.labels.annotations import Category, Task
from fpnx.prediction.journal import Journal
from fpnx.remote.urls import is_url
from fpnx.store.output_path import check_output, real_output
from fpnx.store.writer import part_path
from fpnx.visualization.class_colours import class_colour
from fpnx.visualization.png_files import PngPaths, save_png

__all__ = [
    "DEFAULT_OUTPUTS",
    "MASK_CLASSES",
    "check_pictures",
    "check_target",
    "resolve_output",
    "run_path",
    "save_mask",
    "write_classes",
    "write_csv",
    "write_document",
    "write_results",
]

DEFAULT_OUTPUTS: dict[Task, str] = {
    "detection": "predictions.json",
    "classification": "predictions.csv",
    "semantic": "predictions_masks",
}
SUFFIXES = {"detection": ".json", "classification": ".csv", "semantic": ""}
MASK_CLASSES = "classes.json"  # in a folder of masks: the classes by the values of pixels
COLUMNS = ("path", "label", "score", "rank", "category_id")


def resolve_output(output: str | os.PathLike[str]) -> Path:
    """The path of an output.

    Raises:
        FpnxError: for an address, or a link that leads nowhere.
    """
    if is_url(os.fsencode(output)):
        raise FpnxError(f"output {escape(output)}: predictions are written to a disk: name a file, and send it then")
    return real_output(Path(output))


def run_path(output: Path) -> Path:
    """The file beside an output that says how it was made, and which images failed."""
    return output.with_name(f"{output.stem if output.suffix else output.name}.run.json")


def check_target(output: Path, task: Task, config: PredictConfig) -> None:
    """Refuse an output that cannot be written, or is there without `resume` or `overwrite`.

    Raises:
        FpnxError: with the reason and what to do.
    """
    suffix, target = output.suffix.lower(), DEFAULT_OUTPUTS[task]
    if task == "semantic":
        _check_folder(output, config)
        return
    if suffix in (".json", ".csv") and suffix != SUFFIXES[task]:
        what = "boxes are written as COCO results" if task == "detection" else "classes are written as a table"
        raise FpnxError(f"output {escape(output)}: {what}: take a name such as {target}")
    check_output(output, OutputConfig(resume=config.resume, overwrite=config.overwrite))


def check_pictures(folder: Path, names: Sequence[str], config: PredictConfig) -> None:
    """Refuse a folder for pictures that is none, or that has pictures of these images without `resume` or `overwrite`.

    Raises:
        FpnxError: with the reason and what to do.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise FpnxError(f"draw {escape(folder)}: it is not a folder: name another")
    paths = PngPaths(folder, names)
    existing = [] if config.resume or config.overwrite else [n for n in names if os.path.lexists(paths[n])]
    if existing:
        raise FpnxError(
            f"{len(existing)} of the pictures are there already, such as {escape(paths[existing[0]])}: replace them "
            f"with --overwrite, or name another folder with --draw"
        )


def _check_folder(output: Path, config: PredictConfig) -> None:
    if output.suffix.lower() in (".json", ".csv", ".png"):
        raise FpnxError(f"output {escape(output)}: masks are a PNG for each image: name a folder, such as masks")
    if os.path.lexists(output) and not output.is_dir():
        raise FpnxError(f"output {escape(output)} is not a folder: name another with -o")
    if not output.parent.is_dir():
        raise FpnxError(f"output folder {escape(output.parent)} does not exist: make it, or name another with -o")
    existing = part_path(output).exists() or run_path(output).exists() or (output.is_dir() and any(output.iterdir()))
    if existing and not (config.resume or config.overwrite):
        raise FpnxError(
            f"{escape(output)} exists: continue it with --resume, replace its masks with --overwrite, or name another "
            f"with -o"
        )


def write_results(output: Path, journal: Journal, names: Sequence[str], image_ids: Sequence[int | str]) -> None:
    """Write COCO's results: a list with one object of JSON for each object found, in the order of the images.

    Raises:
        FpnxError: where it cannot be written; an earlier file then stays.
    """

    def chunks() -> Iterator[bytes]:
        before = b"[\n"
        for index, entry in journal.entries():
            image = {"image_id": image_ids[index], "file_name": names[index]}
            for result in entry["results"]:
                yield before + json.dumps(image | result).encode("ascii")
                before = b",\n"
        yield b"[]\n" if before == b"[\n" else b"\n]\n"

    _replace(output, chunks())


def write_csv(output: Path, journal: Journal, names: Sequence[str]) -> None:
    """Write a table with a row for each image and class, the most likely first: path, label, score, rank, category_id.

    Raises:
        FpnxError: where it cannot be written; an earlier file then stays.
    """

    def chunks() -> Iterator[bytes]:
        yield _row(COLUMNS)
        for index, entry in journal.entries():
            for rank, result in enumerate(entry["results"], 1):
                yield _row((names[index], result["category_name"], result["score"], rank, result["category_id"]))

    _replace(output, chunks())


def write_classes(folder: Path, categories: Sequence[Category]) -> None:
    """Write which class each value of the masks in a folder is."""
    values = {str(category.id): category.name for category in categories}
    _replace(folder / MASK_CLASSES, [json.dumps(values, indent=2).encode() + b"\n"])


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document.

    Raises:
        FpnxError: where it cannot be written.
    """
    _replace(path, [json.dumps(document, indent=2).encode("ascii") + b"\n"])


def save_mask(paths: PngPaths, name: str, class_ids: np.ndarray) -> None:
    """Write a mask whose pixels have the numbers of their classes: a palette of the colours of pictures, or 16 bits.

    Raises:
        FpnxError: where it cannot be written.
    """
    if class_ids.min() < 0 or class_ids.max() > 65535:
        raise FpnxError("numbers of classes below 0 or above 65535 do not fit into a PNG")
    if class_ids.max() > 255:
        picture = Image.fromarray(class_ids.astype(np.uint16))
    else:
        picture = Image.fromarray(class_ids.astype(np.uint8))
        picture.putpalette([part for value in range(256) for part in class_colour(value)])
    save_png(picture, paths[name], {})


def _row(values: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _replace(path: Path, chunks: Any) -> None:
    try:
        replace_file(path, chunks)
    except OSError as error:
        raise FpnxError(f"cannot write {escape(path)}: {error.strerror or error}; --resume tries again") from error
