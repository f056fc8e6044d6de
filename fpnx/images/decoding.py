"""Decoding of image files to upright 8-bit RGB: EXIF orientation, transparency, wider values, bands, limits."""

from __future__ import annotations

import importlib.util
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from fpnx.core.errors import ImageError
from fpnx.core.image_notes import FLAT, MORE_FRAMES, NOT_A_NUMBER, PROFILE, TRANSPARENCY
from fpnx.core.pixel_options import PixelOptions
from fpnx.core.text import escape, plural
from fpnx.core.warning_filters import ignored_warnings
from fpnx.images import tiff
from fpnx.images.color_profile import is_srgb
from fpnx.images.reading import ImageSource, content_digest, open_source
from fpnx.images.value_mapping import SampleType, map_to_bytes

__all__ = [
    "PixelBudget",
    "content_digests",
    "decode",
    "pillow_limits",
    "to_rgb",
    "upright_rgb",
    "upright_size",
    "upright_sizes",
]

AS_TAGGED = PixelOptions()
Note = Callable[[str], None]  # takes a kind of `fpnx.core.image_notes`
_Read = TypeVar("_Read")

# Magic bytes of formats that are checked further: a file that begins so, and is not recognised, is damaged.
DAMAGED = (
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    ("AVIF", rb"(?s)....ftypavi[fs]"),
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG"),
)
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MIN_READING_THREADS, READ_AHEAD = 4, 256  # threads that read headers or whole files, and images that they may be ahead
BACKGROUND = (255, 255, 255)  # colour behind transparent pixels
EXIF_ORIENTATION = 0x0112
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 0x0102, 0x0106, 0x0153  # TIFF tags
MAX_TILE_PIXELS = 1 << 20  # a TIFF tile may always have so many, even with a smaller limit
BYTES_PER_PIXEL, METADATA_BYTES = 16, 1 << 26  # limit on the file size: four 32-bit channels, and metadata
DECODING_BYTES = 27  # most that Pillow takes for a pixel (measured: WebP with alpha and orientation)
FLAT_RANGE, FLAT_SHARE = 16, 0.001  # of 256 values; without so many of the darkest and of the brightest pixels
DEEP = re.compile(r";16[BLN]$")  # Pillow's names of stored colours of 16 bits
HEIF = rb"(?s)....ftyp(hei[cxmsf]|hev[cxms]|mif1|msf1)"
TRANSPOSE = {  # by EXIF orientation: the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NOT_IMAGES = (  # magic bytes of files that are often mistaken for images
    (b"version https://git-lfs", "a git-lfs pointer, not the image itself: run `git lfs pull`"),
    (b"<svg", "an SVG drawing, not pixels"),
    (b"<!doctype html", "an HTML page, not an image"),
    (b"<html", "an HTML page, not an image"),
    (b"%!PS", "PostScript, which fpnx does not run"),
    (b"%PDF", "a PDF document, not an image"),
)
DICOM = "a DICOM file, which fpnx does not read: write its pixels as a PNG or TIFF of 16 bits"
NO_HEIF = "a HEIC image: install fpnx[heif] to read it (pip install 'fpnx[heif]')"
NO_TIFF = "install fpnx[tiff] to read all of its bits (pip install 'fpnx[tiff]')"


def upright_size(source: ImageSource, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels after EXIF orientation, from the header alone.

    Raises:
        ImageError: with the reason why it cannot be read.
    """
    with _opened(source, max_pixels, whole=False) as opened:
        width, height = opened.size
        return (width, height) if opened.orientation >= 5 else (height, width)


def upright_sizes(
    sources: Sequence[ImageSource], max_pixels: int, threads: int
) -> Generator[tuple[int, int] | ImageError, None, None]:
    """(height, width) of each image as `upright_size` gives it, in order; the error where it cannot be read.

    At least `MIN_READING_THREADS` threads read, a bounded number of images ahead. Close it where it is not used up.
    """
    return _read_each(lambda source: upright_size(source, max_pixels), sources, threads)


def content_digests(
    sources: Sequence[ImageSource], max_pixels: int, threads: int
) -> Generator[bytes | ImageError, None, None]:
    """Content hash of each image's file, see `content_digest`, in order; the error where it cannot be read.

    All bytes of the files are read, as many at a time as `upright_sizes` reads. Close it where it is not used up.
    """

    def digest(source: ImageSource) -> bytes:
        with _image_errors(), open_source(_allowed(source), _most_bytes(max_pixels)) as file:
            return content_digest(file)

    return _read_each(digest, sources, threads)


def _read_each(
    read: Callable[[ImageSource], _Read], sources: Sequence[ImageSource], threads: int
) -> Generator[_Read | ImageError, None, None]:
    """What `read` gives of each source, in order, or the `ImageError` that it raises."""

    def attempt(source: ImageSource) -> _Read | ImageError:
        try:
            return read(source)
        except ImageError as error:
            return error

    pool = ThreadPoolExecutor(max(threads, MIN_READING_THREADS), "fpnx-reading")
    reading: deque[Future[_Read | ImageError]] = deque()
    try:
        for source in sources:
            reading.append(pool.submit(attempt, source))
            if len(reading) >= READ_AHEAD:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class PixelBudget:
    """A limit on the pixels that all threads decode at the same time; a larger image is decoded alone.

    Decoding takes up to `DECODING_BYTES` per pixel, so `pixels` limits the memory. What takes more claims more.
    """

    def __init__(self, pixels: int) -> None:
        self._free, self._limit, self._changed = pixels, pixels, threading.Condition()

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that waits until so many pixels are free, and claims them; they are released at the end."""
        claimed = 0

        def claim(pixels: int) -> None:
            nonlocal claimed
            with self._changed:
                self._changed.wait_for(lambda: self._free >= min(pixels, self._limit))
                claimed = min(pixels, self._limit)
                self._free -= claimed

        try:
            yield claim
        finally:
            with self._changed:
                self._free += claimed
                self._changed.notify_all()


def decode(
    source: ImageSource,
    max_pixels: int,
    pixels: PixelOptions = AS_TAGGED,
    *,
    claim: Callable[[int], None] | None = None,
    note: Note | None = None,
    digest: Callable[[bytes], None] | None = None,
) -> Image.Image:
    """Decode an image to upright 8-bit RGB: first frame, alpha over white, wider values scaled to 8 bits.

    Args:
        source: the image.
        max_pixels: largest number of pixels that it may have.
        pixels: which bands are read, and which range of their values becomes 0..255.
        claim: called with the number of pixels before they are decoded; see `PixelBudget`.
        note: called with each kind of note about it, see `fpnx.core.image_notes`.
        digest: called with the content hash of its file, see `content_digest`; without it, none is computed.

    Raises:
        ImageError: with the reason why it cannot be read.
    """
    note, claim = note or _ignore, claim or _ignore
    with _opened(source, max_pixels) as opened:
        if opened.more_frames:
            note(MORE_FRAMES)
        if (profile := opened.profile) and not is_srgb(profile):
            note(PROFILE)
        header, image = opened.tiff, opened.image
        if header is not None and (
            image is None or not tiff.pillow_keeps_values(header, pixels.bands, pixels.rescales)
        ):
            if image is not None:
                tiff.check_bands_readable(header, _most_bytes(max_pixels))
            rgb, orientation = _from_tiff_bands(opened.file, header, pixels, claim, note), header.orientation
            is_deep = header.bits[0] > 8
        else:
            assert image is not None
            is_deep = _is_deep(image)
            rgb = _from_pillow(opened.file, image, pixels, claim, note)
            orientation = _orientation(image)  # Pillow has turned a TIFF by now, and gives 1
        if (is_deep or pixels.rescales) and _is_flat(rgb):
            note(FLAT)
        if digest is not None:  # of the same open file, whose pages the system still has in memory
            digest(content_digest(opened.file))
        transpose = TRANSPOSE.get(orientation)
        return rgb.transpose(transpose) if transpose is not None else rgb


def upright_rgb(image: Image.Image, pixels: PixelOptions = AS_TAGGED) -> Image.Image:
    """A Pillow image turned upright by its EXIF orientation, as 8-bit RGB; see `to_rgb`."""
    image.load()
    rgb = to_rgb(image, pixels)
    transpose = TRANSPOSE.get(_orientation(image))  # Pillow has turned a TIFF by now, and gives 1
    return rgb.transpose(transpose) if transpose is not None else rgb


def to_rgb(image: Image.Image, pixels: PixelOptions = AS_TAGGED, note: Note | None = None) -> Image.Image:
    """Convert any Pillow image to 8-bit RGB; no value is clipped unless `pixels` gives a range.

    Args:
        image: the image. Of a TIFF, its tags tell the type of its values.
        pixels: which bands are read, and which range of their values becomes 0..255.
        note: called with each kind of note about it.

    Raises:
        ImageError: floating-point or signed values outside 0..1, whose scale is unknown; a band it does not have.
    """
    note = note or _ignore
    sample = _sample_type(image)
    white_is_zero = image.format == "TIFF" and _tag(image, PHOTOMETRIC, tiff.WHITE_IS_ZERO) == tiff.WHITE_IS_ZERO
    if sample is not None:
        _check_bands(pixels.bands, 1)
        values = _values(image, sample)
        grey = _mapped(values, sample, pixels, note)
        layer = Image.fromarray(255 - grey if white_is_zero else grey)
        transparent = image.info.get("transparency") if pixels.bands is None else None
        if isinstance(transparent, int):
            layer.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return _over_white(layer, note)
    if pixels.bands is not None:
        return _rescaled(_picked(image, pixels.bands), pixels, white_is_zero)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if pixels.rescales:
            alpha = layer.getchannel("A")
            layer = _rescaled(layer.convert("RGB"), pixels, white_is_zero)
            layer.putalpha(alpha)
        return _over_white(layer, note)
    return _rescaled(image if image.mode == "RGB" else image.convert("RGB"), pixels, white_is_zero)


@contextmanager
def pillow_limits() -> Iterator[None]:
    """Inside the block, Pillow has no pixel limit of its own (`max_pixels` applies) and its warnings are off."""
    with ignored_warnings(r"PIL\b"):
        with _limit.lock:  # of the whole process: the last thread that leaves restores what the first one found
            if not _limit.count:
                _limit.before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            _limit.count += 1
        try:
            yield
        finally:
            with _limit.lock:
                _limit.count -= 1
                if not _limit.count:
                    Image.MAX_IMAGE_PIXELS = _limit.before


class _Limit:
    def __init__(self) -> None:
        self.lock, self.count, self.before = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS


_limit = _Limit()


@dataclass
class _Opened:
    """An image file whose header is read.

    Attributes:
        image: as Pillow opens it, not decoded; None for a TIFF that only tifffile reads.
        tiff: the header of a TIFF.
    """

    file: BinaryIO
    image: Image.Image | None
    tiff: tiff.TiffHeader | None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored, before `orientation`."""
        if self.tiff is not None:  # Pillow gives that of a TIFF turned
            return self.tiff.width, self.tiff.height
        assert self.image is not None
        return self.image.width, self.image.height

    @property
    def orientation(self) -> int:
        """EXIF orientation of the stored pixels."""
        if self.image is None:
            return self.tiff.orientation if self.tiff is not None else 1
        return _orientation(self.image)

    @property
    def more_frames(self) -> bool:
        """Whether there are frames or pages besides the first."""
        if self.tiff is not None:
            return self.tiff.more_pages
        try:
            return bool(getattr(self.image, "is_animated", False))
        except Exception:  # a damaged second frame does not fail the first
            return True

    @property
    def profile(self) -> bytes | None:
        """Its ICC profile."""
        if self.image is None and self.tiff is not None:
            return tiff.read_profile(self.file, self.tiff)
        found = getattr(self.image, "info", {}).get("icc_profile")
        return found if isinstance(found, bytes) else None


@contextmanager
def _opened(source: ImageSource, max_pixels: int, whole: bool = True) -> Iterator[_Opened]:
    """Open the file; every error inside the block becomes an `ImageError` with a short reason."""
    most = _most_bytes(max_pixels)
    with _image_errors(), open_source(_allowed(source), most, whole) as file:
        start = file.read(512)
        header = tiff.read_header(file) if tiff.is_tiff(start) else None
        image = None
        if header is not None:
            _check_size(header.height, header.width, max_pixels)
            if math.prod(header.tile) > max(max_pixels, MAX_TILE_PIXELS):  # a small image may have a huge tile
                raise ImageError(f"tiles of {math.prod(header.tile)} pixels, over the limit of {max_pixels}")
        if header is None or tiff.pillow_is_right(header):
            image = _open_with_pillow(file, start)
        if image is None and header is None:
            raise ImageError(_reason(start))
        if image is None:
            assert header is not None
            tiff.check_bands_readable(header, most)
            yield _Opened(file, None, header)
            return
        with image:
            _check_size(image.height, image.width, max_pixels)
            yield _Opened(file, image, header)


def _allowed(source: ImageSource) -> ImageSource:
    """The source, unless it must not be opened."""
    if source.blocked:
        raise ImageError(source.blocked)
    return source


@contextmanager
def _image_errors() -> Iterator[None]:
    """Every error inside the block becomes an `ImageError` with a short reason."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out of memory: lower --workers, or refuse such images with --max-pixels") from error
    except OSError as error:
        raise ImageError(escape(error.strerror or str(error) or type(error).__name__)) from error
    except Exception as error:  # Pillow's decoders raise ValueError, SyntaxError, struct.error and more
        raise ImageError(escape(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)) from error


def _open_with_pillow(file: BinaryIO, start: bytes) -> Image.Image | None:
    """The image, its pixels not yet decoded; None for what Pillow does not know."""
    Image.init()
    file.seek(0)
    try:
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        pass
    if not re.match(HEIF, start):
        return None
    if importlib.util.find_spec("pillow_heif") is None:
        raise ImageError(NO_HEIF)
    from pillow_heif import HeifImageFile

    file.seek(0)
    try:
        return HeifImageFile(file)  # registered nowhere: Pillow's formats in this process stay as they are
    except SyntaxError:
        raise ImageError("a damaged HEIC file") from None


def _reason(start: bytes) -> str:
    """Why a file that begins with `start` is not read."""
    if not start:
        return "empty file"
    if start[128:132] == b"DICM":
        return DICOM
    reason = next((f"a damaged {kind} file" for kind, magic in DAMAGED if re.match(magic, start)), None)
    reason = reason or next((text for magic, text in NOT_IMAGES if magic.lower() in start.lower()), None)
    return reason or f"not an image that fpnx reads ({', '.join(FORMATS)})"


def _most_bytes(max_pixels: int) -> int:
    """The largest file, and the most bytes of decoded values, that so many pixels may take."""
    return BYTES_PER_PIXEL * max_pixels + METADATA_BYTES


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"{height}×{width} pixels, over the limit of {max_pixels}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where it is missing or invalid."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data does not fail the image
        return 1
    return value if value in TRANSPOSE else 1


def _from_pillow(
    file: BinaryIO, image: Image.Image, pixels: PixelOptions, claim: Callable[[int], None], note: Note
) -> Image.Image:
    """RGB of an image that Pillow decodes; not turned, except for a TIFF."""
    claim(image.width * image.height)
    rawmode, transparency = _rawmode(image), image.info.get("transparency")
    if image.format == "PNG" and transparency is not None:
        image.info["transparency"] = _png_transparency(rawmode, transparency)
    # Of grey with alpha Pillow makes RGBA, in which band 2 is another one.
    needs_low_bytes = pixels.rescales or (transparency is not None if pixels.bands is None else rawmode.startswith("L"))
    if image.format == "PNG" and image.mode != "I;16" and DEEP.search(rawmode) and needs_low_bytes:
        return _from_deep_png(file, pixels, note)
    if pixels.rescales and image.format == "PPM":
        most = image.tile[0].args[1] if isinstance(image.tile[0].args, tuple) else 255
        if most > 255 and (image.mode, most) != ("I", 65535):
            raise ImageError(
                f"values up to {most}, which are scaled before --value-range could be applied: write a PNG"
            )
    image.load()
    return to_rgb(image, pixels, note)


def _from_deep_png(file: BinaryIO, pixels: PixelOptions, note: Note) -> Image.Image:
    """A PNG of 16-bit colours, or grey with alpha, with all bits; of it Pillow reads the high bytes alone."""
    if importlib.util.find_spec("imagecodecs") is None:
        raise ImageError(f"a PNG of colours of 16 bits: {NO_TIFF}")
    import imagecodecs

    file.seek(0)
    values = imagecodecs.png_decode(file.read())  # a transparent colour becomes a band of alpha
    colours = values.shape[2] - (values.shape[2] + 1) % 2
    if pixels.bands is not None:
        _check_bands(pixels.bands, values.shape[2])
        values, colours = values[..., [band - 1 for band in pixels.bands]], len(pixels.bands)
    return _composed(values, colours, SampleType("u", 16), pixels, tiff.UNASSOCIATED, note)


def _from_tiff_bands(
    file: BinaryIO, header: tiff.TiffHeader, pixels: PixelOptions, claim: Callable[[int], None], note: Note
) -> Image.Image:
    """RGB of a TIFF that tifffile reads, as stored, not turned."""
    bands, alpha = tiff.choose_bands(header, pixels.bands)
    read = (*bands, len(bands) + 1) if alpha else bands
    count = header.width * header.height
    segment = math.prod(header.tile) * header.itemsize * (1 if header.planar else header.samples)
    needed = count * (len(read) * (3 * header.itemsize + 2) + 8) + 3 * segment
    claim(max(count, needed // DECODING_BYTES))
    values = tiff.read_bands(file, header, read)
    inverted = header.photometric == tiff.WHITE_IS_ZERO
    return _composed(values, len(bands), header.sample, pixels, alpha, note, inverted)


def _composed(
    values: np.ndarray,
    colours: int,
    sample: SampleType,
    pixels: PixelOptions,
    alpha: int,
    note: Note,
    inverted: bool = False,
) -> Image.Image:
    """RGB from (height, width, bands) values: `colours` bands (1 grey, 3 RGB, 4 CMYK), and one of alpha behind them."""
    layer = _mapped(values[..., :colours], sample, pixels, note)
    if inverted:
        np.subtract(255, layer, out=layer)
    size, mode = (values.shape[1], values.shape[0]), {1: "L", 3: "RGB", 4: "CMYK"}[colours]
    if values.shape[2] == colours:
        picture = Image.frombytes(mode, size, layer.tobytes())
        return picture if mode == "RGB" else picture.convert("RGB")
    opacity, _ = map_to_bytes(values[..., colours:], sample, PixelOptions(value_range="full"))
    mode = {"L": "LA", "RGB": "RGBA"}[mode].replace("A", "a" if alpha == tiff.ASSOCIATED else "A")
    return _over_white(Image.frombytes(mode, size, np.concatenate([layer, opacity], axis=2).tobytes()), note)


def _mapped(values: np.ndarray, sample: SampleType, pixels: PixelOptions, note: Note) -> np.ndarray:
    """`values` as 0..255, uint8."""
    mapped, nans = map_to_bytes(values, sample, pixels)
    if nans:
        note(NOT_A_NUMBER)
    return mapped


def _sample_type(image: Image.Image) -> SampleType | None:
    """The type of the values of an image of one band; None for unsigned values of 8 bits or fewer."""
    bits, signed = _tag(image, BITS_PER_SAMPLE, 0), _tag(image, SAMPLE_FORMAT, 1) == 2
    if image.mode.startswith("I;16"):
        return SampleType("u", bits or 16)
    if image.mode == "I" and image.format in ("PPM", "PNG"):
        return SampleType("u", 16)
    if image.mode == "I":
        return SampleType("u" if bits and not signed else "i", bits or 32)
    if image.mode == "F":
        return SampleType("f", 32)
    return SampleType("i", 8) if image.mode == "L" and signed else None


def _values(image: Image.Image, sample: SampleType) -> np.ndarray:
    """The values of an image of one band, with the sign that they have in the file."""
    values = np.asarray(image)
    if sample in (SampleType("i", 8), SampleType("u", 32)):
        return values.view(f"{sample.kind}{values.dtype.itemsize}")
    return values


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """The first value of a tag of a TIFF."""
    value = getattr(image, "tag_v2", {}).get(tag, default) if image.format == "TIFF" else default
    return int(value[0] if isinstance(value, tuple) else value)


def _rawmode(image: Image.Image) -> str:
    """How Pillow names the stored pixels, before they are decoded."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _is_deep(image: Image.Image) -> bool:
    """Whether its values have more than 8 bits, as far as Pillow tells; before it is decoded."""
    return (
        image.mode.startswith(("I", "F")) or bool(DEEP.search(_rawmode(image))) or _tag(image, BITS_PER_SAMPLE, 8) > 8
    )


def _png_transparency(rawmode: str, transparency: object) -> object:
    """The transparent value of a PNG in the scale of Pillow's pixels, which spreads 1, 2 and 4 bits over 0..255."""
    bits = {"1": 1, "L;2": 2, "L;4": 4}.get(rawmode)
    if bits is None or not isinstance(transparency, int):
        return transparency
    most = (1 << bits) - 1
    return min(transparency, most) * 255 // most  # some versions of Pillow give 255 for 1


def _check_bands(bands: tuple[int, ...] | None, count: int) -> None:
    if bands is not None and max(bands) > count:
        raise ImageError(f"band {max(bands)} is not in it: it has {plural(count, 'band')}")


def _picked(image: Image.Image, bands: tuple[int, ...]) -> Image.Image:
    """Some bands of an image of 8 bits as grey or RGB; those of a palette, CMYK or YCbCr are red, green and blue."""
    plain = {"1": "L", "L": "L", "La": "LA", "LA": "LA", "RGBa": "RGBA", "RGBA": "RGBA"}.get(image.mode, "RGB")
    channels = (image if image.mode == plain else image.convert(plain)).split()
    _check_bands(bands, len(channels))
    return Image.merge("RGB", [channels[band - 1] for band in (bands * 3)[:3]])


def _rescaled(rgb: Image.Image, pixels: PixelOptions, white_is_zero: bool) -> Image.Image:
    """An RGB image of 8 bits, with the range of `pixels` mapped to 0..255."""
    if not pixels.rescales:
        return rgb
    values = np.asarray(rgb)
    mapped, _ = map_to_bytes(255 - values if white_is_zero else values, SampleType("u", 8), pixels)
    return Image.fromarray(255 - mapped if white_is_zero else mapped)


def _over_white(layer: Image.Image, note: Note) -> Image.Image:
    """An image over white, as RGB."""
    if layer.mode == "L":
        return layer.convert("RGB")
    layer = (layer.convert("LA") if layer.mode == "La" else layer).convert("RGBA")
    if layer.getchannel("A").getextrema()[0] < 255:
        note(TRANSPARENCY)
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*BACKGROUND, 255)), layer).convert("RGB")


def _is_flat(rgb: Image.Image) -> bool:
    """Whether nearly all values of each channel lie within few of 256."""
    counts = np.array(rgb.histogram()).reshape(3, 256).cumsum(axis=1)
    rest = FLAT_SHARE * counts[0, -1]
    lowest, highest = (counts > rest).argmax(axis=1), (counts >= counts[0, -1] - rest).argmax(axis=1)
    return bool((highest - lowest).max() <= FLAT_RANGE)


def _ignore(_: object) -> None:
    """Takes what nobody asked for."""
