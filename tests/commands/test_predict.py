"""`fpnx predict` as a command: output, exit codes, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.shapes import draw_scenes, write_coco
from tests.helpers.trained import SIDE, trained_file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_file(tmp_path_factory.mktemp("models") / "boxes.safetensors", "fcos", convolutions=1)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_coco(tmp_path, draw_scenes(3))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_the_terminal_says_what_was_found_and_how_well(weights: Path, place: Path, fpnx: Callable[..., Any]) -> None:
    code, out, _ = fpnx(
        "predict", "images", "--weights", weights, "--size", SIDE, "--labels", "annotations.json", "--draw", "found"
    )
    assert code == 0
    found = json.loads((place / "predictions.json").read_text())
    assert f"{len(found)} objects of 3 of 3 images in predictions.json, pictures in found" in out
    assert "head      fcos, 3 classes" in out
    assert "scores of 3 images:" in out
    assert "AP50" in out
    assert "square" in out
    assert "worst images:" in out
    assert len(list((place / "found").glob("*.png"))) == 3


def test_json_is_one_document(weights: Path, place: Path, fpnx: Callable[..., Any]) -> None:
    (place / "images" / "0001.png").write_bytes(b"\x89PNG")
    code, out, _ = fpnx("predict", "images", "--weights", weights, "--size", SIDE, "--threshold", 0.5, "--json")
    document = json.loads(out)
    assert code == document["exit_code"] == 1
    assert document["failed"][0]["path"] == "0001.png"
    assert (document["task"], document["done"], document["images"]) == ("detection", 2, 3)
    assert document["found"] == len(json.loads((place / "predictions.json").read_text()))
    assert document["head"] == "fcos, 3 classes"
    assert document["weights"]["heads_ignored"] == 0
    assert "levels" not in document  # nothing of them is stored


def test_a_dry_run_writes_nothing(weights: Path, place: Path, fpnx: Callable[..., Any]) -> None:
    code, out, _ = fpnx("predict", "images", "--weights", weights, "--size", SIDE, "--dry-run")
    assert code == 0
    assert "dry run: nothing was computed or written" in out
    assert not list(place.glob("predictions*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "1.5"], "threshold 1.5: take a score from 0 to 1"),
        (["--max-detections", "0"], "max detections 0: take a whole number from 1"),
        (["--top", "0"], "top 0: take a whole number"),
        (["--labels", "gone.json"], "gone.json"),
        (["--draw", "annotations.json"], "draw annotations.json: it is not a folder"),
        (["--weights", "fcos_resnet50_fpm"], "did you mean fcos_resnet50_fpn?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, weights: Path, place: Path, fpnx: Callable[..., Any]
) -> None:
    named = [] if "--weights" in arguments else ["--weights", weights]
    code, _, error = fpnx("predict", "images", *named, "--size", SIDE, *arguments)
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(place.glob("predictions*"))
