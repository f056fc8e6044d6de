"""Checks of output paths before any image is computed. Does not import torch."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.store.writer import part_path

__all__ = ["DEFAULT_OUTPUTS", "check_output", "real_output", "refuse_input"]

DEFAULT_OUTPUTS = {"h5": "out.h5", "png": "out_png"}  # by format
RESERVED_SUFFIXES = (".part", ".part.new", ".lock")


class _HowToTreat(Protocol):
    """Options for an output that exists."""

    @property
    def resume(self) -> bool: ...
    @property
    def overwrite(self) -> bool: ...


def check_output(
    output: Path, config: _HowToTreat, example: str = DEFAULT_OUTPUTS["h5"], may_exist: bool = False
) -> None:
    """Refuse a path that cannot be written, or that exists without `resume` or `overwrite`.

    Args:
        output: the file.
        config: whether an existing one is continued or replaced.
        example: the name of such a file, for messages.
        may_exist: whether an existing file is no error in any case.

    Raises:
        FpnxError: with the reason and what to do.
    """
    if not output.name:
        raise FpnxError(f"output {escape(output)} is a folder: name a file in it, such as {escape(output / example)}")
    if output.name.endswith(RESERVED_SUFFIXES):
        stem = re.sub(r"(\.(part|new|lock))+$", "", str(output))
        raise FpnxError(f"output {escape(output)}: fpnx keeps such names for itself: name the output {escape(stem)}")
    try:
        if "\0" in str(output):
            raise ValueError("a name cannot hold a null byte")
        existing = [path for path in (output, part_path(output)) if path.exists()]
        info = os.stat(output) if output in existing else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FpnxError(f"output {escape(output)}: {reason}: name another with -o") from error
    if info is not None and stat.S_ISDIR(info.st_mode):
        raise FpnxError(f"output {escape(output)} is a folder: name a file in it, such as {escape(output / example)}")
    if info is not None and not stat.S_ISREG(info.st_mode):
        raise FpnxError(f"output {escape(output)} is not a regular file: name another with -o")
    if not output.parent.is_dir():
        raise FpnxError(f"output folder {escape(output.parent)} does not exist: make it, or name another with -o")
    if existing and not (config.resume or config.overwrite or may_exist):
        what = "exists" if output in existing else "holds an unfinished run"
        raise FpnxError(
            f"{escape(existing[0])} {what}: continue it with --resume, replace it with --overwrite, or name another "
            f"with -o"
        )


def refuse_input(output: Path, inputs: Iterable[str | bytes]) -> None:
    """Refuse an output that is one of a run's own inputs, which `overwrite` would replace.

    Args:
        output: the file; a link is resolved.
        inputs: paths of files that the run reads; those that are no local files are passed over.

    Raises:
        FpnxError: with the input.
    """
    if not output.exists():
        return
    for path in map(os.fsdecode, inputs):
        if os.path.basename(path) == output.name and os.path.exists(path) and os.path.samefile(path, output):
            raise FpnxError(f"output {escape(output)} is read by this run, and would be lost: name another with -o")


def real_output(output: Path) -> Path:
    """The target of a symbolic link, so that the file is written beside its target and the link is kept.

    Raises:
        FpnxError: for a link to itself.
    """
    if not os.path.islink(output):  # also False for invalid names, which `check_output` refuses
        return output
    real = Path(os.path.realpath(output))
    if os.path.islink(real):
        raise FpnxError(f"output {escape(output)} is a link that leads nowhere: name another with -o")
    return real
