"""Decoding to upright 8-bit RGB: orientation, modes, transparency, limits, and damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpnx.core.errors import ImageError
from fpnx.images.decoding import decode, pillow_limits, to_rgb, upright_size
from tests.helpers.files import image_source, noise_image

LIMIT = 10**8


def test_damaged_files_are_reported_as_damaged(tmp_path: Path) -> None:
    for name in ("a.tif", "a.avif"):
        path = tmp_path / name
        noise_image(0, (40, 40)).save(path)
        path.write_bytes(path.read_bytes()[:30])
        with (
            pillow_limits(),
            pytest.raises(ImageError, match=f"^a damaged {'TIFF' if name == 'a.tif' else 'AVIF'} file$"),
        ):
            decode(image_source(path), LIMIT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    noise_image(3, (20, 12)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    picture = decode(image_source(path), LIMIT)
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert upright_size(image_source(path), LIMIT) == (picture.height, picture.width)
    assert picture.size == ((20, 12) if orientation < 5 else (12, 20))


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(decode(image_source(tmp_path / name), LIMIT))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    (tmp_path / "grey.pgm").write_bytes(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    assert np.asarray(decode(image_source(tmp_path / "grey.pgm"), LIMIT))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_float_images_are_scaled_or_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "unit.tif")
    assert np.asarray(decode(image_source(tmp_path / "unit.tif"), LIMIT))[0, :, 2].tolist() == [0, 128, 255]
    for values in (
        np.array([[0.0, 300.0]], np.float32),
        np.array([[np.nan]], np.float32),
        np.array([[70000]], np.int32),
    ):
        Image.fromarray(values).save(tmp_path / "wide.tif")
        with pytest.raises(ImageError, match=r"outside 0\.\.1"):
            decode(image_source(tmp_path / "wide.tif"), LIMIT)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 10, 30, 0], [200, 10, 30, 255], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.asarray(decode(image_source(tmp_path / "rgba.png"), LIMIT))[0].tolist() == [
        [255, 255, 255], [200, 10, 30], [127, 127, 127],
    ]  # fmt: skip
    la = Image.new("LA", (2, 1))
    la.putpixel((1, 0), (0, 255))
    assert np.asarray(to_rgb(la))[0].tolist() == [[255] * 3, [0] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(decode(image_source(tmp_path / "palette.png"), LIMIT))[0].tolist() == [[255] * 3, [0, 255, 0]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes(mode: str) -> None:
    picture = noise_image(1, (9, 7)).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(picture.convert("RGB")))


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = np.asarray(decode(image_source(tmp_path / "red.jpg"), LIMIT))[8, 8].tolist()
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("name", ["anim.gif", "anim.webp", "anim.png", "pages.tif"])
def test_the_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert np.asarray(decode(image_source(tmp_path / name), LIMIT))[5, 5].argmax() == 0


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
def test_files_that_are_no_images(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        decode(image_source(tmp_path / "x.jpg"), LIMIT)


def test_truncated_and_damaged_files_fail(tmp_path: Path) -> None:
    noise_image(0, (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    noise_image(0, (64, 64)).save(tmp_path / "whole.png")
    data = bytearray((tmp_path / "whole.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "crc.png").write_bytes(bytes(data))
    for name in ("cut.jpg", "crc.png"):
        with pytest.raises(ImageError):
            decode(image_source(tmp_path / name), LIMIT)


def test_max_pixels(tmp_path: Path) -> None:
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    with pillow_limits():
        with pytest.raises(ImageError, match=r"10000×20000 pixels, over the limit of 100000000"):
            upright_size(image_source(tmp_path / "bomb.png"), LIMIT)
        assert upright_size(image_source(tmp_path / "bomb.png"), 10**9) == (10000, 20000)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_file_that_changed_after_it_was_listed_fails(photos: Path) -> None:
    listed = image_source(photos / "a.jpg")
    noise_image(9, (30, 30)).save(photos / "a.jpg")
    with pytest.raises(ImageError, match="changed after it was listed"):
        decode(listed, LIMIT)


def test_damaged_exif_data_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    noise_image(0, (30, 20)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    with pillow_limits():
        assert decode(image_source(path), LIMIT).size == (30, 20)


def test_a_rotated_sample_image(samples: Path) -> None:
    with Image.open(samples / "rocket.jpg") as stored:
        assert stored.size == (427, 300)
    assert decode(image_source(samples / "rocket.jpg"), LIMIT).size == (300, 427)
