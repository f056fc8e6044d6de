"""The plain script with OpenVINO in place of PyTorch, on the CPU, in its throughput mode; needs `openvino`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpnx.benchmark.baseline_script import SelectedLevels, main

__all__ = ["OpenVinoModel"]


class OpenVinoModel(nn.Module):
    """The plain model, converted by `openvino.convert_model` and compiled with the hint THROUGHPUT.

    Attributes:
        batches_at_once: as many as OpenVINO computes side by side.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        import openvino

        super().__init__()
        self.levels = list(request["levels"])
        self._shape = (request["batch_size"], 3, *request["size"])
        plain = SelectedLevels(request).eval()
        converted = openvino.convert_model(plain, example_input=torch.zeros(self._shape), input=[self._shape])
        options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = openvino.Core().compile_model(converted, "CPU", options)
        self._queue = openvino.AsyncInferQueue(self._compiled)
        self._queue.set_callback(self._keep)
        self._found: dict[int, list[np.ndarray]] = {}
        self.batches_at_once = len(self._queue)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Levels of any number of images, in batches of the compiled size, filled up with zeros."""
        self._found.clear()
        for number, part in enumerate(images.split(self._shape[0])):
            batch = np.zeros(self._shape, np.float32)
            batch[: len(part)] = part.numpy()
            self._queue.start_async([batch], number)
        self._queue.wait_all()
        parts = [self._found[number] for number in sorted(self._found)]
        return {
            name: torch.from_numpy(np.concatenate([part[i] for part in parts])[: len(images)])
            for i, name in enumerate(self.levels)
        }

    def _keep(self, request: Any, number: int) -> None:
        self._found[number] = [request.get_output_tensor(i).data.copy() for i in range(len(self.levels))]


if __name__ == "__main__":
    main(OpenVinoModel)
