"""The script that people write: DataLoader, eager torchvision backbone and FPN in float32, h5py append.

Run: python tests/benchmarks/plain_script.py FOLDER OUT.h5 BACKBONE [BATCH] [onnx]

Prints one JSON document. With `onnx` the network runs in ONNX Runtime instead, which must be installed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()

import h5py  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

import fpnx  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder(Dataset):
    def __init__(self, folder: str) -> None:
        self.paths = sorted(Path(folder).glob("*.jpg"))
        self.transform = transforms.Compose(
            [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


class Onnx(nn.Module):
    """The same network in ONNX Runtime, on all cores."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        import onnxruntime

        self.names = list(model.levels)
        torch.onnx.export(
            model, (torch.zeros(2, 3, 224, 224),), path, input_names=["images"], output_names=self.names,
            dynamic_axes={"images": {0: "batch"}}, dynamo=False,
        )  # fmt: skip
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        levels = self.session.run(None, {"images": images.numpy()})
        return {name: torch.from_numpy(level) for name, level in zip(self.names, levels, strict=True)}


def main(folder: str, output: str, backbone: str, batch: int = 8, runtime: str = "") -> None:
    torch.backends.cudnn.allow_tf32 = False  # on CUDA TF32 is PyTorch's default: other numbers
    device = "cuda" if torch.cuda.is_available() and runtime != "onnx" else "cpu"
    # The parameters and the eager forward are those of torchvision's modules: what fpnx's model is made of.
    model = fpnx.create_model(backbone, weights="random", levels="P2-P5").to(device)
    if runtime == "onnx":
        model = Onnx(model, output + ".onnx")
    loader = DataLoader(Folder(folder), batch_size=batch, num_workers=2)
    times, written = [], 0
    with h5py.File(output, "w") as file, torch.inference_mode():
        for images in loader:
            for name, level in model(images.to(device)).items():
                values = level.cpu().numpy()
                if name not in file:
                    shape = values.shape[1:]
                    file.create_dataset(name, (0, *shape), values.dtype, maxshape=(None, *shape))
                dataset = file[name]
                dataset.resize(written + len(values), axis=0)
                dataset[written:] = values
            written += len(images)
            times.append((time.perf_counter() - STARTED, written))
            if len(times) == 1:
                file.flush()
    steady = (times[-1][1] - times[1][1]) / (times[-1][0] - times[1][0]) if len(times) > 2 else None
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    each = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest worker
    print(
        json.dumps(
            {
                "images": written,
                "images_per_second": steady,
                "first_batch_s": times[0][0],
                "total_s": time.perf_counter() - STARTED,
                "peak_mb": own / 1024,
                "peak_of_a_worker_mb": each / 1024,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]) if len(sys.argv) > 4 else 8, *sys.argv[5:6])
