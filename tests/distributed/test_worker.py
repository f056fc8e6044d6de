"""Workers without a backend: deaths, the search for culprits, and workers that were wrongly declared dead."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fpnx
from fpnx._version import __version__
from fpnx.core.files import lock
from fpnx.core.sharding import Shard, shard_path
from fpnx.distributed.attempts import AttemptLog
from fpnx.distributed.quarantine import Quarantine, find_culprits
from fpnx.distributed.worker import MAX_DEATHS, ShardJob, ShardReport, Worker
from fpnx.images.listing import find_images
from fpnx.images.manifest import manifest_lines
from fpnx.store.writer import Writer, part_path
from tests.helpers.files import ROOT, noise_image
from tests.helpers.poison import fragile_pythonpath, poison

OPTIONS = {"backbone": "mobilenet_v2", "weights": "random", "size": 64, "pool": "avg", "batch_size": 1, "cpus": 1}
SHARDS = 2


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        noise_image(i, (80, 64)).save(folder / f"{i}.jpg")
    return folder


@pytest.fixture
def job(tmp_path: Path, images: Path) -> ShardJob:
    return job_of(tmp_path, images)


def job_of(folder: Path, images: Path, run: str = "run", **options: Any) -> ShardJob:
    listing = find_images([images])
    records = [(source.name, source.bytes, source.mtime_ns) for source in listing.sources]
    (folder / "list.txt").write_bytes(b"".join(manifest_lines(listing.root, records, {})))
    return ShardJob(run, __version__, str(folder / "list.txt"), str(folder / "out.h5"), SHARDS, {**OPTIONS, **options})


def no_stop(shard: int, finished: int) -> bool:
    return False


def file_of(job: ShardJob, index: int) -> Path:
    return shard_path(Path(job.output), Shard(index, job.shards))


def append_foreign_attempt(log: AttemptLog, run: str, host: str = "another-host") -> None:
    """Add the line that a worker on another machine left when it died."""
    attempt = {"run": run, "host": host, "process": 1, "time": "2026-01-01T00:00:00+00:00", "search": False}
    with open(log.path, "a") as file:
        file.write(f"\n{json.dumps(attempt)}\n")


def test_shards_equal_a_run_in_one_process(tmp_path: Path, images: Path, job: ShardJob) -> None:
    calls: list[tuple[int, int]] = []

    def on_progress(shard: int, finished: int) -> bool:
        calls.append((shard, finished))
        return False

    worker = Worker(job, on_progress)
    reports = [worker(index) for index in range(SHARDS)]
    assert [(r.state, r.reason, r.computed, r.failed, list(r.culprits)) for r in reports] == [
        ("complete", "", 3, 0, [])
    ] * 2
    assert {(0, 3), (1, 3)} <= set(calls)
    fpnx.extract([images], tmp_path / "whole.h5", **OPTIONS)
    with fpnx.open(tmp_path / "whole.h5") as whole:
        for index in range(SHARDS):
            with fpnx.open(file_of(job, index)) as store:
                assert store.fingerprint == whole.fingerprint
                for item in store:
                    np.testing.assert_array_equal(item["P3"], whole[item.path]["P3"])
    left = {path.name for path in tmp_path.iterdir()} - {"images", "list.txt", "whole.h5"}
    assert left == {file_of(job, index).name for index in range(SHARDS)}
    again = worker(1)
    assert (again.state, again.computed) == ("complete", 0)


def test_a_worker_builds_its_model_once(job: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import fpnx.inference.engine_cache

    built, build = [], fpnx.inference.engine_cache.build_model
    monkeypatch.setattr(
        fpnx.inference.engine_cache, "build_model", lambda *request: built.append(request) or build(*request)
    )
    worker = Worker(job, no_stop)
    assert [worker(index).state for index in range(SHARDS)] == ["complete"] * 2
    assert len(built) == 1


def test_reports_are_plain_values(job: ShardJob) -> None:
    report = Worker(job, no_stop)(0)
    assert ShardReport(**json.loads(json.dumps(report.to_json()))) == dataclasses.replace(
        report, culprits=[], messages=list(report.messages)
    )
    assert ShardJob(**json.loads(json.dumps(dataclasses.asdict(job)))) == job


def test_errors_are_in_the_report(job: ShardJob) -> None:
    other = dataclasses.replace(job, version="0.0.1")
    report = Worker(other, no_stop)(0)
    assert (report.state, report.computed) == ("failed", 0)
    assert f"fpnx {__version__} is installed on" in report.reason
    assert not AttemptLog(file_of(job, 0)).attempts()
    report = Worker(dataclasses.replace(job, images="nowhere.txt"), no_stop)(0)
    assert (report.state, "nowhere.txt" in report.reason) == ("failed", True)


def test_a_bug_does_not_end_the_worker(job: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nought")

    with monkeypatch.context() as patch:
        patch.setattr("fpnx.distributed.worker.run_extraction", fail)
        worker = Worker(job, no_stop)
        report = worker(0)
    assert report.state == "failed"
    assert "internal error of fpnx, please report it: ZeroDivisionError: by nought (test_worker.py" in report.reason
    assert not AttemptLog(file_of(job, 0)).attempts()
    assert worker(0).state == "complete"


def test_a_stopped_worker_keeps_finished_images(tmp_path: Path, images: Path) -> None:
    job = job_of(tmp_path, images, commit_every=0)
    report = Worker(job, lambda shard, finished: True)(0)
    assert (report.state, file_of(job, 0).exists()) == ("interrupted", False)
    report = Worker(job, lambda shard, finished: finished == 3)(0)
    assert report.state == "interrupted"
    assert not AttemptLog(file_of(job, 0)).attempts()
    assert part_path(file_of(job, 0)).exists()
    assert Worker(job, no_stop)(0).state == "complete"


def test_deaths_of_other_runs_do_not_count(job: ShardJob) -> None:
    log = AttemptLog(file_of(job, 0))
    for _ in range(2 * MAX_DEATHS):
        log.begin("an earlier run")
    report = Worker(job, no_stop)(0)
    assert (report.state, list(report.messages)) == ("complete", [])
    assert not Quarantine(file_of(job, 0)).path.exists()


def test_a_shard_that_also_kills_its_searches_is_given_up(job: ShardJob) -> None:
    log = AttemptLog(file_of(job, 0))
    for attempt in range(2 * MAX_DEATHS):
        log.begin(job.run, search=attempt >= MAX_DEATHS)
    report = Worker(job, no_stop)(0)
    assert (report.state, report.computed) == ("quarantined", 0)
    assert "killed its worker 6 times, the last 3 while its images were tried one by one" in report.reason


@pytest.mark.parametrize("host", ["this", "another"])
def test_an_unfinished_file_of_another_host_is_started_over(tmp_path: Path, images: Path, host: str) -> None:
    job = job_of(tmp_path, images, commit_every=0)
    Worker(job, lambda shard, finished: finished >= 2)(0)
    file = file_of(job, 0)
    inode = part_path(file).stat().st_ino
    with open(part_path(file), "rb") as old:
        log = AttemptLog(file)
        if host == "this":
            log.begin("a run whose node was lost")
        else:
            append_foreign_attempt(log, "a run whose node was lost")
        report = Worker(job, no_stop)(0)
        assert report.state == "complete"
        assert (file.stat().st_ino == inode) == (host == "this")
        assert os.fstat(old.fileno()).st_ino == inode
    assert not log.path.exists()


def test_a_worker_whose_file_was_replaced_does_not_rename_the_new_file(tmp_path: Path, images: Path) -> None:
    output = tmp_path / "o.h5"
    options: dict[str, Any] = {**OPTIONS, "commit_every": 0}
    fpnx.extract([images], output, **options)
    os.rename(output, part_path(output))
    old = Writer(output)
    (tmp_path / "new").write_bytes(b"the new file of another run")
    os.replace(tmp_path / "new", part_path(output))
    with pytest.raises(fpnx.FpnxError, match="is another run's by now"):
        old.finish()
    old.close()
    assert part_path(output).read_bytes() == b"the new file of another run"
    assert not output.exists()


def test_a_worker_waits_for_the_lock_of_a_dying_worker(job: ShardJob) -> None:
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock(file_of(job, 0)):
            locked.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(30)
    calls: list[float] = []

    def on_progress(shard: int, finished: int) -> bool:
        calls.append(time.monotonic())
        if len(calls) == 2:  # the first call is at the start, the second while it waits
            release.set()
        return False

    assert Worker(job, on_progress)(0).state == "complete"
    holder.join()
    assert len(calls) > 2


SCRIPT = """
import json, sys
from fpnx.distributed.worker import ShardJob, Worker
job, index = ShardJob(**json.loads(sys.argv[1])), int(sys.argv[2])
print(json.dumps(Worker(job, lambda shard, finished: False)(index).to_json()))
"""


def in_process(job: ShardJob, index: int, pythonpath: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(job)), str(index)]
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, "native"], ids=str)
def test_an_image_that_kills_workers_is_the_only_failed_image(tmp_path: Path, images: Path, size: object) -> None:
    """With native sizes the image kills the worker while it reads headers, before there is a file."""
    poison(images / "4.jpg")
    pythonpath = fragile_pythonpath(tmp_path / "custom", ROOT)
    job = job_of(tmp_path, images, size=size)
    for death in range(MAX_DEATHS):
        assert in_process(job, 1, pythonpath).returncode == -signal.SIGABRT
        assert len(AttemptLog(file_of(job, 1)).attempts()) == death + 1
    done = in_process(job, 1, pythonpath)
    assert done.returncode == 0, done.stderr
    report = ShardReport(**json.loads(done.stdout))
    assert (report.state, report.failed, report.culprits) == ("complete", 1, ["4.jpg"])
    with fpnx.open(file_of(job, 1)) as store:
        assert store.failures() == [("4.jpg", "kills the process that computes it (SIGABRT)")]
        assert [item.path for item in store] == ["3.jpg", "5.jpg"]
        assert all(np.isfinite(item["P3"]).all() for item in store)
    assert not AttemptLog(file_of(job, 1)).path.exists()
    document = json.loads(Quarantine(file_of(job, 1)).path.read_text())
    assert (document["deaths"], [each["path"] for each in document["culprits"]]) == (MAX_DEATHS, ["4.jpg"])


@pytest.mark.slow
def test_two_culprits_are_found_and_no_other(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0.jpg", "5.jpg"):
        poison(images / name)
    (images / "2.jpg").write_bytes(b"not an image, which is a failure and no death")
    monkeypatch.setenv("PYTHONPATH", fragile_pythonpath(tmp_path / "custom", ROOT))
    listing, culprits = find_images([images]), dict[bytes, str]()
    find_culprits(listing.root, listing.sources, OPTIONS, culprits.__setitem__, lambda: None)
    assert culprits == dict.fromkeys((b"0.jpg", b"5.jpg"), "kills the process that computes it (SIGABRT)")


@pytest.mark.slow
def test_a_probe_process_ends_when_its_stdin_closes(tmp_path: Path, images: Path) -> None:
    image_list = job_of(tmp_path, images).images
    request = {"images": [f"@{image_list}"], "output": str(tmp_path / "t.h5"), "options": OPTIONS}
    child = subprocess.Popen(
        [sys.executable, "-m", "fpnx.distributed.quarantine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(request).encode() + b"\n")
    child.stdin.close()
    with child:
        assert child.wait(60) == 1
    assert not (tmp_path / "t.h5").exists()


def test_a_stopped_search_leaves_no_process(images: Path) -> None:
    listing = find_images([images])

    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    children: list[int] = []
    started: Callable[..., Any] = subprocess.Popen.__init__

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            started(self, *arguments, **options)
            children.append(self.pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Watched)
        with pytest.raises(StopError):
            find_culprits(listing.root, listing.sources, OPTIONS, lambda *_: None, stop)
    assert len(children) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def test_notes_on_images_are_in_the_report(tmp_path: Path, images: Path) -> None:
    Image.new("RGBA", (80, 64), (0, 0, 0, 99)).save(images / "9.png")
    reports = [Worker(job_of(tmp_path, images), no_stop)(index) for index in range(SHARDS)]
    assert [dict(report.image_notes) for report in reports] == [{}, {"transparency": 1}]
