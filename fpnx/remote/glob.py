"""Glob patterns over the objects of an object store."""

from __future__ import annotations

from fpnx.remote import client as remote
from fpnx.remote import urls
from fpnx.remote.backends import ObjectInfo

__all__ = ["match_objects", "match_urls"]


def match_urls(pattern: bytes) -> list[bytes]:
    """URLs of all objects that a glob pattern matches, in byte order.

    Raises:
        FpnxError: where they cannot be listed.
    """
    return [url for url, _ in match_objects(urls.checked(pattern))]


def match_objects(pattern: bytes) -> list[tuple[bytes, ObjectInfo]]:
    """URL and info of all objects that a glob pattern matches."""
    root, regex = urls.glob_root(pattern), urls.glob_regex(pattern)
    objects = remote.list_objects(root, urls.glob_prefix(urls.relative_to(pattern, root)))
    return [(url, info) for url, info in objects if regex.fullmatch(url)]
