"""A benchmark session: prepares all configurations and measures them in interleaved rounds."""

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
from fpnx.benchmark.baseline import BaselineProcess, check_installed
from fpnx.benchmark.case import BenchmarkCase
from fpnx.benchmark.profiling import count_costs, count_executed
from fpnx.benchmark.results import BenchmarkResult, CaseResult
from fpnx.benchmark.roofline import MatrixProduct, write_speed
from fpnx.benchmark.synthetic_images import HEIGHT, WIDTH, link_images, make_images
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
from fpnx.models.preprocessing import scaled_size

__all__ = ["Session"]

SYNTHETIC_IMAGES = 8  # different images where --images is not given
MAX_IMAGES = 64  # different images of --images
AUTO_SECONDS, AUTO_ROUNDS = 32.0, (5, 30)  # of all rounds with repeats="auto"; least and most rounds
MIN_ROUNDS_OVER_TIME = 3  # rounds with repeats="auto" after which it stops if it takes much longer than AUTO_SECONDS
SAMPLES_PER_ROUND = 3  # of stages, forward passes and matrix products
DISK_BYTES = (64 << 20, 512 << 20)  # least and most bytes of a write to measure the disk


class Session:
    """Measures all cases of a benchmark.

    Attributes:
        result: what has been measured so far.
    """

    def __init__(self, config: BenchmarkConfig, folder: Path, stop: StopRequest, listener: Listener) -> None:
        self._config, self._folder, self._stop, self._listener = config, folder, stop, listener
        self._notes: list[str] = []
        self._cases: list[tuple[CaseResult, BenchmarkCase]] = []
        self._baselines: list[tuple[CaseResult, BaselineProcess]] = []
        self._products: dict[str, MatrixProduct] = {}
        self._disk_bytes = DISK_BYTES[0]
        self._done = self._total = 0
        self.result = BenchmarkResult(machine={}, facts={"notes": self._notes}, cases=[])

    def prepare(self) -> None:
        """Make images, models and engines, and warm up: everything before the first sample."""
        runs = self._config.runs()
        self._total = 2 * len(runs) + sum(run.precision not in ("auto", "float32") for run in runs)
        self._total += len({run.backbone for run in runs}) * len(self._config.baselines)
        files = self._link_files()
        listing, plans = find_images([self._folder / "images"]), list[Plan]()
        for run in runs:
            with self._step("preparations", None):
                plans.append(make_plan(self._folder / "measured.h5", run, listing, Listener()))
        self._check_baseline(plans)
        self.result.machine, self.result.workers = _machine(plans[0].device), plans[0].workers
        self.result.facts.update(self._facts(plans[0]))
        for i, plan in enumerate(plans):
            # one engine for each: weights are packed for the batch size
            engine = Engine(plan.model, plan.recipe, plan.config, plan.device)
            self._add(BenchmarkCase(plan, engine, self._folder, f"{i}"), files)
        if not self._active_cases():
            case_result = self.result.cases[0]
            raise FpnxError(f"nothing can be measured: {case_result.name} {case_result.reason}")
        self._compare_precisions()
        if self._config.baselines:
            self._add_baselines()
        for precision in dict.fromkeys(plan.precision for plan in plans):
            self._products[precision] = MatrixProduct(plans[0].device, precision)
        largest = max(case.images * case_result.bytes_per_image for case_result, case in self._active_cases())
        self._disk_bytes = min(max(largest, DISK_BYTES[0]), DISK_BYTES[1])

    def measure(self) -> None:
        """Run one round to warm up and to time a round, then the measured rounds."""
        configurations = len(self._active_cases()) + len(self._active_baselines())
        steps = SAMPLES_PER_ROUND * (configurations + 1) + configurations + 1
        self._done, self._total = 0, steps
        started = time.perf_counter()
        self._round("warm-up", memory=True)
        round_seconds = time.perf_counter() - started
        self._compare_baselines()
        self._drop_warm_up()
        repeats = self._config.repeats
        rounds = min(max(int(AUTO_SECONDS / round_seconds), AUTO_ROUNDS[0]), AUTO_ROUNDS[1])
        rounds = repeats if isinstance(repeats, int) else rounds
        self._done, self._total = 0, rounds * steps
        started = time.perf_counter()
        for done in range(1, rounds + 1):
            self._round("measurements")
            seconds = time.perf_counter() - started
            self.result.rounds, self.result.facts["seconds"] = done, seconds
            if repeats == "auto" and done >= MIN_ROUNDS_OVER_TIME and seconds > 1.25 * AUTO_SECONDS:
                break

    def close(self) -> None:
        """End the baseline processes and close the files."""
        for _, baseline in self._baselines:
            baseline.close()
        for _, case in self._cases:
            case.close()

    def _round(self, what: str, memory: bool = False) -> None:
        """Measure all configurations once, one after the other."""
        for _ in range(SAMPLES_PER_ROUND):
            for case_result, case in self._active_cases():
                with self._step(what, case_result):
                    stages, forward = case.stages(), case.forward()
                    case_result.add_stages(stages)
                    case_result.forward.append(forward)
                    if case.plan.device.type == "cpu":
                        case_result.core.append(case.core_time())
            for case_result, baseline in self._active_baselines():
                with self._step(what, case_result):
                    case_result.forward.append(baseline.forward())
            with self._step(what, None):
                for precision, product in self._products.items():
                    self.result.ceilings.setdefault(precision, []).append(product.measure())
        for case_result, case in self._active_cases():
            with self._step(what, case_result):
                rate, peak = case.end_to_end(memory)
                case_result.end_to_end.append(rate)
                if peak is not None:
                    case_result.rss, case_result.added, case_result.cuda = peak.rss, peak.added, peak.cuda
        for case_result, baseline in self._active_baselines():
            with self._step(what, case_result):
                case_result.end_to_end.append(baseline.end_to_end())
                case_result.rss = baseline.rss
        with self._step(what, None):
            self.result.disk.append(write_speed(self._folder, self._disk_bytes))

    @contextmanager
    def _step(self, what: str, case_result: CaseResult | None) -> Iterator[None]:
        """One measurement. A configuration that does not fit into memory is left out from here on."""
        if self._stop.signum is not None:
            raise Interrupted("interrupted", self._stop.signum)
        try:
            yield
        except (MemoryError, RuntimeError, FpnxError) as error:
            if case_result is None or not (isinstance(error, FpnxError) or _is_out_of_memory(error)):
                raise
            case_result.reason = str(error) if isinstance(error, FpnxError) else "does not fit into memory"
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        self._done += 1
        self._listener.progress(what, self._done, self._total)

    def _active_cases(self) -> list[tuple[CaseResult, BenchmarkCase]]:
        return [(case_result, case) for case_result, case in self._cases if case_result.reason is None]

    def _active_baselines(self) -> list[tuple[CaseResult, BaselineProcess]]:
        return [(case_result, baseline) for case_result, baseline in self._baselines if case_result.reason is None]

    def _drop_warm_up(self) -> None:
        """Drop the samples of the warm-up."""
        self.result.ceilings.clear()
        self.result.disk.clear()
        for case_result in self.result.cases:
            case_result.stages.clear()
            case_result.forward.clear()
            case_result.core.clear()
            case_result.end_to_end.clear()

    def _link_files(self) -> list[Path]:
        """The images to measure with, also linked into a folder of their own."""
        (self._folder / "images").mkdir()
        if self._config.images is None:
            (self._folder / "synthetic").mkdir()
            files = make_images(self._folder / "synthetic", SYNTHETIC_IMAGES)
            self.result.facts["images"] = f"{SYNTHETIC_IMAGES} made for this, {HEIGHT}×{WIDTH}, JPEG"
        else:
            files = self._readable(find_images([self._config.images]).sources[:MAX_IMAGES])
            self.result.facts["images"] = f"{len(files)} of {escape(self._config.images)}"
        link_images(self._folder / "images", files, len(files))
        return files

    def _readable(self, sources: Sequence[ImageSource]) -> list[Path]:
        files, reason = [], ""
        for source in sources:
            try:
                decode(source, self._config.max_pixels, self._config.runs()[0].pixels)
                files.append(Path(os.fsdecode(source.path)))
            except ImageError as error:
                reason = f"{escape(source.name)}: {error}"
                self._notes.append(f"left out: {reason}")
        if not files:
            raise FpnxError(f"no image in {escape(self._config.images or '')} can be read ({reason}): give others")
        return files

    def _check_baseline(self, plans: Sequence[Plan]) -> None:
        check_installed(self._config.baselines)
        for plan in plans if self._config.baselines else ():
            recipe = plan.recipe
            if plan.model.fpn.kind != "fpn":
                raise FpnxError(f"the script of --baseline has an FPN, and not {plan.model.fpn.kind}: leave it out")
            if recipe.fixed_size is None or recipe.fixed_size != (recipe.height, recipe.width):
                raise FpnxError("the script of --baseline takes one size, without padding: give --size 224")
            if recipe.bands is not None or recipe.source_range is not None:
                raise FpnxError("the script of --baseline knows no --bands and no --value-range: leave them out")

    def _facts(self, plan: Plan) -> dict[str, Any]:
        weights = plan.model.weights.info
        return {
            "weights": {"backbone": weights.body.to_json(), "pyramid": weights.pyramid.to_json()},
            "recipe": str(plan.recipe),
            "dtype": plan.config.dtype,
            "folder": tempfile.gettempdir(),
            "samples_per_round": {"stages": SAMPLES_PER_ROUND, "forward": SAMPLES_PER_ROUND, "end_to_end": 1},
        }

    def _add(self, case: BenchmarkCase, files: Sequence[Path]) -> None:
        plan = case.plan
        case_result = CaseResult(
            backbone=plan.model.backbone,
            pyramid=plan.model.fpn.kind,
            precision=plan.precision,
            batch_size=case.batch_size,
            size=case.size,
            shapes=[shape for shape in plan.shapes if shape.input_size == case.size],
            costs=count_costs(plan.model, case.size),
            reason=case.memory_problem(),
        )
        self.result.cases.append(case_result)
        self._cases.append((case_result, case))
        with self._step("preparations", case_result):
            if case_result.reason is None:
                scales = case.plan.model.scales.values() or [1.0]
                # Counted before the warm-up packs the weights.
                case_result.executed = count_executed(
                    case.engine.executable, [scaled_size(case.size, scale) for scale in scales]
                )
                case.warm_up()
                case_result.images = case.images
                link_images(case.files, files, case.images)

    def _compare_precisions(self) -> None:
        """The error of each level against float32, on one batch."""
        exact = {result.network: case.engine for result, case in self._cases if result.precision == "float32"}
        for case_result, case in self._active_cases():
            if case_result.precision == "float32":
                continue
            plan = case.plan
            if case_result.network not in exact:
                config = replace(plan.config, precision="float32")
                exact[case_result.network] = Engine(build_model(config), plan.recipe, config, plan.device)
            with self._step("preparations", case_result):
                case_result.errors = _relative_errors(case.features(), case.features(exact[case_result.network]))

    def _add_baselines(self) -> None:
        for backbone in dict.fromkeys(case_result.backbone for case_result, _ in self._active_cases()):
            case_result, case = next(pair for pair in self._active_cases() if pair[0].backbone == backbone)
            for kind in self._config.baselines:
                baseline_result = replace(case_result, baseline=kind, precision="float32", executed=None, stages={})
                baseline_result.forward, baseline_result.core, baseline_result.end_to_end = [], [], []
                baseline_result.rss = baseline_result.added = baseline_result.cuda = None
                baseline_result.errors = {}
                self.result.cases.append(baseline_result)
                with self._step("preparations", baseline_result):
                    self._baselines.append((baseline_result, BaselineProcess(case, self._folder, kind)))

    def _compare_baselines(self) -> None:
        """The error of the scripts' output against that of fpnx in float32."""
        for case_result, baseline in self._active_baselines():
            _, case = next(pair for pair in self._active_cases() if pair[0].backbone == case_result.backbone)
            if case.plan.precision == "float32":
                features = case.features()
                baseline_features = {level: baseline.features(level, case.batch_size) for level in features}
                case_result.errors = _relative_errors(baseline_features, features)


def _machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, threads and versions as JSON values."""
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


def _relative_errors(features: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ by level, in float64."""
    errors = {}
    for level, reference in exact.items():
        a, b = features[level].astype(np.float64), reference.astype(np.float64)
        errors[level] = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
    return errors


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        return next(names, platform.processor())
    return platform.processor() or platform.machine()
