"""fpnx against the plain script, and ONNX Runtime where it is installed: interleaved runs, medians, ratios.

Run: python tests/benchmarks/compare.py [--images 300] [--pairs 5] [--backbone NAME ...] [--folder DIR] [--json FILE]

Each pair runs one after the other, so that a busy machine slows both. Steady images/s are counted from the third
batch (plain script) or the second progress report (fpnx) on; first batch and total are counted from the start of the
process, imports included. Equality: the greatest difference of any level over its greatest magnitude.
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
from photographs import make_photographs

HERE = Path(__file__).resolve().parent
LEVELS = ("P2", "P3", "P4", "P5")
CONTENDERS = {  # name → options of fpnx, or what the plain script runs in
    "plain": None,
    "onnx": None,
    "fpnx": [],
    "fpnx bfloat16": ["--precision", "bfloat16", "--dtype", "float16"],
}
FPNX = """
import json, resource, sys, time
started = time.perf_counter()
from fpnx import extraction, report
from fpnx.core.config import ExtractConfig
from fpnx.core.events import Listener
class Hears(Listener):
    seen = []
    def progress(self, what, done, total):
        if what == "images" and done:
            self.seen.append((time.perf_counter() - started, done))
options = json.loads(sys.argv[3])
result = extraction.extract([sys.argv[1]], sys.argv[2], listener=Hears(), overwrite=True, **options)
seen = Hears.seen
first = next((s for s in seen if s[1] >= 8), seen[-1])
steady = (seen[-1][1] - first[1]) / (seen[-1][0] - first[0]) if seen[-1][0] > first[0] else None
print(json.dumps({"images": result.done, "images_per_second": steady, "first_batch_s": seen[0][0],
    "total_s": time.perf_counter() - started, "ms_per_image": dict(result.timings)}))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=300)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--backbone", nargs="*", default=["resnet50", "mobilenet_v2", "vgg16"])
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fpnx-benchmark")
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    photographs = asked.folder / f"photographs-{asked.images}"
    make_photographs(photographs, asked.images)
    names = [name for name in CONTENDERS if name != "onnx" or importlib.util.find_spec("onnxruntime")]
    report = {}
    for backbone in asked.backbone:
        runs: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(asked.pairs):
            for name in names:
                runs[name].append(run(name, backbone, photographs, asked.folder / f"{name.replace(' ', '-')}.h5"))
        report[backbone] = summary(runs)
        report[backbone]["difference"] = difference(asked.folder / "plain.h5", asked.folder / "fpnx.h5")
        print(backbone, json.dumps(report[backbone], indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


def run(name: str, backbone: str, photographs: Path, output: Path) -> dict:
    if CONTENDERS[name] is None:
        runtime = [] if name == "plain" else ["onnx"]
        command = [str(HERE / "plain_script.py"), str(photographs), str(output), backbone, "8", *runtime]
    else:
        fpnx = {"backbone": backbone, "weights": "random", "levels": "P2-P5"}
        fpnx |= dict(zip((o.strip("-") for o in CONTENDERS[name][::2]), CONTENDERS[name][1::2], strict=True))
        command = ["-c", FPNX, str(photographs), str(output), json.dumps(fpnx)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, env=environment, text=True)
    peak = Peak(process.pid)
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    return json.loads(text.splitlines()[-1]) | {"peak_mb": peak.stop()}


class Peak(threading.Thread):
    """Watches the memory of a process and all below it: the sum of their proportional shares, four times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.most, self.ended = pid, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.25):  # each look holds the watched process up
            self.most = max(self.most, sum(map(_share_mb, _family(self.pid))))

    def stop(self) -> float:
        self.ended.set()
        self.join()
        return self.most


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(int(child)))]


def _share_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def summary(runs: dict[str, list[dict]]) -> dict:
    measures = ("images_per_second", "first_batch_s", "total_s", "peak_mb")
    found: dict = {}
    for name, those in runs.items():
        found[name] = {m: round(statistics.median(r[m] for r in those if r[m] is not None), 2) for m in measures}
        if "ms_per_image" in those[0]:
            found[name]["ms_per_image"] = {
                stage: round(statistics.median(r["ms_per_image"][stage] for r in those), 2)
                for stage in those[0]["ms_per_image"]
            }
    for base in ("plain", "onnx"):
        for name in runs:
            if base in runs and name.startswith("fpnx"):
                pairs = zip(runs[name], runs[base], strict=True)
                ratios = sorted(a["images_per_second"] / b["images_per_second"] for a, b in pairs)
                found[f"{name} over {base}"] = {
                    "median": round(statistics.median(ratios), 3),
                    "least": round(ratios[0], 3),
                    "most": round(ratios[-1], 3),
                }
    return found


def difference(plain: Path, made: Path) -> float:
    """Greatest difference of any level over that level's greatest magnitude."""
    worst = 0.0
    with h5py.File(plain) as a, h5py.File(made) as b:
        for level in LEVELS:
            assert a[level].shape == b[level].shape
            apart = most = 0.0
            for one, other in zip(a[level], b[level], strict=True):
                apart, most = max(apart, np.abs(one - other).max()), max(most, np.abs(one).max())
            worst = max(worst, float(apart / most))
    return worst


if __name__ == "__main__":
    before = time.perf_counter()
    main()
    print(f"{time.perf_counter() - before:.0f} s", file=sys.stderr)
