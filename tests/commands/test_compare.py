"""fpnx compare: levels of files, image by image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fpnx
from fpnx.analysis import comparison
from fpnx.analysis.vectors import blocks
from fpnx.core.errors import FpnxError
from tests.helpers.stored import stored

Run = Callable[..., Any]
RANDOM = np.random.default_rng(1)
X, Y = RANDOM.normal(size=(40, 6)), RANDOM.normal(size=(40, 4))
ROTATION = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two files, the second in another order; its P5 is the first one's P3, rotated and scaled."""
    names, order = [f"{i:02}.jpg" for i in range(40)], RANDOM.permutation(40)
    a = stored(tmp_path / "a.h5", {"P3": X, "P4": Y}, names)
    b = stored(tmp_path / "b.h5", {"P4": RANDOM.normal(size=(40, 3)), "P5": (3 * X @ ROTATION)[order]},
               [names[i] for i in order])  # fmt: skip
    return a, b


def test_a_rotated_level_in_another_order_is_the_same(pair: tuple[Path, Path]) -> None:
    result = fpnx.compare(pair)
    assert result.levels == (("P3", "P4"), ("P4", "P5"))
    assert result.images == result.rsa_images == 40
    assert result.cka[0, 1] == pytest.approx(1, abs=1e-5)
    assert result.rsa[0, 1] == pytest.approx(1, abs=1e-5)
    assert abs(result.cka[[0, 1], [0, 0]]).max() < 0.3


def test_blocks_give_the_same_as_all_at_once(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fpnx.compare(pair)
    monkeypatch.setattr(comparison, "blocks", lambda count: blocks(count, 7))
    parts = fpnx.compare(pair)
    np.testing.assert_allclose(parts.cka, whole.cka, atol=1e-12)
    np.testing.assert_allclose(parts.rsa, whole.rsa, atol=1e-12)


def test_one_file_is_compared_with_itself(pair: tuple[Path, Path]) -> None:
    result = fpnx.compare(pair[0])
    np.testing.assert_allclose(np.diag(result.cka), 1)
    np.testing.assert_allclose(np.diag(result.rsa), 1)
    np.testing.assert_allclose(result.cka, result.cka.T)
    assert result.cka[0, 1] == pytest.approx(fpnx.compare([pair[0], pair[0]]).cka[0, 1])


def test_a_sample_for_rsa_is_drawn_with_the_seed(pair: tuple[Path, Path]) -> None:
    whole, first, again, other = (
        fpnx.compare(pair, **options) for options in ({}, {"sample": 10}, {"sample": 10}, {"sample": 10, "seed": 1})
    )
    assert (first.images, first.rsa_images) == (40, 10)
    np.testing.assert_array_equal(first.cka, whole.cka)
    np.testing.assert_array_equal(first.rsa, again.rsa)
    assert abs(first.rsa - other.rsa).max() > 1e-3
    assert first.rsa[0, 1] == pytest.approx(1, abs=1e-5)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    x = X[:12].copy()
    x[3, 0] = np.nan
    a = stored(tmp_path / "a.h5", {"P3": x}, failed=[5])
    b = stored(tmp_path / "b.h5", {"P3": X[:10]})
    result = fpnx.compare([a, b])
    assert result.images == 8  # of 10 in both: without the broken one, and the one with NaN
    assert result.unmatched == (2, 1)
    assert result.nonfinite == 1
    assert result.cka[0, 0] == pytest.approx(1)


def test_nothing_but_nan_is_said(tmp_path: Path) -> None:
    file = stored(tmp_path / "a.h5", {"P3": np.full((12, 6), np.nan), "P4": X[:12]})
    with pytest.raises(FpnxError, match=r"0 images to compare \(12 images left out for NaN or infinite values\)"):
        fpnx.compare(file)


def test_a_level_without_differences(tmp_path: Path, fpnx: Run) -> None:
    stored(tmp_path / "a.h5", {"P3": X, "P4": np.ones((40, 2))})
    code, out, _ = fpnx("compare", "a.h5")
    assert code == 0
    assert out.splitlines()[3].split() == ["P3", "1.000", "–"]
    assert "vectors of P4 of a.h5 are the same for all images" in out
    document = json.loads(fpnx("compare", "a.h5", "--json")[1])
    assert document["cka"]["matrix"][0][1] is None
    assert document["constant"] == [["P4"], ["P4"]]


def test_the_command_line(pair: tuple[Path, Path], tmp_path: Path, fpnx: Run) -> None:
    code, out, _ = fpnx("compare", "a.h5", "b.h5", "--sample", 10, "-o", "matrix.png")
    assert code == 0
    assert "linear CKA (unbiased), 40 images" in out
    assert "10 images of 40, seed 0" in out
    with Image.open(tmp_path / "matrix.png") as picture:
        assert picture.size[0] > 600
    document = json.loads(fpnx("compare", "a.h5", "b.h5", "--json", "--levels", "P3,P5")[1])
    assert document["levels"] == [["P3"], ["P5"]]
    assert document["cka"]["estimator"] == "unbiased"
    assert document["rsa"]["images"] == 40
    code, _, error = fpnx("compare", "a.h5", "b.h5", "-o", "matrix.png")
    assert (code, "matrix.png exists: replace it with --overwrite" in error) == (2, True)
    assert fpnx("compare", "a.h5", "b.h5", "-o", "matrix.png", "--overwrite")[0] == 0
    assert fpnx("compare", "a.h5", "-o", "matrix.svg")[0] == 0


def test_mistakes_are_one_line(pair: tuple[Path, Path], tmp_path: Path, fpnx: Run) -> None:
    stored(tmp_path / "few.h5", {"P3": X[:3]})
    for arguments, message in [
        (["a.h5", "-o", "matrix.jpg"], "take a name that ends in .png, .svg, .pdf"),
        (["a.h5", "-o", "none/matrix.png"], "none does not exist"),
        (["a.h5", "-o", "s3://bucket/matrix.png"], "is an address: name a file"),
        (["a.h5", "b.h5", "a.h5"], "3 files: take one, or two"),
        (["few.h5"], "3 images to compare: take files that have at least 4"),
        (["a.h5", "--levels", "C2"], "no level 'C2' in a.h5"),
        (["a.h5", "--sample", "3"], "sample 3: take a whole number from 4 to 20000"),
        (["missing.h5"], "missing.h5 does not exist"),
    ]:
        code, _, error = fpnx("compare", *arguments)
        assert code == 2
        assert message in error
        assert error.splitlines()[-1].startswith("fpnx: ")
        assert error.count("fpnx: ") == 1


def test_shards_are_read_as_one_file(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "random", "backbone": "mobilenet_v2", "size": 64, "levels": "C3"}
    fpnx.extract(photos, tmp_path / "whole.h5", **options)
    for shard in ("0/2", "1/2"):
        fpnx.extract(photos, tmp_path / "out.h5", shard=shard, **options)
    result = fpnx.compare([tmp_path / "whole.h5", str(tmp_path / "out.shard-*.h5")])
    assert result.images == 6
    assert result.cka[0, 0] == pytest.approx(1)
    with pytest.raises(FpnxError, match="shards of one run: give them as one, in quotes"):
        fpnx.compare(sorted(tmp_path.glob("out.shard-*.h5")))
