"""The command `fpnx list`: the images of a run as a file, which shards read their slice of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from fpnx.core.text import counted
from fpnx.images.listing import Listing, find, list_lines

__all__ = ["list_images"]


def list_images(
    images: Sequence[str | os.PathLike[str]], limit: int | None = None
) -> tuple[Iterator[bytes], list[str], Listing]:
    """Find images once, for shards that need not look for them again.

    Args:
        images: files, folders, archives and addresses.
        limit: the first so many images only.

    Returns:
        The lines of the list, the remarks for the user, and the listing itself.

    Raises:
        FpnxError: a missing input, the same path twice, or no image at all.
    """
    listing = find(images, limit)
    summary = f"{counted(len(listing.sources), 'image')}, {counted(listing.skipped, 'other file')} passed over"
    return list_lines(listing), [*listing.remarks, *listing.lost, summary], listing
