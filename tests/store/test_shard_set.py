"""Sets of shards, read as one store and merged: equal to a run without shards, or refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fpnx
from fpnx.commands.verify import verify
from fpnx.core.errors import FpnxError, Interrupted, NotDoneError, StoreError
from fpnx.core.events import Listener
from fpnx.core.files import lock
from fpnx.core.image_list import ImageList, list_fingerprint
from fpnx.core.sharding import Shard, ShardSlice, shard_path
from fpnx.store.file_layout import FileLayout
from fpnx.store.joined_store import JoinedStore, open_joined
from fpnx.store.reader import DONE, FAILED
from fpnx.store.writer import Writer, part_path
from tests.helpers.files import ROOT, noise_image
from tests.helpers.layouts import LEVELS, PROVENANCE, features_of, layout_of
from tests.helpers.process import Forked, document

OPTIONS: dict[str, Any] = {"weights": "random", "backbone": "mobilenet_v2", "channels": 8, "levels": "C4,P4-P6"}
TABLES = ("bytes", "mtime_ns", "source_size", "input_size", "status", "error", "row", "path", "group", "digest")


def part(layout: FileLayout, index: int, count: int) -> FileLayout:
    """The layout of a shard: a slice of the images, with rows numbered from 0."""
    records = layout.images.records
    shard_slice = ShardSlice.of(
        Shard(index, count), len(records), list_fingerprint(records), list_fingerprint(records, times=False)
    )
    padded = [layout.padded_sizes[i] for i in shard_slice.slice]
    return replace(
        layout,
        images=ImageList(layout.images.root, tuple(records[i] for i in shard_slice.slice), shard_slice),
        input_sizes=layout.input_sizes[shard_slice.first : shard_slice.slice.stop],
        padded_sizes=padded,
        rows=np.array([padded[:i].count(size) if size else -1 for i, size in enumerate(padded)], np.int64),
        shapes={size: layout.shapes[size] for size in dict.fromkeys(padded) if size},
        errors={i - shard_slice.first: why for i, why in layout.errors.items() if i in shard_slice.slice},
    )


def fill(output: Path, layout: FileLayout, failed: Sequence[int] = ()) -> Path:
    """Write a file with features that identify their image; the images `failed` have none."""
    first = layout.images.shard.first if layout.images.shard else 0
    writer = Writer.create(output, layout, PROVENANCE)
    for i in np.flatnonzero(layout.rows >= 0).tolist():
        if first + i in failed:
            writer.fail(i, f"no {first + i}")
        else:
            features = features_of([first + i], layout.padded_sizes[i] or (0, 0), layout.dtype)
            writer.put([i], features, np.array([[7, 7 + first + i]]), {level: [0] for level in LEVELS})
    writer.finish()
    return output


def fill_set(folder: Path, layout: FileLayout, count: int, failed: Sequence[int] = ()) -> list[Path]:
    """All shards of a run, and `whole.h5`, the same run without shards."""
    fill(folder / "whole.h5", layout, failed)
    return [
        fill(shard_path(folder / "out.h5", Shard(index, count)), part(layout, index, count), failed)
        for index in range(count)
    ]


RAGGED = ["64x64", "64x64", "96x64", "", "64x64", "32x96", "96x64", "32x96", "64x64", "", "160x32"]


@pytest.fixture
def made(tmp_path: Path) -> list[Path]:
    """Four shards of eleven images: sizes that only some shards have, two without headers, one that failed."""
    return fill_set(tmp_path, layout_of(RAGGED, {3: "no header", 9: "none here"}), 4, failed=[4])


def assert_same_tables(one: Path, other: Path) -> None:
    with h5py.File(one) as a, h5py.File(other) as b:
        for name in TABLES:
            left, right = a[f"images/{name}"], b[f"images/{name}"]
            assert left.dtype == right.dtype, name
            assert np.array_equal(left[:], right[:]), name
        assert np.array_equal(a["stats/nonfinite"][:], b["stats/nonfinite"][:])
        for name in ("format", "format_version", "config", "fingerprint", "root"):
            assert a.attrs[name] == b.attrs[name]
        assert set(a.attrs) == set(b.attrs)
        assert set(a) == set(b)
        assert set(a["pyramids"]) == set(b["pyramids"])
        for size in a["pyramids"]:
            for level in a["pyramids"][size]:
                left, right = a["pyramids"][size][level], b["pyramids"][size][level]
                assert (left.shape, left.dtype, dict(left.attrs)) == (right.shape, right.dtype, dict(right.attrs))
                for dataset in (left, right):
                    assert dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        for level in set(a) - {"images", "pyramids", "stats"}:
            assert a.get(level, getlink=True).path == b.get(level, getlink=True).path


def raw(path: Path, row: int, level: str) -> bytes:
    """The stored bytes of image `row`, with any status."""
    with h5py.File(path) as file:
        group = file["images/group"].asstr()[row]
        return file["pyramids"][group][level][int(file["images/row"][row])].tobytes()


def assert_same_reading(one: fpnx.Store, other: fpnx.Store) -> None:
    assert one.paths == other.paths
    assert (one.levels, one.config, one.fingerprint, one.root) == (
        other.levels, other.config, other.fingerprint, other.root
    )  # fmt: skip
    assert (one.padded_sizes, one.sizes, len(one), one.complete) == (
        other.padded_sizes,
        other.sizes,
        len(other),
        other.complete,
    )
    for table in ("rows", "bytes", "mtimes_ns", "input_sizes", "status", "source_sizes", "nonfinite"):
        assert np.array_equal(getattr(one, table), getattr(other, table)), table
    assert one.failures() == other.failures()
    assert [one.error(i) for i in range(len(one))] == [other.error(i) for i in range(len(other))]
    assert np.array_equal(one.errors(), other.errors())
    assert one.nonfinite_by_level() == other.nonfinite_by_level()
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.path, mine.index, mine.source_size) == (theirs.path, theirs.index, theirs.source_size)
        for level in one.levels:
            assert np.array_equal(mine[level], theirs[level])
            assert mine.valid(level) == theirs.valid(level)
            assert mine.stride(level) == theirs.stride(level)
            assert mine.box(level, 0, 0) == theirs.box(level, 0, 0)
    for size in other.sizes:
        for level in other.levels:
            left, right = one.dataset(size, level), other.dataset(size, level)
            assert (left.shape, left.dtype, len(left), left.size) == (right.shape, right.dtype, len(right), right.size)
            assert dict(left.attrs) == dict(right.attrs)
            for rows in (slice(None), slice(1, 3), slice(2, 2), slice(-2, None), slice(5, 99)):
                assert np.array_equal(left[rows], right[rows], equal_nan=True)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_a_set_is_read_like_a_run_without_shards(made: list[Path], tmp_path: Path, order: int) -> None:
    with fpnx.open(made[::order]) as store, fpnx.open(tmp_path / "whole.h5") as whole:
        assert_same_reading(store, whole)
        assert isinstance(store, JoinedStore)
        item = store["10.png"]
        assert item.index == store.index(b"10.png") == 10
        assert store[-1].path == "10.png"
        assert "9.png" in store
        assert "11.png" not in store
        with pytest.raises(NotDoneError, match=r"4\.png failed: no 4"):
            store[4]
        with pytest.raises(NotDoneError, match=r"3\.png failed: no header"):
            store["3.png"]
        with pytest.raises(IndexError):
            store[11]
        with pytest.raises(StoreError, match="pyramids/1x1 is missing"):
            store.dataset((1, 1), "P4")
        assert store.path == str(tmp_path / "out.shard-*-of-00004.h5")
    with pytest.raises(StoreError, match="has been closed"):
        item["P4"]


def test_globs_and_single_shards(made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fpnx.open("out.shard-*.h5") as store:
        assert (len(store), store.path, len(store.files)) == (11, "out.shard-*.h5", 4)
        store.release()
        monkeypatch.chdir("/")
        assert (store[10]["P4"] == 11).all()
    monkeypatch.chdir(tmp_path)
    with fpnx.open(made[1]) as store:
        assert (len(store), store.files) == (3, ())
        assert str(store.shard_slice) == "1/4: images 2 to 4 of 11"
    os.rename(made[1], "[1].h5")
    with fpnx.open("[1].h5") as store:  # a name of a file, though it looks like a pattern
        assert store.shard_slice is not None
        assert (store.shard_slice.shard, store.shard_slice.images) == (Shard(1, 4), 11)
    with pytest.raises(StoreError, match=r"no file is called none\*\.h5"):
        fpnx.open("none*.h5")
    with pytest.raises(StoreError, match="no files: name those that fpnx extract wrote"):
        fpnx.open([])


def other_run(made: list[Path]) -> list[Path]:
    layout = layout_of(RAGGED)
    config = {**layout.config, "seed": 1}
    fill(made[2], part(replace(layout, config=config), 2, 4))
    return made


def other_list(made: list[Path]) -> list[Path]:
    layout = layout_of([*RAGGED[:-1], "64x64"])
    renamed = tuple(record._replace(name=b"x" + record.name) for record in layout.images.records)
    layout = replace(layout, images=replace(layout.images, records=renamed))
    fill(made[2], part(layout, 2, 4))
    return made


def other_count(made: list[Path]) -> list[Path]:
    fill(made[2], part(layout_of(RAGGED, {3: "no header", 9: "none here"}), 2, 5))
    return made


def unfinished(made: list[Path]) -> list[Path]:
    os.rename(made[2], part_path(made[2]))
    return [path for path in made if path.exists()]


def pending(made: list[Path]) -> list[Path]:
    with h5py.File(made[2], "r+") as file:
        file["images/status"][0] = 0
    return made


def wrong_first(made: list[Path]) -> list[Path]:
    with h5py.File(made[2], "r+") as file:
        file.attrs["shard"] = json.dumps({**json.loads(file.attrs["shard"]), "first": 1})
    return made


def too_short(made: list[Path]) -> list[Path]:
    with h5py.File(made[2], "r+") as file:
        values = json.loads(file.attrs["shard"])
        file.attrs["shard"] = json.dumps(ShardSlice.of(Shard(2, 4), 16, values["list"]).to_json())
    return made


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_run, r"00000-of-00004\.h5 and .*00002-of-00004\.h5 are shards of different runs \(seed None → 1\)"),
        (other_list, r"00002-of-00004\.h5 are shards of different runs \(their lists of images differ\)"),
        (other_count, r"different runs \(one of 4 shards and one of 5\)"),
        (lambda made: [made[0], made[3]], r"^2 of 4 shards missing: 1/4, 2/4 \(.*00001-of-00004\.h5 is there, but not"),
        (lambda made: [made[0], made[0]], r"shard 0/4 is there twice: .*00000-of-00004\.h5 and .*00000-of-00004\.h5"),
        (unfinished, r"shards missing: 2/4 \(.*00002-of-00004\.h5\.part is unfinished: finish it with --resume\)"),
        (lambda made: [*unfinished(made), part_path(made[2])], r"00002-of-00004\.h5\.part \(shard 2/4\) is unfinished"),
        (pending, r"00002-of-00004\.h5 \(shard 2/4\) is unfinished: 1 images are pending"),
        (wrong_first, r"00002-of-00004\.h5 is not a whole fpnx file \(there is no shard 2/4 from 1 on of 11 images\)"),
        (too_short, r"00002-of-00004\.h5 is not a whole fpnx file: it has 3 images, and shard 2/4 of 16 has 4"),
        (lambda made: [*made[:3], made[3].with_name("gone.h5")], r"gone\.h5 does not exist"),
    ],
    ids=["run", "list", "count", "missing", "twice", "part", "a part", "pending", "first", "short", "no file"],
)
def test_invalid_sets_are_refused(
    made: list[Path], tmp_path: Path, spoil: Callable[[list[Path]], list[Path]], message: str
) -> None:
    paths = spoil(made)
    with pytest.raises(StoreError, match=message) as raised:
        fpnx.open(paths)
    assert "\n" not in str(raised.value)
    with pytest.raises(StoreError, match=message):
        fpnx.merge(tmp_path / "out.h5", paths)
    with pytest.raises(StoreError, match=message):
        verify(paths)
    assert not (tmp_path / "out.h5").exists()


def test_many_missing_shards_are_counted(tmp_path: Path) -> None:
    made = fill_set(tmp_path, layout_of(["64x64"] * 9), 9)
    with pytest.raises(StoreError, match=r"^8 of 9 shards missing: 0/9, 1/9, 2/9, 3/9, 5/9 and 3 more \("):
        fpnx.open([made[4]])


@pytest.mark.parametrize("groups", [RAGGED, ["64x96"] * 7, [""] * 3], ids=["ragged", "one size", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merged(tmp_path: Path, groups: list[str], dtype: str) -> None:
    errors = {i: f"no header {i}" for i, name in enumerate(groups) if not name}
    made = fill_set(tmp_path, layout_of(groups, errors, dtype), 5, failed=[2, 4])
    listener = Progress()
    merged = fpnx.merge(tmp_path / "out.h5", made[::-1], listener=listener)
    failed = sum(i in (2, 4) or not name for i, name in enumerate(groups))
    assert (merged.shards, merged.images, merged.done, merged.failed) == (5, len(groups), len(groups) - failed, failed)
    assert merged.bytes == (tmp_path / "out.h5").stat().st_size
    assert_same_tables(tmp_path / "out.h5", tmp_path / "whole.h5")
    for row, group in enumerate(groups):
        for level in LEVELS if group else ():
            assert raw(tmp_path / "out.h5", row, level) == raw(tmp_path / "whole.h5", row, level)
    with fpnx.open(tmp_path / "out.h5") as store, fpnx.open(tmp_path / "whole.h5") as whole:
        assert_same_reading(store, whole)
        assert store.shard_slice is None
        assert store.provenance.merged is not None
        assert store.provenance.merged["shards"] == [path.name for path in made]
        assert replace(store.provenance, merged=None) == PROVENANCE
    assert verify(tmp_path / "out.h5").problems == ()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out.h5.")]
    if any(groups):
        assert listener.units[-1] == "MB"


class Progress(Listener):
    def __init__(self) -> None:
        self.units: list[str] = []

    def progress(self, what: str, done: int, total: int) -> None:
        self.units.append(what)


def test_merging_copies_features_bit_by_bit(made: list[Path], tmp_path: Path) -> None:
    odd = np.array([0x7FC12345, 0xFF800000, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    with h5py.File(made[0], "r+") as file:
        file["pyramids/64x64/P4"][1].reshape(-1)[:4] = 0  # reading copies
        file["pyramids/64x64/P4"][1, 0, 0, :4] = odd
    fpnx.merge(tmp_path / "out.h5", made)
    assert raw(tmp_path / "out.h5", 1, "P4") == raw(made[0], 1, "P4")
    assert odd.tobytes() in raw(tmp_path / "out.h5", 1, "P4")


def test_an_existing_output_is_kept_until_the_merge_is_complete(made: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    output.write_bytes(b"before")
    with pytest.raises(FpnxError, match=r"out\.h5 exists: replace it with --overwrite"):
        fpnx.merge(output, made)
    with pytest.raises(FpnxError, match="is one of the files to merge"):
        fpnx.merge(made[0], made, overwrite=True)
    with pytest.raises(FpnxError, match="fpnx keeps such names for itself"):
        fpnx.merge(tmp_path / "out.h5.part", made)
    with lock(output), pytest.raises(StoreError, match="being written by another run"):
        fpnx.merge(output, made, overwrite=True)
    with h5py.File(made[3], "r+") as file:
        file["images/bytes"][0] = 1
    with pytest.raises(StoreError, match="cannot be merged: their images are not those of the list"):
        fpnx.merge(output, made, overwrite=True)
    assert output.read_bytes() == b"before"
    with h5py.File(made[3], "r+") as file:
        file["images/bytes"][0] = 10 + 8
    part_path(output).write_bytes(b"unfinished")
    fpnx.merge(output, made, overwrite=True)
    assert verify(output).problems == ()
    assert not part_path(output).exists()
    output.unlink()
    part_path(output).write_bytes(b"unfinished")
    with pytest.raises(FpnxError, match=r"out\.h5\.part holds an unfinished run"):
        fpnx.merge(output, made)


def test_a_merge_stops_at_a_shard_that_cannot_be_read(made: list[Path], tmp_path: Path) -> None:
    with h5py.File(made[2], "r+") as file:
        del file["pyramids/32x96/P5"]
    with pytest.raises(StoreError, match=r"00002-of-00004\.h5 .*P5 is missing"):
        fpnx.merge(tmp_path / "out.h5", made)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(path.name for path in made), "whole.h5"])


def test_a_shard_that_is_replaced_during_reading_is_refused(made: list[Path], tmp_path: Path) -> None:
    with open_joined(made) as store:
        before = store[0]["P4"]
        store.release()
        assert np.array_equal(store[0]["P4"], before)
        store.release()
        shutil.copy(made[0], tmp_path / "copy.h5")
        os.replace(tmp_path / "copy.h5", made[0])
        with pytest.raises(StoreError, match="is another file than when it was opened"):
            store[0]["P4"]


def test_verify_of_a_set_names_the_shard(made: list[Path], tmp_path: Path) -> None:
    found = verify(str(tmp_path / "out.shard-*.h5"))
    assert (found.problems, found.images, found.done, found.failed, found.shards) == ((), 11, 8, 3, 4)
    assert found.values == verify(tmp_path / "whole.h5").values
    with h5py.File(made[1], "r+") as file:
        file["pyramids/96x64/P4"][0, 0, 0, 0] = np.nan
        file["images/mtime_ns"][0] = 77
    found = verify(made)
    assert found.exit_code == 1
    assert found.problems == (
        "their images are not those of the list that they were cut from",
        "out.shard-00001-of-00004.h5: 2.png: not as finite in P4 as the file says",
    )


def test_a_dataset_over_a_set(made: list[Path], tmp_path: Path) -> None:
    whole = fpnx.PyramidDataset(tmp_path / "whole.h5")
    for paths in (str(tmp_path / "out.shard-*.h5"), made[::-1]):
        data = fpnx.PyramidDataset(paths, target=len)
        assert (data.indices, data.sizes) == (whole.indices, whole.sizes)
        again = pickle.loads(pickle.dumps(data))
        for i in range(len(whole)):
            for level in LEVELS:
                assert torch.equal(data[i][level], whole[i][level])
                assert torch.equal(again[i][level], whole[i][level])
            assert (data[i]["path"], data[i]["index"]) == (whole[i]["path"], whole[i]["index"])
    with pytest.raises(FpnxError, match=r"no level 'P2' in .*shard-\*.*: it has P4, P5"):
        fpnx.PyramidDataset(made, levels=["P2"])


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_batches_of_a_set(made: list[Path], workers: int) -> None:
    data = fpnx.PyramidDataset(made)
    data[0]  # opened before the workers fork
    loader = DataLoader(data, batch_sampler=data.batch_sampler(2, shuffle=True, seed=0), num_workers=workers)
    seen = []
    for batch in loader:
        for i, index in enumerate(batch["index"].tolist()):
            assert (batch["P4"][i] == index + 1).all()
            seen.append(index)
    assert sorted(seen) == data.indices


def test_info_verify_and_merge_on_the_command_line(made: list[Path], fpnx: Callable[..., Any]) -> None:
    code, out, _ = fpnx("info", *made)
    assert code == 0
    assert "8 done, 3 failed, 0 pending" in out
    snippet = out[out.index("import fpnx") :]
    assert subprocess.run(
        [sys.executable, "-c", snippet], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    ).stdout.strip() == "0.png (2, 4, 4)"  # fmt: skip
    info = document(fpnx("info", "out.shard-*.h5", "--json")[1])
    assert (info["images"]["total"], info["shards"], info["shard"]) == (11, 4, None)
    info = document(fpnx("info", made[1], "--json")[1])
    assert (info["shards"], info["shard"]["index"]) == (0, 1)
    code, out, _ = fpnx("verify", *made)
    assert (code, "in 4 shards" in out, out.splitlines()[-1][:9]) == (0, True, "verified:")
    code, out, _ = fpnx("merge", "out.h5", "out.shard-*.h5")
    assert (code, out.partition("(")[0]) == (0, "11 images of 4 shards are in out.h5, 3 of them failed ")
    code, out, error = fpnx("merge", "out.h5", *made[:3], "--overwrite", "--json")
    assert (code, document(out)["error"].startswith("1 of 4 shards missing: 3/4")) == (2, True)
    assert error.count("\n") == 1


def test_a_set_is_visualized_like_one_file(made: list[Path], fpnx: Callable[..., Any]) -> None:
    code, _, error = fpnx("visualize", "out.shard-*.h5", "-o", "set", "--images", "0:6", "--overwrite")
    assert code == 0, error
    assert fpnx("visualize", "whole.h5", "-o", "whole", "--images", "0:6")[0] == 0
    code, _, error = fpnx("visualize", *made, "-o", "apart")
    assert (code, "in quotes: '" in error, "out.shard-*-of-00004.h5'" in error) == (2, True, True)
    pictures = sorted(path.name for path in Path("set").iterdir())
    assert pictures == sorted(path.name for path in Path("whole").iterdir()) == [f"{i}.png.png" for i in (0, 1, 2, 5)]


@pytest.mark.parametrize(
    ("size", "count", "images"),
    [
        ("native", 3, 9),
        pytest.param("native", 16, 19, marks=pytest.mark.slow),
        pytest.param(64, 16, 19, marks=pytest.mark.slow),
    ],
)
def test_shards_of_a_real_run(tmp_path: Path, size: str | int, count: int, images: int) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    sizes = [(96, 64), (64, 96), (80, 80), (96, 64), (160, 64)]
    for i in range(images):
        noise_image(i, sizes[i % 5 if i < 15 else 0]).save(photos / f"{i:02}.jpg")
    (photos / "03.jpg").write_bytes(b"")  # its header fails
    cut = (photos / "07.jpg").read_bytes()
    (photos / "07.jpg").write_bytes(cut[: len(cut) // 2])  # its pixels fail
    options = {**OPTIONS, "size": size}
    fpnx.extract(photos, tmp_path / "whole.h5", **options)
    shards = [fpnx.extract(photos, tmp_path / "out.h5", shard=f"{i}/{count}", **options).output for i in range(count)]
    fpnx.merge(tmp_path / "out.h5", tmp_path / "out.shard-*.h5")
    assert_same_tables(tmp_path / "out.h5", tmp_path / "whole.h5")
    with fpnx.open(shards) as store, fpnx.open(tmp_path / "out.h5") as one, fpnx.open(tmp_path / "whole.h5") as whole:
        assert_same_reading(store, one)
        assert (int((store.status == DONE).sum()), int((store.status == FAILED).sum())) == (images - 2, 2)
        for level in whole.levels:
            largest = max(float(np.abs(item[level]).max()) for item in whole)
            for item in whole:
                assert np.abs(store[item.path][level] - item[level]).max() <= 1e-5 * largest
    for shard in store.files:
        first = shard.shard_slice.first if shard.shard_slice else 0
        for row in range(len(shard)):
            for level in shard.levels if shard.padded_sizes[row] else ():
                assert raw(tmp_path / "out.h5", first + row, level) == raw(Path(shard.path), row, level)
    assert verify(shards, against=photos, sample=2).problems == ()
    assert (
        fpnx.extract(photos, tmp_path / "out.h5", resume=True, **options).computed == 0
    )  # the merged file counts as a run without shards


LARGE = ["3200x3200"] * 12  # 0.4 MB per image; progress is reported for each MB
MERGE = """
import sys
import fpnx.commands.merge
from fpnx.core.events import Listener
class Slow(Listener):
    def progress(self, what, done, total):
        print("copying", flush=True)
        sys.stdin.readline()
from fpnx.core.errors import Interrupted
try:
    fpnx.commands.merge.merge("out.h5", "out.shard-*.h5", listener=Slow())
except Interrupted as error:
    print(error)
    sys.exit(128 + error.signum)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_an_interrupted_merge_leaves_no_file_that_looks_complete(tmp_path: Path, signum: signal.Signals) -> None:
    made = fill_set(tmp_path, layout_of(LARGE), 4)
    merging = subprocess.Popen(
        [sys.executable, "-c", MERGE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert merging.stdin
    assert merging.stdout
    for _ in range(3):
        assert merging.stdout.readline() == "copying\n"
        merging.stdin.write("\n")
        merging.stdin.flush()
    assert merging.stdout.readline() == "copying\n"
    temporary = tmp_path / "out.h5.part.new"
    with fpnx.open(temporary) as store:
        assert not store.complete
        assert list(store) == []
    merging.send_signal(signum)
    if signum != signal.SIGKILL:
        time.sleep(0.1)
    rest, _ = merging.communicate("\n" * 100)
    assert not (tmp_path / "out.h5").exists()
    if signum == signal.SIGKILL:
        assert (merging.returncode, temporary.exists()) == (-signum, True)
    else:
        assert (merging.returncode, temporary.exists()) == (128 + signum, False)
        assert "nothing was merged, and the files are as they were" in rest
    fpnx.merge(tmp_path / "out.h5", made)
    assert_same_tables(tmp_path / "out.h5", tmp_path / "whole.h5")
    assert not temporary.exists()


BOUNDED = """
import resource
import fpnx.commands.merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fpnx.commands.merge.merge("out.h5", "out.shard-*.h5")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss counts in other units")
def test_a_merge_takes_little_memory(tmp_path: Path) -> None:
    layout = layout_of(["3200x3200"] * 1000)
    for index in range(2):
        fill(shard_path(tmp_path / "out.h5", Shard(index, 2)), part(layout, index, 2))
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "out.h5").stat().st_size > 400_000_000
    assert int(done.stdout) < 150_000, done.stderr  # kB


FULL = """
import resource, sys
import fpnx.commands.merge
from fpnx.core.events import Listener
class Fills(Listener):
    def progress(self, what, done, total):
        if done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, -1))
if sys.argv[1] == "at first":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, -1))
fpnx.commands.merge.merge("out.h5", "out.shard-*.h5", listener=Fills())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs ulimit")
@pytest.mark.parametrize("when", ["at first", "on the way"])
def test_a_merge_that_cannot_write_leaves_no_file(tmp_path: Path, when: str) -> None:
    fill_set(tmp_path, layout_of(LARGE), 2)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", FULL, when],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "FpnxError: out.h5 may not become" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_interrupted_merge_raises_interrupted(tmp_path: Path) -> None:
    made = fill_set(tmp_path, layout_of(LARGE), 2)

    class Signals(Listener):
        def progress(self, what: str, done: int, total: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="nothing was merged"):
        fpnx.merge(tmp_path / "out.h5", made, listener=Signals())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out.h5")]


FEW_FILES = """
import resource, sys
import numpy as np
import torch
import fpnx
from fpnx.commands.merge import merge
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
with fpnx.open("out.shard-*.h5") as store:
    order = np.random.default_rng(0).permutation(len(store))
    for i in order[:400].tolist():
        assert (store[i]["P4"] == i + 1).all() and (store[i]["P5"] == i + 100).all()
    rows = store.dataset((64, 64), "P5")[:]
    assert (rows.reshape(len(rows), -1) == np.arange(100, 100 + len(rows))[:, None]).all()
data = fpnx.PyramidDataset("out.shard-*.h5")
assert len(data) == len(rows) and (data[7]["P4"] == 8).all()
merged = merge("out.h5", "out.shard-*.h5")
print(merged.shards, merged.images, merged.done)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs ulimit")
@pytest.mark.parametrize(
    ("count", "files"), [(80, 64), pytest.param(2000, 256, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_more_shards_than_open_files(tmp_path: Path, count: int, files: int) -> None:
    layout = layout_of(["64x64"] * (count + count // 2))
    fill_set(tmp_path, layout, count)
    running = Forked(FEW_FILES, files, cwd=tmp_path)
    out, err = running.communicate()
    assert running.returncode == 0, err
    assert out.split() == [str(count), str(len(layout.images)), str(len(layout.images))]
    assert_same_tables(tmp_path / "out.h5", tmp_path / "whole.h5")
    assert verify(tmp_path / "out.h5").problems == ()


def test_reading_many_images_of_a_set(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the file of a run without shards, also with one file open at a time."""
    monkeypatch.setattr("fpnx.store.joined_store.MAX_OPEN", 1)
    with fpnx.open(made) as store, fpnx.open(made[0].parent / "whole.h5") as whole:
        for size in store.sizes:
            indices = [item.index for item in store if store.padded_sizes[item.index] == size]
            for chosen in (indices, indices[::-1], [*indices, *indices[:1], *indices]):
                for level in LEVELS:
                    assert np.array_equal(store.read(level, chosen), whole.read(level, chosen))
                    assert np.array_equal(store.read(level, chosen), np.stack([store[i][level] for i in chosen]))
        with pytest.raises(NotDoneError, match=r"4\.png failed: no 4"):
            store.read("P4", [0, 4])


def test_a_pickled_set_opens_its_files_again(made: list[Path]) -> None:
    with fpnx.open(made) as store:
        pickled = pickle.dumps((store, store[0]))
        expected = store[0]["P4"]
    again, item = pickle.loads(pickled)
    assert (type(again), again.paths, again.path) == (JoinedStore, store.paths, store.path)
    assert np.array_equal(item["P4"], expected)
    again.close()
    made[1].unlink()
    with pytest.raises(StoreError, match="does not exist"):
        pickle.loads(pickled)
