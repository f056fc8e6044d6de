"""Globs over the objects of a store."""

from __future__ import annotations

from fpnx.remote import client as remote
from fpnx.remote import urls
from fpnx.remote.backends import ObjectInfo

__all__ = ["match_objects", "match_urls"]


def match_urls(pattern: bytes) -> list[bytes]:
    """The addresses of all objects that a glob matches, in byte order.

    Raises:
        FpnxError: where they cannot be listed.
    """
    return [url for url, _ in match_objects(urls.checked(pattern))]


def match_objects(pattern: bytes) -> list[tuple[bytes, ObjectInfo]]:
    root, matches = urls.glob_root(pattern), urls.glob_pattern(pattern)
    below = remote.below(root, urls.glob_start(urls.inside(pattern, root)))
    return [(url, facts) for url, facts in below if matches.fullmatch(url)]
