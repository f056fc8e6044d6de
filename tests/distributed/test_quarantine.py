"""What is written down beside a shard: attempts, and images to blame."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from fpnx.core.errors import FpnxError
from fpnx.distributed.quarantine import Attempt, AttemptLog, Quarantine


def test_attempts_are_kept_until_the_work_ends(tmp_path: Path) -> None:
    shard = tmp_path / "out.shard-00000-of-00002.h5"
    ledger = AttemptLog(shard)
    assert ledger.attempts() == []
    ledger.begin("a")
    ledger.begin("a", search=True)
    ledger.begin("b")
    told = AttemptLog(shard).attempts()
    assert [(each.run, each.search) for each in told] == [("a", False), ("a", True), ("b", False)]
    assert {(each.host, each.process) for each in told} == {(socket.gethostname(), os.getpid())}
    assert [path.name for path in tmp_path.iterdir()] == ["out.shard-00000-of-00002.h5.attempts"]
    ledger.end()
    ledger.end()
    assert (AttemptLog(shard).attempts(), list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    "torn",
    [b'{"run": "a", "ho', b"\0\0\0\0", b'["a"]', b'{"run": "a"}', b"{}", b"17", b'\xff\xfe"'],
    ids=["half", "zeros", "list", "lacking", "empty", "number", "not text"],
)
def test_a_torn_line_counts_for_nothing_and_harms_no_other(tmp_path: Path, torn: bytes) -> None:
    ledger = AttemptLog(tmp_path / "s.h5")
    ledger.begin("a")
    with open(ledger.path, "ab") as file:
        file.write(torn)
    ledger.begin("b")
    assert [each.run for each in ledger.attempts()] == ["a", "b"]


def test_a_line_is_on_the_disk_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, synced, fsync = AttemptLog(tmp_path / "s.h5"), [], os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    ledger.begin("a")
    assert synced[0] == ledger.path.stat().st_size > 0
    assert len(synced) == 2, "the folder, too, holds the new name"


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(FpnxError, match=r"cannot keep .*s.h5.attempts: No such file"):
        AttemptLog(tmp_path / "nowhere" / "s.h5").begin("a")
    with pytest.raises(FpnxError, match=r"cannot write .*s.h5.failed.json: No such file"):
        Quarantine(tmp_path / "nowhere" / "s.h5").write("a", 3, {})


def test_an_attempt_is_plain_values(tmp_path: Path) -> None:
    ledger = AttemptLog(tmp_path / "s.h5")
    ledger.begin("a")
    (line,) = ledger.path.read_text().split("\n\n")[0].strip().splitlines()
    assert Attempt(**json.loads(line)) == ledger.attempts()[0]


def test_culprits_are_those_of_this_run(tmp_path: Path) -> None:
    held = Quarantine(tmp_path / "s.h5")
    assert held.culprits("a") == {}
    blamed = {b"cats/01.jpg": "kills the process that computes it (SIGSEGV)", b"\xff\n.jpg": "so does this"}
    held.write("a", 3, blamed)
    assert Quarantine(tmp_path / "s.h5").culprits("a") == blamed
    assert held.culprits("b") == {}
    told = json.loads(held.path.read_text())
    assert (told["shard"], told["deaths"], told["culprits"][0]["path"]) == ("s.h5", 3, "cats/01.jpg")
    held.path.write_bytes(held.path.read_bytes()[:40])
    assert held.culprits("a") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5.failed.json"]
