"""Which images kill the process that computes them: found by halves, each half in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fpnx
from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.files import replace_file, sync_folder
from fpnx.core.text import escape
from fpnx.extraction.run import run_extraction
from fpnx.extraction.upload import resolve_destination
from fpnx.images.manifest import manifest_lines
from fpnx.images.reading import ImageSource

__all__ = ["Quarantine", "find_culprits", "Attempt", "AttemptLog"]

HEED = 0.5  # seconds within which a request to stop is heard
TRIAL = [sys.executable, "-m", "fpnx.distributed.quarantine"]


class Quarantine:
    """The file `SHARD.failed.json`: why a shard is set apart, and which of its images are to blame."""

    def __init__(self, shard: Path) -> None:
        self.shard = shard
        self.path = shard.with_name(shard.name + ".failed.json")

    def culprits(self, run: str) -> dict[bytes, str]:
        """Name and reason of each image that `run` has found to blame so far."""
        try:
            told = json.loads(self.path.read_bytes())
            if told["run"] != run:
                return {}
            return {os.fsencode(each["path"]): str(each["reason"]) for each in told["culprits"]}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError):  # torn, or not ours: it is found out again
            return {}

    def write(self, run: str, deaths: int, culprits: Mapping[bytes, str]) -> None:
        """Put down what is known, whole or not at all.

        Raises:
            FpnxError: where the disk refuses.
        """
        told = {
            "shard": os.fsdecode(self.shard.name),
            "run": run,
            "deaths": deaths,
            "culprits": [{"path": os.fsdecode(name), "reason": reason} for name, reason in culprits.items()],
        }
        try:
            replace_file(self.path, [json.dumps(told, indent=2).encode() + b"\n"])
        except OSError as error:
            raise FpnxError(f"cannot write {escape(self.path)}: {error.strerror}") from error


def find_culprits(
    root: bytes,
    sources: Sequence[ImageSource],
    options: Mapping[str, Any],
    found: Callable[[bytes, str], None],
    heed: Callable[[], None],
) -> None:
    """Compute images in processes of their own, and of each set that kills its process both halves, down to one.

    Takes about three times as long as to compute them all. Images that kill only together are not found.

    Args:
        root: what names are relative to.
        sources: the images.
        options: of `fpnx.extract`.
        found: hears the name of each image that kills its process alone, and how it does.
        heed: is called again and again; what it raises ends the search.
    """
    death = _death(root, sources, options, heed)
    if death is None:
        return
    if len(sources) == 1:
        found(sources[0].name, f"kills the process that computes it ({death})")
        return
    middle = len(sources) // 2
    for half in (sources[:middle], sources[middle:]):
        find_culprits(root, half, options, found, heed)


def _death(
    root: bytes, sources: Iterable[ImageSource], options: Mapping[str, Any], heed: Callable[[], None]
) -> str | None:
    """How a process that computes these images died; None where it ended by itself, whatever came of them."""
    with tempfile.TemporaryDirectory(prefix="fpnx-") as folder:
        listed = Path(folder, "list.txt")
        records = [source.record for source in sources]
        listed.write_bytes(b"".join(manifest_lines(root, records, 0)))
        request = {
            "images": [f"@{listed}"],
            "output": str(Path(folder, "trial.h5")),
            # All are to be computed, and nobody reads what comes of it: it should be small.
            "options": {**options, "pool": "avg", "strict": False},
        }
        # Its input stays open: once that ends, so has this process, and the trial must not outlive it.
        child = subprocess.Popen(
            TRIAL, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
        )
        with child:
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(json.dumps(request).encode() + b"\n")
                    child.stdin.flush()
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(HEED)
                        break
                    heed()
            except BaseException:
                child.kill()
                raise
            ended = child.stdout.read().strip() == b"ended"
    return None if ended else _how(child.returncode)


def _environment() -> dict[str, str]:
    """Ours, with the folder that this fpnx is in: whoever started this process may have given it one by hand."""
    home = str(Path(fpnx.__file__).parent.parent)
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _how(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


@dataclass(frozen=True)
class Attempt:
    """One beginning of work on a shard. `search` is one that looks for the image that kills workers."""

    run: str
    host: str
    process: int
    time: str
    search: bool = False


class AttemptLog:
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
        return FpnxError(f"cannot keep {escape(self.path)}: {error.strerror}")


def _parsed(lines: list[bytes]) -> Iterator[Attempt]:
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # TypeError: other fields than ours
            yield Attempt(**json.loads(line))


def main() -> None:
    """Compute what is asked for; whatever else is wrong with it is of no interest here."""
    with open(0, "rb", buffering=0, closefd=False) as asked:
        request: dict[str, Any] = json.loads(asked.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    # Where memory runs out, this process should go and not the worker.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    with contextlib.suppress(Exception):
        config = ExtractConfig(**request["options"])
        run_extraction(request["images"], resolve_destination(request["output"], config), config)
    os.write(1, b"ended\n")
    os._exit(0)  # the thread that waits for the input's end must not hold up this one


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
