"""RoIAlign of boxes: levels of Eq. 1 worked out by hand, features equal to those of torchvision."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from fpnx.core.errors import FpnxError
from fpnx.inference.region_pooling import LevelRegions, RegionPooling, joined_regions
from tests.helpers.boxes import random_boxes

STRIDES = {"P2": 4, "P3": 8, "P4": 16, "P5": 32}


def square(side: float) -> list[float]:
    return [3.0, 5.0, 3.0 + side, 5.0 + side]


def pooled(
    pooling: RegionPooling, levels: dict[str, torch.Tensor], boxes: list[np.ndarray], dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Features of all boxes, in their order."""
    parts = {name: pooling.pool(name, level, boxes, dtype) for name, level in levels.items()}
    arrays = {name: LevelRegions(part.places, part.features.numpy()) for name, part in parts.items()}
    channels = max(level.shape[1] for level in levels.values())
    shape = (sum(map(len, boxes)), channels, *pooling.shape)
    return joined_regions(arrays, shape, str(dtype).removeprefix("torch."))


def test_the_level_of_a_box_is_that_of_equation_1() -> None:
    """k = floor(4 + log2(sqrt(w h) / 224)): 224 gives 4, each half one less, and only the area counts."""
    boxes = [square(side) for side in (10, 55, 56, 111, 112, 223, 224, 447, 448, 2000)]
    boxes += [[0, 0, 112, 448], [0, 0, 28, 448], [0, 0, 448, 27]]  # areas of 224², 112², and a little less
    expected = [2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 4, 3, 2]
    assert RegionPooling(STRIDES, "7x7").levels(np.array(boxes)).tolist() == expected
    higher = RegionPooling({"P3": 8, "P4": 16, "P5": 32, "P6": 64}, "7x7")
    assert higher.levels(np.array([square(1), square(448), square(896)])).tolist() == [3, 5, 6]


def test_of_levels_with_a_gap_the_coarsest_that_is_not_above_is_taken() -> None:
    pooling = RegionPooling({"P3": 8, "P5": 32}, "7x7")
    assert pooling.levels(np.array([square(10), square(224), square(448)])).tolist() == [3, 3, 5]


def test_a_map_of_another_stride_has_the_nearest_number_and_its_own_scale() -> None:
    """The tap of a vision transformer with patches of 14 pixels is C4: a linear ramp gives the centre of each box."""
    pooling = RegionPooling({"C4": 14}, "avg")
    ramp = (torch.arange(16.0)[None, None, None, :] + 0.0).expand(1, 1, 16, 16)  # value x at cell x
    boxes = np.array([[28.0, 28.0, 84.0, 84.0], [14.0, 0.0, 112.0, 200.0]])
    assert pooling.levels(boxes).tolist() == [4, 4]
    # x of the centre, divided by the stride
    np.testing.assert_allclose(pooled(pooling, {"C4": ramp}, [boxes]).ravel(), [56 / 14, 63 / 14], rtol=1e-5)


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (3, 5)])
def test_features_are_those_of_torchvision(size: tuple[int, int]) -> None:
    chance = torch.Generator().manual_seed(0)
    input_size = (640, 832)
    levels = {
        name: torch.randn(3, 6, input_size[0] // stride, input_size[1] // stride, generator=chance)
        for name, stride in STRIDES.items()
    }
    boxes = [random_boxes(i, count, input_size) for i, count in enumerate((40, 0, 25))]
    boxes[0][:2] = [-30, 200, 100, 700], [0, 0, 832, 640]  # beyond the edges, and all
    pooling = RegionPooling(STRIDES, f"{size[0]}x{size[1]}")
    assert len(set(pooling.levels(np.concatenate(boxes)))) == 4
    theirs = MultiScaleRoIAlign(list(levels), list(size), sampling_ratio=2)
    expected = theirs(OrderedDict(levels), [torch.from_numpy(b).float() for b in boxes], [input_size] * 3)
    np.testing.assert_allclose(pooled(pooling, levels, boxes), expected.numpy(), atol=1e-5)


def test_avg_is_the_mean_of_7_by_7_cells() -> None:
    levels = {"P4": torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(1))}
    boxes = [random_boxes(5, 6, (320, 320))]
    cells = pooled(RegionPooling({"P4": 16}, "7x7"), levels, boxes)
    means = pooled(RegionPooling({"P4": 16}, "avg"), levels, boxes)
    assert means.shape == (6, 4, 1, 1)
    np.testing.assert_allclose(means[..., 0, 0], cells.mean(axis=(2, 3)), atol=1e-6)


def test_levels_with_fewer_channels_are_filled_up_with_zeros() -> None:
    levels = {"C4": torch.ones(1, 2, 40, 40), "C5": torch.ones(1, 3, 20, 20)}
    boxes = [np.array([square(300), square(500)])]
    features = pooled(RegionPooling({"C4": 16, "C5": 32}, "1x1"), levels, boxes)
    assert features[..., 0, 0].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_box_of_nan_has_level_0_and_zeros() -> None:
    pooling = RegionPooling(STRIDES, "2x2")
    boxes = [np.array([square(40), [np.nan] * 4])]
    assert pooling.levels(boxes[0]).tolist() == [2, 0]
    levels = {name: torch.ones(1, 1, 256 // stride, 256 // stride) for name, stride in STRIDES.items()}
    assert pooled(pooling, levels, boxes).reshape(2, -1).tolist() == [[1] * 4, [0] * 4]


def test_values_that_are_not_finite_are_counted_by_image() -> None:
    level = torch.ones(3, 1, 64, 64)
    level[2] = float("nan")
    boxes = [np.array([square(40)]), np.empty((0, 4)), np.array([square(40), square(20)])]
    part = RegionPooling({"P2": 4}, "2x2").pool("P2", level, boxes, torch.float16)
    assert part.nonfinite.tolist() == [0, 0, 8]
    assert (part.features.dtype, part.places.tolist()) == (torch.float16, [0, 1, 2])


@pytest.mark.parametrize("strides", [{"C3": 8, "P3": 8}, {"0": 32, "1": 32, "pool": 64}])
def test_two_levels_of_one_stride_are_refused(strides: dict[str, int]) -> None:
    with pytest.raises(FpnxError, match=r"levels \S+ and \S+ have one stride.*name one with --levels"):
        RegionPooling(strides, "7x7")
