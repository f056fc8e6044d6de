"""Decoding of image files to upright 8-bit RGB: EXIF orientation, transparency, 16-bit values, limits."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fpnx.core.errors import ImageError
from fpnx.core.text import escape
from fpnx.core.warning_filters import ignored_warnings
from fpnx.images.reading import ImageSource, open_source

__all__ = ["PixelBudget", "to_rgb", "decode", "pillow_limits", "upright_size"]

# Magic bytes of formats that Pillow checks further: a file that begins so, and is not recognised, is damaged.
DAMAGED = (
    ("TIFF", rb"II\*\0|MM\0\*"),
    ("AVIF", rb"(?s)....ftypavi[fs]"),
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG"),
)
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
BACKGROUND = (255, 255, 255)  # colour behind transparent pixels
EXIF_ORIENTATION = 0x0112
TILE_WIDTH, TILE_LENGTH = 0x0142, 0x0143  # TIFF tags
MAX_TILE_PIXELS = 1 << 20  # a TIFF tile may always have so many, even with a smaller limit
BYTES_PER_PIXEL, METADATA_BYTES = 16, 1 << 26  # limit on the file size: four 32-bit channels, and metadata
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


def upright_size(source: ImageSource, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels after EXIF orientation, from the header alone.

    Raises:
        ImageError: with the reason why it cannot be read.
    """
    with _opened(source, max_pixels, whole=False) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


class PixelBudget:
    """A limit on the pixels that all threads decode at the same time; a larger image is decoded alone.

    Decoding takes up to 27 bytes per pixel (measured: WebP with alpha and orientation), so `pixels` limits the memory.
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


def decode(source: ImageSource, max_pixels: int, claim: Callable[[int], None] | None = None) -> Image.Image:
    """Decode an image to upright 8-bit RGB: first frame, alpha over white, 16-bit grey scaled to 8 bits.

    Args:
        source: the image.
        max_pixels: largest number of pixels that it may have.
        claim: called with the number of pixels before they are decoded; see `PixelBudget`.

    Raises:
        ImageError: with the reason why it cannot be read.
    """
    with _opened(source, max_pixels) as image:
        if claim is not None:
            claim(image.width * image.height)
        image.load()
        transpose = TRANSPOSE.get(_orientation(image))
        rgb = to_rgb(image)
        return rgb.transpose(transpose) if transpose is not None else rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to 8-bit RGB; no value is clipped silently.

    Raises:
        ImageError: for floating-point or 32-bit values outside 0..1, whose scale is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # 0..65535 → 0..255, rounded
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise ImageError(f"{kind} values outside 0..1, whose scale is unknown: convert it to 8 or 16 bits")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*BACKGROUND, 255)), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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


@contextmanager
def _opened(source: ImageSource, max_pixels: int, whole: bool = True) -> Iterator[Image.Image]:
    """Open the file with Pillow; every error inside the block becomes an `ImageError` with a short reason."""
    try:
        if source.blocked:
            raise ImageError(source.blocked)
        most = BYTES_PER_PIXEL * max_pixels + METADATA_BYTES
        with open_source(source, most, whole) as file, _open_with_pillow(file) as image:
            _check_pixels(image, max_pixels)
            yield image
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out of memory: lower --workers, or refuse such images with --max-pixels") from error
    except OSError as error:
        raise ImageError(escape(error.strerror or str(error) or type(error).__name__)) from error
    except Exception as error:  # Pillow's decoders raise ValueError, SyntaxError, struct.error and more
        raise ImageError(escape(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)) from error


def _open_with_pillow(file: BinaryIO) -> Image.Image:
    """The image, its pixels not yet decoded; raises ImageError for anything else than an image."""
    Image.init()
    try:
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(512)
        reason = next((f"a damaged {kind} file" for kind, magic in DAMAGED if re.match(magic, start)), None)
        reason = reason or next((text for magic, text in NOT_IMAGES if magic.lower() in start.lower()), None)
        if not start:
            reason = "empty file"
        raise ImageError(reason or f"not an image that fpnx reads ({', '.join(FORMATS)})") from None


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(f"{image.height}×{image.width} pixels, over the limit of {max_pixels}")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    tile = int(tags.get(TILE_WIDTH) or 0) * int(tags.get(TILE_LENGTH) or 0)
    if tile > max(max_pixels, MAX_TILE_PIXELS):  # a small image may have a huge tile
        raise ImageError(f"tiles of {tile} pixels, over the limit of {max_pixels}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where it is missing or invalid."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data does not fail the image
        return 1
    return value if value in TRANSPOSE else 1
