"""Files that the version before the move to sub-packages wrote: read, verified, resumed and merged by this version.

`tests/data/previous_version/` holds a finished file, a `.part` whose run was killed by SIGKILL after two of six images,
and the two shards of such a run, all made with `OPTIONS` from the images of `images` in a folder that is gone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import fpnx
from fpnx.store.reader import DONE, PENDING
from tests.helpers.files import DATA

PREVIOUS = DATA / "previous_version"
FINISHED, UNFINISHED = PREVIOUS / "out.h5", PREVIOUS / "unfinished.h5.part"
SHARDS = PREVIOUS / "out.shard-*.h5"
NAMES = [f"{i}.ppm" for i in range(6)]
OPTIONS: dict[str, Any] = {
    "backbone": "mobilenet_v2",
    "weights": "random",
    "channels": 8,
    "levels": "P4-P5",
    "size": 64,
    "device": "cpu",
    "commit_every": 0.0,
    "batch_size": 1,
}
COMMAND_LINE = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The images that the files were made from: 40×40 random pixels each, with the modification times in the files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with h5py.File(FINISHED) as file:
        mtimes = dict(zip(file["images/path"].asstr()[:], file["images/mtime_ns"][:].tolist(), strict=True))
    for seed, name in enumerate(NAMES):
        path = folder / name
        path.write_bytes(b"P6 40 40 255\n" + random.Random(seed).randbytes(40 * 40 * 3))
        os.utime(path, ns=(mtimes[name], mtimes[name]))
    return folder


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A copy of the unfinished file, by the name that its run would have given it."""
    shutil.copyfile(UNFINISHED, tmp_path / UNFINISHED.name)
    return tmp_path / UNFINISHED.stem


def stored(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        values: np.ndarray = file[name][:]
        return values


def test_a_file_is_read() -> None:
    expected = {level: stored(FINISHED, level) for level in ("P4", "P5")}
    with h5py.File(FINISHED) as file:
        fingerprint = file.attrs["fingerprint"]
    with fpnx.open(FINISHED) as store:
        assert store.complete
        assert store.paths == NAMES
        assert store.levels == ("P4", "P5")
        assert store.fingerprint == fingerprint
        assert store.provenance.weights.name == "random"
        for row, item in enumerate(store):
            assert (item.source_size, item.input_size) == ((40, 40), (64, 64))
            assert item["P4"].shape == (8, 4, 4)
            for level in store.levels:
                assert np.array_equal(item[level], expected[level][row])
                assert np.abs(item[level]).max() > 0


@pytest.mark.parametrize("file", [FINISHED, SHARDS])
def test_files_verify_also_against_their_images(fpnx: Callable[..., Any], images: Path, file: Path) -> None:
    code, out, err = fpnx("verify", file, "--against", images, "--sample", 6, "--json")
    result = json.loads(out)
    assert (code, result["problems"], result["done"], result["compared"]) == (0, [], 6, 6), err


def test_an_altered_value_does_not_verify_against_the_images(tmp_path: Path, images: Path) -> None:
    altered = tmp_path / "altered.h5"
    shutil.copyfile(FINISHED, altered)
    with h5py.File(altered, "r+") as file:
        file["P4"][2, 0, 0, 0] += 1
    found = fpnx.verify(altered, against=images, sample=6)
    assert len(found.problems) == 1
    assert "2.ppm: computed again it differs" in found.problems[0]


def test_an_unfinished_file_is_read_and_verified() -> None:
    with fpnx.open(UNFINISHED) as store:
        assert not store.complete
        assert store.status.tolist() == [DONE, DONE, PENDING, PENDING, PENDING, PENDING]
        for item in store:
            assert np.allclose(item["P5"], stored(FINISHED, "P5")[item.index], rtol=0, atol=1e-5)
    found = fpnx.verify(UNFINISHED)
    assert (found.done, found.pending) == (2, 4)
    assert found.problems == ("4 of 6 images are pending: continue with fpnx extract --resume",)


def test_an_unfinished_file_is_resumed(unfinished: Path, images: Path) -> None:
    part = unfinished.with_name(unfinished.name + ".part")
    with h5py.File(part, "r+") as file:  # values that no computation gives: those of the finished images must stay
        fingerprint = file.attrs["fingerprint"]
        for level in ("P4", "P5"):
            file[level][:2] = 12345.0
    result = fpnx.extract(images, unfinished, resume=True, **OPTIONS)
    assert (result.complete, result.done, result.computed) == (True, 6, 4)
    assert not part.exists()
    with h5py.File(unfinished) as file:
        assert file.attrs["fingerprint"] == fingerprint
    assert stored(unfinished, "images/status").tolist() == [DONE] * 6
    for level in ("P4", "P5"):
        values, expected = stored(unfinished, level), stored(FINISHED, level)
        assert (values[:2] == 12345.0).all()
        scale = np.abs(expected).max()
        assert np.allclose(values[2:], expected[2:], rtol=0, atol=1e-4 * scale)
    assert fpnx.verify(unfinished).problems == ()


def test_a_finished_file_is_not_computed_again(tmp_path: Path, images: Path) -> None:
    output = tmp_path / "out.h5"
    shutil.copyfile(FINISHED, output)
    result = fpnx.extract(images, output, resume=True, **OPTIONS)
    assert (result.done, result.computed) == (6, 0)
    assert output.read_bytes() == FINISHED.read_bytes()


def test_a_changed_image_is_refused(unfinished: Path, images: Path) -> None:
    os.utime(images / NAMES[3], ns=(0, 0))
    with pytest.raises(fpnx.FpnxError, match="0 added, 0 removed, 1 changed"):
        fpnx.extract(images, unfinished, resume=True, **OPTIONS)


def test_shards_are_merged(tmp_path: Path) -> None:
    merged = fpnx.merge(tmp_path / "merged.h5", SHARDS)
    assert (merged.shards, merged.images, merged.done) == (2, 6, 6)
    with h5py.File(merged.output) as file, h5py.File(FINISHED) as whole:
        assert file.attrs["fingerprint"] == whole.attrs["fingerprint"]
        assert file["images/path"].asstr()[:].tolist() == NAMES
        for level in ("P4", "P5"):
            shards = [stored(path, level) for path in sorted(PREVIOUS.glob(SHARDS.name))]
            assert np.array_equal(file[level][:], np.concatenate(shards))
            assert np.allclose(file[level][:], whole[level][:], rtol=0, atol=1e-5)
    assert fpnx.verify(merged.output).problems == ()


@pytest.mark.parametrize("path", [FINISHED, UNFINISHED, *sorted(PREVIOUS.glob(SHARDS.name))])
def test_the_same_request_has_the_same_fingerprint(fpnx: Callable[..., Any], images: Path, path: Path) -> None:
    code, out, err = fpnx("extract", images, *COMMAND_LINE, "--dry-run", "--json")
    assert code == 0, err
    with h5py.File(path) as file:
        assert json.loads(out)["fingerprint"] == file.attrs["fingerprint"]


def test_another_request_has_another_fingerprint(fpnx: Callable[..., Any], images: Path) -> None:
    code, out, _ = fpnx("extract", images, *COMMAND_LINE, "--seed", 1, "--dry-run", "--json")
    assert code == 0
    with h5py.File(FINISHED) as file:
        assert json.loads(out)["fingerprint"] != file.attrs["fingerprint"]
