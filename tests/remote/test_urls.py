"""URLs: parts, roots, glob patterns, and the secrets that are never shown."""

from __future__ import annotations

import pytest

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.remote import urls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/a/b.jpg", "https://host/a/b.jpg"),
        ("https://host/b.jpg?X-Amz-Signature=secret&token=secret", "https://host/b.jpg?…"),
        ("https://host/b.jpg#secret", "https://host/b.jpg?…"),
        ("HTTPS://host/b.jpg?secret", "HTTPS://host/b.jpg?…"),
        ("https://user:secret@host/b.jpg", "https://…@host/b.jpg"),
        ("s3://AKIA:secret@bucket/b.jpg", "s3://…@bucket/b.jpg"),
        ("https://user:sec/ret@host/b.jpg", "https://…@host/b.jpg"),
        ("https://host:8080/@name/b.jpg", "https://host:8080/@name/b.jpg"),
        ("@https://host/list.txt?sig=secret", "@https://host/list.txt?…"),
        ("a https://host/x?secret and https://h/y?secret", "a https://host/x?… and https://h/y?…"),
        ("s3://bucket/what?.jpg", "s3://bucket/what?.jpg"),
        ("plain/what?.jpg", "plain/what?.jpg"),
    ],
)
def test_no_secret_is_shown(text: str, expected: str) -> None:
    assert escape(text) == expected
    assert "secret" not in escape(text)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://host/a.jpg", r"ftp://host/a.jpg: fpnx reads s3://, gs://, http://, https:// and files"),
        ("https://user:secret@host/a.jpg", r"https://…@host/a.jpg holds a user or password"),
        ("https://secret@host/a.jpg", "holds a user or password"),
        ("https:///a.jpg", "names no host"),
        ("s3:///a.jpg", "names no bucket"),
        ("s3://", "names no bucket"),
    ],
)
def test_refused_urls(url: str, reason: str) -> None:
    with pytest.raises(FpnxError, match=reason) as raised:
        urls.checked(url.encode())
    assert "secret" not in str(raised.value)


def test_schemes_become_lower_case() -> None:
    assert urls.checked(b"HTTPS://Host/A.jpg") == b"https://Host/A.jpg"
    assert urls.is_url(b"S3://bucket")
    assert not urls.is_url(b"c://windows")
    assert not urls.is_url(b"folder/s3:/x")


@pytest.mark.parametrize(
    ("roots", "root", "name"),
    [
        (["s3://b/p"], "s3://b/p", "x.jpg"),
        (["s3://b"], "s3://b", "p/x.jpg"),
        (["s3://b/p", "s3://b/pq"], "s3://b", "p/x.jpg"),
        (["s3://b/p", "s3://c/p"], "s3://", "b/p/x.jpg"),
        (["s3://b/p", "https://h/p"], "", "s3://b/p/x.jpg"),
        (["s3://b//p", "s3://b//q"], "s3://b/", "p/x.jpg"),
    ],
)
def test_common_root_and_names(roots: list[str], root: str, name: str) -> None:
    common = urls.common_root([r.encode() for r in roots])
    assert common == root.encode()
    url = roots[0].encode() + b"/x.jpg" if name != "p/x.jpg" or "p" in roots[0] else b"s3://b/p/x.jpg"
    assert urls.relative_to(url, common) == name.encode()


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("s3://b/p/**.jpg", ["p/a.jpg", "p/x/y/a.jpg"], ["p/a.png", "q/a.jpg", "a.jpg"]),
        ("s3://b/p/**/*.jpg", ["p/a.jpg", "p/x/y/a.jpg"], ["p/a.png"]),
        ("s3://b/p/*.jpg", ["p/a.jpg"], ["p/x/a.jpg", "p/a.jpg.txt"]),
        ("s3://b/p/0?.jpg", ["p/01.jpg"], ["p/0/.jpg", "p/001.jpg"]),
        ("s3://b/p/[ab].jpg", ["p/a.jpg", "p/b.jpg"], ["p/c.jpg", "p/[ab].jpg"]),
        ("s3://b/p/[!a].jpg", ["p/b.jpg", "p/^.jpg"], ["p/a.jpg", "p//.jpg"]),
        ("s3://b/p/[a-c]+.jpg", ["p/b+.jpg"], ["p/bb.jpg"]),
        ("s3://b/p/[]x].jpg", ["p/].jpg", "p/x.jpg"], ["p/y.jpg"]),
        ("s3://b/p.q/*", ["p.q/a"], ["pxq/a"]),
        ("s3://b/p/[x.jpg", ["p/[x.jpg"], ["p/x.jpg"]),
    ],
)
def test_globs(pattern: str, matching: list[str], other: list[str]) -> None:
    regex = urls.glob_regex(pattern.encode())
    for key in matching:
        assert regex.fullmatch(b"s3://b/" + key.encode()), key
    for key in other:
        assert not regex.fullmatch(b"s3://b/" + key.encode()), key


def test_root_and_prefix_of_a_glob() -> None:
    assert urls.glob_root(b"s3://b/p/2024-*/x.jpg") == b"s3://b/p"
    assert urls.glob_prefix(urls.relative_to(b"s3://b/p/2024-*/x.jpg", b"s3://b/p")) == b"2024-"
    assert urls.glob_root(b"s3://b/*.jpg") == b"s3://b"
    assert urls.glob_root(b"s3://b/p/a.jpg") == b"s3://b/p/a.jpg"


@pytest.mark.parametrize(
    ("list_url", "line", "expected"),
    [
        ("https://h/lists/l.txt?sig=1", "a/b.jpg", "https://h/lists/a/b.jpg"),
        ("https://h/lists/l.txt", "/b.jpg", "https://h/b.jpg"),
        ("https://h/l.txt", "http://other/x.jpg?id=3", "http://other/x.jpg?id=3"),
        ("s3://b/lists/l.txt", "a b?.jpg", "s3://b/lists/a b?.jpg"),
    ],
)
def test_lines_of_a_list(list_url: str, line: str, expected: str) -> None:
    assert urls.resolve_line(list_url.encode(), line.encode()) == expected.encode()


def test_parts_of_urls() -> None:
    assert urls.bucket_and_key(b"s3://bucket/a//b.jpg") == ("bucket", "a//b.jpg")
    assert urls.bucket_and_key(b"s3://bucket") == ("bucket", "")
    assert urls.folder_of(b"https://host/a/b.jpg?c=/d/e") == b"https://host/a"
    assert urls.folder_of(b"https://host") == b"https://host"
    assert urls.without_query(b"https://host/b.jpg?x#y") == b"https://host/b.jpg"
    assert urls.without_query(b"s3://bucket/b?.jpg") == b"s3://bucket/b?.jpg"
    assert urls.with_name("s3://bucket/a/out.h5", "x.h5") == "s3://bucket/a/x.h5"
