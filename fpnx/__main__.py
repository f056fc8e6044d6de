"""`fpnx` and `python -m fpnx`: the command line, also where it is interrupted while it is being loaded."""

from __future__ import annotations

import sys

__all__ = ["run"]


def run() -> int:
    """The command line as a program: its exit code."""
    try:
        from fpnx.cli.main import main
        from fpnx.cli.torchvision_import import without_compiler

        without_compiler()
        return main()
    except KeyboardInterrupt:
        print("fpnx: interrupted while loading: nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(run())
