"""Images of the types that Python code holds (paths, Pillow images, arrays, tensors) as upright RGB Pillow images."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from fpnx.core.config import InputConfig
from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.pixel_options import PixelOptions
from fpnx.core.text import escape
from fpnx.images.decoding import decode, upright_rgb
from fpnx.images.reading import locate

__all__ = ["ImageLike", "to_picture"]

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor"


def to_picture(image: Any, pixels: PixelOptions) -> Image.Image:
    """An image as an upright 8-bit RGB Pillow image.

    Args:
        image: a path, a Pillow image of any mode, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W) on any device;
            arrays and tensors are RGB, 0..255. Paths and Pillow images are turned by their EXIF orientation.
        pixels: which bands and values are read of paths and Pillow images.

    Raises:
        ImageError: an image that cannot be read.
        FpnxError: anything else than an image.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read(os.fsencode(image), pixels)
    if isinstance(image, Image.Image):
        if not (image.width and image.height):
            raise _not_an_image("a Pillow image without pixels")
        try:
            return upright_rgb(image, pixels)
        except (OSError, ValueError) as error:  # a lazily read file
            raise ImageError(f"an image that Pillow cannot read: {error}") from error
    if isinstance(image, torch.Tensor):
        if image.layout != torch.strided or image.is_meta:
            raise _not_an_image("a tensor that is sparse or without values")
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise _not_an_image(f"a tensor {tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}")
        return Image.fromarray(image.detach().permute(1, 2, 0).cpu().contiguous().numpy())
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise _not_an_image(f"an array {image.shape} of {image.dtype}")
        return Image.fromarray(np.ascontiguousarray(image))
    raise _not_an_image(f"an object of type {type(image).__name__}")


def _read(path: bytes, pixels: PixelOptions) -> Image.Image:
    try:
        return decode(locate(path), InputConfig.max_pixels, pixels=pixels)
    except ImageError as error:
        raise ImageError(f"{escape(path)}: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{escape(path)}: {escape(reason)}") from error


def _not_an_image(what: str) -> FpnxError:
    return FpnxError(
        f"{what} is not an image: take a path, a Pillow image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W), "
        "or a list of them"
    )
