"""Suppresses warnings and log messages, and leaves filters and levels as they were, whichever threads overlap."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ignored_warnings", "logging_disabled"]


class _Shared:
    def __init__(self) -> None:
        self.lock, self.count, self.saved = threading.Lock(), 0, warnings.catch_warnings()
        self.loggers: dict[str, tuple[int, int]] = {}  # contexts that disable each, and the level that it had before


_shared = _Shared()


@contextmanager
def ignored_warnings(module: str = "", *categories: type[Warning]) -> Iterator[None]:
    """Ignore warnings of `categories` (none: all) that come from modules whose name begins with the pattern `module`.

    Filters are those of the whole process. They are restored once no thread is in such a context any more: if each
    thread restored what it found, it could restore the filters of another thread, which would then stay.
    """
    with _shared.lock:
        if not _shared.count:
            _shared.saved = warnings.catch_warnings()
            _shared.saved.__enter__()
        _shared.count += 1
        for category in categories or (Warning,):
            warnings.filterwarnings("ignore", category=category, module=module)
    try:
        yield
    finally:
        with _shared.lock:
            _shared.count -= 1
            if not _shared.count:
                _shared.saved.__exit__(None, None, None)


@contextmanager
def logging_disabled(name: str) -> Iterator[None]:
    """Suppress messages of the logger `name`, and of those below it, under CRITICAL.

    Levels are those of the whole process. They are restored once no thread is in such a context any more.
    """
    logger = logging.getLogger(name)
    with _shared.lock:
        count, level = _shared.loggers.get(name, (0, logger.level))
        _shared.loggers[name] = (count + 1, level)
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _shared.lock:
            count, level = _shared.loggers.pop(name)
            if count > 1:
                _shared.loggers[name] = (count - 1, level)
            else:
                logger.setLevel(level)
