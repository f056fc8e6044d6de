"""A benchmark session: prepares configurations and measures them in turn, round after round."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import PIL
import torch
import torchvision

from fpnx._version import __version__
from fpnx.benchmark.baseline import BaselineProcess
from fpnx.benchmark.case import BenchmarkCase
from fpnx.benchmark.profiling import count_costs, count_executed
from fpnx.benchmark.results import BenchmarkResult, CaseResult
from fpnx.benchmark.roofline import MatrixProduct, write_speed
from fpnx.benchmark.synthetic_images import HEIGHT, WIDTH, fill, make_images
from fpnx.core.config import BenchmarkConfig
from fpnx.core.errors import FpnxError, ImageError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.interrupts import StopRequest
from fpnx.core.system import available_memory, usable_cpus
from fpnx.core.text import escape
from fpnx.extraction.plan import Plan, make_plan
from fpnx.images.decoding import decode
from fpnx.images.listing import find_images
from fpnx.images.reading import ImageSource
from fpnx.inference.engine import Engine
from fpnx.models.factory import build_model

__all__ = ["Session"]

MADE = 8  # different photographs where none are given
READ = 64  # different images at most where some are given
SECONDS, ROUNDS = 32.0, (5, 30)  # of all rounds where nobody said how many; at least and at most
ENOUGH = 3  # rounds with which that ends where it takes much longer than it was to
SHORT = 3  # times that what is short is measured in a round
DISK = (64 << 20, 512 << 20)  # bytes to measure the disk with


class Session:
    """What is under measurement, and what was found."""

    def __init__(self, config: BenchmarkConfig, folder: Path, stop: StopRequest, listener: Listener) -> None:
        self._config, self._folder, self._stop, self._listener = config, folder, stop, listener
        self._notes: list[str] = []
        self._specimens: list[tuple[CaseResult, BenchmarkCase]] = []
        self._rivals: list[tuple[CaseResult, BaselineProcess]] = []
        self._products: dict[str, MatrixProduct] = {}
        self._disk_bytes = DISK[0]
        self._done = self._total = 0
        self.findings = BenchmarkResult(machine={}, facts={"notes": self._notes}, columns=[])

    def prepare(self) -> None:
        """Images, models, warm-up: everything that comes before the first sample."""
        runs = self._config.runs()
        self._total = 2 * len(runs) + sum(run.precision not in ("auto", "float32") for run in runs)
        self._total += len({run.backbone for run in runs}) if self._config.baseline else 0
        files = self._files()
        listing, plans = find_images([self._folder / "images"]), list[Plan]()
        for run in runs:
            with self._step("preparations", None):
                plans.append(make_plan(self._folder / "measured.h5", run, listing, Listener()))
        self._check_baseline(plans)
        self.findings.machine, self.findings.workers = _machine(plans[0].device), plans[0].workers
        self.findings.facts.update(self._facts(plans[0]))
        for i, plan in enumerate(plans):
            # An engine each: its weights are laid out for the batch size.
            engine = Engine(plan.model, plan.recipe, plan.config, plan.device)
            self._add(BenchmarkCase(plan, engine, self._folder, f"{i}"), files)
        if not self._alive():
            column = self.findings.columns[0]
            raise FpnxError(f"nothing can be measured: {column.name} {column.reason}")
        self._compare_precisions()
        if self._config.baseline:
            self._add_rivals()
        for precision in dict.fromkeys(plan.precision for plan in plans):
            self._products[precision] = MatrixProduct(plans[0].device, precision)
        largest = max(specimen.images * column.bytes_per_image for column, specimen in self._alive())
        self._disk_bytes = min(max(largest, DISK[0]), DISK[1])

    def measure(self) -> None:
        """A round to warm up and to see what a round takes, then the rounds that count."""
        configurations = len(self._alive()) + len(self._rivals_alive())
        steps = SHORT * (configurations + 1) + configurations + 1
        self._done, self._total = 0, steps
        started = time.perf_counter()
        self._round("warm-up", memory=True)
        each = time.perf_counter() - started
        self._compare_rivals()
        self._forget()
        asked = self._config.repeats
        rounds = asked if isinstance(asked, int) else min(max(int(SECONDS / each), ROUNDS[0]), ROUNDS[1])
        self._done, self._total = 0, rounds * steps
        started = time.perf_counter()
        for done in range(1, rounds + 1):
            self._round("measurements")
            seconds = time.perf_counter() - started
            self.findings.rounds, self.findings.facts["seconds"] = done, seconds
            if asked == "auto" and done >= ENOUGH and seconds > 1.25 * SECONDS:
                break

    def close(self) -> None:
        """End processes, close files."""
        for _, rival in self._rivals:
            rival.close()
        for _, specimen in self._specimens:
            specimen.close()

    def _round(self, what: str, memory: bool = False) -> None:
        """Every measurement of every configuration, in turn."""
        for _ in range(SHORT):
            for column, specimen in self._alive():
                with self._step(what, column):
                    stages, forward = specimen.stages(), specimen.forward()
                    column.add_stages(stages)
                    column.forward.append(forward)
                    if specimen.plan.device.type == "cpu":
                        column.core.append(specimen.core_time())
            for column, rival in self._rivals_alive():
                with self._step(what, column):
                    column.forward.append(rival.forward())
            with self._step(what, None):
                for precision, product in self._products.items():
                    self.findings.ceilings.setdefault(precision, []).append(product.measure())
        for column, specimen in self._alive():
            with self._step(what, column):
                rate, peak = specimen.end_to_end(memory)
                column.end_to_end.append(rate)
                if peak is not None:
                    column.rss, column.added, column.cuda = peak.rss, peak.added, peak.cuda
        for column, rival in self._rivals_alive():
            with self._step(what, column):
                column.end_to_end.append(rival.end_to_end())
                column.rss = rival.rss
        with self._step(what, None):
            self.findings.disk.append(write_speed(self._folder, self._disk_bytes))

    @contextmanager
    def _step(self, what: str, column: CaseResult | None) -> Iterator[None]:
        """One measurement. A configuration that turns out not to fit is left out from here on."""
        if self._stop.signum is not None:
            raise Interrupted("interrupted", self._stop.signum)
        try:
            yield
        except (MemoryError, RuntimeError, FpnxError) as error:
            if column is None or not (isinstance(error, FpnxError) or _is_out_of_memory(error)):
                raise
            column.reason = str(error) if isinstance(error, FpnxError) else "does not fit into memory"
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        self._done += 1
        self._listener.progress(what, self._done, self._total)

    def _alive(self) -> list[tuple[CaseResult, BenchmarkCase]]:
        return [(column, specimen) for column, specimen in self._specimens if column.reason is None]

    def _rivals_alive(self) -> list[tuple[CaseResult, BaselineProcess]]:
        return [(column, rival) for column, rival in self._rivals if column.reason is None]

    def _forget(self) -> None:
        """Drop the samples of the warm-up."""
        self.findings.ceilings.clear()
        self.findings.disk.clear()
        for column in self.findings.columns:
            column.stages.clear()
            column.forward.clear()
            column.core.clear()
            column.end_to_end.clear()

    def _files(self) -> list[Path]:
        """Links to the images to measure with, in a folder that holds nothing else."""
        (self._folder / "images").mkdir()
        if self._config.images is None:
            (self._folder / "made").mkdir()
            files = make_images(self._folder / "made", MADE)
            self.findings.facts["images"] = f"{MADE} made for this, {HEIGHT}×{WIDTH}, JPEG"
        else:
            files = self._readable(find_images([self._config.images]).sources[:READ])
            self.findings.facts["images"] = f"{len(files)} of {escape(self._config.images)}"
        fill(self._folder / "images", files, len(files))
        return files

    def _readable(self, sources: Sequence[ImageSource]) -> list[Path]:
        files, reason = [], ""
        for source in sources:
            try:
                decode(source, self._config.max_pixels)
                files.append(Path(os.fsdecode(source.path)))
            except ImageError as error:
                reason = f"{escape(source.name)}: {error}"
                self._notes.append(f"left out: {reason}")
        if not files:
            raise FpnxError(f"no image in {escape(self._config.images or '')} can be read ({reason}): give others")
        return files

    def _check_baseline(self, plans: Sequence[Plan]) -> None:
        for plan in plans if self._config.baseline else ():
            recipe = plan.recipe
            if recipe.fixed_size is None or recipe.fixed_size != (recipe.height, recipe.width):
                raise FpnxError("the plain script of --baseline takes one size, without padding: give --size 224")

    def _facts(self, plan: Plan) -> dict[str, Any]:
        weights = plan.model.weights.info
        return {
            "weights": {"backbone": weights.body.to_json(), "pyramid": weights.pyramid.to_json()},
            "recipe": str(plan.recipe),
            "dtype": plan.config.dtype,
            "folder": tempfile.gettempdir(),
            "samples_per_round": {"stages": SHORT, "forward": SHORT, "end_to_end": 1},
        }

    def _add(self, specimen: BenchmarkCase, files: Sequence[Path]) -> None:
        plan = specimen.plan
        column = CaseResult(
            backbone=plan.model.backbone,
            precision=plan.precision,
            batch_size=specimen.batch_size,
            size=specimen.size,
            shapes=[shape for shape in plan.shapes if shape.input_size == specimen.size],
            costs=count_costs(plan.model, specimen.size),
            reason=specimen.obstacle(),
        )
        self.findings.columns.append(column)
        self._specimens.append((column, specimen))
        with self._step("preparations", column):
            if column.reason is None:
                column.executed = count_executed(specimen.engine.executable, specimen.size)  # before weights are packed
                specimen.warm_up()
                column.images = specimen.images
                fill(specimen.files, files, specimen.images)

    def _compare_precisions(self) -> None:
        """The error of each level against float32, on one batch."""
        exact = {column.backbone: each.engine for column, each in self._specimens if column.precision == "float32"}
        for column, specimen in self._alive():
            if column.precision == "float32":
                continue
            plan = specimen.plan
            if column.backbone not in exact:
                config = replace(plan.config, precision="float32")
                exact[column.backbone] = Engine(build_model(config), plan.recipe, config, plan.device)
            with self._step("preparations", column):
                column.errors = _relative_errors(specimen.features(), specimen.features(exact[column.backbone]))

    def _add_rivals(self) -> None:
        for backbone in dict.fromkeys(column.backbone for column, _ in self._alive()):
            column, specimen = next(pair for pair in self._alive() if pair[0].backbone == backbone)
            ours = replace(column, plain_script=True, precision="float32", executed=None, stages={})
            ours.forward, ours.core, ours.end_to_end = [], [], []
            ours.rss = ours.added = ours.cuda = None
            ours.errors = {}
            self.findings.columns.append(ours)
            with self._step("preparations", ours):
                self._rivals.append((ours, BaselineProcess(specimen, self._folder)))

    def _compare_rivals(self) -> None:
        """The error of what the plain script wrote against our float32."""
        for column, rival in self._rivals_alive():
            _, specimen = next(pair for pair in self._alive() if pair[0].backbone == column.backbone)
            if specimen.plan.precision == "float32":
                ours = specimen.features()
                theirs = {level: rival.features(level, specimen.batch_size) for level in ours}
                column.errors = _relative_errors(theirs, ours)


def _machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, threads and versions, as plain values."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": usable_cpus(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": available_memory(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    versions = {"fpnx": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {"torchvision": torchvision.__version__, "pillow": PIL.__version__, "h5py": h5py.__version__}
    return {**facts, "versions": versions}


def _relative_errors(these: Mapping[str, np.ndarray], those: Mapping[str, np.ndarray]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ by level, in float64."""
    errors = {}
    for level, exact in those.items():
        a, b = these[level].astype(np.float64), exact.astype(np.float64)
        errors[level] = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
    return errors


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        return next(names, platform.processor())
    return platform.processor() or platform.machine()
