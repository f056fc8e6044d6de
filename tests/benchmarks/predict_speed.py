"""`fpnx predict` against a plain loop over torchvision's model, on the CPU, interleaved.

Run: python tests/benchmarks/predict_speed.py [DETECTOR] [IMAGES] [ROUNDS]

The detector has random parameters; its file is put into a hub cache of its own. `processor` is the processor time of
one image on one core, decoding and writing left out: load on the machine affects it less than elapsed time.
`elapsed` is the whole run: files to JSON, with all cores, without making the model.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fpnx.benchmark.synthetic_images import make_images
from fpnx.commands.predict import predict_to_file
from fpnx.core.predict_config import PredictConfig
from fpnx.core.system import usable_cpus
from fpnx.prediction.engine import PredictionCache
from tests.helpers.detectors import as_tensor, save_published
from tests.helpers.reference_networks import randomise


def main(detector: str, count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="fpnx-") as name:
        folder = Path(name)
        os.environ["TORCH_HOME"] = str(folder / "torch")
        from torchvision.models import get_model

        network = randomise(get_model(detector, weights=None, weights_backbone=None), smallest_variance=0.1)
        save_published(folder / "torch", detector, network)
        images = folder / "images"
        images.mkdir()
        make_images(images, count)
        processor = _processor(detector, network, images, rounds)
        elapsed = _elapsed(detector, network, images, folder, rounds)
    for what, times in (("processor", processor), ("elapsed", elapsed)):
        ours, theirs = (statistics.median(times[each]) for each in ("fpnx", "torchvision"))
        print(f"{what}: fpnx {ours:.2f} s an image, torchvision {theirs:.2f} s, {theirs / ours:.2f} times as fast")


def _processor(detector: str, network: nn.Module, images: Path, rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    config = PredictConfig(weights=detector, offline=True, device="cpu")
    cache = PredictionCache(config)
    model = cache.model(config.run())
    recipe = model.recipe.sized(config.run())
    engine = cache.engine(recipe, config.run(), torch.device("cpu"))
    picture = Image.open(min(images.iterdir())).convert("RGB")
    size = recipe.input_size((picture.height, picture.width))
    pixels, tensor = model.resize(picture, size, recipe), as_tensor(picture)
    engine.prepare(recipe.padded(size))
    calls: dict[str, Any] = {"fpnx": lambda: engine([pixels]), "torchvision": lambda: network([tensor])}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            with torch.no_grad():
                call()
            if number:  # the first packs weights
                times[name].append(time.process_time() - started)
    return times


def _elapsed(detector: str, network: nn.Module, images: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"fpnx": [], "torchvision": []}
    torch.set_num_threads(usable_cpus())
    for number in range(rounds):
        result = predict_to_file(
            images, folder / f"{number}.json", weights=detector, offline=True, device="cpu", overwrite=True
        )
        times["fpnx"].append(result.run.seconds / result.run.done)
        paths = sorted(images.iterdir())
        started = time.perf_counter()
        _plain(network, paths, folder / "plain.json")
        times["torchvision"].append((time.perf_counter() - started) / len(paths))
    return times


def _plain(network: nn.Module, paths: list[Path], output: Path) -> None:
    """What one writes by hand."""
    results = []
    with torch.no_grad():
        for i, path in enumerate(paths):
            image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
            (found,) = network([image])
            for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
                x1, y1, x2, y2 = box.tolist()
                results.append(
                    {
                        "image_id": i,
                        "category_id": int(label),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": float(score),
                    }
                )
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *["fasterrcnn_resnet50_fpn", "4", "3"][len(sys.argv) - 1 :]]
    main(arguments[0], int(arguments[1]), int(arguments[2]))
