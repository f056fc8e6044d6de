"""Files that tests read: where the project is, small pictures, archives."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from fpnx.images.reading import ImageSource

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "sample_images"
DATA = ROOT / "tests" / "data"
LINK_SHAPES = [
    "two links to one folder", "beside the folder", "to files", "to itself", "a loop of two", "a loop of three",
    "upward", "a link to a link", "broken", "absolute",
]  # fmt: skip


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


def found_by_find(folder: Path) -> list[bytes]:
    """The names of images that `find -L` lists; it names loops on stderr, and does not enter them."""
    done = subprocess.run(
        ["find", "-L", folder, "(", "-name", "*.png", "-o", "-name", "*.jpg", ")", "!", "-type", "d", "-print0"],
        capture_output=True,
    )
    return sorted(os.path.relpath(path, os.fsencode(folder)) for path in done.stdout.split(b"\0") if path)


def linked_folders(root: Path, shape: str) -> Path:
    """Folders with links of one shape, around `root / "sets"`, which is to be listed."""
    sets, shared = root / "sets", root / "shared"
    for folder in (sets / "one", sets / "two", shared / "deep"):
        folder.mkdir(parents=True)
    for folder in (root, sets, sets / "one", sets / "two", shared, shared / "deep"):
        noise_image(0, (8, 8)).save(folder / "a.png")
    links: dict[str, list[tuple[Path, str]]] = {
        "two links to one folder": [(sets / "one/val", "../../shared"), (sets / "two/val", "../../shared")],
        "beside the folder": [(sets / "zero", "one"), (sets / "three", "two"), (sets / "two/one", "../one")],
        "to files": [(sets / "b.png", "a.png"), (sets / "one/b.png", "../../shared/a.png")],
        "to itself": [(sets / "loop", ".")],
        "a loop of two": [(sets / "one/two", "../two"), (sets / "two/one", "../one")],
        "a loop of three": [
            (sets / "one/next", "../two"), (sets / "two/next", "../../shared"), (shared / "next", "../sets/one"),
        ],
        "upward": [(sets / "one/up", "../.."), (shared / "deep/up", "../..")],
        "a link to a link": [(root / "way", "shared"), (sets / "one/val", "../../way"), (sets / "val", "one/val/deep")],
        "broken": [(sets / "gone.png", "nothing.png"), (sets / "gone", "nothing"), (sets / "one/val", "../nothing")],
        "absolute": [(sets / "one/val", str(shared)), (sets / "one/deep", str(shared / "deep"))],
    }  # fmt: skip
    for link, target in links[shape]:
        link.symlink_to(target)
    return sets
