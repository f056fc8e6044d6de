"""Make photographs of about 1024×768 from the sample images: crops, turns, light and noise, saved as JPEG.

Run: python tests/benchmarks/photographs.py FOLDER [COUNT]
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

SAMPLES = Path(__file__).resolve().parents[2] / "sample_images"


def make_photographs(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` JPEGs of quality 90 to `folder`, unless they are there."""
    if len(list(folder.glob("*.jpg"))) >= count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.rglob("*.jpg"))]
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    for i in range(count):
        picture = sources[i % len(sources)]
        width, height = 1024 + draw.randint(-64, 64), 768 + draw.randint(-48, 48)
        share = draw.uniform(0.6, 1.0)
        wide, high = picture.width * share, picture.height * share
        left, top = draw.uniform(0, picture.width - wide), draw.uniform(0, picture.height - high)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + wide, top + high))
        if draw.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = ImageEnhance.Brightness(picture).enhance(draw.uniform(0.7, 1.3))
        grain = noise.normal(0, 3, (height, width, 1))
        pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=90)


if __name__ == "__main__":
    make_photographs(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 300)
