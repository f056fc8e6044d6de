"""Exceptions of fpnx. `fpnx.cli.main` turns each into one line for the user."""

from __future__ import annotations

__all__ = ["BusyError", "FpnxError", "ImageError", "Interrupted", "NotDoneError", "StoreError"]


class FpnxError(Exception):
    """A request that cannot be carried out; the message says what, why, and what to do. Exit code 2."""


class ImageError(FpnxError):
    """One image that cannot be read or resized; the message is the reason. It does not stop a run."""


class StoreError(FpnxError):
    """A file that is not a complete fpnx store: truncated, of another program or a later version, or locked."""


class BusyError(StoreError):
    """A file that another run is writing."""


class NotDoneError(FpnxError, LookupError):
    """An image that a store does not contain, that is not computed yet, or that failed."""


class Interrupted(BaseException):
    """A run that SIGINT or SIGTERM ended; finished work is kept. `signum` is the signal.

    Not a child of KeyboardInterrupt: Typer catches those before `fpnx.cli.main` can report what is kept.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
