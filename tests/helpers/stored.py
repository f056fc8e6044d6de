"""Files of features with given numbers, for tests of what is computed from stored features."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fpnx.core.image_list import ImageList, ImageRecord
from fpnx.store.file_layout import FileLayout
from fpnx.store.writer import Writer
from tests.helpers.layouts import PROVENANCE

STRIDES = {"P3": 8, "P4": 16, "P5": 32, "C3": 8, "C4": 16, "C5": 32}


def stored(
    path: Path,
    features: Mapping[str, np.ndarray],
    names: Sequence[str] | None = None,
    *,
    failed: Sequence[int] = (),
    input_sizes: Sequence[tuple[int, int]] | None = None,
    source_sizes: Sequence[tuple[int, int]] | None = None,
    pool: str = "none",
    dtype: str = "float32",
) -> Path:
    """Write a file of images of one padded size, with the given maps.

    Args:
        path: the file to write.
        features: by level, (N, C) for maps of one cell, or (N, C, H, W).
        names: of the images; by default 0.png, 1.png, …
        failed: indices of images that failed.
        input_sizes: (height, width) of each network input without padding; by default without any padding.
        source_sizes: (height, width) of each image; by default those of the network inputs.
        pool, dtype: as in the config.
    """
    maps = {level: np.asarray(each, dtype) for level, each in features.items()}
    maps = {level: each[:, :, None, None] if each.ndim == 2 else each for level, each in maps.items()}
    count = len(next(iter(maps.values())))
    names = [f"{i}.png" for i in range(count)] if names is None else names
    height, width = (max(each.shape[axis] * STRIDES[level] for level, each in maps.items()) for axis in (2, 3))
    sizes = np.array([(height, width)] * count if input_sizes is None else input_sizes, np.int32)
    sources = sizes if source_sizes is None else np.array(source_sizes, np.int32)
    config = {"levels": list(maps), "channels": 2, "backbone": "none", "dtype": dtype, "pool": pool}
    layout = FileLayout(
        images=ImageList(b"/pictures", tuple(ImageRecord(os.fsencode(n), 10 + i, i) for i, n in enumerate(names))),
        levels=tuple(maps),
        strides={level: STRIDES[level] for level in maps},
        dtype=dtype,
        config=config,
        input_sizes=sizes,
        padded_sizes=[(height, width)] * count,
        rows=np.arange(count),
        shapes={(height, width): {level: each.shape[1:] for level, each in maps.items()}},
        errors={},
    )
    path.unlink(missing_ok=True)
    writer = Writer.create(path, layout, PROVENANCE)
    done = [i for i in range(count) if i not in failed]
    counts = {level: [int((~np.isfinite(each[i])).sum()) for i in done] for level, each in maps.items()}
    if done:
        writer.put(done, {level: each[done] for level, each in maps.items()}, sources[done], counts)
    for i in failed:
        writer.fail(i, "it is broken")
    writer.finish()
    return path
