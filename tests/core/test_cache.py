"""The on-disk cache: its folder, atomic writes, and damaged entries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fpnx.core.cache import cache_folder, load_entry, save_entry
from tests.helpers.files import ROOT


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms have other folders")
def test_cache_folder_on_linux(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == home / "fpnx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / ".cache" / "fpnx"


def test_entries_are_kept_by_key(home: Path) -> None:
    assert load_entry("a") is None
    save_entry("a", {"number": 1})
    save_entry("b", {"number": 2})
    save_entry("a", {"number": 3})
    assert (load_entry("a"), load_entry("b"), load_entry("c")) == ({"number": 3}, {"number": 2}, None)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"key": ', b"[1, 2]", b'{"key": "b", "value": {}}', b'{"key": "a"}', b"\xff\xfe"],
    ids=["empty", "truncated", "no object", "other key", "no value", "not text"],
)
def test_damaged_entries_are_ignored(home: Path, content: bytes) -> None:
    save_entry("a", {"number": 1})
    (file,) = (cache_folder() / "stages").iterdir()
    file.write_bytes(content)
    assert load_entry("a") is None
    save_entry("a", {"number": 2})
    assert load_entry("a") == {"number": 2}


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    save_entry("a", {"number": 1})
    assert load_entry("a") is None


def test_concurrent_writers_leave_complete_entries(home: Path) -> None:
    code = "from fpnx.core.cache import save_entry\nfor i in range(200): save_entry('k', {'all': [i] * 2000})"
    writers = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}) for _ in range(3)]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        value = load_entry("k")
        if value is not None:
            seen += 1
            assert len(value["all"]) == 2000
            assert len(set(value["all"])) == 1
    assert seen > 0
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert [path.suffix for path in (cache_folder() / "stages").iterdir()] == [".json"]
