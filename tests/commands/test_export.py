"""fpnx export: read back by NumPy, by safetensors, and in hloc's own way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import fpnx
from fpnx.analysis import export as export_module
from fpnx.analysis.vectors import blocks
from fpnx.core.errors import FpnxError
from tests.helpers.files import ROOT
from tests.helpers.stored import stored

Run = Callable[..., Any]
RANDOM = np.random.default_rng(2)
NAMES = ["b/2.jpg", "a/1.jpg", "a/3.jpg", "c.jpg"]
P3, P4 = RANDOM.normal(size=(4, 3)), RANDOM.normal(size=(4, 5))
NOT_UTF8 = os.fsdecode(b"caf\xe9/1.jpg")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A file of four images of which the third failed."""
    return stored(tmp_path / "out.h5", {"P3": P3, "P4": P4}, NAMES, failed=[2])


def test_npy_is_read_by_numpy(out: Path, tmp_path: Path) -> None:
    result = fpnx.export(out, tmp_path / "npy")
    assert (result.images, result.left_out, dict(result.levels)) == (3, 1, {"P3": 3, "P4": 5})
    for level, values in (("P3", P3), ("P4", P4)):
        array = np.load(tmp_path / "npy" / f"{level}.npy", mmap_mode="r")
        assert (array.dtype, array.flags.c_contiguous) == (np.float32, True)
        np.testing.assert_array_equal(array, values[[0, 1, 3]].astype(np.float32))
    assert (tmp_path / "npy" / "names.txt").read_text().splitlines() == ["b/2.jpg", "a/1.jpg", "c.jpg"]
    assert result.bytes == sum(path.stat().st_size for path in (tmp_path / "npy").iterdir())


def test_npy_of_all_levels_side_by_side(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "blocks", lambda count: blocks(count, 2))
    fpnx.export(out, tmp_path / "npy", join=True)
    assert sorted(os.listdir(tmp_path / "npy")) == ["export.json", "joined.npy", "names.txt"]
    expected = np.concatenate([P3, P4], axis=1)[[0, 1, 3]].astype(np.float32)
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "joined.npy"), expected)


def test_safetensors_without_padding(tmp_path: Path) -> None:
    maps = RANDOM.normal(size=(2, 2, 2, 3)).astype(np.float16)
    sizes = [(16, 24), (8, 16)]
    file = stored(tmp_path / "out.h5", {"P3": maps}, ["a/1.jpg", "b.jpg"], input_sizes=sizes, dtype="float16")
    fpnx.export(file, tmp_path / "st", to="safetensors")
    whole = load_file(tmp_path / "st" / "a" / "1.jpg.safetensors")["P3"]
    assert whole.dtype == np.float16
    np.testing.assert_array_equal(whole, maps[0])
    with safe_open(tmp_path / "st" / "b.jpg.safetensors", "np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("P3"), maps[1, :, :1, :2])
        assert opened.metadata() == {
            "name": "b.jpg", "input_size": "8x16", "source_size": "8x16", "stride_P3": "8",
        }  # fmt: skip


def names_in_hloc(path: Path) -> list[str]:
    """As hloc lists the names in a file of descriptors: the parents of all datasets."""
    names: set[str] = set()
    with h5py.File(str(path), "r", libver="latest") as file:
        file.visititems(
            lambda _, each: names.add(each.parent.name.strip("/")) if isinstance(each, h5py.Dataset) else None
        )
    return sorted(names)


def descriptors_in_hloc(path: Path, names: Sequence[str]) -> np.ndarray:
    with h5py.File(str(path), "r", libver="latest") as file:
        return np.stack([file[name]["global_descriptor"].__array__() for name in names])


def test_hloc_reads_its_descriptors(out: Path, tmp_path: Path) -> None:
    fpnx.export(out, tmp_path / "hloc", to="hloc")
    path = tmp_path / "hloc" / "global-feats-fpnx.h5"
    names = ["b/2.jpg", "a/1.jpg", "c.jpg"]
    assert names_in_hloc(path) == sorted(names)
    found = descriptors_in_hloc(path, names)
    assert found.dtype == np.float32
    expected = np.concatenate(
        [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (P3[[0, 1, 3]], P4[[0, 1, 3]])], axis=1
    )
    np.testing.assert_allclose(found, expected / np.sqrt(2), atol=1e-6)
    fpnx.export(out, tmp_path / "one", to="hloc", levels="P4")
    found = descriptors_in_hloc(tmp_path / "one" / "global-feats-fpnx.h5", names)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_vector_of_zeros_stays_zero_for_hloc(tmp_path: Path) -> None:
    file = stored(tmp_path / "out.h5", {"P3": np.array([[0.0, 0], [3, 4]])}, ["a.jpg", "b.jpg"])
    fpnx.export(file, tmp_path / "hloc", to="hloc")
    found = descriptors_in_hloc(tmp_path / "hloc" / "global-feats-fpnx.h5", ["a.jpg", "b.jpg"])
    np.testing.assert_allclose(found, [[0, 0], [0.6, 0.8]], atol=1e-7)


AWKWARD = [NOT_UTF8, "a b.jpg", "A.jpg", "a.jpg", "x\ny.jpg", f"{'é' * 130}.jpg", "../up.jpg", "é/ok.jpg"]


@pytest.mark.parametrize(
    ("to", "kept"),
    [
        ("npy", ["a b.jpg", "A.jpg", "a.jpg", f"{'é' * 130}.jpg", "../up.jpg", "é/ok.jpg"]),
        ("safetensors", ["a b.jpg", "é/ok.jpg"]),
        ("hloc", ["A.jpg", "a.jpg", f"{'é' * 130}.jpg", "é/ok.jpg"]),
    ],
)
def test_names_that_the_other_tool_cannot_hold(to: str, kept: list[str], tmp_path: Path, fpnx: Run) -> None:
    values = np.arange(2.0 * len(AWKWARD)).reshape(-1, 2) + 1
    file = stored(tmp_path / "out.h5", {"P3": values}, AWKWARD)
    code, text, _ = fpnx("export", file, "--to", to, "-o", "made")
    assert code == 0
    manifest = json.loads((tmp_path / "made" / "export.json").read_text())
    assert sorted(manifest["renamed"].values()) == sorted(set(AWKWARD) - set(kept))
    assert f"{len(AWKWARD) - len(kept)} names changed, as they " in text
    ending = ".safetensors" if to == "safetensors" else ""
    named = {name + ending: name for name in kept} | manifest["renamed"]
    found = read_back(tmp_path / "made", to, list(named))
    for name, vector in found.items():
        expected = values[AWKWARD.index(named[name])]
        expected = expected / np.linalg.norm(expected) if to == "hloc" else expected
        np.testing.assert_allclose(vector, expected, rtol=1e-6)
        name.encode()
    assert len(found) == len(AWKWARD)
    assert sorted(os.listdir(tmp_path)) == ["made", "out.h5"]


def read_back(folder: Path, to: str, names: list[str]) -> dict[str, np.ndarray]:
    """The vector of each name in an export, read by the other tool."""
    if to == "npy":
        lines = (folder / "names.txt").read_text(encoding="utf-8").splitlines()
        assert sorted(lines) == sorted(names)
        return dict(zip(lines, np.load(folder / "P3.npy"), strict=True))
    if to == "hloc":
        assert names_in_hloc(folder / "global-feats-fpnx.h5") == sorted(names)
        return dict(zip(names, descriptors_in_hloc(folder / "global-feats-fpnx.h5", names), strict=True))
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "export.json"]
    assert sorted(str(path.relative_to(folder)) for path in files) == sorted(names)
    return {name: load_file(folder / name)["P3"][:, 0, 0] for name in names}


def test_nothing_of_others_is_replaced(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    fpnx.export(out, target, to="safetensors")
    with pytest.raises(FpnxError, match="made exists: replace it with --overwrite"):
        fpnx.export(out, target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FpnxError, match=r"made also holds notes\.txt, which would be lost: move it"):
        fpnx.export(out, target, overwrite=True)
    (target / "notes.txt").unlink()
    fpnx.export(out, target, overwrite=True)
    assert sorted(os.listdir(target)) == ["P3.npy", "P4.npy", "export.json", "names.txt"]
    (tmp_path / "photos").mkdir()
    fpnx.export(out, tmp_path / "photos")  # an empty folder holds nothing
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").touch()
    with pytest.raises(FpnxError, match="home is no earlier export"):
        fpnx.export(out, tmp_path / "home", overwrite=True)
    assert os.listdir(tmp_path / "home") == ["mine.txt"]


def test_an_error_leaves_what_was_there(out: Path, tmp_path: Path) -> None:
    fpnx.export(out, tmp_path / "made")
    before = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    with h5py.File(out, "r+") as file:
        offset = file["P4"].id.get_offset()
    os.truncate(out, offset + 8)
    with pytest.raises(FpnxError):
        fpnx.export(out, tmp_path / "made", to="hloc", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["made", "out.h5"]


def test_killed_and_run_again(tmp_path: Path) -> None:
    count = 3000
    stored(tmp_path / "out.h5", {"P3": RANDOM.normal(size=(count, 4))})
    command = [sys.executable, "-m", "fpnx", "export", "out.h5", "--to", "safetensors", "-o", "made"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("made.part/*.safetensors")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert "made" not in os.listdir(tmp_path)
    result = fpnx.export(tmp_path / "out.h5", tmp_path / "made", to="safetensors")
    assert result.images == count
    assert sorted(set(os.listdir(tmp_path)) - {"made.lock"}) == ["made", "out.h5"]


def test_not_finite_values_are_counted(tmp_path: Path, fpnx: Run) -> None:
    stored(tmp_path / "out.h5", {"P3": np.array([[1, np.nan], [1, 2]]), "P4": np.array([[1, 2], [np.inf, 2]])})
    _, text, _ = fpnx("export", "out.h5", "-o", "made")
    assert "NaN or infinite values are in 2 images" in text
    document = json.loads(fpnx("export", "out.h5", "-o", "one", "--levels", "P4", "--json")[1])
    assert document["nonfinite"] == 1


def test_mistakes_are_one_line(out: Path, tmp_path: Path, fpnx: Run) -> None:
    stored(tmp_path / "none.h5", {"P3": P3}, failed=[0, 1, 2, 3])
    for arguments, message in [
        (["out.h5", "--to", "npz", "-o", "made"], "to 'npz': take one of npy, safetensors, hloc"),
        (["out.h5", "--to", "hloc", "--join", "-o", "made"], "join is for npy"),
        (["out.h5", "-o", "none/made"], "none does not exist"),
        (["out.h5", "-o", "out.h5"], "out.h5 is not a folder"),
        (["out.h5", "-o", "s3://bucket/made"], "s3://bucket/made is an address"),
        (["out.h5", "--levels", "P5", "-o", "made"], "no level 'P5' in out.h5"),
        (["none.h5", "-o", "made"], "none.h5 has no image that is done"),
        (["missing.h5", "-o", "made"], "missing.h5 does not exist"),
    ]:
        code, _, error = fpnx("export", *arguments)
        assert code == 2
        assert message in error
        assert len(error.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["none.h5", "out.h5"]
