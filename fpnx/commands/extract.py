"""The command `fpnx extract`: an extraction in this process, or by the workers of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.interrupts import while_loading
from fpnx.extraction.upload import resolve_destination
from fpnx.images.listing import as_paths, refuse_missing
from fpnx.store.output_path import DEFAULT_OUTPUTS, check_output

if TYPE_CHECKING:
    from torch import nn

    from fpnx.extraction.run import Result

__all__ = ["extract"]


def extract(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    backbone: str | nn.Module | None = ExtractConfig.backbone,
    listener: Listener | None = None,
    **options: Any,
) -> Result:
    """Images → pyramid levels in an HDF5 file, or drawn; `fpnx extract` as a function.

    Args:
        images: files, folders, `.tar` archives, `s3://`, `gs://` and `https://` addresses, or `"@list.txt"`.
        output: the file to make (`"out.h5"`), named `output` + `.part` until it is complete; a URL
            (`"s3://bucket/out.h5"`) is written below `scratch` and uploaded when it is complete; with `format="png"`
            the folder for pictures (`"out_png"`). With `shard="3/16"` it is `"out.shard-00003-of-00016.h5"`; with
            `engine="ray"` there is one such file for each shard.
        backbone: a name; or a module of your own, as `create_model` takes it; or a model that `create_model` made,
            with the parameters that it has now. The hash of a module's parameters is part of the fingerprint; its
            code is not.
        listener: receives progress and messages.
        options: the other fields of `fpnx.ExtractConfig`, with its defaults: `weights="random"`, `levels="P3-P5"`,
            `size=224`, `resume=True`, …

    Returns:
        The counts, timings and failures of the run; images that fail are in `result.failed` and do not raise.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; completed images are kept.
        TypeError: an option that does not exist.
    """
    if backbone is None or isinstance(backbone, str):
        name, module = backbone, None
    else:
        from fpnx.models.factory import split_backbone

        name, module = split_backbone(backbone)
    config, paths = ExtractConfig(backbone=name, **options), as_paths(images)
    # Cheap checks come first, because loading torch takes seconds.
    refuse_missing(paths)
    if config.engine == "local":
        destination = resolve_destination(DEFAULT_OUTPUTS[config.format] if output is None else output, config)
        if destination.url is None and config.format == "h5":
            check_output(destination.local, config, may_exist=config.update)
        with while_loading():
            from fpnx.extraction.run import run_extraction
            from fpnx.inference.engine_cache import EngineCache

        return run_extraction(paths, destination, config, listener=listener, engine_cache=EngineCache(module))
    if module is not None:
        raise FpnxError(
            f"engine {config.engine} makes the model in other processes, which do not get a module: leave the engine "
            "out, or give a name, or a file that fpnx.save_weights wrote"
        )
    from fpnx.distributed.coordinator import extract_distributed
    from fpnx.distributed.ray_backend import connect, require_ray

    require_ray()
    return extract_distributed(paths, output, config, listener or Listener(), connect)
