"""What may be an output, and what is refused before any work. No torch."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from fpnx.core.config import OutputConfig
from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.store.writer import part_path

__all__ = ["DEFAULT_OUTPUTS", "check_output", "real_output"]

DEFAULT_OUTPUTS = {"h5": "out.h5", "png": "out_png"}  # by format
WORKING_NAMES = (".part", ".part.new", ".lock")


def check_output(output: Path, config: OutputConfig) -> None:
    """Refuse a name that cannot be written, or that holds what nobody asked to continue or replace.

    Raises:
        FpnxError: saying what is there, and the ways on.
    """
    if not output.name:
        raise FpnxError(f"output {escape(output)} is a folder: name a file in it, such as {escape(output / 'out.h5')}")
    if output.name.endswith(WORKING_NAMES):
        stem = re.sub(r"(\.(part|new|lock))+$", "", str(output))
        raise FpnxError(f"output {escape(output)}: fpnx keeps such names for itself: name the output {escape(stem)}")
    try:
        if "\0" in str(output):
            raise ValueError("a name cannot hold a null byte")
        there = [path for path in (output, part_path(output)) if path.exists()]
        about = os.stat(output) if output in there else None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise FpnxError(f"output {escape(output)}: {why}: name another with -o") from error
    if about is not None and stat.S_ISDIR(about.st_mode):
        raise FpnxError(f"output {escape(output)} is a folder: name a file in it, such as {escape(output / 'out.h5')}")
    if about is not None and not stat.S_ISREG(about.st_mode):
        raise FpnxError(f"output {escape(output)} is not a regular file: name another with -o")
    if not output.parent.is_dir():
        raise FpnxError(f"output folder {escape(output.parent)} does not exist: make it, or name another with -o")
    if there and not (config.resume or config.overwrite):
        what = "exists" if output in there else "holds an unfinished run"
        raise FpnxError(
            f"{escape(there[0])} {what}: continue it with --resume, replace it with --overwrite, or name another "
            f"with -o"
        )


def real_output(output: Path) -> Path:
    """Where a link leads, so that the work goes on beside the real file and the link stays a link.

    Raises:
        FpnxError: for a link that leads round to itself.
    """
    if not os.path.islink(output):  # False, too, for names that cannot be: `check_output` tells of those
        return output
    real = Path(os.path.realpath(output))
    if os.path.islink(real):
        raise FpnxError(f"output {escape(output)} is a link that leads nowhere: name another with -o")
    return real
