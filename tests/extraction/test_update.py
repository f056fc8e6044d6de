"""`--update`, and images that are recognised by their bytes: what is computed, copied, accepted and refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import fpnx as package
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.store.reader import DONE
from fpnx.visualization.image_maps import find_photo
from tests.helpers.files import ROOT, noise_image
from tests.helpers.process import SMALL

LINE = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
TABLES = (
    "path", "bytes", "mtime_ns", "source_size", "input_size", "status", "error", "group", "row", "digest",
)  # fmt: skip
FIXED: dict[str, Any] = SMALL
RAGGED: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "size"} | {"short_side": 64}
BOX = {"info": {}, "categories": [{"id": 3, "name": "thing"}]}


class StopsAt(Listener):
    """Interrupts its own process once so many of something are reported."""

    def __init__(self, what: str, count: int) -> None:
        self._what, self._count = what, count

    def progress(self, what: str, done: int, total: int) -> None:
        if what == self._what and done >= self._count:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures of two shapes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        save(folder / f"{i}.png", i)
    return folder


def save(path: Path, seed: int) -> None:
    noise_image(seed, (64, 48) if seed % 2 else (48, 64)).save(path)


def change(folder: Path) -> None:
    """One picture is added, one replaced, one removed."""
    save(folder / "25.png", 25)
    save(folder / "3.png", 103)
    (folder / "5.png").unlink()


def flip(path: Path) -> None:
    """Change one byte of a file, in the checksum at its end, and keep size and time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def later(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18))


def check_equal(one: Path, other: Path, tables: tuple[str, ...] = TABLES) -> None:
    """Check that two files have equal tables, and the same values but for the order in which batches add up."""
    with h5py.File(one) as a, h5py.File(other) as b:
        for name in tables:
            np.testing.assert_array_equal(a[f"images/{name}"][:], b[f"images/{name}"][:], err_msg=name)
        assert sorted(a) == sorted(b)
        assert {name: a.attrs[name] for name in ("root", "fingerprint")} == {
            name: b.attrs[name] for name in ("root", "fingerprint")
        }
        for group in b["pyramids"]:
            for level in b["pyramids"][group]:
                np.testing.assert_allclose(a["pyramids"][group][level][:], b["pyramids"][group][level][:], atol=1e-5)
        if "regions" in b:
            for name in b["regions"]:
                np.testing.assert_allclose(a["regions"][name][:], b["regions"][name][:], atol=1e-5)


@pytest.mark.parametrize("kind", ["fixed", "ragged", "pooled"])
def test_an_updated_file_is_that_of_a_whole_run(pictures: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.h5"
    options = {"fixed": FIXED, "ragged": RAGGED, "pooled": {**FIXED, "pool": "avg", "dtype": "float16"}}[kind]
    package.extract(pictures, output, **options)
    shutil.copy(output, tmp_path / "old.h5")
    change(pictures)
    result = package.extract(pictures, output, update=True, **options)
    assert result.to_json()["update"] == {"copied": 6, "added": 1, "changed": 1, "removed": 1}
    assert (result.computed, result.done, result.complete) == (2, 8, True)
    package.extract(pictures, tmp_path / "whole.h5", **options)
    check_equal(output, tmp_path / "whole.h5")
    assert package.verify(output).problems == ()
    with package.open(output) as new, package.open(tmp_path / "old.h5") as old:
        for name in ("0.png", "7.png"):  # copied bit by bit
            assert all(np.array_equal(new[name][level], old[name][level]) for level in new.levels)
        assert new.provenance.updated is not None
        assert new.provenance.updated["copied"] == 6
        assert [run["time"] for run in new.provenance.updated["runs"]] == [old.provenance.time]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.h5", "out.h5", "pictures", "whole.h5"]


def test_the_command_says_what_is_copied_and_what_is_there_twice(
    pictures: Path, tmp_path: Path, fpnx: Callable[..., Any]
) -> None:
    line = ["extract", pictures, "-o", tmp_path / "out.h5", *LINE, "--update"]
    code, out, _ = fpnx(*line)  # nothing is there yet
    assert (code, "8 of 8 images" in out) == (0, True)
    shutil.copy(pictures / "0.png", pictures / "again.png")
    code, out, _ = fpnx(*line, "--dry-run")
    assert (code, "8 copied, 1 added, 0 changed, 0 removed" in out) == (0, True)
    code, out, _ = fpnx(*line)
    assert (code, "1 image with the same bytes as another one" in out) == (0, True)
    code, out, _ = fpnx("info", tmp_path / "out.h5")
    assert (code, "1 image with the same bytes as another one" in out) == (0, True)


def test_images_with_boxes_are_copied(pictures: Path, tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 64} for i in (0, 2, 4)]
    boxes = [{"id": i, "image_id": i, "category_id": 3, "bbox": [2, 3, 20, 30], "iscrowd": 0} for i in (0, 4)]
    (tmp_path / "boxes.json").write_text(json.dumps({**BOX, "images": images, "annotations": boxes}))
    options = {**FIXED, "boxes": str(tmp_path / "boxes.json")}
    package.extract(pictures, tmp_path / "out.h5", **options)
    (pictures / "1.png").unlink()
    save(pictures / "4.png", 104)
    result = package.extract(pictures, tmp_path / "out.h5", update=True, **options)
    assert result.computed == 1
    package.extract(pictures, tmp_path / "whole.h5", **options)
    check_equal(tmp_path / "out.h5", tmp_path / "whole.h5")


def test_nothing_is_written_where_nothing_changed(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    package.extract(pictures, output, **FIXED)
    before = output.stat()
    later(pictures)
    result = package.extract(pictures, output, update=True, **FIXED)
    assert (result.computed, result.done, result.complete) == (0, 8, True)
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_images_that_failed_are_tried_again(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    content = (pictures / "0.png").read_bytes()
    (pictures / "0.png").write_bytes(content[:20])
    for options in (FIXED, RAGGED):
        assert len(package.extract(pictures, output, overwrite=True, **options).failed) == 1
        result = package.extract(pictures, output, update=True, **options)
        assert (result.done, len(result.failed)) == (7, 1)
    (pictures / "0.png").write_bytes(content)
    result = package.extract(pictures, output, update=True, **RAGGED)
    assert (result.done, result.failed, result.computed) == (8, (), 1)


def test_another_config_is_refused_with_what_differs(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    package.extract(pictures, output, **FIXED)
    before = output.read_bytes()
    with pytest.raises(FpnxError, match=r"made with another config \(seed 0 → 1\)"):
        package.extract(pictures, output, update=True, **{**FIXED, "seed": 1})
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": True, "resume": True}, "leave out --resume"),
        ({"update": True, "overwrite": True}, "leave out --overwrite"),
        ({"update": True, "format": "png"}, "leave out --format png"),
        ({"update": True, "engine": "ray"}, "update each with --shard"),
        ({"check_content": True}, "give --update beside it"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        package.extract(tmp_path, tmp_path / "out.h5", **options)


def test_an_output_in_a_bucket_is_not_updated(pictures: Path) -> None:
    with pytest.raises(FpnxError, match="update works on a disk"):
        package.extract(pictures, "s3://bucket/out.h5", update=True, **FIXED)


@pytest.mark.parametrize(("what", "count"), [("copied", 1), ("images", 7)])
def test_an_interrupted_update_goes_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, count: int
) -> None:
    monkeypatch.setattr("fpnx.extraction.update.BLOCK_BYTES", 1)  # one image at a time
    output, options = tmp_path / "out.h5", {**FIXED, "batch_size": 1, "commit_every": 0.0}
    package.extract(pictures, output, **options)
    old = output.read_bytes()
    change(pictures)
    for i in (6, 7, 8):
        save(pictures / f"2{i}.png", 20 + i)
    with pytest.raises(Interrupted, match="continue with --update"):
        package.extract(pictures, output, update=True, listener=StopsAt(what, count), **options)
    assert output.read_bytes() == old
    with package.open(tmp_path / "out.h5.part") as part:
        done = int((part.status == DONE).sum())
    assert 1 <= done < 11
    result = package.extract(pictures, output, update=True, **options)
    assert result.computed == (5 if what == "copied" else 11 - done)
    package.extract(pictures, tmp_path / "whole.h5", **options)
    check_equal(output, tmp_path / "whole.h5")


def test_what_an_interrupted_run_has_done_is_kept_for_other_images(pictures: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out.h5", {**FIXED, "batch_size": 1, "commit_every": 0.0}
    with pytest.raises(Interrupted):
        package.extract(pictures, output, listener=StopsAt("images", 4), **options)
    with package.open(tmp_path / "out.h5.part") as part:
        done = int((part.status == DONE).sum())
    save(pictures / "99.png", 99)
    with pytest.raises(FpnxError, match=r"\(1 added, 0 removed, 0 changed\): .*--update"):
        package.extract(pictures, output, resume=True, **options)
    result = package.extract(pictures, output, update=True, **options)
    assert (result.done, result.computed) == (9, 9 - done)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import fpnx, fpnx.extraction.run, fpnx.extraction.update
from tests.extraction.test_update import FIXED
fpnx.extraction.update.BLOCK_BYTES = 1
pictures, output, *moments = sys.argv[1:]
for moment in moments:
    child = os.fork()
    if child == 0:
        fpnx.extract(pictures, output, update=True, batch_size=1, commit_every=0.0, **FIXED)
        os._exit(0)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, float(moment))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.mark.slow
def test_updates_that_are_killed_at_random_give_the_same_file(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    for i in range(8, 60):
        save(pictures / f"{i}.png", i)
    package.extract(pictures, output, **FIXED)
    change(pictures)
    moments = [str(random.Random(seed).uniform(0.2, 2)) for seed in range(12)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, pictures, output, *moments, "300"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    codes = done.stdout.split()
    assert (len(codes), codes[-1], set(codes) <= {"0", "-9"}) == (13, "0", True), done.stderr
    assert "-9" in codes
    package.extract(pictures, tmp_path / "whole.h5", **FIXED)
    check_equal(output, tmp_path / "whole.h5")


def test_a_copy_with_other_times_is_resumed_without_computing(pictures: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out.h5", {**RAGGED, "batch_size": 1, "commit_every": 0.0}
    (pictures / "broken.png").write_bytes(b"no picture")
    with pytest.raises(Interrupted):
        package.extract(pictures, output, listener=StopsAt("images", 4), **options)
    with package.open(tmp_path / "out.h5.part") as part:
        done = int((part.status == DONE).sum())
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    later(copy)
    result = package.extract(copy, output, resume=True, **options)
    assert (result.done, result.computed) == (8, 8 - done)
    result = package.extract(copy, output, resume=True, **options)  # which is finished
    assert (result.done, result.computed) == (8, 0)
    assert package.verify(output, against=copy, device="cpu").problems == ()
    flip(copy / "1.png")
    with pytest.raises(FpnxError, match=r"\(0 added, 0 removed, 1 changed\)"):
        package.extract(copy, output, resume=True, **options)


def test_one_byte_that_changed_with_size_and_time_kept_is_noticed(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    package.extract(pictures, output, **FIXED)
    flip(pictures / "6.png")
    assert package.extract(pictures, output, update=True, **FIXED).computed == 0  # size and time are trusted
    found = package.verify(output, against=pictures, sample=1, device="cpu")
    assert found.problems == ("6.png: its bytes are not those that were computed",)
    assert (found.hashed, found.exit_code) == (8, 1)
    with package.open(output) as store:
        assert find_photo(store["5.png"]).note == ""
    result = package.extract(pictures, output, update=True, check_content=True, **FIXED)
    assert result.to_json()["update"] == {"copied": 7, "added": 0, "changed": 1, "removed": 0}


def test_a_photo_is_changed_where_its_bytes_are(pictures: Path, tmp_path: Path) -> None:
    package.extract(pictures, tmp_path / "out.h5", **FIXED)
    later(pictures)
    save(pictures / "2.png", 4)
    with package.open(tmp_path / "out.h5") as store:
        assert find_photo(store["1.png"]).note == ""
        assert find_photo(store["2.png"]).note == "file changed since extraction"


def test_a_file_without_digests_knows_sizes_and_times(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    package.extract(pictures, output, **FIXED)
    with h5py.File(output, "r+") as file:
        del file["images/digest"]  # as in a file of an earlier version
    assert package.extract(pictures, output, update=True, **FIXED).computed == 0
    assert package.verify(output, against=pictures, device="cpu").hashed == 0
    os.utime(pictures / "0.png", ns=(10**18, 10**18))
    with pytest.raises(FpnxError, match="1 changed"):
        package.extract(pictures, output, resume=True, **FIXED)
    result = package.extract(pictures, output, update=True, **FIXED)
    assert (result.computed, result.done) == (1, 8)
    with package.open(output) as store:
        assert store.digests.any(axis=1).sum() == 1
    result = package.extract(pictures, output, update=True, check_content=True, **FIXED)
    assert result.computed == 7  # their bytes are not known
    with package.open(output) as store:
        assert store.digests.any(axis=1).all()


def test_shards_are_updated_and_images_move_between_them(pictures: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> int:
        results = [package.extract(pictures, tmp_path / "out.h5", shard=f"{i}/2", **options, **RAGGED) for i in (1, 0)]
        return sum(result.computed for result in results)

    assert run() == 8
    save(pictures / "05.png", 5)
    save(pictures / "06.png", 6)
    save(pictures / "7.png", 107)
    assert run(update=True) == 3  # 3.png, which is of the other shard now, is copied too
    package.merge(tmp_path / "merged.h5", tmp_path / "out.shard-*.h5")
    package.extract(pictures, tmp_path / "whole.h5", **RAGGED)
    check_equal(tmp_path / "merged.h5", tmp_path / "whole.h5")
    assert run(update=True) == 0


def test_shards_of_copies_with_other_times_are_resumed_and_merged(pictures: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    later(copy)
    for folder, shard in ((pictures, "0/2"), (copy, "1/2")):
        package.extract(folder, tmp_path / "out.h5", shard=shard, **FIXED)
    for folder, shard in ((copy, "0/2"), (pictures, "1/2")):
        assert package.extract(folder, tmp_path / "out.h5", shard=shard, resume=True, **FIXED).computed == 0
    assert package.verify(tmp_path / "out.shard-*.h5", against=pictures, sample=2, device="cpu").problems == ()
    package.merge(tmp_path / "merged.h5", tmp_path / "out.shard-*.h5")
    package.extract(pictures, tmp_path / "whole.h5", **FIXED)
    check_equal(tmp_path / "merged.h5", tmp_path / "whole.h5", tuple(name for name in TABLES if name != "mtime_ns"))
    save(copy / "0.png", 1)  # another list, of which both are cut
    package.extract(copy, tmp_path / "out.h5", shard="1/2", overwrite=True, **FIXED)
    with pytest.raises(FpnxError, match="different runs"):
        package.open(tmp_path / "out.shard-*.h5")
