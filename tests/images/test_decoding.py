"""Decoding to upright 8-bit RGB: orientation, modes, transparency, limits, and damaged files."""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from fpnx.core.errors import ImageError
from fpnx.core.pixel_options import PixelOptions
from fpnx.images.decoding import decode, pillow_limits, to_rgb, upright_size
from tests.helpers.files import image_source, noise_image
from tests.helpers.hand_made import png

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


@pytest.mark.parametrize(
    "name", ["turned.png", "turned.jpg", "turned.tif", "turned.webp", "turned.avif", "turned.heic"]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / name
    stored = noise_image(3, (20, 12))
    if name.endswith("heic"):
        pytest.importorskip("pillow_heif").from_pillow(stored).save(path, exif=exif.tobytes(), quality=100, chroma=444)
        stored.getexif()[0x0112] = orientation
        expected = ImageOps.exif_transpose(stored)
    else:
        stored.save(path, exif=exif)
        with Image.open(path) as image:
            expected = ImageOps.exif_transpose(image)
    picture = decode(image_source(path), LIMIT)
    difference = np.abs(np.asarray(picture, np.int16) - np.asarray(expected, np.int16))
    assert difference.max() <= (8 if name.endswith("heic") else 0)
    assert upright_size(image_source(path), LIMIT) == (picture.height, picture.width)
    assert picture.size == ((20, 12) if orientation < 5 else (12, 20))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.heic", "bands.tif", "long.jpg"])
def test_the_digest_is_that_of_all_bytes_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "bands.tif":  # which Pillow does not read
        pytest.importorskip("tifffile").imwrite(path, np.zeros((8, 9, 3), np.uint16), photometric="rgb")
    elif name == "a.heic":
        pytest.importorskip("pillow_heif").from_pillow(noise_image(0, (40, 40))).save(path)
    else:
        noise_image(0, (40, 40)).save(path)
    if name == "long.jpg":
        path.write_bytes(path.read_bytes() + bytes(1 << 19))  # behind what is decoded
    found: list[bytes] = []
    decode(image_source(path), LIMIT, digest=found.append)
    assert found == [hashlib.sha256(path.read_bytes()).digest()[:16]]


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


def transparent_grey(bits: int, transparent: int, values: list[int]) -> bytes:
    return png([values], bits, 0, trns=struct.pack(">H", transparent))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_value_of_a_grey_png(tmp_path: Path, bits: int) -> None:
    most = (1 << bits) - 1
    for transparent in {0, most // 2, most}:
        values = sorted({0, most // 2, most})
        (tmp_path / "x.png").write_bytes(transparent_grey(bits, transparent, values))
        notes: list[str] = []
        row = np.asarray(decode(image_source(tmp_path / "x.png"), LIMIT, note=notes.append))[0, :, 0]
        assert row.tolist() == [255 if value == transparent else round(value * 255 / most - 1e-9) for value in values]
        assert notes == ["transparency"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_entries_of_a_palette(tmp_path: Path, bits: int) -> None:
    (tmp_path / "x.png").write_bytes(png([[0, 1]], bits, 3, palette=bytes([255, 0, 0, 0, 255, 0]), trns=b"\x80\xff"))
    assert np.asarray(decode(image_source(tmp_path / "x.png"), LIMIT))[0].tolist() == [[255, 127, 127], [0, 255, 0]]


def test_colour_pngs_of_sixteen_bits(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs")
    path = tmp_path / "x.png"

    def pixels(data: bytes, *options: Any) -> list[list[int]]:
        path.write_bytes(data)
        return np.asarray(decode(image_source(path), LIMIT, PixelOptions(*options)))[0].tolist()

    # One colour is transparent, and not another one with the same high bytes.
    rgb = [[[0x1001, 0x2001, 0x3001], [0x1002, 0x2001, 0x3001]]]
    assert pixels(png(rgb, 16, 2, trns=struct.pack(">3H", 0x1001, 0x2001, 0x3001))) == [[255] * 3, [16, 32, 48]]
    rgb = [[[0, 1500, 3000], [3000, 4000, 0]]]
    assert pixels(png(rgb, 16, 2), None, "0,3000") == [[0, 128, 255], [255, 255, 0]]
    assert pixels(png(rgb, 16, 2), (3, 2, 1), "0,3000") == [[255, 128, 0], [0, 255, 255]]
    grey_alpha = [[[1500, 65535], [3000, 0]]]
    assert pixels(png(grey_alpha, 16, 4), None, "0,3000") == [[128] * 3, [255] * 3]
    assert pixels(png(grey_alpha, 16, 4), (2,)) == [[255] * 3, [0] * 3]
    assert pixels(png([[[0, 1500, 3000, 65535]]], 16, 6), None, "0,3000") == [[0, 128, 255]]


def test_without_imagecodecs_low_bytes_are_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png([[[1, 2, 3]]], 16, 2))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert np.asarray(decode(image_source(path), LIMIT)).tolist() == [[[0, 0, 0]]]
    with pytest.raises(ImageError, match=r"a PNG of colours of 16 bits: install fpnx\[tiff\]"):
        decode(image_source(path), LIMIT, PixelOptions(value_range="0,3"))


def test_a_range_and_bands_of_any_format(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[0, 1000, 4000]], np.uint16)).save(path)
    for value_range, expected in (("0,4000", [0, 64, 255]), ("P0,P100", [0, 64, 255]), ("full", [0, 4, 16])):
        picture = decode(image_source(path), LIMIT, PixelOptions(value_range=value_range))
        assert np.asarray(picture)[0, :, 1].tolist() == expected
    Image.fromarray(np.array([[[10, 20, 30], [15, 30, 255]]], np.uint8)).save(path)
    picture = decode(image_source(path), LIMIT, PixelOptions((3, 2, 1), "0,30"))
    assert np.asarray(picture)[0].tolist() == [[255, 170, 85], [255, 255, 128]]
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    Image.fromarray(rgba).save(path)
    picture = decode(image_source(path), LIMIT, PixelOptions(None, "0,30"))
    assert np.asarray(picture)[0].tolist() == [[85, 170, 255], [255, 255, 255]]
    picture = decode(image_source(path), LIMIT, PixelOptions((1, 2, 3)))
    assert np.asarray(picture)[0].tolist() == [[10, 20, 30]] * 2
    with pytest.raises(ImageError, match="band 5 is not in it: it has 4 bands"):
        decode(image_source(path), LIMIT, PixelOptions((5, 2, 1)))
    (tmp_path / "x.ppm").write_bytes(b"P6 1 1 4095\n" + bytes(6))
    with pytest.raises(ImageError, match="values up to 4095, which are scaled before"):
        decode(image_source(tmp_path / "x.ppm"), LIMIT, PixelOptions(None, "0,100"))


def test_heic_and_dicom_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(bytes(128) + b"DICM" + bytes(100))
    with pytest.raises(ImageError, match=r"^a DICOM file, which fpnx does not read"):
        decode(image_source(path), LIMIT)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand in (b"heic", b"heix", b"mif1", b"hevc"):
        path.write_bytes(b"\0\0\0\x1cftyp" + brand + bytes(100))
        with pytest.raises(ImageError, match=r"^a HEIC image: install fpnx\[heif\] to read it \(pip install"):
            decode(image_source(path), LIMIT)


def test_heic(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    pictures = [noise_image(seed, (48, 32)) for seed in (1, 2)]
    first = heif.from_pillow(pictures[0])
    first.add_from_pillow(pictures[1])
    before, path, notes = set(Image.OPEN), tmp_path / "x.heic", list[str]()
    first.save(path, quality=100, chroma=444)
    picture = decode(image_source(path), LIMIT, note=notes.append)
    assert np.abs(np.asarray(picture, np.int16) - np.asarray(pictures[0], np.int16)).max() < 10
    assert notes == ["more_frames"]
    assert "HEIF" not in set(Image.OPEN) - before, "Pillow's formats are changed for the whole process"
    with pytest.raises(ImageError, match="32×48 pixels, over the limit of 1000"):
        upright_size(image_source(path), 1000)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match="a damaged HEIC file"):
        decode(image_source(path), LIMIT)


def noted(path: Path, pixels: PixelOptions = PixelOptions()) -> list[str]:  # noqa: B008
    notes: list[str] = []
    decode(image_source(path), LIMIT, pixels, note=notes.append)
    return notes


def test_notes_on_colour_profiles(tmp_path: Path) -> None:
    path, picture = tmp_path / "x.jpg", noise_image(0, (16, 16))
    for name, expected in (("sRGB", []), ("LAB", ["color_profile"]), ("XYZ", ["color_profile"])):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()  # type: ignore[arg-type]
        for file in (path, path.with_suffix(".png"), path.with_suffix(".tif"), path.with_suffix(".webp")):
            picture.save(file, icc_profile=profile)
            assert noted(file) == expected
    picture.save(path)
    assert noted(path) == []


def test_notes_on_transparency_frames_and_flatness(tmp_path: Path) -> None:
    opaque, clear = Image.new("RGBA", (9, 9), (9, 9, 9, 255)), Image.new("RGBA", (9, 9), (9, 9, 9, 0))
    for picture, expected in ((opaque, []), (clear, ["transparency"])):
        picture.save(tmp_path / "x.png")
        assert noted(tmp_path / "x.png") == expected
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for name in ("x.gif", "x.webp", "x.tif", "x.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert noted(tmp_path / name) == ["more_frames"]
        frames[0].save(tmp_path / name)
        assert noted(tmp_path / name) == []
    ramp = np.tile(np.arange(4096, dtype=np.uint16), (8, 1))
    for name in ("x.png", "x.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert noted(tmp_path / name) == ["almost_flat"]
        assert noted(tmp_path / name, PixelOptions(value_range="0,4095")) == []
        Image.fromarray(ramp * 16).save(tmp_path / name)
        assert noted(tmp_path / name) == []
    Image.new("L", (9, 9), 7).save(tmp_path / "x.png")
    assert noted(tmp_path / "x.png") == [], "8 bits are not scaled"
