"""Progress, messages and errors on stderr; JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fpnx.cli.training_view import show_training_plan
from fpnx.cli.views import show_plan
from fpnx.core.events import Listener
from fpnx.core.plan_summary import PlanSummary
from fpnx.core.training_summary import TrainingSummary

__all__ = ["Terminal", "is_first_process", "show_error", "show_json"]

SHOW_CURSOR = "\x1b[?25h"
PROGRESS_INTERVAL = 15.0  # seconds between two lines of progress where stderr is not a terminal


class Terminal(Listener):
    """Shows the progress of a run: a bar on a terminal, else a line every 15 seconds.

    Args:
        json: whether stdout is for a JSON document, so that the plan of the run is not shown there.
    """

    def __init__(self, json: bool = False) -> None:
        self._json = json
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()
        self._first, self._note = 0, ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def status(self, text: str) -> None:
        self._note = text

    def planned(self, plan: PlanSummary) -> None:
        self.close()
        if not self._json:
            show_plan(plan)

    def training_planned(self, plan: TrainingSummary) -> None:
        self.close()
        if not self._json:
            show_training_plan(plan)

    def message(self, text: str) -> None:
        self._console.print(Text(f"fpnx: {text}"), soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._console.is_terminal:
            self._advance(what, done, total)
        elif done in (0, total) or now - self._last_line >= PROGRESS_INTERVAL:
            if done > 0:
                note = f" ({self._note})" if self._note else ""
                self._console.print(f"{done} of {total} {what}{note}", highlight=False)
            self._last_line = now

    def _advance(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        if not self._bar.tasks or self._bar.tasks[-1].description != what:
            for task in self._bar.tasks:
                self._bar.update(task.id, visible=False)
            self._bar.add_task(what, total=total, completed=done, speed="", note="")
            self._started, self._first = time.monotonic(), done
        seconds = time.monotonic() - self._started
        speed = f"{(done - self._first) / seconds:.1f} {what}/s" if seconds > 0.5 and done > self._first else ""
        self._bar.update(self._bar.tasks[-1].id, completed=done, speed=speed, note=self._note)

    def stopping(self, signum: int, at_once: bool) -> None:
        # Written to the descriptors: the signal may have interrupted a buffered write.
        if not at_once:
            _write(2, "\nfpnx: stopping after this batch (again to stop at once)\n")
            return
        text = "interrupted at once: what was committed is kept: continue with --resume"
        if self._json:
            _write(1, json.dumps({"error": text}) + "\n")
        _write(2, f"{SHOW_CURSOR if self._console.is_terminal else ''}\nfpnx: {text}\n")
        os._exit(128 + signum)  # needs no cleanup: a file that is being written is readable at every moment

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def is_first_process() -> bool:
    """Whether torchrun started this process as the first one, or not at all: only that one prints results."""
    return os.environ.get("RANK", "0") == "0"


def show_error(text: str, wants_json: bool = False) -> None:
    """Print an error as one line on stderr; with `wants_json` also as a JSON document on stdout."""
    line = " ".join(text.split())
    if wants_json:
        show_json({"error": line})
    print(f"fpnx: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)


def show_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2))


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())
