"""The command verify: checks the structure of a file and, given the images, recomputes some and compares the values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fpnx.core.config import SAMPLE, ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.remote.client import connections
from fpnx.store.joined_store import open_store
from fpnx.store.verify import Verification, verify_structure

if TYPE_CHECKING:
    from torch import nn

__all__ = ["verify"]


def verify(
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    sample: int = SAMPLE,
    backbone: nn.Module | None = None,
    weights: str | None = None,
    device: str = ExtractConfig.device,
    offline: bool = ExtractConfig.offline,
    listener: Listener | None = None,
) -> Verification:
    """Read and check everything in `file`; with `against`, compare the bytes of all images, and recompute some.

    Args:
        file: a file that `fpnx extract` wrote, or its `.part`; or several as one, as a glob or paths, such as a run's
            shards. Every stored value is read.
        against: the images that it was made from: files, folders, or `"@list.txt"`, wherever they are now. All are
            read; their times do not matter.
        sample: how many images are recomputed, evenly spread over those that are done.
        backbone: the module or model that was given to `fpnx.extract`, where it was one.
        weights: path of the weights file, if it is not where it was.
        device: device that recomputes them.
        offline: never download weights.
        listener: receives the progress.

    Raises:
        FpnxError: for a file that fpnx did not write, files that are not read as one, or images or weights that are not
            found.
    """
    if sample < 1:
        raise FpnxError(f"sample {sample}: take 1 image or more")
    with connections(), open_store(file) as store:
        if against is None:
            return verify_structure(store, listener)
        from fpnx.extraction.recompute import Recomputation, recompute_options

        # Images or weights that are missing are reported before the whole file is read.
        if isinstance(backbone, (str, type)):
            raise FpnxError(f"backbone {backbone!r:.60}: take the nn.Module that fpnx.extract was given")
        options = recompute_options(store, backbone, weights, device, offline)
        recomputation = Recomputation(store, against, options, sample, backbone, listener)
        structure = verify_structure(store, listener)
        largest, problems = recomputation.compare()
        return replace(
            structure,
            problems=(*structure.problems, *problems),
            compared=len(recomputation.chosen),
            hashed=len(recomputation.read),
            largest_difference=largest,
        )
