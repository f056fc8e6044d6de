"""Compare fpnx with the plain script, and with ONNX Runtime where it is installed: medians and ratios.

Run: python tests/benchmarks/compare.py [--images 300] [--pairs 5] [--backbone NAME ...] [--without NAME ...]
     [--folder DIR] [--json FILE]

Measurements are interleaved, so drift affects all equally. The images are synthetic photographs of 1024×768. Steady
images/s count from the second batch (plain script, ONNX Runtime) or from the first progress event with at least 8
images (fpnx); first batch and total count from the start of the process, with imports. `difference` is the greatest
absolute difference of any level between fpnx and the plain script, divided by the level's greatest absolute value.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import torch

import fpnx
from fpnx.benchmark.baseline import baseline_model
from fpnx.benchmark.synthetic_images import link_images, make_images

HERE = Path(__file__).resolve().parent
LEVELS = ("P2", "P3", "P4", "P5")
BATCH_SIZE, WORKERS, SIZE = 8, 2, (224, 224)
DIFFERENT_IMAGES = 64
SCRIPTS = {  # name → arguments of the interpreter
    "plain": ["-m", "fpnx.benchmark.baseline_script"],
    "onnx": [str(HERE / "onnx_script.py")],
}
EXTRACTIONS: dict[str, dict[str, str]] = {  # name → options of fpnx.extract
    "fpnx": {},
    "fpnx bfloat16": {"precision": "bfloat16", "dtype": "float16"},
}
EXTRACT = """
import json, sys, time
import fpnx
class Progress(fpnx.Listener):
    def __init__(self):
        self.events = []
    def progress(self, what, done, total):
        if what == "images" and done:
            self.events.append((time.time(), done))
images, output, options, started = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])
progress = Progress()
result = fpnx.extract(images, output, listener=progress, overwrite=True, **options)
events = progress.events
first, last = next((event for event in events if event[1] >= 8), events[-1]), events[-1]
rate = (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else None
print(json.dumps({"images_per_second": rate, "first_batch_s": events[0][0] - started,
    "total_s": time.time() - started, "ms_per_image": dict(result.timings)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--backbone", nargs="*", default=["resnet50", "mobilenet_v2", "vgg16"])
    parser.add_argument("--without", nargs="*", default=[], help="such as 'fpnx bfloat16', where it is slow")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fpnx-benchmark")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    images = image_folder(options.folder, options.images)
    names = ["plain", *(["onnx"] if importlib.util.find_spec("onnxruntime") else []), *EXTRACTIONS]
    names = [name for name in names if name not in options.without]
    report = {}
    for backbone in options.backbone:
        request = plain_request(backbone, images, options.images, options.folder)
        runs: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(options.pairs):
            for name in names:
                output = options.folder / f"{name.replace(' ', '-')}.h5"
                if name in SCRIPTS:
                    runs[name].append(run_script(name, request | {"output": str(output)}))
                else:
                    runs[name].append(run_extraction(name, backbone, images, output))
        report[backbone] = summary(runs)
        report[backbone]["difference"] = difference(options.folder / "plain.h5", options.folder / "fpnx.h5")
        print(backbone, json.dumps(report[backbone], indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def image_folder(folder: Path, count: int) -> Path:
    """A folder of `count` synthetic images, of which at most 64 are different."""
    different = min(count, DIFFERENT_IMAGES)
    originals, images = folder / f"originals-{different}", folder / f"images-{count}"
    if not images.exists():
        originals.mkdir(parents=True, exist_ok=True)
        link_images(images, make_images(originals, different), count)
    return images


def plain_request(backbone: str, images: Path, count: int, folder: Path) -> dict:
    """The request for the plain script, with the parameters of fpnx's model."""
    model = fpnx.create_model(backbone, weights="random", levels=",".join(LEVELS))
    return baseline_model(model, model.recipe, folder / "parameters.pt") | {
        "folder": str(images),
        "images": count,
        "size": SIZE,
        "batch_size": BATCH_SIZE,
        "workers": WORKERS,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": "float32",
    }


def run_script(name: str, request: dict) -> dict:
    """Run the plain script, or its ONNX Runtime variant, once from files to a file."""
    request = request | {"device": "cpu"} if name == "onnx" else request
    started = time.time()
    process = start(SCRIPTS[name])
    peak = PeakMemory(process.pid)
    ask(process, json.dumps(request))
    prepared = time.time()
    answer = ask(process, "end to end")
    total = time.time() - started
    process.communicate()
    return {
        "images_per_second": answer["images_per_second"],
        "first_batch_s": prepared - started + answer["first_batch_seconds"],
        "total_s": total,
        "peak_mb": peak.stop(),
    }


def run_extraction(name: str, backbone: str, images: Path, output: Path) -> dict:
    """Run `fpnx.extract` once."""
    options = {"backbone": backbone, "weights": "random", "levels": ",".join(LEVELS), **EXTRACTIONS[name]}
    process = start(["-c", EXTRACT, str(images), str(output), json.dumps(options), str(time.time())])
    peak = PeakMemory(process.pid)
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    return json.loads(text.splitlines()[-1]) | {"peak_mb": peak.stop()}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )


def ask(process: subprocess.Popen[str], line: str) -> dict:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"the plain script ended with {process.wait()}")
    return json.loads(answer)


class PeakMemory(threading.Thread):
    """Peak memory of a process and its descendants: the sum of proportional set sizes, sampled four times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.25):  # reading the memory maps pauses the process
            self.peak = max(self.peak, sum(map(_pss_mb, _descendants(self.pid))))

    def stop(self) -> float:
        self.ended.set()
        self.join()
        return self.peak


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(descendant for child in children for descendant in _descendants(int(child)))]


def _pss_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def summary(runs: dict[str, list[dict]]) -> dict:
    """Medians by name, and the ratios of images/s of fpnx to the others, paired by round."""
    measures = ("images_per_second", "first_batch_s", "total_s", "peak_mb")
    result: dict = {}
    for name, samples in runs.items():
        result[name] = {m: round(statistics.median(s[m] for s in samples if s[m] is not None), 2) for m in measures}
        if "ms_per_image" in samples[0]:
            result[name]["ms_per_image"] = {
                stage: round(statistics.median(sample["ms_per_image"][stage] for sample in samples), 2)
                for stage in samples[0]["ms_per_image"]
            }
    for base in SCRIPTS:
        for name in EXTRACTIONS:
            if base in runs and name in runs:
                pairs = zip(runs[name], runs[base], strict=True)
                ratios = sorted(a["images_per_second"] / b["images_per_second"] for a, b in pairs)
                result[f"{name} over {base}"] = {
                    "median": round(statistics.median(ratios), 3),
                    "least": round(ratios[0], 3),
                    "most": round(ratios[-1], 3),
                }
    return result


def difference(plain: Path, extracted: Path) -> float:
    """Greatest absolute difference of any level, divided by that level's greatest absolute value."""
    worst = 0.0
    with h5py.File(plain) as a, h5py.File(extracted) as b:
        for level in LEVELS:
            assert a[level].shape == b[level].shape
            error = magnitude = 0.0
            for expected, actual in zip(a[level], b[level], strict=True):
                error = max(error, np.abs(expected - actual).max())
                magnitude = max(magnitude, np.abs(expected).max())
            worst = max(worst, float(error / magnitude))
    return worst


if __name__ == "__main__":
    before = time.perf_counter()
    main()
    print(f"{time.perf_counter() - before:.0f} s", file=sys.stderr)
