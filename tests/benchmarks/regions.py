"""`fpnx extract --boxes` against storing the pyramid: size on disk, processor time, and the numbers themselves.

Run: python tests/benchmarks/regions.py FOLDER [IMAGES] [ROUNDS]

FOLDER has photographs, which are linked under other names until there are so many. Each has seven boxes of random
places and sizes. The network is a MobileNetV2 with random parameters at 128×128, P2 to P5 of 256 channels. The runs
take turns, on one core; times are those of the processor, which load on the machine affects less than elapsed time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import MultiScaleRoIAlign

import fpnx
from fpnx.images.discovery import is_image

SIDE, BOXES, COMPARED = 128, 7, 50
FEW = 200  # images of the runs that are not measured
LEVELS = ("P2", "P3", "P4", "P5")
MODEL: dict[str, Any] = {"backbone": "mobilenet_v2", "weights": "random", "size": SIDE, "cpus": 1, "device": "cpu"}


def main(source: Path, count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="fpnx-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        labels = _images(source, folder / "images", count)
        kinds: dict[str, dict[str, Any]] = {"pyramid": {}, "7x7": {"boxes": str(labels)}}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        few = [str(path) for path in sorted((folder / "images").iterdir())[:FEW]]
        for kind, options in kinds.items():  # finds taps and sizes of batches, which is not counted
            fpnx.extract(few, folder / f"{kind}.h5", **MODEL, **options)
        fpnx.extract(few, folder / "avg.h5", roi_size="avg", **MODEL, **kinds["7x7"])
        for _ in range(rounds):
            for kind, options in kinds.items():
                started = time.process_time()
                fpnx.extract(folder / "images", folder / f"{kind}.h5", overwrite=True, **MODEL, **options)
                times[kind].append(1000 * (time.process_time() - started) / count)
        for kind, of_kind in times.items():
            size = (folder / f"{kind}.h5").stat().st_size / count
            each = f"{statistics.median(of_kind):.1f} ms an image ({', '.join(f'{ms:.1f}' for ms in of_kind)})"
            print(f"{kind}: {size / 1000:.1f} kB an image, {each}")
        print(f"avg: {(folder / 'avg.h5').stat().st_size / len(few) / 1000:.1f} kB an image")
        print(f"largest difference to MultiScaleRoIAlign: {_difference(folder):.1e} of the largest value")


def _images(source: Path, folder: Path, count: int) -> Path:
    """Link `count` images, and write their boxes; the COCO file."""
    folder.mkdir()
    found = sorted(path for path in source.rglob("*") if is_image(bytes(path)))
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        path = found[i % len(found)].resolve()
        (folder / f"{i:05}{path.suffix}").symlink_to(path)
        with Image.open(path) as picture:
            width, height = picture.size
        images.append({"id": i, "file_name": f"{i:05}{path.suffix}", "width": width, "height": height})
        for _ in range(BOXES):
            w, h = draw.uniform(0.05, 0.9, 2) * (width, height)
            x, y = draw.uniform(0, 1, 2) * (width - w, height - h)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": [x, y, w, h], "iscrowd": 0}
            )
    labels = folder.parent / "boxes.json"
    labels.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]})
    )
    return labels


def _difference(folder: Path) -> float:
    """Of the stored regions to torchvision's pooling of the stored pyramid, in shares of the largest value."""
    pool = MultiScaleRoIAlign(list(LEVELS), 7, sampling_ratio=2)
    largest = value = 0.0
    with fpnx.open(folder / "pyramid.h5") as maps, fpnx.open(folder / "7x7.h5") as regions:
        for i in range(0, len(maps), max(1, len(maps) // COMPARED)):
            item, own = maps[i], regions[i].regions
            levels = OrderedDict((level, torch.from_numpy(item[level])[None]) for level in LEVELS)
            height, width = item.source_size
            boxes = torch.from_numpy(own.box * np.array([SIDE / width, SIDE / height] * 2)).float()
            expected = pool(levels, [boxes], [(SIDE, SIDE)])
            largest = max(largest, float((expected - torch.from_numpy(own.features[:])).abs().max()))
            value = max(value, float(expected.abs().max()))
    return largest / value


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *["sample_images", "2000", "3"][len(sys.argv) - 1 :]]
    main(Path(arguments[0]), int(arguments[1]), int(arguments[2]))
