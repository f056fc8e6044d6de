"""The plain script with ONNX Runtime in place of PyTorch, on the CPU; needs `onnx` and `onnxruntime`."""

from __future__ import annotations

from typing import Any

import onnxruntime
import torch
from torch import nn

from fpnx.benchmark.baseline_script import SelectedLevels, main


class OnnxModel(nn.Module):
    """The plain model, exported to ONNX and run in ONNX Runtime on all cores."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__()
        self.levels, path = request["levels"], request["output"] + ".onnx"
        torch.onnx.export(
            SelectedLevels(request).eval(),
            (torch.zeros(2, 3, *request["size"]),),
            path,
            input_names=["images"],
            output_names=self.levels,
            dynamic_axes={"images": {0: "batch"}},
            dynamo=False,
        )
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        arrays = self.session.run(None, {"images": images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(self.levels, arrays, strict=True)}


if __name__ == "__main__":
    main(OnnxModel)
