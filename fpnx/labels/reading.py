"""Reading labels of any format, which is recognised by its content."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.labels.annotations import LabelSet, Task
from fpnx.labels.coco import read_coco
from fpnx.labels.csv_labels import read_csv
from fpnx.labels.files import as_text, list_files, read_bytes, read_text
from fpnx.labels.folders import FOLDERS, read_folders
from fpnx.labels.masks import is_class_mask, mask_files, read_masks
from fpnx.labels.semantic import from_outlines
from fpnx.labels.source import LabelSource
from fpnx.labels.voc import read_voc
from fpnx.labels.yolo import NAMES_LINE, YAML_NAMES, is_yolo_text, read_yolo
from fpnx.remote.urls import is_url

__all__ = ["read_labels"]

READERS: dict[str, Callable[[LabelSource], LabelSet]] = {
    "folders": read_folders,
    "csv": read_csv,
    "coco": read_coco,
    "yolo": read_yolo,
    "voc": read_voc,
    "masks": read_masks,
}
# What each format can be used for, by default the first.
TASKS_OF: dict[str, tuple[Task, ...]] = {
    "folders": ("classification",),
    "csv": ("classification",),
    "coco": ("detection", "semantic"),
    "yolo": ("detection", "semantic"),
    "voc": ("detection",),
    "masks": ("semantic",),
}
IN_WORDS = {
    "folders": "folders as classes",
    "csv": "a table of classes",
    "coco": "a COCO file",
    "yolo": "YOLO's text files",
    "voc": "Pascal VOC's XML files",
    "masks": "PNG masks",
}
NOT_LABELS = (  # magic bytes, what it is, what to do
    (b"\x89PNG", "a PNG", "name the folder of masks"),
    (b"\xff\xd8\xff", "a JPEG", "name the labels"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x1f\x8b", "a gzip file", "unpack it"),
    (b"\x89HDF", "an HDF5 file", "give it as images, and name the labels"),
)
START = 1 << 16  # bytes that tell a format


def read_labels(
    labels: str | os.PathLike[str],
    images: Sequence[str],
    root: str | bytes | os.PathLike[str] = "",
    task: Task | None = None,
) -> LabelSet:
    """Read all labels of a file or folder.

    Args:
        labels: `"folders"`, for the first folder of each image's name as its class; or the path of a file or folder, or
            the URL of a COCO file or a table.
        images: names of the images of the run, relative to `root`.
        root: the folder, archive or URL of the images; it need not exist.
        task: what they are for; None for what the format is for by default.

    Raises:
        FpnxError: for labels that cannot be read, are not recognised, or are not for this task.
    """
    source = LabelSource(os.fsdecode(labels), images, os.fsdecode(root))
    kind = _format_of(source)
    if task is not None and task not in TASKS_OF[kind]:
        tasks = " and ".join(TASKS_OF[kind])
        raise FpnxError(f"labels {escape(source.path)}: {IN_WORDS[kind]} can be used for {tasks}, not for {task}")
    found = READERS[kind](source)
    return from_outlines(found) if task == "semantic" and found.task == "detection" else found


def _format_of(source: LabelSource) -> str:
    """The format of a label file or folder."""
    if source.path == FOLDERS:
        return "folders"
    if not source.path:
        raise FpnxError("labels: an empty path; name a file or folder, or give folders")
    if not is_url(os.fsencode(source.path)) and os.path.isdir(source.path):
        return _format_of_folder(source)
    start = read_bytes(source.path, START)
    where = f"labels {escape(source.path)}"
    for magic, name, what_to_do in NOT_LABELS:
        if start.startswith(magic):
            raise FpnxError(f"{where}: {name}, not a label file: {what_to_do}")
    if not start.strip():
        raise FpnxError(f"{where}: the file is empty")
    if _is_xml(start):
        return "voc"
    text = as_text(start, source.path, whole=len(start) < START)
    stripped = text.lstrip()
    if stripped.startswith(("{", "[")):
        return "coco"
    if NAMES_LINE.search(text):
        return "yolo"
    if is_yolo_text(text):
        raise FpnxError(f"{where}: the labels of one image in YOLO's format: name their folder, or the data.yaml")
    if any(delimiter in stripped.splitlines()[0] for delimiter in ",;\t"):
        return "csv"
    raise FpnxError(f"{where}: no known label format: COCO JSON, YOLO, Pascal VOC XML, PNG masks, or path,label")


def _format_of_folder(source: LabelSource) -> str:
    """The format of the labels in a folder.

    Raises:
        FpnxError: where there are none, or several that could be meant.
    """
    where = f"labels {escape(source.path)}"
    files = list_files(source.path, (".json", ".xml", ".csv", ".txt", ".yaml", ".yml"))
    named = [path for path in files if os.path.basename(path).lower() in YAML_NAMES]
    if any(os.path.dirname(path) == source.path.rstrip("/") for path in named):
        return "yolo"
    found: dict[str, str] = {}
    for path in files:
        extension = os.path.splitext(path)[1].lower()
        kind = {".json": "coco", ".xml": "voc", ".csv": "csv", ".txt": "yolo"}.get(extension)
        if kind == "yolo" and kind not in found and not is_yolo_text(read_text(path)):
            continue
        if kind is not None:
            found.setdefault(kind, path)
    masks = mask_files(source)
    if masks and is_class_mask(masks[0]):
        found["masks"] = masks[0]
    listed = ", ".join(f"{kind} ({escape(os.path.relpath(path, source.path))})" for kind, path in found.items())
    stems = {os.path.splitext(os.path.basename(name))[0] for name in source.images}
    coloured = [path for path in masks if os.path.splitext(os.path.basename(path))[0] in stems]
    if not found and coloured:
        raise FpnxError(
            f"{where}: {escape(os.path.relpath(coloured[0], source.path))} has colours, and masks have one value for "
            "each pixel, the number of its class (grey or palette)"
        )
    if not found:
        raise FpnxError(
            f"{where}: a folder without labels (JSON, XML, YOLO's text files, PNG masks); for folders as classes give "
            f"folders"
        )
    if len(found) > 1:
        raise FpnxError(f"{where}: labels of several formats, {listed}: name the file or folder of one")
    kind, path = next(iter(found.items()))
    if kind in ("coco", "csv"):
        raise FpnxError(f"{where}: a folder; name the file, such as {escape(path)}")
    return kind


def _is_xml(start: bytes) -> bool:
    text = start.removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"").removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff")
    return text.lstrip().startswith(b"<")
