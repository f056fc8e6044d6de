"""The plain script that fpnx is compared with: DataLoader, eager float32 torchvision, h5py.

`python -m fpnx.benchmark.baseline_script` reads a request as a line of JSON from stdin, then one line for each
measurement, `forward` or `end to end`, and answers each with a line of JSON. It shares no code with the pipeline.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
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

__all__ = ["PlainModel", "SelectedLevels", "main"]


class Images(Dataset):
    """The first images of a folder, resized and normalised."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.paths = sorted(Path(request["folder"]).iterdir())[: request["images"]]
        resize = transforms.Resize(tuple(request["size"]), transforms.InterpolationMode(request["resampling"]))
        normalise = transforms.Normalize(request["mean"], request["std"])
        self.transform = transforms.Compose([resize, transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


class PlainModel(torch.nn.Module):
    """torchvision's feature extractor and pyramid, with the parameters of the request.

    Attributes:
        batches_at_once: how many batches one call computes.
    """

    batches_at_once = 1

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__()
        network = models.get_model(request["backbone"], weights=None).eval()
        self.body = create_feature_extractor(network, request["nodes"])
        channels, top = request["channels"], request["top_block"]
        extra: Any = None
        if top == "pool":
            extra = LastLevelMaxPool()
        elif top is not None:
            extra = LastLevelP6P7(request["in_channels"][-1] if top == "c5" else channels, channels)
        self.fpn = FeaturePyramidNetwork(request["in_channels"], channels, extra)
        self.first = request["first_level"]
        self.load_state_dict(torch.load(request["parameters"], weights_only=True))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        taps = self.body(images)
        pyramid = self.fpn({name: taps[name] for name in sorted(taps) if int(name[1:]) >= self.first})
        return taps | dict(zip((f"P{k}" for k in range(self.first, 8)), pyramid.values(), strict=False))


class SelectedLevels(torch.nn.Module):
    """The plain model with only the requested levels as outputs."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.levels = PlainModel(request), request["levels"]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        levels = self.model(images)
        return tuple(levels[name] for name in self.levels)


def extract(request: dict[str, Any], model: Any) -> dict[str, float]:
    """Write the features of all images to an HDF5 file.

    Returns images/s without the first batch, which includes the start of the workers, and the seconds of that batch.
    """
    images = Images(request)
    count = request["batch_size"] * model.batches_at_once
    loader = DataLoader(images, batch_size=count, num_workers=request["workers"])
    began, written, first = time.perf_counter(), 0, 0
    started = began
    with h5py.File(request["output"], "w") as file, torch.no_grad():
        for batch in loader:
            levels = model(batch.to(request["device"]))
            for name in request["levels"]:
                values = levels[name].cpu().numpy()
                if name not in file:
                    file.create_dataset(name, (len(images), *values.shape[1:]), request["dtype"])
                file[name][written : written + len(values)] = values
            written += len(batch)
            if written == len(batch):
                started, first = time.perf_counter(), written
    rate = (written - first) / (time.perf_counter() - started)
    return {"images_per_second": rate, "first_batch_seconds": started - began}


def forward(request: dict[str, Any], model: Any) -> dict[str, float]:
    """Run as many batches through the network as it computes at once; the seconds by batch."""
    batch = torch.randn(request["batch_size"] * model.batches_at_once, 3, *request["size"], device=request["device"])
    cuda = batch.device.type == "cuda"
    with torch.no_grad():
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        model(batch)
        if cuda:
            torch.cuda.synchronize()
        return {"seconds": (time.perf_counter() - started) / model.batches_at_once}


def main(build: Callable[[dict[str, Any]], Any] = PlainModel) -> None:
    """Answer measurement requests with the model that `build` makes, until stdin ends."""
    request = json.loads(sys.stdin.readline())
    # By default PyTorch lets CUDA convolutions use TF32, which is faster and less precise than float32.
    torch.backends.cudnn.allow_tf32 = False
    model = build(request).eval().to(request["device"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        measure = forward if line.strip() == "forward" else extract
        print(json.dumps({**measure(request, model), "rss": _peak_rss()}), flush=True)


def _peak_rss() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
