"""Shapes without torch's own code for meta tensors equal those that the operations give on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fpnx.models.meta_shapes import MetaShapes
from fpnx.models.torch_state import on_meta_device

SIZES = [(1, 1), (2, 9), (7, 8), (13, 64)]


def assert_same_shape(operation, *inputs: Tensor) -> None:
    """On meta tensors the operation gives what it gives on the CPU; what is refused there is left to torch."""
    meta = [each.to("meta") for each in inputs]
    try:
        expected = operation(*inputs)
    except RuntimeError:
        plain = outcome(operation, meta)
        with MetaShapes():
            assert outcome(operation, meta) == plain
        return
    with MetaShapes():
        found = operation(*meta)
    assert (found.shape, found.dtype, found.is_meta) == (expected.shape, expected.dtype, True)


def outcome(operation, inputs: list[Tensor]) -> object:
    try:
        return operation(*inputs).shape
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("size", SIZES)
def test_convolutions(size):
    x = torch.zeros(2, 4, *size)
    for kernel, stride, padding, dilation, groups in itertools.product(
        (1, 3, (1, 4)), (1, (2, 1)), (0, (2, 1), "valid"), (1, 2), (1, 4)
    ):
        made = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups)
        assert_same_shape(lambda each, made=made: F.conv2d(each, made.weight.to(each.device), None, *_rest(made)), x)
    assert_same_shape(lambda each: F.conv2d(each, torch.zeros(8, 3, 1, 1, device=each.device)), x)
    assert_same_shape(lambda each: F.conv2d(each, torch.zeros(8, 4, 1, 1, device=each.device, dtype=torch.half)), x)


def _rest(made: nn.Conv2d) -> tuple:
    return made.stride, made.padding, made.dilation, made.groups


@pytest.mark.parametrize("size", SIZES)
def test_poolings_and_resizings(size):
    x = torch.zeros(2, 4, *size)
    for kernel, stride, padding, ceil in itertools.product((1, 2, 3, (2, 3)), (None, 1, 2), (0, 1), (False, True)):
        assert_same_shape(nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil), x)
    for to in (1, (3, 5), [8, 2], (0, 4)):
        for mode in ("nearest", "bilinear", "area"):
            assert_same_shape(lambda each, to=to, mode=mode: F.interpolate(each, size=to, mode=mode), x)
    for scale in (2, 0.5, 1.3, (2.0, 0.4)):
        assert_same_shape(lambda each, scale=scale: F.interpolate(each, scale_factor=scale), x)


def test_sums_are_of_the_larger_shape_and_of_the_wider_type():
    x, row, half = torch.zeros(2, 4, 3, 3), torch.zeros(3), torch.zeros(2, 4, 3, 3, dtype=torch.float16)
    for first, second in [(x, x), (x, row), (row, x), (half, x), (half, half), (x, torch.zeros(2))]:
        for add in (lambda a, b: a + b, torch.add, Tensor.add):
            assert_same_shape(add, first, second)
    assert_same_shape(lambda each: each + 1, x)
    assert_same_shape(lambda each: torch.add(each, each, alpha=2), x)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counted", [False, True])
def test_torch_sees_convolutions_where_they_are_counted(counted):
    with on_meta_device(counted=counted), _Operations() as seen:
        F.conv2d(torch.empty(1, 3, 8, 8), torch.empty(4, 3, 3, 3))
    assert ("convolution" in seen.names) is counted
