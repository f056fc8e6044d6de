"""The script that people write today, as a process of its own: DataLoader, eager float32 torchvision, h5py.

`python -m fpnx.benchmark.baseline_script` reads a line of JSON that says what to run, then a line for each
measurement, `forward` or `end to end`, and answers each with a line of JSON. Nothing here is shared with the pipeline
that it is compared to.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

__all__ = ["main"]


class Images(Dataset):
    """The images of a folder, as the network takes them."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.paths = sorted(Path(asked["folder"]).iterdir())[: asked["images"]]
        resize = transforms.Resize(tuple(asked["size"]), transforms.InterpolationMode(asked["resampling"]))
        normalise = transforms.Normalize(asked["mean"], asked["std"])
        self.transform = transforms.Compose([resize, transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


class PlainModel(torch.nn.Module):
    """torchvision's feature extractor and pyramid, with the parameters that were given."""

    def __init__(self, asked: dict[str, Any]) -> None:
        super().__init__()
        network = models.get_model(asked["backbone"], weights=None).eval()
        self.body = create_feature_extractor(network, asked["nodes"])
        channels, top = asked["channels"], asked["top_block"]
        extra: Any = None
        if top == "pool":
            extra = LastLevelMaxPool()
        elif top is not None:
            extra = LastLevelP6P7(asked["in_channels"][-1] if top == "c5" else channels, channels)
        self.fpn = FeaturePyramidNetwork(asked["in_channels"], channels, extra)
        self.first = asked["first_level"]
        self.load_state_dict(torch.load(asked["parameters"], weights_only=True))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        taps = self.body(images)
        pyramid = self.fpn({name: taps[name] for name in sorted(taps) if int(name[1:]) >= self.first})
        return taps | dict(zip((f"P{k}" for k in range(self.first, 8)), pyramid.values(), strict=False))


def extract(asked: dict[str, Any], model: PlainModel) -> float:
    """Images to an HDF5 file; images/s from the second batch on, as workers are started for the first."""
    images = Images(asked)
    loader = DataLoader(images, batch_size=asked["batch_size"], num_workers=asked["workers"])
    started, place, first = time.perf_counter(), 0, 0
    with h5py.File(asked["output"], "w") as file, torch.no_grad():
        for batch in loader:
            levels = model(batch.to(asked["device"]))
            for name in asked["levels"]:
                values = levels[name].cpu().numpy()
                if name not in file:
                    file.create_dataset(name, (len(images), *values.shape[1:]), asked["dtype"])
                file[name][place : place + len(values)] = values
            place += len(batch)
            if place == len(batch):
                started, first = time.perf_counter(), place
    return (place - first) / (time.perf_counter() - started)


def forward(asked: dict[str, Any], model: PlainModel) -> float:
    """One batch through the network; seconds."""
    batch = torch.randn(asked["batch_size"], 3, *asked["size"], device=asked["device"])
    cuda = batch.device.type == "cuda"
    with torch.no_grad():
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        model(batch)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> None:
    """Answer until there is nothing left to read."""
    asked = json.loads(sys.stdin.readline())
    # On CUDA PyTorch lets convolutions use TF32 by default: that would be another precision's speed, and numbers.
    torch.backends.cudnn.allow_tf32 = False
    model = PlainModel(asked).eval().to(asked["device"])
    forward(asked, model)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "forward":
            answer = {"seconds": forward(asked, model)}
        else:
            answer = {"images_per_second": extract(asked, model)}
        print(json.dumps({**answer, "rss": _peak()}), flush=True)


def _peak() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
