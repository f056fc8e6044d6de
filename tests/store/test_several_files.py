"""Files with one fingerprint, read as one store and merged: equal to one run over all images, or refused."""

from __future__ import annotations

import os
import pickle
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
from fpnx.core.errors import FpnxError, StoreError
from fpnx.core.events import Listener
from fpnx.core.image_list import ImageList, ImageRecord
from fpnx.store.joined_store import JoinedStore
from fpnx.store.regions import RegionBatch, RegionLayout
from fpnx.store.writer import Writer, part_path
from tests.helpers.layouts import LEVELS, PROVENANCE, features_of, layout_of
from tests.helpers.process import document
from tests.store.test_shard_set import RAGGED, assert_same_reading, assert_same_tables, fill_set, raw


def file_of(
    path: Path,
    numbers: Sequence[int],
    *,
    failed: Sequence[int] = (),
    touched: int = 0,
    digests: bool = True,
    config: dict[str, Any] | None = None,
    root: bytes = b"/pictures",
) -> Path:
    """Write a file of the images `numbers` of `RAGGED`, called 0.png, 1.png …, whose features tell their number.

    Args:
        path: the file to write.
        numbers: of the images, in their order.
        failed: those that have failed, besides those without a header.
        touched: nanoseconds by which the times of all images differ from those of other files.
        digests: whether content hashes are stored, as by this version.
        config: what differs in the config.
        root: of the images.
    """
    layout = layout_of([RAGGED[n] for n in numbers])
    layout = replace(
        layout,
        images=ImageList(root, tuple(ImageRecord(b"%d.png" % n, 10 + n, 100 + n + touched) for n in numbers)),
        config={**layout.config, **(config or {})},
        errors={i: f"no header {n}" for i, n in enumerate(numbers) if not RAGGED[n]},
        input_sizes=layout.input_sizes.reshape(-1, 2),
    )
    writer = Writer.create(path, layout, PROVENANCE)
    for i, n in enumerate(numbers):
        if n in failed:
            writer.fail(i, f"no {n}")
        elif size := layout.padded_sizes[i]:
            digest = np.full((1, 16), 1 + n if digests else 0, np.uint8)
            counts = {level: [0] for level in LEVELS}
            writer.put([i], features_of([n], size), np.array([[7, 7 + n]]), counts, digests=digest)
    writer.finish()
    return path


@pytest.fixture
def several(tmp_path: Path) -> list[Path]:
    """Three files of some of eleven images: of several sizes, two without headers, some in two or three files.

    4.png failed in all, 5.png in the first only; `whole.h5` is one run over all images.
    """
    file_of(tmp_path / "whole.h5", [10, 3, 4, 6, 0, 8, 5, 7, 9, 2, 1], failed=[4])
    return [
        file_of(tmp_path / "part-a.h5", [10, 3, 4, 5, 6, 0, 8], failed=[4, 5]),
        file_of(tmp_path / "part-b.h5", [5, 10, 7, 9, 6, 2], touched=1000),
        file_of(tmp_path / "part-c.h5", [8, 0, 1, 4, 3, 2, 10, 5], failed=[4, 8, 2], touched=2000),
    ]


def with_times_of(store: Path, whole: Path) -> None:
    """Give `whole` the times that images have in `store`, where they are those of several files."""
    with h5py.File(store) as file, h5py.File(whole, "r+") as other:
        assert file["images/path"][:].tolist() == other["images/path"][:].tolist()
        other["images/mtime_ns"][:] = file["images/mtime_ns"][:]


def test_several_files_are_merged_like_one_run_over_all_images(several: list[Path], tmp_path: Path) -> None:
    merged = fpnx.merge(tmp_path / "out.h5", several)
    assert (merged.files, merged.shards, merged.images, merged.done, merged.failed) == (3, 0, 11, 8, 3)
    assert merged.repeated == 7 + 6 + 8 - 11
    with h5py.File(tmp_path / "out.h5") as file:
        times = dict(zip(file["images/path"].asstr()[:], file["images/mtime_ns"][:].tolist(), strict=True))
    assert times == {  # each from the first file in which it is done
        **{f"{n}.png": 100 + n for n in (10, 3, 4, 6, 0, 8)},
        **{f"{n}.png": 1100 + n for n in (5, 7, 9, 2)},
        "1.png": 2101,
    }
    with_times_of(tmp_path / "out.h5", tmp_path / "whole.h5")
    assert_same_tables(tmp_path / "out.h5", tmp_path / "whole.h5")
    with fpnx.open(tmp_path / "out.h5") as store, fpnx.open(tmp_path / "whole.h5") as whole:
        assert_same_reading(store, whole)
        for index, group in enumerate(whole.padded_sizes):
            for level in LEVELS if group else ():
                assert raw(tmp_path / "out.h5", index, level) == raw(tmp_path / "whole.h5", index, level)
        assert store.provenance.merged is not None
        assert store.provenance.merged["files"] == [path.name for path in several]
        assert replace(store.provenance, merged=None) == PROVENANCE
    assert fpnx.verify(tmp_path / "out.h5").problems == fpnx.verify(several).problems == ()


@pytest.mark.parametrize("most", [64, 1], ids=["open", "one file at a time"])
def test_several_files_are_read_like_one_run_over_all_images(
    several: list[Path], tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpnx.store.joined_store.MAX_OPEN", most)
    with fpnx.open(several) as store, fpnx.open(tmp_path / "whole.h5") as whole:
        assert isinstance(store, JoinedStore)
        whole.mtimes_ns = store.mtimes_ns  # those of several files
        assert_same_reading(store, whole)
        assert np.array_equal(store.digests, whole.digests)
        assert store.path == f"{several[0]} and 2 more"
        for level in LEVELS:
            indices = [item.index for item in store if store.padded_sizes[item.index] == (64, 64)]
            for chosen in (indices, indices[::-1], indices * 2, store.input_sizes[:, 0] + store.status == 65):
                assert np.array_equal(store.read(level, chosen), whole.read(level, chosen))
        again, item = pickle.loads(pickle.dumps((store, store["2.png"])))
        assert (again.paths, again.path, item["P4"].max()) == (store.paths, store.path, 3)
        again.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_of_several_files(several: list[Path], tmp_path: Path, workers: int) -> None:
    whole = fpnx.PyramidDataset(tmp_path / "whole.h5")
    data = fpnx.PyramidDataset(several, target=int_of)
    assert (data.indices, data.sizes) == (whole.indices, whole.sizes)
    assert all(torch.equal(data[i]["P4"], whole[i]["P4"]) for i in range(len(whole)))
    loader = DataLoader(data, batch_sampler=data.batch_sampler(2, shuffle=True, seed=0), num_workers=workers)
    seen = []
    for batch in loader:
        for i, number in enumerate(batch["target"].tolist()):
            assert (batch["P4"][i] == number + 1).all()
            assert (batch["P5"][i] == number + 100).all()
            seen.append(batch["path"][i])
    assert sorted(seen) == sorted(whole[i]["path"] for i in range(len(whole)))


def int_of(path: str) -> int:
    return int(path.partition(".")[0])


def test_globs_single_files_and_shards_beside_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("b.h5", [5, 7]), ("a.h5", [2]), ("c.h5", [])):
        file_of(Path(name), numbers)
    with fpnx.open("?.h5") as store:
        assert (store.paths, store.path) == (["2.png", "5.png", "7.png"], "?.h5")
    for one in (["b.h5"], "[b].h5"):
        with fpnx.open(one) as store:
            assert (store.paths, store.files) == (["5.png", "7.png"], ())
    fill_set(tmp_path, layout_of(["64x64"] * 2), 2)  # 0.png and 1.png
    shards = [f"out.shard-0000{i}-of-00002.h5" for i in range(2)]
    with fpnx.open([shards[1], "a.h5", shards[0], "c.h5", "b.h5"]) as store:
        assert store.paths == ["0.png", "1.png", "2.png", "5.png", "7.png"]
        assert (store.path, len(store.files)) == ("out.shard-*-of-00002.h5 and 3 more", 5)
        assert [int(item["P4"].max()) for item in store] == [1, 2, 3, 6, 8]
    with pytest.raises(StoreError, match=r"^1 of 2 shards missing: 1/2 \(out\.shard-00001-of-00002\.h5 is there, but"):
        fpnx.open([shards[0], "a.h5"])
    with fpnx.open(["c.h5", "c.h5"]) as store:
        assert (len(store), store.sizes, list(store), store.failures()) == (0, [], [], [])


def shards_of_copies(tmp_path: Path, name: str, shift: int = 0) -> list[Path]:
    """Two shards of a run whose images have times of their own, and from image 2 on sizes larger by `shift`."""
    folder = tmp_path / name
    folder.mkdir()
    layout = layout_of(["64x64"] * 5)
    records = [
        record._replace(bytes=record.bytes + shift * (i >= 2), mtime_ns=len(name) * 1000 + i)
        for i, record in enumerate(layout.images.records)
    ]
    return fill_set(folder, replace(layout, images=replace(layout.images, records=tuple(records))), 2)


def test_shards_that_were_made_from_copies_with_other_times(tmp_path: Path) -> None:
    here, there = shards_of_copies(tmp_path, "here"), shards_of_copies(tmp_path, "there")
    for files in ([here[0], there[1]], [here[1], there[0]]):
        with fpnx.open(files) as store:
            assert store.paths == [f"{n}.png" for n in range(5)]
            assert [int(item["P4"].max()) for item in store] == [1, 2, 3, 4, 5]
            assert (len(store.files), store.shard_list) == (2, None)
        assert fpnx.verify(files).problems == ()
    merged = fpnx.merge(tmp_path / "out.h5", [there[1], here[0]])
    assert (merged.shards, merged.done, merged.repeated) == (2, 5, 0)
    with fpnx.open(merged.output) as store:
        assert store.mtimes_ns.tolist() == [4000, 4001, 5002, 5003, 5004]
        assert store.provenance.merged is not None
        assert store.provenance.merged["files"] == [path.name for path in (here[0], there[1])]
    with pytest.raises(StoreError, match="shard 0/2 is there twice"):
        fpnx.open([*here, there[0]])
    other = shards_of_copies(tmp_path, "changed", shift=1)
    with pytest.raises(StoreError, match=r"are shards of different runs \(their lists of images differ\): name all"):
        fpnx.open([here[0], other[1]])
    with h5py.File(there[1], "r+") as file:
        file["images/bytes"][0] = 99
    with pytest.raises(StoreError, match="cannot be merged: their images are not those of the list"):
        fpnx.merge(tmp_path / "again.h5", [here[0], there[1]])


def other_bytes(path: Path) -> Path:
    file_of(path, [7, 5])
    with h5py.File(path, "r+") as file:
        file["images/digest"][1, 15] = 99
    return path


def other_size(path: Path) -> Path:
    file_of(path, [7, 5], digests=False)
    with h5py.File(path, "r+") as file:
        file["images/bytes"][1] = 99
    return path


def unknown_size(path: Path) -> Path:
    file_of(path, [5], digests=False)
    with h5py.File(path, "r+") as file:
        file["images/bytes"][0] = -1
    return path


def pending(path: Path) -> Path:
    file_of(path, [7])
    with h5py.File(path, "r+") as file:
        file["images/status"][0] = 0
    return path


def unfinished(path: Path) -> Path:
    os.rename(file_of(path, [7]), part_path(path))
    return part_path(path)


UNKNOWN = r"5\.png is in .*first\.h5 and in .*second\.h5, which do not tell whether its bytes are the same"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            other_bytes,
            r"^5\.png is in .*first\.h5 and in .*second\.h5, with other bytes: leave out one of the files, or",
        ),
        (other_size, r"^5\.png is in .*first\.h5 and in .*second\.h5, with other bytes"),
        (unknown_size, UNKNOWN),
        (lambda path: file_of(path, [5], digests=False, touched=1), UNKNOWN),
        (
            lambda path: file_of(path, [7], config={"seed": 1}),
            r"with different options \(seed None → 1\): only files of",
        ),
        (pending, r"second\.h5 is unfinished: 1 images are pending"),
        (unfinished, r"second\.h5\.part is unfinished: finish it with --resume"),
        (lambda path: path, r"second\.h5 does not exist"),
    ],
    ids=["bytes", "size", "unknown size", "time", "config", "pending", "part", "absent"],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    files = [file_of(tmp_path / "first.h5", [2, 5], digests=make is other_bytes), make(tmp_path / "second.h5")]
    for use in (fpnx.open, fpnx.PyramidDataset, lambda paths: fpnx.merge(tmp_path / "out.h5", paths)):
        with pytest.raises(StoreError, match=message) as raised:
            use(files)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.h5").exists()


def test_without_digests_size_and_time_tell_that_an_image_is_the_same(tmp_path: Path) -> None:
    files = [file_of(tmp_path / "old.h5", [2, 5], digests=False), file_of(tmp_path / "new.h5", [5, 7])]
    with h5py.File(files[0], "r+") as file:
        del file["images/digest"]  # as in a file of an earlier version
    with fpnx.open(files) as store:
        assert (store.paths, store.repeated) == (["2.png", "5.png", "7.png"], 1)
        assert [digest.any() for digest in store.digests] == [False, False, True]
    fpnx.merge(tmp_path / "out.h5", files)
    with fpnx.open(files) as store, fpnx.open(tmp_path / "out.h5") as merged:
        assert_same_reading(merged, store)
        assert np.array_equal(store.digests, merged.digests)


def test_an_image_that_failed_gives_way_to_one_that_is_done(tmp_path: Path) -> None:
    """Also where its bytes were others, as after a damaged file was repaired."""
    file_of(tmp_path / "a.h5", [5, 7, 3], failed=[5], touched=1)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["images/bytes"][0] = 1
    file_of(tmp_path / "b.h5", [5, 3])
    for files in (["a.h5", "b.h5"], ["b.h5", "a.h5"]):
        with fpnx.open([tmp_path / name for name in files]) as store:
            assert sorted(store.paths) == ["3.png", "5.png", "7.png"]
            assert (store["5.png"]["P4"] == 6).all()
            assert store.failures() == [("3.png", "no header 3")]


def test_rows_that_are_not_in_the_order_of_images(tmp_path: Path) -> None:
    """Another tool may number them as it likes; one image of each size is left out."""
    path = file_of(tmp_path / "odd.h5", [0, 1, 4, 8, 2, 6])
    with h5py.File(path, "r+") as file:
        order = [3, 0, 2, 1]
        file["images/row"][:4] = order
        for level, base in zip(LEVELS, (1, 100), strict=True):
            for number, row in zip([0, 1, 4, 8], order, strict=True):
                file[f"pyramids/64x64/{level}"][row] = base + number
    with fpnx.open([file_of(tmp_path / "first.h5", [4, 6]), path]) as store:
        assert store.paths == [f"{n}.png" for n in (4, 6, 0, 1, 8, 2)]
        assert store.rows.tolist() == [0, 0, 3, 1, 2, 1]  # among all of its size, in the order of the file
        assert [(int(item["P4"].min()), int(item["P5"].max())) for item in store] == [
            (n + 1, n + 100) for n in (4, 6, 0, 1, 8, 2)
        ]
        assert store.read("P4", [4, 0, 3, 2])[:, 0, 0, 0].tolist() == [9, 5, 2, 1]
        fpnx.merge(tmp_path / "out.h5", [Path(file.path) for file in store.files])
        with fpnx.open(tmp_path / "out.h5") as merged:
            assert_same_reading(merged, store)
    with h5py.File(path, "r+") as file:
        file["images/row"][0] = 99
    with fpnx.open([path, tmp_path / "first.h5"]) as store:
        assert (store["1.png"]["P4"] == 2).all()
        with pytest.raises(
            StoreError, match=r"odd\.h5 is not a whole fpnx file: .* where 100 rows of \(2, 4, 4\) belong"
        ):
            store["0.png"]["P4"]


def regions_of(path: Path, numbers: Sequence[int], failed: Sequence[int] = ()) -> Path:
    """A file of regions: image n has n % 4 boxes, whose features are 10 n, 10 n + 1, ..."""
    layout = layout_of(["64x64"] * len(numbers))
    image = np.repeat(np.arange(len(numbers)), [n % 4 for n in numbers])
    values = np.array([10 * n + k for n in numbers for k in range(n % 4)])
    layout = replace(
        layout,
        images=ImageList(b"/pictures", tuple(ImageRecord(b"%d.png" % n, 10 + n, 100 + n) for n in numbers)),
        config={**layout.config, "regions": {"boxes": "0" * 64, "size": "3x3"}},
        shapes={size: dict.fromkeys(LEVELS, (2, 0, 0)) for size in layout.shapes},
        regions=RegionLayout(image, 5 + values % 2, {5: "cat", 6: "dog"}, (2, 3, 3)),
    )
    writer = Writer.create(path, layout, PROVENANCE)
    for i, n in enumerate(numbers):
        if n in failed:
            writer.fail(i, "no")
            continue
        mine = values[image == i]
        boxes = np.stack([mine, mine, mine + 5, mine + 9], axis=1).astype(np.float64)
        features = np.broadcast_to(mine[:, None, None, None], (len(mine), 2, 3, 3)).astype(np.float32)
        batch = RegionBatch(boxes, 4 + mine % 2, features)
        nothing = {level: np.zeros((1, 2, 0, 0), np.float32) for level in LEVELS}
        writer.put([i], nothing, np.array([[64, 64]]), {level: [0] for level in LEVELS}, batch)
    writer.finish()
    return path


def test_regions_of_several_files(tmp_path: Path) -> None:
    files = [
        regions_of(tmp_path / "a.h5", [3, 2, 5, 7], failed=[2]),
        regions_of(tmp_path / "b.h5", [4, 7, 2, 3, 6]),
        regions_of(tmp_path / "c.h5", [8, 4]),
    ]
    regions_of(tmp_path / "whole.h5", [3, 5, 7, 4, 2, 6, 8])
    fpnx.merge(tmp_path / "out.h5", files)
    assert fpnx.verify(tmp_path / "out.h5").problems == fpnx.verify(files).problems == ()
    with fpnx.open(files) as store, fpnx.open(tmp_path / "whole.h5") as whole, fpnx.open(tmp_path / "out.h5") as merged:
        for each in (store, merged):
            assert each.paths == whole.paths
            for table in ("image", "box", "level", "label"):
                assert np.array_equal(getattr(each.regions, table), getattr(whole.regions, table)), table
            for rows in (slice(None), slice(3, 9), slice(-1, None)):
                assert np.array_equal(each.regions.features[rows], whole.regions.features[rows])
            for item, expected in zip(each, whole, strict=True):
                assert np.array_equal(item.regions.features, expected.regions.features)
    data, expected_data = (fpnx.PyramidDataset(paths, regions=True) for paths in (files, tmp_path / "whole.h5"))
    for sample, expected in zip(data, expected_data, strict=False):
        assert torch.equal(sample["regions"], expected["regions"])
        assert torch.equal(sample["boxes"], expected["boxes"])


class Messages(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def test_images_of_several_folders(tmp_path: Path) -> None:
    """Node-local copies: the same names and bytes below other folders."""
    files = [file_of(tmp_path / "a.h5", [5, 2], root=b"/a"), file_of(tmp_path / "b.h5", [2, 7], root=b"/b", touched=9)]
    with fpnx.open(files) as store:
        assert [store.root_of(store.index(name)) for name in ("5.png", "2.png", "7.png")] == ["/a", "/a", "/b"]
        assert store.root == "/a"
    with fpnx.open(files[1]) as store:
        assert store.root_of(0) == "/b"
    listener = Messages()
    fpnx.merge(tmp_path / "out.h5", files, listener=listener)
    assert listener.texts == [
        "the files are of images in 2 folders: the merged one names /a, where images of the others are not found"
    ]


def test_an_output_among_the_files_is_refused(several: list[Path]) -> None:
    before = several[1].read_bytes()
    with pytest.raises(FpnxError, match="is one of the files to merge"):
        fpnx.merge(several[1], several, overwrite=True)
    assert several[1].read_bytes() == before


def test_commands_take_several_files(several: list[Path], fpnx: Callable[..., Any], capsys: Any) -> None:
    code, out, _ = fpnx("info", *several)
    assert (code, "8 done, 3 failed, 0 pending" in out) == (0, True)
    assert ["files", "3"] in [line.split() for line in out.splitlines()]
    exec(compile(out[out.index("import fpnx") :], "snippet", "exec"), {})
    assert capsys.readouterr().out.strip() == "10.png (2, 10, 2)"
    info = document(fpnx("info", "part-*.h5", "--json")[1])
    assert (info["images"]["total"], info["files"], info["shards"], info["shard"]) == (11, 3, 0, None)
    code, out, _ = fpnx("verify", *several)
    assert (code, "values read in 3 files" in out, out.splitlines()[-1][:9]) == (0, True, "verified:")
    code, out, _ = fpnx("merge", "out.h5", *several)
    assert (code, out.partition("(")[0]) == (0, "11 images of 3 files are in out.h5, 3 of them failed ")
    assert out.endswith("10 images in several files, taken once\n")
    code, out, error = fpnx("merge", "out.h5", several[1], other_bytes(Path("other.h5")), "--overwrite", "--json")
    assert (code, "other.h5, with other bytes" in document(out)["error"], error.count("\n")) == (2, True, 1)
    compared = document(fpnx("compare", "part-*.h5", "out.h5", "--json")[1])
    assert compared["files"] == ["part-*.h5", "out.h5"]
    code, _, error = fpnx("export", *several, "-o", "vectors")
    assert code == 0, error
    assert np.load("vectors/P4.npy").shape == (8, 2)


@pytest.mark.slow
def test_two_runs_are_merged_like_one(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backbone": "mobilenet_v2", "weights": "random", "levels": "P4-P5", "size": 32}
    everything = sorted(path for path in photos.rglob("*") if path.is_file())
    whole = fpnx.extract(photos, tmp_path / "whole.h5", **options)
    fpnx.extract(photos, tmp_path / "a.h5", limit=4, **options)
    hidden = [path.rename(path.with_name(f".{path.name}")) for path in everything[:2]]
    for path in everything[2:]:
        os.utime(path)  # other times, the same bytes
    fpnx.extract(photos, tmp_path / "b.h5", **options)
    for path in hidden:
        path.rename(path.with_name(path.name[1:]))
    merged = fpnx.merge(tmp_path / "out.h5", [tmp_path / "a.h5", tmp_path / "b.h5"])
    assert (merged.images, merged.done, merged.repeated) == (whole.done, whole.done, 2)
    with fpnx.open(tmp_path / "out.h5") as store, fpnx.open(tmp_path / "whole.h5") as expected:
        assert store.paths == expected.paths
        assert np.array_equal(store.digests, expected.digests)
        for level in store.levels:
            np.testing.assert_allclose(store.read(level), expected.read(level), rtol=0, atol=1e-4)
    assert fpnx.verify(tmp_path / "out.h5", against=photos, sample=2).problems == ()
