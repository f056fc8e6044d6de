"""Synthetic photograph-like JPEGs, and folders of any number of images linked from a few files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["HEIGHT", "WIDTH", "link_images", "make_images"]

HEIGHT, WIDTH, QUALITY = 768, 1024, 90
SLOPE = 1.2  # amplitude ~ frequency^-SLOPE


def make_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write `count` JPEGs of 768×1024 with the amplitude spectrum of photographs: amplitude ~ frequency^-1.2.

    The slope is the mean of Tolhurst, Tadmor and Chao, Amplitude spectra of natural images, 1992. Decoding them takes
    as long as decoding photographs, unlike noise or flat colour.
    """
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]) ** SLOPE
    frequency[0, 0] = np.inf
    paths = []
    for i in range(count):
        layers = [np.fft.irfft2(np.fft.rfft2(random.standard_normal((HEIGHT, WIDTH))) / frequency) for _ in range(3)]
        grey, red, blue = (layer / layer.std() for layer in layers)
        # brightness varies far more than colour
        picture = 118 + 52 * np.stack([grey + 0.25 * red, grey, grey + 0.25 * blue], axis=2)
        paths.append(folder / f"{i:06}.jpg")
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=QUALITY)
    return paths


def link_images(folder: Path, files: Sequence[Path], count: int) -> None:
    """Fill `folder` with `count` links to `files`, repeated in their order; copies where links cannot be made."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        target = folder / f"{i:06}.jpg"  # the format is read from the content, not the name
        if target.exists():
            continue
        try:
            target.symlink_to(files[i % len(files)].absolute())
        except OSError:
            shutil.copyfile(files[i % len(files)], target)
