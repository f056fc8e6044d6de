"""The writer: the file that it creates, the order of commits, and the state of the file after a crash at any write."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fpnx.commands.verify import verify
from fpnx.core.errors import FpnxError, StoreError
from fpnx.core.files import OpenFile
from fpnx.core.validation import parse_size
from fpnx.store.reader import DONE, FAILED, PENDING, Store, open_store_file
from fpnx.store.writer import Writer, part_path
from tests.helpers.layouts import LEVELS, PROVENANCE, features_of, layout_of


def size_of(store: Store, index: int) -> tuple[int, int]:
    size = store.padded_sizes[index]
    assert size is not None
    return size


def put(writer: Writer, indices: list[int], group: str) -> None:
    sizes = np.array([[7, 7 + i] for i in indices], np.int32)
    writer.put(
        indices,
        features_of(indices, parse_size(group) or (0, 0)),
        sizes,
        {level: [0] * len(indices) for level in LEVELS},
    )


def check_done_rows(path: Path) -> int:
    """Check that every image marked as done has the features that were put; returns their number."""
    with open_store_file(path) as store:
        done = np.flatnonzero(store.status == DONE).tolist()
        for index in done:
            for level, expected in features_of([index], size_of(store, index)).items():
                np.testing.assert_array_equal(store[index][level], expected[0])
            assert store[index].source_size == (7, 7 + index)
            assert not store.nonfinite[index].any()
        return len(done)


def stored_status(output: Path) -> list[int]:
    """Status of each image in the `.part` on disk, read from a copy: HDF5 shares a file that is open twice."""
    copy = output.with_name("copy.h5.part")
    shutil.copyfile(part_path(output), copy)
    with open_store_file(copy) as store:
        return list(store.status)


def test_a_new_part_has_all_datasets_and_pending_images(tmp_path: Path) -> None:
    writer = Writer.create(
        tmp_path / "out.h5", layout_of(["64x64", "64x96", "", "64x64"], {2: "no header"}), PROVENANCE
    )
    writer.close()
    assert sorted(os.listdir(tmp_path)) == ["out.h5.part"]
    with h5py.File(part_path(tmp_path / "out.h5")) as file:
        assert (file.attrs["format"], file.attrs["format_version"]) == ("fpnx", 1)
        assert file["images/path"].asstr()[:].tolist() == ["0.png", "1.png", "2.png", "3.png"]
        assert file["images/status"][:].tolist() == [PENDING, PENDING, FAILED, PENDING]
        assert file["images/error"][:].tolist() == [b"", b"", b"no header", b""]
        assert file["images/row"][:].tolist() == [0, 0, -1, 1]
        assert file["pyramids/64x64/P4"].shape == (2, 2, 4, 4)
        assert file["pyramids/64x96/P5"].shape == (1, 2, 2, 3)
        assert dict(file["pyramids/64x96/P5"].attrs)["stride"] == 32
        assert "P4" not in file  # two sizes: no soft links
        for name in ("images/status", "images/error", "stats/nonfinite", "pyramids/64x64/P4"):
            plist = file[name].id.get_create_plist()
            assert plist.get_layout() == h5py.h5d.CONTIGUOUS
            assert plist.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY


def test_the_space_of_a_new_part_is_reserved(tmp_path: Path) -> None:
    writer = Writer.create(tmp_path / "out.h5", layout_of(["960x960"] * 40), PROVENANCE)
    writer.close()
    info = part_path(tmp_path / "out.h5").stat()
    if not writer.space_is_reserved:
        pytest.skip("this file system cannot reserve space")
    assert 512 * info.st_blocks >= info.st_size > 40 * 2 * 60 * 60 * 4


def test_a_part_that_lacks_one_byte_is_refused(tmp_path: Path) -> None:
    Writer.create(tmp_path / "out.h5", layout_of(["64x64"] * 3), PROVENANCE).close()
    part = part_path(tmp_path / "out.h5")
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(StoreError, match="truncated"):
        open_store_file(part)


def test_a_finished_file_verifies_and_its_soft_links_lead_to_the_rows(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    writer = Writer.create(output, layout_of(["64x64"] * 5), PROVENANCE)
    put(writer, [0, 1, 3], "64x64")
    writer.commit()
    put(writer, [2], "64x64")
    writer.fail(4, "no \x1b[31m picture")
    writer.finish()
    assert os.listdir(tmp_path) == ["out.h5"]
    assert check_done_rows(output) == 4
    with h5py.File(output) as file:
        assert file["P4"][2, 0, 0, 0] == 3
        assert np.isnan(file["P5"][4]).all()
        assert file["images/error"][4] == rb"no \x1b[31m picture"
    assert verify(output).problems == ()


def test_images_are_marked_as_done_only_by_a_commit(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    writer = Writer.create(output, layout_of(["64x64"] * 3), PROVENANCE)
    put(writer, [0, 1], "64x64")
    assert stored_status(output) == [PENDING] * 3
    writer.commit()
    assert stored_status(output) == [DONE, DONE, PENDING]
    put(writer, [2], "64x64")
    writer.close()
    assert check_done_rows(part_path(output)) == 2


def test_a_failed_image_is_pending_on_reopening_and_without_reason_once_it_is_done(tmp_path: Path) -> None:
    output, layout = tmp_path / "out.h5", layout_of(["64x64", "64x64", ""], {2: "no header"})
    writer = Writer.create(output, layout, PROVENANCE)
    writer.put([0], features_of([0], "64x64"), np.array([[9, 9]]), {"P4": [3], "P5": [0]})
    writer.fail(1, "truncated")
    writer.commit()
    writer.close()
    with open_store_file(part_path(output)) as store:
        assert store.status.tolist() == [DONE, FAILED, FAILED]
        assert store.nonfinite_by_level() == {"P4": 3, "P5": 0}
    writer = Writer.reopen(output)
    assert stored_status(output) == [DONE, PENDING, FAILED]  # the last has no row
    put(writer, [0, 1], "64x64")
    writer.finish()
    with h5py.File(output) as file:
        assert file["images/error"][:].tolist() == [b"", b"", b"no header"]
        assert not file["stats/nonfinite"][:].any()
    assert verify(output).problems == ()


def test_a_reason_is_cut_between_characters(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    writer = Writer.create(output, layout_of(["64x64"]), PROVENANCE)
    writer.fail(0, "x" + "é" * 200)
    writer.finish()
    with open_store_file(output) as store:
        assert store.error(0) == "x" + "é" * 119


def test_a_part_that_is_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"mine")
    output = tmp_path / "out.h5"
    os.symlink(tmp_path / "precious", part_path(output))
    with pytest.raises(StoreError, match="is a link"):
        Writer.reopen(output)
    Writer.create(output, layout_of(["64x64"]), PROVENANCE).close()
    assert (tmp_path / "precious").read_bytes() == b"mine"
    assert not part_path(output).is_symlink()


class Recorder(OpenFile):
    """A file that logs its writes and syncs: ("write", offset, bytes) and ("sync",)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.log: list[tuple[Any, ...]] = []

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.log.append(("write", offset, bytes(data)))
        super().write(offset, data)

    def sync(self) -> None:
        self.log.append(("sync",))
        super().sync()


def apply(content: bytearray, entry: tuple[Any, ...]) -> None:
    if entry[0] == "write":
        _, offset, data = entry
        content[offset : offset + len(data)] = data


def recorded_run(tmp_path: Path) -> tuple[bytes, list[tuple[Any, ...]]]:
    """A run with two sizes, a failure and a retried failure → the file at its start, and the log of its writes."""
    output = tmp_path / "recorded.h5"
    writer = Writer.create(
        output, layout_of(["64x64", "64x96", "64x64", "", "64x96", "64x64"], {3: "gone"}), PROVENANCE
    )
    writer.fail(2, "at first")
    writer.commit()
    writer.close()
    start = part_path(output).read_bytes()
    disk = Recorder(part_path(output))
    writer = Writer(output, disk)
    writer.reset_failed()
    put(writer, [0, 2], "64x64")
    writer.commit()
    put(writer, [1], "64x96")
    put(writer, [5], "64x64")
    writer.commit()
    writer.fail(4, "for good")
    writer.commit()
    writer.close()
    return start, disk.log


def test_done_rows_are_correct_after_and_in_the_middle_of_every_write(tmp_path: Path) -> None:
    start, log = recorded_run(tmp_path)
    crashed, seen = tmp_path / "crashed.h5.part", []
    content = bytearray(start)
    for entry in log:
        if entry[0] == "write" and len(entry[2]) > 1:
            torn = bytearray(content)
            apply(torn, ("write", entry[1], entry[2][: len(entry[2]) // 2]))
            crashed.write_bytes(torn)
            check_done_rows(crashed)
        apply(content, entry)
        crashed.write_bytes(content)
        seen.append(check_done_rows(crashed))
    assert len(content) == len(start), "the file never grows or shrinks"
    assert seen == sorted(seen)
    assert {0, 2, 4} <= set(seen)
    assert len([entry for entry in log if entry[0] == "write"]) > 20


def test_done_rows_are_correct_after_a_power_loss_at_any_moment(tmp_path: Path) -> None:
    """Any subset of the writes since the last sync may have reached the disk."""
    start, log = recorded_run(tmp_path)
    chance, crashed = random.Random(0), tmp_path / "crashed.h5.part"
    for moment in range(1, len(log) + 1):
        synced = max((i for i in range(moment) if log[i] == ("sync",)), default=0)
        content = bytearray(start)
        for position, entry in enumerate(log[:moment]):
            if position < synced or chance.random() < 0.5:
                apply(content, entry)
        crashed.write_bytes(content)
        check_done_rows(crashed)


def test_the_crash_tests_detect_a_wrong_order(tmp_path: Path) -> None:
    """The two tests above can fail: without a sync before it, a status can reach the disk before its features."""
    start, log = recorded_run(tmp_path)
    marks = [e for e in log if e[0] == "write" and e[2].count(b"\x01") and len(e[2]) <= 6]
    content = bytearray(start)
    apply(content, marks[-1])
    crashed = tmp_path / "crashed.h5.part"
    crashed.write_bytes(content)
    with pytest.raises(AssertionError):
        check_done_rows(crashed)


class Failing(OpenFile):
    """A file whose third sync fails and whose later syncs succeed, as on Linux."""

    syncs = 0

    def sync(self) -> None:
        self.syncs += 1
        if self.syncs == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_after_a_failed_sync_no_image_is_marked_as_done(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    Writer.create(output, layout_of(["64x64"] * 4), PROVENANCE).close()
    disk = Failing(part_path(output))
    writer = Writer(output, disk)
    put(writer, [0], "64x64")
    writer.commit()
    put(writer, [1], "64x64")
    for again in (writer.commit, writer.commit, lambda: put(writer, [2], "64x64"), lambda: writer.fail(3, "x")):
        with pytest.raises(FpnxError, match="Input/output error; what was committed is kept"):
            again()
    assert disk.syncs == 3
    writer.close()
    assert stored_status(output) == [DONE, PENDING, PENDING, PENDING]


def test_config_and_fingerprint_are_in_the_file(tmp_path: Path) -> None:
    layout = layout_of(["64x64"])
    Writer.create(tmp_path / "out.h5", layout, PROVENANCE).close()
    with open_store_file(part_path(tmp_path / "out.h5")) as store:
        assert store.config == json.loads(json.dumps(layout.config))
        assert store.fingerprint == layout.fingerprint
        assert (store.root, store.paths, store.complete) == ("/pictures", ["0.png"], False)
