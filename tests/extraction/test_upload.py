"""S3, served by moto on this machine: images are read from it, and files are uploaded completely or not at all."""

from __future__ import annotations

import io
import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import h5py
import numpy as np
import pytest

import fpnx as package
from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError, ImageError, Interrupted, StoreError
from fpnx.core.events import Listener
from fpnx.extraction.upload import resolve_destination
from fpnx.images.decoding import decode, upright_size
from fpnx.images.listing import find_images
from fpnx.images.reading import open_source
from fpnx.remote import backends as services
from fpnx.remote import client as remote
from tests.helpers.documentation import command_lines
from tests.helpers.files import ROOT, archive, noise_image
from tests.helpers.object_stores import KEYS, Line, free_port, s3_server, web_server
from tests.helpers.process import document

LIMIT = 10**8
SMALL: dict[str, Any] = {
    "backbone": "mobilenet_v2", "weights": "random", "size": 64, "levels": "P4-P5", "channels": 8, "device": "cpu",
}  # fmt: skip
LINE = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
NUMBERS = itertools.count()
LARGE = {**SMALL, "size": 128, "levels": "P2", "channels": 256}  # a megabyte an image


def jpeg(seed: int = 1, size: tuple[int, int] = (60, 40)) -> bytes:
    held = io.BytesIO()
    noise_image(seed, size).save(held, "JPEG")
    return held.getvalue()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("moto")) as number:
        yield number


class Bucket:
    """An empty bucket, accessed with the AWS client."""

    def __init__(self, port: int, name: str) -> None:
        self.port, self.name, self.url = port, name, f"s3://{name}"
        self._client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
        )
        self._client.create_bucket(Bucket=name)

    def put(self, key: str, content: bytes) -> str:
        self._client.put_object(Bucket=self.name, Key=key, Body=content)
        return f"{self.url}/{key}"

    def get(self, key: str) -> bytes | None:
        if key not in [held["Key"] for held in self._client.list_objects_v2(Bucket=self.name).get("Contents", [])]:
            return None
        with self._client.get_object(Bucket=self.name, Key=key)["Body"] as body:
            return bytes(body.read())

    def unfinished(self) -> int:
        """Number of multipart uploads that were neither completed nor aborted."""
        return len(self._client.list_multipart_uploads(Bucket=self.name).get("Uploads", []))

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def bucket(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    made = Bucket(port, f"bucket-{next(NUMBERS)}")
    with remote.connections():
        yield made
    made.close()


def scratch(tmp_path: Path) -> list[str]:
    """Names of the files in the scratch folder."""
    return sorted(path.name for path in (tmp_path / "scratch").rglob("*") if path.is_file())


def test_a_folder_of_a_bucket(bucket: Bucket) -> None:
    keys = ["a.jpg", "b/c d.JPG", "b/é+#%?[1].png", "b//e.jpg", "b.jpg", "tar.tar/f.jpg"]
    for i, key in enumerate(keys):
        bucket.put(f"p/{key}", jpeg(i))
    for key in ("p/notes.txt", "p/folder/", "p/.hidden/x.jpg", "p/.x.jpg", "p/x.tar", "other/x.jpg", "p/../up.jpg"):
        bucket.put(key, b"x")
    for given in (f"{bucket.url}/p/", f"{bucket.url}/p"):
        listing = find_images([given])
        assert listing.root == f"{bucket.url}/p".encode()
        assert [source.name for source in listing.sources] == sorted(key.encode() for key in keys)
        assert listing.skipped == {".txt": 1, ".tar": 1, "outside of it": 1}
        assert listing.remarks == (f"{bucket.url}/p: 1 objects are left out, since their names lead out of it",)
    for source in listing.sources:
        expected = jpeg(keys.index(source.name.decode()))
        assert source.bytes == len(expected)
        assert source.mtime_ns > 1.7e18
        assert decode(source, LIMIT).size == (60, 40)
        assert upright_size(source, LIMIT) == (40, 60)


def test_other_ways_to_name_objects(bucket: Bucket, tmp_path: Path) -> None:
    for key in ("a.jpg", "b.png", "p/a.jpg", "p/q/a.jpg", "p/q/b.png", "odd[1].jpg", "p/picture"):
        bucket.put(key, jpeg())

    def names(*given: str) -> list[str]:
        return [source.name.decode() for source in find_images([f"{bucket.url}/{path}" for path in given]).sources]

    assert names("**.jpg") == ["a.jpg", "odd[1].jpg", "p/a.jpg", "p/q/a.jpg"]
    assert names("p/**/*.jpg") == ["a.jpg", "q/a.jpg"]
    assert names("p/*.jpg") == ["a.jpg"]
    assert names("p/q/?.*") == ["a.jpg", "b.png"]
    assert names("odd[1].jpg") == ["odd[1].jpg"]
    assert names("p/picture") == ["picture"]
    assert names("p/a.jpg", "a.jpg") == ["a.jpg", "p/a.jpg"]
    assert len(find_images([bucket.url]).sources) == 6
    bucket.put("list.txt", f"p/q/b.png\n{bucket.url}/a.jpg\n".encode())
    assert [source.name for source in find_images([f"@{bucket.url}/list.txt"]).sources] == [b"p/q/b.png", b"a.jpg"]
    with pytest.raises(FpnxError, match="given twice"):
        find_images([f"{bucket.url}/p/", f"{bucket.url}/p/a.jpg"])
    with pytest.raises(FpnxError, match=r"no images in .*/\*\.webp"):
        find_images([f"{bucket.url}/*.webp"])


def test_archives_in_a_bucket(bucket: Bucket) -> None:
    content = archive({"d/01.jpg": jpeg(), "e/01.jpg": jpeg()})
    for key in ("s/0.tar", "s/1.tar"):
        bucket.put(key, content)
    listing = find_images([f"{bucket.url}/s/*.tar"])
    assert [s.name for s in listing.sources] == [f"{i}.tar/{d}/01.jpg".encode() for i in (0, 1) for d in "de"]
    assert decode(listing.sources[3], LIMIT).size == (60, 40)
    assert upright_size(listing.sources[0], LIMIT) == (40, 60)
    assert [source.name for source in find_images([f"{bucket.url}/s/1.tar"]).sources] == [b"d/01.jpg", b"e/01.jpg"]
    bucket.put("s/1.tar", content + bytes(512))
    with pytest.raises(ImageError, match="changed after it was listed"):
        decode(listing.sources[3], LIMIT)


def test_missing_and_changed_objects(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FpnxError, match=r"^s3://no-such-bucket/x: no such bucket"):
        find_images(["s3://no-such-bucket/x"])
    with pytest.raises(FpnxError, match=rf"^{bucket.url}/nothing.jpg: not found$"):
        find_images([f"{bucket.url}/nothing.jpg"])
    with pytest.raises(FpnxError, match="no images in"):
        find_images([f"{bucket.url}/nothing/"])
    source = find_images([bucket.put("a.jpg", jpeg(1))]).sources[0]
    bucket.put("a.jpg", jpeg(2, (90, 40)))
    with pytest.raises(ImageError, match=r"^changed after it was listed$"):
        decode(source, LIMIT)
    bucket._client.delete_object(Bucket=bucket.name, Key="a.jpg")
    with pytest.raises(ImageError, match=r"^not found$"):
        decode(source, LIMIT)


def test_a_broken_response_is_requested_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.01, 0.01))
    line = Line(bucket.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    content = jpeg() + os.urandom(300_000)
    source = find_images([bucket.put("a.jpg", content)]).sources[0]
    line.breaks = 2
    with open_source(source, LIMIT) as file:
        assert file.read() == content
    line.breaks = 3
    with pytest.raises(ImageError, match=r"^the connection broke$"):
        decode(source, LIMIT)
    line.close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("AccessDenied", r"no permission"),
        ("InvalidAccessKeyId", r"the credentials are not accepted \(InvalidAccessKeyId\)"),
        ("ExpiredToken", r"the credentials are not accepted \(ExpiredToken\)"),
    ],
)
def test_no_permission(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, code: str, reason: str) -> None:
    with remote.connections(), web_server() as web:
        refusal = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>AKIA SECRET</Message></Error>".encode()
        web.put("/private", refusal, status=403)
        monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
        fresh_connections()
        with pytest.raises(FpnxError, match=reason) as error:
            find_images(["s3://private/"])
        assert "SECRET" not in str(error.value)


def fresh_connections() -> None:
    """Close the connections, as in a new process with other settings."""
    remote._backends.clear()


def test_no_credentials_and_no_network(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(FpnxError, match="no credentials: set AWS_ACCESS_KEY_ID"):
        find_images([f"{bucket.url}/p/"])
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    fresh_connections()
    with pytest.raises(FpnxError, match="cannot be reached: no network"):
        find_images([f"{bucket.url}/p/"])


def test_from_a_bucket_into_a_bucket(bucket: Bucket, photos: Path, tmp_path: Path, fpnx: Callable[..., Any]) -> None:
    for source in find_images([photos]).sources:
        bucket.put(f"in/{source.name.decode()}", Path(os.fsdecode(source.path)).read_bytes())
    local = package.extract(photos, tmp_path / "local.h5", **SMALL)
    target = f"{bucket.url}/out/features.h5"
    code, out, err = fpnx("extract", f"{bucket.url}/in/**", "-o", target, *LINE)
    assert (code, bucket.unfinished()) == (0, 0), err
    assert f"6 of 6 images are in {target}" in out
    assert f"{tmp_path / 'scratch'}" in out
    assert list((tmp_path / "scratch").glob("fpnx-*")) == []
    (tmp_path / "got.h5").write_bytes(bucket.get("out/features.h5") or b"")
    assert package.verify(tmp_path / "got.h5").problems == ()
    with package.open(tmp_path / "got.h5") as got, package.open(local.output) as same, package.open(target) as there:
        assert got.paths == same.paths == there.paths
        assert (got.root, len(there), there.complete) == (f"{bucket.url}/in", 6, True)
        for path in same.paths:
            assert np.abs(got[path]["P4"] - same[path]["P4"]).max() < 1e-5
            assert np.array_equal(got[path]["P5"], there[path]["P5"])
    assert package.verify(target, against=f"{bucket.url}/in/", device="cpu").problems == ()
    assert document(fpnx("info", target, "--json")[1])["images"]["done"] == 6

    assert "exists" in fpnx("extract", f"{bucket.url}/in/", "-o", target, *LINE)[2]
    code, out, _ = fpnx("extract", f"{bucket.url}/in/", "-o", target, "--resume", "--json", *LINE)
    result = document(out)
    assert (code, result["done"], result["computed"], result["output"], result["complete"]) == (0, 6, 0, target, True)
    code, out, err = fpnx("extract", f"{bucket.url}/in/", "-o", target, "--resume", *LINE, "--levels", "P5")
    assert code == 2
    assert "was made with another config" in err
    assert fpnx("extract", f"{bucket.url}/in/", "-o", target, "--overwrite", *LINE, "--levels", "P5")[0] == 0
    with package.open(target) as there:
        assert there.levels == ("P5",)
    bucket.put("in/a.jpg", jpeg(7))
    code, out, err = fpnx("extract", f"{bucket.url}/in/", "-o", target, "--resume", *LINE, "--levels", "P5")
    assert (code, "0 added, 0 removed, 1 changed" in err) == (2, True)
    assert list((tmp_path / "scratch").glob("fpnx-*")) == []


def test_a_dry_run_writes_nothing(bucket: Bucket, photos: Path, tmp_path: Path, fpnx: Callable[..., Any]) -> None:
    code, out, _ = fpnx("extract", photos, "-o", f"{bucket.url}/out.h5", "--dry-run", *LINE)
    assert code == 0
    assert f"{bucket.url}/out.h5" in out
    assert (bucket.get("out.h5"), list((tmp_path / "scratch").glob("fpnx-*"))) == (None, [])


@pytest.mark.parametrize(
    ("output", "options", "reason"),
    [
        ("https://host/out.h5", [], "name an object in a bucket, such as s3://bucket/out.h5"),
        ("s3://bucket/", [], "name an object in a bucket, such as s3://bucket/out.h5"),
        ("s3://bucket", [], "name an object in a bucket"),
        ("s3://me:SECRET@bucket/out.h5", [], "holds a user or password"),
        ("s3://bucket/out_png", ["--format", "png"], "pictures go into a folder on a disk"),
        ("out.h5", ["--scratch", "."], "is for outputs in object stores"),
        ("s3://bucket/out.h5", ["--scratch", "nowhere"], "scratch folder nowhere does not exist"),
        ("s3://no-such-bucket/out.h5", [], "no such bucket"),
        ("azure://bucket/out.h5", [], "fpnx reads s3://"),
    ],
)
def test_outputs_that_are_refused_before_any_work(
    bucket: Bucket, photos: Path, fpnx: Callable[..., Any], output: str, options: list[str], reason: str
) -> None:
    code, out, err = fpnx("extract", photos, "-o", output, *options, *LINE)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    assert "SECRET" not in err


def test_a_scratch_folder_of_another_user_is_refused(bucket: Bucket, photos: Path, tmp_path: Path) -> None:
    destination = resolve_destination(f"{bucket.url}/out.h5", ExtractConfig())
    (tmp_path / "elsewhere").mkdir()
    destination.local.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FpnxError, match="is not a folder of yours"):
        package.extract(photos, f"{bucket.url}/out.h5", **SMALL)


class Trigger(Listener):
    """Calls `action` once, at the first message or progress event whose text starts with `prefix`."""

    def __init__(self, prefix: str, action: Callable[[], object]) -> None:
        self._prefix, self._action, self.done = prefix, action, False

    def message(self, text: str) -> None:
        self._check(text)

    def progress(self, what: str, done: int, total: int) -> None:
        self._check(what)

    def _check(self, text: str) -> None:
        if text.startswith(self._prefix) and not self.done:
            self.done = True
            self._action()


def test_an_object_that_appears_during_the_run_is_not_replaced(bucket: Bucket, photos: Path, tmp_path: Path) -> None:
    target = f"{bucket.url}/out.h5"
    with pytest.raises(StoreError, match="is not an HDF5 file"):
        package.extract(photos, target, listener=Trigger("verifying", lambda: bucket.put("out.h5", b"other")), **SMALL)
    assert bucket.get("out.h5") == b"other"
    assert scratch(tmp_path) == ["out.h5"]
    with pytest.raises(StoreError, match="is not an HDF5 file"):
        package.extract(photos, target, resume=True, **SMALL)
    assert package.extract(photos, target, overwrite=True, **SMALL).done == 6
    assert scratch(tmp_path) == []
    with package.open(target) as store:
        assert len(store) == 6


@pytest.mark.slow
def test_an_object_of_the_same_run_that_appears_is_accepted(bucket: Bucket, photos: Path, tmp_path: Path) -> None:
    target = f"{bucket.url}/out.h5"
    package.extract(photos, tmp_path / "other.h5", **SMALL)
    content = (tmp_path / "other.h5").read_bytes()
    result = package.extract(
        photos, target, listener=Trigger("verifying", lambda: bucket.put("out.h5", content)), **SMALL
    )
    assert (result.done, result.output, scratch(tmp_path)) == (6, target, [])
    assert bucket.get("out.h5") == content


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_an_object_is_replaced_only_if_allowed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    monkeypatch.setattr(services, "PART_BYTES", 5 << 20 if parts else 1 << 26)
    content = os.urandom(11 << 20)
    (tmp_path / "x.bin").write_bytes(content)
    url, sent = bucket.put("x.bin", b"old").encode(), list[int]()

    def send(replace: bool) -> bool:
        return remote.send(str(tmp_path / "x.bin"), url, replace, sent.append, lambda: True)

    assert not send(False)
    assert bucket.get("x.bin") == b"old"
    assert send(True)
    assert bucket.get("x.bin") == content
    assert (sent[-1], bucket.unfinished()) == (len(content), 0)


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_a_put_that_fails_half_way(
    bucket: Bucket,
    samples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fpnx: Callable[..., Any],
    parts: bool,
) -> None:
    line = Line(bucket.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    monkeypatch.setattr(services, "PART_BYTES", 5 << 20 if parts else 1 << 26)
    options = [word for name, value in LARGE.items() for word in (f"--{name}", str(value))]
    target = f"{bucket.url}/out.h5"
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.jpg").write_bytes(jpeg(i))
    line.cut_after = 2_000_000
    code, out, err = fpnx("extract", folder, "-o", target, *options)
    assert code == 2
    kept = next((tmp_path / "scratch").rglob("out.h5"))
    last = err.splitlines()[-1]
    assert f"{target} was not written (" in last
    assert f"{kept} is whole: the same command with --resume sends it" in last
    assert (bucket.get("out.h5"), bucket.unfinished()) == (None, 0)
    content = kept.read_bytes()
    assert len(content) > 12_000_000
    assert "exists" in fpnx("extract", folder, "-o", target, *options)[2]

    line.cut_after = None
    code, out, err = fpnx("extract", folder, "-o", target, "--resume", "--json", *options)
    result = document(out)
    assert (code, result["computed"], result["done"]) == (0, 0, 12)
    assert bucket.get("out.h5") == content
    assert scratch(tmp_path) == []
    line.close()


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_an_upload_to_a_server_that_stops_reading_times_out(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    line = Line(bucket.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    monkeypatch.setattr(services, "PART_BYTES", 5 << 20 if parts else 1 << 26)
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT", 1)
    monkeypatch.setattr(remote, "MIN_BYTES_PER_SECOND", 1 << 26)
    (tmp_path / "x.bin").write_bytes(bytes(12 << 20))
    line.cut_after, line.deaf = 2_000_000, True
    with pytest.raises(remote.RemoteError, match="no answer in time"):
        remote.send(str(tmp_path / "x.bin"), f"{bucket.url}/x.bin".encode(), False, lambda n: None, lambda: True)
    assert bucket.get("x.bin") is None
    line.close()


def test_an_interrupted_put_leaves_nothing_there(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "PART_BYTES", 5 << 20)
    folder, target = tmp_path / "images", f"{bucket.url}/out.h5"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.jpg").write_bytes(jpeg(i))
    interrupt = Trigger("MB sent", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="is whole: the same command with --resume sends it"):
        package.extract(folder, target, listener=interrupt, **LARGE)
    assert (bucket.get("out.h5"), bucket.unfinished()) == (None, 0)
    assert scratch(tmp_path) == ["out.h5"]
    assert package.extract(folder, target, resume=True, **LARGE).computed == 0
    assert (bucket.get("out.h5") is not None, scratch(tmp_path)) == (True, [])


def test_an_interrupted_run_is_resumed(bucket: Bucket, photos: Path, tmp_path: Path) -> None:
    target = f"{bucket.url}/out.h5"
    interrupt = Trigger("images", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="continue with --resume"):
        package.extract(photos, target, listener=interrupt, batch_size=1, **SMALL)
    assert scratch(tmp_path) == ["out.h5.part"]
    with pytest.raises(FpnxError, match="holds an unfinished run"):
        package.extract(photos, target, **SMALL)
    result = package.extract(photos, target, resume=True, **SMALL)
    assert (result.done, scratch(tmp_path)) == (6, [])


@pytest.mark.slow
def test_an_overwriting_run_that_was_interrupted_may_still_replace(
    bucket: Bucket, photos: Path, tmp_path: Path
) -> None:
    target = bucket.put("out.h5", b"old")
    interrupt = Trigger("images", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        package.extract(photos, target, listener=interrupt, overwrite=True, batch_size=1, **SMALL)
    assert bucket.get("out.h5") == b"old"
    assert package.extract(photos, target, resume=True, **SMALL).done == 6
    assert (bucket.get("out.h5") != b"old", scratch(tmp_path)) == (True, [])


@pytest.mark.slow
def test_a_file_with_failed_images_is_uploaded(bucket: Bucket, photos: Path, fpnx: Callable[..., Any]) -> None:
    (photos / "bad.jpg").write_bytes(b"no image")
    code, out, _ = fpnx("extract", photos, "-o", f"{bucket.url}/out.h5", "--json", *LINE)
    assert (code, document(out)["done"]) == (1, 6)
    code, out, _ = fpnx("extract", photos, "-o", f"{bucket.url}/out.h5", "--resume", "--json", *LINE)
    assert (code, document(out)["computed"]) == (1, 0)
    assert document(out)["failed"][0]["path"] == "bad.jpg"


def test_objects_that_are_not_fpnx_files_are_refused(bucket: Bucket, fpnx: Callable[..., Any], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.zeros(5)
    for content, reason in (
        (b"no HDF5", "is not an HDF5 file"),
        ((tmp_path / "x.h5").read_bytes(), "not one of fpnx's"),
        ((tmp_path / "x.h5").read_bytes()[:-100], "is truncated"),
    ):
        code, _, err = fpnx("info", bucket.put("x.h5", content))
        assert (code, err.count("\n")) == (2, 1)
        assert reason in err
    assert "not found" in fpnx("info", f"{bucket.url}/nothing.h5")[2]


@pytest.mark.slow
def test_shards_into_a_bucket_and_out_of_it(
    bucket: Bucket, photos: Path, tmp_path: Path, fpnx: Callable[..., Any]
) -> None:
    for source in find_images([photos]).sources:
        bucket.put(f"in/{source.name.decode()}", Path(os.fsdecode(source.path)).read_bytes())
    listed = subprocess.run(
        [sys.executable, "-m", "fpnx", "list", f"{bucket.url}/in/"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    assert b"6 images, 0 other files passed over" in listed.stderr
    given, target = f"@{bucket.put('list.txt', listed.stdout)}", f"{bucket.url}/out.h5"
    for index in (1, 0):
        code, _, err = fpnx("extract", given, "-o", target, "--shard", f"{index}/2", *LINE)
        assert code == 0, err
    assert bucket.get("out.shard-00001-of-00002.h5") is not None
    assert scratch(tmp_path) == []
    assert fpnx("extract", f"{bucket.url}/in/", "-o", "whole.h5", *LINE)[0] == 0
    package.verify(f"{bucket.url}/out.shard-*.h5")
    assert fpnx("merge", "merged.h5", f"{bucket.url}/out.shard-*.h5")[0] == 0
    with package.open(tmp_path / "merged.h5") as merged, package.open(tmp_path / "whole.h5") as whole:
        assert (merged.paths, merged.root) == (whole.paths, whole.root)
        assert merged.mtimes_ns.tolist() == whole.mtimes_ns.tolist()
        for path in whole.paths:
            assert np.abs(merged[path]["P4"] - whole[path]["P4"]).max() < 1e-5
    with pytest.raises(StoreError, match="no file is called"):
        package.open(f"{bucket.url}/nothing.shard-*.h5")


@pytest.mark.parametrize("line", command_lines(addresses=True))
def test_command_lines_of_the_documentation(bucket: Bucket, fpnx: Callable[..., Any], line: str) -> None:
    for key in ("photos/a.jpg", "photos/b/c.jpg"):
        bucket.put(key, jpeg())
    bucket.put("shards/0.tar", archive({"a.jpg": jpeg()}))
    code, _, err = fpnx(*shlex.split(line.replace("s3://bucket/", f"{bucket.url}/"))[1:], *LINE)
    assert code == 0, err


@pytest.mark.slow
def test_nothing_is_left_open(bucket: Bucket, photos: Path, tmp_path: Path) -> None:
    bucket.put("a.jpg", (photos / "a.jpg").read_bytes())
    code = f"""
import gc, fpnx
assert fpnx.extract("{bucket.url}/a.jpg", "{bucket.url}/out.h5", **{SMALL!r}).done == 1
with fpnx.open("{bucket.url}/out.h5") as store:
    assert store["a.jpg"]["P4"].shape == (8, 4, 4)
gc.collect()
"""
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", code],  # -X dev makes aiohttp refuse moto's headers
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "nclosed" not in done.stderr


@pytest.mark.slow
def test_more_than_one_page(bucket: Bucket) -> None:
    for i in range(1100):
        bucket.put(f"p/{i:05}.jpg", b"x")
    listing = find_images([f"{bucket.url}/p/"])
    assert [source.name for source in listing.sources] == [f"{i:05}.jpg".encode() for i in range(1100)]


@pytest.mark.slow
def test_a_server_that_does_not_answer_times_out(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(bucket.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    source = find_images([bucket.put("a.jpg", jpeg())]).sources[0]
    line.silent = True
    fresh_connections()
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT", 3)
    with pytest.raises(ImageError, match=r"^no answer in time$"):
        decode(source, LIMIT)
    line.close()
