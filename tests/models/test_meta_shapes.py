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


def assert_as_torch(operation, *inputs: Tensor) -> None:
    """Of meta tensors the operation gives, or refuses, what it does without; shapes are those on the CPU."""
    meta = [each.to("meta") for each in inputs]
    plain = outcome(operation, meta)
    with MetaShapes():
        assert outcome(operation, meta) == plain
    on_cpu = outcome(operation, list(inputs))
    if not isinstance(plain, type) and not isinstance(on_cpu, type):
        assert plain[0] == on_cpu[0]


def outcome(operation, inputs: list[Tensor]) -> tuple | type:
    """Shape, strides and dtype of the result, or the class of the error."""
    try:
        made = operation(*inputs)
    except Exception as error:
        return type(error)
    return made.shape, made.stride(), made.dtype


@pytest.mark.parametrize("size", SIZES)
def test_convolutions(size):
    x = torch.zeros(2, 4, *size)
    for kernel, stride, padding, dilation, groups in itertools.product(
        (1, 3, (1, 4)), (1, (2, 1)), (0, (2, 1), "valid"), (1, 2), (1, 4)
    ):
        made = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups)
        assert_as_torch(lambda each, made=made: F.conv2d(each, made.weight.to(each.device), None, *_rest(made)), x)


def _rest(made: nn.Conv2d) -> tuple:
    return made.stride, made.padding, made.dilation, made.groups


@pytest.mark.parametrize("size", SIZES)
def test_poolings_and_resizings(size):
    x = torch.zeros(2, 4, *size)
    for kernel, stride, padding, ceil in itertools.product((1, 2, 3, (2, 3)), (None, 1, 2), (0, 1), (False, True)):
        assert_as_torch(nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil), x)
    for to in (1, (3, 5), [8, 2], (0, 4)):
        for mode in ("nearest", "bilinear", "area"):
            assert_as_torch(lambda each, to=to, mode=mode: F.interpolate(each, size=to, mode=mode), x)
    for scale in (2, 0.5, 1.3, (2.0, 0.4)):
        assert_as_torch(lambda each, scale=scale: F.interpolate(each, scale_factor=scale), x)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.conv2d(x, x.new_zeros(8, 3, 1, 1)),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 1)),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 1, 1, dtype=torch.half)),
        lambda x: F.conv2d(x, x.new_zeros(6, 1, 1, 1), groups=4),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 1, 1), x.new_zeros(8)),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 1, 1), x.new_zeros(7)),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 1, 1), x.new_zeros(8, dtype=torch.half)),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 1, 1), stride=0),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 1, 1), stride=(2,)),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 1, 1), stride=1.5),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 3, 3), padding=-1),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 3, 3), padding="same"),
        lambda x: F.conv2d(x, x.new_zeros(8, 4, 3, 3), dilation=0),
        lambda x: F.conv2d(x.permute(0, 1, 3, 2), x.new_zeros(8, 4, 3, 3)),
        lambda x: F.max_pool2d(x, (2,)),
        lambda x: torch.max_pool2d(x, [2], ()),
        lambda x: F.max_pool2d(x, 2, 0),
        lambda x: F.max_pool2d(x, 2, padding=-1),
        lambda x: F.max_pool2d(x, 3, return_indices=True)[0],
        lambda x: F.max_pool2d(x[0], 2),
        lambda x: F.interpolate(x, size=[4]),
        lambda x: F.interpolate(x, size=(4.0, 4.0)),
        lambda x: F.interpolate(x, size=4, mode="nearest", align_corners=True),
        lambda x: F.interpolate(x, size=4, mode="nearest", antialias=True),
        lambda x: F.interpolate(x, size=4, mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, size=4, recompute_scale_factor=True),
        lambda x: F.interpolate(x, size=4, scale_factor=2.0),
        lambda x: x.permute(0, 2, 3, 1) + x.permute(0, 2, 3, 1),
        lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), 2),
    ],
)
def test_odd_arguments_are_left_to_torch(operation):
    assert_as_torch(operation, torch.zeros(2, 4, 7, 9))


def test_sums_are_of_the_larger_shape_and_of_the_wider_type():
    x, row, half = torch.zeros(2, 4, 3, 3), torch.zeros(3), torch.zeros(2, 4, 3, 3, dtype=torch.float16)
    for first, second in [(x, x), (x, row), (row, x), (half, x), (half, half), (x, torch.zeros(2))]:
        for add in (lambda a, b: a + b, torch.add, Tensor.add):
            assert_as_torch(add, first, second)
    assert_as_torch(lambda each: each + 1, x)
    assert_as_torch(lambda each: torch.add(each, each, alpha=2), x)


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
