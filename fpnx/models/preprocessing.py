"""Preprocessing recipes: resizing, normalisation and padding of an image for the network."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fpnx.core.config import InputConfig
from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.pixel_options import PixelOptions

__all__ = ["Recipe", "scaled_size"]

PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) of an image of `size` at `scale`, rounded up."""
    return math.ceil(size[0] * scale), math.ceil(size[1] * scale)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The preprocessing of an upright RGB image, in this order: resize, scale, normalise, pad.

    Attributes:
        bands, source_range: how the 8-bit RGB image is made from a file, where options say so: see
            `fpnx.core.pixel_options.PixelOptions`.
        sizing: `"stretch"` to `height` × `width`; `"aspect"`: shorter side to `short_side`, longer side at most
            `long_side`; or `"native"`: no resizing.
        rounding: of sizes with `"aspect"`: `"floor"` (`torchvision.transforms.Resize`), `"scaled-floor"`
            (`torchvision.models.detection`), `"scaled-half-up"` (int(x + 0.5); mmdetection) or `"stepwise-half-up"`
            (first to the short side, then to the long one; detectron2).
        backend: `"pillow"`: antialiased, on 8-bit pixels; `"tensor"`: the bilinear interpolation of
            `torch.nn.functional` on floats, without antialiasing, as detectors do.
        resampling: `"nearest"`, `"bilinear"`, `"bicubic"` or `"lanczos"`; `"tensor"` is bilinear only.
        value_range: pixels are scaled to 0..`value_range`.
        order: channel order of the input, `"RGB"` or `"BGR"`.
        mean, std: subtracted from the scaled pixels, and then divided by, for each channel in `order`.
        pad_multiple: height and width are padded at the bottom and right with zeros to a multiple of this; where it is
            `long_side`, to a square.
    """

    sizing: str = "stretch"
    height: int | None = None
    width: int | None = None
    short_side: int | None = None
    long_side: int | None = None
    rounding: str = "floor"
    backend: str = "pillow"
    resampling: str = "bilinear"
    value_range: float = 1.0
    order: str = "RGB"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pad_multiple: int = 1
    bands: tuple[int, ...] | None = None
    source_range: str | None = None

    def sized(self, config: InputConfig) -> Recipe:
        """This recipe with the sizing, bands and value range of `config`, where it sets them.

        One that pads to a square pads to the new square where the asked sides are equal, else not at all.
        """
        if self.pad_multiple == self.long_side and (config.short_side is not None or config.size != "recipe"):
            side = config.long_side if config.long_side == config.short_side else None
            return replace(self, pad_multiple=side or 1, long_side=None).sized(config)
        read = replace(self, bands=config.pixels.bands, source_range=config.pixels.value_range)
        if config.short_side is not None:
            return replace(
                read,
                sizing="aspect",
                height=None,
                width=None,
                short_side=config.short_side,
                long_side=config.long_side,
            )
        if config.size == "native":
            return replace(read, sizing="native", height=None, width=None, short_side=None, long_side=None)
        if not isinstance(config.size, tuple):
            return read
        height, width = config.size
        return replace(read, sizing="stretch", height=height, width=width, short_side=None, long_side=None)

    @property
    def pixels(self) -> PixelOptions:
        """Which bands and values of an image file are read."""
        return PixelOptions(self.bands, self.source_range)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) of every input, padding included; None if it depends on the image."""
        if self.sizing != "stretch" or self.height is None or self.width is None:
            return None
        return self.padded((self.height, self.width))

    def input_size(self, source: tuple[int, int], max_pixels: int | None = None, scale: float = 1.0) -> tuple[int, int]:
        """(height, width) of an image of `source` (height, width) after resizing, before padding.

        Raises:
            ImageError: at `scale` times that size it would have more than `max_pixels` pixels.
        """
        if self.sizing == "stretch":
            assert self.height is not None
            assert self.width is not None
            size = (self.height, self.width)
        elif self.sizing == "native":
            size = source
        else:
            size = self._aspect_size(*source)
        height, width = scaled_size(size, scale)
        if max_pixels is not None and height * width > max_pixels:
            coarser = "" if scale == 1 else " or coarser --levels"
            raise ImageError(
                f"the model's input would be {height}×{width} pixels, over the limit of {max_pixels}: "
                f"take a smaller --size{coarser}, or raise --max-pixels"
            )
        return size

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """`size` (height, width) after padding."""
        height, width = (-(-side // self.pad_multiple) * self.pad_multiple for side in size)
        return height, width

    def resize(self, picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Resize an RGB image to `size` (height, width): (height, width, 3), 0..255, uint8 (`"pillow"`) or float32."""
        if picture.size == size[::-1]:
            return np.asarray(picture)
        if self.backend == "pillow":
            return np.asarray(picture.resize(size[::-1], PILLOW[self.resampling]))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        return resized[0].permute(1, 2, 0).contiguous().numpy()

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) pixels, 0..255 → (B, 3, H, W) float32, normalised, in channels-last memory format, unpadded."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        if self.order == "BGR":
            images = images.flip(1).contiguous(memory_format=torch.channels_last)
        if images.data_ptr() == pixels.data_ptr():
            images = images.clone(memory_format=torch.channels_last)
        if self.value_range != 255.0:
            images.mul_(self.value_range).div_(255.0) if self.value_range != 1.0 else images.div_(255.0)
        return images.sub_(_by_channel(self.mean, images.device)).div_(_by_channel(self.std, images.device))

    def pad(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Pad normalised images (B, 3, H, W) at the bottom and right with zeros to `size` (height, width)."""
        height, width = images.shape[-2:]
        if (height, width) == size:
            return images
        return F.pad(images, (0, size[1] - width, 0, size[0] - height))

    def batch(
        self, pixels: Sequence[np.ndarray], padded: tuple[int, int], device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The network's input for resized images (h, w, 3), 0..255, of one padded size.

        Args:
            pixels: of each image, as `resize` gives them.
            padded: (height, width) after padding.
            device: where it is made.

        Returns:
            (B, 3, H, W) float32, channels last.
        """
        if len({image.shape for image in pixels}) == 1:
            return self.pad(self.normalise(torch.from_numpy(np.stack(pixels)).to(device)), padded)
        each = [self.normalise(torch.from_numpy(np.stack([image])).to(device)) for image in pixels]
        return torch.cat([self.pad(image, padded) for image in each])

    def __call__(self, picture: Image.Image, scale: float = 1.0) -> torch.Tensor:
        """One RGB image → (3, H, W) float32 network input, padding included, at `scale` times the recipe's size."""
        size = self.input_size((picture.height, picture.width))
        pixels = self.resize(picture, scaled_size(size, scale))
        images = self.normalise(torch.from_numpy(np.array(pixels))[None])
        return self.pad(images, scaled_size(self.padded(size), scale))[0].contiguous()

    def __str__(self) -> str:
        sizing = {
            "stretch": f"stretched to {self.height}×{self.width}",
            "aspect": f"short side {self.short_side}" + (f", long side ≤ {self.long_side}" if self.long_side else ""),
            "native": "native size",
        }[self.sizing]
        resampling = self.resampling + (" antialiased" if self.backend == "pillow" else "")
        padding = f", padded to a multiple of {self.pad_multiple}" if self.pad_multiple > 1 else ""
        numbers = [" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std)]
        interpolation = "" if self.sizing == "native" else f", {resampling}"
        scale = f"0..{self.value_range:g} {self.order}"
        read = f"bands {','.join(map(str, self.bands))}, " if self.bands else ""
        read += f"values {self.source_range}, " if self.source_range else ""
        return f"{read}{sizing}{interpolation}, {scale}, mean {numbers[0]}, std {numbers[1]}{padding}"

    def to_json(self) -> dict[str, Any]:
        """The recipe as a JSON object, which `from_json` reads."""
        optional = {"bands", "source_range"}  # left out where unset, as before they existed
        return {name: value for name, value in asdict(self).items() if value is not None or name not in optional}

    @classmethod
    def from_json(cls, values: Any) -> Recipe:
        """The recipe from the values of `to_json`.

        Raises:
            FpnxError: other values.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise FpnxError(f"not a recipe: {str(values)[:80]}")
        choices = {
            "sizing": ("stretch", "aspect", "native"),
            "rounding": ("floor", "scaled-floor", "scaled-half-up", "stepwise-half-up"),
            "backend": ("pillow", "tensor"),
            "resampling": tuple(PILLOW),
            "order": ("RGB", "BGR"),
        }
        if any(name in values and values[name] not in allowed for name, allowed in choices.items()):
            raise FpnxError(f"not a recipe: {str(values)[:80]}")
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, (list, tuple))}
        return cls(**{**values, **tuples})

    def _aspect_size(self, height: int, width: int) -> tuple[int, int]:
        assert self.short_side is not None
        short, long = min(height, width), max(height, width)
        if self.rounding.startswith("scaled"):
            factor = self.short_side / short
            if self.long_side is not None:
                factor = min(factor, self.long_side / long)
            half = 0.5 if self.rounding == "scaled-half-up" else 0.0
            new_short, new_long = int(short * factor + half), int(long * factor + half)
        elif self.rounding == "stepwise-half-up":
            exact_short, exact_long = float(self.short_side), self.short_side / short * long
            if self.long_side is not None and exact_long > self.long_side:
                factor = self.long_side / exact_long
                exact_short, exact_long = exact_short * factor, exact_long * factor
            new_short, new_long = int(exact_short + 0.5), int(exact_long + 0.5)
        else:  # torchvision.transforms.Resize
            new_short, new_long = self.short_side, int(self.short_side * long / short)
            if self.long_side is not None and new_long > self.long_side:
                new_short, new_long = int(self.long_side * new_short / new_long), self.long_side
        new_short, new_long = max(new_short, 1), max(new_long, 1)
        return (new_short, new_long) if height <= width else (new_long, new_short)


@functools.lru_cache(maxsize=64)
def _by_channel(values: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """`values` as a (1, 3, 1, 1) float32 tensor, cached, because each copy to a GPU waits for the work queued on it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
