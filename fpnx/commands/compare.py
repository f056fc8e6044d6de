"""The command `fpnx compare`: how alike the levels of two files are, or those of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from fpnx.analysis.comparison import Comparison, compare_stores
from fpnx.core.analysis_config import CompareConfig, checked_picture
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.remote.client import connections
from fpnx.store.joined_store import open_store, refuse_separate_shards

__all__ = ["compare"]


def compare(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    listener: Listener | None = None,
    **options: Any,
) -> Comparison:
    """Compare the levels of two files, or of one, image by image; `fpnx compare` as a function.

    The vector of an image and level is the average over the cells that are not padding. Images are matched by their
    stored names. Between all levels it computes linear CKA (Kornblith et al. 2019, arXiv 1905.00414) from unbiased
    estimates of HSIC, and Spearman's correlation of the dissimilarity matrices (RSA; Kriegeskorte et al. 2008), whose
    entries are Euclidean distances. Both stay the same where a level's vectors are shifted, rotated, reflected or
    scaled by one number.

    Args:
        files: one file, or two; each may be a glob of files that are read as one.
        output: a picture of the matrices to write, PNG, SVG or PDF.
        listener: receives progress events.
        options: the fields of `fpnx.core.analysis_config.CompareConfig`.

    Raises:
        FpnxError: a request that cannot be carried out.
        TypeError: an option that does not exist.
    """
    config, listener = CompareConfig(**options), listener or Listener()
    paths = [os.fspath(path) for path in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if not 1 <= len(paths) <= 2:
        raise FpnxError(f"{len(paths)} files: take one, or two to compare; shards of one run as one, in quotes")
    target = checked_picture(output, config.overwrite)
    with ExitStack() as stack:
        stack.enter_context(connections())
        stores = [stack.enter_context(open_store(path)) for path in paths]
        refuse_separate_shards(stores)
        result = compare_stores(stores, config, listener)
    if target is not None:
        from fpnx.analysis.plot import draw_comparison  # loads matplotlib

        draw_comparison(result, target)
    return result
