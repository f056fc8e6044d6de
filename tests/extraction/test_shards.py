"""`--shard` and `fpnx list`: the images of a shard, its attributes, and lists that were changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

import fpnx
from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.image_list import list_fingerprint
from fpnx.core.sharding import Shard, ShardSlice, parse_shard, shard_path
from fpnx.images.listing import Listing, find_images, list_lines
from fpnx.images.manifest import is_manifest, read_manifest
from tests.helpers.files import noise_image
from tests.helpers.process import document, forked

OPTIONS: dict[str, Any] = {
    "weights": "random", "backbone": "mobilenet_v2", "channels": 8, "levels": "P5", "size": 64
}  # fmt: skip
LINE = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
NAMES = [b"bad\xff\xfe.jpg", b"new\nline.jpg", "caf\u00e9.jpg".encode(), b'quo"te\\.jpg', b"tab\there.jpg"]


@pytest.mark.parametrize(
    ("images", "count", "slices"),
    [
        (10, 3, [(0, 3), (3, 6), (6, 10)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2, 4, [(0, 0), (0, 1), (1, 1), (1, 2)]),
        (7, 1, [(0, 7)]),
    ],
)
def test_slices(images: int, count: int, slices: list[tuple[int, int]]) -> None:
    ranges = [Shard(index, count).slice(images) for index in range(count)]
    assert [(one.start, one.stop) for one in ranges] == slices


def test_slices_cover_a_list_once_and_differ_by_one_at_most() -> None:
    for images in (1, 5, 16, 97, 480):
        for count in (1, 2, 7, 16, 100):
            ranges = [Shard(index, count).slice(images) for index in range(count)]
            assert [i for one in ranges for i in one] == list(range(images))
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("out.h5", "out.shard-00003-of-00016.h5"),
        ("a/my.run.h5", "a/my.run.shard-00003-of-00016.h5"),
        ("out_png", "out_png.shard-00003-of-00016"),
    ],
)
def test_names(output: str, named: str) -> None:
    assert shard_path(Path(output), Shard(3, 16)) == Path(named)


SLURM = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "16", "SLURM_ARRAY_TASK_COUNT": "16"}


@pytest.mark.parametrize(
    ("text", "environment", "index"),
    [
        ("3/16", {}, 3),
        ("3/16", {"RANK": "5", "SLURM_ARRAY_TASK_ID": "6"}, 3),
        ("0/1", {}, 0),
        ("auto/16", {"RANK": "0"}, 0),
        ("auto/16", {"RANK": "15", "SLURM_ARRAY_TASK_ID": ""}, 15),
        ("auto/16", {"SLURM_ARRAY_TASK_ID": "4"}, 4),
        ("auto/16", {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "1"}, 3),
        ("auto/16", {"SLURM_ARRAY_TASK_ID": "16", **SLURM}, 15),
    ],
)
def test_which_shard(text: str, environment: dict[str, str], index: int) -> None:
    shard = parse_shard(text, environment)
    assert (shard.index, str(shard)) == (index, f"{index}/{text.partition('/')[2]}")


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("16/16", {}, r"shard 16/16: of 16 shards the first is 0 and the last 15"),
        ("3", {}, r"take I/N with I from 0 to N-1"),
        ("-1/4", {}, r"take I/N"),
        ("1/0", {}, r"take I/N"),
        ("1/٤", {}, r"take I/N"),
        ("0/100000", {}, r"N up to 99999"),
        ("auto", {"RANK": "1"}, r"take I/N"),
        ("auto/16", {}, r"neither SLURM_ARRAY_TASK_ID nor RANK is set: give the number itself, such as 0/16"),
        ("auto/16", {"RANK": "1", "SLURM_ARRAY_TASK_ID": "1"}, r"SLURM_ARRAY_TASK_ID and RANK are both set"),
        ("auto/16", {"RANK": "x"}, r"RANK is 'x', no number"),
        ("auto/16", {"RANK": "-1"}, r"RANK is '-1', no number"),
        ("auto/4", {"RANK": "4"}, r"RANK 4: of 4 shards the first is 0 and the last 3"),
        ("auto/4", {"SLURM_ARRAY_TASK_ID": "4"}, r"SLURM_ARRAY_TASK_ID 4: of 4 shards"),
        ("auto/16", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "low"}, r"SLURM_ARRAY_TASK_MIN is 'low'"),
        ("auto/8", {"SLURM_ARRAY_TASK_ID": "3", **SLURM}, r"this array is 1-16 .* which of 8 shards"),
        (  # tasks 3 and 7 alone, submitted again: the first of them is not shard 0
            "auto/16",
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"},
            r"this array is 3-7 and its task 3, .* \$SLURM_ARRAY_TASK_ID/16",
        ),
        ("auto/16", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "2"}, r"this array is 2-17 and its task 1"),
    ],
)
def test_invalid_shards_are_refused(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        parse_shard(text, environment)


def test_the_environment_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setenv("RANK", "2")
    config = ExtractConfig(shard="auto/4")
    assert config.shard == Shard(2, 4)
    assert "shard" not in config.repeatable()


def test_images_and_attributes_of_a_shard(photos: Path, tmp_path: Path) -> None:
    whole = find_images([photos])
    names = [source.name for source in whole.sources]
    parts = [find_images([photos], shard=Shard(index, 4)) for index in range(4)]
    assert [source.name for part in parts for source in part.sources] == names
    cuts = [part.shard_slice for part in parts]
    records = [(source.name, source.bytes, source.mtime_ns) for source in whole.sources]
    untimed = "".join(f'["{name.decode()}",{size}' for name, size, _ in records)
    lists = list_fingerprint(records), hashlib.sha256(untimed.encode()).hexdigest()
    assert cuts == [ShardSlice(i, 4, first, 6, *lists) for i, first in enumerate((0, 1, 3, 4))]
    assert {part.root for part in parts} == {whole.root}

    result = fpnx.extract(photos, tmp_path / "out.h5", shard="1/4", **OPTIONS)
    assert result.output == tmp_path / "out.shard-00001-of-00004.h5"
    assert (result.images, result.done, result.exit_code) == (2, 2, 0)
    assert result.to_json()["shard"] == cuts[1].to_json() if cuts[1] else False
    with h5py.File(result.output) as file:
        attribute = json.loads(file.attrs["shard"])
        assert attribute == {"index": 1, "count": 4, "first": 1, "images": 6, "list": lists[0], "names": lists[1]}
        config = file.attrs["config"]
    with fpnx.open(result.output) as store:
        assert [os.fsencode(path) for path in store.paths] == names[1:3]
        assert store.shard_slice == cuts[1]
    fpnx.extract(photos, tmp_path / "whole.h5", **OPTIONS)
    with h5py.File(tmp_path / "whole.h5") as file:  # what changes the numbers is the same
        assert file.attrs["config"] == config
        assert "shard" not in file.attrs


def test_the_limit_comes_before_the_cut(photos: Path) -> None:
    names = [source.name for source in find_images([photos]).sources]
    parts = [find_images([photos], 4, Shard(index, 2)) for index in range(2)]
    assert [source.name for part in parts for source in part.sources] == names[:4]
    assert {part.shard_slice.images for part in parts if part.shard_slice} == {4}


def test_more_shards_than_images(photos: Path, fpnx: Callable[..., Any]) -> None:
    for index in range(3):
        code, out, error = fpnx("extract", photos, "--limit", "2", "--shard", f"{index}/3", *LINE)
        assert code == 0, error
        assert f"shard {index}/3" in " ".join(out.split())
    empty = "out.shard-00000-of-00003.h5"
    code, out, _ = fpnx("verify", empty)
    assert (code, out.splitlines()[-1][:9]) == (0, "verified:")
    code, out, _ = fpnx("info", empty)
    assert code == 0
    assert "0/3: none of 2" in out
    assert fpnx("extract", photos, "--limit", "2", "--shard", "0/3", "--resume", *LINE)[0] == 0
    code, out, _ = fpnx("info", "out.shard-*-of-00003.h5", "--json")
    assert (code, document(out)["images"]["done"]) == (0, 2)


def test_a_shard_is_resumed_and_protected_like_a_run_without_shards(photos: Path, fpnx: Callable[..., Any]) -> None:
    assert fpnx("extract", photos, "--shard", "0/2", *LINE)[0] == 0
    again = ["extract", photos, "--shard", "0/2", *LINE]
    assert "exists: continue it with --resume" in fpnx(*again)[2]
    code, out, _ = fpnx(*again, "--resume", "--json")
    assert (code, document(out)["computed"]) == (0, 0)
    assert fpnx(*again, "--overwrite")[0] == 0
    code, _, error = fpnx(*again, "--resume", "--seed", "1")
    assert code == 2
    assert "another config (seed 0 → 1)" in error
    assert not [name for name in os.listdir() if name.endswith((".part", ".lock"))]

    os.rename("out.shard-00000-of-00002.h5", "out.shard-00000-of-00003.h5")
    code, _, error = fpnx("extract", photos, "--shard", "0/3", *LINE, "--resume")
    assert code == 2
    assert "made from other images (0 added, 1 removed, 0 changed)" in error
    os.rename("out.shard-00000-of-00003.h5", "out.shard-00000-of-00002.h5")
    noise_image(9, (64, 64)).save(photos / "z.png")  # at the end of the list, outside this shard
    noise_image(9, (64, 64)).save(photos / "zz.png")
    (photos / "c.png").unlink()  # not in it either, so that the slice stays
    (photos / "d.webp").unlink()
    code, _, error = fpnx(*again, "--resume")
    assert code == 2
    assert "was cut from another list" in error


def test_pictures_of_a_shard_go_to_a_folder_of_their_own(photos: Path, fpnx: Callable[..., Any]) -> None:
    for index in range(2):
        code, _, error = fpnx("extract", photos, "--shard", f"{index}/2", "--format", "png", *LINE)
        assert code == 0, error
    pictures = [path for index in range(2) for path in Path(f"out_png.shard-0000{index}-of-00002").rglob("*.png")]
    assert len(pictures) == 6


def listed(listing: Listing, path: Path) -> Path:
    path.write_bytes(b"".join(list_lines(listing)))
    return path


def test_a_list_restores_the_images_that_it_was_made_from(photos: Path, tmp_path: Path) -> None:
    for name in NAMES:
        shutil.copy(photos / "a.jpg", os.fsencode(photos) + b"/" + name)
    whole = find_images([photos])
    path = listed(whole, tmp_path / "list.txt")
    assert is_manifest(str(path))
    assert path.read_bytes().isascii()
    assert find_images([f"@{path}"]) == whole
    assert set(NAMES) <= {source.name for source in whole.sources}
    for count in (1, 3, 20):
        for index in range(count):
            shard = Shard(index, count)
            assert find_images([f"@{path}"], shard=shard) == find_images([photos], shard=shard)
            assert find_images([f"@{path}"], 5, shard) == find_images([photos], 5, shard)
    assert find_images([f"@{path}"], 3).sources == whole.sources[:3]


def test_lines_of_a_list(photos: Path, fpnx: Callable[..., Any], tmp_path: Path) -> None:
    (photos / "notes.txt").write_text("passed over")
    code, out, error = fpnx("list", photos)
    assert (code, error.strip()) == (0, "fpnx: 6 images, 1 other file passed over: 1 .txt")
    head, *lines = out.splitlines()
    first = (photos / "a.jpg").stat()
    assert json.loads(lines[0]) == ["a.jpg", first.st_size, first.st_mtime_ns]
    body = out.partition("\n")[2].encode()
    assert json.loads(head) == {
        "format": "fpnx-list",
        "format_version": 1,
        "images": 6,
        "sha256": hashlib.sha256(body).hexdigest(),
        "root": str(photos),
        "skipped": 1,
        "skipped_kinds": {".txt": 1},
    }
    assert fpnx("list", tmp_path / "nothing")[0] == 2


def test_a_shard_of_a_list_looks_at_its_own_images_only(photos: Path, fpnx: Callable[..., Any], tmp_path: Path) -> None:
    path = listed(find_images([photos]), tmp_path / "list.txt")
    mine = {source.name for source in find_images([photos], shard=Shard(1, 3)).sources}
    for source in find_images([photos]).sources:
        if source.name not in mine:
            os.unlink(source.path)
    code, _, error = fpnx("extract", f"@{path}", "--shard", "1/3", *LINE)
    assert code == 0, error
    code, _, error = fpnx("extract", f"@{path}", "--shard", "0/3", *LINE)
    assert code == 2
    assert "none of the 2 images is as it was listed" in error
    assert "a.jpg (No such file or directory): bring them back, or list them again" in error


def test_an_image_that_changed_since_it_was_listed_is_a_row_with_a_reason(
    photos: Path, fpnx: Callable[..., Any], tmp_path: Path
) -> None:
    path = listed(find_images([photos]), tmp_path / "list.txt")
    noise_image(7, (90, 60)).save(photos / "a.jpg")
    code, out, _ = fpnx("extract", f"@{path}", "--shard", "0/2", *LINE, "--json")
    result = document(out)
    assert (code, result["done"]) == (1, 2)
    assert result["failed"] == [{"path": "a.jpg", "reason": "changed after it was listed"}]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda lines: lines[:-1], "it has 5 lines, where its first says 6"),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], "its lines do not have the sha256 of its first line"),
        (lambda lines: [*lines, b"photos/more.jpg\n"], "it has 7 lines, where its first says 6"),
        (swapped, "its lines do not have the sha256"),
        (lambda lines: [lines[0][:40] + b"\n", *lines[1:]], "its first line cannot be read"),
        (lambda lines: [lines[0].replace(b'"root"', b'"boot"'), *lines[1:]], "its first line is incomplete"),
        (lambda lines: [lines[0].replace(b"version\":1", b"version\":2"), *lines[1:]], "format version 2, this fpnx"),
    ],
    ids=["truncated", "cut in a line", "appended", "reordered", "half a head", "no root", "future"],
)  # fmt: skip
def test_altered_lists_are_refused(
    photos: Path, tmp_path: Path, alter: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    lines = list(list_lines(find_images([photos])))
    path = tmp_path / "list.txt"
    path.write_bytes(b"".join(alter(lines)))
    for shard in (None, Shard(0, 3)):
        with pytest.raises(FpnxError, match=message) as raised:
            find_images([f"@{path}"], shard=shard)
        assert "\n" not in str(raised.value)
        assert "list" in str(raised.value)


@pytest.mark.parametrize(
    "line",
    [b'["../../etc/passwd",1,2]', b'["/etc/passwd",1,2]', b'["a",1]', b'{"a":1}', b'["a","1",2]', b'["\\ud800",1,2]',
     b'["a\\u0000",1,2]', b'["",1,2]', b"[" * 60_000],
)  # fmt: skip
def test_lines_that_fpnx_list_never_writes(tmp_path: Path, line: bytes) -> None:
    body = line + b"\n"
    head = {"format": "fpnx-list", "format_version": 1, "images": 1, "sha256": hashlib.sha256(body).hexdigest()}
    path = tmp_path / "list.txt"
    text = json.dumps({**head, "root": str(tmp_path), "skipped": 0}, separators=(",", ":"))
    path.write_bytes(text.encode() + b"\n" + body)
    with pytest.raises(FpnxError, match=r"is not as fpnx list wrote it: .* is no image"):
        read_manifest(str(path))


def test_a_list_cannot_be_combined_with_other_images(photos: Path, tmp_path: Path) -> None:
    path = listed(find_images([photos]), tmp_path / "list.txt")
    with pytest.raises(FpnxError, match="stands alone"):
        find_images([f"@{path}", photos / "a.jpg"])


def test_a_plain_list_can_be_cut_too(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("".join(f"{photos / name}\n" for name in ("c.png", "a.jpg", "b.JPG")))
    assert not is_manifest(str(path))
    parts = [find_images([f"@{path}"], shard=Shard(index, 2)) for index in range(2)]
    assert [[source.name for source in part.sources] for part in parts] == [[b"c.png"], [b"a.jpg", b"b.JPG"]]


def test_the_tasks_of_an_array(
    photos: Path, tmp_path: Path, fpnx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = forked("list", photos, cwd=tmp_path)
    listed, _ = made.communicate()
    assert made.returncode == 0
    (tmp_path / "list.txt").write_text(listed)
    for name, value in {"TASK_ID": "2", "TASK_MIN": "1", "TASK_MAX": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    code, _, error = fpnx("extract", "@list.txt", "--shard", "auto/2", *LINE)
    assert code == 0, error
    assert (tmp_path / "out.shard-00001-of-00002.h5").exists()
    monkeypatch.setenv("RANK", "0")
    code, out, error = fpnx("extract", "@list.txt", "--shard", "auto/2", *LINE)
    assert (code, out, error.count("\n")) == (2, "", 1)
