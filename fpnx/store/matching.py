"""Which images of a list are those of a file: by name, size and time; by the content hash where only times differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpnx.core.config import fingerprint
from fpnx.core.errors import FpnxError
from fpnx.core.image_list import ImageList
from fpnx.core.text import escape
from fpnx.store.reader import DONE, Store, different_fields

__all__ = ["ImageMatch", "ReadDigests", "check_same_config", "check_same_run", "match_images", "same_slice"]

# Names of listed images → the content hash of each as it is now, in order; None where it cannot be read.
ReadDigests = Callable[[Sequence[bytes]], Iterable[bytes | None]]


@dataclass(frozen=True, eq=False)
class ImageMatch:
    """How the images of a list relate to those of a file.

    Attributes:
        stored: (n,) int64, for each image of the list its index in the file; -1 where the file does not have it, or has
            another version of it.
        added: number of images of the list that are not in the file by name.
        changed: number of images that are in both, and are not the same.
        removed: number of images of the file that are not in the list.
    """

    stored: np.ndarray
    added: int
    changed: int
    removed: int

    @property
    def is_same_list(self) -> bool:
        """Whether both have the same images in the same order."""
        return not (self.added or self.changed or self.removed or (np.diff(self.stored) != 1).any())


def match_images(
    store: Store, images: ImageList, read_digests: ReadDigests | None = None, check_content: bool = False
) -> ImageMatch:
    """Compare the images of a list with those of a file.

    An image is the same where size and time are those in the file. Where only the time differs, it is the same if its
    bytes have the content hash that the file has of it; an image that is not done needs the same size only, since it
    is read again. Files without content hashes know sizes and times only.

    Args:
        store: the file.
        images: the list.
        read_digests: reads images; without it, times must be the same.
        check_content: trust no size and time, and compare the content of all images that are done.
    """
    indices = {name: index for index, name in enumerate(store.paths)}
    names = [os.fsdecode(record.name) for record in images.records]
    stored = np.array([indices.get(name, -1) for name in names], np.int64)
    added = int((stored < 0).sum())
    removed = len(store) - (len(stored) - added)
    to_read: list[int] = []
    for position, index in enumerate(stored.tolist()):
        if index < 0:
            continue
        record = images.records[position]
        old, new = (int(store.bytes[index]), int(store.mtimes_ns[index])), (record.bytes, record.mtime_ns)
        is_done = store.status[index] == DONE
        if not _is_changed(old, new) and not (check_content and is_done):
            continue
        other_size = old[0] != new[0] and min(old[0], new[0]) >= 0
        is_unknown = not store.has_digests or (is_done and not store.digests[index].any())
        if other_size or is_unknown or read_digests is None:
            stored[position] = -1
        elif is_done:
            to_read.append(position)
    if to_read:
        assert read_digests is not None
        digests = read_digests([images.records[position].name for position in to_read])
        for position, digest in zip(to_read, digests, strict=True):
            if digest != store.digests[stored[position]].tobytes():
                stored[position] = -1
    return ImageMatch(stored, added, int((stored < 0).sum()) - added, removed)


def check_same_config(store: Store, config: Mapping[str, Any], advice: str = "repeat that one, take another") -> None:
    """Raise unless `store` was made with `config`.

    Raises:
        FpnxError: with the fields that differ.
        StoreError: where the file is damaged.
    """
    store.check()
    fields = different_fields(store.config, config)
    if fields or store.fingerprint != fingerprint(config):
        raise FpnxError(
            f"{escape(store.path)} was made with another config ({'; '.join(fields) or 'its fingerprint differs'}): "
            f"{advice} output, or start over with --overwrite"
        )


def check_same_run(
    store: Store, config: Mapping[str, Any], images: ImageList, read_digests: ReadDigests | None = None
) -> None:
    """Raise unless `store` was made with `config` from the images `images`; see `match_images`.

    Raises:
        FpnxError: with the fields, or the number of images, that differ.
        StoreError: where the file is damaged.
    """
    check_same_config(store, config)
    match = match_images(store, images, read_digests)
    if not match.is_same_list:
        counts = f"{match.added} added, {match.removed} removed, {match.changed} changed"
        what = counts if match.added or match.removed or match.changed else "in another order"
        raise FpnxError(
            f"{escape(store.path)} was made from other images ({what}): bring the same ones, take them over with "
            f"--update, take another output, or start over with --overwrite"
        )
    if not same_slice(store, images):
        old, new = (f"shard {shard}" if shard else "no shard" for shard in (store.shard_slice, images.shard))
        what = "its list had other images outside this shard" if old == new else f"it is {old}, not {new}"
        raise FpnxError(
            f"{escape(store.path)} was cut from another list ({what}): bring the same one, take another output, or "
            f"start over with --overwrite"
        )


def same_slice(store: Store, images: ImageList) -> bool:
    """Whether file and list are the same shard of the same list, apart from times, or neither is a shard."""
    old, new = store.shard_slice, images.shard
    if old is None or new is None:
        return old is new
    return old.index == new.index and old.is_of_list(new)


def _is_changed(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether (bytes, mtime_ns) are those of two versions of an image. At a URL either may be unknown (-1 and 0)."""
    if min(old[0], new[0]) < 0:
        return old[1] != new[1] and 0 not in (old[1], new[1])
    return old != new
