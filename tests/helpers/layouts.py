"""Layouts of files without images, and features that tell which image they are of."""

from __future__ import annotations

import numpy as np

from fpnx.core.image_list import ImageList, ImageRecord
from fpnx.core.provenance import ModelPart, Provenance, WeightsInfo
from fpnx.core.validation import parse_size
from fpnx.store.file_layout import FileLayout

LEVELS = ("P4", "P5")
PROVENANCE = Provenance(
    weights=WeightsInfo(name="random", body=ModelPart.drawn(0), pyramid=ModelPart.drawn(0)),
    versions={},
    **dict.fromkeys(("recipe", "device", "precision", "time"), "as is"),
)


def layout_of(groups: list[str], errors: dict[int, str] | None = None, dtype: str = "float32") -> FileLayout:
    """Images called 0.png, 1.png … of the given groups; two levels of 2 channels."""
    rows = [groups[:i].count(name) if name else -1 for i, name in enumerate(groups)]
    sizes = [[int(n) for n in name.split("x")] if name else [0, 0] for name in groups]
    config = {"levels": list(LEVELS), "channels": 2, "backbone": "none", "dtype": dtype, "pool": "none"}
    return FileLayout(
        images=ImageList(b"/pictures", tuple(ImageRecord(b"%d.png" % i, 10 + i, i) for i in range(len(groups)))),
        levels=LEVELS,
        strides={"P4": 16, "P5": 32},
        dtype=dtype,
        config=config,
        input_sizes=np.array(sizes, np.int32),
        padded_sizes=[parse_size(name) for name in groups],
        rows=np.array(rows),
        shapes={size: shapes_of(size) for size in map(parse_size, dict.fromkeys(groups)) if size},
        errors=errors or {},
    )


def shapes_of(size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
    height, width = size
    return {"P4": (2, height // 16, width // 16), "P5": (2, height // 32, width // 32)}


def features_of(indices: list[int], size: tuple[int, int], dtype: str = "float32") -> dict[str, np.ndarray]:
    """Rows that tell which image they are of: image i holds i + 1 in P4, 100 + i in P5."""
    return {
        level: np.stack([np.full(shape, base + i, dtype) for i in indices])
        for (level, shape), base in zip(shapes_of(size).items(), (1, 100), strict=True)
    }
