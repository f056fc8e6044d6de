"""Winograd's minimal filtering equals direct convolution, in rational arithmetic and in float32, for any size."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpnx.inference.graph_fusion import fuse_model
from fpnx.inference.packed_conv import PackedConv2d, can_pack
from fpnx.inference.winograd import POINTS, WinogradConvolution, _cook_toom
from fpnx.models.factory import create_model

EQUAL = 3e-6  # of the greatest magnitude; direct convolution in float32 differs as much from float64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolution(channels: int = 128, outputs: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(outputs, channels, 3, 3, seed=1) / (3 * channels**0.5), drawn(outputs, seed=2)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= EQUAL * expected.abs().max()


def test_matrices_give_the_correlation_exactly() -> None:
    numbers = random.Random(0)
    inputs, kernel, outputs = _cook_toom(POINTS)
    for _ in range(5):
        d, g = ([Fraction(numbers.randint(-9, 9)) for _ in range(length)] for length in (6, 3))
        product = [
            sum(a * x for a, x in zip(row, d, strict=True)) * sum(a * x for a, x in zip(other, g, strict=True))
            for row, other in zip(inputs, kernel, strict=True)
        ]
        found = [sum(a * x for a, x in zip(row, product, strict=True)) for row in outputs]
        assert found == [sum(d[i + k] * g[k] for k in range(3)) for i in range(4)]


@pytest.mark.parametrize(("channels", "outputs"), [(8, 40), (40, 8)])
def test_any_numbers_of_channels_are_taken(channels: int, outputs: int) -> None:
    weight, bias = convolution(channels, outputs)
    x = drawn(1, channels, 20, 20)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert_near(WinogradConvolution(weight)(x, bias, (1, 1)), expected)


@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("size", [(16, 16), (13, 22), (57, 14), (41, 39)])
def test_equals_direct_convolution(size: tuple[int, int], padding: tuple[int, int]) -> None:
    weight, bias = convolution(48, 40)
    x = drawn(3, 48, *size)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    winograd = WinogradConvolution(weight)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_near(winograd(x.contiguous(memory_format=layout), bias, padding), expected)


def test_bias_addition_and_activation_are_applied_at_the_end() -> None:
    weight, bias = convolution(32, 48)
    x, other = drawn(2, 32, 17, 30), drawn(2, 48, 17, 30, seed=3).contiguous(memory_format=torch.channels_last)
    plain = F.conv2d(x.double(), weight.double(), padding=1)
    winograd = WinogradConvolution(weight)
    assert_near(winograd(x, None, (1, 1)), plain)
    biased = plain + bias.double()[:, None, None]
    assert_near(winograd(x, bias, (1, 1), activation=nn.SiLU()), F.silu(biased))
    expected = F.relu(biased + other.double())
    kept = other.clone()
    assert_near(winograd(x, bias, (1, 1), other, nn.ReLU(inplace=True)), expected)
    assert torch.equal(other, kept)
    overwritten = winograd(x, bias, (1, 1), other, nn.ReLU(inplace=True), accumulates=True)
    assert_near(overwritten, expected)
    assert overwritten.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("size", [(14, 14), (16, 28), (30, 56)])
def test_an_image_alone_has_the_numbers_that_it_has_in_a_batch_and_with_several_threads(size: tuple[int, int]) -> None:
    weight, bias = convolution()
    winograd, x = WinogradConvolution(weight), drawn(9, 128, *size)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = winograd(x, bias, (1, 1))
        for chosen in (slice(0, 1), slice(3, 4), slice(2, 9)):
            assert torch.equal(winograd(x[chosen], bias, (1, 1)), together[chosen])
        torch.set_num_threads(2)
        assert torch.equal(winograd(x, bias, (1, 1)), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("weight", "padding", "size", "faster"),
    [
        ((256, 256, 3, 3), (1, 1), (56, 56), True),
        ((128, 128, 3, 3), (1, 1), (14, 14), True),
        ((128, 64, 3, 3), (1, 1), (56, 56), False),  # few channels
        ((64, 128, 3, 3), (1, 1), (56, 56), False),
        ((512, 512, 3, 3), (1, 1), (7, 7), False),  # few tiles
        ((512, 512, 3, 3), (1, 1), (7, 200), False),  # two tiles high
        ((256, 256, 3, 3), (0, 0), (14, 14), False),  # 12 × 12: three tiles a side
        ((256, 256, 3, 3), (1, 1), (13, 13), False),  # 16 × 16 are computed
        ((256, 256, 3, 3), (0, 0), (2, 2), False),  # nothing is left
    ],
)
def test_large_maps_with_many_channels_are_computed_so(
    weight: tuple[int, ...], padding: tuple[int, int], size: tuple[int, int], faster: bool
) -> None:
    assert WinogradConvolution.is_faster(weight, padding, size) is faster


@pytest.mark.skipif(not can_pack(torch.float32), reason="weights are not packed here")
@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_models_computed_so_equal_the_plain_ones(name: str) -> None:
    model = create_model(name, weights="random", levels="C4,P2-P4", channels=128)
    made = fuse_model(model)
    x = drawn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model.double()(x.double())
        found = made.pack(x)
        again = made(x[:1])
        odd = drawn(1, 3, 75, 67)
        wanted = model(odd.double())
        model.float()
        for name, level in expected.items():
            assert (found[name] - level).abs().max() <= 1e-5 * level.abs().max()
            assert torch.equal(again[name], found[name][:1])
        for name, level in made(odd).items():
            assert (level - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max()
    layers = [module for module in made.modules() if isinstance(module, PackedConv2d)]
    assert sum(module.winograd is not None for module in layers) >= 1
