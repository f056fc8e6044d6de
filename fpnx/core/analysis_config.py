"""The options of compare, export and probe: validated, frozen, each declared once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fpnx.core.config import OutputConfig
from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.option import like, option
from fpnx.core.option_groups import TASKS
from fpnx.core.text import escape
from fpnx.core.validation import PLOTS, check_fields, check_whole, freeze

__all__ = ["EXPORT_FORMATS", "CompareConfig", "ExportConfig", "ProbeConfig", "checked_picture"]

EXPORT_FORMATS = ("npy", "safetensors", "hloc")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class _LevelsConfig:
    """Which levels of stored files to take, as a tuple; None: all."""

    levels: str | Iterable[str] | None = option(
        None, "Such as P3-P5 or C3,P3; by default all in the file.", "Levels", metavar="LEVELS", complete="levels"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.levels is not None:
            freeze(self, "levels", parse_levels(self.levels))


@dataclass(frozen=True, kw_only=True)
class CompareConfig(_LevelsConfig):
    """All options of `fpnx compare`."""

    sample: int = option(1000, "Images for RSA, drawn from all; CKA takes all.", "Levels", metavar="N")
    seed: int = option(0, "Of the drawing.", "Levels", metavar="N")
    overwrite: bool = like(OutputConfig, "overwrite", help="Replace an existing picture.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("sample", self.sample, 4, 20_000)
        check_whole("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(_LevelsConfig):
    """All options of `fpnx export`."""

    to: str = option("npy", "Which other tool it is for.", "Output", choices=EXPORT_FORMATS)
    join: bool = option(False, "npy: one array of all levels, side by side.", "Output")
    overwrite: bool = like(OutputConfig, "overwrite", help="Replace an earlier export.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join and self.to != "npy":
            raise FpnxError(f"join is for npy: leave it out with {self.to}")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(_LevelsConfig):
    """All options of `fpnx probe`."""

    labels: str = option(
        "",
        "Label file or folder (COCO, YOLO, VOC, CSV, masks), or folders: the images' own.",
        "Labels",
        metavar="LABELS",
    )
    task: str | None = option(
        None, "classification, detection or semantic (default: by the labels).", "Labels", metavar="TASK",
        choices=TASKS,
    )  # fmt: skip
    cells: int = option(50, "semantic: pixels drawn from each image.", "Labels", metavar="N")
    folds: int = option(5, "Parts for the cross-validation.", "Classifiers", metavar="N")
    neighbors: int = option(10, "Nearest neighbours that vote.", "Classifiers", metavar="N")
    l2: float = option(0.01, "Penalty of the linear classifier's weights.", "Classifiers", metavar="X")
    seed: int = option(0, "Of all that is drawn.", "Classifiers", metavar="N")
    plot: str | None = option(None, "Draw the accuracies into FILE.png (.svg, .pdf).", "Output", metavar="FILE")
    overwrite: bool = like(OutputConfig, "overwrite", help="Replace an existing chart.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("cells", self.cells, 1, 1_000_000)
        check_whole("folds", self.folds, 2, 100)
        check_whole("neighbors", self.neighbors, 1, 1000)
        check_whole("seed", self.seed, 0, MAX_SEED)
        if not 0 < self.l2 < math.inf:
            raise FpnxError(f"l2 {self.l2}: take a number above 0, such as 0.01")


def checked_picture(picture: str | os.PathLike[str] | None, overwrite: bool) -> Path | None:
    """The path of a chart to write; None for none.

    Raises:
        FpnxError: for a path that cannot be written, or that exists without `overwrite`.
    """
    if picture is None:
        return None
    if "://" in os.fspath(picture):
        raise FpnxError(f"picture {escape(picture)} is an address: name a file, and copy it there")
    path = Path(picture)
    if path.suffix.lower() not in PLOTS:
        raise FpnxError(f"picture {escape(path)}: take a name that ends in {', '.join(PLOTS)}")
    if not path.parent.is_dir():
        raise FpnxError(f"{escape(path.parent)} does not exist: make it, or name another file")
    if path.is_dir():
        raise FpnxError(f"{escape(path)} is a folder: name a file")
    if path.exists() and not overwrite:
        raise FpnxError(f"{escape(path)} exists: replace it with --overwrite, or name another file")
    return path
