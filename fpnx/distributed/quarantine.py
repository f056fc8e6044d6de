"""Finds images that kill the process that computes them, and keeps their names in a file beside the shard.

`find_culprits` computes images in a probe process, `python -m fpnx.distributed.quarantine`. If that dies, it tries each
half of them in a process of its own, and so on down to single images.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fpnx
from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.files import replace_file
from fpnx.core.text import escape
from fpnx.extraction.run import run_extraction
from fpnx.extraction.upload import resolve_destination
from fpnx.images.manifest import manifest_lines
from fpnx.images.reading import ImageSource

__all__ = ["Quarantine", "find_culprits"]

POLL_INTERVAL = 0.5  # seconds between two calls of `check_stop`
PROBE_COMMAND = [sys.executable, "-m", "fpnx.distributed.quarantine"]
ENDED = b"ended"  # the probe process prints it unless it dies


class Quarantine:
    """The file `SHARD.failed.json`: how often workers died on a shard, and which of its images kill their process.

    Args:
        shard: path of the shard's file.
    """

    def __init__(self, shard: Path) -> None:
        self.shard = shard
        self.path = shard.with_name(shard.name + ".failed.json")

    def culprits(self, run: str) -> dict[bytes, str]:
        """Name and reason of each culprit that `run` has found so far; empty if the file cannot be read."""
        try:
            document = json.loads(self.path.read_bytes())
            if document["run"] != run:
                return {}
            return {os.fsencode(each["path"]): str(each["reason"]) for each in document["culprits"]}
        except (OSError, ValueError, TypeError, KeyError):  # missing, incomplete or foreign: the search is repeated
            return {}

    def write(self, run: str, deaths: int, culprits: Mapping[bytes, str]) -> None:
        """Write the file anew, atomically.

        Raises:
            FpnxError: the file cannot be written.
        """
        document = {
            "shard": os.fsdecode(self.shard.name),
            "run": run,
            "deaths": deaths,
            "culprits": [{"path": os.fsdecode(name), "reason": reason} for name, reason in culprits.items()],
        }
        try:
            replace_file(self.path, [json.dumps(document, indent=2).encode() + b"\n"])
        except OSError as error:
            raise FpnxError(f"cannot write {escape(self.path)}: {error.strerror}") from error


def find_culprits(
    root: bytes,
    sources: Sequence[ImageSource],
    options: Mapping[str, Any],
    on_culprit: Callable[[bytes, str], None],
    check_stop: Callable[[], None],
) -> None:
    """Find the images that kill the process that computes them, by bisection.

    Takes about three times as long as to compute all images once. Images that kill only together are not found.

    Args:
        root: the folder that names are relative to.
        sources: the images.
        options: of `fpnx.extract`.
        on_culprit: called with the name of each culprit and the reason.
        check_stop: called every `POLL_INTERVAL` seconds; an exception from it ends the search.
    """
    death = _probe(root, sources, options, check_stop)
    if death is None:
        return
    if len(sources) == 1:
        on_culprit(sources[0].name, f"kills the process that computes it ({death})")
        return
    middle = len(sources) // 2
    for half in (sources[:middle], sources[middle:]):
        find_culprits(root, half, options, on_culprit, check_stop)


def _probe(
    root: bytes, sources: Iterable[ImageSource], options: Mapping[str, Any], check_stop: Callable[[], None]
) -> str | None:
    """Compute images in a probe process; how it died, or None if it did not die, even if the images failed."""
    with tempfile.TemporaryDirectory(prefix="fpnx-") as folder:
        image_list = Path(folder, "list.txt")
        image_list.write_bytes(b"".join(manifest_lines(root, [source.record for source in sources], {})))
        request = {
            "images": [f"@{image_list}"],
            "output": str(Path(folder, "trial.h5")),
            # Small output, which nobody reads, and no early stop.
            "options": {**options, "pool": "avg", "strict": False},
        }
        # The probe's stdin stays open while this process lives: the probe ends when it is closed.
        probe = subprocess.Popen(
            PROBE_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
        )
        with probe:
            assert probe.stdin is not None
            assert probe.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    probe.stdin.write(json.dumps(request).encode() + b"\n")
                    probe.stdin.flush()
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        probe.wait(POLL_INTERVAL)
                        break
                    check_stop()
            except BaseException:
                probe.kill()
                raise
            ended = probe.stdout.read().strip() == ENDED
    return None if ended else _describe_exit(probe.returncode)


def _environment() -> dict[str, str]:
    """This process's environment, with the folder of this fpnx first in PYTHONPATH: it may not be installed."""
    package_root = str(Path(fpnx.__file__).parent.parent)
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _describe_exit(code: int) -> str:
    """`Popen.returncode` in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def main() -> None:
    """The probe process: read a request from stdin, compute its images, ignore all errors."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        request: dict[str, Any] = json.loads(stdin.readline())
    threading.Thread(target=_exit_when_stdin_closes, daemon=True).start()
    # If memory runs out, the kernel should kill this process and not the worker.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    with contextlib.suppress(Exception):
        config = ExtractConfig(**request["options"])
        run_extraction(request["images"], resolve_destination(request["output"], config), config)
    os.write(1, ENDED + b"\n")
    os._exit(0)  # a normal exit could wait for the thread that reads stdin


def _exit_when_stdin_closes() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
