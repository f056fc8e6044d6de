"""Processor time of each stage for one image on one core, and the images/s that it allows on all cores.

Run: python tests/benchmarks/core_time.py [BACKBONE ...]

The processor time of one thread is measured: load on the machine affects it less than elapsed time. `eager` is the
forward pass of the plain script on the same images; `limit` is the number of cores divided by the sum of fpnx's own
stages.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fpnx
from fpnx.benchmark.baseline import baseline_model
from fpnx.benchmark.baseline_script import PlainModel
from fpnx.benchmark.synthetic_images import make_images
from fpnx.core.config import ExtractConfig
from fpnx.core.files import OpenFile
from fpnx.core.system import usable_cpus
from fpnx.images.decoding import decode
from fpnx.images.listing import find_images
from fpnx.images.reading import ImageSource
from fpnx.inference.engine import Engine

BATCH_SIZE, ROUNDS = 4, 7


def main(backbones: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fpnx-") as folder:
        make_images(Path(folder), BATCH_SIZE)
        sources = find_images([folder]).sources
        for backbone in backbones:
            print(json.dumps(core_time(backbone, sources)), flush=True)


def core_time(backbone: str, sources: Sequence[ImageSource]) -> dict[str, object]:
    model = fpnx.create_model(backbone, weights="random", levels="P2-P5")
    config = ExtractConfig()
    recipe = model.recipe.sized(config)
    size = recipe.input_size((1, 1))
    engines = {
        precision: Engine(model, recipe, ExtractConfig(precision=precision, dtype=dtype), torch.device("cpu"))
        for precision, dtype in (("float32", "float32"), ("bfloat16", "float16"))
    }
    for engine in engines.values():
        engine.prepare(size)
    pictures = [decode(source, config.max_pixels) for source in sources]
    pixels = [recipe.resize(picture, size) for picture in pictures]
    images = engines["float32"].batch(pixels, size).contiguous()
    arrays = list(engines["float32"](pixels).arrays.values())
    with tempfile.TemporaryDirectory(dir=".") as folder:
        plain_model = PlainModel(baseline_model(model, recipe, Path(folder) / "parameters.pt")).eval()
        path = Path(folder) / "written"
        path.write_bytes(b"")
        disk = OpenFile(path)

        def write() -> None:
            offset = 0
            for array in arrays:
                disk.write(offset, array.reshape(-1).data.cast("B"))
                offset += array.nbytes

        stages: dict[str, Callable[[], object]] = {
            "decode": lambda: [decode(source, config.max_pixels) for source in sources],
            "resize": lambda: [recipe.resize(picture, size) for picture in pictures],
            "forward float32": lambda: engines["float32"](pixels),
            "forward bfloat16": lambda: engines["bfloat16"](pixels),
            "eager": lambda: plain_model(images),
            "write": write,
        }
        milliseconds = measure(stages)
        disk.close()
    total = milliseconds["decode"] + milliseconds["resize"] + milliseconds["forward float32"] + milliseconds["write"]
    limit = 1000 * usable_cpus() / total
    plain = total - milliseconds["forward float32"] + milliseconds["eager"]
    return {backbone: milliseconds, "limit": round(limit, 1), "less core time": round(plain / total, 2)}


def measure(stages: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of processor time per image."""
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(ROUNDS):
        for name, stage in stages.items():
            with torch.inference_mode():
                before = time.thread_time()
                stage()
                times[name].append(1000 * (time.thread_time() - before) / BATCH_SIZE)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:] or ["resnet50", "mobilenet_v2", "vgg16"])
