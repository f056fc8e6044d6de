"""The options of extract, visualize and benchmark: validated, frozen, each declared once; and the fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.option import like, option
from fpnx.core.option_groups import (
    DTYPES,
    MODES,
    PRECISIONS,
    PYRAMIDS,
    TOP_BLOCKS,
    CheckpointConfig,
    DistributedConfig,
    InputConfig,
    ModelConfig,
    OutputConfig,
    PictureConfig,
    RunConfig,
)
from fpnx.core.sharding import Shard, parse_shard
from fpnx.core.validation import check_fields, check_plot, check_whole, freeze, parse_roi_size, several

__all__ = [
    "BenchmarkConfig",
    "DRAWN_FROM",
    "DTYPES",
    "DistributedConfig",
    "ExtractConfig",
    "CheckpointConfig",
    "InputConfig",
    "MODES",
    "ModelConfig",
    "OutputConfig",
    "PYRAMIDS",
    "PictureConfig",
    "RunConfig",
    "SAMPLE",
    "TOP_BLOCKS",
    "VisualizeConfig",
    "fingerprint",
]

DRAWN_FROM = 0.5  # score of a box in a picture, where no threshold is given
BASELINES = ("plain", "openvino")  # scripts that a benchmark compares with
SAMPLE = 8  # images that `fpnx verify --against` computes again


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(DistributedConfig, PictureConfig, RunConfig, OutputConfig, InputConfig, ModelConfig):
    """All options of `fpnx extract`.

    `shard`: `"3/16"` works on the fourth of sixteen slices of the images (after `limit`); `"auto/16"` reads the
    number from the environment. It is kept as a `Shard`. `boxes`: a label file or folder, see `fpnx.labels`.
    `roi_size`: 7, `"7x7"` or `(7, 7)`, height × width; or `"avg"`, the mean of 7×7 cells. It is kept as text.
    """

    limit: int | None = option(None, "Only the first N images.", "Input", metavar="N")
    shard: str | Shard | None = option(  # noqa: RUF009
        None, "Only slice I of N (0 to N-1); auto: SLURM's or RANK's number.", "Input", metavar="I/N|auto/N"
    )
    boxes: str | None = option(
        None, "Store a feature of each box in these labels, in place of the maps.", "Output", metavar="LABELS"
    )
    roi_size: str | int | tuple[int, int] = option(
        "7x7",
        "With --boxes: cells of each feature; avg: the mean of 7x7.",
        "Output",
        metavar="N|HxW|avg",
        complete=("avg",),
    )
    dry_run: bool = option(False, "Show what would be done, and stop.", "Output")

    def __post_init__(self) -> None:
        for part in (ModelConfig, InputConfig, OutputConfig, RunConfig, PictureConfig, DistributedConfig):
            part.__post_init__(self)
        self._check_engine()
        self._check_regions()
        if self.limit is not None:
            check_whole("limit", self.limit, 1, 2**63 - 1)
        if self.shard is not None:
            freeze(self, "shard", parse_shard(self.shard))
        drawn = [f.name for f in fields(PictureConfig) if getattr(self, f.name) != f.default]
        if self.format != "png" and drawn:
            raise FpnxError(f"{drawn[0].replace('_', ' ')} is for pictures: give --format png beside it")
        if self.format == "png" and self.mode == "pca" and not self.per_image:
            raise FpnxError("mode pca without a file has no basis that its images share: give --per-image beside it")

    def _check_engine(self) -> None:
        """Refuse what `--engine ray` cannot do."""
        if self.engine == "local":
            return
        if self.format != "h5":
            raise FpnxError(f"engine {self.engine} makes files of features: leave out --format {self.format}")
        if self.update:
            raise FpnxError(f"engine {self.engine} makes new shards: update each with --shard I/N --update")
        if self.shard is not None:
            raise FpnxError(f"shard {self.shard} is one and engine {self.engine} makes all of them: give one of them")
        if self.device not in ("auto", "cpu", "cuda"):
            raise FpnxError(f"device {self.device}: engine {self.engine} hands out devices: take auto, cpu or cuda")

    def _check_regions(self) -> None:
        """Bring `roi_size` into its form, and refuse what regions do not go with."""
        freeze(self, "roi_size", parse_roi_size(self.roi_size))
        if self.boxes is None:
            if self.roi_size != ExtractConfig.roi_size:
                raise FpnxError(f"roi size {self.roi_size} is for boxes: give --boxes LABELS beside it")
            return
        if self.format != "h5":
            raise FpnxError(f"boxes give a file of features: leave out --format {self.format}")
        if self.pool != "none":
            raise FpnxError(f"pool {self.pool} is for maps, and with boxes none are stored: take --roi-size instead")

    def repeatable(self) -> dict[str, Any]:
        """The options that the numbers depend on, as plain values: `ExtractConfig(**them)` computes the same again."""
        names = [field.name for part in (ModelConfig, InputConfig) for field in fields(part)]
        plain = {name: getattr(self, name) for name in (*names, "dtype", "pool", "precision")}
        if os.path.isfile(self.weights):
            plain["weights"] = os.path.abspath(self.weights)
        if self.boxes is not None:
            boxes = os.path.abspath(self.boxes) if os.path.exists(self.boxes) else self.boxes
            plain |= {"boxes": boxes, "roi_size": self.roi_size}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


AS_FOR_EXTRACT: dict[str, Any] = {"default": None, "help": "As for extract.", "panel": "Photographs"}


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig(PictureConfig):
    """All options of `fpnx visualize`.

    `images` are names, globs, indices or ranges of them (`"3"`, `"0:10"`). `predictions` is a JSON file of
    `fpnx predict` with boxes, of which those with a score of `threshold` or more are drawn. The last eight are for
    photographs, and mean what they mean for `fpnx extract`; None: its default.
    """

    images: str | Iterable[str] | None = option(
        None, "Which to draw: name, glob, index or range; repeatable.", "Images", metavar="NAME|3|0:10", repeatable=True
    )
    limit: int = option(24, "Draw at most N images, and count the others.", "Images", metavar="N")
    levels: str | Iterable[str] | None = like(ModelConfig, "levels", help="Such as P3-P5 or C3,P3.", panel="Images")
    predictions: str | None = option(
        None, "Draw the boxes of this file, which fpnx predict wrote.", "Pictures", metavar="FILE"
    )
    threshold: float = option(DRAWN_FROM, "Least score of a box; in the page a slider.", "Pictures", metavar="0..1")
    overwrite: bool = like(OutputConfig, "overwrite", help="Replace existing output.")
    backbone: str | Iterable[str] | None = like(
        ModelConfig, "backbone", help="Repeat it to compare.", panel="Photographs", repeatable=True
    )
    weights: str | None = like(ModelConfig, "weights", **AS_FOR_EXTRACT)
    weights_key: str | None = like(ModelConfig, "weights_key", **AS_FOR_EXTRACT)
    weights_prefix: str | None = like(ModelConfig, "weights_prefix", **AS_FOR_EXTRACT)
    seed: int | None = like(ModelConfig, "seed", **AS_FOR_EXTRACT)
    size: str | int | None = like(InputConfig, "size", **AS_FOR_EXTRACT)
    bands: str | Iterable[int] | None = like(InputConfig, "bands", **AS_FOR_EXTRACT)
    value_range: str | Iterable[float] | None = like(InputConfig, "value_range", **AS_FOR_EXTRACT)
    device: str | None = like(RunConfig, "device", **AS_FOR_EXTRACT)
    offline: bool = like(ModelConfig, "offline", panel="Photographs")

    def __post_init__(self) -> None:
        PictureConfig.__post_init__(self)
        check_whole("limit", self.limit, 1, 2**63 - 1)
        if not 0 <= self.threshold <= 1:
            raise FpnxError(f"threshold {self.threshold}: take a score from 0 to 1, such as 0.5")
        if self.predictions is None and self.threshold != DRAWN_FROM:
            raise FpnxError(f"threshold {self.threshold} is for boxes: give --predictions FILE beside it")
        if self.levels is not None:
            freeze(self, "levels", parse_levels(self.levels))
        for name in ("images", "backbone"):
            value = getattr(self, name)
            freeze(self, name, (value,) if isinstance(value, str) else tuple(value or ()) or None)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """All options of `fpnx benchmark`.

    `backbone`, `pyramid`, `precision` and `batch_size` take several: lists, or text with commas. `images`: a folder;
    None makes photograph-like ones. `repeats`: rounds, in each of which every configuration is measured; `"auto"`: as
    many as fit into a minute, at least five.
    """

    backbone: str | Iterable[str] | None = like(
        ModelConfig, "backbone", help="Name; repeat it to compare several.", repeatable=True
    )
    weights: str = like(ModelConfig, "weights", default="random")
    weights_key: str | None = like(ModelConfig, "weights_key")
    weights_prefix: str | None = like(ModelConfig, "weights_prefix")
    pyramid: str | Iterable[str] | None = like(
        ModelConfig,
        "pyramid",
        help=f"{', '.join(PYRAMIDS[:-1])} or {PYRAMIDS[-1]}; repeat it to compare several.",
        choices=(),
        complete=PYRAMIDS,
        repeatable=True,
    )
    tap: str | None = like(ModelConfig, "tap")
    blocks: str | int | Sequence[int] | None = like(ModelConfig, "blocks")
    seed: int = like(ModelConfig, "seed")
    levels: str | Iterable[str] | None = like(ModelConfig, "levels")
    channels: int | None = like(ModelConfig, "channels")
    top_block: str | None = like(ModelConfig, "top_block")
    offline: bool = like(ModelConfig, "offline")
    images: str | None = option(None, "Images to measure with; else some are made.", "Input", metavar="FOLDER")
    size: str | int | tuple[int, int] = like(InputConfig, "size")
    short_side: int | None = like(InputConfig, "short_side")
    long_side: int | None = like(InputConfig, "long_side")
    max_pixels: int = like(InputConfig, "max_pixels")
    bands: str | Iterable[int] | None = like(InputConfig, "bands")
    value_range: str | Iterable[float] | None = like(InputConfig, "value_range")
    dtype: str = like(OutputConfig, "dtype")
    plot: str | None = option(
        None, "Draw the times of the stages into FILE.png (.svg, .pdf).", "Output", metavar="FILE"
    )
    device: str = like(RunConfig, "device")
    precision: str | Iterable[str] = like(
        RunConfig,
        "precision",
        help="As for extract; several with commas.",
        metavar="NAME,…",
        choices=(),
        complete=PRECISIONS,
    )
    batch_size: str | int | Iterable[int] = like(
        RunConfig, "batch_size", help="auto or numbers; several with commas.", metavar="auto|N,…"
    )
    workers: str | int = like(RunConfig, "workers")
    repeats: str | int = option(
        "auto",
        "Rounds; auto takes about a minute, at least 5 rounds.",
        "Run",
        metavar="auto|N",
        complete=("auto",),
    )
    baseline: str | Iterable[str] | None = option(
        None,
        "Also measure a plain script of torchvision and h5py, or one of OpenVINO.",
        "Run",
        metavar="plain|openvino",
        complete=BASELINES,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("backbone", "pyramid", "precision", "batch_size"):
            freeze(self, name, several(name.replace("_", " "), getattr(self, name)))
        freeze(self, "baseline", several("baseline", self.baseline))
        for name in self.baselines:
            if name not in BASELINES:
                raise FpnxError(f"baseline {name!r}: take {' or '.join(BASELINES)}")
        if self.repeats != "auto":
            value = self.repeats
            number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
            check_whole("repeats", number, 1, 10_000, "auto or ")
            freeze(self, "repeats", number)
        if self.plot is not None:
            check_plot(self.plot)
        runs = self.runs()  # which checks every other field
        if not runs:
            raise FpnxError("no precision or no batch size: name at least one, or auto")
        freeze(self, "size", runs[0].size)

    @property
    def baselines(self) -> tuple[str, ...]:
        """The scripts to compare with."""
        return tuple(self.baseline or ())

    def runs(self) -> list[ExtractConfig]:
        """One extraction for each backbone, pyramid, precision and batch size; the batch size changes fastest."""
        names = {field.name for field in fields(self)} & {field.name for field in fields(ExtractConfig)}
        shared = {name: getattr(self, name) for name in names}
        varied: dict[str, Any] = {
            "backbone": self.backbone or (None,),
            "pyramid": self.pyramid or (None,),
            "precision": self.precision,
            "batch_size": self.batch_size,
        }
        return [
            ExtractConfig(**{**shared, **dict(zip(varied, values, strict=True))})
            for values in itertools.product(*varied.values())
        ]


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `identity`, the facts that change the stored numbers."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
