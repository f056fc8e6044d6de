"""Counts of parameters and operations, against torch's counter on torchvision and by hand; stage timing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork

import fpnx
from fpnx.benchmark.profiling import MERGE, Cost, count_costs, marked, peak_bytes, timed_body
from fpnx.benchmark.timers import Stopwatch
from fpnx.inference.graph_fusion import fuse_model


def resnet50(levels: str = "P2-P5", top_block: str | None = None) -> fpnx.PyramidModel:
    return fpnx.create_model("resnet50", weights="random", levels=levels, top_block=top_block)


def convolution(side: int, kernel: int, inputs: int, outputs: int) -> int:
    """Operations of a convolution that gives a side × side map: a multiply and an add for each weight and cell."""
    return 2 * side * side * kernel * kernel * inputs * outputs


def stage(side: int, inputs: int, width: int, blocks: int) -> int:
    """A stage of bottleneck blocks (arXiv 1512.03385, table 1), the stride in the first 3×3 as torchvision has it."""
    finer = side if inputs == 64 else 2 * side
    first = convolution(finer, 1, inputs, width) + convolution(side, 1, inputs, 4 * width)
    others = (blocks - 1) * convolution(side, 1, 4 * width, width)
    return first + others + blocks * (convolution(side, 3, width, width) + convolution(side, 1, width, 4 * width))


STAGES = [
    convolution(112, 7, 3, 64) + stage(56, 64, 64, 3),
    stage(28, 256, 128, 4),
    stage(14, 512, 256, 6),
    stage(7, 1024, 512, 3),
]
SIDES, CHANNELS = (56, 28, 14, 7), (256, 512, 1024, 2048)
LATERALS = [convolution(side, 1, inputs, 256) for side, inputs in zip(SIDES, CHANNELS, strict=True)]
OUTPUTS = [convolution(side, 3, 256, 256) for side in SIDES]


def test_resnet50_by_hand() -> None:
    assert count_costs(resnet50(), (224, 224)) == (
        # 25,557,032 with its classifier of 2048 · 1000 + 1000
        Cost("backbone", 25_557_032 - 2_049_000, sum(STAGES)),
        Cost("laterals", 256 * sum(CHANNELS) + 4 * 256, sum(LATERALS)),
        Cost("outputs", 4 * (9 * 256 * 256 + 256), sum(OUTPUTS)),
    )


def test_resnet50_by_the_counter_of_torch_on_torchvision() -> None:
    nodes = {f"layer{i}": f"{i}" for i in range(1, 5)}
    body = create_feature_extractor(models.resnet50(weights=None).eval(), nodes)
    pyramid = FeaturePyramidNetwork(list(CHANNELS), 256)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pyramid(body(torch.zeros(1, 3, 224, 224)))
    costs = count_costs(resnet50(), (224, 224))
    assert sum(cost.flops for cost in costs) == counter.get_total_flops()
    parameters = [*body.parameters(), *pyramid.parameters()]
    assert sum(cost.parameters for cost in costs) == sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("levels", "top_block", "flops"),
    [
        ("C3", None, {"backbone": sum(STAGES[:2])}),
        ("P4", None, {"backbone": sum(STAGES), "laterals": sum(LATERALS[2:]), "outputs": OUTPUTS[2]}),
        ("P5,P6", "pool", {"laterals": LATERALS[3], "outputs": OUTPUTS[3], "top block": 0}),
        ("P6,P7", "c5", {"outputs": 0, "top block": convolution(4, 3, 2048, 256) + convolution(2, 3, 256, 256)}),
        ("P6", "p5", {"outputs": OUTPUTS[3], "top block": convolution(4, 3, 256, 256)}),
    ],
    ids=["taps only", "one level", "pool", "c5", "p5"],
)
def test_only_what_the_levels_need_is_counted(levels: str, top_block: str | None, flops: dict[str, int]) -> None:
    actual = {cost.part: cost.flops for cost in count_costs(resnet50(levels, top_block), (224, 224))}
    assert flops.items() <= actual.items()
    assert ("laterals" in actual) == (levels != "C3")


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2", "vgg16"])
def test_a_timed_body_computes_the_same(backbone: str) -> None:
    model = fpnx.create_model(backbone, weights="random")
    body = timed_body(model.body, Stopwatch(torch.device("cpu")))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, actual = model.body(images), body(images)
    assert list(actual) == list(expected) == ["C2", "C3", "C4", "C5"]
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    own = dict(model.body.named_parameters())
    assert own.keys() == dict(body.named_parameters()).keys()
    assert all(own[name] is parameter for name, parameter in body.named_parameters())


def test_each_convolution_belongs_to_its_stage() -> None:
    body = timed_body(resnet50().body, Stopwatch(torch.device("cpu")))
    counts: list[int] = [0]
    for module in (body.get_submodule(str(n.target)) for n in body.graph.nodes if n.op == "call_module"):
        if isinstance(module, torch.nn.Conv2d):
            counts[-1] += 1
        elif type(module).__name__ == "_StageMark":
            counts.append(0)
    # a stem and blocks of three, one more where the size or the number of channels changes
    assert counts == [1 + 3 * 3 + 1, 3 * 4 + 1, 3 * 6 + 1, 3 * 3 + 1, 0]


def test_marks_come_in_order_and_shallow_levels_stop_early() -> None:
    watch = Stopwatch(torch.device("cpu"))
    images = torch.zeros(1, 3, 64, 64)
    for levels, expected in (("P2", ["C2", "C3", "C4", "C5"]), ("C2,C3", ["C2", "C3"])):
        body = timed_body(fuse_model(resnet50(levels)).body, watch)
        watch.start()
        with torch.inference_mode():
            assert list(body(images)) == expected
        seconds = watch.seconds()
        assert list(seconds) == expected
        assert all(value > 0 for value in seconds.values())


def test_blocks_are_marked_only_within_the_context() -> None:
    model, watch = resnet50(), Stopwatch(torch.device("cpu"))
    blocks = [(f"output P{k}", block) for k, block in enumerate(model.fpn.layer_blocks, 2)]
    taps = model.taps(torch.zeros(1, 3, 64, 64))
    watch.start()
    with torch.inference_mode():
        with marked(blocks, watch):
            model.fpn(taps)
        assert list(watch.seconds()) == [MERGE, "output P5", "output P4", "output P3", "output P2"]
        watch.start()
        model.fpn(taps)
        assert watch.seconds() == {}


def test_peak_memory_is_proportional_to_the_area_and_covers_taps_and_levels() -> None:
    model = resnet50()
    peak = peak_bytes(model, (224, 224))
    assert peak_bytes(model, (448, 448)) == 4 * peak
    # While P2 is computed, its sum and the coarser levels are in memory.
    assert peak >= 4 * 256 * (56 * 56 + 56 * 56 + 28 * 28 + 14 * 14 + 7 * 7)
    assert peak < 20e6
