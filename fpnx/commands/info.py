"""The command `fpnx info`: what a file, or several read as one, hold."""

from __future__ import annotations

from collections.abc import Sequence

from fpnx.store.joined_store import open_store
from fpnx.store.reader import Store

__all__ = ["info"]


def info(files: Sequence[str]) -> Store:
    """Open what `fpnx extract` wrote: one file, or several as one store. Close it after use.

    Raises:
        StoreError: a file that is not readable as one of fpnx, or files that are not read as one; see
            `fpnx.store.joined_store.open_store`.
    """
    return open_store(files[0] if len(files) == 1 else list(files))
