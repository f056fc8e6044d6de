"""The command `fpnx probe`: which level of which file tells one's classes apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from fpnx.analysis.probing import Probe, probe_stores
from fpnx.core.analysis_config import ProbeConfig, checked_picture
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.remote.client import connections
from fpnx.store.joined_store import open_store, refuse_separate_shards

__all__ = ["probe"]


def probe(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    listener: Listener | None = None,
    **options: Any,
) -> Probe:
    """Measure which level tells classes apart; `fpnx probe` as a function.

    What is classified depends on the labels: images by their pooled vector, boxes by RoIAlign, or single pixels by the
    cell over them. For each level of each file, and for all levels of a file joined, it gives the accuracy of logistic
    regression and of nearest neighbours, each sample predicted from the images of other folds.

    Args:
        files: one file or several, side by side; each may be a glob of files that are read as one. Only images that are
            done in all of them are used.
        listener: receives progress events.
        options: the fields of `fpnx.core.analysis_config.ProbeConfig`; `labels` must be given.

    Raises:
        FpnxError: a request that cannot be carried out.
        TypeError: an option that does not exist.
    """
    config = ProbeConfig(**options)
    paths = [os.fspath(path) for path in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if not config.labels:
        raise FpnxError("no labels: name a label file or folder with --labels, or folders for the images' own")
    if not paths:
        raise FpnxError("no files: name those that fpnx extract wrote")
    target = checked_picture(config.plot, config.overwrite)
    with ExitStack() as stack:
        stack.enter_context(connections())
        stores = [stack.enter_context(open_store(path)) for path in paths]
        refuse_separate_shards(stores)
        result = probe_stores(stores, config, listener or Listener())
    if target is not None:
        from fpnx.analysis.plot import draw_probe  # loads matplotlib

        draw_probe(result, target)
    return result
