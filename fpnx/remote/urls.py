"""Addresses of objects: their parts, what they have in common, and globs. Strings only, no network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urljoin

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape

__all__ = [
    "SCHEMES",
    "bucket_and_key",
    "checked",
    "common_root",
    "folder_of",
    "glob_pattern",
    "glob_root",
    "glob_start",
    "inside",
    "is_url",
    "is_web",
    "joined",
    "names_folder",
    "plain",
    "with_name",
]

SCHEMES = ("s3", "gs", "http", "https")
WEB = (b"http://", b"https://")
MAGIC = re.compile(rb"[*?\[]")


def is_url(path: bytes) -> bool:
    """Whether this is an address and not a path. (Two letters at least: Windows has drives of one.)"""
    return re.match(rb"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def is_web(url: bytes) -> bool:
    """Whether this is `http://` or `https://`."""
    return url.lower().startswith(WEB)


def checked(url: bytes) -> bytes:
    """The address, its scheme in small letters, if it is one that fpnx reads.

    Raises:
        FpnxError: for another scheme, and for an address that holds a password, without it.
    """
    given, _, rest = url.partition(b"://")
    scheme = given.lower()
    if scheme.decode("ascii", "replace") not in SCHEMES:
        choices = ", ".join(f"{name}://" for name in SCHEMES)
        raise FpnxError(f"{escape(url)}: fpnx reads {choices} and files")
    if "…@" in escape(url) or b"@" in re.split(rb"[/?#]", rest)[0]:
        raise FpnxError(
            f"{escape(url)} holds a user or password, which would be seen in logs and process lists: leave it out, and "
            f"give it in the store's own way (environment variables, a profile, ~/.netrc)"
        )
    if not re.split(rb"[/?#]", rest)[0]:
        raise FpnxError(f"{escape(url)} names no {'host' if is_web(url) else 'bucket'}")
    return scheme + b"://" + rest


def plain(url: bytes) -> bytes:
    """The address without query and fragment, which may be a signature; as names are stored and shown."""
    return re.split(rb"[?#]", url, maxsplit=1)[0] if is_web(url) else url


def bucket_and_key(url: bytes) -> tuple[str, str]:
    """`s3://bucket/a/b.jpg` → `("bucket", "a/b.jpg")`."""
    bucket, _, key = url.partition(b"://")[2].partition(b"/")
    return bucket.decode("utf-8", "surrogateescape"), key.decode("utf-8", "surrogateescape")


def folder_of(url: bytes) -> bytes:
    """What stands before the last slash: `https://host/a/b.jpg` → `https://host/a`."""
    start = url.index(b"://") + 3
    end = plain(url).rfind(b"/", start)
    return plain(url)[:end] if end >= 0 else plain(url)


def names_folder(url: bytes) -> bool:
    """Whether an address ends with its host, its bucket, or a slash."""
    return plain(url).endswith(b"/") or b"/" not in plain(url).partition(b"://")[2]


def with_name(url: str, name: str) -> str:
    """`s3://bucket/a/out.h5` with another last part."""
    return f"{url.rpartition('/')[0]}/{name}"


def joined(list_url: bytes, line: bytes) -> bytes:
    """Where a line of a list leads: an address as it stands, anything else relative to the list."""
    if is_url(line):
        return line
    if is_web(list_url):
        base, relative = (text.decode("utf-8", "surrogateescape") for text in (plain(list_url), line))
        return urljoin(base, relative).encode("utf-8", "surrogateescape")
    return folder_of(list_url) + b"/" + line


def common_root(roots: Iterable[bytes]) -> bytes:
    """The longest address that all begin with, at a slash; `https://` where hosts differ, empty where schemes do."""
    split = [root.replace(b"://", b"/", 1).split(b"/") for root in roots]
    shared: list[bytes] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared[0] + b"://" + b"/".join(shared[1:]) if shared else b""


def inside(url: bytes, root: bytes) -> bytes:
    """What of an address stands below `root`, one of `common_root`'s."""
    return url[len(root) :] if not root or root.endswith(b"://") else url[len(root) + 1 :]


def glob_root(url: bytes) -> bytes:
    """The folder of an address before the first `*`, `?` or `[`; the address itself where it has none."""
    found = MAGIC.search(url)
    return url[: found.start()].rpartition(b"/")[0] if found else url


def glob_start(pattern: bytes) -> bytes:
    """What stands before the first `*`, `?` or `[`."""
    return MAGIC.split(pattern, maxsplit=1)[0]


def glob_pattern(url: bytes) -> re.Pattern[bytes]:
    """What a glob matches: `*` and `?` within a part, `[…]` one character of several, `**` anything, also `/`.

    `prefix/**.jpg` and `prefix/**/*.jpg` both find `prefix/a.jpg` and `prefix/b/c.jpg`.
    """
    tokens = re.split(rb"(\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\])", url)
    meanings = {b"**/": rb"(?:.*/)?", b"**": rb".*", b"*": rb"[^/]*", b"?": rb"[^/]"}
    told = []
    for token in tokens:
        if token in meanings:
            told.append(meanings[token])
        elif token.startswith(b"[") and token.endswith(b"]") and len(token) > 2:
            negated = token[1:2] in (b"!", b"^")
            held = token[2 if negated else 1 : -1].replace(b"\\", rb"\\").replace(b"[", rb"\[").replace(b"]", rb"\]")
            told.append(b"(?!/)[" + (b"^" if negated else b"") + held + b"]")
        else:
            told.append(re.escape(token))
    try:
        return re.compile(b"".join(told), re.DOTALL)
    except re.error as error:
        raise FpnxError(f"{escape(url)}: its [ ] cannot be read as a set of characters") from error
