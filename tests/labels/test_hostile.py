"""Label files with random damage are read, or refused in one line, and what is read can be used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpnx.core.errors import FpnxError
from fpnx.labels.geometry import fit_to_image
from fpnx.labels.matching import match_labels
from fpnx.labels.reading import read_labels
from fpnx.labels.semantic import class_map
from fpnx.labels.summary import summarize
from tests.helpers.labels import box

IMAGES = ["a.jpg", "b/c.jpg", "d.jpg"]
SIZES = [(20, 30), (30, 20), (40, 90)]
VALUES: list[Any] = [
    None, True, 0, -1, 1, 3, 0.5, 1e308, -1e308, float("nan"), float("inf"), 10**30, 10**400, 2**63, "", "a", "1",
    "\ud800", [], [1], {}, {"a": 1}, [[1, 2, 3, 4, 5, 6]],
]  # fmt: skip
VOC = (
    b'<?xml version="1.0"?><annotation><filename>a.jpg</filename><size><width>30</width><height>20</height></size>'
    b"<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax>"
    b"</bndbox></object></annotation>"
)
DATA = b"train: images\nnames:\n  0: cat\n  1: dog\nnc: 2\n"
LINES = b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.3 0.1 0.2 0.3\n"
TABLE = b'path,label\na.jpg,cat\nb/c.jpg,"dog"\nd.jpg,cat;dog\n'


def coco(draw: random.Random) -> dict[str, Any]:
    runs = ({"size": [20, 30], "counts": counts} for counts in ([100, 500], "0f1"))
    outlines: list[Any] = [[[1, 1, 9, 1, 9, 9]], *runs]
    return {
        "images": [{"id": i, "file_name": name, "height": 20, "width": 30} for i, name in enumerate(IMAGES)],
        "annotations": [
            box(draw.randrange(3), draw.choice([1, 3]), [1.0, 2, 3, 4 + i], area=4, segmentation=draw.choice(outlines))
            for i in range(6)
        ],
        "categories": [{"id": 1, "name": "x"}, {"id": 3, "name": "y"}],
    }


def with_other_values(draw: random.Random, held: Any) -> Any:
    """Replace or remove one to three values anywhere in it."""
    for _ in range(draw.randrange(1, 4)):
        inner = held
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = draw.choice(keys)
            if not isinstance(inner[key], (dict, list)) or not inner[key] or draw.random() < 0.2:
                break
            inner = inner[key]
        if draw.random() < 0.1 and inner is not held:
            del inner[key]
        else:
            inner[key] = draw.choice(VALUES)
        if not all(held.get(name) for name in ("images", "annotations", "categories")):
            break
    return held


def with_other_bytes(draw: random.Random, content: bytes) -> bytes:
    """Change, remove and repeat some bytes."""
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 5)):
        place, kind = draw.randrange(len(changed) or 1), draw.random()
        if kind < 0.5 and changed:
            changed[place] = draw.choice(b"0 ;,\"'<>{}[]&:\n\x00\xff9e-.")
        elif kind < 0.7:
            del changed[place : place + draw.randrange(1, 20)]
        elif kind < 0.9:
            changed[place:place] = changed[place : place + draw.randrange(1, 30)]
        else:
            del changed[place:]
    return bytes(changed)


def damaged(draw: random.Random, kind: str, folder: Path) -> Path:
    """A damaged file of this format, or a folder with one."""
    path = folder / "labels"
    if kind == "values":
        path.write_text(json.dumps(with_other_values(draw, coco(draw))))
    elif kind == "yolo":
        path = folder / "data.yaml"
        path.write_bytes(with_other_bytes(draw, DATA) if draw.random() < 0.5 else DATA)
        (folder / "a.txt").write_bytes(with_other_bytes(draw, LINES))
        (folder / "d.txt").write_bytes(LINES)
    else:
        content = {"coco": json.dumps(coco(draw)).encode(), "voc": VOC, "csv": TABLE}[kind]
        path.write_bytes(with_other_bytes(draw, content))
    return path


@pytest.mark.parametrize("kind", ["values", "coco", "voc", "csv", "yolo"])
def test_damage_is_no_traceback(kind: str, tmp_path: Path) -> None:
    read, refused = 0, []
    for seed in range(150):
        draw = random.Random(seed)
        path = damaged(draw, kind, tmp_path)
        try:
            labels = read_labels(path, IMAGES, "/x", draw.choice([None, None, "semantic"]))
            matched = match_labels(labels, IMAGES, "/x")
        except FpnxError as error:
            refused.append(str(error))
            continue
        read += 1
        summary = summarize(labels, matched, SIZES)
        json.dumps(summary.to_json())
        assert all(len(line.splitlines()) == 1 for line in summary.lines()), seed
        for index, size in zip(matched.indices, SIZES, strict=True):
            if index is None:
                continue
            objects = fit_to_image(labels.images[index], size).labels
            if objects.boxes is not None:
                assert len(objects.boxes) == len(objects.classes) == len(objects.crowd), seed
                assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all(), seed
                assert (objects.boxes >= 0).all(), seed
                assert (objects.boxes <= [size[1], size[0]] * 2).all(), seed
            assert (objects.classes < len(labels.categories)).all(), seed
            if labels.task == "semantic":
                try:
                    classes = class_map(labels, labels.images[index], size)
                except FpnxError as error:
                    assert "decoded" in str(error), seed  # noqa: PT017
                else:
                    assert np.isin(classes, [*range(len(labels.categories)), 255]).all(), seed
    assert all(len(message.splitlines()) == 1 for message in refused)
    # Damage of both kinds: that can be passed over, and that cannot. That of XML cannot, as a rule.
    assert len(refused) > 5
    assert read > 5 or kind == "voc"
