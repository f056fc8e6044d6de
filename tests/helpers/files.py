"""Files that tests read: where the project is, small pictures, archives."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from fpnx.images.reading import ImageSource

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "sample_images"
DATA = ROOT / "tests" / "data"


def noise_image(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth random picture of `size` (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 2, size[0] // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def copied(samples: Path, folder: Path, count: int) -> Path:
    """A folder of `count` copies of the sample photographs."""
    folder.mkdir()
    pictures = sorted(p for p in samples.rglob("*.jpg"))
    for i in range(count):
        shutil.copy(pictures[i % len(pictures)], folder / f"{i:05}.jpg")
    return folder


def archive(contents: dict[str, bytes]) -> bytes:
    """A plain tar of `contents`, by member name."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return held.getvalue()


def image_source(path: Path) -> ImageSource:
    """An image file as it is listed now."""
    stat = path.stat()
    return ImageSource(path.name.encode(), os.fsencode(path), stat.st_size, stat.st_mtime_ns)
