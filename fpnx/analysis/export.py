"""Stored features in the formats of other tools: NumPy arrays, safetensors, global descriptors of hloc."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.lib import format as npy_format

from fpnx._version import __version__
from fpnx.analysis.vectors import blocks, chosen_levels, pooled
from fpnx.core.analysis_config import ExportConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.files import check_space, disk_error, free_bytes, lock
from fpnx.core.output_names import OutputPaths, name_digest
from fpnx.core.text import escape
from fpnx.core.validation import format_size
from fpnx.store.reader import DONE, Store

__all__ = ["Exported", "check_folder", "export_store"]

MANIFEST = "export.json"
TOOL = "fpnx export"  # in the manifest; a folder without it is never deleted
NAMES = "names.txt"
JOINED = "joined"  # name of the array of all levels
HLOC_FILE = "global-feats-fpnx.h5"  # hloc's own are called global-feats-netvlad.h5, …
HLOC_KEY = "global_descriptor"
SAFETENSORS = ".safetensors"
MAX_PART_BYTES = 255 - len(SAFETENSORS)  # of a part of a path, on most file systems
OVERHEAD = 4096  # bytes for each image, of names, headers and groups
FEWER_LEVELS = "write less with fewer --levels"  # where the disk is full
ENDING = re.compile(r"\.[A-Za-z0-9]{1,8}$")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where it is.
        to: its format, "npy", "safetensors" or "hloc".
        images: number of images.
        left_out: number of images that have no features, since they failed or are pending.
        levels: channels by level.
        renamed: name in the export → stored path, of the images whose paths the other tool cannot hold.
        nonfinite: number of images with NaN or infinite values, which are written as they are.
        bytes: size of all files.
    """

    folder: Path
    to: str
    images: int
    left_out: int
    levels: Mapping[str, int]
    renamed: Mapping[str, str]
    nonfinite: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {**self.__dict__, "folder": str(self.folder), "levels": dict(self.levels), "renamed": dict(self.renamed)}


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that cannot be made, that exists without `overwrite`, or holds files of others.

    Raises:
        FpnxError: with the reason and what to do.
    """
    if not folder.name:
        raise FpnxError(f"output {escape(folder)}: name a new folder")
    if not folder.parent.is_dir():
        raise FpnxError(f"{escape(folder.parent)} does not exist: make it, or name another folder with -o")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise FpnxError(f"{escape(folder)} is not a folder: name another with -o")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FpnxError(f"{escape(folder)} exists: replace it with --overwrite, or name another folder with -o")
    manifest = _manifest(folder)
    if manifest is None:
        raise FpnxError(f"{escape(folder)} is no earlier export, which --overwrite replaces: name another with -o")
    known = {*manifest.get("files", ()), MANIFEST}
    for name in _files(folder):
        if name not in known:
            raise FpnxError(
                f"{escape(folder)} also holds {escape(name)}, which would be lost: move it, or name another folder"
            )


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What an earlier export says of itself; None for a folder that is none."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("tool") == TOOL else None


def export_store(store: Store, folder: Path, config: ExportConfig, listener: Listener) -> Exported:
    """Write the images that are done to a new folder; it gets its name when all of it is written.

    Memory: the vectors of 512 images, or the maps of one. Failed and pending images are left out.

    Raises:
        FpnxError: where no image is done, levels do not fit, or the folder cannot be written.
    """
    (levels,) = chosen_levels([store], config.levels)
    images = np.flatnonzero(store.status == DONE)
    if not len(images):
        raise FpnxError(f"{escape(store.path)} has no image that is done")
    job = _Job(store, levels, images, config.join, listener)
    needed = job.bytes_needed(config.to)
    with lock(folder):
        check_folder(folder, config.overwrite)
        try:
            check_space(folder, needed, free_bytes(folder.parent), FEWER_LEVELS)
            with _new_folder(folder) as part:
                renamed = WRITERS[config.to](part, job)
                _write_manifest(part, job, config.to, renamed)
                size = sum(os.path.getsize(part / name) for name in _files(part))
        except (OSError, RuntimeError) as error:
            raise disk_error(error, folder, needed, FEWER_LEVELS) from error
    columns = [store.levels.index(level) for level in levels]
    return Exported(
        folder=folder,
        to=config.to,
        images=len(images),
        left_out=len(store) - len(images),
        levels=job.channels,
        renamed=renamed,
        nonfinite=int((store.nonfinite[images][:, columns] > 0).any(axis=1).sum()),
        bytes=size,
    )


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place at the end; after an error it is deleted."""
    part, old = (folder.with_name(folder.name + suffix) for suffix in (".part", ".old"))
    for left in (part, old):  # by a run that was killed
        if os.path.lexists(left) and (left.is_symlink() or not left.is_dir() or _manifest(left) is None):
            raise FpnxError(f"{escape(left)} is in the way: move it, or name another folder with -o")
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir()
    try:
        (part / MANIFEST).write_text(json.dumps({"tool": TOOL}))
        yield part
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(part, folder)
        except OSError:
            os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it."""
    found = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(os.path.relpath(path, folder) for path in found)


def _write_manifest(folder: Path, job: _Job, to: str, renamed: Mapping[str, str]) -> None:
    content = {
        "tool": TOOL,
        "version": __version__,
        "to": to,
        "file": escape(job.store.path),
        "fingerprint": job.store.fingerprint,
        "levels": job.channels,
        "images": len(job.images),
        "renamed": renamed,
        "files": [name for name in _files(folder) if name != MANIFEST],
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


class _Job:
    """What is exported: images and levels of a store, and their vectors block by block."""

    def __init__(
        self, store: Store, levels: tuple[str, ...], images: np.ndarray, join: bool, listener: Listener
    ) -> None:
        self.store, self.levels, self.images, self.join, self._listener = store, levels, images, join, listener
        self.paths = [store.paths[index] for index in images.tolist()]
        some = np.array([images[0]])
        self.channels = {level: pooled(store, level, some).shape[1] for level in levels}

    def bytes_needed(self, to: str) -> int:
        """An upper bound of the bytes of all files."""
        values = len(self.images) * sum(self.channels.values()) * 4
        if to == "safetensors":
            padded = [self.store.padded_sizes[index] for index in self.images.tolist()]
            sizes = {size: padded.count(size) for size in set(padded) if size is not None}
            values = 0
            for size, count in sizes.items():
                maps = [self.store.dataset(size, level) for level in self.levels]
                values += count * sum(int(np.prod(each.shape[1:])) * each.dtype.itemsize for each in maps)
        return values + OVERHEAD * len(self.images)

    def vectors(self) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Yields positions of images, and their vectors (n, C) float32 by level."""
        for part in blocks(len(self.images)):
            yield part, {level: pooled(self.store, level, self.images[part]) for level in self.levels}
            self.report(part.stop)

    def report(self, done: int) -> None:
        """Report how many images are done."""
        self._listener.progress("images", done, len(self.images))


def _write_npy(folder: Path, job: _Job) -> dict[str, str]:
    """`P3.npy`, … or `joined.npy`: (N, C) float32; `names.txt`: a name a line, in the order of the rows."""
    names, renamed = _names(job.paths, str.isprintable)
    channels = {JOINED: sum(job.channels.values())} if job.join else job.channels
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for name in channels:
            files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
        for name, file in files.items():
            shape = (len(job.images), channels[name])
            header = {"descr": npy_format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": shape}
            npy_format.write_array_header_1_0(file, header)
        for _, vectors in job.vectors():
            if job.join:
                vectors = {JOINED: np.concatenate(list(vectors.values()), axis=1)}
            for name, values in vectors.items():
                files[name].write(np.ascontiguousarray(values, "<f4").tobytes())
    (folder / NAMES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8", newline="\n")
    return renamed


def _write_safetensors(folder: Path, job: _Job) -> dict[str, str]:
    """A file an image, `cats/01.jpg.safetensors`: each level (C, H, W) in the stored dtype, without padding."""
    from safetensors.numpy import save_file

    names, _ = _names(job.paths, _is_file_name)
    targets, renamed = OutputPaths(folder, names, SAFETENSORS), dict[str, str]()
    for number, (index, path, name) in enumerate(zip(job.images.tolist(), job.paths, names, strict=True)):
        item, target = job.store[index], targets[name]
        tensors = {}
        for level in job.levels:
            height, width = item.valid(level)
            tensors[level] = np.ascontiguousarray(item[level][:, :height, :width])
        target.parent.mkdir(parents=True, exist_ok=True)
        strides = {f"stride_{level}": str(item.stride(level)) for level in job.levels}
        sizes = {"source_size": format_size(item.source_size), "input_size": format_size(item.input_size)}
        save_file(tensors, target, {"name": escape(path), **sizes, **strides})
        relative = os.path.relpath(target, folder)
        if relative != path + SAFETENSORS:
            renamed[relative] = path
        job.report(number + 1)
    return renamed


def _write_hloc(folder: Path, job: _Job) -> dict[str, str]:
    """An HDF5 file with a group for each image, named as the image, and in it the dataset `global_descriptor` (D,).

    hloc compares descriptors by their dot product: the vector of each level is divided by its length, so that levels
    weigh the same, and so is the joined one.
    """
    names, renamed = _names(job.paths, _is_hloc_name)
    with h5py.File(folder / HLOC_FILE, "w") as file:
        for part, vectors in job.vectors():
            unit = np.concatenate([_unit(each) for each in vectors.values()], axis=1)
            for name, vector in zip(names[part], _unit(unit), strict=True):
                file.create_group(name).create_dataset(HLOC_KEY, data=vector)
    return renamed


WRITERS: dict[str, Callable[[Path, _Job], dict[str, str]]] = {
    "npy": _write_npy,
    "safetensors": _write_safetensors,
    "hloc": _write_hloc,
}


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(n, C) float32 of length 1; vectors of length 0 stay 0."""
    values = vectors.astype(np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _names(paths: Sequence[str], fits: Callable[[str], bool]) -> tuple[list[str], dict[str, str]]:
    """The name of each image in the export, and name → path of those that do not fit as they are.

    These are written in ASCII, with eight digits of a hash of the path: `b\\xff d.jpg` becomes `b_d~b6bb2cbe.jpg`.
    """
    names, renamed = [], {}
    for path in paths:
        name = path
        if not fits(path):
            stem, ending = path, ""
            if match := ENDING.search(path):
                stem, ending = path[: match.start()], match[0]
            plain = re.sub(r"[^A-Za-z0-9.-]+", "_", stem).strip("_.")[:100]
            name = f"{plain}~{name_digest(path)}{ending}"
            renamed[name] = path
        names.append(name)
    return names, renamed


def _is_file_name(name: str) -> bool:
    """Whether a name is UTF-8 without control characters, leads into its folder, and is not too long."""
    parts = name.split("/")
    too_long = any(len(part.encode(errors="replace")) > MAX_PART_BYTES for part in parts)
    return name.isprintable() and not too_long and not any(part in ("", ".", "..") for part in parts)


def _is_hloc_name(name: str) -> bool:
    """Whether hloc can hold a name: its lists have names with spaces between them, and comments after `#`."""
    parts = name.split("/")
    is_path = not any(part in ("", ".", "..", HLOC_KEY) for part in parts)
    return name.isprintable() and " " not in name and not name.startswith("#") and is_path
