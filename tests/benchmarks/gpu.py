"""What fpnx does on a GPU, in one command of at most ten minutes.

Run: python tests/benchmarks/gpu.py [--device cuda] [--minutes 10] [--parts forward,files,trace,train,predict,tests]
     [--backbones resnet50,mobilenet_v2,vgg16] [--batches 8,32,128] [--images 512] [--json FILE]

    forward   images/s of the network alone: fpnx, eager torchvision with channels last, and torch.compile, by
              precision and batch size, interleaved (medians of five rounds); peak memory
    files     `fpnx benchmark --baseline plain`: from image files to a file, against the plain script
    trace     of an extraction: the share of time in which the GPU computes, how much of its copies lies beside
              computation, and launches of CUDA graphs
    train     seconds of an epoch on drawn shapes, for each head
    predict   images/s of Faster R-CNN ResNet-50 with random parameters, fpnx against torchvision's model
    tests     the default suite, with the time that is left

A part that fails is reported, and the next one is run. With --device cpu it shows that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.models import get_model

import fpnx
from fpnx.benchmark.baseline import baseline_model
from fpnx.benchmark.baseline_script import PlainModel
from fpnx.benchmark.synthetic_images import make_images
from fpnx.core.config import ExtractConfig
from fpnx.inference.cuda import make_engine
from fpnx.inference.devices import arithmetic
from tests.helpers.detectors import as_tensor, save_published
from tests.helpers.reference_networks import randomise
from tests.helpers.shapes import draw_scenes, write_coco, write_folders, write_masks

SIDE, ROUNDS, SECONDS = 224, 5, 0.3  # pixels; of each measurement
PRECISIONS = ("float32", "tf32", "bfloat16")
ROOT = Path(__file__).parents[2]
HEADS = {"classify": "folders", "fcos": "boxes", "faster_rcnn": "boxes", "mask_rcnn": "boxes", "semantic": "masks"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--backbones", default="resnet50,mobilenet_v2,vgg16")
    parser.add_argument("--batches", default="8,32,128")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.ends = time.monotonic() + 60 * options.minutes
    options.backbones = options.backbones.split(",")
    options.batches = [int(each) for each in options.batches.split(",")]
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    report: dict[str, Any] = {"card": name, "torch": torch.__version__, "cpus": os.cpu_count()}
    print(f"{name}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="fpnx-") as folder:
        options.folder = Path(folder)
        for part in options.parts.split(","):
            print(f"\n{part}", flush=True)
            try:
                report[part] = PARTS[part](options)
            except Exception as error:  # the next part may work
                traceback.print_exc()
                report[part] = {"failed": str(error)}
            if options.json:
                options.json.write_text(json.dumps(report, indent=1))


def forward(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Images/s of the network alone."""
    rows = []
    print(f"{'':34}{'fpnx':>10}{'eager':>10}{'compiled':>10}  images/s        memory of fpnx", flush=True)
    for backbone in options.backbones:
        model = fpnx.create_model(backbone, weights="random", levels="P2-P5", size=SIDE)
        request = baseline_model(model, model.recipe, options.folder / "parameters.pt")
        plain = PlainModel(request).eval().to(options.device, memory_format=torch.channels_last)
        compiled = torch.compile(plain)
        for precision in PRECISIONS if options.device.startswith("cuda") else ("float32",):
            for batch in options.batches:
                if left(options) < 60:
                    return rows
                row = {"backbone": backbone, "precision": precision, "batch": batch}
                row |= _forward(options, model, plain, compiled, precision, batch)
                rows.append(row)
                cells = "".join(f"{row[name]:>10.0f}" for name in ("fpnx", "eager", "compiled"))
                memory = f"{row['peak_bytes'] / 1e9:18.2f} GB"
                print(f"{backbone:14}{precision:10}batch {batch:<4}{cells}  {memory}", flush=True)
    return rows


def _forward(
    options: argparse.Namespace, model: Any, plain: Any, compiled: Any, precision: str, batch: int
) -> dict[str, float]:
    device = torch.device(options.device)
    engine = make_engine(model, model.recipe, ExtractConfig(weights="random", precision=precision), device)
    images = torch.randn(batch, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    ours, run = images.to(engine.dtype), getattr(engine, "_forward", engine.executable)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    half = precision == "bfloat16"

    def fast() -> None:
        run(ours)

    def eager(network: Callable[[Tensor], Any]) -> Callable[[], None]:
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                network(images)

        return call

    calls = {"fpnx": fast, "eager": eager(plain), "compiled": eager(compiled)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    if stream is not None:
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode(), arithmetic(device, precision):
        for _ in range(5):  # captures graphs, compiles
            timed(fast, stream, device)
        peak = torch.cuda.max_memory_allocated(device) if stream is not None else 0
        for name in ("eager", "compiled"):
            timed(calls[name], None, device)
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(timed(call, stream if name == "fpnx" else None, device))
    return {name: batch / statistics.median(each) for name, each in times.items()} | {"peak_bytes": peak}


def timed(call: Callable[[], None], stream: Any, device: torch.device) -> float:
    """Seconds of a call, from as many as take SECONDS."""
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        _synchronize(device)
        started, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - started < SECONDS:
            call()
            count += 1
            if count % 10 == 0:
                _synchronize(device)
        _synchronize(device)
    return (time.perf_counter() - started) / count


def files(options: argparse.Namespace) -> Any:
    """From image files to a file, against the plain script."""
    results = []
    for backbone in options.backbones:
        command = ["benchmark", "--device", options.device, "--backbone", backbone, "--weights", "random"]
        command += ["--size", str(SIDE), "--baseline", "plain", "--repeats", "3", "--json"]
        if left(options) < 90:
            break
        document = json.loads(fpnx_command(options, command))
        results.append(document)
        for case in document["configurations"]:
            rate, forward_ms = case["summary"]["images_per_second"], case["summary"]["forward_ms"]
            print(f"{case['name']:44} files {rate['median']:8.1f} images/s, forward {1000 / forward_ms['median']:8.1f}")
            if case["bottleneck"]:
                print(f"    {case['bottleneck']}", flush=True)
    return results


def trace(options: argparse.Namespace) -> Any:
    """The kernels and copies of an extraction, by PyTorch's profiler."""
    if not options.device.startswith("cuda"):
        print("needs a GPU")
        return None
    images = options.folder / "images"
    images.mkdir(exist_ok=True)
    make_images(images, options.images)
    found: dict[str, Any] = {}
    for backbone in options.backbones:
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        settings: dict[str, Any] = {"backbone": backbone, "weights": "random", "size": SIDE, "device": options.device}
        with torch.profiler.profile(activities=activities) as profile:
            fpnx.extract(images, options.folder / f"{backbone}.h5", batch_size=32, dtype="float16", **settings)
        file = options.folder / "trace.json"
        profile.export_chrome_trace(str(file))
        found[backbone] = timeline(json.loads(file.read_text())["traceEvents"])
        print(backbone, ", ".join(f"{name} {value:.3g}" for name, value in found[backbone].items()), flush=True)
    return found


def timeline(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Shares of the time between the first and the last event of the device, from a Chrome trace."""
    spans: dict[str, list[tuple[float, float]]] = {"kernel": [], "upload": [], "download": []}
    graphs, streams = 0, set()
    for event in events:
        category, name = event.get("cat", ""), event.get("name", "")
        graphs += name.startswith("cudaGraphLaunch")
        if event.get("ph") != "X" or category not in ("kernel", "gpu_memcpy"):
            continue
        streams.add(event.get("args", {}).get("stream"))
        kinds = {"HtoD": "upload", "DtoH": "download"} if category == "gpu_memcpy" else {"": "kernel"}
        for kind in (kind for mark, kind in kinds.items() if mark in name):
            spans[kind].append((event["ts"], event["ts"] + event["dur"]))
    joined = {kind: merged(each) for kind, each in spans.items()}
    everything = [span for each in joined.values() for span in each]
    whole = max(end for _, end in everything) - min(start for start, _ in everything)
    shares = {f"{kind} busy": length(each) / whole for kind, each in joined.items()}
    for kind in ("upload", "download"):
        beside = length(joined[kind]) + length(joined["kernel"]) - length(merged([*joined[kind], *joined["kernel"]]))
        shares[f"{kind} beside kernels"] = beside / max(length(joined[kind]), 1e-9)
    return shares | {"seconds": whole / 1e6, "graph launches": graphs, "streams": len(streams)}


def merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans without overlaps, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(spans: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def train(options: argparse.Namespace) -> Any:
    """Seconds of an epoch on drawn shapes."""
    scenes = draw_scenes(32, size=(256, 256))
    places = {name: options.folder / name for name in ("boxes", "masks", "folders")}
    write_coco(places["boxes"], scenes)
    write_masks(places["masks"], scenes)
    write_folders(places["folders"], scenes)
    found: dict[str, float] = {}
    for head, kind in HEADS.items():
        if left(options) < 60:
            break
        images = places[kind] if kind == "folders" else places[kind] / "images"
        labels = {"folders": "folders", "boxes": images.parent / "annotations.json", "masks": images.parent / "masks"}
        settings: dict[str, Any] = {
            "backbone": "resnet50",
            "weights": "random",
            "size": 256,
            "epochs": 3,
            "val": "0.25",
        }
        output = options.folder / f"{head}.safetensors"
        result = fpnx.train(images, labels[kind], output, head=head, size=256, device=options.device, **settings)
        found[head] = result.epochs[-1].seconds
        print(f"{head:14} {found[head]:8.2f} s an epoch of {result.epochs[-1].images} images", flush=True)
    return found


def predict(options: argparse.Namespace) -> Any:
    """Faster R-CNN through `fpnx predict`, and as torchvision's model in a loop."""
    detector = "fasterrcnn_resnet50_fpn"
    os.environ["TORCH_HOME"] = str(options.folder / "torch")
    network = randomise(get_model(detector, weights=None, weights_backbone=None), smallest_variance=0.1)
    save_published(options.folder / "torch", detector, network)
    images = options.folder / "photographs"
    images.mkdir(exist_ok=True)
    make_images(images, 32)
    output = options.folder / "found.json"
    command = ["predict", str(images), "-o", str(output), "--weights", detector, "--device", options.device]
    ours = json.loads(fpnx_command(options, [*command, "--offline", "--json"]))["images_per_second"]
    network = network.to(options.device).eval()
    paths = sorted(images.iterdir())
    started = time.perf_counter()
    with torch.no_grad():
        for path in paths:
            network([as_tensor(Image.open(path).convert("RGB")).to(options.device)])
    theirs = len(paths) / (time.perf_counter() - started)
    print(f"fpnx {ours:.2f} images/s, torchvision in a loop {theirs:.2f}", flush=True)
    return {"fpnx": ours, "torchvision": theirs}


def tests(options: argparse.Namespace) -> Any:
    """The default suite; tests that need a GPU run where there is one."""
    count = min(os.cpu_count() or 2, 8)
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(count), "--maxfail", "50"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30, left(options)))
    except subprocess.TimeoutExpired as error:
        print(f"stopped: {str(error.stdout)[-2000:]}")
        return "stopped"
    print(done.stdout[-4000:])
    return done.stdout[-4000:]


def left(options: argparse.Namespace) -> float:
    """Seconds that are left."""
    return float(options.ends - time.monotonic())


def fpnx_command(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Run the command line; its stdout."""
    command = [sys.executable, "-m", "fpnx", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30, left(options)))
    if done.returncode:
        raise RuntimeError(f"fpnx {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "forward": forward,
    "files": files,
    "trace": trace,
    "train": train,
    "predict": predict,
    "tests": tests,
}

if __name__ == "__main__":
    main()
