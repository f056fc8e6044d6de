"""`python -m fpnx.trial`: an extraction that may kill its process, for `fpnx.quarantine` to see whether it does.

It reads one line from its input: the images, output and options of an extraction, as JSON. It prints `ended` unless
it dies of it, and dies as well when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import Any

from fpnx.config import ExtractConfig
from fpnx.extraction import run_extraction
from fpnx.uploads import goal_of

__all__ = ["main"]


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
        run_extraction(request["images"], goal_of(request["output"], config), config)
    os.write(1, b"ended\n")
    os._exit(0)  # the thread that waits for the input's end must not hold up this one


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
