"""Log of attempts at a shard, kept in a file beside it: it shows how many workers died while working on the shard."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from fpnx.core.errors import FpnxError
from fpnx.core.files import sync_folder
from fpnx.core.text import escape

__all__ = ["Attempt", "AttemptLog"]


@dataclass(frozen=True)
class Attempt:
    """One attempt at a shard.

    Attributes:
        run: random name of the run.
        host, process: the machine and the process id of the worker.
        time: UTC time of its start, in ISO format.
        search: whether the worker first searched for images that kill their process.
    """

    run: str
    host: str
    process: int
    time: str
    search: bool = False


class AttemptLog:
    """The file `SHARD.attempts`: one JSON line for each attempt, synced to disk before the work begins.

    A worker that ends without dying removes the file, whether or not its work succeeded. So its lines are attempts in
    which a worker died, and at most one that still runs.

    Args:
        shard: path of the shard's file.
    """

    def __init__(self, shard: Path) -> None:
        self.path = shard.with_name(shard.name + ".attempts")

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first; incomplete lines are skipped.

        Raises:
            FpnxError: the file cannot be read.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FpnxError(f"cannot read {escape(self.path)}: {error.strerror}") from error
        return list(_parse(lines))

    def begin(self, run: str, search: bool = False) -> None:
        """Append an attempt of this process.

        Raises:
            FpnxError: the file cannot be written.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        attempt = Attempt(run, socket.gethostname(), os.getpid(), now, search)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                # The line break in front separates it from an incomplete last line.
                os.write(descriptor, f"\n{json.dumps(asdict(attempt))}\n".encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise FpnxError(f"cannot write {escape(self.path)}: {error.strerror}") from error
        sync_folder(self.path.parent)

    def end(self) -> None:
        """Remove the file: the worker did not die."""
        with contextlib.suppress(OSError):  # if it stays, one death too many is counted
            self.path.unlink(missing_ok=True)


def _parse(lines: list[bytes]) -> Iterator[Attempt]:
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # TypeError: not the fields of `Attempt`
            yield Attempt(**json.loads(line))
