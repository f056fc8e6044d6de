"""Photograph-like images made on the spot, for measuring where none are given."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["HEIGHT", "WIDTH", "fill", "make_images"]

HEIGHT, WIDTH, QUALITY = 768, 1024, 90
SLOPE = 1.2


def make_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write `count` JPEGs of 768×1024 whose amplitudes fall with spatial frequency as those of photographs do.

    The slope is the mean that Tolhurst, Tadmor and Chao found (Amplitude spectra of natural images, 1992), so they
    cost a decoder what photographs cost; noise or flat colour would not.
    """
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]) ** SLOPE
    frequency[0, 0] = np.inf
    paths = []
    for i in range(count):
        layers = [np.fft.irfft2(np.fft.rfft2(random.standard_normal((HEIGHT, WIDTH))) / frequency) for _ in range(3)]
        grey, red, blue = (layer / layer.std() for layer in layers)
        # Brightness varies far more than colour.
        picture = 118 + 52 * np.stack([grey + 0.25 * red, grey, grey + 0.25 * blue], axis=2)
        paths.append(folder / f"{i:06}.jpg")
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=QUALITY)
    return paths


def fill(folder: Path, files: Sequence[Path], count: int) -> None:
    """Have `count` images in `folder`: links to `files`, again and again in their order; copies where links fail."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        target = folder / f"{i:06}.jpg"  # the content decides how it is read, not the name
        if target.exists():
            continue
        try:
            target.symlink_to(files[i % len(files)].absolute())
        except OSError:
            shutil.copyfile(files[i % len(files)], target)
