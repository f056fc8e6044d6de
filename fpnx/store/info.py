"""Summary of a store as plain values, and Python code that reads it, for `fpnx info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fpnx.core.plan_summary import LevelShape
from fpnx.store.joined_store import JoinedStore

if TYPE_CHECKING:
    from fpnx.store.reader import Store


__all__ = ["duplicate_count", "exceeds_float16", "level_shapes", "reading_snippet", "store_facts", "too_large_levels"]

MAX_SAMPLES = 8  # images whose values are read to tell infinite values from NaN


def level_shapes(store: Store) -> list[LevelShape]:
    """Stored shape of every level at every network-input size."""
    shapes = []
    for size in store.sizes:
        for level in store.levels:
            dataset = store.dataset(size, level)
            count, channels, height, width = dataset.shape
            bytes_per_image = channels * height * width * dataset.dtype.itemsize
            stride = int(dataset.attrs["stride"])
            shapes.append(LevelShape(size, count, level, stride, channels, height, width, bytes_per_image))
    return shapes


def store_facts(store: Store) -> dict[str, Any]:
    """All that `fpnx info` shows, as values for JSON."""
    counts = {name: int((store.status == value).sum()) for value, name in enumerate(("pending", "done", "failed"))}
    return {
        "file": store.path,
        "complete": store.complete,
        "images": {"total": len(store), **counts},
        "shard": store.shard_slice.to_json() if store.shard_slice else None,
        "shards": store.shard_count,
        "files": len(store.files),
        "root": store.root,
        "duplicates": duplicate_count(store),
        "nonfinite": store.nonfinite_by_level(),
        "too_large": list(too_large_levels(store)),
        "levels": [shape.to_json() for shape in level_shapes(store)],
        **({"regions": store.regions.summary().to_json()} if store.has_regions else {}),
        "failed": [{"path": path, "reason": reason} for path, reason in store.failures()],
        "config": store.config,
        "fingerprint": store.fingerprint,
        "provenance": store.provenance.to_json(),
    }


def duplicate_count(store: Store) -> int:
    """Number of images that are done and whose file has the same bytes as that of another one before it."""
    digests = store.digests[store.digests.any(axis=1)]
    return len(digests) - len(np.unique(digests, axis=0))


def exceeds_float16(values: np.ndarray) -> bool:
    """Whether stored values were beyond ±65504, the largest of float16, and became infinite."""
    return values.dtype == np.float16 and bool(np.isinf(values).any())


def too_large_levels(store: Store) -> tuple[str, ...]:
    """Levels stored as float16 with values that are too large for it, in a few of the images with NaN or infinity."""
    if store.config.get("dtype") != "float16":
        return ()
    done = store.status == 1
    found = []
    for column, level in enumerate(store.levels):
        suspicious = np.flatnonzero(done & (store.nonfinite[:, column] > 0))[:MAX_SAMPLES]
        if any(exceeds_float16(store.stored_values(index, level)) for index in suspicious.tolist()):
            found.append(level)
    return tuple(found)


def reading_snippet(store: Store) -> str:
    """Python code that reads this file with h5py alone, or several files with fpnx."""
    level = store.levels[0]
    if isinstance(store, JoinedStore):
        values = "item.regions.features" if store.has_regions else f"item[{level!r}]"
        statement = f"item = next(iter(store)); print(item.path, {values}.shape)"
        return f"import fpnx\n\nwith fpnx.open({store.argument!r}) as store:\n    {statement}\n"
    lines = [
        "import h5py",
        "",
        f"with h5py.File({str(store.path)!r}, {'r'!r}) as f:",
        '    names = f["images/path"].asstr(errors="surrogateescape")[:]',
        '    done = f["images/status"][:] == 1',
    ]
    if store.has_regions:
        lines += [
            '    image = f["regions/image"][:]',
            '    k = done[image].argmax(); print(names[image[k]], f["regions/box"][k], f["regions/features"][k].shape)',
        ]
    elif len(store.sizes) == 1:
        shape = store.dataset(store.sizes[0], level).shape
        lines.append(f'    i = done.argmax(); print(names[i], f["{level}"][i].shape)  # {shape[1:]}')
    elif store.sizes:
        lines += [
            '    groups, rows = f["images/group"].asstr()[:], f["images/row"][:]',
            f'    i = done.argmax(); print(names[i], f["pyramids"][groups[i]]["{level}"][rows[i]].shape)',
        ]
    return "\n".join(lines) + "\n"
