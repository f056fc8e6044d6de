"""Text for messages: printable names, nearest matches, plurals, byte counts with units."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping

__all__ = ["plural", "format_bytes", "did_you_mean", "escape", "other_files"]

SIMILAR = 0.8  # of a name for a misspelt one; at 0.75 `bifpn` is `fpn`, which is another thing
MAX_KINDS = 5  # of files, that a message names

# Parts of a URL that may be secret: user and password, and the query of a signed URL. Other schemes have no query.
USER = re.compile(r"(?<=://)(?:[^/?#\s@]*@|[^/?#\s@:]*:(?!\d+/)[^\s@]*@)")
QUERY = re.compile(r"(https?://[^\s?#'\"]*)[?#][^\s'\"]*", re.IGNORECASE)


def escape(name: str | bytes | os.PathLike[str]) -> str:
    """A file name or URL that is safe to print: control characters and undecodable bytes are escaped, and the parts of
    a URL that may be secret are removed."""
    text = os.fsdecode(name)
    if "://" in text:
        text = QUERY.sub(r"\1?…", USER.sub("…@", text))
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean resnet50?)"`, or an empty string where no choice is similar or longer."""
    by_case = {choice.lower(): choice for choice in choices}
    word = word.lower()
    similar = difflib.get_close_matches(word, by_case, n=1, cutoff=SIMILAR)
    longer = [choice for choice in by_case if len(word) >= 3 and choice.startswith(word)]
    found = [*similar, *longer]
    return f" (did you mean {by_case[found[0]]}?)" if found else ""


def plural(number: int, what: str) -> str:
    """`"1 image"`, `"2 images"`, `"2 classes"`."""
    ending = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else ending}"


def other_files(kinds: Mapping[str, int]) -> str:
    """How many files are no images, by kind: `"6 other files passed over: 4 .mov, 2 .txt"`, most frequent first."""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {kind}" for kind, count in ordered[:MAX_KINDS]]
    if rest := sum(count for _, count in ordered[MAX_KINDS:]):
        parts.append(f"{rest} more")
    total = f"{plural(sum(kinds.values()), 'other file')} passed over"
    return f"{total}: {', '.join(parts)}" if parts else total


def format_bytes(count: float) -> str:
    """A number of bytes with its unit, kB to TB: `"3.2 GB"`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
