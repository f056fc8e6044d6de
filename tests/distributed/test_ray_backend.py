"""Extraction by Ray: real clusters on this machine, and what happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fpnx
from fpnx.distributed.coordinator import shards_beside
from fpnx.distributed.quarantine import Attempt, AttemptLog
from fpnx.store.reader import PENDING
from tests.helpers.cluster import machines
from tests.helpers.files import ROOT, noise_image
from tests.helpers.poison import fragile_pythonpath, poisoned
from tests.helpers.process import document

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not __import__("importlib.util").util.find_spec("ray"), reason="Ray is not installed"),
    pytest.mark.timeout(600),
]

COUNT = 480
OPTIONS = ["--backbone", "mobilenet_v2", "--weights", "random", "--size", "64", "--pool", "avg", "--batch-size", "1"]
OPTIONS += ["--commit-every", "0.2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        noise_image(i, (80, 64)).save(folder / f"{i:03}.jpg")
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run makes of them."""
    output = tmp_path_factory.mktemp("whole") / "whole.h5"
    command = [sys.executable, "-m", "fpnx", "extract", str(images), "-o", str(output), *OPTIONS, "--json"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return output


def command(images: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fpnx", "extract", str(images), "-o", str(output), "--engine", "ray", *OPTIONS, *more]


def started(images: Path, output: Path, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(images, output, "--json", *more),
        env={**environment, "PYTHONPATH": os.pathsep.join([environment.get("PYTHONPATH", ""), str(ROOT)])},
        cwd=output.parent,  # Ray lets its workers import what lies there
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, (out[-2000:], err[-4000:])
    return document(out)


def attempts(output: Path) -> list[Attempt]:
    return [each for path in output.parent.glob("*.attempts") for each in AttemptLog(Path(str(path)[:-9])).attempts()]


def waited_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    until = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < until, "nothing happened"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found


def some_are_done(output: Path) -> bool:
    """Whether the first shard is whole, and another one begun."""
    parts = list(output.parent.glob("*.part"))
    return len(list(output.parent.glob("*.shard-*.h5"))) >= 1 and bool(parts) and bool(attempts(output))


def assert_whole(output: Path, whole: Path, failed: dict[str, str] | None = None) -> None:
    """Every image in one shard, with the numbers of a run on one machine."""
    seen = []
    with fpnx.open(whole) as wanted:
        for files in shards_beside(output).values():
            assert [file.suffix for file in files] == [".h5"]
            with fpnx.open(files[0]) as store:
                assert not (store.status == PENDING).any()
                seen += store.paths
                for path, reason in store.failures():
                    assert (failed or {}).get(path) == reason
                for item in store:
                    for level in store.levels:
                        np.testing.assert_allclose(item[level], wanted[item.path][level], rtol=0, atol=1e-5)
        assert sorted(seen) == sorted(wanted.paths)
    assert not attempts(output)


def processes_of(mark: str) -> list[str]:
    """Command lines of processes whose environment holds `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out.h5"
    for line in sorted(tmp_path.glob("*.log")):
        print(line.read_text()[-2000:])


def test_a_machine_alone(images: Path, whole: Path, output: Path) -> None:
    """Without RAY_ADDRESS: a cluster of this machine, which nobody else can use and which ends with the run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mark = f"FPNX_TEST_MARK={output}"
    process = started(images, output, {**environment, "FPNX_TEST_MARK": str(output)}, "--actors", "2", "--shards", "8")
    waited_for(lambda: some_are_done(output), process)
    running = processes_of(mark)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    told = document(out)
    assert (told["done"], told["complete"], told["engine"]["actors"], told["engine"]["cpus"]) == (COUNT, True, 2, 1)
    lines = [line for line in err.splitlines() if line]
    assert all("images" in line for line in lines), err
    assert any("of 8, actors 2" in line for line in lines), err
    assert_whole(output, whole)
    assert any("raylet" in line for line in running)
    assert not any("dashboard.py" in line and "--disable-frontend" not in line for line in running), running
    deadline = time.monotonic() + 30
    while processes_of(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(mark) == []


def test_an_actor_that_is_killed(images: Path, whole: Path, output: Path) -> None:
    with machines(1, 1, folder=output.parent) as cluster:
        process = started(images, output, cluster.environment, "--shards", "16")
        waited_for(lambda: some_are_done(output), process)
        for _ in range(2):
            victim = waited_for(lambda: attempts(output), process)[0]
            os.kill(victim.process, signal.SIGKILL)
            waited_for(lambda victim=victim: victim not in attempts(output)[:1], process)
        told = ended(process)
    assert (told["done"], told["failed"], told["complete"], told["engine"]["actors"]) == (COUNT, [], True, 2)
    assert_whole(output, whole)


def test_a_node_that_is_lost(images: Path, whole: Path, output: Path) -> None:
    with machines(1, 1, folder=output.parent) as cluster:
        process = started(images, output, cluster.environment, "--shards", "16")
        waited_for(lambda: some_are_done(output) and len(attempts(output)) == 2, process)
        cluster.lose(1)
        told = ended(process)
    assert (told["done"], told["failed"], told["complete"]) == (COUNT, [], True)
    assert_whole(output, whole)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_driver_that_ends_before_its_work(images: Path, whole: Path, output: Path, signum: signal.Signals) -> None:
    with machines(1, 1, folder=output.parent) as cluster:
        process = started(images, output, cluster.environment, "--shards", "16")
        waited_for(lambda: some_are_done(output), process)
        process.send_signal(signum)
        out, err = process.communicate(timeout=120)
        assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), err
        if signum != signal.SIGKILL:
            assert "images are done and kept: the same command goes on" in document(out)["error"]
            assert not attempts(output), "workers came back by themselves"
        told = ended(started(images, output, cluster.environment))
    assert (told["done"], told["complete"], len(told["engine"]["shards"])) == (COUNT, True, 16)
    assert 0 < told["computed"] < COUNT
    assert_whole(output, whole)


def test_an_image_that_kills_its_workers(images: Path, whole: Path, output: Path, tmp_path: Path) -> None:
    ours = tmp_path / "images"
    ours.mkdir()
    for path in images.iterdir():
        (ours / path.name).write_bytes(path.read_bytes())
    poisoned(ours / "237.jpg")
    with machines(1, 1, folder=output.parent, pythonpath=fragile_pythonpath(tmp_path / "custom", ROOT)) as cluster:
        told = ended(started(ours, output, cluster.environment, "--shards", "16"), code=1)
    reason = "kills the process that computes it (SIGABRT)"
    assert told["failed"] == [{"path": "237.jpg", "reason": reason}]
    assert (told["done"], told["complete"]) == (COUNT - 1, True)
    assert [each["culprits"] for each in told["engine"]["shards"] if each["culprits"]] == [["237.jpg"]]
    (held,) = output.parent.glob("*.failed.json")
    assert [each["path"] for each in json.loads(held.read_text())["culprits"]] == ["237.jpg"]
    assert_whole(output, whole, {"237.jpg": reason})


def test_a_token_that_is_not_theirs(images: Path, output: Path) -> None:
    with machines(1, folder=output.parent) as cluster:
        stranger = {**cluster.environment, "RAY_AUTH_TOKEN": "another" * 8}
        process = started(images, output, stranger)
        out, err = process.communicate(timeout=120)
    told = document(out)
    assert (process.returncode, err) == (2, f"fpnx: {told['error']}\n")
    assert "it does not take this token (RAY_AUTH_MODE is token here)" in told["error"]
    assert not list(output.parent.glob("out.*"))


def test_what_is_wrong_on_every_machine_is_told(images: Path, output: Path) -> None:
    """One that claims a GPU which it has not: its actor sees it, in every shard, and nothing is hidden or aborted."""
    with machines("2:1", folder=output.parent) as cluster:
        told = ended(started(images, output, cluster.environment, "--shards", "2"), code=1)
    assert (told["device"], told["engine"]["actors"], told["engine"]["cpus"]) == ("cuda", 1, 2)
    assert told["stopped"].startswith("2 of 2 shards are not finished, such as shard 0 (device cuda: ")
    assert [each["state"] for each in told["engine"]["shards"]] == ["failed"] * 2
    assert not list(output.parent.glob("*.attempts"))


def test_a_machine_without_fpnx(images: Path, output: Path) -> None:
    with machines(1, pythonpath="", folder=output.parent) as cluster:
        told = ended(started(images, output, cluster.environment), code=2)
    assert "No module named 'fpnx'" in told["error"]
    assert "fpnx[ray] is installed on every machine" in told["error"]


@pytest.mark.parametrize("before", ["", "import ray", "import ray; ray.init(num_cpus=2, log_to_driver=False)"])
def test_from_python(images: Path, output: Path, before: str) -> None:
    """A connection that is there is used, and stays."""
    code = f"""
import fpnx, os
{before}
result = fpnx.extract([{str(images)!r}], {str(output)!r}, engine="ray", actors=2, shards=2, limit=20, resume=True,
                      backbone="mobilenet_v2", weights="random", size=64, pool="avg")
assert (result.done, result.complete, result.exit_code) == (20, True, 0), result
print(result.output.name)
import ray
assert ray.is_initialized() == {"init" in before}
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (0, "out.shard-*-of-00002.h5\n"), done.stderr
    assert "init" in before or done.stderr == ""
