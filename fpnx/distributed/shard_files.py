"""Files of a distributed run: one per shard, and the image list that all shards are cut from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.files import disk_error, lock, replace_file
from fpnx.core.image_list import ImageList, list_fingerprint
from fpnx.core.sharding import Shard, ShardSlice, shard_path
from fpnx.core.text import escape
from fpnx.distributed.attempts import AttemptLog
from fpnx.distributed.quarantine import Quarantine
from fpnx.images.listing import Listing
from fpnx.images.manifest import is_manifest, manifest_lines
from fpnx.store.info import too_large_levels
from fpnx.store.matching import ReadDigests, check_same_run
from fpnx.store.reader import DONE, PENDING, open_store_file
from fpnx.store.writer import part_path

__all__ = [
    "MAX_SHARD_IMAGES",
    "ShardStatus",
    "choose_shard_count",
    "find_shard_files",
    "fixed_shard_count",
    "list_path",
    "read_shard_status",
    "remove_shards",
    "write_list",
]

MAX_SHARD_IMAGES = 1024  # little work is lost with a worker, and computing takes far longer than handing out


@dataclass
class ShardStatus:
    """How far a shard is, read from its file.

    Attributes:
        done: number of images with features.
        failed: path and reason of each failed image.
        complete: whether the file has its final name.
        nonfinite: number of NaN and infinite values by level.
        too_large: levels stored as float16 with values that are too large for it, and became infinite.
    """

    done: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    complete: bool = False
    nonfinite: Mapping[str, int] | None = None
    too_large: tuple[str, ...] = ()

    @property
    def finished(self) -> int:
        """Number of images that are done or failed."""
        return self.done + len(self.failed)


def choose_shard_count(images: int, actors: int) -> int:
    """Number of shards: a multiple of `actors` with at most `MAX_SHARD_IMAGES` images each, but no more than images."""
    rounds = -(-images // (MAX_SHARD_IMAGES * actors))
    return min(max(1, actors * rounds), images)


def fixed_shard_count(output: Path, config: ExtractConfig) -> int | None:
    """Number of shards that existing files or `config.shards` prescribe; None if neither does.

    Raises:
        FpnxError: the files have several counts, or another than `config.shards`.
    """
    counts = sorted({shard.count for shard in find_shard_files(output)}) if not config.overwrite else []
    if len(counts) > 1:
        raise FpnxError(
            f"there are shards of {' and '.join(map(str, counts))} beside {escape(output)}: remove all but one set, or "
            f"start over with --overwrite"
        )
    if counts and config.shards not in ("auto", counts[0]):
        raise FpnxError(
            f"--shards {config.shards}: the existing files are from {counts[0]} shards: leave the option out to "
            f"continue them, or start over with --overwrite"
        )
    if counts:
        return counts[0]
    return config.shards if isinstance(config.shards, int) else None


def find_shard_files(output: Path) -> dict[Shard, list[Path]]:
    """Existing files of the shards of `output`, finished and unfinished."""
    pattern = rf"{re.escape(output.stem)}\.shard-(\d{{5}})-of-(\d{{5}}){re.escape(output.suffix)}(\.part)?"
    files: dict[Shard, list[Path]] = {}
    for name in sorted(os.listdir(output.parent)):
        if match := re.fullmatch(pattern, name, re.ASCII):
            files.setdefault(Shard(int(match[1]), int(match[2])), []).append(output.with_name(name))
    return files


def read_shard_status(
    output: Path, count: int, images: ImageList, config: Mapping[str, Any], read_digests: ReadDigests
) -> list[ShardStatus]:
    """The status of each of `count` shards.

    Args:
        output: `/shared/out.h5`, from which the names of the shards' files are made.
        count: number of shards.
        images: all images of the run.
        config: what the files' attribute `config` must hold.
        read_digests: reads images whose times differ from those in the files.

    Raises:
        FpnxError: a file was made from other images or with another config, or is not finished under its final name.
    """
    fingerprint, total = list_fingerprint(images.records), len(images.records)
    names = list_fingerprint(images.records, times=False)
    status = []
    for shard in (Shard(index, count) for index in range(count)):
        part = shard.slice(total)
        shard_images = ImageList(
            images.root, images.records[part.start : part.stop], ShardSlice.of(shard, total, fingerprint, names)
        )
        status.append(_read_status(shard_path(output, shard), shard_images, config, read_digests))
    return status


def _read_status(file: Path, images: ImageList, config: Mapping[str, Any], read_digests: ReadDigests) -> ShardStatus:
    path = next((path for path in (file, part_path(file)) if path.exists()), None)
    if path is None:
        return ShardStatus()
    with open_store_file(path) as store:
        check_same_run(store, config, images, read_digests)
        pending = bool((store.status == PENDING).any())
        if path == file and pending:
            raise FpnxError(
                f"{escape(file)} is not finished, although it has its final name: rename it to "
                f"{escape(part_path(file).name)} and give the same command again, or start over with --overwrite"
            )
        return ShardStatus(
            done=int((store.status == DONE).sum()),
            failed=tuple(store.failures()),
            complete=path == file,
            nonfinite=store.nonfinite_by_level(),
            too_large=too_large_levels(store),
        )


def remove_shards(output: Path) -> None:
    """Remove all shards of `output`, with their attempt logs and quarantine files.

    Raises:
        FpnxError: another run has the lock of a shard.
    """
    for shard, paths in find_shard_files(output).items():
        file = shard_path(output, shard)
        with lock(file):
            for path in (*paths, AttemptLog(file).path, Quarantine(file).path):
                path.unlink(missing_ok=True)


def list_path(output: Path) -> Path:
    """`out.h5` → `out.list.txt`, the list of all images of the run."""
    return output.with_name(f"{output.stem}.list.txt")


def write_list(output: Path, listing: Listing) -> None:
    """Write the list that every worker reads its images from.

    Raises:
        FpnxError: a file with this name is not an image list, or the disk is full.
    """
    path = list_path(output)
    if path.exists() and not is_manifest(os.fsencode(path)):
        raise FpnxError(f"{escape(path)} is in the way of the list of images: move it, or name another with -o")
    try:
        replace_file(path, manifest_lines(listing.root, listing.records.records, listing.skipped))
    except OSError as error:
        raise disk_error(error, path, 0) from error
