"""The attempt log of a shard."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from fpnx.core.errors import FpnxError
from fpnx.distributed.attempts import Attempt, AttemptLog


def test_attempts_are_kept_until_the_work_ends(tmp_path: Path) -> None:
    shard = tmp_path / "out.shard-00000-of-00002.h5"
    log = AttemptLog(shard)
    assert log.attempts() == []
    log.begin("a")
    log.begin("a", search=True)
    log.begin("b")
    attempts = AttemptLog(shard).attempts()
    assert [(each.run, each.search) for each in attempts] == [("a", False), ("a", True), ("b", False)]
    assert {(each.host, each.process) for each in attempts} == {(socket.gethostname(), os.getpid())}
    assert [path.name for path in tmp_path.iterdir()] == ["out.shard-00000-of-00002.h5.attempts"]
    log.end()
    log.end()
    assert (AttemptLog(shard).attempts(), list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    "line",
    [b'{"run": "a", "ho', b"\0\0\0\0", b'["a"]', b'{"run": "a"}', b"{}", b"17", b'\xff\xfe"'],
    ids=["half", "zeros", "list", "lacking", "empty", "number", "not text"],
)
def test_an_incomplete_line_is_skipped(tmp_path: Path, line: bytes) -> None:
    log = AttemptLog(tmp_path / "s.h5")
    log.begin("a")
    with open(log.path, "ab") as file:
        file.write(line)
    log.begin("b")
    assert [each.run for each in log.attempts()] == ["a", "b"]


def test_a_line_is_synced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, synced, fsync = AttemptLog(tmp_path / "s.h5"), [], os.fsync

    def recording_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    log.begin("a")
    assert synced[0] == log.path.stat().st_size > 0
    assert len(synced) == 2, "the folder is synced, too"


def test_a_file_that_cannot_be_read_or_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FpnxError, match=r"cannot write .*s.h5.attempts: No such file"):
        AttemptLog(tmp_path / "nowhere" / "s.h5").begin("a")
    (tmp_path / "s.h5.attempts").mkdir()
    with pytest.raises(FpnxError, match=r"cannot read .*s.h5.attempts: Is a directory"):
        AttemptLog(tmp_path / "s.h5").attempts()


def test_an_attempt_is_one_json_line(tmp_path: Path) -> None:
    log = AttemptLog(tmp_path / "s.h5")
    log.begin("a")
    (line,) = log.path.read_text().split("\n\n")[0].strip().splitlines()
    assert Attempt(**json.loads(line)) == log.attempts()[0]
