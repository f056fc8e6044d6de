"""TIFFs of all kinds of values: compared with tifffile, or worked by hand; and hostile ones."""

from __future__ import annotations

import io
import itertools
import random
import sys
import tarfile
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpnx.core.errors import ImageError
from fpnx.core.pixel_options import PixelOptions
from fpnx.images.decoding import decode, pillow_limits, upright_size
from fpnx.images.listing import find_images
from tests.helpers.files import image_source
from tests.helpers.hand_made import tiff

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

LIMIT = 10**7
FULL = PixelOptions(value_range="full")
HEIGHT, WIDTH = 24, 40


@pytest.fixture(autouse=True)
def _limits() -> Any:
    with pillow_limits():
        yield


def write(path: Path, values: Any, dtype: Any = None, **options: Any) -> Path:
    tifffile.imwrite(path, np.asarray(values, dtype), **options)
    return path


def row(path: Path, pixels: PixelOptions = PixelOptions(), channel: int = 0) -> list[int]:  # noqa: B008
    return np.asarray(decode(image_source(path), LIMIT, pixels))[0, :, channel].tolist()


def reason(path: Path, pixels: PixelOptions = PixelOptions(), limit: int = LIMIT) -> str:  # noqa: B008
    with pytest.raises(ImageError) as caught:
        decode(image_source(path), limit, pixels)
    return str(caught.value)


DTYPES = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.float16, np.float32, np.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_values_are_those_that_tifffile_writes(tmp_path: Path, dtype: type) -> None:
    """The full range of the type becomes 0..255, in every layout; WhiteIsZero is inverted once."""
    generator, floats, tried = np.random.default_rng(0), np.dtype(dtype).kind == "f", 0
    predictable = dtype not in (np.float16, np.uint64)  # tifffile predicts no others
    low, high = (0, 1) if floats else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for samples, colours in ((1, "minisblack"), (1, "miniswhite"), (2, "minisblack"), (3, "rgb"), (4, "rgb")):
        shape = (HEIGHT, WIDTH, samples)
        values = generator.random(shape) if floats else generator.integers(low, high, shape, dtype, endpoint=True)
        values = values.astype(dtype)
        share = (values.astype(np.float64) - low) / (float(high) - low)
        count = 1 if samples < 3 else 3
        colour, alpha = share[..., :count], share[..., count:]
        colour = 1 - colour if colours == "miniswhite" else colour
        colour = colour * alpha + 1 - alpha if alpha.size else colour
        expected = np.broadcast_to(255 * colour, (HEIGHT, WIDTH, 3))
        # Pillow drops the low bytes of 16-bit colours, and alpha is rounded to 8 bits before it is applied.
        tolerance = 0.501 if samples < 3 and not alpha.size else 2.05
        for order, (compression, predictor), planar, tile in itertools.product(
            "<>",
            ((None, None), ("deflate", predictable), ("lzw", None), ("packbits", None)),
            ("contig", "separate") if samples > 1 else (None,),
            (None, (16, 16)),
        ):
            planes = values.transpose(2, 0, 1) if planar == "separate" else values
            path = write(
                tmp_path / "x.tif",
                values[..., 0] if samples == 1 else planes,
                photometric=colours,
                byteorder=order,
                compression=compression,
                predictor=predictor,
                planarconfig=planar,
                tile=tile,
                rowsperstrip=None if tile else 7,
                extrasamples=["unassalpha"] if samples in (2, 4) else None,
            )
            got = np.asarray(decode(image_source(path), LIMIT, FULL))
            assert np.abs(got - expected).max() <= tolerance, (samples, colours, order, compression, planar, tile)
            tried += 1
    assert tried == 128


def test_hand_worked_values(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    assert row(write(path, [[0, 128, 257, 65535]], np.uint16, photometric="miniswhite")) == [255, 255, 254, 0]
    assert row(write(path, [[0, 128, 255]], np.uint8, photometric="miniswhite")) == [255, 127, 0]
    assert row(write(path, [[0.0, 0.25, 1.0]], np.float32, photometric="miniswhite")) == [255, 191, 0]
    assert row(write(path, [[0.0, 0.5, 1.0]], np.float64)) == [0, 128, 255]
    assert row(write(path, [[0, 2**31, 2**32 - 1]], np.uint32)) == [0, 128, 255]
    assert row(write(path, [[-128, 0, 127]], np.int8), FULL) == [0, 128, 255]
    assert row(write(path, [[-32768, 0, 32767]], np.int16), FULL) == [0, 128, 255]
    assert row(write(path, [[-100, 0, 100]], np.int16), PixelOptions(value_range="-100,100")) == [0, 128, 255]
    assert row(write(path, [[0, 1]], np.int32)) == [0, 255]
    assert row(write(path, [[0, 100, 200]], np.uint8, photometric="miniswhite"), PixelOptions(value_range="0,200")) == [
        255, 127, 0,
    ]  # fmt: skip
    # 12 bits, packed: 0x000, 0x800, 0xfff, and four bits of filling.
    path.write_bytes(tiff(b"\x00\x08\x00\xff\xf0", t256=[3], t257=[1], t258=[12], t262=[1], t277=[1], t278=[1]))
    assert row(path) == [0, 128, 255]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits_and_palettes(tmp_path: Path, bits: int) -> None:
    most, path = (1 << bits) - 1, tmp_path / "x.tif"
    data = bytes([most << (8 - bits)])  # the first pixel is the largest value
    for photometric, expected in ((1, 255), (0, 0)):
        path.write_bytes(tiff(data, t256=[1], t257=[1], t258=[bits], t262=[photometric], t277=[1], t278=[1]))
        assert row(path) == [expected]
    colours = [0] * (3 << bits)  # all red values, then all green ones, then all blue ones
    for plane, value in enumerate((250, 100, 7)):
        colours[(plane << bits) + most] = 257 * value
    path.write_bytes(tiff(data, t256=[1], t257=[1], t258=[bits], t262=[3], t277=[1], t278=[1], t320=colours))
    assert np.asarray(decode(image_source(path), LIMIT)).tolist() == [[[250, 100, 7]]]
    assert np.asarray(decode(image_source(path), LIMIT, PixelOptions((3, 2, 1)))).tolist() == [[[7, 100, 250]]]


def test_inks(tmp_path: Path) -> None:
    for dtype, scale in ((np.uint8, 1), (np.uint16, 257)):
        for planar, shape in (("contig", (1, 1, 4)), ("separate", (4, 1, 1))):
            inks = np.array([0, 255, 255, 0]).reshape(shape) * scale
            path = write(tmp_path / "x.tif", inks, dtype, photometric="separated", planarconfig=planar)
            assert np.asarray(decode(image_source(path), LIMIT)).tolist() == [[[255, 0, 0]]]


def test_associated_alpha_is_not_applied_twice(tmp_path: Path) -> None:
    values = np.array([[[100, 100], [255, 255], [0, 0]]])
    for dtype, scale in ((np.uint8, 1), (np.uint16, 257)):
        for planar, written in (("contig", values), ("separate", values.transpose(2, 0, 1))):
            path = write(
                tmp_path / "x.tif", written * scale, dtype, photometric="minisblack", planarconfig=planar,
                extrasamples=["assocalpha"],
            )  # fmt: skip
            assert row(path) == [255, 255, 255]


def test_signed_values_are_refused_unless_a_range_is_given(tmp_path: Path) -> None:
    for dtype, name in ((np.int8, "signed 8-bit"), (np.int16, "signed 16-bit"), (np.int32, "signed 32-bit")):
        path = write(tmp_path / "x.tif", [[-5, 0, 100]], dtype)
        assert reason(path) == (
            f"{name} values outside 0..1, whose scale is unknown: give --value-range full, LO,HI or P1,P99"
        )


def test_bands_are_chosen_or_named(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.uint16) * 1000 + np.zeros((2, 3, 1), np.uint16)
    for planar, written in (("contig", values), ("separate", values.transpose(2, 0, 1))):
        path = write(tmp_path / "x.tif", written, photometric="minisblack", planarconfig=planar)
        picked = np.asarray(decode(image_source(path), LIMIT, PixelOptions((4, 3, 2), "0,4000")))
        assert picked[1, 2].tolist() == [191, 128, 64]
        assert np.asarray(decode(image_source(path), LIMIT, PixelOptions((5,), "0,4000")))[0, 0].tolist() == [255] * 3
        assert upright_size(image_source(path), LIMIT) == (2, 3)
        assert reason(path) == (
            "a TIFF of 5 bands of 16 bits: it does not say which of bands 1 to 5 are red, green and blue: choose with "
            "--bands, as in --bands 1 or --bands 3,2,1"
        )
        assert reason(path, PixelOptions((6,))) == "a TIFF of 5 bands of 16 bits: band 6 is not in it"


def test_bands_of_what_pillow_reads(tmp_path: Path) -> None:
    values = np.array([[[10, 20, 30, 128]]], np.uint8)
    path = write(tmp_path / "x.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    assert np.asarray(decode(image_source(path), LIMIT, PixelOptions((3, 2, 1))))[0, 0].tolist() == [30, 20, 10]
    assert np.asarray(decode(image_source(path), LIMIT, PixelOptions((4,))))[0, 0].tolist() == [128] * 3
    path = write(tmp_path / "x.tif", values[..., :3].astype(np.uint16) * 100, photometric="rgb")
    picked = np.asarray(decode(image_source(path), LIMIT, PixelOptions((3, 2, 1), "0,3000")))
    assert picked[0, 0].tolist() == [255, 170, 85]


def test_percentiles(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for values in (
        generator.integers(0, 3000, (30, 40)).astype(np.uint16),
        generator.integers(-900, 900, (30, 40)).astype(np.int16),
        generator.normal(size=(30, 40)).astype(np.float32),
    ):
        low, high = np.percentile(values.astype(np.float64), (2, 97.5))
        expected = np.rint(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255)
        path = write(tmp_path / "x.tif", values)
        got = np.asarray(decode(image_source(path), LIMIT, PixelOptions(value_range="P2,P97.5")))[..., 0]
        assert np.abs(got - expected).max() <= (values.dtype.kind == "f")
    flat = write(tmp_path / "x.tif", np.full((3, 4), 7, np.uint16))
    assert row(flat, PixelOptions(value_range="P1,P99")) == [0] * 4
    nothing = write(tmp_path / "x.tif", np.full((3, 4), np.nan, np.float32))
    assert reason(nothing, PixelOptions(value_range="P1,P99")) == "no value is a finite number"


def test_what_is_no_number_is_refused_or_black_and_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tif", [[0.0, np.nan, 10.0, np.inf, -np.inf]], np.float64)
    assert "outside 0..1" in reason(path)
    notes: list[str] = []
    picture = decode(image_source(path), LIMIT, PixelOptions(value_range="0,10"), note=notes.append)
    assert np.asarray(picture)[0, :, 1].tolist() == [0, 0, 255, 255, 0]
    assert notes == ["not_a_number"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_bands(tmp_path: Path, orientation: int) -> None:
    values = np.random.default_rng(1).integers(0, 65535, (5, 9, 3), dtype=np.uint16)
    path = write(tmp_path / "x.tif", values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate",
                 extratags=[(274, 3, 1, orientation, True)])  # fmt: skip
    turned = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.transpose(1, 0, 2),
        6: np.rot90(values, -1), 7: values[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(values),
    }[orientation]  # fmt: skip
    picture = np.asarray(decode(image_source(path), LIMIT))
    assert np.array_equal(picture, np.rint(turned / 257).astype(np.uint8))
    assert upright_size(image_source(path), LIMIT) == turned.shape[:2]


def test_archives_and_threads(tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 65535, (20, 30, 3), dtype=np.uint16)
    held = io.BytesIO()
    tifffile.imwrite(held, values, photometric="minisblack", planarconfig="contig", compression="deflate")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(8):
            info = tarfile.TarInfo(f"{i}.tif")
            info.size = len(held.getvalue())
            tar.addfile(info, io.BytesIO(held.getvalue()))
    sources = find_images([tmp_path / "a.tar"]).sources * 4
    with ThreadPoolExecutor(8) as threads:
        pictures = list(threads.map(lambda source: decode(source, LIMIT, PixelOptions((1, 2, 3))), sources))
    assert all(np.array_equal(np.asarray(picture), np.rint(values / 257).astype(np.uint8)) for picture in pictures)


def test_without_the_extra_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((4, 5, 3))
    colours = write(tmp_path / "a.tif", values, np.uint16, photometric="minisblack", planarconfig="contig")
    floats = write(tmp_path / "b.tif", values[..., 0], np.float64)
    grey = write(tmp_path / "c.tif", [[0, 257]], np.uint16, photometric="miniswhite")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert reason(colours) == "a TIFF of 3 bands of 16 bits: install fpnx[tiff] to read it (pip install 'fpnx[tiff]')"
    assert "a TIFF of one band of 64 bits, floating-point: install fpnx[tiff]" in reason(floats)
    with pytest.raises(ImageError, match=r"install fpnx\[tiff\]"):
        upright_size(image_source(colours), LIMIT)
    assert row(grey) == [255, 254]  # Pillow reads it


def test_what_is_not_read_says_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tif", [[0, 1j]], np.complex64)
    assert reason(path) == "a TIFF of one band of 64 bits, complex, which fpnx does not read"
    path.write_bytes(tiff(bytes(99), t256=[4], t257=[4], t258=[16], t259=[34712], t262=[1], t277=[1], t339=[2]))
    assert "signed, compressed with JPEG 2000, which fpnx does not read" in reason(path)
    path.write_bytes(tiff(bytes(99), t256=[4], t257=[4], t258=[8, 8, 16], t259=[1], t262=[2], t277=[3]))
    assert reason(path) == "a TIFF of 3 bands of 8 and 16 bits, which fpnx does not read"


def five_bands(data: bytes, width: int = 16, height: int = 16, samples: int = 5, **more: Any) -> bytes:
    """A TIFF of `samples` bands of 16 bits in one deflated strip."""
    tags = {"t258": [16], "t259": [8], "t262": [1], "t277": [samples], "t278": [height], "t284": [1]}
    return tiff(data, t256=[width], t257=[height], **{**tags, **more})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: five_bands(zlib.compress(bytes(1 << 26))), "a damaged TIFF file: DeflateError"),
        (lambda: five_bands(b"x", 60000, 60000), "60000×60000 pixels, over the limit"),
        (lambda: five_bands(b"x" * 99, 3000, 3000, 60000), "more than the 227108864 that --max-pixels leaves"),
        (lambda: five_bands(b"x" * 99, t279=[2**32 - 1]), "it ends within its pixels"),
        (lambda: five_bands(b"x" * 99, t273=[2**32 - 1]), "a damaged TIFF file"),
        (lambda: five_bands(b"x" * 99, t278=[1]), "parts of its pixels are missing"),
        (lambda: five_bands(b"x" * 99, t322=[2**31], t323=[2**31], t324=[200], t325=[99]), "tiles of 461168601842738"),
        (lambda: five_bands(b"x" * 99, 0, 5), "a damaged TIFF file"),
    ],
    ids=["bomb", "huge", "bands", "count", "offset", "strips", "tiles", "nothing"],
)  # fmt: skip
def test_hostile_files_are_refused(tmp_path: Path, make: Callable[[], bytes], expected: str) -> None:
    (tmp_path / "x.tif").write_bytes(make())
    assert expected in reason(tmp_path / "x.tif", PixelOptions((1,)))


def test_damage_anywhere_is_a_reason_and_no_crash(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(3).integers(0, 65535, (20, 30, 5), dtype=np.uint16)
    held, path, draw, refused = io.BytesIO(), tmp_path / "x.tif", random.Random(0), 0
    tifffile.imwrite(held, values, photometric="minisblack", planarconfig="contig", compression="lzw", tile=(16, 16))
    for _ in range(300):
        data = bytearray(held.getvalue())
        for _ in range(draw.choice((1, 2, 4))):
            data[draw.randrange(min(len(data), 400))] = draw.choice((0, 1, 255, draw.randrange(256)))
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                size = upright_size(image_source(path), LIMIT)
                assert decode(image_source(path), LIMIT, PixelOptions((3, 2, 1))).size == size[::-1]
        except ImageError:
            refused += 1
    assert refused > 20
    assert "tifffile" not in capfd.readouterr().err
