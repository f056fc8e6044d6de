"""The command `fpnx list`: the images of a run as a file, which shards read their slice of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from fpnx.core.text import plural
from fpnx.images.listing import Listing, find_images, list_lines

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
    listing = find_images(images, limit)
    summary = f"{plural(len(listing.sources), 'image')}, {plural(listing.skipped, 'other file')} passed over"
    return list_lines(listing), [*listing.remarks, *listing.truncated, summary], listing
