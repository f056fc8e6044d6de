"""`fpnx verify`: a complete file verifies, and each kind of damage is found and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import fpnx
from fpnx.core.config import fingerprint
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from tests.helpers.files import noise_image

OPTIONS: dict[str, Any] = {
    "backbone": "mobilenet_v2",
    "weights": "random",
    "levels": "C3,P4-P5",
    "channels": 8,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and three files of them: fixed.h5, ragged.h5 and pooled.h5."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "pictures").mkdir()
    for i in range(6):
        noise_image(i, (64 + 32 * (i % 2), 64)).save(folder / "pictures" / f"{i}.png")
    (folder / "pictures" / "bad.png").write_bytes(b"no picture")
    fpnx.extract(folder / "pictures", folder / "fixed.h5", size=64, **OPTIONS)
    fpnx.extract(folder / "pictures", folder / "ragged.h5", size="native", **OPTIONS)
    fpnx.extract(folder / "pictures", folder / "pooled.h5", size=64, pool="2x2", dtype="float16", **OPTIONS)
    return folder


@pytest.mark.parametrize("name", ["fixed.h5", "ragged.h5", "pooled.h5"])
def test_a_complete_file_verifies_against_its_images(made: Path, name: str) -> None:
    found = fpnx.verify(made / name, against=made / "pictures", sample=3, device="cpu")
    assert (found.problems, found.exit_code) == ((), 0)
    assert (found.images, found.done, found.failed, found.pending) == (7, 6, 1, 0)
    assert found.compared == 3
    assert 0 <= found.largest_difference < 1e-3
    with h5py.File(made / name) as file:
        sizes = [level.size for group in file["pyramids"].values() for level in group.values()]
    assert found.values == sum(sizes)


def set_at(name: str, index: Any, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][index] = value

    return change


def reseeded(file: h5py.File) -> None:
    file.attrs["config"] = json.dumps({**json.loads(file.attrs["config"]), "seed": 7})


def shortened(file: h5py.File) -> None:
    rows = file["pyramids/64x64/P4"][:-1]
    del file["pyramids/64x64/P4"]
    made = file.create_dataset("pyramids/64x64/P4", data=rows)
    made.attrs.update({"stride": 16, "channels": 8})


def widened(file: h5py.File) -> None:
    rows = file["pyramids/64x64/P4"][:]
    del file["pyramids/64x64/P4"]
    made = file.create_dataset("pyramids/64x64/P4", data=np.concatenate([rows, rows], axis=3))
    made.attrs.update({"stride": 16, "channels": 8})


def relinked(file: h5py.File) -> None:
    del file["P5"]
    file["P5"] = h5py.SoftLink("/pyramids/64x64/P4")


DAMAGE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "config": (reseeded, "the fingerprint is not the sha256 of the config"),
    "nan": (set_at("P4", (2, 0, 0, 0), np.nan), "2.png: not as finite in P4 as the file says"),
    "inf": (set_at("C3", (0, 3), np.inf), "0.png: not as finite in C3 as the file says"),
    "count": (set_at("stats/nonfinite", (1, 2), 5), "1.png: not as finite in P5 as the file says"),
    "failed with values": (set_at("P5", 6, 1.0), "bad.png: failed, but with values in P5"),
    "failed without a reason": (set_at("images/error", 6, b""), "bad.png: failed without a reason"),
    "pending": (set_at("images/status", 3, 0), "1 of 7 images are pending"),
    "status": (set_at("images/status", 3, 9), "1 images have a status that does not exist"),
    "twice": (set_at("images/path", 1, b"0.png"), "a path occurs twice"),
    "rows": (set_at("images/row", 1, 0), "rows of 64x64 are not numbered one by one"),
    "no row": (set_at("images/row", 1, -1), "1.png: done without a row"),
    "input size": (set_at("images/input_size", 1, (64, 65)), "1.png: its input size does not fit its group"),
    "source size": (set_at("images/source_size", slice(0, 2), 0), "0.png and 1 others: done without a source size"),
    "short": (shortened, "/pyramids/64x64/P4 has 6 rows for 7 images"),
    "wide": (widened, "/pyramids/64x64/P4 has 4×8 cells, where stride 16 gives 4×4"),
    "link": (relinked, "/P5 does not lead to /pyramids/64x64/P5"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_named(made: Path, tmp_path: Path, kind: str) -> None:
    change, problem = DAMAGE[kind]
    path = tmp_path / "out.h5"
    shutil.copyfile(made / "fixed.h5", path)
    with h5py.File(path, "r+") as file:
        change(file)
    found = fpnx.verify(path)
    assert found.exit_code == 1
    assert any(line.startswith(problem) for line in found.problems), found.problems


def test_values_of_another_image_are_found_by_recomputing(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    shutil.copyfile(made / "fixed.h5", path)
    with h5py.File(path, "r+") as file:
        file["P5"][4] = file["P5"][1]
    assert fpnx.verify(path).exit_code == 0
    found = fpnx.verify(path, against=made / "pictures", sample=100, device="cpu")
    assert found.compared == 6
    (problem,) = found.problems
    assert problem.startswith("4.png: computed again it differs by ")


def test_a_tf32_file_is_verified_on_a_device_without_tf32(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    shutil.copyfile(made / "fixed.h5", path)
    with h5py.File(path, "r+") as file:
        config = {**json.loads(file.attrs["config"]), "precision": "tf32"}
        provenance = json.loads(file.attrs["provenance"])
        provenance["options"]["precision"] = "tf32"
        file.attrs["config"], file.attrs["fingerprint"] = json.dumps(config), fingerprint(config)
        file.attrs["provenance"] = json.dumps(provenance)
        file["P5"][...] *= 1.01
    found = fpnx.verify(path, against=made / "pictures", device="cpu")
    assert (found.problems, found.exit_code) == ((), 0)
    assert 1e-3 < found.largest_difference < 2e-2


def test_images_with_another_file_size_are_not_recomputed(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "pictures", tmp_path / "pictures")
    for path in (tmp_path / "pictures").iterdir():
        with open(path, "ab") as file:
            file.write(b"more")
    found = fpnx.verify(made / "fixed.h5", against=tmp_path / "pictures", device="cpu")
    assert (found.compared, found.exit_code) == (0, 1)
    assert found.problems == ("0.png and 6 others: its file size is not the stored one",)


def test_missing_and_changed_images_are_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "0.png").unlink()
    (tmp_path / "pictures" / "2.png").write_bytes(b"shorter")
    os.utime(tmp_path / "pictures" / "1.png", (0, 0))  # copied without its time: still the same picture
    found = fpnx.verify(made / "fixed.h5", against=[tmp_path / "pictures"], device="cpu")
    assert found.problems == ("0.png: not among the images any more", "2.png: its file size is not the stored one")
    assert found.compared == 4
    (tmp_path / "others").mkdir()
    noise_image(0, (64, 64)).save(tmp_path / "others" / "x.png")
    with pytest.raises(FpnxError, match="none of the images"):
        fpnx.verify(made / "fixed.h5", against=tmp_path / "others")


def test_missing_weights_are_named_and_other_weights_refused(made: Path, tmp_path: Path) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P4-P5", channels=8)
    fpnx.save_weights(model, tmp_path / "own.safetensors")
    fpnx.extract(
        made / "pictures", tmp_path / "out.h5", weights=str(tmp_path / "own.safetensors"), size=64, device="cpu"
    )
    (tmp_path / "own.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(FpnxError, match=r"own\.safetensors"):
        fpnx.verify(tmp_path / "out.h5", against=made / "pictures")
    moved = str(tmp_path / "moved.safetensors")
    found = fpnx.verify(tmp_path / "out.h5", against=made / "pictures", sample=1, weights=moved, device="cpu")
    assert found.problems == ()
    next(iter(model.parameters())).data.add_(1)
    fpnx.save_weights(model, moved)
    with pytest.raises(FpnxError, match=r"cannot be computed again here \(weights [0-9a-f]{12}… → [0-9a-f]{12}…\)"):
        fpnx.verify(tmp_path / "out.h5", against=made / "pictures", weights=moved)


@pytest.mark.parametrize("option", [{"against": "nosuch"}, {"against": "pictures", "weights": "nosuch.pth"}], ids=str)
def test_missing_images_and_weights_are_reported_before_the_file_is_read(made: Path, option: dict[str, str]) -> None:
    read: list[int] = []

    class Reader(Listener):
        def progress(self, what: str, done: int, total: int) -> None:
            read.append(done)

    given = {name: str(made / value) for name, value in option.items()}
    with pytest.raises(FpnxError, match="nosuch"):
        fpnx.verify(made / "fixed.h5", **given, listener=Reader())
    assert not read


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fpnx.cli.main import main

    assert main(["verify", str(made / "fixed.h5")]) == 0
    assert capsys.readouterr().out.endswith("values not compared (--against IMAGES does)\n")
    assert main(["verify", str(made / "fixed.h5"), "--against", str(made / "pictures"), "--sample", "1"]) == 0
    assert capsys.readouterr().out.endswith("and the same when computed again\n")
    assert main(["verify", str(made / "fixed.h5"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["verified"], document["problems"], document["done"]) == (True, [], 6)
    part = tmp_path / "out.h5.part"
    shutil.copyfile(made / "fixed.h5", part)
    with h5py.File(part, "r+") as file:
        file["images/status"][0] = 0
    assert main(["verify", str(part)]) == 1
    output = capsys.readouterr().out
    assert "1 of 7 images are pending" in output
    assert output.endswith("does not verify\n")
    assert main(["verify", str(tmp_path / "none.h5"), "--json"]) == 2
    assert "does not exist" in json.loads(capsys.readouterr().out)["error"]
    assert main(["verify", str(made / "fixed.h5"), "--against", str(made / "pictures"), "--sample", "0"]) == 2
