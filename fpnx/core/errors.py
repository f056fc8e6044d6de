"""What can go wrong, as facts. One place (`fpnx.cli.main`) turns them into a line for the user."""

from __future__ import annotations

__all__ = ["BusyError", "FpnxError", "ImageError", "Interrupted", "NotDoneError", "StoreError"]


class FpnxError(Exception):
    """A request that cannot be carried out: says what, why, and what to do. Exit code 2."""


class ImageError(FpnxError):
    """One image that cannot be read or resized; the message is its reason. It never stops a run."""


class StoreError(FpnxError):
    """A file that is not a whole fpnx store: truncated, foreign, of a future version, or locked."""


class BusyError(StoreError):
    """A file that another run is writing."""


class NotDoneError(FpnxError, LookupError):
    """An image that a store does not know, has not computed yet, or that failed."""


class Interrupted(BaseException):
    """A run that SIGINT or SIGTERM ended; what was done is kept. `signum` is the signal.

    Not a child of KeyboardInterrupt: Typer catches those before `fpnx.cli.main` can report what is kept.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
