"""The file that names the images that killed their process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fpnx.core.errors import FpnxError
from fpnx.distributed.quarantine import Quarantine


def test_culprits_are_kept_per_run(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "s.h5")
    assert quarantine.culprits("a") == {}
    culprits = {b"cats/01.jpg": "kills the process that computes it (SIGSEGV)", b"\xff\n.jpg": "so does this"}
    quarantine.write("a", 3, culprits)
    assert Quarantine(tmp_path / "s.h5").culprits("a") == culprits
    assert quarantine.culprits("b") == {}
    document = json.loads(quarantine.path.read_text())
    assert (document["shard"], document["deaths"], document["culprits"][0]["path"]) == ("s.h5", 3, "cats/01.jpg")
    quarantine.path.write_bytes(quarantine.path.read_bytes()[:40])
    assert quarantine.culprits("a") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5.failed.json"]


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FpnxError, match=r"cannot write .*s.h5.failed.json: No such file"):
        Quarantine(tmp_path / "nowhere" / "s.h5").write("a", 3, {})
