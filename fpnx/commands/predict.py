"""The command `fpnx predict`: what is in images, written to a file, or as typed predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fpnx.core.events import Listener
from fpnx.core.predict_config import PredictConfig
from fpnx.images.listing import as_paths, refuse_missing

if TYPE_CHECKING:
    from fpnx.prediction.run import PredictResult

__all__ = ["predict_to_file"]


def predict_to_file(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    listener: Listener | None = None,
    **options: Any,
) -> PredictResult:
    """Images → a file of predictions; `fpnx predict` as a function.

    Args:
        images: files, folders, `.tar` archives, `s3://`, `gs://` and `https://` addresses, or `"@list.txt"`.
        output: the file: `"predictions.json"` for objects, `"predictions.csv"` for classes; for masks a folder,
            `"predictions_masks"`.
        listener: receives progress and messages.
        options: the fields of `PredictConfig`, with its defaults.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; completed images are kept.
        TypeError: an option that does not exist.
    """
    config, paths = PredictConfig(**options), as_paths(images)
    refuse_missing(paths)  # before torch is loaded, which takes seconds
    from fpnx.prediction.run import run_prediction

    return run_prediction(paths, output, config, listener=listener)
