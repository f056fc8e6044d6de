"""Runs that are killed, interrupted, started twice, or out of disk space or memory, and resuming them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

import fpnx
from fpnx.commands.verify import verify
from fpnx.core.errors import FpnxError, Interrupted, StoreError
from fpnx.core.events import Listener
from fpnx.core.files import lock
from fpnx.inference.engine import Features, SplittingEngine
from fpnx.store.reader import DONE, FAILED
from tests.helpers.files import noise_image
from tests.helpers.process import COMMAND_LINE, SMALL, Forked, forked

QUICK: dict[str, Any] = {**SMALL, "workers": 2, "batch_size": 2, "commit_every": 0.0}
LINE = [word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", str(value))]

# The command line with files limited to LIMIT bytes once a number of images is done, or from the start.
LIMITED = f"""
import resource, sys
import fpnx.cli.console
limit, limit_at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
original = fpnx.cli.console.Terminal.progress
def progress(self, what, done, total):
    if what == "images" and done >= limit_at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    original(self, what, done, total)
fpnx.cli.console.Terminal.progress = progress
if limit_at < 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
{COMMAND_LINE}"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


def finished(running: Forked) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = running.communicate()
    assert running.returncode is not None
    return running.returncode, out, err


class Runs:
    """Runs command lines as real processes, in a folder."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def start(self, *line: object) -> Forked:
        return forked(*line, cwd=self.cwd, COLUMNS="200")

    def __call__(
        self, *line: object, once_there: Path | None = None, signals: Sequence[tuple[float, int]] = ()
    ) -> tuple[int, str, str]:
        """Exit code, stdout, stderr. Signals are sent one after the other, each after a time, once a file exists."""
        running = self.start(*line)
        while once_there and not once_there.exists() and running.poll() is None:
            time.sleep(0.0005)
        for after, signum in signals:
            time.sleep(after)
            running.send_signal(signum)
        return finished(running)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(24):
        noise_image(i, (40 + 8 * (i % 3), 48)).save(folder / f"{i:02}.png")
    (folder / "07.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def reference(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an uninterrupted run over `many`."""
    output = tmp_path_factory.mktemp("reference") / "out.h5"
    fpnx.extract(many, output, **QUICK)
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def check_same(output: Path, reference: Path) -> None:
    """Check that two finished files have equal tables, and features equal to 1e-5."""
    with h5py.File(output) as ours, h5py.File(reference) as theirs:
        names: list[str] = []
        theirs.visititems(lambda name, held: names.append(name) if isinstance(held, h5py.Dataset) else None)
        assert len(names) > 10
        for name in names:
            mine, other = ours[name][:], theirs[name][:]
            if name.startswith("pyramids"):
                np.testing.assert_allclose(mine, other, atol=1e-5)
            else:
                np.testing.assert_array_equal(mine, other)
        assert ours.attrs["fingerprint"] == theirs.attrs["fingerprint"]


def check_part(part: Path, reference: Path) -> int:
    """Check that an unfinished file opens and its done images are correct; returns their number."""
    with fpnx.open(part) as store, fpnx.open(reference) as whole:
        for item in store:
            for level in store.levels:
                np.testing.assert_allclose(item[level], whole[item.path][level], atol=1e-5)
            assert item.source_size == whole[item.path].source_size
        return int((store.status == DONE).sum())


def part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def killed_at_random(runs: Runs, many: Path, reference: Path, count: int, seed: int) -> list[int]:
    """Kill `count` runs and check the `.part` after each; let some resumed runs finish. Returns the numbers of done
    images."""
    chance, output, seen = random.Random(seed), runs.cwd / "killed.h5", []
    line = ("extract", many, "-o", output, "--resume", "--max-failed", "1", *LINE)
    for i in range(count):
        there = part_of(output) if chance.random() < 0.7 else None
        code, _, stderr = runs(*line, once_there=there, signals=[(chance.random() * 1.0, signal.SIGKILL)])
        assert code in (0, -signal.SIGKILL), stderr
        if part_of(output).exists():
            assert not output.exists()
            seen.append(check_part(part_of(output), reference))
        if code == 0 or i % 5 == 4 or i == count - 1:
            code, _, stderr = runs(*line)
            assert code == 0, stderr
            check_same(output, reference)
            output.unlink()
    assert not list(runs.cwd.iterdir())
    return seen


def test_killed_runs_are_resumed_to_the_same_file(runs: Runs, many: Path, reference: Path) -> None:
    killed_at_random(runs, many, reference, 10, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_killed_runs_are_resumed_to_the_same_file(runs: Runs, many: Path, reference: Path) -> None:
    seen = killed_at_random(runs, many, reference, 200, seed=1)
    assert len(set(seen)) > 5, "the kills struck at many moments"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"])
def test_an_interrupt_keeps_what_was_done(
    runs: Runs, many: Path, reference: Path, signum: signal.Signals, code: int
) -> None:
    output = runs.cwd / "stopped.h5"
    line = ("extract", many, "-o", output, "--resume", "--max-failed", "1", *LINE, "--batch-size", 1)
    ended, _, stderr = runs(*line, "--commit-every", 1000, once_there=part_of(output), signals=[(0.1, signum)])
    assert ended == code
    assert "stopping after this batch (again to stop at once)" in stderr
    kept = check_part(part_of(output), reference)
    assert f"{kept} of 24 images are done and kept: continue with --resume" in stderr
    assert kept < 23
    assert runs(*line)[0] == 0
    check_same(output, reference)
    output.unlink()


def test_a_second_interrupt_stops_at_once(runs: Runs, many: Path) -> None:
    output = runs.cwd / "at_once.h5"
    line = ("extract", many, "-o", output, "--json", *LINE, "--size", 800, "--batch-size", 24)
    there = part_of(output)
    code, out, stderr = runs(*line, once_there=there, signals=[(0.5, signal.SIGINT), (0.6, signal.SIGINT)])
    assert code == 130
    assert json.loads(out) == {"error": "interrupted at once: what was committed is kept: continue with --resume"}
    assert "again to stop at once" in stderr
    with fpnx.open(there) as store:
        assert DONE not in store.status
    part_of(output).unlink()


class Interrupts(Listener):
    """Sends a signal to this process once `done` of `what` have passed."""

    def __init__(self, what: str, done: int, signum: int = signal.SIGINT) -> None:
        self.what, self.done, self.signum = what, done, signum

    def progress(self, what: str, done: int, total: int) -> None:
        if (what, done) == (self.what, self.done):
            os.kill(os.getpid(), self.signum)


def test_an_interrupt_before_the_first_image_leaves_nothing(many: Path, tmp_path: Path) -> None:
    options = {**QUICK, "size": "native", "channels": 9}
    with pytest.raises(Interrupted, match="before the first image: nothing was computed") as caught:
        fpnx.extract(many, tmp_path / "out.h5", listener=Interrupts("headers", 3, signal.SIGTERM), **options)
    assert caught.value.signum == signal.SIGTERM
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ignored_signals_stay_ignored(many: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = fpnx.extract(many, tmp_path / "out.h5", listener=Interrupts("images", 4), **QUICK)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.complete


def test_ragged_runs_with_broken_headers_resume(many: Path, tmp_path: Path) -> None:
    options = {**QUICK, "size": "native", "batch_size": 1}
    whole = fpnx.extract(many, tmp_path / "whole.h5", **options)
    with pytest.raises(Interrupted, match="images are done and kept"):
        fpnx.extract(many, tmp_path / "out.h5", listener=Interrupts("images", 9), **options)
    with fpnx.open(tmp_path / "out.h5.part") as store:
        assert store.status[7] == FAILED
    result = fpnx.extract(many, tmp_path / "out.h5", resume=True, **options)
    assert result.failed == whole.failed == (("07.png", result.failed[0][1]),)
    assert result.computed < 20
    check_same(tmp_path / "out.h5", tmp_path / "whole.h5")
    assert verify(tmp_path / "out.h5").exit_code == 0


@pytest.mark.slow
def test_two_runs_started_together_ten_times(runs: Runs, many: Path, reference: Path) -> None:
    output = runs.cwd / "both.h5"
    line = ("extract", many, "-o", output, "--max-failed", "1", *LINE)
    for _ in range(10):
        running = [runs.start(*line) for _ in range(2)]
        ended = [finished(each) for each in running]
        codes = [code for code, _, _ in ended]
        assert sorted(codes) == [0, 2]
        stderr = ended[codes.index(2)][2]
        by = re.search(r"being written by another run \(process (\d+) on (.+?)\): wait for it", stderr)
        assert by, stderr
        assert by[2] == socket.gethostname()
        assert int(by[1]) == running[codes.index(0)].pid
        check_same(output, reference)
        output.unlink()
    assert not output.with_name("both.h5.lock").exists()


def test_an_output_that_appears_before_the_lock_is_not_overwritten(many: Path, tmp_path: Path) -> None:
    """The output is checked again once the lock is held."""
    output = tmp_path / "out.h5"

    class Other(Listener):
        def __fspath__(self) -> str:  # named as the images: the listing comes between the first look and the lock
            output.write_bytes(b"of another run")
            return str(many)

    with pytest.raises(FpnxError, match="exists: continue it with --resume") as caught:
        fpnx.extract([Other()], output, **QUICK)
    assert "exists" in str(caught.value)
    assert output.read_bytes() == b"of another run"


def test_locks(tmp_path: Path, many: Path) -> None:
    output = tmp_path / "out.h5"
    stale = tmp_path / "out.h5.lock"
    stale.write_text("process 1 on gone\n")  # of a process that died: nobody holds it
    with lock(output) as held:
        assert held
        assert stale.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(StoreError, match=f"another run .process {os.getpid()} on {socket.gethostname()}."):
            fpnx.extract(many, output, **QUICK)
    assert not stale.exists()
    (tmp_path / "precious").write_text("mine")
    stale.symlink_to(tmp_path / "precious")
    with pytest.raises(FpnxError, match="cannot write in"), lock(output):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_readers_see_complete_images_during_a_run(runs: Runs, many: Path, reference: Path) -> None:
    output = runs.cwd / "read.h5"
    running = runs.start("extract", many, "-o", output, "--max-failed", "1", *LINE, "--batch-size", 1)
    seen: set[int] = set()
    look = runs.cwd / "look.h5.part"
    while not output.exists() and running.poll() is None:
        if part_of(output).exists():
            with contextlib.suppress(FileNotFoundError):  # renamed between the two looks
                os.link(part_of(output), look)
                seen.add(check_part(look, reference))
                look.unlink()
    assert finished(running)[0] == 0
    assert len(seen) > 1
    check_same(output, reference)
    output.unlink()


@pytest.mark.parametrize(
    ("limit_at", "message"),
    [(-1, "may not become"), (0, "what was committed is kept"), (12, "what was committed is kept"), (24, "kept")],
    ids=["start", "first", "middle", "finish"],
)
def test_a_disk_that_cannot_be_written(runs: Runs, many: Path, reference: Path, limit_at: int, message: str) -> None:
    output = runs.cwd / "full.h5"
    line = ("extract", many, "-o", output, "--resume", "--max-failed", "1", *LINE, "--commit-every", "1000")
    code, _, stderr = finished(Forked(LIMITED, 4096, limit_at, *line, cwd=runs.cwd))
    assert code == 2, stderr
    assert message in stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    if limit_at < 0:
        assert not part_of(output).exists()
    else:
        check_part(part_of(output), reference)
    assert runs(*line)[0] == 0
    check_same(output, reference)
    output.unlink()


def test_a_full_file_system(tmp_path: Path, many: Path, runs: Runs) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        line = ("extract", many, "-o", small / "out.h5", "--max-failed", "1", *LINE, "--size", "320", "--resume")
        code, _, stderr = runs(*line)
        assert code == 2
        assert "too little disk space" in stderr
        assert os.listdir(small) == []
        line = ("extract", many, "-o", small / "out.h5", "--max-failed", "1", *LINE, "--resume")
        (small / "filler").write_bytes(bytes(256 * 1024 - 40 * 1024))
        code, _, stderr = runs(*line)  # the lock takes a page of what is left
        assert code in (0, 2), stderr
        (small / "filler").unlink()
        assert runs(*line)[0] == 0
        assert verify(small / "out.h5").exit_code == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def change_nothing(_: Path) -> None:
    """No change."""


def replace(folder: Path) -> None:
    noise_image(8, (50, 50)).save(folder / "1.png")


def add(folder: Path) -> None:
    noise_image(9, (50, 50)).save(folder / "9.png")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and the `.part` of an interrupted run over them."""
    folder = tmp_path_factory.mktemp("unfinished")
    (folder / "pictures").mkdir()
    for i in range(4):
        noise_image(i, (50, 50)).save(folder / "pictures" / f"{i}.png")
    options = {**QUICK, "batch_size": 1, "device": "cpu"}  # a GPU is done before it is stopped
    with pytest.raises(Interrupted):
        fpnx.extract(folder / "pictures", folder / "out.h5", listener=Interrupts("images", 2), **options)
    return folder


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (change_nothing, {"seed": 1}, "made with another config (seed 0 → 1)"),
        (change_nothing, {"size": 96}, "(recipe.height 64 → 96; recipe.width 64 → 96)"),
        (change_nothing, {"dtype": "float16"}, "(dtype float32 → float16)"),
        (change_nothing, {"backbone": "vgg16", "channels": 8}, "backbone mobilenet_v2 → vgg16"),
        (replace, {}, "made from other images (0 added, 0 removed, 1 changed)"),
        (add, {}, "(1 added, 0 removed, 0 changed)"),
        (lambda folder: (folder / "2.png").unlink(), {}, "(0 added, 1 removed, 0 changed)"),
    ],
    ids=["seed", "size", "dtype", "backbone", "replaced", "added", "removed"],
)
def test_a_resume_refuses_what_changed(
    unfinished: Path, tmp_path: Path, change: Callable[[Path], object], options: dict[str, Any], message: str
) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "out.h5"
    subprocess.run(["cp", "-a", f"{unfinished}/.", str(tmp_path)], check=True)
    before = part_of(output).read_bytes()
    change(pictures)
    with pytest.raises(FpnxError) as caught:
        fpnx.extract(pictures, output, resume=True, **{**QUICK, **options})
    assert message in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert part_of(output).read_bytes() == before


def test_a_resume_refuses_weights_that_were_edited_in_place(unfinished: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P4-P5", channels=8)
    fpnx.save_weights(model, own)
    options = {name: value for name, value in QUICK.items() if name not in ("backbone", "levels", "channels")}
    options |= {"weights": str(own), "resume": True}
    fpnx.extract(unfinished / "pictures", tmp_path / "out.h5", **options)
    next(iter(model.parameters())).data.add_(1)
    fpnx.save_weights(model, own)
    with pytest.raises(FpnxError, match=r"another config .weights [0-9a-f]{12}… → [0-9a-f]{12}…"):
        fpnx.extract(unfinished / "pictures", tmp_path / "out.h5", **options)


def test_a_resume_of_nothing_starts_and_of_a_finished_file_ends_at_once(many: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    first = fpnx.extract(many, output, resume=True, **QUICK)
    before = output.read_bytes()
    again = fpnx.extract(many, output, resume=True, **QUICK)
    assert (first.computed, again.computed) == (24, 0)
    assert (first.exit_code, again.exit_code) == (1, 1)
    assert first.failed == again.failed
    assert output.read_bytes() == before
    assert fpnx.extract(many, output, resume=True, max_failed=1, **QUICK).exit_code == 0
    assert fpnx.extract(many, output, resume=True, max_failed=1, strict=True, **QUICK).exit_code == 1


def test_an_unfinished_file_under_a_finished_name_is_not_called_done(unfinished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    output.write_bytes((unfinished / "out.h5.part").read_bytes())
    with pytest.raises(FpnxError, match=r"not finished .* rename it to out.h5.part"):
        fpnx.extract(unfinished / "pictures", output, resume=True, **QUICK)


def test_a_part_is_kept_without_resume_or_overwrite(unfinished: Path) -> None:
    before = (unfinished / "out.h5.part").read_bytes()
    with pytest.raises(FpnxError, match="unfinished run: continue it with --resume, replace it with --overwrite"):
        fpnx.extract(unfinished / "pictures", unfinished / "out.h5", **QUICK)
    assert (unfinished / "out.h5.part").read_bytes() == before


@pytest.mark.parametrize("kind", ["garbage", "empty", "truncated", "future"])
def test_a_damaged_part_is_refused_and_can_be_overwritten(unfinished: Path, tmp_path: Path, kind: str) -> None:
    part = tmp_path / "out.h5.part"
    content = (unfinished / "out.h5.part").read_bytes()
    part.write_bytes({"garbage": b"x" * 5000, "empty": b"", "truncated": content[:-100]}.get(kind, content))
    if kind == "future":
        with h5py.File(part, "r+") as file:
            file.attrs["format_version"] = 2
    with pytest.raises(StoreError, match=r"not an HDF5 file|truncated|format version 2"):
        fpnx.extract(unfinished / "pictures", tmp_path / "out.h5", resume=True, **QUICK)
    result = fpnx.extract(unfinished / "pictures", tmp_path / "out.h5", overwrite=True, **QUICK)
    assert result.complete
    assert os.listdir(tmp_path) == ["out.h5"]


def test_an_output_that_is_a_symbolic_link_stays_one(unfinished: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out.h5"
    link.symlink_to("disk/real.h5")
    result = fpnx.extract(unfinished / "pictures", link, **QUICK)
    assert link.is_symlink()
    assert result.output == tmp_path / "disk" / "real.h5"
    assert fpnx.open(link).complete
    link.unlink()
    link.symlink_to("out.h5")
    with pytest.raises(FpnxError, match="leads nowhere"):
        fpnx.extract(unfinished / "pictures", link, overwrite=True, **QUICK)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/dev/null", "not a regular file"),
        (".", "is a folder"),
        ("missing/out.h5", "does not exist: make it"),
        ("out.h5.part", "keeps such names for itself: name the output"),
        ("x" * 300, "too long"),
        ("nul\0byte", "null"),
    ],
)
def test_invalid_outputs_are_refused(unfinished: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        fpnx.extract(unfinished / "pictures", tmp_path / name, overwrite=True, **QUICK)
    assert Path("/dev/null").is_char_device()


class LimitedEngine:
    """An engine that runs out of memory with more than `most` images, or with images of `never` rows."""

    device = SimpleNamespace(type="cpu")

    def __init__(self, most: int, never: int, error: Exception) -> None:
        self.most, self.never, self.error, self.tried = most, never, error, list[int]()

    def __call__(self, pixels: Sequence[np.ndarray], boxes: None = None) -> Features:
        self.tried.append(len(pixels))
        if len(pixels) > self.most or any(len(image) == self.never for image in pixels):
            raise self.error
        return Features({"P2": np.stack([image.sum() for image in pixels])}, {})

    def release(self) -> None:
        """Does nothing: no memory is kept."""


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")],
    ids=["MemoryError", "RuntimeError"],
)
def test_batches_that_do_not_fit_are_halved_with_one_message(error: Exception) -> None:
    engine, messages = LimitedEngine(3, 5, error), list[str]()
    fitting = SplittingEngine(engine, messages.append)  # type: ignore[arg-type]
    images = [np.full((2, 2), i) for i in range(8)]
    pieces = [(piece.start, piece.stop) for piece, features in fitting(images) if features]
    assert pieces == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert engine.tried == [8, 4, 2, 2, 2, 2]
    images[1] = np.zeros((5, 2))
    results = [(piece.start, piece.stop, features is None) for piece, features in fitting(images[:3])]
    assert results == [(0, 1, False), (1, 2, True), (2, 3, False)]
    assert messages == ["out of memory with 8 images at once: going on with fewer"]
    with pytest.raises(RuntimeError, match="broken"):
        list(SplittingEngine(LimitedEngine(0, 0, RuntimeError("broken")), messages.append)(images))  # type: ignore[arg-type]


def broken_weights(path: Path, scale: float) -> Path:
    """Weights whose P5 is `scale` times too large: inf in float16, or NaN."""
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P4-P5", channels=8)
    model.fpn.layer_blocks[-1][0].weight.data.mul_(scale)
    fpnx.save_weights(model, path)
    return path


@pytest.mark.parametrize(("scale", "dtype"), [(1e18, "float16"), (float("nan"), "float32")], ids=["overflow", "nan"])
def test_numbers_that_are_not_finite_are_counted_or_strictly_an_error(
    unfinished: Path, tmp_path: Path, scale: float, dtype: str
) -> None:
    own = broken_weights(tmp_path / "own.safetensors", scale)
    options = {"weights": str(own), "size": 64, "dtype": dtype, "device": "cpu", "batch_size": 2}
    result = fpnx.extract(unfinished / "pictures", tmp_path / "out.h5", **options)
    assert result.exit_code == 0
    assert result.nonfinite["P4"] == 0
    overflow = dtype == "float16"
    assert result.too_large == (("P5",) if overflow else ())
    with h5py.File(tmp_path / "out.h5") as file:
        assert result.nonfinite["P5"] == np.sum(~np.isfinite(file["P5"][:])) > 0
    assert verify(tmp_path / "out.h5").problems == ()
    assert (
        fpnx.extract(unfinished / "pictures", tmp_path / "out.h5", resume=True, strict=True, **options).exit_code == 1
    )

    strict = fpnx.extract(unfinished / "pictures", tmp_path / "strict.h5", strict=True, **options)
    assert strict.stopped is not None
    assert ("beyond ±65504 do not fit into float16: take --dtype float32" in strict.stopped) == overflow
    assert strict.exit_code == 1
    assert not strict.complete
    assert strict.stopped
    assert "NaN or infinite values" in strict.stopped
    assert "in P5" in strict.stopped
    with fpnx.open(tmp_path / "strict.h5.part") as store:
        assert store.status[0] == FAILED
        assert "NaN or infinite values" in store.error(0)
    resumed = fpnx.extract(unfinished / "pictures", tmp_path / "strict.h5", resume=True, **options)
    assert (resumed.exit_code, resumed.failed) == (0, ())
    check_same(tmp_path / "strict.h5", tmp_path / "out.h5")


def test_a_strict_run_stops_at_the_first_failed_image_or_header(many: Path, tmp_path: Path) -> None:
    for size in (64, "native"):
        output = tmp_path / f"{size}.h5"
        for resume in (False, True):
            result = fpnx.extract(many, output, strict=True, resume=resume, **{**QUICK, "size": size})
            assert result.exit_code == 1
            assert result.stopped
            assert result.stopped.startswith("07.png failed (")
            assert not output.exists()


def test_an_image_that_changes_during_the_run_fails_alone(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        noise_image(i, (50, 50)).save(pictures / f"{i}.png")

    class Changes(Listener):
        def progress(self, what: str, done: int, total: int) -> None:
            if done == 0:
                Image.new("RGB", (60, 60)).save(pictures / "7.png")

    result = fpnx.extract(pictures, tmp_path / "out.h5", listener=Changes(), **{**QUICK, "batch_size": 1})
    assert result.failed == (("7.png", "changed after it was listed"),)
