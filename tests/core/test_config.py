"""Defaults, validation and the fingerprint."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpnx.core.config import (
    BenchmarkConfig,
    ExtractConfig,
    InputConfig,
    ModelConfig,
    OutputConfig,
    VisualizeConfig,
    fingerprint,
)
from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.system import downloads_forbidden
from fpnx.core.text import format_bytes, plural


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("P2-P5", ("P2", "P3", "P4", "P5")),
        ("p3-p7", ("P3", "P4", "P5", "P6", "P7")),
        ("C3,P3", ("C3", "P3")),
        ("P3,C3,P2", ("P2", "C3", "P3")),
        ("C2-C3,P5", ("C2", "C3", "P5")),
        ("P4-5", ("P4", "P5")),
        (["P5", "P4"], ("P4", "P5")),
    ],
    ids=str,
)
def test_levels(text: Any, names: tuple[str, ...]) -> None:
    assert parse_levels(text) == names


@pytest.mark.parametrize("text", ["", "P1", "P8", "Q3", "P5-P3", "P3-C5", "P3,P3", "P3,P2-P4", "P", "P22"])
def test_invalid_levels(text: str) -> None:
    with pytest.raises(FpnxError):
        parse_levels(text)


@pytest.mark.parametrize(
    ("size", "kept"),
    [(224, (224, 224)), ("224", (224, 224)), ("480x640", (480, 640)), ((480, 640), (480, 640)), ("native", "native")],
    ids=str,
)
def test_sizes(size: Any, kept: str | tuple[int, int]) -> None:
    assert ExtractConfig(size=size).size == kept


@pytest.mark.parametrize(
    "options",
    [
        {"size": "0"},
        {"size": "big"},
        {"size": "224x"},
        {"size": 224, "short_side": 100},
        {"long_side": 100},
        {"short_side": 800, "long_side": 100},
        {"dtype": "float64"},
        {"pool": "mean"},
        {"seed": -1},
        {"seed": 1.5},
        {"channels": 0},
        {"top_block": "p6"},
        {"pyramid": "ffpn"},
        {"batch_size": "0"},
        {"batch_size": "many"},
        {"workers": 0},
        {"device": "gpu"},
        {"precision": "int8"},
        {"max_failed": "half"},
        {"max_failed": "101%"},
        {"resume": True, "overwrite": True},
        {"commit_every": -1.0},
        {"limit": 0},
    ],
    ids=str,
)
def test_invalid_values(options: dict[str, Any]) -> None:
    with pytest.raises(FpnxError) as raised:
        ExtractConfig(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 7}, "pool 7: take text, such as 'none'"),
        ({"pool": (2, 2)}, "pool (2, 2): take text, such as 'none'"),
        ({"device": None}, "device None: take text, such as 'auto'"),
        ({"weights": None}, "weights None: take text, such as 'default'"),
        ({"weights": 5}, "weights 5: take text, such as 'default'"),
        ({"commit_every": "x"}, "commit every 'x': take a number, such as 5.0"),
        ({"levels": 5}, "levels 5: take text or several"),
        (
            {"levels": [5]},
            "level 5: levels are C2 to C7 and P2 to P7: take names and ranges such as P2-P5, P3-P7 or C3,P3",
        ),
        ({"backbone": 3}, "backbone 3: take text"),
        ({"resume": "yes"}, "resume 'yes': take True or False, such as False"),
        ({"size": 2.5}, "size 2.5: take text or a whole number or a pair, such as 'recipe'"),
        ({"mean": 3}, "mean 3: take text or several"),
        ({"norm_eps": True}, "norm eps True: take a number"),
    ],
    ids=str,
)
def test_values_of_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FpnxError) as raised:
        ExtractConfig(**options)
    assert str(raised.value) == message


def test_paths_are_converted_to_text() -> None:
    assert ExtractConfig(weights=Path("a") / "b.pth").weights == os.path.join("a", "b.pth")  # type: ignore[arg-type]
    assert VisualizeConfig(images="0:3", backbone=("a", "b")).images == ("0:3",)


def test_configs_are_frozen_and_refuse_unknown_names() -> None:
    config = ExtractConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError, match="bakbone"):
        ExtractConfig(bakbone="vgg16")  # type: ignore[call-arg]


def test_every_option_of_the_model_is_repeatable() -> None:
    """What a file says it was computed with is enough to compute it again."""
    names = {field.name for part in (ModelConfig, InputConfig) for field in dataclasses.fields(part)}
    assert names | {"dtype", "pool", "precision"} == set(ExtractConfig().repeatable())
    assert ExtractConfig(pyramid="pafpn").repeatable()["pyramid"] == "pafpn"
    assert [run.pyramid for run in BenchmarkConfig(pyramid="pafpn", batch_size="1,2").runs()] == ["pafpn"] * 2


@pytest.mark.parametrize(
    ("text", "images", "allowed"), [("0", 10, 0), ("3", 10, 3), ("1%", 250, 2), ("100%", 7, 7), (5, 9, 5)]
)
def test_allowed_failures(text: str | int, images: int, allowed: int) -> None:
    assert OutputConfig(max_failed=text).allowed_failures(images) == allowed


def test_values_of_fpnx_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPNX_OFFLINE", "maybe")
    with pytest.raises(FpnxError, match="FPNX_OFFLINE=maybe: take 1"):
        downloads_forbidden()
    for value, expected in (("1", True), ("yes", True), ("0", False), ("", False)):
        monkeypatch.setenv("FPNX_OFFLINE", value)
        assert downloads_forbidden() is expected


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0.0 kB"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (3.2e9, "3.2 GB"), (4e12, "4.0 TB")]
)
def test_format_bytes(number: float, text: str) -> None:
    assert format_bytes(number) == text


def test_plural() -> None:
    assert [plural(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


def test_fingerprint_depends_on_content_alone() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    # sha256 of '{"a":1}', so that files stay comparable across versions
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_numpy_numbers_are_accepted() -> None:
    config = ExtractConfig(
        seed=np.int64(3), channels=np.int32(16), commit_every=np.float32(2.5), batch_size=np.int64(4)
    )
    assert (config.seed, config.channels, config.commit_every, config.batch_size) == (3, 16, 2.5, 4)
    assert type(config.seed) is int
    with pytest.raises(FpnxError, match="seed"):
        ExtractConfig(seed=np.float64(0.5))
