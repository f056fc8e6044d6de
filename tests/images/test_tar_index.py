"""Plain tar archives: members by name, links, sparse files, and truncated or damaged archives."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fpnx as package
from fpnx.core.errors import FpnxError, ImageError
from fpnx.images.decoding import decode, upright_size
from fpnx.images.listing import find_images, list_lines
from fpnx.images.reading import ImageSource, open_source
from fpnx.images.tar_index import TarIndex, read_tar_index
from fpnx.visualization.image_maps import find_photo
from tests.helpers.files import LINK_SHAPES, found_by_find, linked_folders, noise_image
from tests.helpers.process import document

LIMIT = 10**8
SMALL: dict[str, Any] = {
    "backbone": "mobilenet_v2", "weights": "random", "size": 64, "levels": "P4-P5", "channels": 8, "device": "cpu",
}  # fmt: skip
LINE = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


def jpeg(seed: int = 1, size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    noise_image(seed, size).save(buffer, "JPEG")
    return buffer.getvalue()


def packed(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of members with content."""
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def odd(path: Path, *infos: tarfile.TarInfo, contents: dict[str, bytes] | None = None) -> Path:
    """A tar of members of any type."""
    with tarfile.open(path, "w") as tar:
        for info in infos:
            content = (contents or {}).get(info.name, b"")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def read_index(path: Path) -> TarIndex:
    content = path.read_bytes()
    return read_tar_index(lambda start, count: content[start : start + count], len(content), path.name)


def content_of(source: ImageSource) -> bytes:
    with open_source(source, LIMIT) as file:
        return file.read()


def names(*arguments: object) -> list[bytes]:
    return [source.name for source in find_images([str(argument) for argument in arguments]).sources]


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
def test_members_are_what_tarfile_unpacks(tmp_path: Path, form: int) -> None:
    long = "/".join(["long folder name"] * 8) + "/a.jpg"  # beyond 100 bytes; within what ustar can split
    members = [("b/01.jpg", jpeg(1)), ("a/01.jpg", jpeg(2)), ("a/01.png", jpeg(3)), (long, jpeg(4)), ("é.jpg", jpeg(5))]
    members += [("note.txt", b"text"), ("caf\udce9.jpg", jpeg(6))]
    path = packed(tmp_path / "x.tar", members, form)
    listing = find_images([path])
    images = sorted((os.fsencode(name), content) for name, content in members if not name.endswith("txt"))
    assert [(source.name, content_of(source)) for source in listing.sources] == images
    assert listing.root == os.fsencode(path)
    assert (listing.skipped, listing.remarks, listing.truncated) == ({".txt": 1}, (), ())
    assert all(source.path == os.fsencode(path) + b"/" + source.name for source in listing.sources)
    assert {source.mtime_ns for source in listing.sources} == {path.stat().st_mtime_ns}
    assert listing.sources[0].bytes == len(images[0][1])


def test_very_long_names(tmp_path: Path) -> None:
    name = "/".join(["x" * 200] * 15) + "/a.jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert names(packed(tmp_path / "x.tar", [(name, jpeg())], form)) == [name.encode()]


def test_an_archive_made_by_tar_itself(tmp_path: Path, photos: Path) -> None:
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", photos, "."], check=True)
    listing = find_images([tmp_path / "x.tar"])
    assert [source.name for source in listing.sources] == names(photos)
    for source, original in zip(listing.sources, find_images([photos]).sources, strict=True):
        assert np.array_equal(np.asarray(decode(source, LIMIT)), np.asarray(decode(original, LIMIT)))
        assert upright_size(source, LIMIT) == upright_size(original, LIMIT)


def test_roots_with_other_inputs(tmp_path: Path, photos: Path) -> None:
    first, second = packed(tmp_path / "a.tar", [("x.jpg", jpeg())]), packed(tmp_path / "b.TAR", [("x.jpg", jpeg())])
    assert names(first) == [b"x.jpg"]
    assert names(second, first) == [b"a.tar/x.jpg", b"b.TAR/x.jpg"]
    assert names(photos / "a.jpg", first) == [b"a.tar/x.jpg", b"photos/a.jpg"]
    with pytest.raises(FpnxError, match="given twice"):
        find_images([first, first])


def test_named_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(tmp_path / "x.tar", [("d/a.jpg", jpeg(1)), ("d/picture.dat", jpeg(2))])
    assert names(tmp_path / "x.tar" / "d" / "picture.dat") == [b"picture.dat"]
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("x.tar/d/picture.dat\nx.tar/d/a.jpg\n")
    listing = find_images(["@list.txt"])
    assert [source.name for source in listing.sources] == [b"picture.dat", b"a.jpg"]
    assert content_of(listing.sources[0]) == jpeg(2)
    Path("list.txt").write_text("x.tar\n")
    assert names("@list.txt") == [b"d/a.jpg"]
    with pytest.raises(FpnxError, match=r"x.tar has no member d/b.jpg"):
        find_images([tmp_path / "x.tar" / "d" / "b.jpg"])
    known_by_path = ImageSource(
        b"a.jpg", os.fsencode(tmp_path / "x.tar/d/a.jpg"), len(jpeg(1)), listing.sources[1].mtime_ns
    )
    assert content_of(known_by_path) == jpeg(1)


def test_archives_in_folders_are_other_files(tmp_path: Path) -> None:
    packed(tmp_path / "x.tar", [("a.jpg", jpeg())])
    noise_image(0, (9, 9)).save(tmp_path / "b.png")
    (tmp_path / "folder.tar").mkdir()
    noise_image(0, (9, 9)).save(tmp_path / "folder.tar" / "c.png")
    listing = find_images([tmp_path])
    assert [source.name for source in listing.sources] == [b"b.png", b"folder.tar/c.png"]
    assert listing.skipped == {".tar": 1}
    assert names(tmp_path / "folder.tar") == [b"c.png"]


def test_the_last_of_repeated_names_counts(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2)), ("./a.jpg", jpeg(3))])
    listing = find_images([path])
    assert [content_of(source) for source in listing.sources] == [jpeg(3), jpeg(2)]
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out" / "a.jpg").read_bytes() == jpeg(3)
    assert listing.remarks == (f"{path}: 1 members are replaced by later ones of the same name, as in tar",)


def test_links_stand_for_their_targets(tmp_path: Path) -> None:
    path = odd(
        tmp_path / "x.tar",
        member("d/a.dat"),
        member("hard.jpg", tarfile.LNKTYPE, "d/a.dat"),
        member("d/soft.jpg", tarfile.SYMTYPE, "a.dat"),
        member("e/up.jpg", tarfile.SYMTYPE, "../d/soft.jpg"),
        member("early.jpg", tarfile.LNKTYPE, "later.jpg"),
        member("later.jpg"),
        member("out.jpg", tarfile.SYMTYPE, "../../etc/passwd"),
        member("absolute.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        member("nowhere.jpg", tarfile.SYMTYPE, "nothing"),
        member("round.jpg", tarfile.SYMTYPE, "about.jpg"),
        member("about.jpg", tarfile.SYMTYPE, "round.jpg"),
        contents={"d/a.dat": jpeg(1), "later.jpg": jpeg(2)},
    )
    listing = find_images([path])
    found = {source.name: content_of(source) for source in listing.sources}
    first = jpeg(1)
    assert found == {b"hard.jpg": first, b"d/soft.jpg": first, b"e/up.jpg": first, b"later.jpg": jpeg(2)}
    assert listing.skipped == {"broken links": 6, ".dat": 1}


@pytest.mark.parametrize("shape", LINK_SHAPES)
def test_links_to_folders_are_followed_as_in_the_unpacked_archive(tmp_path: Path, shape: str) -> None:
    linked_folders(tmp_path / "tree", shape)
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", tmp_path / "tree", "."], check=True)
    # Links that are broken or absolute lead nowhere in an archive.
    nowhere = {"broken": (b"sets/gone.png",), "absolute": (b"sets/one/val/", b"sets/one/deep/")}.get(shape, ())
    expected = [name for name in found_by_find(tmp_path / "tree") if not name.startswith(nowhere)]
    assert names(tmp_path / "x.tar") == expected


def test_links_to_folders_in_an_archive_end(tmp_path: Path) -> None:
    path = odd(
        tmp_path / "x.tar",
        member("d/a.jpg"),
        member("d/loop", tarfile.SYMTYPE, "../e"),
        member("e/back", tarfile.SYMTYPE, "../d"),
        member("root", tarfile.SYMTYPE, "."),
        member("out", tarfile.SYMTYPE, "../d"),
        member("empty", tarfile.DIRTYPE),
        member("d/none", tarfile.SYMTYPE, "../empty"),
        contents={"d/a.jpg": jpeg(1)},
    )
    listing = find_images([path])
    assert [source.name for source in listing.sources] == [b"d/a.jpg", b"e/back/a.jpg"]
    assert all(content_of(source) == jpeg(1) for source in listing.sources)
    assert listing.skipped == {"broken links": 1}
    assert listing.remarks == (f"{path}: 3 folders not entered, since links lead back to a folder that they are in",)
    assert names(path / "e" / "back" / "a.jpg") == [b"a.jpg"]
    links = [member(f"{n}/{link}", tarfile.SYMTYPE, f"../{n + 1}") for n in range(40) for link in "ab"]
    path = odd(tmp_path / "many.tar", *links, member("40/a.jpg"), contents={"40/a.jpg": jpeg(1)})
    with pytest.raises(FpnxError, match=r"many.tar: links to folders in it give over 1000000 paths: unpack it"):
        find_images([path])


def test_names_outside_of_the_archive_and_special_files(tmp_path: Path) -> None:
    path = odd(
        tmp_path / "x.tar",
        member("/etc/a.jpg"),
        member("../b.jpg"),
        member("c/../../d.jpg"),
        member(".hidden/e.jpg"),
        member("._f.jpg"),
        member("pipe.jpg", tarfile.FIFOTYPE),
        member("device.jpg", tarfile.CHRTYPE),
        member("folder.jpg", tarfile.DIRTYPE),
        contents={"/etc/a.jpg": jpeg()},
    )
    listing = find_images([path])
    assert [source.name for source in listing.sources] == [b"etc/a.jpg"]
    assert listing.skipped == {"not regular files": 2, "outside of it": 2}
    assert listing.remarks == (f"{path}: 2 members are left out, because of .. in their names",)


def test_a_sparse_member(tmp_path: Path) -> None:
    content = bytearray(1 << 20)
    head = io.BytesIO()
    noise_image(1, (500, 400)).save(head, "BMP")
    content[: len(head.getvalue())] = head.getvalue()
    content[200_000:500_000] = bytes(300_000)  # a hole in the picture
    (tmp_path / "sparse.bmp").write_bytes(content)
    with open(tmp_path / "sparse.bmp", "r+b") as file:
        file.truncate(0)
        file.truncate(len(content))
        for start in range(0, len(content), 4096):
            if any(content[start : start + 4096]):
                file.seek(start)
                file.write(content[start : start + 4096])
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", path, "-C", tmp_path, "sparse.bmp"], check=True)
        index = read_index(path)
        if index.members[b"sparse.bmp"].segments is None:
            pytest.skip("this file system keeps no holes")
        source = find_images([path]).sources[0]
        assert source.bytes == len(content)
        assert content_of(source) == content
        assert decode(source, LIMIT).size == (500, 400)


@pytest.mark.parametrize("cut", [100, 700, 1024, 1500], ids=str)
def test_complete_members_of_a_truncated_archive(tmp_path: Path, cut: int) -> None:
    whole = packed(tmp_path / "whole.tar", [("a.jpg", b"a" * 512), ("b.jpg", b"b" * 700), ("c.jpg", b"c" * 512)])
    content = whole.read_bytes()
    third = content.index(b"c.jpg")
    (tmp_path / "x.tar").write_bytes(content[: third - 1536 + cut])  # from within b's header to the end of its padding
    listing = find_images([tmp_path / "x.tar"])
    found = {source.name: source for source in listing.sources}
    assert content_of(found.pop(b"a.jpg")) == b"a" * 512
    assert len(listing.truncated) == 1
    assert "ends early" in listing.truncated[0]
    if cut < 512:
        assert not found
    elif cut < 512 + 700:
        with pytest.raises(ImageError, match=rf"its archive ends {1212 - cut} bytes early"):
            content_of(found[b"b.jpg"])
    else:
        assert content_of(found[b"b.jpg"]) == b"b" * 700


def test_extract_from_a_truncated_archive(tmp_path: Path, fpnx: Callable[..., Any]) -> None:
    members = [(f"{i}.jpg", jpeg(i)) for i in range(4)]
    whole = packed(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(b"2.jpg") + 900])
    code, out, err = fpnx("extract", "x.tar", "-o", "x.h5", "--json", *LINE)
    result = document(out)
    assert (code, result["images"], result["done"]) == (1, 3, 2)
    assert [failed["path"] for failed in result["failed"]] == ["2.jpg"]
    assert "its archive ends" in result["failed"][0]["reason"]
    assert "ends early" in result["lost"][0]
    assert "ends early" in err
    assert fpnx("extract", "x.tar", "-o", "x.h5", "--resume", *LINE)[0] == 1
    assert fpnx("extract", "x.tar", "-o", "x.h5", "--resume", "--max-failed", 1, *LINE)[0] == 1
    assert fpnx("extract", "x.tar", "-o", "x.h5", "--resume", "--max-failed", 2, *LINE)[0] == 0
    (tmp_path / "z.tar").write_bytes(whole[: whole.index(b"2.jpg")])  # every member that is there is whole
    code, out, _ = fpnx("extract", "z.tar", "-o", "z.h5", *LINE)
    assert code == 1
    assert "ends early" in out


def test_damaged_headers_are_reported(tmp_path: Path) -> None:
    content = bytearray(packed(tmp_path / "x.tar", [(f"{i}.jpg", b"x" * 600) for i in range(3)]).read_bytes())
    content[content.index(b"1.jpg")] ^= 0xFF  # the header's checksum
    (tmp_path / "x.tar").write_bytes(content)
    index = read_index(tmp_path / "x.tar")
    assert list(index.members) == [b"0.jpg"]
    assert index.truncated == "its header at byte 1536 is damaged: what comes after is lost"


def test_joined_archives_are_reported(tmp_path: Path) -> None:
    one = packed(tmp_path / "a.tar", [("a.jpg", jpeg())]).read_bytes()
    (tmp_path / "x.tar").write_bytes(one + packed(tmp_path / "b.tar", [("b.jpg", jpeg())]).read_bytes())
    index = read_index(tmp_path / "x.tar")
    assert list(index.members) == [b"a.jpg"]
    assert "two archives joined" in index.truncated
    assert read_index(tmp_path / "a.tar").truncated == ""


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.tar", b"", "is not a tar archive"),
        ("x.tar", b"no archive at all" * 100, "is not a tar archive"),
        ("x.tar", b"\x1f\x8b\x08 gzip", "compressed with gzip: unpack it with gunzip"),
        ("x.tar", b"PK\x03\x04 zip", "compressed with zip"),
        ("x.tar.gz", b"\x1f\x8b", "only plain .tar archives"),
        ("x.TGZ", b"\x1f\x8b", "only plain .tar archives"),
        ("x.zip", b"PK", "only plain .tar archives"),
    ],
)
def test_files_that_are_no_plain_archive(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FpnxError, match=reason):
        find_images([tmp_path / name])


def test_an_archive_without_images(tmp_path: Path) -> None:
    packed(tmp_path / "x.tar", [("a.txt", b"text")])
    with pytest.raises(FpnxError, match=r"no images in .*x.tar \(1 other file passed over: 1 .txt\)"):
        find_images([tmp_path / "x.tar"])
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(FpnxError, match=r"pipe.tar: not a regular file"):
        find_images([tmp_path / "pipe.tar"])


def test_invalid_sizes_in_headers(tmp_path: Path) -> None:
    good = packed(tmp_path / "x.tar", [("a.jpg", b"x" * 512)]).read_bytes()[:1024]
    huge = member("pax", tarfile.XHDTYPE).tobuf()
    huge = bytearray(huge)
    huge[124:136] = b"77777777777\0"  # 8 GB of header
    negative = bytearray(member("b.jpg").tobuf())
    negative[124:136] = b"\xff" * 11 + b"\x00"  # sizes below 0, in base 256
    far = bytearray(negative)
    far[124:136] = b"\xff" * 10 + b"\xf0\x00"
    for header in (huge, negative, far):
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)  # the checksum
        (tmp_path / "y.tar").write_bytes(good + bytes(header) + bytes(2048))
        index = read_index(tmp_path / "y.tar")
        assert list(index.members) == [b"a.jpg"]
        assert "damaged" in index.truncated


def test_images_of_a_changed_archive_fail(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])
    listing = find_images([path])
    packed(path, [("a.jpg", jpeg(3)), ("b.jpg", jpeg(4))])
    with pytest.raises(ImageError, match="changed after it was listed"):
        content_of(listing.sources[0])
    path.unlink()
    with pytest.raises(ImageError, match="No such file"):
        decode(listing.sources[0], LIMIT)


def test_an_archive_is_read_by_several_threads(tmp_path: Path) -> None:
    contents = [jpeg(i, (60 + i, 40)) for i in range(24)]
    listing = find_images([packed(tmp_path / "x.tar", [(f"{i:02}.jpg", c) for i, c in enumerate(contents)])])
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(content_of, listing.sources * 4)) == contents * 4


def test_features_from_an_archive_are_those_of_the_files(tmp_path: Path, photos: Path) -> None:
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", photos, "."], check=True)
    package.extract(photos, tmp_path / "files.h5", **SMALL)
    result = package.extract(tmp_path / "x.tar", tmp_path / "archive.h5", **SMALL)
    assert (result.done, result.exit_code, result.lost) == (6, 0, ())
    with package.open(tmp_path / "files.h5") as files, package.open(tmp_path / "archive.h5") as archive:
        assert archive.paths == files.paths
        assert archive.root == str(tmp_path / "x.tar")
        assert archive.bytes.tolist() == files.bytes.tolist()
        assert files.digests.any(axis=1).all()
        assert archive.digests.tolist() == files.digests.tolist()
        for path in files.paths:
            assert np.abs(archive[path]["P4"] - files[path]["P4"]).max() < 1e-5
    assert package.verify(tmp_path / "archive.h5", against=tmp_path / "x.tar", device="cpu").problems == ()


def test_a_list_of_members(tmp_path: Path, fpnx: Callable[..., Any]) -> None:
    path = packed(tmp_path / "x.tar", [(f"{i}.jpg", jpeg(i)) for i in range(4)])
    listing = find_images([path])
    (tmp_path / "list.txt").write_bytes(b"".join(list_lines(listing)))
    assert find_images([f"@{tmp_path / 'list.txt'}"]).root == listing.root
    for index in (0, 1):
        assert fpnx("extract", "@list.txt", "--shard", f"{index}/2", *LINE)[0] == 0
    with package.open("out.shard-*.h5") as store:
        assert store.paths == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
        assert store.bytes.tolist() == [len(jpeg(i)) for i in range(4)]
    os.utime(path, ns=(0, listing.sources[0].mtime_ns + 1))
    with pytest.raises(ImageError, match="changed after it was listed"):
        decode(find_images([f"@{tmp_path / 'list.txt'}"]).sources[0], LIMIT)
    path.write_bytes(path.read_bytes()[:1000])
    code, _, err = fpnx("list", path)
    assert code == 1
    assert "ends early" in err


def test_resume_detects_a_changed_archive(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])
    package.extract(path, tmp_path / "out.h5", **SMALL)
    assert package.extract(path, tmp_path / "out.h5", resume=True, **SMALL).computed == 0
    packed(path, [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])  # the same bytes
    assert package.extract(path, tmp_path / "out.h5", resume=True, **SMALL).computed == 0
    packed(path, [("a.jpg", jpeg(1)), ("b.jpg", jpeg(3))])
    with pytest.raises(FpnxError, match="1 changed"):
        package.extract(path, tmp_path / "out.h5", resume=True, **SMALL)


def test_sizes_from_headers_in_an_archive(tmp_path: Path, photos: Path) -> None:
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", photos, "."], check=True)
    result = package.extract(tmp_path / "x.tar", tmp_path / "out.h5", **{**SMALL, "size": "native"})
    assert result.done == 6
    with package.open(tmp_path / "out.h5") as store:
        assert store["a.jpg"].source_size == (64, 96)
        photo = find_photo(store["a.jpg"])
        assert photo.note == ""
        assert photo.picture is not None
        assert photo.picture.size == (96, 64)
