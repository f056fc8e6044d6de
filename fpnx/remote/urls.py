"""Parsing of URLs: parts, common roots and glob patterns. No network access."""

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
    "glob_prefix",
    "glob_regex",
    "glob_root",
    "is_url",
    "is_web",
    "names_folder",
    "relative_to",
    "resolve_line",
    "with_name",
    "without_query",
]

SCHEMES = ("s3", "gs", "http", "https")
WEB = (b"http://", b"https://")
GLOB_CHARACTER = re.compile(rb"[*?\[]")


def is_url(path: bytes) -> bool:
    """Whether this is a URL and not a path. A scheme has at least two letters, unlike a Windows drive."""
    return re.match(rb"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def is_web(url: bytes) -> bool:
    """Whether this is `http://` or `https://`."""
    return url.lower().startswith(WEB)


def checked(url: bytes) -> bytes:
    """The URL with its scheme in lower case, if fpnx can read it.

    Raises:
        FpnxError: for another scheme, no host or bucket, or a user or password, which the message does not show.
    """
    scheme, _, rest = url.partition(b"://")
    scheme = scheme.lower()
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


def without_query(url: bytes) -> bytes:
    """The URL without query and fragment, which may be a signature; so it is stored and shown."""
    return re.split(rb"[?#]", url, maxsplit=1)[0] if is_web(url) else url


def bucket_and_key(url: bytes) -> tuple[str, str]:
    """`s3://bucket/a/b.jpg` → `("bucket", "a/b.jpg")`."""
    bucket, _, key = url.partition(b"://")[2].partition(b"/")
    return bucket.decode("utf-8", "surrogateescape"), key.decode("utf-8", "surrogateescape")


def folder_of(url: bytes) -> bytes:
    """The part before the last slash: `https://host/a/b.jpg` → `https://host/a`."""
    start = url.index(b"://") + 3
    end = without_query(url).rfind(b"/", start)
    return without_query(url)[:end] if end >= 0 else without_query(url)


def names_folder(url: bytes) -> bool:
    """Whether a URL ends with its host, its bucket, or a slash."""
    return without_query(url).endswith(b"/") or b"/" not in without_query(url).partition(b"://")[2]


def with_name(url: str, name: str) -> str:
    """A URL such as `s3://bucket/a/out.h5` with another file name."""
    return f"{url.rpartition('/')[0]}/{name}"


def resolve_line(list_url: bytes, line: bytes) -> bytes:
    """The URL that a line of a list means: a URL itself, or a path relative to the list's URL."""
    if is_url(line):
        return line
    if is_web(list_url):
        base, relative = (text.decode("utf-8", "surrogateescape") for text in (without_query(list_url), line))
        return urljoin(base, relative).encode("utf-8", "surrogateescape")
    return folder_of(list_url) + b"/" + line


def common_root(roots: Iterable[bytes]) -> bytes:
    """The longest common URL, up to a slash; `https://` where hosts differ, empty where schemes differ."""
    split = [root.replace(b"://", b"/", 1).split(b"/") for root in roots]
    common: list[bytes] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common[0] + b"://" + b"/".join(common[1:]) if common else b""


def relative_to(url: bytes, root: bytes) -> bytes:
    """The part of a URL after `root`, a root from `common_root` or `glob_root`."""
    return url[len(root) :] if not root or root.endswith(b"://") else url[len(root) + 1 :]


def glob_root(url: bytes) -> bytes:
    """The folder before the first `*`, `?` or `[` of a URL; the URL itself where it has none."""
    match = GLOB_CHARACTER.search(url)
    return url[: match.start()].rpartition(b"/")[0] if match else url


def glob_prefix(pattern: bytes) -> bytes:
    """The part before the first `*`, `?` or `[`."""
    return GLOB_CHARACTER.split(pattern, maxsplit=1)[0]


def glob_regex(url: bytes) -> re.Pattern[bytes]:
    """The regular expression of a glob pattern: `*`, `?` and `[…]` match within a part, `**` also matches `/`.

    `prefix/**.jpg` and `prefix/**/*.jpg` both find `prefix/a.jpg` and `prefix/b/c.jpg`.
    """
    tokens = re.split(rb"(\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\])", url)
    meanings = {b"**/": rb"(?:.*/)?", b"**": rb".*", b"*": rb"[^/]*", b"?": rb"[^/]"}
    regex = []
    for token in tokens:
        if token in meanings:
            regex.append(meanings[token])
        elif token.startswith(b"[") and token.endswith(b"]") and len(token) > 2:
            negated = token[1:2] in (b"!", b"^")
            characters = (
                token[2 if negated else 1 : -1].replace(b"\\", rb"\\").replace(b"[", rb"\[").replace(b"]", rb"\]")
            )
            regex.append(b"(?!/)[" + (b"^" if negated else b"") + characters + b"]")
        else:
            regex.append(re.escape(token))
    try:
        return re.compile(b"".join(regex), re.DOTALL)
    except re.error as error:
        raise FpnxError(f"{escape(url)}: its [ ] cannot be read as a set of characters") from error
