"""The options of compare, export and probe: validated, frozen, each declared once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fpnx.core.config import PLOTS, OutputConfig
from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.option import like, option
from fpnx.core.text import escape
from fpnx.core.validation import check_fields, check_whole, freeze

__all__ = ["EXPORT_FORMATS", "CompareConfig", "ExportConfig", "check_picture"]

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


def check_picture(path: Path, overwrite: bool) -> None:
    """Refuse a path of a chart that cannot be written, or that exists without `overwrite`.

    Raises:
        FpnxError: with the reason and what to do.
    """
    if path.suffix.lower() not in PLOTS:
        raise FpnxError(f"picture {escape(path)}: take a name that ends in {', '.join(PLOTS)}")
    if not path.parent.is_dir():
        raise FpnxError(f"{escape(path.parent)} does not exist: make it, or name another file")
    if path.is_dir():
        raise FpnxError(f"{escape(path)} is a folder: name a file")
    if path.exists() and not overwrite:
        raise FpnxError(f"{escape(path)} exists: replace it with --overwrite, or name another file")
