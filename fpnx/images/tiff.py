"""TIFF files that Pillow does not read, or reads wrongly: their header, and their bands by tifffile (`fpnx[tiff]`)."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from fpnx.core.errors import ImageError
from fpnx.images.value_mapping import SampleType

__all__ = [
    "ASSOCIATED",
    "TiffHeader",
    "UNASSOCIATED",
    "WHITE_IS_ZERO",
    "check_bands_readable",
    "choose_bands",
    "is_tiff",
    "pillow_is_right",
    "pillow_keeps_values",
    "read_bands",
    "read_header",
    "read_profile",
]

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")  # the last two are invalid, and do occur
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK = 0, 1, 2, 5
COLOURS = {3: "palette", 4: "mask", 6: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "raw sensor",
           32844: "LogL", 32845: "LogLuv", 34892: "linear raw"}  # fmt: skip
ASSOCIATED, UNASSOCIATED = 1, 2  # kinds of alpha among the extra samples
ALPHA = (ASSOCIATED, UNASSOCIATED)
# Lossless compressions whose result has a known size: none, LZW, deflate (two numbers), PackBits, LZMA, Zstandard.
COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA", 50000: "Zstd"}
LOSSY = {6: "JPEG", 7: "JPEG", 33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000",
         34887: "LERC", 34892: "JPEG", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL"}  # fmt: skip
KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # by SampleFormat; 4 is "undefined"
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
FORMATS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
PILLOW_SAMPLES = 6  # more than it opens
MAX_ENTRIES = 4096
MAX_VALUES = 65536  # of a tag
MAX_SEGMENTS = 1 << 20
MAX_PROFILE = 1 << 24
SILENT = logging.NullHandler()
INSTALL = "install fpnx[tiff] to read it (pip install 'fpnx[tiff]')"


@dataclass(frozen=True)
class TiffHeader:
    """What the first directory of a TIFF file says.

    Attributes:
        big_endian: byte order of its numbers.
        width, height: as stored, before `orientation`.
        bits: of each sample of a pixel.
        kinds: `"u"`, `"i"`, `"f"` or `"c"` (complex), of each sample.
        photometric: how colours are coded, tag 262.
        extra: kinds of the samples beyond the colours, tag 338.
        planar: whether each band is stored by itself.
        compression: tag 259.
        orientation: 1 to 8, as in EXIF.
        tile: (height, width) of a tile, or of a strip.
        more_pages: whether another directory follows.
        profile: (offset, bytes) of an ICC profile.
    """

    big_endian: bool
    width: int
    height: int
    bits: tuple[int, ...]
    kinds: tuple[str, ...]
    photometric: int
    extra: tuple[int, ...]
    planar: bool
    compression: int
    orientation: int
    tile: tuple[int, int]
    more_pages: bool
    profile: tuple[int, int] | None

    @property
    def samples(self) -> int:
        """Values of a pixel: bands, alpha included."""
        return len(self.bits)

    @property
    def sample(self) -> SampleType:
        """The type of the values of the first band."""
        return SampleType(self.kinds[0], self.bits[0])

    @property
    def itemsize(self) -> int:
        """Bytes of a value in an array."""
        return next((size for size in (1, 2, 4) if 8 * size >= self.bits[0]), 8)

    def __str__(self) -> str:
        bands = "one band" if self.samples == 1 else f"{self.samples} bands"
        bits = sorted(set(self.bits))
        width = f"{' and '.join(map(str, bits))} bit{'' if bits == [1] else 's'}"
        kind = {"i": ", signed", "f": ", floating-point", "c": ", complex"}.get(self.kinds[0], "")
        colours = f", {COLOURS[self.photometric]} colours" if self.photometric in COLOURS else ""
        return f"a TIFF of {bands} of {width}{kind}{colours}"


def is_tiff(start: bytes) -> bool:
    """Whether a file begins like a TIFF."""
    return start.startswith(MAGIC)


def read_header(file: BinaryIO) -> TiffHeader | None:
    """The header of a TIFF; None where it is damaged: cut off, or without a size or pixels."""
    try:
        directory = _Directory(file)
        width, height, samples = directory.number(256), directory.number(257), directory.number(277, 1)
        tiled = directory.has(322)
        first = directory.values(324 if tiled else 273)[0]
        tile = (directory.number(323), directory.number(322)) if tiled else (directory.number(278, height), width)
        if not (min(width, height, samples, *tile) > 0 and samples <= MAX_VALUES and first < directory.end):
            return None
        orientation = directory.number(274, 1)
        return TiffHeader(
            big_endian=directory.order == ">",
            width=width,
            height=height,
            bits=_for_each(directory.values(258, 1), samples),
            kinds=tuple(KINDS.get(value, "c") for value in _for_each(directory.values(339, 1), samples)),
            photometric=directory.number(262, WHITE_IS_ZERO),
            extra=directory.values(338) if directory.has(338) else (),
            planar=directory.number(284, 1) == 2 and samples > 1,
            compression=directory.number(259, 1),
            orientation=orientation if 1 <= orientation <= 8 else 1,
            tile=tile if tiled else (min(tile[0], height), width),
            more_pages=directory.following != 0,
            profile=directory.place(34675),
        )
    except (struct.error, KeyError, IndexError, ValueError, OverflowError):
        return None


def pillow_is_right(header: TiffHeader) -> bool:
    """Whether Pillow, if it opens such a file, gives the values that are in it."""
    if len(set(header.bits)) > 1 or len(set(header.kinds)) > 1 or header.samples > PILLOW_SAMPLES:
        return False
    kind, bits = header.kinds[0], header.bits[0]
    swapped = header.big_endian and header.compression != 1  # decompressed values are swapped once too often
    if (kind, bits) in (("i", 16), ("i", 32), ("u", 32), ("f", 32)):
        return header.samples == 1 and not swapped
    if header.planar:  # 16 bits are taken for two bands, and grey with alpha is mixed up
        return header.samples > 2 and bits == 8 and ASSOCIATED not in header.extra
    return (kind == "u" and bits <= 16) or (kind, bits, header.samples) == ("i", 8, 1)


def pillow_keeps_values(header: TiffHeader, bands: Sequence[int] | None, rescales: bool) -> bool:
    """Whether Pillow's picture has the bands and the precision that the options need."""
    if rescales and header.bits[0] > 8 and header.samples > 1:
        return False  # 16-bit colours lose their low bytes
    raw = header.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK)
    return bands is None or not raw or header.samples in (1, 3)


def check_bands_readable(header: TiffHeader, most_bytes: int) -> None:
    """Refuse what `read_bands` does not read.

    Args:
        header: of the file.
        most_bytes: limit on the bytes of all its values.

    Raises:
        ImageError: with the reason.
    """
    if "c" in header.kinds or len(set(header.kinds)) > 1 or len(set(header.bits)) > 1 or not 1 <= header.bits[0] <= 64:
        raise ImageError(f"{header}, which fpnx does not read")
    if header.compression not in COMPRESSIONS:
        name = LOSSY.get(header.compression, f"method {header.compression}")
        raise ImageError(f"{header}, compressed with {name}, which fpnx does not read: compress it with deflate or LZW")
    rows, columns = (-(-side // tile) for side, tile in zip((header.height, header.width), header.tile, strict=True))
    planes = header.samples if header.planar else 1
    in_tile = math.prod(header.tile) * (header.samples // planes)
    values = max(rows * columns * in_tile, in_tile)
    if values * header.itemsize > most_bytes or rows * columns * planes > MAX_SEGMENTS:
        raise ImageError(
            f"{header}: its values take {values * header.itemsize} bytes, more than the {most_bytes} that --max-pixels "
            "leaves"
        )
    if not all(importlib.util.find_spec(name) for name in ("tifffile", "imagecodecs")):
        raise ImageError(f"{header}: {INSTALL}")


def choose_bands(header: TiffHeader, bands: Sequence[int] | None) -> tuple[tuple[int, ...], int]:
    """The bands to read, from 1: those asked for, else those that the file tags as grey or colours; and its alpha.

    Returns:
        one, three or four (CMYK) bands; and the kind of alpha, which is the band behind them, or 0.

    Raises:
        ImageError: a band that is not in the file, or a choice that the file does not tell.
    """
    if bands is not None:
        if max(bands) > header.samples:
            raise ImageError(f"{header}: band {max(bands)} is not in it")
        return tuple(bands), 0
    colours = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, CMYK: 4}.get(header.photometric, 0)
    alpha = header.extra[0] if header.extra and header.extra[0] in ALPHA else 0
    if not colours or header.samples < colours or (colours == 1 and header.samples > (2 if alpha else 1)):
        raise ImageError(
            f"{header}: it does not say which of bands 1 to {header.samples} are red, green and blue: choose with "
            "--bands, as in --bands 1 or --bands 3,2,1"
        )
    return tuple(range(1, colours + 1)), alpha if header.samples > colours and colours != 4 else 0


def read_bands(file: BinaryIO, header: TiffHeader, bands: Sequence[int]) -> np.ndarray:
    """The values of some bands, by tifffile, segment by segment: (height, width, bands), as stored, not turned.

    Raises:
        ImageError: where its pixels are damaged.
    """
    import tifffile

    logging.getLogger("tifffile").addHandler(SILENT)  # once; without a handler its errors would go to stderr
    file.seek(0)
    try:
        with tifffile.TiffFile(file, name="image.tif") as tiff:
            return _read_page(file, tiff.pages[0], header, [band - 1 for band in bands])
    except (MemoryError, OSError, ImageError):
        raise
    except Exception as error:  # of tifffile and of every codec
        raise ImageError(f"a damaged TIFF file: {type(error).__name__}: {error}") from error


def read_profile(file: BinaryIO, header: TiffHeader) -> bytes | None:
    """The ICC profile of a TIFF."""
    if header.profile is None or header.profile[1] > MAX_PROFILE:
        return None
    file.seek(header.profile[0])
    return file.read(header.profile[1])


def _read_page(file: BinaryIO, page: Any, header: TiffHeader, bands: Sequence[int]) -> np.ndarray:
    """The bands, counted from 0, of a page of tifffile."""
    stored = (page.imagedepth, page.imagelength, page.imagewidth, page.samplesperpixel)
    if stored != (1, header.height, header.width, header.samples) or page.dtype is None:
        raise ImageError(f"{header}, which fpnx does not read")
    dtype = np.dtype(np.uint8) if page.dtype.kind == "b" else page.dtype.newbyteorder("=")
    values = np.zeros((header.height, header.width, len(bands)), dtype)
    rows, columns = (-(-side // tile) for side, tile in zip((header.height, header.width), header.tile, strict=True))
    planes = header.samples if header.planar else 1
    if min(len(page.dataoffsets), len(page.databytecounts)) < rows * columns * planes:
        raise ImageError("a damaged TIFF file: parts of its pixels are missing")
    for plane in sorted(set(bands)) if header.planar else [0]:
        for index in range(plane * rows * columns, (plane + 1) * rows * columns):
            count = page.databytecounts[index]
            if not count:  # left out of a sparse file
                continue
            file.seek(page.dataoffsets[index])
            data = file.read(count)
            if len(data) < count:
                raise ImageError("a damaged TIFF file: it ends within its pixels")
            segment, (_, _, top, left, _), _ = page.decode(data, index)
            part = segment[0, : header.height - top, : header.width - left]
            target = values[top : top + part.shape[0], left : left + part.shape[1]]
            for position, band in enumerate(bands):
                if not header.planar:
                    target[..., position] = part[..., band]
                elif band == plane:
                    target[..., position] = part[..., 0]
    return values


class _Directory:
    """The first directory of a TIFF or BigTIFF file. Tags whose values lie outside the file are left out.

    Raises:
        struct.error, ValueError: there is none.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.end = file, file.seek(0, os.SEEK_END)
        file.seek(0)
        magic = file.read(4)
        self.order, big = (">" if magic[:1] == b"M" else "<"), b"+" in magic
        offset_format, inline = (f"{self.order}Q", 8) if big else (f"{self.order}I", 4)
        if big:
            file.read(4)
        (start,) = struct.unpack(offset_format, file.read(inline))
        file.seek(start)
        (count,) = struct.unpack(offset_format if big else f"{self.order}H", file.read(8 if big else 2))
        if not 0 < count <= MAX_ENTRIES:
            raise ValueError("no tags")
        start, size = file.tell(), 12 + (8 if big else 0)
        data = file.read(size * count)
        (self.following,) = struct.unpack(offset_format, file.read(inline).ljust(inline, b"\0"))
        self._tags: dict[int, tuple[int, int, int]] = {}  # tag → type, number of values, where they are
        for entry in range(0, size * count, size):
            tag, kind, values = struct.unpack_from(f"{self.order}HH{'Q' if big else 'I'}", data, entry)
            length, where = TYPE_SIZES.get(kind, 0) * values, start + entry + size - inline
            if length > inline:
                (where,) = struct.unpack_from(offset_format, data, entry + size - inline)
            if 0 < length <= self.end - where:
                self._tags[tag] = kind, values, where

    def has(self, tag: int) -> bool:
        return tag in self._tags

    def values(self, tag: int, default: int | None = None) -> tuple[int, ...]:
        """The whole numbers of a tag, as many as a header needs; KeyError where it has none and there is no default."""
        if tag not in self._tags and default is not None:
            return (default,)
        kind, count, where = self._tags[tag]
        count = min(count, MAX_VALUES)
        self._file.seek(where)
        return struct.unpack(f"{self.order}{count}{FORMATS[kind]}", self._file.read(TYPE_SIZES[kind] * count))

    def number(self, tag: int, default: int | None = None) -> int:
        """The first number of a tag."""
        return self.values(tag, default)[0]

    def place(self, tag: int) -> tuple[int, int] | None:
        """(offset, bytes) of the values of a tag."""
        if tag not in self._tags:
            return None
        kind, count, where = self._tags[tag]
        return where, TYPE_SIZES[kind] * count


def _for_each(values: Sequence[int], samples: int) -> tuple[int, ...]:
    """One value for each sample of a pixel: the first where there are too few, as decoders do."""
    return tuple(values[:samples]) if len(values) >= samples else (values[0],) * samples
