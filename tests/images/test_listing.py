"""Lists of images from files, folders and list files: names, order, links and errors."""

from __future__ import annotations

import codecs
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fpnx.core.errors import FpnxError, ImageError
from fpnx.images.decoding import decode
from fpnx.images.listing import find_images, list_lines, refuse_missing
from tests.helpers.files import LINK_SHAPES, archive, found_by_find, image_source, linked_folders, noise_image
from tests.helpers.process import document, unprivileged

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
    assert listing.skipped == {".txt": 1}
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


ENCODINGS = {
    "utf-8 with BOM": (codecs.BOM_UTF8, "utf-8"),
    "utf-16": (codecs.BOM_UTF16_LE, "utf-16-le"),
    "utf-16 big-endian": (codecs.BOM_UTF16_BE, "utf-16-be"),
    "utf-16 without BOM": (b"", "utf-16-le"),
    "utf-16 big-endian without BOM": (b"", "utf-16-be"),
    "utf-32": (codecs.BOM_UTF32_LE, "utf-32-le"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_in_the_encodings_of_windows(photos: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    bom, codec = ENCODINGS[encoding]
    monkeypatch.chdir(photos)
    Path("\u732b").mkdir()
    noise_image(0, (9, 9)).save("\u732b/caf\u00e9.png")
    expected = find_images([photos])
    lines = ["d.webp", "below/e.jpeg", "\u732b/caf\u00e9.png"]
    Path("list.txt").write_bytes(bom + "".join(f"{line}\r\n" for line in lines).encode(codec))
    assert [name.decode() for name in names("@list.txt")] == lines
    Path("made.txt").write_bytes(bom + b"".join(list_lines(expected)).decode().replace("\n", "\r\n").encode(codec))
    assert find_images(["@made.txt"]) == expected
    read_end, write_end = os.pipe()  # as from <(...) of a shell
    os.write(write_end, Path("list.txt").read_bytes())
    os.close(write_end)
    assert [name.decode() for name in names(f"@/dev/fd/{read_end}")] == lines
    os.close(read_end)


def test_lists_in_unknown_encodings_are_refused_with_the_reason(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    Path("list.txt").write_bytes(codecs.BOM_UTF16_LE + b"a")
    with pytest.raises(FpnxError, match=r"list list\.txt begins as a text in UTF-16, but is none: save it as UTF-8"):
        find_images(["@list.txt"])
    Path("list.txt").write_bytes("caf\u00e9.jpg\n".encode("latin-1"))
    with pytest.raises(FpnxError, match=r"caf\\udce9\.jpg: No such file or directory; .*, in UTF-8$"):
        find_images(["@list.txt"])
    Path("list.txt").write_bytes(b"a.jpg\0c.png\0")
    assert names("@list.txt") == [b"a.jpg", b"c.png"]


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("given", "stored"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)], ids=["NFC", "NFD"])
def test_a_path_that_differs_in_normalisation_is_found(
    photos: Path, monkeypatch: pytest.MonkeyPatch, given: str, stored: str
) -> None:
    monkeypatch.chdir(photos)
    Path(stored).mkdir()
    noise_image(0, (9, 9)).save(f"{stored}/{stored}.png")
    (photos / "x.tar").write_bytes(archive({f"{stored}.png": Path(f"{stored}/{stored}.png").read_bytes()}))
    name, path = f"{stored}.png".encode(), os.fsencode(photos / stored / f"{stored}.png")
    for images in (given, f"{given}/{given}.png", photos / given):
        listing = find_images([images])
        assert [(source.name, source.path) for source in listing.sources] == [(name, path)]
        refuse_missing([images])
    Path(f"{stored}.txt").write_text(f"{given}/{given}.png\nx.tar/{given}.png\n")
    listing = find_images([f"@{given}.txt"])
    assert [source.path for source in listing.sources] == [path, os.fsencode(photos / "x.tar" / f"{stored}.png")]
    assert [decode(source, LIMIT).size for source in listing.sources] == [(9, 9), (9, 9)]
    noise_image(1, (8, 8)).save(f"{stored}/{given}.png")  # both are there: each is found by its own name
    assert names(f"{stored}/{given}.png") == [f"{given}.png".encode()]
    with pytest.raises(FpnxError, match="No such file"):
        find_images([f"{given}/caf\u00e8.png"])


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


@pytest.mark.parametrize("shape", LINK_SHAPES)
def test_links_are_followed_as_by_find(tmp_path: Path, shape: str) -> None:
    sets = linked_folders(tmp_path, shape)
    assert names(sets) == found_by_find(sets)
    assert names(tmp_path) == found_by_find(tmp_path)


def test_two_links_to_one_folder_and_a_loop_are_named(tmp_path: Path) -> None:
    sets = linked_folders(tmp_path, "two links to one folder")
    listing = find_images([sets])
    assert [source.name for source in listing.sources] == [
        b"a.png", b"one/a.png", b"one/val/a.png", b"one/val/deep/a.png",
        b"two/a.png", b"two/val/a.png", b"two/val/deep/a.png",
    ]  # fmt: skip
    assert listing.remarks == ()
    (sets / "one" / "loop").symlink_to("..")
    assert find_images([sets]).sources == listing.sources
    assert find_images([sets]).remarks == (
        f"{sets}: 1 folder not entered, since links lead back to a folder that they are in: {sets}/one/loop",
    )


def test_links_that_give_too_many_paths_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "many"  # 20 folders, each with two links to the next: a million paths to the last
    for number in range(20):
        (folder / str(number)).mkdir(parents=True)
        for link in ("a", "b"):
            (folder / str(number) / link).symlink_to(f"../{number + 1}")
    (folder / "20").mkdir()
    with pytest.raises(FpnxError, match=r"folder .*/many/20 is reached in more than 10000 ways"):
        find_images([folder / "0"])


def test_links_that_cannot_be_followed_are_images_that_fail(photos: Path) -> None:
    (photos / "dangling.jpg").symlink_to(photos / "nothing")
    (photos / "self.jpg").symlink_to(photos / "self.jpg")
    (photos / "folder.jpg").mkdir()
    listing = find_images([photos])
    assert listing.skipped == {}
    for name in (b"dangling.jpg", b"self.jpg"):
        broken = next(each for each in listing.sources if each.name == name)
        with pytest.raises(ImageError, match=r"^broken link$"):
            decode(broken, LIMIT)


def test_other_files_are_counted_by_kind(photos: Path, fpnx: Callable[..., Any]) -> None:
    others = "1.MOV below/2.mov 3.mov notes.txt Makefile x.jpeg_original_of_2019 v.mp4 r.nef"
    for name in others.split():
        (photos / name).write_bytes(b"x")
    os.mkfifo(photos / "pipe.jpg")
    kinds = {
        ".mov": 3, ".mp4": 1, ".nef": 1, ".txt": 1, "not regular files": 1, "with other extensions": 1,
        "without extension": 1,
    }  # fmt: skip
    assert find_images([photos]).skipped == kinds
    text = "9 other files passed over: 3 .mov, 1 .mp4, 1 .nef, 1 .txt, 1 not regular files, 2 more"
    code, out, error = fpnx("list", photos)
    assert (code, error.strip()) == (0, f"fpnx: 6 images, {text}")
    Path("list.txt").write_text(out)
    for images in (photos, "@list.txt"):
        options = ("--backbone", "mobilenet_v2", "--weights", "random", "--size", "64", "--dry-run")
        code, out, _ = fpnx("extract", images, *options)
        assert code == 0
        assert text in " ".join(out.split())
        code, out, _ = fpnx("extract", images, *options, "--json")
        assert (document(out)["skipped"], document(out)["skipped_kinds"]) == (9, kinds)


def test_many_kinds_of_other_files_are_counted_together(photos: Path) -> None:
    for number in range(100):
        (photos / f"scan.{number:03}").write_bytes(b"x")
    listing = find_images([photos])
    assert len(listing.skipped) == 21
    assert sum(listing.skipped.values()) == 100
    assert listing.skipped["with other extensions"] == 80


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "path,label\na.jpg,1\n",
            "path,label: No such file or directory",
        ),
        ('"a.jpg"\n', '"a.jpg": No such file or directory'),
        ("a.jpg\nbelow\n", "below: it is a folder, not an image"),
    ],
    ids=["table", "quotes", "folder"],
)
def test_lists_of_other_things_are_refused(
    photos: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    monkeypatch.chdir(photos)
    Path("list.txt").write_text(content)
    text = f"in list.txt: {photos}/{reason}; a list has the path of an image on each line, and nothing else"
    with pytest.raises(FpnxError, match=f"^{re.escape(text)}$"):
        find_images(["@list.txt"])
    with pytest.raises(FpnxError, match="list below is a folder: name it without @"):
        find_images(["@below"])
    with pytest.raises(FpnxError, match="@ without a name"):
        find_images(["@"])


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
    with pytest.raises(FpnxError, match=r"no images in .*\(1 other file passed over: 1 \.txt\)"):
        find_images([tmp_path / "empty"])
    with pytest.raises(FpnxError, match="given twice"):
        find_images([photos, photos / "a.jpg"])
    with pytest.raises(FpnxError, match="given twice"):
        find_images([photos, photos])
    with pytest.raises(FpnxError, match="no images given"):
        find_images([])
