"""Images on web servers: metadata, errors, retries, timeouts, archives; and no secret of a URL in any output."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import fpnx as package
from fpnx.core.errors import FpnxError, ImageError
from fpnx.images.decoding import decode, upright_size
from fpnx.images.listing import find_images
from fpnx.images.reading import locate, open_source
from fpnx.remote import client as remote
from fpnx.remote.backends import ObjectInfo
from fpnx.visualization.image_maps import find_photo
from tests.helpers.files import ROOT, archive, noise_image
from tests.helpers.object_stores import KEYS, Web, free_port, web_server
from tests.helpers.process import document

LIMIT = 10**8
SMALL: dict[str, Any] = {
    "backbone": "mobilenet_v2", "weights": "random", "size": 64, "levels": "P4-P5", "channels": 8, "device": "cpu",
}  # fmt: skip
LINE = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
WRITTEN = 1445412480 * 10**9  # Wed, 21 Oct 2015 07:28:00 GMT


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.01, 0.01))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, KEYS[name])
    with web_server() as server:
        yield server


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    """Close the connections after every test."""
    with remote.connections():
        yield


def jpeg(seed: int = 1, size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    noise_image(seed, size).save(buffer, "JPEG")
    return buffer.getvalue()


def list_file(folder: Path, *lines: str) -> str:
    (folder / "list.txt").write_text("\n".join(lines))
    return f"@{folder / 'list.txt'}"


def test_one_image(web: Web) -> None:
    url = web.put("/a/b%20c.jpg", jpeg())
    listing = find_images([url])
    (source,) = listing.sources
    assert (source.name, listing.root) == (b"b%20c.jpg", f"{web.url}/a".encode())
    assert (source.bytes, source.mtime_ns) == (len(jpeg()), WRITTEN)
    assert decode(source, LIMIT).size == (60, 40)
    assert upright_size(source, LIMIT) == (40, 60)


def test_a_named_url_needs_no_known_extension(web: Web) -> None:
    assert decode(find_images([web.put("/picture", jpeg())]).sources[0], LIMIT).size == (60, 40)


@pytest.mark.parametrize(
    ("manners", "size", "time_or_etag"),
    [
        ({}, None, WRITTEN),
        ({"length": False}, -1, WRITTEN),
        ({"modified": ""}, None, 0),
        ({"modified": "yesterday"}, None, 0),
        ({"modified": "", "etag": '"abc"'}, None, -1 - (int(hashlib.sha256(b'"abc"').hexdigest()[:16], 16) >> 1)),
        ({"head": 405}, None, WRITTEN),
        ({"head": 403, "ranges": False}, None, WRITTEN),
        ({"ranges": False, "length": False, "modified": ""}, -1, 0),
    ],
    ids=["all", "no length", "no time", "odd time", "etag", "no head", "signed for get", "nothing"],
)
def test_size_and_time_from_headers(web: Web, manners: dict[str, Any], size: int | None, time_or_etag: int) -> None:
    source = find_images([web.put("/a.jpg", jpeg(), **manners)]).sources[0]
    assert source.bytes == (len(jpeg()) if size is None else size)
    assert source.mtime_ns == time_or_etag
    assert -(2**63) <= source.mtime_ns < 2**63
    assert decode(source, LIMIT).size == (60, 40)


@pytest.mark.parametrize(
    ("manners", "reason"),
    [
        ({"status": 404}, "not found"),
        ({"status": 403}, r"no permission \(403\)"),
        ({"status": 500}, r"refused \(500\)"),
    ],
    ids=["404", "403", "500"],
)
def test_errors_of_a_named_url(web: Web, manners: dict[str, Any], reason: str) -> None:
    with pytest.raises(FpnxError, match=reason):
        find_images([web.put("/a.jpg", b"", **manners)])


def test_unreachable_servers_and_folders(web: Web) -> None:
    with pytest.raises(FpnxError, match="cannot be reached: no network, no such host, or nothing"):
        find_images([f"http://127.0.0.1:{free_port()}/a.jpg"])
    with pytest.raises(FpnxError, match="web servers do not list folders"):
        find_images([f"{web.url}/folder/"])


def test_a_list_keeps_its_order_and_failing_urls(web: Web, tmp_path: Path) -> None:
    good = [web.put(f"/{name}.jpg", jpeg(i)) for i, name in enumerate("cab")]
    missing, broken = f"{web.url}/missing.jpg", web.put("/broken.jpg", jpeg(), status=503)
    listing = find_images([list_file(tmp_path, good[0], missing, good[1], broken, good[2])])
    assert [s.name for s in listing.sources] == [b"c.jpg", b"missing.jpg", b"a.jpg", b"broken.jpg", b"b.jpg"]
    assert [s.bytes for s in listing.sources if s.bytes < 0] == [-1, -1]
    with pytest.raises(ImageError, match=r"^not found \(404\)$"):
        decode(listing.sources[1], LIMIT)
    with pytest.raises(ImageError, match=r"^refused \(503\)$"):
        decode(listing.sources[3], LIMIT)
    with pytest.raises(FpnxError, match=r"none of the images can be read, such as .*missing.jpg: not found"):
        find_images([list_file(tmp_path, missing)])


def test_lists_on_servers(web: Web) -> None:
    web.put("/lists/a/x.jpg", jpeg(1))
    other = web.put("/y.jpg", jpeg(2))
    url = web.put("/lists/list.txt", f"a/x.jpg\r\n\r\n{other}\n".encode())
    listing = find_images([f"@{url}"])
    assert [source.name for source in listing.sources] == [b"lists/a/x.jpg", b"y.jpg"]
    assert listing.root == web.url.encode()
    with pytest.raises(FpnxError, match="not found"):
        find_images([f"@{web.url}/nothing.txt"])
    with pytest.raises(FpnxError, match="names no image"):
        find_images([f"@{web.put('/empty.txt', b'')}"])


def test_roots_of_several_hosts(web: Web, tmp_path: Path, photos: Path) -> None:
    first = web.put("/a/x.jpg", jpeg())
    other = first.replace("127.0.0.1", "localhost")
    listing = find_images([list_file(tmp_path, first, other)])
    assert listing.root == b"http://"
    assert [source.name for source in listing.sources] == [u.removeprefix("http://").encode() for u in (first, other)]
    with pytest.raises(FpnxError, match="given twice"):
        find_images([first, first])
    with pytest.raises(FpnxError, match="two runs"):
        find_images([first, str(photos)])


def test_secrets_of_urls_are_never_written(
    web: Web, tmp_path: Path, fpnx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        web.put(f"/{name}.jpg", jpeg())
    web.put("/bad.jpg", b"no image")
    signed = [f"{web.url}/{name}.jpg?X-Amz-Signature=SECRET&token=SECRET" for name in ("a", "b", "bad", "missing")]
    given = web.put("/list.txt", "\n".join(signed).encode()) + "?sig=SECRET"
    code, out, err = fpnx("extract", f"@{given}", "-o", "out.h5", "--json", *LINE)
    assert code == 1
    assert [failed["path"] for failed in document(out)["failed"]] == ["bad.jpg", "missing.jpg"]
    assert ("GET", "/a.jpg?X-Amz-Signature=SECRET&token=SECRET", "") in web.requests
    shown = fpnx("info", "out.h5", "--json")[1]
    assert json.loads(shown)["root"] == web.url
    refused = fpnx("extract", f"http://me:SECRET@127.0.0.1:{web.port}/a.jpg", *LINE)
    assert (refused[0], refused[1]) == (2, "")
    assert refused[2].count("\n") == 1
    missing = fpnx("extract", signed[3], "-o", "two.h5", *LINE)
    assert (missing[0], missing[2]) == (2, f"fpnx: {web.url}/missing.jpg?…: not found (404)\n")
    twice = fpnx("extract", signed[0], signed[0].replace("token", "other"), "-o", "two.h5", *LINE)
    assert "a.jpg is given twice" in twice[2]
    for text in (
        out,
        err,
        shown,
        *refused[1:],
        *missing[1:],
        *twice[1:],
        (tmp_path / "out.h5").read_bytes().decode("latin1"),
    ):
        assert "SECRET" not in text
    monkeypatch.setattr(sys, "argv", ["fpnx", "extract", f"{web.url}/a.jpg?token=SECRET", "-o", "one.h5", *LINE])
    assert fpnx(*sys.argv[1:])[0] == 0
    assert b"SECRET" not in (tmp_path / "one.h5").read_bytes()
    with h5py.File(tmp_path / "one.h5") as file:
        assert f"{web.url}/a.jpg?…" in json.loads(file.attrs["provenance"])["command"]


def test_broken_connections_are_retried(web: Web) -> None:
    source = find_images([web.put("/a.jpg", jpeg(), breaks=2)]).sources[0]
    assert decode(source, LIMIT).size == (60, 40)
    for manners in ({"breaks": 3}, {"breaks": 3, "length": False}):
        source = find_images([web.put("/b.jpg", jpeg(), **manners)]).sources[0]
        with pytest.raises(ImageError, match=r"^the connection broke$"):
            decode(source, LIMIT)


def test_silent_servers_time_out(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_images([web.put("/a.jpg", jpeg())]).sources[0]
    web.files["/a.jpg"].waits = 20
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT", 0.5)
    with pytest.raises(ImageError, match=r"^no answer in time$"):
        decode(source, LIMIT)


def test_objects_that_change_after_listing_fail(web: Web) -> None:
    source = find_images([web.put("/a.jpg", jpeg(1))]).sources[0]
    web.put("/a.jpg", jpeg(2, (61, 40)))
    with pytest.raises(ImageError, match=r"^changed after it was listed$"):
        decode(source, LIMIT)
    web.put("/a.jpg", jpeg(1), modified="Wed, 21 Oct 2015 07:28:01 GMT")
    with pytest.raises(ImageError, match=r"^changed after it was listed$"):
        decode(source, LIMIT)
    tagged = find_images([web.put("/b.jpg", jpeg(1), modified="", etag='"1"')]).sources[0]
    web.put("/b.jpg", jpeg(1), modified="", etag='"2"')
    with pytest.raises(ImageError, match=r"^changed after it was listed$"):
        decode(tagged, LIMIT)


@pytest.mark.parametrize("manners", [{}, {"length": False}], ids=["with length", "without length"])
def test_downloads_are_limited_in_size(web: Web, manners: dict[str, Any]) -> None:
    source = find_images([web.put("/a.jpg", bytes(200_000), **manners)]).sources[0]
    with pytest.raises(ImageError, match="more"), open_source(source, 100_000):
        pass


def test_html_pages_and_redirects(web: Web) -> None:
    source = find_images([web.put("/a.jpg", b"<!DOCTYPE html><html>sign in</html>")]).sources[0]
    with pytest.raises(ImageError, match="an HTML page"):
        decode(source, LIMIT)
    web.put("/moved.jpg", b"", status=302, leads="/real.jpg")
    web.put("/real.jpg", jpeg())
    assert decode(find_images([f"{web.url}/moved.jpg"]).sources[0], LIMIT).size == (60, 40)
    web.put("/round.jpg", b"", status=302, leads="/round.jpg")
    with pytest.raises(FpnxError, match="too many redirects"):
        find_images([f"{web.url}/round.jpg"])


def test_an_archive_on_a_server_is_read_in_parts(web: Web) -> None:
    contents = {f"d/{i:02}.jpg": jpeg(i) for i in range(5)} | {"big.dat": os.urandom(3_000_000), "z.jpg": jpeg(9)}
    url = web.put("/x.tar", archive(contents))
    listing = find_images([url])
    assert [source.name for source in listing.sources] == sorted(name.encode() for name in contents if "jpg" in name)
    assert listing.root == url.encode()
    contents_read = {}
    for source in listing.sources:
        with open_source(source, LIMIT) as file:
            contents_read[source.name.decode()] = file.read()
        assert upright_size(source, LIMIT) == (40, 60)
    assert contents_read == {name: content for name, content in contents.items() if "jpg" in name}
    downloaded = sum(
        int(r.split("-")[1]) + 1 - int(r.removeprefix("bytes=").split("-")[0]) for _, _, r in web.requests if r
    )
    assert downloaded < 1_000_000  # the large member was skipped
    assert find_images([f"{url}/d/03.jpg"]).sources[0].name == b"03.jpg"
    assert decode(locate(f"{url}/d/03.jpg".encode()), LIMIT).size == (60, 40)
    web.files["/x.tar"].modified = "Wed, 21 Oct 2015 07:28:01 GMT"
    with pytest.raises(ImageError, match=r"^changed after it was listed$"):
        decode(listing.sources[0], LIMIT)


def test_archives_on_servers_without_ranges_or_sizes(web: Web) -> None:
    with pytest.raises(FpnxError, match="gives whole files only"):
        find_images([web.put("/x.tar", archive({"a.jpg": jpeg()}), ranges=False)])
    with pytest.raises(FpnxError, match="does not tell its size"):
        find_images([web.put("/y.tar", archive({"a.jpg": jpeg()}), length=False)])
    truncated = find_images([web.put("/z.tar", archive({"a.jpg": jpeg(1), "b.jpg": jpeg(2)})[:2500])])
    assert "ends early" in truncated.truncated[0]


def test_read_ahead_grows_with_sequential_reads(web: Web) -> None:
    content = os.urandom(2_000_000)
    url = web.put("/x.bin", content).encode()
    ranges = remote.ReadAhead(url, ObjectInfo(len(content), WRITTEN))
    assert b"".join(ranges(start, 10_000) for start in range(0, 400_000, 10_000)) == content[:400_000]
    assert 2 <= len(web.requests) <= 4
    assert ranges(1_500_000, 600_000) == content[1_500_000:]
    assert ranges(1_999_999, 5) == content[-1:]
    assert ranges(2_000_000, 5) == b""


def test_long_lists_are_requested_in_batches(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "REQUESTS_PER_BATCH", 3)
    urls = [web.put(f"/{i}.jpg", bytes(i + 1)) for i in range(10)]
    assert [source.bytes for source in find_images([list_file(tmp_path, *urls)]).sources] == list(range(1, 11))


def test_a_forked_process_opens_its_own_connections(web: Web) -> None:
    url = web.put("/a.jpg", jpeg()).encode()
    assert remote.object_info(url).bytes == len(jpeg())
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads are running is the point
        child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(remote.object_info(url).bytes).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == str(len(jpeg()))
    assert os.waitpid(child, 0)[1] == 0


def test_extract_and_resume(web: Web, tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(6)]
    urls = [web.put(f"/{name}", jpeg(i)) for i, name in enumerate(names)]
    web.files["/3.jpg"].status = 503
    given, output = list_file(tmp_path, *urls), tmp_path / "out.h5"
    (tmp_path / "local").mkdir()
    for i, name in enumerate(names):
        (tmp_path / "local" / name).write_bytes(jpeg(i))
    local = package.extract(tmp_path / "local", tmp_path / "local.h5", **SMALL)
    result = package.extract(given, output, workers=3, **SMALL)
    assert (result.done, result.failed) == (5, (("3.jpg", "refused (503)"),))
    web.files["/3.jpg"].status = 200  # a size that was unknown before does not count as a change
    again = package.extract(given, output, resume=True, **SMALL)
    assert (again.done, again.computed) == (5, 0)
    with package.open(output) as store, package.open(local.output) as same:
        assert store.paths == names
        assert store.bytes.tolist() == [-1 if name == "3.jpg" else len(jpeg(i)) for i, name in enumerate(names)]
        for item in store:
            assert np.abs(item["P4"] - same[item.path]["P4"]).max() < 1e-5
        photo = find_photo(store["0.jpg"])
        assert photo.note == ""
        assert photo.picture is not None
        assert photo.picture.size == (60, 40)
    assert package.verify(output, against=given, device="cpu").compared == 5
    web.put("/0.jpg", jpeg(7))
    with pytest.raises(FpnxError, match="1 changed"):
        package.extract(given, output, resume=True, **SMALL)


@pytest.mark.parametrize(
    ("missing", "argument", "way"),
    [
        ("fsspec", "s3://bucket/a.jpg", "s3:// needs"),
        ("s3fs", "s3://bucket/a.jpg", "s3:// needs s3fs, which is not installed"),
        ("aiohttp", "https://host/a.jpg", "http:// needs aiohttp"),
        ("gcsfs", "gs://bucket/a.jpg", 'pip install "fpnx[remote]" gcsfs'),
        ("s3fs", "@s3://bucket/list.txt", "s3:// needs s3fs"),
    ],
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, fpnx: Callable[..., Any], missing: str, argument: str, way: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = fpnx("extract", argument)
    assert (code, out) == (2, "")
    assert way in err
    assert 'pip install "fpnx[remote]"' in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_while_a_server_is_silent(web: Web, tmp_path: Path, signals: int) -> None:
    urls = [web.put(f"/{i}.jpg", jpeg(i)) for i in range(40)]
    for path in list(web.files)[8:]:
        web.files[path].waits = 3 if signals == 1 else 600
    given = list_file(tmp_path, *urls)
    process = subprocess.Popen(
        [sys.executable, "-m", "fpnx", "extract", given, "-o", "out.h5", "--batch-size=2", "--commit-every=0", *LINE],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for _ in range(600):
        if sum(method == "GET" for method, _, _ in web.requests) > 12:
            break
        time.sleep(0.05)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert (tmp_path / "out.h5.part").exists()


@pytest.mark.slow
def test_all_connections_are_closed(web: Web, tmp_path: Path) -> None:
    url = web.put("/a.jpg", jpeg())
    code = f"""
import fpnx
result = fpnx.extract([{url!r}], "out.h5", **{SMALL!r})
assert result.done == 1
import gc
gc.collect()
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "nclosed" not in done.stderr
