"""Batches that fit into memory: halved where they do not, down to one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from fpnx.engine import Engine, Features

__all__ = ["Fitting"]

TOLD = ("not enough memory", "can't allocate memory", "out of memory")  # in plain RuntimeErrors of torch


class Fitting:
    """An engine that takes batches of any size, in smaller pieces once memory did not suffice.

    Args:
        engine: computes one batch.
        message: hears once that batches are halved.
    """

    def __init__(self, engine: Engine, message: Callable[[str], None]) -> None:
        self._engine, self._message = engine, message
        self._at_most: int | None = None

    def __call__(self, pixels: Sequence[np.ndarray]) -> Iterator[tuple[slice, Features | None]]:
        """Images of one padded size → which of them, and their features; None for one that does not fit alone."""
        start = 0
        while start < len(pixels):
            piece = slice(start, min(start + (self._at_most or len(pixels)), len(pixels)))
            count = piece.stop - piece.start
            features = self._attempt(pixels[piece])
            if features is None and count > 1:
                if self._at_most is None:
                    self._message(f"out of memory with {count} images at once: going on with fewer")
                self._at_most = (count + 1) // 2
                continue
            yield piece, features
            start = piece.stop

    def _attempt(self, pixels: Sequence[np.ndarray]) -> Features | None:
        try:
            return self._engine(pixels)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(t in str(error) for t in TOLD):
                raise
        self._engine.release()  # only now: the error held on to what had been computed
        return None
