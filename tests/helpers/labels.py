"""Label files that tests read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def coco_file(
    path: Path,
    annotations: Sequence[Any],
    images: Sequence[Any] | Mapping[str, tuple[int, int]] = (),
    categories: Sequence[Any] = ({"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}),
) -> str:
    """A COCO file; `images` may be (height, width) by name, with ids from 1 on. Returns its path."""
    if isinstance(images, Mapping):
        images = [
            {"id": number, "file_name": name, "height": height, "width": width}
            for number, (name, (height, width)) in enumerate(images.items(), 1)
        ]
    content = {"images": list(images), "annotations": list(annotations), "categories": list(categories)}
    path.write_text(json.dumps(content))
    return str(path)


def box(image_id: Any, category_id: Any, bbox: Any, **more: Any) -> dict[str, Any]:
    """A COCO annotation."""
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def files(folder: Path, contents: Mapping[str, str | bytes]) -> Path:
    """A folder with these files."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
