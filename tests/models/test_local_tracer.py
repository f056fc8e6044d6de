"""The tracer: the graphs of torch's own, and no change to the process or to other threads while it runs."""

from __future__ import annotations

import functools
import io
import math
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, fx, nn
from torchvision import models

import fpnx
from fpnx.benchmark.profiling import count_costs, peak_bytes
from fpnx.models.backbones.local_tracer import LocalTracer

AUTOWRAPPED = (math, torchvision.ops)


@torch.fx.wrap
def registered(x: Tensor, by: int) -> Tensor:
    return x * by if x.sum() > 0 else x


def half(side: int) -> int:
    return math.floor(side / 2)


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 2

    return wrapper


class Inner(nn.Module):
    made: ClassVar[list[str]] = []

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Inner.made.append(cls.__name__)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("shift", torch.ones(1))
        self.layers = nn.ParameterList([torch.ones(3, 1, 1)])

    @staticmethod
    def cut(x: Tensor) -> Tensor:
        return x[:, :, : half(x.shape[2])]

    @property
    def factor(self) -> Any:
        return registered(self.scale, 2)

    @twice
    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.cut(x) + self.shift * self.factor + self.layers[0]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again, self.norm = Inner(), Inner(), nn.BatchNorm2d(3)
        self.stack = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
        self.weight = nn.Parameter(torch.ones(3, 3, 1, 1))

    def forward(self, x: Tensor, *, flip: bool = False) -> Any:
        x = self.again(self.inner(self.stack(x)))
        x = torchvision.ops.stochastic_depth(registered(x, math.ceil(x.shape[3] / 2)), 0.0, "row", training=False)
        x = self.norm(x) + torch.conv2d(x, self.weight) + torch.tensor([1.0])
        return {"map": x, "size": [x.size(0), half(x.shape[3])]}


def both_graphs(build: Callable[[], nn.Module]) -> tuple[str, str]:
    ours, usual = build().eval(), build().eval()
    graphs = LocalTracer(AUTOWRAPPED).trace(ours), fx.Tracer(autowrap_modules=AUTOWRAPPED).trace(usual)
    wrapped = [[node.name for node in graph.nodes if node.meta.get("is_wrapped")] for graph in graphs]
    assert wrapped[0] == wrapped[1]
    assert sorted(vars(ours)) == sorted(vars(usual))
    assert fx.GraphModule(ours, graphs[0]).code == fx.GraphModule(usual, graphs[1]).code
    return str(graphs[0]), str(graphs[1])


def test_the_graph_is_that_of_torchs_tracer() -> None:
    ours, usual = both_graphs(Network)
    assert ours == usual
    for name in ("registered", "math.ceil", "math.floor", "stochastic_depth"):
        assert name.rpartition(".")[2] in ours


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t", "densenet121", "maxvit_t"])
def test_the_graphs_of_torchvisions_networks(name: str) -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = models.get_model(name, weights=None)
        return network

    ours, usual = both_graphs(build)
    assert ours == usual


def state_of_the_process() -> tuple[Any, ...]:
    """What torch's tracer replaces; the names as text, since code that calls these functions is copied."""
    here = vars(sys.modules[__name__])["registered"]
    return nn.Module.__call__, nn.Module.__getattr__, vars(sys.modules["math"])["floor"], here


class Spy(nn.Module):
    """Looks at the process while it is traced, and runs a network that is not being traced."""

    def __init__(self, foreign: nn.Module, fails: bool) -> None:
        super().__init__()
        self.own, self.fails = nn.Conv2d(3, 3, 1), fails
        self.__dict__["foreign"] = foreign

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, fx.Proxy)
        SEEN.append(state_of_the_process())
        run = lambda: self.foreign(torch.ones(1, 3, 32, 32))  # noqa: E731
        with ThreadPoolExecutor(1) as executor:
            SEEN.append((run(), executor.submit(run).result()))
        if self.fails:
            raise ValueError("fails while it is traced")
        return self.own(x)


SEEN: list[Any] = []


@pytest.mark.parametrize("fails", [False, True])
def test_other_modules_run_while_a_network_is_traced(fails: bool) -> None:
    foreign = models.resnet18(weights=None).eval()
    spy, expected = Spy(foreign, fails), foreign(torch.ones(1, 3, 32, 32))
    process = state_of_the_process()
    SEEN.clear()
    if fails:
        with pytest.raises(ValueError, match="while it is traced"):
            LocalTracer(AUTOWRAPPED).trace(spy)
    else:
        graph = LocalTracer(AUTOWRAPPED).trace(spy)
        assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    seen, outputs = SEEN
    assert seen == process
    assert all(type(output) is Tensor and torch.equal(output, expected) for output in outputs)
    assert (type(spy), type(spy.own)) == (Spy, nn.Conv2d)


def test_classes_are_not_registered_and_come_back() -> None:
    network = Network().eval()
    classes, before = [type(module) for module in network.modules()], list(Inner.made)
    LocalTracer(AUTOWRAPPED).trace(network)
    assert [type(module) for module in network.modules()] == classes
    assert Inner.made == before


def serve(network: nn.Module, expected: Tensor, image: Tensor, stop: threading.Event) -> tuple[int, list[str]]:
    """Run a network until `stop`; the number of runs, and what went wrong."""
    runs, wrong = 0, []
    while not stop.is_set() or not runs:
        runs += 1
        try:
            with torch.no_grad():
                if not torch.equal(network(image), expected):
                    wrong.append("other numbers")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
    return runs, wrong


def test_networks_of_the_caller_run_in_threads_beside_fpnx(photos: Path, tmp_path: Path) -> None:
    stop, image = threading.Event(), torch.ones(1, 3, 64, 64)
    networks: list[nn.Module] = [models.resnet18(weights=None).eval(), models.swin_t(weights=None).eval()]
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with torch.no_grad():
        outputs = [network(image) for network in networks]
    options: dict[str, Any] = {"weights": "random", "levels": "P3", "size": 64}
    reference = fpnx.create_model("mobilenet_v2", **options).state_dict()
    saved = pickle.dumps(fpnx.create_model("squeezenet1_1", weights="random", levels="C2"))

    def create(_: int) -> None:
        state = fpnx.create_model("mobilenet_v2", **options).state_dict()
        assert all(torch.equal(state[key], value) for key, value in reference.items())

    def extract(i: int) -> None:
        fpnx.extract([photos], tmp_path / f"{i}.h5", backbone="mobilenet_v2", **options)

    def inspect(_: int) -> None:
        model = fpnx.create_model(networks[0], levels="C2,P5")
        assert count_costs(model, (64, 64))
        assert peak_bytes(model, (64, 64))

    def load(_: int) -> None:
        with torch.no_grad():
            assert pickle.load(io.BytesIO(saved))(image)["C2"].shape == (1, 128, 15, 15)

    with ThreadPoolExecutor(8) as executor:
        serving = [executor.submit(serve, *pair, image, stop) for pair in zip(networks, outputs, strict=True)]
        jobs = [executor.submit(job, i) for job in (create, extract, inspect) for i in range(2)]
        jobs.append(executor.submit(load, 0))
        failures = [error for job in jobs if (error := job.exception()) is not None]
        stop.set()
        runs, wrong = zip(*(future.result() for future in serving), strict=True)
    assert failures == []
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == (filters, limit)
    assert list(wrong) == [[], []], "in the caller's threads"
    assert min(runs) > 1
    states = []
    for i in range(2):
        with fpnx.open(tmp_path / f"{i}.h5") as store:
            states.append([torch.from_numpy(item["P3"]) for item in store])
    assert all(map(torch.equal, *states))
