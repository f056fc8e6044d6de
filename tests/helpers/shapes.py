"""Shapes drawn on noise, with labels in every format: data on which a head can be trained within seconds.

A square is red, a circle green, a triangle blue, so that also features of random weights tell them apart. FCOS on
levels P2 to P4 of a mobilenet_v2 with random weights, 32 channels, has AP50 above 0.99 after 10 epochs of 48 scenes of
48 × 48 pixels (batches of 4, AdamW with a learning rate of 0.005, one cycle).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("square", "circle", "triangle")
CATEGORY_IDS = (2, 5, 9)  # in COCO files: neither from 0 nor without gaps
COLORS = np.array([[225, 40, 40], [40, 200, 40], [50, 70, 235]])
SIDES = ((0.22, 0.3), (0.3, 0.42), (0.42, 0.6))  # of small, medium and large shapes, relative to the image
CORNERS = 48  # of a circle's polygon
NOISE = (90, 166)
GAP = 2  # pixels between shapes


@dataclass(frozen=True)
class Shape:
    """One shape.

    Attributes:
        kind: index into `CLASSES`.
        box: (4,) x1, y1, x2, y2 in pixels, as its mask fills them.
        polygon: x1, y1, x2, y2, … in pixels.
        mask: (H, W) bool.
    """

    kind: int
    box: np.ndarray
    polygon: list[float]
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """An image of shapes that do not touch.

    Attributes:
        name: of its file.
        pixels: (H, W, 3) uint8.
        shapes: in no order.
    """

    name: str
    pixels: np.ndarray
    shapes: tuple[Shape, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def classes(self) -> np.ndarray:
        """(H, W) uint8: 0 is background, then the shapes by `kind` + 1."""
        classes = np.zeros(self.size, np.uint8)
        for shape in self.shapes:
            classes[shape.mask] = shape.kind + 1
        return classes


def draw_scenes(count: int, seed: int = 0, size: tuple[int, int] = (64, 64), shapes: int = 3) -> list[Scene]:
    """`count` scenes of `size` (height, width) with 1 to `shapes` shapes each; the classes take turns."""
    draw = np.random.default_rng(seed)
    return [_draw_scene(draw, number, size, shapes) for number in range(count)]


def write_images(folder: Path, scenes: Sequence[Scene]) -> Path:
    """`folder/images/0000.png`, …; the images' folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        Image.fromarray(scene.pixels).save(folder / "images" / scene.name)
    return folder / "images"


def write_coco(folder: Path, scenes: Sequence[Scene], outlines: str = "polygons") -> Path:
    """Images and `annotations.json` with outlines as `"polygons"`, `"rle"`, or `"none"`; the JSON file."""
    write_images(folder, scenes)
    images, annotations = [], []
    for number, scene in enumerate(scenes):
        height, width = scene.size
        images.append({"id": 100 + number, "file_name": scene.name, "height": height, "width": width})
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box.tolist()
            annotation = {
                "id": len(annotations) + 1, "image_id": 100 + number, "category_id": CATEGORY_IDS[shape.kind],
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(shape.mask.sum()), "iscrowd": 0,
            }  # fmt: skip
            if outlines == "polygons":
                annotation["segmentation"] = [shape.polygon]
            elif outlines == "rle":
                annotation["segmentation"] = {"size": [height, width], "counts": _run_lengths(shape.mask)}
            annotations.append(annotation)
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    file = folder / "annotations.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def write_yolo(folder: Path, scenes: Sequence[Scene], polygons: bool = False) -> Path:
    """Images, `labels/0000.txt` with boxes or polygons, and `data.yaml`; the YAML file."""
    write_images(folder, scenes)
    (folder / "labels").mkdir(exist_ok=True)
    for scene in scenes:
        height, width = scene.size
        lines = []
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box.tolist()
            numbers = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            if polygons:
                numbers = shape.polygon
            shares = [value / (height if i % 2 else width) for i, value in enumerate(numbers)]
            lines.append(" ".join([str(shape.kind), *(f"{share:.6f}" for share in shares)]))
        (folder / "labels" / Path(scene.name).with_suffix(".txt")).write_text("".join(f"{line}\n" for line in lines))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    file = folder / "data.yaml"
    file.write_text(f"path: .\ntrain: images\nval: images\nnames:\n{names}")
    return file


def write_voc(folder: Path, scenes: Sequence[Scene]) -> Path:
    """Images and `Annotations/0000.xml`; their folder. Coordinates are from 1 on and include the last pixel."""
    write_images(folder, scenes)
    (folder / "Annotations").mkdir(exist_ok=True)
    for scene in scenes:
        height, width = scene.size
        objects = ""
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box.astype(int).tolist()
            objects += (
                f"<object><name>{CLASSES[shape.kind]}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>\n"
            )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{scene.name}</filename>{size}\n{objects}</annotation>\n"
        (folder / "Annotations" / Path(scene.name).with_suffix(".xml")).write_text(text)
    return folder / "Annotations"


def write_masks(folder: Path, scenes: Sequence[Scene], palette: bool = False) -> Path:
    """Images and `masks/0000.png` with `Scene.classes`, grey or with a palette; the masks' folder."""
    write_images(folder, scenes)
    (folder / "masks").mkdir(exist_ok=True)
    for scene in scenes:
        mask = Image.fromarray(scene.classes)
        if palette:
            mask = mask.copy()
            mask.putpalette([0, 0, 0, *COLORS.ravel().tolist()])
        mask.save(folder / "masks" / Path(scene.name).with_suffix(".png"))
    return folder / "masks"


def write_folders(folder: Path, scenes: Sequence[Scene]) -> Path:
    """`folder/<class>/0000.png`, …, each by the class of its first shape; `folder`."""
    for scene in scenes:
        place = folder / CLASSES[scene.shapes[0].kind]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.pixels).save(place / scene.name)
    return folder


def _draw_scene(draw: np.random.Generator, number: int, size: tuple[int, int], most: int) -> Scene:
    height, width = size
    pixels = draw.integers(*NOISE, (height, width, 3)).astype(np.float64)
    taken = np.zeros(size, bool)
    shapes: list[Shape] = []
    wanted = int(draw.integers(1, most + 1))
    while len(shapes) < wanted:
        # Sizes and places are drawn until one is free; the first one always is.
        low, high = SIDES[draw.integers(len(SIDES))]
        side = round(draw.uniform(low, high) * min(size))
        x, y = int(draw.integers(0, width - side + 1)), int(draw.integers(0, height - side + 1))
        around = taken[max(0, y - GAP) : y + side + GAP, max(0, x - GAP) : x + side + GAP]
        if around.any():
            wanted -= draw.random() < 0.05
            continue
        shape = _shape((number + len(shapes)) % len(CLASSES), x, y, side, size)
        pixels[shape.mask] = COLORS[shape.kind] + draw.normal(0, 12, (int(shape.mask.sum()), 3))
        taken |= shape.mask
        shapes.append(shape)
    return Scene(f"{number:04}.png", pixels.clip(0, 255).astype(np.uint8), tuple(shapes))


def _shape(kind: int, x: int, y: int, side: int, size: tuple[int, int]) -> Shape:
    """A shape in the square of `side` at (x, y). A pixel belongs to it where its centre does."""
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    corners = {
        "square": np.array([[0, 0], [1, 0], [1, 1], [0, 1]]),
        "circle": 0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1),
        "triangle": np.array([[0.5, 0], [1, 1], [0, 1]]),
    }[CLASSES[kind]]
    rows, columns = (np.indices(size) + 0.5 - np.array([y, x]).reshape(2, 1, 1)) / side
    inside = {
        "square": (rows > 0) & (rows < 1) & (columns > 0) & (columns < 1),
        "circle": np.hypot(rows - 0.5, columns - 0.5) < 0.5,
        "triangle": (rows < 1) & (np.abs(columns - 0.5) < rows / 2),
    }[CLASSES[kind]]
    ys, xs = np.where(inside)
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float64)
    return Shape(kind, box, (corners * side + [x, y]).ravel().tolist(), inside)


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed runs: down the columns, those of 0 first."""
    flat = np.concatenate([[False], mask.flatten(order="F")])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
