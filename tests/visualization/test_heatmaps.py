"""Values of heatmaps, against hand-worked numbers and a singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fpnx.core.errors import FpnxError
from fpnx.visualization.heatmaps import Basis, Moments, heatmap, strongest_channels

SMALL = np.array([[[3.0, 0.0], [1.0, -2.0]], [[4.0, 0.0], [1.0, 2.0]]])  # (2, 2, 2)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("energy", [[5, 0], [2**0.5, 8**0.5]]),
        ("mean", [[3.5, 0], [1, 0]]),
        ("max", [[4, 0], [1, 2]]),
        ("std", [[0.5, 0], [0, 2]]),
    ],
    ids=str,
)
def test_one_number_a_cell(mode: str, expected: list[list[float]]) -> None:
    shown = heatmap(SMALL, mode)
    assert shown.dtype == np.float32
    assert shown == pytest.approx(np.array(expected), rel=1e-6)


def test_energy_of_tiny_and_of_large_values() -> None:
    assert heatmap(np.full((4, 1, 1), 1e-30, np.float32)) == pytest.approx(np.array([[2e-30]]), rel=1e-5)
    assert heatmap(np.full((100, 1, 1), 65504, np.float16)) == pytest.approx(np.array([[655040.0]]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_are_taken_too(dtype: torch.dtype) -> None:
    tensor = torch.tensor(SMALL, dtype=dtype, requires_grad=True)
    assert heatmap(tensor, "max") == pytest.approx(heatmap(SMALL, "max"))


def test_similarity_by_hand() -> None:
    shown = heatmap(SMALL, "similarity", cell=(0, 0))
    assert shown[0, 0] == 1.0
    assert np.isnan(shown[0, 1])  # a cell of length 0 has no direction
    assert shown[1, 0] == pytest.approx((3 + 4) / (5 * 2**0.5))
    assert shown[1, 1] == pytest.approx((-6 + 8) / (5 * 8**0.5))


def test_similarity_of_a_cell_with_itself_is_one_and_symmetric() -> None:
    array = np.random.default_rng(0).normal(size=(33, 4, 5))
    for y, x in [(0, 0), (3, 4), (1, 2)]:
        assert heatmap(array, "similarity", cell=(y, x))[y, x] == 1.0
    forward, back = heatmap(array, "similarity", cell=(1, 2))[3, 0], heatmap(array, "similarity", cell=(3, 0))[1, 2]
    assert forward == pytest.approx(back)
    assert heatmap(-array, "similarity", cell=(1, 2)) == pytest.approx(heatmap(array, "similarity", cell=(1, 2)))


def test_two_components_by_hand() -> None:
    # cells (±2, 0) and (0, ±1): covariance diag(2, 0.5), so the axes are the components and 80 % lie along the first
    cells = np.array([[12.0, 20], [8, 20], [10, 21], [10, 19]])
    moments = Moments(2)
    moments.add(cells[:1])
    moments.add(cells[1:])
    basis = moments.basis()
    assert basis.mean == pytest.approx([10, 20])
    assert basis.components == pytest.approx(np.array([[1, 0], [0, 1], [0, 0]]))
    assert basis.explained == pytest.approx([0.8, 0.2, 0])
    array = cells.T.reshape(2, 2, 2)
    assert basis.project(array)[:2].reshape(2, 4) == pytest.approx((cells - [10, 20]).T)
    # at 1 and 99 % of (-2, 0, 0, 2): 3 % of the way from an end to its neighbour
    ranged = basis.with_range(basis.project(array).reshape(3, -1))
    assert ranged.high[:2] == pytest.approx([2 - 0.03 * 2, 1 - 0.03])
    colours = ranged.colours(array).reshape(4, 3)
    assert colours[:, 0] == pytest.approx([1, 0, 0.5, 0.5])
    assert colours[:, 1] == pytest.approx([0.5, 0.5, 1, 0])
    assert colours[:, 2] == pytest.approx([0.5] * 4)  # there is no third component


def test_components_agree_with_a_singular_value_decomposition() -> None:
    array = np.random.default_rng(1).normal(size=(6, 9, 7)) * np.arange(1, 7)[:, None, None]
    cells = array.reshape(6, -1).T
    _, values, rows = np.linalg.svd(cells - cells.mean(axis=0), full_matrices=False)
    basis = Basis.fit(array)
    for own, other in zip(basis.components, rows[:3], strict=True):
        assert abs(float(own @ other)) == pytest.approx(1)
        assert own[np.abs(own).argmax()] > 0
    assert basis.explained == pytest.approx((values**2 / (values**2).sum())[:3])


@pytest.mark.parametrize("channels", [1, 2, 3, 40])
def test_pca_of_few_channels_and_of_a_constant(channels: int) -> None:
    colours = heatmap(np.random.default_rng(2).normal(size=(channels, 5, 4)), "pca")
    assert colours.shape == (5, 4, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert (heatmap(np.ones((channels, 5, 4)), "pca") == 0.5).all()


def test_nonfinite_cells_are_nan_and_do_not_affect_others() -> None:
    array = np.random.default_rng(3).normal(size=(4, 6, 6))
    broken = array.copy()
    broken[2, 1, 1] = np.nan
    broken[0, 5, 5] = np.inf
    colours = heatmap(broken, "pca")
    bad = np.isnan(colours).all(axis=2)
    assert sorted(map(tuple, np.argwhere(bad))) == [(1, 1), (5, 5)]
    assert np.isfinite(colours[~bad]).all()
    assert np.isnan(heatmap(broken, "energy")[1, 1])
    assert np.isfinite(heatmap(broken, "energy")).sum() == 34


def test_channels_the_strongest_first() -> None:
    array = np.zeros((5, 2, 2), np.float32)
    array[1], array[3, 0, 0], array[4] = -2, 100, 2
    assert strongest_channels(array, 3) == (3, 1, 4)  # means of |x|: 25, 2, 2, of which the lower number comes first
    assert heatmap(array, "channels", top=2) == pytest.approx(array[[3, 1]])
    assert heatmap(array, "channels", pick="4,0-1") == pytest.approx(array[[4, 0, 1]])
    assert len(heatmap(array, "channels")) == 5  # no more than there are


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "enrgy"}, r"did you mean energy\?"),
        ({"mode": "similarity"}, "give cell"),
        ({"mode": "similarity", "cell": (2, 0)}, "outside a map of 2×2"),
        ({"mode": "channels", "pick": [2]}, "numbered from 0 to 1"),
        ({"mode": "channels", "pick": "one"}, "such as 3,17"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        heatmap(SMALL, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 2), (1, 2, 2, 2), (0, 2, 2)], ids=str)
def test_only_one_image_s_level(shape: tuple[int, ...]) -> None:
    with pytest.raises(FpnxError, match="channels, height, width"):
        heatmap(np.zeros(shape))
