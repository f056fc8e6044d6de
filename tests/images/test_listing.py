"""Lists of images from files, folders and list files: names, order, links and errors."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from fpnx.core.errors import FpnxError, ImageError
from fpnx.images.decoding import decode
from fpnx.images.listing import find_images
from tests.helpers.files import image_source, noise_image
from tests.helpers.process import unprivileged

LIMIT = 10**8


def names(*arguments: object) -> list[bytes]:
    return [found.name for found in find_images([str(argument) for argument in arguments]).sources]


def test_a_folder_is_listed_in_byte_order(photos: Path) -> None:
    (photos / ".hidden.jpg").write_bytes(b"x")
    (photos / ".git").mkdir()
    (photos / ".git" / "x.jpg").write_bytes(b"x")
    (photos / "notes.txt").write_text("no image")
    listing = find_images([photos])
    assert [s.name for s in listing.sources] == [
        b"a.jpg", b"b.JPG", b"below/a.jpg", b"below/e.jpeg", b"c.png", b"d.webp",
    ]  # fmt: skip
    assert listing.root == os.fsencode(photos)
    assert listing.skipped == 1
    assert listing.sources[0].bytes == (photos / "a.jpg").stat().st_size
    assert listing.sources[0].mtime_ns == (photos / "a.jpg").stat().st_mtime_ns


def test_roots(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(photos / "a.jpg") == [b"a.jpg"]
    assert names(photos / "below", photos / "a.jpg") == [b"a.jpg", b"below/a.jpg", b"below/e.jpeg"]
    assert names(photos / "c.png", photos / "a.jpg") == [b"a.jpg", b"c.png"]
    monkeypatch.chdir(photos)
    assert names("below") == [b"a.jpg", b"e.jpeg"]
    assert names(".") == names(photos)


def test_a_named_file_needs_no_known_extension(photos: Path) -> None:
    odd = photos / "picture.dat"
    noise_image(0, (10, 10)).save(odd, format="PNG")
    assert names(odd) == [b"picture.dat"]
    assert decode(image_source(odd), LIMIT).size == (10, 10)


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"], ids=["lines", "windows", "nul"])
def test_a_list_keeps_its_order(photos: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    monkeypatch.chdir(photos)
    Path("list.txt").write_bytes(separator.join(["d.webp", "below/e.jpeg", "a.jpg", ""]).encode())
    assert names("@list.txt") == [b"d.webp", b"below/e.jpeg", b"a.jpg"]


def test_names_of_any_bytes(photos: Path) -> None:
    odd = [
        b"sp ace.jpg",
        b"new\nline.jpg",
        b"quo\"te's.jpg",
        b"bad\xff\xfe.jpg",
        "caf\u00e9.jpg".encode(),
        b"[red].jpg",
    ]
    odd += [b"cafe\xcc\x81.jpg", b"-o.jpg"]
    for name in odd:
        (photos / os.fsdecode(name)).write_bytes((photos / "a.jpg").read_bytes())
    listed = [s.name for s in find_images([photos]).sources]
    assert set(odd) <= set(listed)
    assert listed == sorted(listed)


def test_loops_of_links_end_and_real_folders_come_first(photos: Path) -> None:
    (photos / "aaa").symlink_to(photos / "below")
    (photos / "loop").symlink_to(photos)
    (photos / "dangling.jpg").symlink_to(photos / "nothing")
    (photos / "self.jpg").symlink_to(photos / "self.jpg")
    (photos / "folder.jpg").mkdir()
    (photos / "linked.jpg").symlink_to(photos / "a.jpg")
    outside = photos.parent / "outside"
    outside.mkdir()
    noise_image(0, (8, 8)).save(outside / "o.png")
    (photos / "out").symlink_to(outside)
    listing = find_images([photos])
    listed = [s.name for s in listing.sources]
    assert b"below/a.jpg" in listed
    assert b"linked.jpg" in listed
    assert b"out/o.png" in listed
    assert not any(name.startswith((b"aaa/", b"loop/")) for name in listed)
    assert listing.skipped == 0
    for name in (b"dangling.jpg", b"self.jpg"):
        broken = next(each for each in listing.sources if each.name == name)
        with pytest.raises(ImageError, match=r"^broken link$"):
            decode(broken, LIMIT)


def test_unreadable_folders_are_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # outside of tmp_path, which only its owner may enter
        photos, closed = Path(name), Path(name, "below", "closed")
        closed.mkdir(parents=True)
        for folder in (photos, closed):
            noise_image(0, (8, 8)).save(folder / "a.png")
        closed.chmod(0)
        photos.chmod(0o755)
        try:
            with unprivileged(), pytest.raises(FpnxError, match=r"folder .*/below/closed: Permission denied: make it"):
                find_images([photos])
        finally:
            closed.chmod(0o755)


def test_an_image_is_refused_as_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noise_image(0, (40, 40)).save(tmp_path / "a.jpg")
    with pytest.raises(FpnxError, match=r"list a\.jpg is an image or an archive, not a text"):
        find_images(["@a.jpg"])


def test_a_fifo_does_not_block(photos: Path) -> None:
    os.mkfifo(photos / "pipe.jpg")
    assert b"pipe.jpg" not in names(photos)
    with pytest.raises(ImageError, match="not a regular file"):
        decode(image_source(photos / "pipe.jpg"), LIMIT)


@pytest.mark.parametrize("missing", ["nowhere.jpg", "@nowhere.txt", "no/such/folder"])
def test_missing_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FpnxError, match="No such file"):
        find_images([missing])


def test_no_images_and_duplicates(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("x")
    with pytest.raises(FpnxError, match=r"no images in .*\(1 other files\)"):
        find_images([tmp_path / "empty"])
    with pytest.raises(FpnxError, match="given twice"):
        find_images([photos, photos / "a.jpg"])
    with pytest.raises(FpnxError, match="given twice"):
        find_images([photos, photos])
    with pytest.raises(FpnxError, match="no images given"):
        find_images([])
