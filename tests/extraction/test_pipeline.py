"""Batches, compute threads and stored features: the same numbers however the work is divided among threads."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import fpnx
from fpnx.core.config import ExtractConfig, RunConfig
from fpnx.core.errors import FpnxError
from fpnx.core.validation import parse_size
from fpnx.extraction.batching import Batches, compute_threads
from fpnx.inference.cuda_graphs import CudaGraphs
from fpnx.inference.engine import Engine
from fpnx.inference.engine_cache import EngineCache
from tests.helpers.files import noise_image

TINY: dict[str, Any] = {"weights": "random", "backbone": "mobilenet_v2", "size": 64}


def plan(groups: list[str], cpus: int = 2, batch_size: int | None = None, device: str = "cpu") -> Any:
    """A plan with only the attributes that batching reads."""
    devices = tuple(torch.device(name) for name in device.split(","))
    sizes = [parse_size(name) for name in groups]
    layout = SimpleNamespace(padded_sizes=sizes, shapes=dict.fromkeys(sizes))
    model = SimpleNamespace(largest_scale=1.0)
    return SimpleNamespace(
        layout=layout, cpus=cpus, batch_size=batch_size, devices=devices, device=devices[0], model=model
    )


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(23):
        noise_image(i, (80, 60)).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes(b"\x89PNG broken")
    return folder


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fpnx")]


def test_batches_hold_one_size_and_every_image_once():
    groups = ["64x64", "96x64", "", "64x64", "96x64", "64x64"] * 5
    pending = [i for i, group in enumerate(groups) if group]
    made = list(Batches(plan(groups, batch_size=4), pending, 2))
    assert sorted(index for batch in made for index in batch) == pending
    assert all(len({groups[i] for i in batch}) == 1 and len(batch) <= 4 for batch in made)
    assert all(batch == sorted(batch) for batch in made)


def test_batches_get_smaller_towards_the_end():
    made = [len(batch) for batch in Batches(plan(["64x64"] * 20, batch_size=8), range(20), 2)]
    assert made == [8, 6, 3, 2, 1]
    assert [len(b) for b in Batches(plan(["64x64"], batch_size=8), [0], 1)] == [1]


def test_without_cuda_graphs_each_batch_is_computed_directly():
    passes = []

    def forward(images):
        passes.append(images.shape)
        return {"P2": images * 2}

    graphs = CudaGraphs(forward)
    for k in range(8):
        images = torch.full((1, 3, 2 + k % 2, 2), float(k))
        assert torch.equal(graphs(images)["P2"], images * 2)
    assert len(passes) == 8
    graphs.clear()
    assert torch.equal(graphs(images)["P2"], images * 2)


def test_a_model_without_parameters_is_built_again_for_another_device():
    cache, config = EngineCache(), ExtractConfig(**TINY, levels="P3", channels=16)
    model = cache.model(config)
    pixels = [np.asarray(noise_image(1, (64, 64)))]
    recipe = model.recipe.sized(config)
    first = cache.engine(recipe, config, torch.device("cpu"))(pixels).arrays["P3"]
    cache.empty()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert cache.model(config).shapes((64, 64)) == {"P3": (16, 8, 8)}
    again = cache.engine(recipe, config, torch.device("cpu"))(pixels).arrays["P3"]
    other = cache.engine(recipe, config, torch.device("cpu", 0))(pixels).arrays["P3"]
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(other, first)


def test_returned_memory_is_used_again():
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P2,P3", channels=16)
    engine = Engine(model, model.recipe, ExtractConfig(), torch.device("cpu"))
    images = [[np.asarray(noise_image(k, (64, 64)))] * 2 for k in range(3)]
    alone = [{name: values.copy() for name, values in engine(batch).arrays.items()} for batch in images]
    first, second = engine(images[0]), engine(images[1])  # both in use: neither may be touched
    first.recycle()
    first.recycle()  # twice must not lend it to two batches
    third, fourth = engine(images[2]), engine(images[0])
    for features, wanted in ((second, alone[1]), (third, alone[2]), (fourth, alone[0])):
        for name, values in features.arrays.items():
            np.testing.assert_array_equal(values, wanted[name])
    assert np.shares_memory(third.arrays["P2"], first.arrays["P2"])
    assert not np.shares_memory(fourth.arrays["P2"], first.arrays["P2"])


def test_the_fastest_batch_size_is_kept():
    batches = Batches(plan(["224x224"] * 400), range(400), 2)
    assert batches.candidates((224, 224), 400) == (4, 2)
    tried = [len(next(batches)) for _ in range(4)]
    assert tried == [4, 4, 2, 2]
    assert batches.is_trying_sizes((224, 224))
    assert len(next(batches)) == 4  # until something is known
    for images, seconds in [(4, 1.0), (4, 0.40), (2, 0.16), (2, 0.3)]:
        batches.record_time((224, 224), images, seconds)
    assert not batches.is_trying_sizes((224, 224))
    assert len(next(batches)) == 2  # 0.08 a piece instead of 0.10
    batches.record_time((224, 224), 4, 0.001)
    assert len(next(batches)) == 2


def test_a_batch_size_that_is_only_slightly_faster_is_not_chosen():
    batches = Batches(plan(["224x224"] * 400), range(400), 2)
    for images, seconds in [(4, 0.40), (2, 0.195)]:
        next(batches), next(batches)
        batches.record_time((224, 224), images, seconds)
    assert len(next(batches)) == 4


@pytest.mark.parametrize(
    ("images", "size", "asked", "found"),
    [
        (20, "224x224", None, (2,)),
        (400, "224x224", 7, (7,)),
        (400, "448x448", None, (1,)),
        (400, "1024x1024", None, (1,)),
    ],
    ids=["few", "asked", "large", "larger"],
)
def test_batch_sizes_worth_trying(images, size, asked, found):
    assert (
        Batches(plan([size] * images, batch_size=asked), range(images), 2).candidates(parse_size(size), images) == found
    )


def test_number_of_compute_threads():
    assert compute_threads(plan(["64x64"] * 100, cpus=3), 100) == 3
    assert compute_threads(plan(["64x64"] * 100, cpus=64), 100) == 16
    assert compute_threads(plan(["64x64"] * 2, cpus=8), 2) == 2
    assert compute_threads(plan(["50000x50000"] * 9, cpus=8), 9) == 1
    assert compute_threads(plan(["64x64"] * 9, device="cuda:0,cuda:1"), 9) == 2


@pytest.mark.parametrize("device", ["cuda:0,cuda:0", "cuda,cuda:1", "cpu,cuda:0", "cuda:0,", "cuda:x", "gpu"])
def test_invalid_devices(device):
    with pytest.raises(FpnxError, match="device"):
        RunConfig(device=device)


def test_several_devices():
    assert RunConfig(device="cuda:0,cuda:1").device == "cuda:0,cuda:1"


@pytest.mark.parametrize(("cpus", "batch_size"), [(1, "auto"), (3, "auto"), (2, 5), (4, 1)], ids=str)
def test_the_same_numbers_with_any_number_of_threads_and_batch_size(tmp_path, many, monkeypatch, cpus, batch_size):
    monkeypatch.setattr("fpnx.extraction.plan.usable_cpus", lambda: cpus)
    before = torch.get_num_threads()
    result = fpnx.extract(many, tmp_path / "o.h5", batch_size=batch_size, levels="C2,P2-P6", **TINY)
    assert torch.get_num_threads() == before
    assert own_threads() == []
    assert (result.done, result.computed, len(result.failed)) == (22, 23, 1)
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="C2,P2-P6")
    recipe = model.recipe.sized(fpnx.ExtractConfig(size=64))
    with h5py.File(tmp_path / "o.h5") as file, torch.inference_mode():
        for i in (0, 6, 8, 22):
            image = recipe(Image.open(many / f"{i:02d}.png"))[None]
            for name, level in model(image).items():
                apart = np.abs(file[name][i] - level[0].numpy()).max()
                assert apart <= 1e-5 * level.abs().max().item()
        assert np.isnan(file["P2"][7]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_levels_are_stored_channels_first(dtype):
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P2,P5")
    config = fpnx.ExtractConfig(dtype=dtype, **TINY)
    engine = Engine(model, model.recipe.sized(config), config, torch.device("cpu"))
    pixels = [np.asarray(noise_image(i, (64, 64))) for i in range(3)]
    features = engine(pixels)
    with torch.inference_mode():
        wanted = model(torch.stack([engine.recipe(noise_image(i, (64, 64))) for i in range(3)]))
    for name, level in wanted.items():
        made = features.arrays[name]
        assert (made.dtype, made.shape, made.flags.c_contiguous) == (np.dtype(dtype), tuple(level.shape), True)
        rounded = level.to(getattr(torch, dtype)).float().numpy()
        near = 1e-5 if dtype == "float32" else 1e-3
        # Half precision has no values below 6e-8: an untrained MobileNetV2's coarse levels are smaller.
        assert np.abs(made.astype(np.float32) - rounded).max() <= near * np.abs(rounded).max() + (near == 1e-3) * 6e-8


def test_an_error_in_a_compute_thread_reaches_the_caller(tmp_path, many, monkeypatch):
    class BrokenError(Exception):
        pass

    def breaks(*_: object) -> None:
        raise BrokenError

    monkeypatch.setattr("fpnx.models.preprocessing.Recipe.normalise", breaks)  # used on every device
    with pytest.raises(BrokenError):
        fpnx.extract(many, tmp_path / "o.h5", **TINY)
    assert own_threads() == []
    assert (tmp_path / "o.h5.part").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "sizing",
    [{"size": 64}, {"size": "native"}, {"size": 64, "batch_size": 2}],
    ids=["fixed", "native", "steady"],  # steady: as many batches of one shape as it takes to record them
)
def test_cuda_gives_the_numbers_of_the_cpu(tmp_path, many, sizing):
    options = {**TINY, **sizing}
    fpnx.extract(many, tmp_path / "cpu.h5", device="cpu", **options)
    fpnx.extract(many, tmp_path / "cuda.h5", device="cuda", **options)
    with h5py.File(tmp_path / "cpu.h5") as cpu, h5py.File(tmp_path / "cuda.h5") as cuda:
        for name in ("P2", "P3", "P4", "P5"):
            a, b = cpu[name][:], cuda[name][:]
            assert np.nanmax(np.abs(a - b)) <= 1e-4 * np.nanmax(np.abs(a))
