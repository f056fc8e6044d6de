"""Attempts at a shard, written down beside it: what tells a worker that died from one that never began."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from fpnx.disk import sync_folder
from fpnx.errors import FpnxError, shown

__all__ = ["Attempt", "Ledger"]


@dataclass(frozen=True)
class Attempt:
    """One beginning of work on a shard. `search` is one that looks for the image that kills workers."""

    run: str
    host: str
    process: int
    time: str
    search: bool = False


class Ledger:
    """The file `SHARD.attempts`: a line is appended, and is on the disk, before work on the shard begins.

    A worker that ends by itself, however its work went, takes the file away; so what stands in it are deaths, and
    at most one attempt that still goes on.
    """

    def __init__(self, shard: Path) -> None:
        self.path = shard.with_name(shard.name + ".attempts")

    def attempts(self) -> list[Attempt]:
        """All that is written down, the oldest first; a line that was torn in the writing counts for nothing."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._refused(error) from error
        return list(_parsed(lines))

    def begin(self, run: str, search: bool = False) -> None:
        """Write down an attempt of this process.

        Raises:
            FpnxError: where the disk refuses.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        attempt = Attempt(run, socket.gethostname(), os.getpid(), now, search)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                # It begins on a line of its own, should the one before be torn.
                os.write(descriptor, f"\n{json.dumps(asdict(attempt))}\n".encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._refused(error) from error
        sync_folder(self.path.parent)

    def end(self) -> None:
        """Nobody works on the shard any more, and nobody died of it."""
        with contextlib.suppress(OSError):  # at worst a death is counted that was none
            self.path.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> FpnxError:
        return FpnxError(f"cannot keep {shown(self.path)}: {error.strerror}")


def _parsed(lines: list[bytes]) -> Iterator[Attempt]:
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # TypeError: other fields than ours
            yield Attempt(**json.loads(line))
