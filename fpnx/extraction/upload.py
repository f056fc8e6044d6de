"""Where a run's file goes: a path here, or an object in a store, which is written here, verified, then sent whole."""

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
from fpnx.store.output_path import real_output
from fpnx.store.reader import open_store_file
from fpnx.store.verify import verify_structure
from fpnx.store.writer import check_same_run, part_path

__all__ = ["Destination", "check_destination", "upload", "resolve_destination", "scratch_folder"]

MAY_REPLACE = ".may-replace"  # stands beside the work that was begun with --overwrite, for a later --resume
MB = 1_000_000


@dataclass(frozen=True)
class Destination:
    """Where the work goes on, and the address that it is sent to, if any."""

    local: Path
    url: str | None = None

    @property
    def raw(self) -> bytes:
        """The address, as `fpnx.remote` takes it."""
        assert self.url is not None
        return self.url.encode("utf-8", "surrogateescape")

    @property
    def permit(self) -> Path:
        """Is there if an object may be replaced."""
        return self.local.with_name(self.local.name + MAY_REPLACE)


def resolve_destination(output: str | os.PathLike[str], config: ExtractConfig) -> Destination:
    """Where `output`, or with `config.shard` that shard of it, is made.

    What is for an object store has a folder of its own below `--scratch`, the same each time.

    Raises:
        FpnxError: for what cannot be an output.
    """
    text, shard = os.fspath(output), config.shard
    assert not isinstance(shard, str), "the config has parsed it"
    if not is_url(os.fsencode(text)):
        if config.scratch is not None:
            raise FpnxError(
                f"scratch {escape(config.scratch)} is for outputs in stores: {escape(text)} is made in place"
            )
        return Destination(real_output(Path(text) if shard is None else shard_path(Path(text), shard)))
    url = checked(os.fsencode(text))
    name = bucket_and_key(url)[1].rpartition("/")[2]
    if is_web(url) or not name or config.format != "h5":
        what = "pictures go into a folder on a disk" if config.format != "h5" else "name an object in a store"
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
def scratch_folder(goal: Destination) -> Iterator[None]:
    """Makes the folder where the work for a store goes on, and takes it away once it is empty.

    Raises:
        FpnxError: where it cannot be made, or somebody else has made it.
    """
    if goal.url is None:
        yield
        return
    folder = goal.local.parent
    try:
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        about_it = os.lstat(folder)
    except OSError as error:
        raise FpnxError(f"cannot work in {escape(folder)}: {error.strerror}; name a folder with --scratch") from error
    # Anybody may make folders in /tmp: in another's, files could be exchanged under our hands.
    ours = not hasattr(os, "getuid") or about_it.st_uid == os.getuid()
    if not stat.S_ISDIR(about_it.st_mode) or not ours:
        raise FpnxError(f"{escape(folder)} is not a folder of yours: remove it, or name another place with --scratch")
    try:
        yield
    finally:
        with suppress(OSError):
            if not (goal.local.exists() or part_path(goal.local).exists()):
                goal.permit.unlink(missing_ok=True)
            folder.rmdir()


def check_destination(goal: Destination, config: ExtractConfig) -> str | None:
    """See, before any work, whether the output could be sent to its store; gives the address of one to resume from.

    Raises:
        FpnxError: where it could not, or where something is there that nobody asked to continue or replace.
    """
    if goal.url is None:
        return None
    begun = [path for path in (part_path(goal.local), goal.local) if path.exists()]
    if _is_there(goal):
        if not (config.resume or config.overwrite):
            raise FpnxError(
                f"{escape(goal.url)} exists: see with --resume whether it is of this run, replace it with --overwrite, "
                f"or name another with -o"
            )
        if config.resume and not begun:
            return goal.url
        if config.resume and part_path(goal.local).exists() and not goal.permit.exists():
            raise FpnxError(
                f"{escape(goal.url)} exists, and {escape(part_path(goal.local))} is an unfinished run for it: "
                f"start over with --overwrite, or name another with -o"
            )
    check_writable(goal.raw)
    if not config.dry_run:
        if config.overwrite:
            goal.permit.touch()
        elif not begun:
            goal.permit.unlink(missing_ok=True)
    return None


def upload(
    goal: Destination, identity: Mapping[str, Any], images: ImageList, stop: StopRequest, listener: Listener
) -> None:
    """Verify the finished file and send it; the file here is removed once all of it is there.

    Raises:
        FpnxError: where it does not verify, or was not written; it is kept then.
        Interrupted: on SIGINT or SIGTERM; it is kept, and nothing of it is there.
    """
    assert goal.url is not None
    stop.begin()
    listener.message(f"verifying {escape(goal.local)} before it is sent")
    with open_store_file(goal.local) as store:
        found = verify_structure(store, listener)
    if found.problems:
        raise FpnxError(
            f"{escape(goal.local)} does not verify ({found.problems[0]}), and was not sent to {escape(goal.url)}: "
            f"start over with --overwrite"
        )
    size, may_replace = goal.local.stat().st_size, goal.permit.exists()
    kept = f"{escape(goal.local)} is whole: the same command with --resume sends it"
    try:
        sent = (may_replace or not _is_there(goal)) and send(
            str(goal.local),
            goal.raw,
            may_replace,
            lambda done: listener.progress("MB sent", done // MB, -(-size // MB)),
            lambda: stop.signum is None,
        )
        if not sent:  # it was there before us: from a run that ended in between, or from somebody else's
            with open_store_file(goal.url) as store:
                check_same_run(store, identity, images)
        there = object_info(goal.raw).bytes
    except AbandonedError as error:
        assert stop.signum is not None
        raise Interrupted(f"interrupted while it was sent; {kept}", stop.signum) from error
    except RemoteError as error:
        raise FpnxError(f"{escape(goal.url)} was not written ({error.reason}); {kept}") from error
    if there != size:
        raise FpnxError(f"{escape(goal.url)} has {there} bytes where {size} were sent; {kept}")
    for path in (goal.local, goal.permit):
        path.unlink(missing_ok=True)


def _is_there(goal: Destination) -> bool:
    try:
        object_info(goal.raw)
    except RemoteError as error:
        # Who may only write learns nothing of what is there; sending tells.
        if error.reason.startswith(("not found", "no permission")):
            return False
        raise
    return True


def _example(url: bytes) -> str:
    return "s3://bucket/out.h5" if is_web(url) else f"{escape(url.rstrip(b'/'))}/out.h5"
