"""Finding files, and turning them into upright RGB."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpnx.core.errors import FpnxError, ImageError
from fpnx.images.decoding import decode, pillow_limits, to_rgb, upright_size
from fpnx.images.listing import find_images
from fpnx.images.reading import ImageSource
from tests.helpers.files import noise_image
from tests.helpers.process import unprivileged

LIMIT = 10**8


def source(path: Path) -> ImageSource:
    about = path.stat()
    return ImageSource(path.name.encode(), os.fsencode(path), about.st_size, about.st_mtime_ns)


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


def test_a_named_file_is_always_tried(photos: Path) -> None:
    odd = photos / "picture.dat"
    noise_image(0, (10, 10)).save(odd, format="PNG")
    assert names(odd) == [b"picture.dat"]
    assert decode(source(odd), LIMIT).size == (10, 10)


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


def test_links_end_and_real_folders_win(photos: Path) -> None:
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


def test_a_folder_that_cannot_be_read_is_named() -> None:
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


def test_a_damaged_file_is_not_called_foreign(tmp_path: Path) -> None:
    for name in ("a.tif", "a.avif"):
        path = tmp_path / name
        noise_image(0, (40, 40)).save(path)
        path.write_bytes(path.read_bytes()[:30])
        with (
            pillow_limits(),
            pytest.raises(ImageError, match=f"^a damaged {'TIFF' if name == 'a.tif' else 'AVIF'} file$"),
        ):
            decode(source(path), LIMIT)


def test_an_image_is_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noise_image(0, (40, 40)).save(tmp_path / "a.jpg")
    with pytest.raises(FpnxError, match=r"list a\.jpg is an image or an archive, not a text"):
        find_images(["@a.jpg"])


def test_a_fifo_does_not_block(photos: Path) -> None:
    os.mkfifo(photos / "pipe.jpg")
    assert b"pipe.jpg" not in names(photos)
    with pytest.raises(ImageError, match="not a regular file"):
        decode(source(photos / "pipe.jpg"), LIMIT)


@pytest.mark.parametrize("missing", ["nowhere.jpg", "@nowhere.txt", "no/such/folder"])
def test_missing_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FpnxError, match="No such file"):
        find_images([missing])


def test_what_gives_no_images(tmp_path: Path, photos: Path) -> None:
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    noise_image(3, (20, 12)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    picture = decode(source(path), LIMIT)
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert upright_size(source(path), LIMIT) == (picture.height, picture.width)
    assert picture.size == ((20, 12) if orientation < 5 else (12, 20))


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(decode(source(tmp_path / name), LIMIT))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    (tmp_path / "grey.pgm").write_bytes(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    assert np.asarray(decode(source(tmp_path / "grey.pgm"), LIMIT))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_floats_are_scaled_or_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "unit.tif")
    assert np.asarray(decode(source(tmp_path / "unit.tif"), LIMIT))[0, :, 2].tolist() == [0, 128, 255]
    for values in (
        np.array([[0.0, 300.0]], np.float32),
        np.array([[np.nan]], np.float32),
        np.array([[70000]], np.int32),
    ):
        Image.fromarray(values).save(tmp_path / "wide.tif")
        with pytest.raises(ImageError, match=r"outside 0\.\.1"):
            decode(source(tmp_path / "wide.tif"), LIMIT)


def test_transparency_shows_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 10, 30, 0], [200, 10, 30, 255], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.asarray(decode(source(tmp_path / "rgba.png"), LIMIT))[0].tolist() == [
        [255, 255, 255], [200, 10, 30], [127, 127, 127],
    ]  # fmt: skip
    la = Image.new("LA", (2, 1))
    la.putpixel((1, 0), (0, 255))
    assert np.asarray(to_rgb(la))[0].tolist() == [[255] * 3, [0] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(decode(source(tmp_path / "palette.png"), LIMIT))[0].tolist() == [[255] * 3, [0, 255, 0]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes(mode: str) -> None:
    picture = noise_image(1, (9, 7)).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(picture.convert("RGB")))


def test_cmyk_jpeg_shows_what_was_painted(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = np.asarray(decode(source(tmp_path / "red.jpg"), LIMIT))[8, 8].tolist()
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("name", ["anim.gif", "anim.webp", "anim.png", "pages.tif"])
def test_the_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert np.asarray(decode(source(tmp_path / name), LIMIT))[5, 5].argmax() == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"just some text", "not an image that fpnx reads"),
    ],
    ids=["empty", "html", "lfs", "svg", "eps", "text"],
)
def test_pretenders(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        decode(source(tmp_path / "x.jpg"), LIMIT)


def test_truncated_and_damaged_files_fail(tmp_path: Path) -> None:
    noise_image(0, (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    noise_image(0, (64, 64)).save(tmp_path / "whole.png")
    data = bytearray((tmp_path / "whole.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "crc.png").write_bytes(bytes(data))
    for name in ("cut.jpg", "crc.png"):
        with pytest.raises(ImageError):
            decode(source(tmp_path / name), LIMIT)


def test_a_limit_on_pixels_that_the_user_sets(tmp_path: Path) -> None:
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    with pillow_limits():
        with pytest.raises(ImageError, match=r"10000×20000 pixels, over the limit of 100000000"):
            upright_size(source(tmp_path / "bomb.png"), LIMIT)
        assert upright_size(source(tmp_path / "bomb.png"), 10**9) == (10000, 20000)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_file_that_changed_after_it_was_listed_fails(photos: Path) -> None:
    listed = source(photos / "a.jpg")
    noise_image(9, (30, 30)).save(photos / "a.jpg")
    with pytest.raises(ImageError, match="changed after it was listed"):
        decode(listed, LIMIT)


def test_broken_exif_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    noise_image(0, (30, 20)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    with pillow_limits():
        assert decode(source(path), LIMIT).size == (30, 20)


def test_the_sample_that_is_stored_turned(samples: Path) -> None:
    with Image.open(samples / "rocket.jpg") as stored:
        assert stored.size == (427, 300)
    assert decode(source(samples / "rocket.jpg"), LIMIT).size == (300, 427)
