"""fpnx and the settings of the process: neither reads torch's defaults by accident, nor leaves anything changed."""

from __future__ import annotations

import math
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import _device

import fpnx
from fpnx.benchmark.profiling import count_costs, peak_bytes
from fpnx.benchmark.roofline import MatrixProduct
from fpnx.models.torch_state import isolated_torch_state, on_meta_device

OPTIONS: dict[str, Any] = {"backbone": "mobilenet_v2", "weights": "random", "size": 64, "levels": "C3,P3,P6"}
OPTIONS["device"] = "cpu"  # a GPU's numbers differ from run to run


@contextmanager
def setting(change: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "other seed": lambda: setting(torch.manual_seed, 5, 6),
}


QUICK = ("float64", "default device", "inference mode")  # the others run only when slow tests are asked for
GLOBAL_HOOKS = re.compile("_global_.*hooks").fullmatch


def state_of_the_process() -> dict[str, Any]:
    """What fpnx could change for others, as values that can be compared."""
    numbers = np.random.get_state()
    matmul: Any = torch.backends.cuda.matmul
    return {
        "dtype": torch.get_default_dtype(),
        "device": _device.CURRENT_DEVICE,
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": [part.tolist() if isinstance(part, np.ndarray) else part for part in numbers],
        "python generator": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "cudnn": [getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        "precision": (torch.get_float32_matmul_precision(), getattr(matmul, "fp32_precision", None)),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "modules": (nn.Module.__call__, nn.Module.__getattr__, math.floor),
        "hooks": [len(value) for name, value in sorted(vars(torch.nn.modules.module).items()) if GLOBAL_HOOKS(name)],
        "warnings": list(warnings.filters),
        "switch interval": sys.getswitchinterval(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, samples: Path) -> Path:
    """Two photographs, and `plain.h5`, which was extracted from them with torch's own defaults."""
    folder = tmp_path_factory.mktemp("defaults")
    (folder / "photos").mkdir()
    for name in ("astronaut.jpg", "coffee.jpg"):
        (folder / "photos" / name).write_bytes((samples / name).read_bytes())
    fpnx.extract([folder / "photos"], folder / "plain.h5", **OPTIONS)
    return folder


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in SETTINGS],
)
def test_settings_change_nothing_and_are_left_alone(name: str, folder: Path) -> None:
    file = folder / f"{name}.h5"
    with SETTINGS[name]():
        before = state_of_the_process()
        fpnx.extract([folder / "photos"], file, **OPTIONS)
        verified = fpnx.verify(folder / "plain.h5", against=folder / "photos", device="cpu")
        data = fpnx.PyramidDataset(file)
        sample, batches = data[0], list(data.batch_sampler(1, shuffle=True))
        model = fpnx.create_model("mobilenet_v2", weights="random", levels="P3")
        costs, peak, shapes = count_costs(model, (64, 64)), peak_bytes(model, (64, 64)), model.shapes((64, 64))
        image = model.transform(Image.open(folder / "photos" / "coffee.jpg"))
        assert state_of_the_process() == before
    with fpnx.open(folder / "plain.h5") as plain, fpnx.open(file) as other:
        assert other.fingerprint == plain.fingerprint
        for ours, expected in zip(other, plain, strict=True):
            assert all(np.array_equal(ours[level], expected[level]) for level in ("C3", "P3", "P6"))
        assert torch.equal(sample["P3"], torch.from_numpy(plain[0]["P3"]))
    assert (verified.problems, verified.largest_difference) == ((), 0.0)
    assert sorted(batches) == [[0], [1]]
    again = fpnx.create_model("mobilenet_v2", weights="random", levels="P3")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in again.named_parameters())
    assert all(value.requires_grad and not value.is_inference() for value in parameters.values())
    assert (costs, peak) == (count_costs(again, (64, 64)), peak_bytes(again, (64, 64)))
    assert shapes == again.shapes((64, 64))
    assert torch.equal(image, again.transform(Image.open(folder / "photos" / "coffee.jpg")))


class Constants(nn.Module):
    """Makes constants in forward and in its constructor, of the default dtype and on the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = stage(x) * torch.tensor(1.1 + i) + torch.ones(()) / 3
        return x * (torch.arange(3)[1] / 7)


@pytest.mark.parametrize("name", SETTINGS)
def test_constants_of_a_callers_module(name: str) -> None:
    module, images = Constants(), torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        expected = fpnx.create_model(module, levels="C2-C4")(images)
    with SETTINGS[name]():
        before = state_of_the_process()
        model = fpnx.create_model(module, levels="C2-C4")
        assert state_of_the_process() == before
    with torch.no_grad():
        actual = model(images)
    assert all(torch.equal(actual[level], expected[level]) for level in expected)


def test_a_measured_product_leaves_the_generator_alone() -> None:
    before = state_of_the_process()
    assert MatrixProduct(torch.device("cpu"), "float32").measure() > 0
    assert state_of_the_process() == before


MADE: list[Callable[[], Tensor]] = [
    lambda: torch.empty(2).zero_(),
    lambda: torch.zeros(2),
    lambda: torch.full((2,), 0.1),
    lambda: torch.tensor([0.1, 0.2]),
    lambda: torch.as_tensor([0.1, 0.2]),
    lambda: torch.arange(0, 1, 0.1),
    lambda: torch.linspace(0, 1, 7),
    lambda: torch.arange(3) / 7,
    lambda: torch.arange(3).sqrt(),
    lambda: torch.where(torch.tensor([True, False]), 0.25, 0.5),
    lambda: torch.eye(2),
    lambda: torch.hann_window(5),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_code_makes_within_is_float32_on_the_cpu(dtype: torch.dtype) -> None:
    expected = [make() for make in MADE]
    with setting(torch.set_default_dtype, dtype, torch.float32), torch.device("meta"), isolated_torch_state():
        actual = [make() for make in MADE]
        integers = [torch.arange(3), torch.tensor([1]), torch.full((2,), 1), torch.randperm(4)]
        doubles = [torch.tensor(np.ones(2)), torch.tensor(1.0, dtype=torch.float64), torch.arange(2).double()]
        halves = torch.arange(2).to(torch.bfloat16)
    for ours, usual in zip(actual, expected, strict=True):
        assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
        assert torch.allclose(ours, usual, rtol=1e-6 if dtype is torch.float64 else 1e-2)
    assert all(tensor.dtype is torch.int64 for tensor in integers)
    assert all(tensor.dtype is torch.float64 for tensor in doubles)
    assert halves.dtype is torch.bfloat16


def test_numbers_are_those_of_torch_for_that_seed() -> None:
    def draw() -> list[Tensor]:
        layer = nn.Linear(4, 3)
        nn.init.trunc_normal_(layer.bias)
        drawn = [
            torch.rand(3),
            torch.randn(17),
            torch.randperm(9),
            torch.randint(9, (4,)),
            torch.empty(2).exponential_(),
        ]
        drawn.append(torch.normal(0.0, 1.0, (3,)))
        return [layer.weight, layer.bias, nn.init.orthogonal_(torch.empty(3, 3)), *drawn]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        expected = draw()
    before = torch.get_rng_state()
    with isolated_torch_state(11):
        actual = draw()
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, actual, expected))


def test_the_meta_device_for_one_thread() -> None:
    with on_meta_device():
        assert torch.zeros(2, 3).device.type == "meta"
        assert _device.CURRENT_DEVICE is None, "compiled code of other threads reads it"
    assert torch.zeros(1).device.type == "cpu"
