"""Distributed runs with a backend whose only worker runs in the driver's process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fpnx
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.sharding import Shard, shard_path
from fpnx.distributed.attempts import AttemptLog
from fpnx.distributed.coordinator import extract_distributed
from fpnx.distributed.placement import Node, Placement, place_actors
from fpnx.distributed.shard_files import MAX_SHARD_IMAGES, choose_shard_count, find_shard_files, list_path
from fpnx.distributed.worker import ShardJob, ShardReport, Worker
from fpnx.extraction.run import Result
from tests.helpers.boxes import labelled_pictures
from tests.helpers.files import noise_image

SLOW = pytest.mark.slow
TINY: dict[str, Any] = {"backbone": "mobilenet_v2", "weights": "random", "size": 64, "pool": "avg", "batch_size": 1}


class LocalBackend:
    """A backend with one worker, which works inside `next_report`.

    Args:
        cpus: processors of its only machine.
        before: called with each shard before it is worked on.
    """

    def __init__(self, cpus: int = 2, before: Callable[[int], None] = lambda shard: None) -> None:
        self.cpus, self.before = cpus, before
        self.submitted: list[list[int]] = []
        self.placements: list[Placement] = []

    @contextmanager
    def connect(self) -> Iterator[LocalBackend]:
        yield self

    def nodes(self) -> list[Node]:
        return [Node(self.cpus)]

    def submit(self, job: ShardJob, shards: Sequence[int], placement: Placement) -> LocalWork:
        json.dumps(job.options)
        self.submitted.append(list(shards))
        self.placements.append(placement)
        return LocalWork(job, shards, self.before)


class LocalWork:
    def __init__(self, job: ShardJob, shards: Sequence[int], before: Callable[[int], None]) -> None:
        self._waiting, self._before = list(shards), before
        self._finished: dict[int, int] = {}
        self._stop = False
        self._worker = Worker(job, self._update)

    def _update(self, shard: int, finished: int) -> bool:
        self._finished[shard] = finished
        return self._stop

    @property
    def running(self) -> bool:
        return bool(self._waiting)

    def next_report(self, timeout: float) -> ShardReport | None:
        shard = self._waiting.pop(0)
        self._before(shard)
        return self._worker(shard)

    def images_finished(self) -> dict[int, int]:
        return self._finished

    def stop(self) -> None:
        self._stop = True


class Recorder(Listener):
    def __init__(self) -> None:
        self.progressed: list[tuple[str, int, int]] = []
        self.messages: list[str] = []
        self.standings: list[str] = []
        self.plans: list[Any] = []

    def planned(self, plan: Any) -> None:
        self.plans.append(plan)

    def progress(self, what: str, done: int, total: int) -> None:
        self.progressed.append((what, done, total))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def status(self, text: str) -> None:
        self.standings.append(text)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        noise_image(i, (80, 64 + 8 * (i % 2))).save(folder / f"{i}.jpg")
    return folder


def run(
    images: Path, output: Path, backend: LocalBackend | None = None, recorder: Listener | None = None, **options: Any
) -> Result:
    config = fpnx.ExtractConfig(engine="ray", **{**TINY, **options})
    return extract_distributed([images], output, config, recorder or Listener(), (backend or LocalBackend()).connect)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"images"}


@pytest.mark.parametrize(
    "sizing", [pytest.param({"size": 64}, id="fixed"), pytest.param({"size": "native"}, id="native", marks=SLOW)]
)
def test_the_shards_equal_a_run_in_one_process(tmp_path: Path, images: Path, sizing: dict[str, Any]) -> None:
    (images / "3.jpg").write_bytes(b"broken")
    recorder, backend = Recorder(), LocalBackend()
    result = run(images, tmp_path / "out.h5", backend, recorder, shards=3, max_failed=1, **sizing)
    assert (result.images, result.done, result.complete, result.exit_code) == (7, 6, True, 0)
    assert result.computed == (7 if "size" in sizing and sizing["size"] == 64 else 6)  # a broken header is no work
    assert [path for path, _ in result.failed] == ["3.jpg"]
    assert result.output == tmp_path / "out.shard-*-of-00003.h5"
    assert names(tmp_path) == {"out.list.txt", *(f"out.shard-0000{i}-of-00003.h5" for i in range(3))}
    assert backend.submitted == [[0, 1, 2]]
    assert recorder.progressed[-1] == ("images", 7, 7)
    assert recorder.standings[-1] == "shards 3 of 3, actors 1, failed 1"
    engine = result.to_json()["engine"]
    assert [(each["shard"], each["done"], each["failed"], each["state"]) for each in engine["shards"]] == [
        (0, 2, 0, "complete"), (1, 1, 1, "complete"), (2, 3, 0, "complete")
    ]  # fmt: skip
    fpnx.extract([images], tmp_path / "whole.h5", **{**TINY, **sizing})
    with fpnx.open(tmp_path / "whole.h5") as whole:
        for shard, (file,) in find_shard_files(tmp_path / "out.h5").items():
            with fpnx.open(file) as store:
                assert store.fingerprint == whole.fingerprint
                for item in store:
                    expected = whole[item.path]["P4"]
                    assert np.abs(item["P4"] - expected).max() <= 1e-5 * np.abs(expected).max(), (shard, item.path)


def test_options_of_pixels_and_notes_pass_through_the_workers(tmp_path: Path, images: Path) -> None:
    for number in (8, 9):
        picture = noise_image(number, (80, 64))
        picture.putalpha(99)
        picture.save(images / f"{number}.png")
    result = run(images, tmp_path / "out.h5", shards=3, bands="3,2,1", value_range=(0, 200))
    assert (result.done, result.image_notes) == (9, {}), "with bands, alpha is one of them"
    with fpnx.open(tmp_path / "out.shard-00002-of-00003.h5") as store:
        assert store.config["recipe"]["bands"] == [3, 2, 1]
        assert store.config["recipe"]["source_range"] == "0,200"
    result = run(images, tmp_path / "other.h5", shards=3)
    assert result.to_json()["image_notes"] == {"transparency": 2}


def test_boxes_pass_through_the_workers(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    labelled_pictures(pictures, (2, 1, 0, 3))
    options: dict[str, Any] = {"pool": "none", "boxes": pictures.with_suffix(".json"), "roi_size": "avg"}
    recorder = Recorder()
    result = run(pictures, tmp_path / "out.h5", recorder=recorder, shards=3, **options)
    assert (result.done, result.complete) == (4, True)
    assert recorder.messages.count(f"boxes {options['boxes']}: 1 image without boxes") == 1
    fpnx.extract(pictures, tmp_path / "whole.h5", **{**TINY, **options})
    pattern = str(tmp_path / "out.shard-*.h5")
    with fpnx.open(pattern) as store, fpnx.open(tmp_path / "whole.h5") as whole:
        assert store.fingerprint == whole.fingerprint
        assert store.regions.image.tolist() == [0, 0, 1, 3, 3, 3]
        np.testing.assert_allclose(store.regions.features[:], whole.regions.features[:], atol=1e-5)


def test_the_same_command_continues_a_run(tmp_path: Path, images: Path) -> None:
    class DiedError(Exception):
        pass

    def die(shard: int) -> None:
        if shard == 2:
            raise DiedError

    output = tmp_path / "out.h5"
    with pytest.raises(DiedError):
        run(images, output, LocalBackend(cpus=4, before=die), actors=4)
    smaller = LocalBackend(cpus=2)  # the cluster has another size now
    result = run(images, output, smaller)
    assert (smaller.submitted, result.done, result.computed, result.complete) == ([[2, 3]], 7, 4, True)
    assert smaller.placements == [Placement(1, 2, 0)]
    idle = LocalBackend()
    again = run(images, output, idle)
    assert (idle.submitted, again.done, again.computed, again.exit_code) == ([], 7, 0, 0)


def test_other_images_or_options_are_refused_before_any_work(tmp_path: Path, images: Path) -> None:
    output, backend = tmp_path / "out.h5", LocalBackend()
    run(images, output, shards=2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for options, why in [
        ({"seed": 1}, "made with another config .*seed"),
        ({"size": 96}, "made with another config"),
        ({"shards": 3}, "--shards 3: the existing files are from 2 shards"),
        ({"limit": 6}, "was cut from another list"),
        ({"levels": "P9"}, "P9"),
        ({"actors": 9}, "9 actors .* the cluster has room for 2"),
        ({"device": "cuda"}, "the cluster has no GPU"),
    ]:
        with pytest.raises(FpnxError, match=why):
            run(images, output, backend, **options)
    noise_image(9, (64, 64)).save(images / "9.jpg")
    with pytest.raises(FpnxError, match=r"was made from other images \(1 added, 0 removed"):
        run(images, output, backend)
    assert backend.submitted == []
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} | {"images": before["images"]}


def test_a_precision_that_no_worker_supports_is_refused_before_any_work(tmp_path: Path, images: Path) -> None:
    with pytest.raises(FpnxError, match="precision tf32 is of CUDA devices"):
        run(images, tmp_path / "out.h5", backend := LocalBackend(), precision="tf32")
    assert backend.submitted == []
    assert list(tmp_path.iterdir()) == [images]


def test_overwrite_starts_over_with_any_number_of_shards(tmp_path: Path, images: Path) -> None:
    output = tmp_path / "out.h5"
    run(images, output, shards=4)
    AttemptLog(shard_path(output, Shard(1, 4))).begin("an earlier run")
    with pytest.raises(FpnxError, match="the cluster has room for"):
        run(images, output, overwrite=True, shards=2, actors=9)
    assert len(find_shard_files(output)) == 4
    result = run(images, output, overwrite=True, shards=2, seed=3)
    assert (result.done, result.computed) == (7, 7)
    assert names(tmp_path) == {"out.list.txt", *(f"out.shard-0000{i}-of-00002.h5" for i in range(2))}


def test_shards_of_two_counts_are_refused(tmp_path: Path, images: Path) -> None:
    output = tmp_path / "out.h5"
    run(images, output, shards=2)
    shard_path(output, Shard(0, 5)).write_bytes(b"")
    with pytest.raises(FpnxError, match="shards of 2 and 5"):
        run(images, output)


def test_another_file_with_the_name_of_the_list_is_kept(tmp_path: Path, images: Path) -> None:
    list_path(tmp_path / "out.h5").write_text("my own notes")
    with pytest.raises(FpnxError, match=r"out\.list\.txt is in the way"):
        run(images, tmp_path / "out.h5")
    assert list_path(tmp_path / "out.h5").read_text() == "my own notes"


def test_a_dry_run_starts_nothing(tmp_path: Path, images: Path) -> None:
    backend, recorder = LocalBackend(), Recorder()
    result = run(images, tmp_path / "out.h5", backend, recorder, dry_run=True, shards=3)
    assert (result.dry_run, result.images, result.done, result.exit_code) == (True, 7, 0, 0)
    assert (names(tmp_path), backend.submitted, len(recorder.plans)) == (set(), [], 1)


def test_strict_stops_all_shards(tmp_path: Path, images: Path) -> None:
    (images / "1.jpg").write_bytes(b"broken")
    result = run(images, tmp_path / "out.h5", shards=7, strict=True)
    assert (result.exit_code, result.complete) == (1, False)
    assert result.stopped is not None
    assert "1.jpg failed" in result.stopped
    assert result.done == 1


@pytest.mark.parametrize(
    "signum", [pytest.param(signal.SIGINT, id="SIGINT"), pytest.param(signal.SIGTERM, id="SIGTERM", marks=SLOW)]
)
def test_a_signal_stops_a_run_and_the_same_command_continues_it(tmp_path: Path, images: Path, signum: int) -> None:
    def interrupt(shard: int) -> None:
        if shard == 1:
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=r"of 7 images are done and kept: the same command goes on") as caught:
        run(images, tmp_path / "out.h5", LocalBackend(before=interrupt), shards=4)
    assert caught.value.signum == signum
    assert not list(tmp_path.glob("*.attempts"))
    result = run(images, tmp_path / "out.h5")
    assert (result.done, result.complete) == (7, True)
    assert 0 < result.computed < 7


def test_a_shard_that_fails_is_reported_and_the_others_are_done(tmp_path: Path, images: Path) -> None:
    (tmp_path / "out.shard-00001-of-00003.h5.attempts").mkdir()
    recorder = Recorder()
    result = run(images, tmp_path / "out.h5", recorder=recorder, shards=3)
    assert (result.done, result.complete, result.exit_code) == (5, False, 1)
    assert result.stopped is not None
    assert result.stopped.startswith("1 of 3 shards are not finished, such as shard 1 (cannot read ")
    assert any(message.startswith("shard 1: cannot read ") for message in recorder.messages)


@pytest.mark.parametrize(
    ("images", "actors", "shards"),
    [
        (1, 1, 1), (1, 8, 1), (7, 8, 7), (480, 2, 2), (MAX_SHARD_IMAGES, 1, 1), (MAX_SHARD_IMAGES + 1, 1, 2),
        (2 * MAX_SHARD_IMAGES + 1, 2, 4), (10_000, 8, 16), (1_000_000, 8, 984),
    ],
    ids=str,
)  # fmt: skip
def test_shard_count(images: int, actors: int, shards: int) -> None:
    assert choose_shard_count(images, actors) == shards


@pytest.mark.parametrize(
    ("nodes", "options", "placement"),
    [
        ([Node(2)], {}, Placement(1, 2, 0)),
        ([Node(2)], {"actors": 2}, Placement(2, 1, 0)),
        ([Node(2), Node(2)], {}, Placement(2, 2, 0)),
        ([Node(0), Node(8), Node(4)], {}, Placement(3, 4, 0)),
        ([Node(64)], {}, Placement(4, 16, 0)),
        ([Node(8), Node(8)], {"actors": 3}, Placement(3, 4, 0)),
        ([Node(8), Node(8)], {"actors": 1}, Placement(1, 8, 0)),
        ([Node(8), Node(8)], {"cpus": 3}, Placement(4, 3, 0)),
        ([Node(8), Node(8)], {"cpus": 3, "actors": 2}, Placement(2, 3, 0)),
        ([Node(4), Node(32, 4)], {}, Placement(4, 8, 1)),
        ([Node(4), Node(32, 4), Node(6, 2)], {}, Placement(6, 3, 1)),
        ([Node(4), Node(32, 4)], {"device": "cpu"}, Placement(9, 4, 0)),
        ([Node(4), Node(32, 4)], {"device": "cuda", "actors": 2, "cpus": 2}, Placement(2, 2, 1)),
        ([Node(1, 2)], {}, Placement(1, 1, 1)),
    ],
    ids=str,
)
def test_placement(nodes: list[Node], options: dict[str, Any], placement: Placement) -> None:
    assert place_actors(nodes, fpnx.ExtractConfig(engine="ray", **options)) == placement


@pytest.mark.parametrize(
    ("nodes", "options", "why"),
    [
        ([Node(0)], {}, "no processor"),
        ([], {}, "no processor"),
        ([Node(2)], {"device": "cuda"}, "no GPU"),
        (
            [Node(2), Node(2)],
            {"actors": 5},
            r"5 actors of 1 processors: the cluster has room for 4 \(4 processors on 2",
        ),
        ([Node(2), Node(2)], {"cpus": 3}, "one actors of 3 processors: the cluster has room for 0"),
        ([Node(8, 2)], {"actors": 3}, r"room for 2 \(2 GPUs on 1"),
    ],
    ids=["nothing", "no nodes", "no GPU", "too many", "too large", "too few GPUs"],
)
def test_placement_that_does_not_fit_is_refused(nodes: list[Node], options: dict[str, Any], why: str) -> None:
    with pytest.raises(FpnxError, match=why):
        place_actors(nodes, fpnx.ExtractConfig(engine="ray", **options))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"engine": "dask"}, "engine 'dask': take one of local, ray"),
        ({"shards": 4}, "shards 4 are for an engine: give --engine ray"),
        ({"actors": 4}, "actors 4 are for an engine"),
        ({"engine": "ray", "shards": 0}, "shards 0: take auto or a whole number"),
        ({"engine": "ray", "actors": "two"}, "actors 'two': take auto or"),
        ({"engine": "ray", "format": "png"}, "makes files of features"),
        ({"engine": "ray", "device": "cuda:1"}, "hands out devices"),
        ({"engine": "ray", "shard": "0/2"}, "shard 0/2 .* one of them"),
        ({"cpus": 0}, "cpus 0: take auto or"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradicting_options_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(FpnxError, match=why):
        fpnx.ExtractConfig(**options)


def test_a_run_uses_the_number_of_cpus_asked_for(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fpnx.extraction.pipeline

    used, compute_threads = [], fpnx.extraction.pipeline.compute_threads

    def recorded(plan: Any, images: int) -> int:
        used.append((plan.cpus, plan.workers))
        return compute_threads(plan, images)

    monkeypatch.setattr("fpnx.extraction.plan.usable_cpus", lambda: 8)
    monkeypatch.setattr("fpnx.extraction.pipeline.compute_threads", recorded)
    fpnx.extract([images], tmp_path / "o.h5", **TINY, cpus=3)
    assert used == [(3, 3)]


def test_without_ray_the_error_says_what_to_install(fpnx: Any, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    hide_ray = lambda name, *rest: None if name == "ray" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide_ray)
    code, out, err = fpnx("extract", images, "--engine", "ray")
    assert (code, out) == (2, "")
    assert err == 'fpnx: engine ray: Ray is not installed: pip install "fpnx[ray]"\n'
