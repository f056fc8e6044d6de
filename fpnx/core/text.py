"""Text for people: printable names, near matches, plurals, bytes in units."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

__all__ = ["plural", "format_bytes", "did_you_mean", "escape"]

# What of a URL may be a secret: user and password, and the query, which signs requests. Other schemes have no query.
USER = re.compile(r"(?<=://)(?:[^/?#\s@]*@|[^/?#\s@:]*:(?!\d+/)[^\s@]*@)")
QUERY = re.compile(r"(https?://[^\s?#'\"]*)[?#][^\s'\"]*", re.IGNORECASE)


def escape(name: str | bytes | os.PathLike[str]) -> str:
    """A file name as a terminal may see it: control characters and undecodable bytes are escaped, and of a URL what
    may be a secret is left out."""
    text = os.fsdecode(name)
    if "://" in text:
        text = QUERY.sub(r"\1?…", USER.sub("…@", text))
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean resnet50?)"`, or nothing where no choice is near."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def plural(number: int, what: str) -> str:
    """`"1 image"`, `"2 images"`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def format_bytes(count: float) -> str:
    """A number of bytes in the largest unit that it has one of: `"3.2 GB"`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
