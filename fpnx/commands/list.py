"""The command `fpnx list`: the images of a run as a file, of which each shard reads its slice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fpnx.core.text import other_files, plural
from fpnx.images.listing import find_images, list_lines

__all__ = ["ListResult", "list_images"]


@dataclass(frozen=True)
class ListResult:
    """The lines of the list file, messages for the user, and the exit code: 1 if an archive is truncated, else 0."""

    lines: Iterator[bytes]
    messages: tuple[str, ...]
    exit_code: int


def list_images(images: Sequence[str | os.PathLike[str]], limit: int | None = None) -> ListResult:
    """Find images once, for shards that need not search for them again.

    Args:
        images: files, folders, archives and addresses.
        limit: list only the first so many images.

    Raises:
        FpnxError: a missing input, the same path twice, or no image at all.
    """
    listing = find_images(images, limit)
    summary = f"{plural(len(listing.sources), 'image')}, {other_files(listing.skipped)}"
    messages = (*listing.remarks, *listing.truncated, summary)
    return ListResult(list_lines(listing), messages, 1 if listing.truncated else 0)
