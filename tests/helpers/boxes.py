"""Pictures with random boxes, and label files of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.files import noise_image

CLASSES = {3: "cat", 7: "dog"}  # by the id that the label file has


def random_boxes(seed: int, count: int, size: tuple[int, int]) -> np.ndarray:
    """(count, 4) float64 boxes x1, y1, x2, y2 within an image of (height, width), small and large."""
    chance, (height, width) = np.random.default_rng(seed), size
    sides = np.exp(chance.uniform(np.log(0.02), 0, (count, 2))) * [width, height]
    corners = chance.uniform(0, 1, (count, 2)) * ([width, height] - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def coco_file(path: Path, boxes: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, int]]) -> Path:
    """A COCO file of boxes by image name; their classes alternate, 7 first. Sizes are (height, width)."""
    images = [
        {"id": 10 + i, "file_name": name, "height": sizes[name][0], "width": sizes[name][1]}
        for i, name in enumerate(boxes)
    ]
    annotations = [
        {
            "id": 1000 * i + k,
            "image_id": 10 + i,
            "category_id": (7, 3)[k % 2],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        for i, of_image in enumerate(boxes.values())
        for k, (x1, y1, x2, y2) in enumerate(of_image.tolist())
    ]
    categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def labelled_pictures(
    folder: Path, counts: Sequence[int], sizes: Sequence[tuple[int, int]] = ((64, 96), (96, 64), (80, 80))
) -> dict[str, np.ndarray]:
    """Make pictures `00.png`, `01.png` … in `folder`, of these (height, width) in turn, with so many boxes each, and
    `folder` + `.json` with their labels; returns the boxes by name. Of three boxes or more, the first is the image."""
    folder.mkdir()
    boxes, size_of = dict[str, np.ndarray](), dict[str, tuple[int, int]]()
    for i, count in enumerate(counts):
        name, size = f"{i:02}.png", sizes[i % len(sizes)]
        noise_image(i, (size[1], size[0])).save(folder / name)
        boxes[name], size_of[name] = random_boxes(i, count, size), size
        if count > 2:
            boxes[name][0] = [0, 0, size[1], size[0]]
    coco_file(folder.with_suffix(".json"), boxes, size_of)
    return boxes


def label_pictures(folder: Path, labels: Path, count: int) -> Path:
    """Write a COCO file with so many boxes for each picture in `folder`."""
    sizes = dict[str, tuple[int, int]]()
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            sizes[path.name] = (picture.height, picture.width)
    return coco_file(labels, {name: random_boxes(i, count, sizes[name]) for i, name in enumerate(sizes)}, sizes)
