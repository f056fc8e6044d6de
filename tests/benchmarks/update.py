"""What `fpnx extract --update` saves: time, bytes read and images computed, against a whole run; and kills on the way.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/update.py [IMAGES]

To 2,000 images (or IMAGES) 50 are added, 20 are changed and 30 removed (in proportion). The updated
file is compared with one of a whole run: names, tables, and values. Then the update is killed at random moments, and
given again until it ends. Each run is a process, forked after the libraries are loaded; bytes are what it read by
system calls (`rchar` in `/proc/self/io`), also from the page cache.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import fpnx
import fpnx.extraction.run
from tests.helpers.files import noise_image

OPTIONS: dict[str, Any] = {
    "backbone": "mobilenet_v2", "weights": "random", "size": 64, "levels": "P3-P5", "channels": 64, "device": "cpu",
}  # fmt: skip
TABLES = ("path", "bytes", "mtime_ns", "source_size", "input_size", "status", "error", "group", "row", "digest")
SIDES = (160, 240)  # of the pictures, in pixels
TOLERANCE = 1e-5  # of values that were computed in other batches


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    count = int(arguments[0]) if arguments else 2000
    added, changed, removed = (max(1, count * number // 2000) for number in (50, 20, 30))
    with tempfile.TemporaryDirectory(prefix="fpnx-") as name:
        folder = Path(name)
        photos, old, new, whole = (folder / each for each in ("photos", "old.h5", "new.h5", "whole.h5"))
        photos.mkdir()
        for i in range(count):
            picture(photos, i, seed=i)
        show("whole run of the old list", run(photos, old))
        shutil.copy(old, new)
        for i in range(count, count + added):
            picture(photos, i, seed=i)
        for i in range(changed):
            picture(photos, i * (count // changed), seed=-1 - i)
        for i in range(removed):
            (photos / f"{i * (count // removed) + 1:05}.jpg").unlink()
        show("whole run of the new list", run(photos, whole))
        show("update", run(photos, new, update=True))
        print(json.dumps({"update equals the whole run": compare(new, whole)}), flush=True)
        for option in ("update", "resume"):
            show(f"--{option}, nothing to do", run(photos, new, **{option: True}))
        copy = folder / "copy"
        shutil.copytree(photos, copy, copy_function=shutil.copyfile)
        show("--resume on a copy with other times", run(copy, new, resume=True))
        show("--update --check-content, nothing to do", run(photos, new, update=True, check_content=True))
        duration, kills, randomly = 0.0, 0, random.Random(1)
        shutil.copy(old, new)
        duration = run(photos, new, update=True)["seconds"]
        for _ in range(5):
            shutil.copy(old, new)
            moments = iter(lambda: randomly.uniform(0.05, 1.1) * duration, 0.0)
            while run(photos, new, kill_after=next(moments), update=True, commit_every=0.1) is None:
                kills += 1
            assert not compare(new, whole)["differences"]
        print(json.dumps({"kills": kills, "each of 5 files equals the whole run": True}), flush=True)


def picture(folder: Path, number: int, seed: int) -> None:
    """Write a JPEG."""
    noise_image(seed % 2**31, (SIDES[seed % 2], SIDES[1 - seed % 2])).save(folder / f"{number:05}.jpg", quality=90)


def run(images: Path, output: Path, kill_after: float | None = None, **options: Any) -> Any:
    """An extraction in a process of its own: what it did, or None where it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        started, before = time.perf_counter(), bytes_read()
        result = fpnx.extract(images, output, **OPTIONS, **options)
        found = {
            "seconds": round(time.perf_counter() - started, 2),
            "MB read": round((bytes_read() - before) / 1e6, 1),
            "computed": result.computed,
            "done": result.done,
            **(result.to_json().get("update") or {}),
        }
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def bytes_read() -> int:
    """Bytes that this process has read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Tables that differ, and the largest difference of values, relative to the largest value of the level."""
    with h5py.File(one) as a, h5py.File(other) as b:
        names = [f"images/{name}" for name in TABLES] + ["stats/nonfinite"]
        differences = [name for name in names if a[name].shape != b[name].shape or (a[name][:] != b[name][:]).any()]
        largest = 0.0
        for level in json.loads(a.attrs["config"])["levels"]:
            values = a[level][:], b[level][:]
            largest = max(largest, float(np.abs(values[0] - values[1]).max() / np.abs(values[1]).max()))
    differences += ["values"] if largest > TOLERANCE else []
    return {"differences": differences, "largest difference of values": largest}


def show(what: str, found: Any) -> None:
    print(json.dumps({what: found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
