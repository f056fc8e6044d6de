"""The command `fpnx train`: a pyramid and a head from labelled images or stored maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.text import escape
from fpnx.core.train_config import TrainConfig
from fpnx.images.listing import as_paths, refuse_missing
from fpnx.store.output_path import check_output, real_output

if TYPE_CHECKING:
    from fpnx.training.result import TrainResult

__all__ = ["DEFAULT_OUTPUT", "train"]

DEFAULT_OUTPUT = "model.safetensors"


def train(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    labels: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = DEFAULT_OUTPUT,
    *,
    listener: Listener | None = None,
    **options: Any,
) -> TrainResult:
    """Labelled images, or stored maps with labels → a trained pyramid and head; `fpnx train` as a function.

    Args:
        inputs: images, as `fpnx.extract` takes them; or a file of C levels that `fpnx.extract` wrote, or several
            as one: the backbone is then not run.
        labels: a label file or folder; or `"folders"`, where the first folder of each image's name is its class.
        output: the `.safetensors` file to make; `output` + `.part` is what an unfinished run continues from.
        listener: receives progress and messages.
        options: the other fields of `fpnx.TrainConfig`, with its defaults: `backbone="mobilenet_v2"`, `head="fcos"`,
            `epochs=12`, `resume=True`, …

    Returns:
        Scores, losses of all epochs, and images that could not be read, which do not raise.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; the best weights so far are kept.
        TypeError: an option that does not exist.
    """
    config = TrainConfig(labels=None if labels is None else os.fspath(labels), **options)
    paths = as_paths(inputs)
    if not config.labels:
        raise FpnxError("no labels: give --labels FILE, or --labels folders where each folder is a class")
    # Cheap checks come first, because loading torch takes seconds.
    refuse_missing(paths)
    target = real_output(Path(output))
    if target.suffix != ".safetensors":
        raise FpnxError(
            f"output {escape(output)}: trained weights are safetensors: name it "
            f"{escape(target.with_suffix('.safetensors'))}"
        )
    if config.log is not None or config.plot is not None:
        _check_folders(config.log, config.plot)
    if _is_first_process():
        check_output(target, config, DEFAULT_OUTPUT)
    from fpnx.training.run import run_training

    return run_training(paths, target, config, listener)


def _check_folders(*files: str | None) -> None:
    """Refuse files that cannot be written, before any work."""
    for path in files:
        if path is None:
            continue
        target = Path(path)
        why = ""
        if target.is_dir():
            why = "is a folder"
        elif not target.parent.is_dir():
            why = f"cannot be written: {escape(target.parent)} does not exist"
        elif not os.access(target.parent, os.W_OK):
            why = f"cannot be written: nothing can be written in {escape(target.parent)}"
        if why:
            raise FpnxError(f"{escape(path)} {why}: name another file")


def _is_first_process() -> bool:
    """Whether torchrun started this process as the first one, or not at all."""
    return os.environ.get("RANK", "0") == "0"
