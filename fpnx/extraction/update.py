"""Updating a file: which images of a new list are in files that are there already, and copying their features."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpnx.core.config import ExtractConfig, fingerprint
from fpnx.core.errors import StoreError
from fpnx.core.events import Listener
from fpnx.core.image_list import ImageList
from fpnx.core.interrupts import StopRequest
from fpnx.core.text import escape
from fpnx.images.decoding import content_digests
from fpnx.images.listing import Listing
from fpnx.store.file_layout import FileLayout
from fpnx.store.matching import ImageMatch, ReadDigests, check_same_config, match_images, same_slice
from fpnx.store.reader import DONE, Store, open_store_file
from fpnx.store.regions import RegionBatch, first_rows
from fpnx.store.writer import Writer, part_path

__all__ = ["Update", "copy_features", "digest_reader", "find_update"]

BLOCK_BYTES = 1 << 25  # of features that are copied at a time
MAX_RUNS = 16  # whose provenance is kept
SHARD = re.compile(r"\.shard-[0-9]{5}-of-[0-9]{5}$")  # at the end of the name of a shard's file, without its extension


@dataclass(frozen=True, eq=False)
class CopySource:
    """Images whose features are copied from one file.

    Attributes:
        store: the file, open until the copying is done.
        stored: (n,) int64, their indices in the file.
        listed: (n,) int64, their indices in the list of the run.
    """

    store: Store
    stored: np.ndarray
    listed: np.ndarray


@dataclass(frozen=True, eq=False)
class Update:
    """What an updating run takes over from files that are there already.

    Attributes:
        existing: the file that is continued, which is the run's own `.part`, or the finished output, where nothing is
            to be done; None where a new file is made.
        sources: the images that are copied, by file.
        added, changed, removed: number of images in comparison with the finished output; 0 where there is none.
    """

    existing: Path | None
    sources: tuple[CopySource, ...]
    added: int = 0
    changed: int = 0
    removed: int = 0

    def counts(self) -> dict[str, int]:
        """Number of images that are copied, new, changed and removed, for the user."""
        copied = sum(len(source.listed) for source in self.sources)
        return {"copied": copied, "added": self.added, "changed": self.changed, "removed": self.removed}

    def input_sizes(self, count: int) -> np.ndarray:
        """(count, 2) int32, network-input sizes of the images of the run as far as files have them; else 0, 0."""
        sizes = np.zeros((count, 2), np.int32)
        for source in self.sources:
            sizes[source.listed] = source.store.input_sizes[source.stored]
        return sizes

    def provenance(self) -> dict[str, Any]:
        """The entry `updated` of the provenance of the new file: how what is copied was computed, latest first."""
        runs: list[Any] = []
        for source in self.sources:
            stored = source.store.provenance
            runs.append({"time": stored.time, "device": stored.device, "versions": dict(stored.versions)})
            runs += list((stored.updated or {}).get("runs", ()))
        unique = {json.dumps(run, sort_keys=True): run for run in runs}
        return {"copied": self.counts()["copied"], "runs": list(unique.values())[:MAX_RUNS]}

    def close(self) -> None:
        """Close the files that are copied from."""
        for source in self.sources:
            source.store.close()


def find_update(
    output: Path, config: ExtractConfig, identity: dict[str, Any], images: ImageList, read_digests: ReadDigests
) -> Update:
    """Find the images of a run with `--update` that files have already: its own `.part`, the output, its other shards.

    Args:
        output: the file to update; it need not exist.
        config: the options.
        identity: the config that stored numbers depend on.
        images: of the run.
        read_digests: reads images to compare their content.

    Raises:
        FpnxError: where the output or its `.part` was made with another config.
    """
    part = part_path(output)
    own = {path: open_store_file(path) for path in (part, output) if path.exists()}
    for store in own.values():
        check_same_config(store, identity, "give the same options, take another")
    matches = {path: match_images(own[path], images, read_digests, config.check_content) for path in own}
    finished = matches.get(output, ImageMatch(np.empty(0, np.int64), 0, 0, 0))
    same = [path for path in own if matches[path].is_same_list and same_slice(own[path], images)]
    if output in same and bool((own[output].status == DONE).all()):
        for store in own.values():
            store.close()
        return Update(output, ())
    existing = part if part in same else None
    sources: list[CopySource] = []
    is_left = np.ones(len(images), bool)  # images that no file has so far
    if existing is not None:
        is_left = own.pop(existing).status != DONE
    for path, store in own.items():
        sources += _sources(store, matches[path].stored, np.arange(len(images)), is_left)
    for path in _other_shards(output, config):
        listed = np.flatnonzero(is_left)
        records = ImageList(images.root, tuple(images.records[i] for i in listed.tolist()))
        try:
            store = open_store_file(path)
        except StoreError:  # another shard's run will say so
            continue
        if store.fingerprint == fingerprint(identity):
            match = match_images(store, records, read_digests, config.check_content)
            sources += _sources(store, match.stored, listed, is_left)
        else:
            store.close()
    return Update(existing, tuple(sources), finished.added, finished.changed, finished.removed)


def _sources(store: Store, stored: np.ndarray, listed: np.ndarray, is_left: np.ndarray) -> list[CopySource]:
    """The images that `store` has and no file before it, which are then no longer left; closes it where there are none.

    Args:
        store: a file.
        stored: (n,) indices in the file; -1 where it does not have the image.
        listed: (n,) indices of these images in the list of the run.
        is_left: (N,) for each image of the run, whether no file has it so far; changed in place.
    """
    is_copied = (stored >= 0) & is_left[listed]
    is_copied[is_copied] = store.status[stored[is_copied]] == DONE
    if not is_copied.any():
        store.close()
        return []
    is_left[listed[is_copied]] = False
    return [CopySource(store, stored[is_copied], listed[is_copied])]


def copy_features(
    update: Update, layout: FileLayout, writer: Writer, commit_every: float, stop: StopRequest, listener: Listener
) -> str | None:
    """Copy features of images that are pending from the sources of an update; returns why it stopped early, or None.

    Args:
        update: what is copied.
        layout: of the new file.
        writer: of the new file.
        commit_every: seconds between two commits.
        stop: interrupts the copying; what is copied so far is committed.
        listener: receives the progress.

    Raises:
        FpnxError: where reading or writing fails.
    """
    total, copied, committed = sum(len(source.listed) for source in update.sources), 0, time.monotonic()
    regions = None if layout.regions is None else np.bincount(layout.regions.image, minlength=len(layout.images))
    for source in update.sources:
        for stored, listed in _blocks(source, layout):
            if stop.signum is not None:
                return "interrupted"
            _copy(source.store, stored, listed, writer, regions)
            copied += len(listed)
            listener.progress("copied", copied, total)
            if time.monotonic() - committed >= commit_every:
                writer.commit()
                committed = time.monotonic()
        source.store.close()
    writer.commit()
    return None


def digest_reader(listing: Listing, max_pixels: int, threads: int, listener: Listener) -> ReadDigests:
    """A function that reads images of a list and gives their content hashes, each once."""
    known: dict[bytes, bytes | None] = {}

    def read(names: Sequence[bytes]) -> list[bytes | None]:
        wanted = {*names} - known.keys()
        sources = [source for source in listing.sources if source.name in wanted]
        with closing(content_digests(sources, max_pixels, threads)) as digests:
            for done, (source, digest) in enumerate(zip(sources, digests, strict=True), start=1):
                known[source.name] = digest if isinstance(digest, bytes) else None
                listener.progress("contents", done, len(sources))
        return [known[name] for name in names]

    return read


def _other_shards(output: Path, config: ExtractConfig) -> list[Path]:
    """For a shard, the finished files of other shards beside it, also of another number of shards."""
    if config.shard is None:
        return []
    pattern = re.compile(re.escape(SHARD.sub("", output.stem)) + SHARD.pattern[:-1] + re.escape(output.suffix))
    return sorted(path for path in output.parent.iterdir() if path != output and pattern.fullmatch(path.name))


def _blocks(source: CopySource, layout: FileLayout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices in the file, indices in the list) of images of one padded size, in blocks of bounded size."""
    by_size: dict[Any, list[int]] = {}
    for position, index in enumerate(source.stored.tolist()):
        by_size.setdefault(source.store.padded_sizes[index], []).append(position)
    for size, chosen in by_size.items():
        values = sum(int(np.prod(shape)) for shape in layout.shapes[size].values())
        step = max(1, BLOCK_BYTES // max(1, values * np.dtype(layout.dtype).itemsize))
        stored, listed = source.stored[chosen], source.listed[chosen]
        for start in range(0, len(stored), step):
            yield stored[start : start + step], listed[start : start + step]


def _copy(store: Store, stored: np.ndarray, listed: np.ndarray, writer: Writer, regions: np.ndarray | None) -> None:
    """Copy some images of one padded size.

    Args:
        store: where they are.
        stored, listed: their indices there, and in the new file.
        writer: of the new file.
        regions: number of regions of each image in the new file; None for maps. Images that have others in the old file
            stay pending.
    """
    features, batch = dict[str, np.ndarray](), None
    try:
        if regions is None:
            features = {level: store.read(level, stored) for level in store.levels}
        else:
            firsts = first_rows(store.regions.image, len(store))
            is_same = firsts[stored + 1] - firsts[stored] == regions[listed]
            stored, listed = stored[is_same], listed[is_same]
            of_images = [store[index].regions for index in stored.tolist()]
            if not of_images:
                return
            batch = RegionBatch(
                np.concatenate([of_image.box for of_image in of_images]),
                np.concatenate([of_image.level for of_image in of_images]),
                np.concatenate([of_image.features for of_image in of_images]),
            )
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{escape(store.path)} cannot be read: {escape(str(error))}: run fpnx verify on it") from error
    nonfinite = {level: store.nonfinite[stored, column] for column, level in enumerate(store.levels)}
    writer.put(listed.tolist(), features, store.source_sizes[stored], nonfinite, batch, store.digests[stored])
