"""The command `fpnx predict`: what is in images, written to a file, or as typed predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from fpnx.core.events import Listener
from fpnx.core.predict_config import PredictConfig
from fpnx.images.listing import as_paths, refuse_missing

if TYPE_CHECKING:
    from fpnx.prediction.predictions import Prediction
    from fpnx.prediction.run import PredictResult

__all__ = ["predict", "predict_to_file"]

Path: TypeAlias = "str | os.PathLike[str]"


@overload
def predict(images: Any, output: None = None, **options: Any) -> Prediction | list[Prediction]: ...
@overload
def predict(images: Path | Sequence[Path], output: Path, **options: Any) -> PredictResult: ...
def predict(
    images: Any, output: Path | None = None, *, listener: Listener | None = None, **options: Any
) -> Prediction | list[Prediction] | PredictResult:
    """What is in images: objects, classes or masks.

    Without `output`, the prediction for an image, or a list of them for a list or a folder. With `output`, they are
    written to this file, as `fpnx predict` does it: for many images, which are then decoded and computed side by side.
    Without `output` the model is built at each call; `fpnx.Predictor` keeps it.

    Args:
        images: one or a list, each a path, a Pillow image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W); a
            folder, an archive or `"@list.txt"` stands for the images in it. With `output`, paths and addresses only.
        output: `"predictions.json"` for objects, `"predictions.csv"` for classes, a folder for masks.
        listener: receives progress and messages, with `output`.
        options: the fields of `PredictConfig`, with its defaults: `weights="coco"`, `threshold=0.5`,
            `labels="instances.json"`, …

    Raises:
        ImageError: without `output`, an image that cannot be read.
        FpnxError: a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; completed images are kept.
        TypeError: an option that does not exist.
    """
    if output is not None:
        return predict_to_file(images, output, listener=listener, **options)
    PredictConfig(**options)  # refuses wrong ones before torch is loaded, which takes seconds
    from fpnx.prediction.in_memory import predict_in_memory

    return predict_in_memory(images, options)


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
