"""A step of `fpnx train` from stored taps: where its time goes, and how near its arithmetic is to a matrix product.

Run: python tests/benchmarks/train_step.py TAPS.h5 LABELS [--heads fcos,faster_rcnn] [--options="--channels 128"]
     [--json FILE]

TAPS.h5 is a file of `fpnx extract --levels C2-C5`. Times are medians over the steps of an epoch, in ms an image; the
first steps are left out, and so is the one whose operations are counted. `GFLOP/s` is that of forward and backward
together, and `of the product` compares it with a large matrix product that is measured after each step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from fpnx.benchmark.roofline import MatrixProduct
from fpnx.cli.main import main as command_line
from fpnx.training.loop import Trainer

WARM_UP = 2  # steps; the operations of the next are counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("taps", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--heads", default="fcos")
    parser.add_argument("--options", default="", help="more options of fpnx train")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {}
    for head in options.heads.split(","):
        times = measured(options, head)
        report[head] = times
        print(head, " ".join(f"{name} {value:.4g}" for name, value in times.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def measured(options: argparse.Namespace, head: str) -> dict[str, float]:
    """Medians of the parts of a step, in ms an image, GFLOP/s of forward and backward, and the share of the product."""
    samples: dict[str, list[float]] = defaultdict(list)
    counts = {"steps": 0, "flops": 0, "images": 1}
    spent: dict[str, float] = {}
    step, losses_of, backward = Trainer._step, Trainer.losses_of, torch.Tensor.backward
    product = MatrixProduct(torch.device("cpu"), "float32")

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = time.perf_counter() - began

        return call

    def counted_step(trainer: Trainer, batch: Any, seed: int) -> Any:
        counts["steps"] += 1
        if counts["steps"] == WARM_UP + 1:
            with FlopCounterMode(display=False) as counter:
                result = step(trainer, batch, seed)
            counts["flops"], counts["images"] = counter.get_total_flops(), len(batch.indices)
            return result
        spent.clear()
        result = timed("step", step)(trainer, batch, seed)
        if counts["steps"] > WARM_UP:
            spent["rest"] = spent["step"] - spent["forward"] - spent["backward"]
            for name, seconds in spent.items():
                samples[name].append(1000 * seconds / len(batch.indices))
            samples["product"].append(product.measure())
        return result

    with tempfile.TemporaryDirectory(prefix="fpnx-") as folder:
        command = ["train", str(options.taps), "--labels", str(options.labels), "--head", head, "--val", "0"]
        command += ["--epochs", "1", "-o", f"{folder}/model.safetensors"]
        with (
            patch.object(Trainer, "_step", counted_step),
            patch.object(Trainer, "losses_of", timed("forward", losses_of)),
            patch.object(torch.Tensor, "backward", timed("backward", backward)),
        ):
            if code := command_line([*command, *shlex.split(options.options)]):
                sys.exit(code)
    if not samples:
        sys.exit(f"{options.labels} has images for {counts['steps']} steps only: more than {WARM_UP + 1} are needed")
    times = {name: statistics.median(values) for name, values in samples.items()}
    flops = counts["flops"] / counts["images"] / (times["forward"] + times["backward"]) / 1e-3
    best = times.pop("product")
    return {**times, "GFLOP/s": flops / 1e9, "of the product": flops / best}


if __name__ == "__main__":
    main()
