"""Extraction on Ray: real clusters on this machine, with processes and nodes that are killed."""

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
from fpnx.distributed.attempts import Attempt, AttemptLog
from fpnx.distributed.shard_files import find_shard_files
from fpnx.store.reader import PENDING
from tests.helpers.cluster import ray_cluster
from tests.helpers.files import ROOT, noise_image
from tests.helpers.poison import fragile_pythonpath, poison
from tests.helpers.process import document

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not __import__("importlib.util").util.find_spec("ray"), reason="Ray is not installed"),
    pytest.mark.timeout(600),
]

COUNT = 480
OPTIONS = ["--backbone", "mobilenet_v2", "--weights", "random", "--size", "64", "--pool", "avg", "--batch-size", "1"]
OPTIONS += ["--commit-every", "0.2"]
BLOCK_FPNX = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "fpnx":
            raise ModuleNotFoundError("No module named 'fpnx'", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        noise_image(i, (80, 64)).save(folder / f"{i:03}.jpg")
    return folder


@pytest.fixture(scope="module")
def single_file(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in one file, made by one process."""
    output = tmp_path_factory.mktemp("single_file") / "single_file.h5"
    command = [sys.executable, "-m", "fpnx", "extract", str(images), "-o", str(output), *OPTIONS, "--json"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return output


def command(images: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fpnx", "extract", str(images), "-o", str(output), "--engine", "ray", *OPTIONS, *more]


def start(images: Path, output: Path, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(images, output, "--json", *more),
        env={**environment, "PYTHONPATH": os.pathsep.join([environment.get("PYTHONPATH", ""), str(ROOT)])},
        cwd=output.parent,  # not the repository: Ray puts the driver's folder on its workers' path
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, (out[-2000:], err[-4000:])
    return document(out)


def attempts(output: Path) -> list[Attempt]:
    return [each for path in output.parent.glob("*.attempts") for each in AttemptLog(Path(str(path)[:-9])).attempts()]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < deadline, "timeout"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return value


def in_progress(output: Path) -> bool:
    """Whether a shard is complete, and another one begun."""
    parts = list(output.parent.glob("*.part"))
    return len(list(output.parent.glob("*.shard-*.h5"))) >= 1 and bool(parts) and bool(attempts(output))


def assert_complete(output: Path, single_file: Path, failed: dict[str, str] | None = None) -> None:
    """Every image is in one shard, with the features of the single file."""
    paths = []
    with fpnx.open(single_file) as expected:
        for files in find_shard_files(output).values():
            assert [file.suffix for file in files] == [".h5"]
            with fpnx.open(files[0]) as store:
                assert not (store.status == PENDING).any()
                paths += store.paths
                for path, reason in store.failures():
                    assert (failed or {}).get(path) == reason
                for item in store:
                    for level in store.levels:
                        np.testing.assert_allclose(item[level], expected[item.path][level], rtol=0, atol=1e-5)
        assert sorted(paths) == sorted(expected.paths)
    assert not attempts(output)


def processes_with(mark: str) -> list[str]:
    """Command lines of processes whose environment contains `mark`."""
    commands = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark.encode() in (folder / "environ").read_bytes():
                commands.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return commands


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out.h5"
    for line in sorted(tmp_path.glob("*.log")):
        print(line.read_text()[-2000:])


def test_a_local_cluster(images: Path, single_file: Path, output: Path) -> None:
    """Without RAY_ADDRESS, Ray is started with a token of its own and without a dashboard, and ends with the run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mark = f"FPNX_TEST_MARK={output}"
    process = start(images, output, {**environment, "FPNX_TEST_MARK": str(output)}, "--actors", "2", "--shards", "8")
    wait_for(lambda: in_progress(output), process)
    running = processes_with(mark)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result = document(out)
    assert (result["done"], result["complete"], result["engine"]["actors"], result["engine"]["cpus"]) == (
        COUNT,
        True,
        2,
        1,
    )
    lines = [line for line in err.splitlines() if line]
    assert all("images" in line for line in lines), err
    assert any("of 8, actors 2" in line for line in lines), err
    assert_complete(output, single_file)
    assert any("raylet" in line for line in running)
    assert not any("dashboard.py" in line and "--disable-frontend" not in line for line in running), running
    deadline = time.monotonic() + 30
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_with(mark) == []


def test_killed_actors(images: Path, single_file: Path, output: Path) -> None:
    with ray_cluster(1, 1, folder=output.parent) as cluster:
        process = start(images, output, cluster.environment, "--shards", "16")
        wait_for(lambda: in_progress(output), process)
        for _ in range(2):
            attempt = wait_for(lambda: attempts(output), process)[0]
            os.kill(attempt.process, signal.SIGKILL)
            wait_for(lambda attempt=attempt: attempt not in attempts(output)[:1], process)
        result = result_of(process)
    assert (result["done"], result["failed"], result["complete"], result["engine"]["actors"]) == (COUNT, [], True, 2)
    assert_complete(output, single_file)


def test_a_lost_node(images: Path, single_file: Path, output: Path) -> None:
    with ray_cluster(1, 1, folder=output.parent) as cluster:
        process = start(images, output, cluster.environment, "--shards", "16")
        wait_for(lambda: in_progress(output) and len(attempts(output)) == 2, process)
        cluster.kill_node(1)
        result = result_of(process)
    assert (result["done"], result["failed"], result["complete"]) == (COUNT, [], True)
    assert_complete(output, single_file)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_driver_that_is_killed_or_interrupted(
    images: Path, single_file: Path, output: Path, signum: signal.Signals
) -> None:
    with ray_cluster(1, 1, folder=output.parent) as cluster:
        process = start(images, output, cluster.environment, "--shards", "16")
        wait_for(lambda: in_progress(output), process)
        process.send_signal(signum)
        out, err = process.communicate(timeout=120)
        assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), err
        if signum != signal.SIGKILL:
            assert "images are done and kept: the same command goes on" in document(out)["error"]
            assert not attempts(output), "all workers ended by themselves"
        result = result_of(start(images, output, cluster.environment))
    assert (result["done"], result["complete"], len(result["engine"]["shards"])) == (COUNT, True, 16)
    assert 0 < result["computed"] < COUNT
    assert_complete(output, single_file)


def test_an_image_that_kills_its_workers_is_found(
    images: Path, single_file: Path, output: Path, tmp_path: Path
) -> None:
    own_images = tmp_path / "images"
    own_images.mkdir()
    for path in images.iterdir():
        (own_images / path.name).write_bytes(path.read_bytes())
    poison(own_images / "237.jpg")
    with ray_cluster(1, 1, folder=output.parent, pythonpath=fragile_pythonpath(tmp_path / "custom", ROOT)) as cluster:
        result = result_of(start(own_images, output, cluster.environment, "--shards", "16"), code=1)
    reason = "kills the process that computes it (SIGABRT)"
    assert result["failed"] == [{"path": "237.jpg", "reason": reason}]
    assert (result["done"], result["complete"]) == (COUNT - 1, True)
    assert [each["culprits"] for each in result["engine"]["shards"] if each["culprits"]] == [["237.jpg"]]
    (quarantine,) = output.parent.glob("*.failed.json")
    assert [each["path"] for each in json.loads(quarantine.read_text())["culprits"]] == ["237.jpg"]
    assert_complete(output, single_file, {"237.jpg": reason})


def test_a_wrong_token(images: Path, output: Path) -> None:
    with ray_cluster(1, folder=output.parent) as cluster:
        environment = {**cluster.environment, "RAY_AUTH_TOKEN": "another" * 8}
        process = start(images, output, environment)
        out, err = process.communicate(timeout=120)
    result = document(out)
    assert (process.returncode, err) == (2, f"fpnx: {result['error']}\n")
    assert "it does not accept this token (RAY_AUTH_MODE is token here)" in result["error"]
    assert not list(output.parent.glob("out.*"))


def test_an_error_on_every_machine_is_reported_for_each_shard(images: Path, output: Path) -> None:
    """Ray is told of a GPU that does not exist: each shard fails with this reason, and the run goes through all."""
    with ray_cluster("2:1", folder=output.parent) as cluster:
        result = result_of(start(images, output, cluster.environment, "--shards", "2"), code=1)
    assert (result["device"], result["engine"]["actors"], result["engine"]["cpus"]) == ("cuda", 1, 2)
    assert result["stopped"].startswith("2 of 2 shards are not finished, such as shard 0 (device cuda: ")
    assert [each["state"] for each in result["engine"]["shards"]] == ["failed"] * 2
    assert not list(output.parent.glob("*.attempts"))


def test_a_machine_without_fpnx(images: Path, output: Path, tmp_path: Path) -> None:
    """The import is blocked on the cluster, since fpnx may be installed for the Python that runs the tests."""
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "sitecustomize.py").write_text(BLOCK_FPNX)
    with ray_cluster(1, pythonpath=str(tmp_path / "custom"), folder=output.parent) as cluster:
        result = result_of(start(images, output, {**cluster.environment, "PYTHONPATH": ""}), code=2)
    assert "No module named 'fpnx'" in result["error"]
    assert "fpnx[ray] is installed on every machine" in result["error"]


@pytest.mark.parametrize("before", ["", "import ray", "import ray; ray.init(num_cpus=2, log_to_driver=False)"])
def test_from_python(images: Path, output: Path, before: str) -> None:
    """An existing connection to Ray is used, and stays open."""
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
