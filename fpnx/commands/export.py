"""The command `fpnx export`: stored features in the formats of other tools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpnx.analysis.export import Exported, check_folder, export_store
from fpnx.core.analysis_config import ExportConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.text import escape
from fpnx.remote.client import connections
from fpnx.store.joined_store import open_store
from fpnx.store.output_path import real_output

__all__ = ["export"]


def export(
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    listener: Listener | None = None,
    **options: Any,
) -> Exported:
    """Write stored features in the format of another tool; `fpnx export` as a function.

    - `npy`: for each level an array (N, C) float32 of the averages over cells without padding, and the names.
    - `safetensors`: for each image a file with the levels, (C, H, W) in the stored dtype, without padding.
    - `hloc`: global descriptors, one vector of length 1 for each image, as hloc's `pairs_from_retrieval` reads them.

    The folder also gets `export.json`, which says what it holds and which images have other names there.

    Args:
        file: a file that `fpnx extract` wrote, or several as one, as a glob or paths, such as a run's shards.
        output: the folder to make; it gets its name when all of it is written.
        listener: receives progress events.
        options: the fields of `fpnx.core.analysis_config.ExportConfig`.

    Raises:
        FpnxError: a request that cannot be carried out.
        TypeError: an option that does not exist.
    """
    if "://" in os.fspath(output):
        raise FpnxError(f"output {escape(output)} is an address: name a folder, and copy it there")
    config, folder = ExportConfig(**options), real_output(Path(os.path.abspath(output)))
    check_folder(folder, config.overwrite)
    with connections(), open_store(file) as store:
        return export_store(store, folder, config, listener or Listener())
