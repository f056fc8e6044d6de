"""The command `fpnx info`: what a file, or all shards of a run, hold."""

from __future__ import annotations

from collections.abc import Sequence

from fpnx.store.reader import Store
from fpnx.store.shard_set import open_store

__all__ = ["info"]


def info(files: Sequence[str]) -> Store:
    """Open what `fpnx extract` wrote: one file, or all shards of a run as one store. Close it after use.

    Raises:
        StoreError: a file that is not readable as one of fpnx, or an incomplete set of shards.
    """
    return open_store(files[0] if len(files) == 1 else list(files))
