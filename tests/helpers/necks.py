"""Taps for necks, and comparisons of levels with those of a reference and of the executed form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fpnx import PyramidModel
from fpnx.inference.graph_fusion import FusedModel, fuse_model

__all__ = ["assert_levels_equal", "check_executed_form", "random_taps"]


def random_taps(channels: Mapping[int, int], height: int, width: int) -> dict[str, Tensor]:
    """Two random maps for each level number of `channels`, of which the finest has that size."""
    generator, taps = torch.Generator().manual_seed(0), {}
    for k, count in channels.items():
        taps[f"C{k}"] = torch.randn(2, count, height, width, generator=generator)
        height, width = -(-height // 2), -(-width // 2)
    return taps


def assert_levels_equal(levels: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Same number, same shapes, and values within 1e-5 of each level's largest."""
    for level, wanted in zip(levels, expected, strict=True):
        assert level.shape == wanted.shape
        assert (level - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def check_executed_form(model: PyramidModel, sizes: Iterable[tuple[int, int]]) -> FusedModel:
    """The executed form of `model`, which gives the same levels for images of these sizes, packed or not."""
    fused = fuse_model(model)
    for size in sizes:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = model(images)
            for found in (fused(images), fused.pack(images)):
                assert list(found) == list(expected)
                assert_levels_equal(found.values(), expected.values())
    return fused
