"""The verb verify: whether a file holds what it says and, beside the images, whether they give the same values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from fpnx.core.config import SAMPLE, ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.remote.client import connections
from fpnx.store.shard_set import open_store
from fpnx.store.verify import Verification, verify_structure

__all__ = ["verify"]


def verify(
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    sample: int = SAMPLE,
    weights: str | None = None,
    device: str = ExtractConfig.device,
    offline: bool = ExtractConfig.offline,
    listener: Listener | None = None,
) -> Verification:
    """Look at everything in `file`; with `against`, compute some of its images again and compare.

    Args:
        file: what `fpnx extract` wrote, or its `.part`; or all shards of a run, as a glob or paths in any order.
            Every stored value is read.
        against: the images that it was made from: files, folders, or `"@list.txt"`.
        sample: how many images are computed again, evenly spread over those that are done.
        weights: where the weights are now, if not where the file says.
        device: computes them.
        offline: never download weights.
        listener: hears of the progress.

    Raises:
        FpnxError: a file that cannot be read as fpnx's at all, a set that is not complete and of one run, or images
            or weights that cannot be had.
    """
    if sample < 1:
        raise FpnxError(f"sample {sample}: take 1 image or more")
    with connections(), open_store(file) as store:
        if against is None:
            return verify_structure(store, listener)
        from fpnx.extraction.recompute import Recomputation, recompute_options

        # Images or weights that are missing are reported before the whole file is read.
        again = Recomputation(store, against, recompute_options(store, weights, device, offline), sample)
        found = verify_structure(store, listener)
        largest, problems = again.compared()
        return replace(
            found,
            problems=(*found.problems, *problems),
            compared=len(again.chosen),
            largest_difference=largest,
        )
