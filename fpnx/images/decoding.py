"""Image files to upright 8-bit RGB, with EXIF orientation, or the reason why not."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fpnx.core.errors import ImageError
from fpnx.core.text import escape
from fpnx.images.reading import ImageSource, open_source

__all__ = ["PixelBudget", "to_rgb", "decode", "pillow_limits", "upright_size"]

# What Pillow recognises by more than its beginning: these begin right, and are broken further on.
DAMAGED = (
    ("TIFF", rb"II\*\0|MM\0\*"),
    ("AVIF", rb"(?s)....ftypavi[fs]"),
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG"),
)
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
BACKGROUND = (255, 255, 255)  # what shows through transparency, as on a page
ORIENTATION = 0x0112
TILE_WIDTH, TILE_LENGTH = 0x0142, 0x0143
LARGEST_TILE = 1 << 20  # pixels that a TIFF's tile may have, however small the limit
BYTES_A_PIXEL, MORE_BYTES = 16, 1 << 26  # how large a file may be: four channels of 32 bits, and what goes with them
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


NOT_IMAGES = (  # how files that pretend to be images begin
    (b"version https://git-lfs", "a git-lfs pointer, not the image itself: run `git lfs pull`"),
    (b"<svg", "an SVG drawing, not pixels"),
    (b"<!doctype html", "an HTML page, not an image"),
    (b"<html", "an HTML page, not an image"),
    (b"%!PS", "PostScript, which fpnx does not run"),
    (b"%PDF", "a PDF document, not an image"),
)


def upright_size(source: ImageSource, max_pixels: int) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header alone.

    Raises:
        ImageError: with the reason why it cannot be read.
    """
    with _opened(source, max_pixels, whole=False) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


class PixelBudget:
    """How many pixels may be under decoding at once, over all threads; a larger image waits until it is alone.

    Decoding takes up to 27 bytes a pixel (measured: WebP with alpha and orientation), so that `pixels` bounds it.
    """

    def __init__(self, pixels: int) -> None:
        self._free, self._limit, self._changed = pixels, pixels, threading.Condition()

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that claims pixels, waiting for them; they are given back at the end."""
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
    """The upright 8-bit RGB picture: first frame, alpha over white, 16-bit grey scaled to 8 bits.

    `claim` hears the number of pixels before any is decoded; see `PixelBudget`.

    Raises:
        ImageError: with the reason why it cannot be read.
    """
    with _opened(source, max_pixels) as image:
        if claim is not None:
            claim(image.width * image.height)
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        picture = to_rgb(image)
        return picture.transpose(turn) if turn is not None else picture


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, with nothing clipped silently.

    Raises:
        ImageError: for floating-point or 32-bit values outside 0..1, whose scale nobody knows.
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
    """Leave the limit on pixels to `max_pixels`, and keep Pillow's remarks on odd files off the terminal."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _opened(source: ImageSource, max_pixels: int, whole: bool = True) -> Iterator[Image.Image]:
    """The file opened by Pillow; whatever goes wrong inside becomes an `ImageError` with a short reason."""
    try:
        if source.blocked:
            raise ImageError(source.blocked)
        most = BYTES_A_PIXEL * max_pixels + MORE_BYTES  # texts and profiles are read whole
        with open_source(source, most, whole) as file, _recognised(file) as image:
            _check_pixels(image, max_pixels)
            yield image
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out of memory: lower --workers, or refuse such images with --max-pixels") from error
    except OSError as error:
        raise ImageError(escape(error.strerror or str(error) or type(error).__name__)) from error
    except Exception as error:  # decoders raise ValueError, SyntaxError, struct.error and more
        raise ImageError(escape(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)) from error


def _recognised(file: BinaryIO) -> Image.Image:
    Image.init()
    try:
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(512)
        reason = next((f"a damaged {kind} file" for kind, mark in DAMAGED if re.match(mark, start)), None)
        reason = reason or next((why for mark, why in NOT_IMAGES if mark.lower() in start.lower()), None)
        if not start:
            reason = "empty file"
        raise ImageError(reason or f"not an image that fpnx reads ({', '.join(FORMATS)})") from None


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(f"{image.height}×{image.width} pixels, over the limit of {max_pixels}")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    tile = int(tags.get(TILE_WIDTH) or 0) * int(tags.get(TILE_LENGTH) or 0)
    if tile > max(max_pixels, LARGEST_TILE):  # a small picture can be cut from a huge tile
        raise ImageError(f"tiles of {tile} pixels, over the limit of {max_pixels}")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF is no reason to lose the picture
        return 1
    return value if value in UPRIGHT else 1
