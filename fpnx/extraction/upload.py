"""Destination of a run's output: a local path, or a URL in an object store.

An output for an object store is written to a local scratch folder, verified, and uploaded when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.image_list import ImageList
from fpnx.core.interrupts import StopRequest
from fpnx.core.sharding import shard_path
from fpnx.core.text import escape
from fpnx.remote.backends import AbandonedError
from fpnx.remote.client import RemoteError, check_writable, object_info, send
from fpnx.remote.urls import bucket_and_key, checked, is_url, is_web, with_name
from fpnx.store.matching import check_same_run
from fpnx.store.output_path import real_output
from fpnx.store.reader import open_store_file
from fpnx.store.verify import verify_structure
from fpnx.store.writer import part_path

__all__ = ["Destination", "check_destination", "upload", "resolve_destination", "scratch_folder"]

REPLACE_SUFFIX = ".may-replace"  # of a marker file that `--overwrite` leaves beside the output, for a later --resume
MB = 1_000_000


@dataclass(frozen=True)
class Destination:
    """Local path of an output, and the URL that it is uploaded to; None for a local output."""

    local: Path
    url: str | None = None

    @property
    def url_bytes(self) -> bytes:
        """The URL as bytes, as `fpnx.remote` takes it."""
        assert self.url is not None
        return self.url.encode("utf-8", "surrogateescape")

    @property
    def replace_marker(self) -> Path:
        """Empty file that exists if the run was started with `--overwrite`, so that an existing object is replaced."""
        return self.local.with_name(self.local.name + REPLACE_SUFFIX)


def resolve_destination(output: str | os.PathLike[str], config: ExtractConfig) -> Destination:
    """The destination of `output`, or with `config.shard` of that shard of it.

    An output for an object store has its own folder below `--scratch`, which is the same for each run.

    Raises:
        FpnxError: for a path or URL that cannot be an output.
    """
    text, shard = os.fspath(output), config.shard
    assert not isinstance(shard, str), "the config parses it"
    if not is_url(os.fsencode(text)):
        if config.scratch is not None:
            raise FpnxError(
                f"scratch {escape(config.scratch)} is for outputs in object stores: {escape(text)} is written in place"
            )
        return Destination(real_output(Path(text) if shard is None else shard_path(Path(text), shard)))
    if config.update:
        raise FpnxError(f"output {escape(text)}: update works on a disk: download it, update it there, and send it")
    url = checked(os.fsencode(text))
    name = bucket_and_key(url)[1].rpartition("/")[2]
    if is_web(url) or not name or config.format != "h5":
        what = "pictures go into a folder on a disk" if config.format != "h5" else "name an object in a bucket"
        raise FpnxError(
            f"output {escape(url)}: {what}, such as {'out_png' if config.format != 'h5' else _example(url)}"
        )
    if shard is not None:
        name = shard_path(Path(name), shard).name
    target = with_name(os.fsdecode(url), name)
    scratch = Path(config.scratch or tempfile.gettempdir())
    if not scratch.is_dir():
        raise FpnxError(f"scratch folder {escape(scratch)} does not exist: make it, or name another with --scratch")
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = scratch.resolve() / f"fpnx-{user}-{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}"
    return Destination(folder / name, target)


@contextmanager
def scratch_folder(destination: Destination) -> Iterator[None]:
    """Creates the scratch folder of an output for an object store, and removes it at the end if it is empty.

    Raises:
        FpnxError: where it cannot be created, or belongs to another user.
    """
    if destination.url is None:
        yield
        return
    folder = destination.local.parent
    try:
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        info = os.lstat(folder)
    except OSError as error:
        raise FpnxError(f"cannot work in {escape(folder)}: {error.strerror}; name a folder with --scratch") from error
    # Every user may create folders in /tmp; the owner of the folder could replace our files while we write them.
    owned = not hasattr(os, "getuid") or info.st_uid == os.getuid()
    if not stat.S_ISDIR(info.st_mode) or not owned:
        raise FpnxError(f"{escape(folder)} is not a folder of yours: remove it, or name another place with --scratch")
    try:
        yield
    finally:
        with suppress(OSError):
            if not (destination.local.exists() or part_path(destination.local).exists()):
                destination.replace_marker.unlink(missing_ok=True)
            folder.rmdir()


def check_destination(destination: Destination, config: ExtractConfig) -> str | None:
    """Check, before any image is computed, that the output can be uploaded.

    Returns:
        The URL of an existing object that `--resume` compares the run with; None where there is none.

    Raises:
        FpnxError: where it cannot be uploaded, or where the object exists and the options do not allow to continue or
            replace it.
    """
    url, local = destination.url, destination.local
    if url is None:
        return None
    unfinished = [path for path in (part_path(local), local) if path.exists()]
    if _object_exists(destination):
        if not (config.resume or config.overwrite):
            raise FpnxError(
                f"{escape(url)} exists: see with --resume whether it is of this run, replace it with --overwrite, "
                f"or name another with -o"
            )
        if config.resume and not unfinished:
            return url
        if config.resume and part_path(local).exists() and not destination.replace_marker.exists():
            raise FpnxError(
                f"{escape(url)} exists, and {escape(part_path(local))} is an unfinished run for it: "
                f"start over with --overwrite, or name another with -o"
            )
    check_writable(destination.url_bytes)
    if not config.dry_run:
        if config.overwrite:
            destination.replace_marker.touch()
        elif not unfinished:
            destination.replace_marker.unlink(missing_ok=True)
    return None


def upload(
    destination: Destination, identity: Mapping[str, Any], images: ImageList, stop: StopRequest, listener: Listener
) -> None:
    """Verify the finished local file and upload it; then remove the local file.

    Args:
        destination: of the output.
        identity: the config that a finished object must have been made with, see `fingerprint_fields`.
        images: the images that it must have been made from.
        stop: interrupts the upload.
        listener: receives the progress.

    Raises:
        FpnxError: where the file does not verify or the upload fails; the local file is kept.
        Interrupted: on SIGINT or SIGTERM; the local file is kept, and no object is created.
    """
    url, local = destination.url, destination.local
    assert url is not None
    stop.begin()
    listener.message(f"verifying {escape(local)} before it is sent")
    with open_store_file(local) as store:
        verification = verify_structure(store, listener)
    if verification.problems:
        raise FpnxError(
            f"{escape(local)} does not verify ({verification.problems[0]}), and was not sent to {escape(url)}: "
            f"start over with --overwrite"
        )
    size, may_replace = local.stat().st_size, destination.replace_marker.exists()
    kept = f"{escape(local)} is whole: the same command with --resume sends it"
    try:
        sent = (may_replace or not _object_exists(destination)) and send(
            str(local),
            destination.url_bytes,
            may_replace,
            lambda done: listener.progress("MB sent", done // MB, -(-size // MB)),
            lambda: stop.signum is None,
        )
        if not sent:  # the object exists by now: another run may have sent the same file, or it is something else
            with open_store_file(url) as store:
                check_same_run(store, identity, images)
        remote_size = object_info(destination.url_bytes).bytes
    except AbandonedError as error:
        assert stop.signum is not None
        raise Interrupted(f"interrupted while it was sent; {kept}", stop.signum) from error
    except RemoteError as error:
        raise FpnxError(f"{escape(url)} was not written ({error.reason}); {kept}") from error
    if remote_size != size:
        raise FpnxError(f"{escape(url)} has {remote_size} bytes where {size} were sent; {kept}")
    for path in (local, destination.replace_marker):
        path.unlink(missing_ok=True)


def _object_exists(destination: Destination) -> bool:
    try:
        object_info(destination.url_bytes)
    except RemoteError as error:
        # With permission to write only, the object cannot be looked up; `send` finds whether it exists.
        if error.reason.startswith(("not found", "no permission")):
            return False
        raise
    return True


def _example(url: bytes) -> str:
    return "s3://bucket/out.h5" if is_web(url) else f"{escape(url.rstrip(b'/'))}/out.h5"
