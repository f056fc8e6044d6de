"""Direct convolution, Winograd's minimal filtering and OpenVINO: how accurate, and where the core time goes.

Run: python tests/benchmarks/winograd.py [BACKBONE ...] [--weights random] [--images 4] [--rounds 7] [--json FILE]

`error` is the largest absolute difference of a level from the same network in float64, divided by the level's largest
absolute value there. Core time is that of one thread, in ms an image, the median of rounds in which both forms take
turns; the convolutions are grouped by kernel, and `GFLOP/s` counts the operations of direct convolution. OpenVINO is
asked where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import fpnx
from fpnx.benchmark.synthetic_images import make_images
from fpnx.core.config import ExtractConfig
from fpnx.images.decoding import decode
from fpnx.images.listing import find_images
from fpnx.inference.engine import Engine
from fpnx.inference.packed_conv import PackedConv2d
from fpnx.inference.winograd import WinogradConvolution

SIZE = (224, 224)
FORMS = ("direct", "Winograd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=["vgg16", "resnet50", "mobilenet_v2"])
    parser.add_argument("--weights", default="random")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {name: measured(name, options) for name in options.backbones}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def measured(backbone: str, options: argparse.Namespace) -> dict[str, Any]:
    model = fpnx.create_model(backbone, weights=options.weights, levels="P2-P5")
    recipe = model.recipe.sized(ExtractConfig(size="224"))
    with tempfile.TemporaryDirectory(prefix="fpnx-") as folder:
        make_images(Path(folder), options.images)
        pictures = [decode(source, ExtractConfig().max_pixels) for source in find_images([folder]).sources]
        pixels = [recipe.resize(picture, SIZE) for picture in pictures]
        engines = {form: prepared(model, recipe, pixels, winograd=form == "Winograd") for form in FORMS}
        images = engines["direct"].batch(pixels, SIZE).contiguous()
        with torch.inference_mode():
            exact = copy.deepcopy(model).double()(images.double())
            found = {"eager": model(images)}
            found |= {form: engine.executable(images) for form, engine in engines.items()}
            if importlib.util.find_spec("openvino"):
                found["OpenVINO"] = openvino_levels(model, images)
            times = core_time(engines, images, options.rounds)
    errors = {name: level_errors(levels, exact) for name, levels in found.items()}
    print(f"\n{backbone}, error by level")
    for name, values in errors.items():
        print(f"{name:10}", " ".join(f"{level} {value:.1e}" for level, value in values.items()))
    print(f"{backbone}, core time in ms an image, and GFLOP/s")
    for group in sorted(times["direct"], key=lambda group: -times["direct"][group][0]):
        cells = (f"{name} {each[group][0]:7.1f} {each[group][1]:6.1f}" for name, each in times.items())
        print(f"{group:34}", "    ".join(cells), flush=True)
    return {"errors": errors, "core_ms_and_gflops": times}


def prepared(model: Any, recipe: Any, pixels: Any, *, winograd: bool) -> Engine:
    """An engine whose weights are packed for these images, with or without Winograd's way."""
    engine = Engine(model, recipe, ExtractConfig(), torch.device("cpu"))
    engine.prepare(SIZE)
    if winograd:
        engine(pixels)
    else:
        with patch.object(WinogradConvolution, "is_faster", lambda *_: False):
            engine(pixels)
    return engine


def openvino_levels(model: Any, images: Tensor) -> dict[str, Tensor]:
    import openvino

    traced = copy.deepcopy(model).requires_grad_(False)

    class Levels(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(traced(x).values())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it calls torch.jit.trace
        converted = openvino.convert_model(Levels().eval(), example_input=images)
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([images.numpy()])
    return {level: torch.from_numpy(found[number]) for number, level in enumerate(model.levels)}


def level_errors(levels: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: float((levels[name].double() - value).abs().max() / value.abs().max()) for name, value in exact.items()
    }


def core_time(
    engines: Mapping[str, Engine], images: Tensor, rounds: int
) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Form → group of convolutions, or all → core time in ms an image, and GFLOP/s."""
    samples: dict[str, dict[str, list[float]]] = {form: defaultdict(list) for form in engines}
    operations: dict[str, float] = defaultdict(float)
    for number in range(rounds):
        for form, engine in engines.items():
            spent: dict[str, float] = defaultdict(float)
            with timed(engine.executable, spent, operations if number == 0 and form == FORMS[0] else None):
                began = time.thread_time()
                engine.executable(images)
                seconds = time.thread_time() - began
            spent["all but convolutions"] = seconds - sum(spent.values())
            spent["all"] = seconds
            for group, seconds in spent.items():
                samples[form][group].append(1000 * seconds / len(images))
    operations["all"] = sum(operations.values())
    return {
        form: {
            group: (median, operations[group] / len(images) / median / 1e6 if operations.get(group) else float("nan"))
            for group, values in each.items()
            for median in [statistics.median(values)]
        }
        for form, each in samples.items()
    }


@contextmanager
def timed(model: nn.Module, spent: dict[str, float], operations: dict[str, float] | None) -> Iterator[None]:
    """Within the context, the core time of each packed convolution is added to its group in `spent`."""
    began = 0.0

    def before(*_: object) -> None:
        nonlocal began
        began = time.thread_time()

    def after(module: PackedConv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seconds = time.thread_time() - began
        group = group_of(module, inputs[0])
        spent[group] += seconds
        if operations is not None:
            operations[group] += 2 * output.numel() * module.weight[0].numel()

    convolutions = [module for module in model.modules() if isinstance(module, PackedConv2d)]
    hooks = [each.register_forward_pre_hook(before) for each in convolutions]
    hooks += [each.register_forward_hook(after) for each in convolutions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def group_of(module: PackedConv2d, x: Tensor) -> str:
    shape, side = module.weight.shape, (x.shape[2], x.shape[3])
    kernel = f"{shape[2]}×{shape[3]}" + (" depthwise" if module.groups > 1 else "")
    kernel += f" stride {module.stride[0]}" if module.stride[0] > 1 else ""
    plain = module.stride == module.dilation == (1, 1) and module.groups == 1 and tuple(shape[2:]) == (3, 3)
    takes = plain and WinogradConvolution.is_faster(shape, module.padding, side)
    return kernel + (", that Winograd takes" if takes else "")


if __name__ == "__main__":
    main()
