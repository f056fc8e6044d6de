"""What can be asked for: every default once, validated, frozen; and the fingerprint of what changes numbers."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.sharding import Shard, parse_shard
from fpnx.core.text import escape
from fpnx.core.validation import (
    auto_or_whole,
    check_choice,
    check_types,
    check_whole,
    checked_size,
    format_size,
    freeze,
    parse_channels,
    parse_size,
    point_text,
    several,
    three_numbers,
)

__all__ = [
    "TOP_BLOCKS",
    "BenchmarkConfig",
    "DTYPES",
    "ENGINES",
    "EngineConfig",
    "ExtractConfig",
    "FileFacts",
    "InputConfig",
    "MODES",
    "ModelConfig",
    "OutputConfig",
    "PYRAMIDS",
    "PictureConfig",
    "RunConfig",
    "SAMPLE",
    "VisualizeConfig",
    "fingerprint",
]

DTYPES = ("float32", "float16")
PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float16")
PYRAMIDS = ("fpn", "pafpn")
TOP_BLOCKS = ("pool", "c5", "p5", "m5")
PIXEL_ORDERS = ("RGB", "BGR")
RESAMPLINGS = ("antialiased", "plain")
POOLS = ("none", "avg", "max")
FORMATS = ("h5", "png")
ENGINES = ("local", "ray")
MODES = ("energy", "mean", "max", "std", "pca", "channels", "similarity")
PLOTS = (".png", ".svg", ".pdf")
SAMPLE = 8  # images that `fpnx verify --against` computes again


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file of parameters may not tell. `None` means: what the file says, else its framework's default.

    `mean` and `std` take three numbers, or text such as `"103.53,116.28,123.675"`, in the channel order and the
    value range of the file's framework (0..1 torchvision, 0..255 detectron2 and mmdetection). `stride_in_1x1` and
    `p7_relu` are properties of bottleneck ResNets and of RetinaNet's top block; `norm_eps` of batch norm layers.
    """

    stride_in_1x1: bool | None = None
    p7_relu: bool | None = None
    norm_eps: float | None = None
    pixel_order: str | None = None
    resampling: str | None = None
    mean: str | Iterable[float] | None = None
    std: str | Iterable[float] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.pixel_order is not None:
            check_choice("pixel order", self.pixel_order, PIXEL_ORDERS)
        if self.resampling is not None:
            check_choice("resampling", self.resampling, RESAMPLINGS)
        if self.norm_eps is not None and not 0 <= self.norm_eps < 1:
            raise FpnxError(f"norm eps {self.norm_eps}: take a number from 0 to 1, such as 1e-5")
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                freeze(self, name, three_numbers(name, getattr(self, name)))
        if self.std is not None and 0.0 in tuple(self.std):
            raise FpnxError("std 0 cannot be divided by: take three numbers above 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(FileFacts):
    """Which backbone, pyramid and parameters. `None` means: what the weights or the backbone say.

    `levels` takes `"P2-P5"`, `"C3,P3"` or a sequence of names, and is kept as a tuple, fine to coarse.
    """

    backbone: str | None = None
    weights: str = "default"
    pyramid: str | None = None
    seed: int = 0
    levels: str | Iterable[str] | None = None
    channels: int | None = None
    top_block: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        FileFacts.__post_init__(self)
        if self.pyramid is not None:
            check_choice("pyramid", self.pyramid, PYRAMIDS)
        if self.levels is not None:
            freeze(self, "levels", parse_levels(self.levels))
        check_whole("seed", self.seed, 0, 2**63 - 1)
        if self.channels is not None:
            check_whole("channels", self.channels, 1, 65536)
        if self.top_block is not None:
            check_choice("top block", self.top_block, TOP_BLOCKS)


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """To which size images are brought before the network sees them.

    `size`: `"recipe"` (the weights' own), `"native"`, `224` (stretched to a square), `"480x640"` or
    `(480, 640)` (stretched to height × width). `short_side` and `long_side` keep the aspect instead.
    `max_pixels` bounds both the source image and the network input.
    """

    size: str | int | tuple[int, int] = "recipe"
    short_side: int | None = None
    long_side: int | None = None
    max_pixels: int = 178_956_970  # where Pillow, too, refuses: 2 × 1 GiB of 24-bit pixels / 4 / 3

    def __post_init__(self) -> None:
        check_types(self)
        freeze(self, "size", checked_size(self.size))
        for name in ("short_side", "long_side"):
            if getattr(self, name) is not None:
                check_whole(name.replace("_", " "), getattr(self, name), 1, 65536)
        check_whole("max pixels", self.max_pixels, 1, 2**40)
        if self.short_side is not None and self.size != "recipe":
            size = self.size if isinstance(self.size, (str, int)) else format_size(self.size)
            raise FpnxError(f"size {size} and short side {self.short_side} contradict each other: give one")
        if self.long_side is not None and self.short_side is None:
            raise FpnxError("long side needs short side beside it")
        if self.short_side is not None and self.long_side is not None and self.long_side < self.short_side:
            raise FpnxError(f"long side {self.long_side} is less than short side {self.short_side}")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is stored, and how a run treats what is there and what fails.

    `scratch`: the folder below which an output for a store (`s3://bucket/out.h5`) is worked on; None: that for
    temporary files.
    """

    format: str = "h5"
    dtype: str = "float32"
    pool: str = "none"
    resume: bool = False
    overwrite: bool = False
    commit_every: float = 5.0
    max_failed: str | int = "0"
    strict: bool = False
    scratch: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("format", self.format, FORMATS)
        check_choice("dtype", self.dtype, DTYPES)
        if self.pool not in POOLS and parse_size(self.pool) is None:
            raise FpnxError(f"pool {self.pool!r}: take none, avg, max, or a grid such as 7x7")
        if self.resume and self.overwrite:
            raise FpnxError("resume continues a file and overwrite replaces it: give one of them")
        if not 0 <= self.commit_every < math.inf:
            raise FpnxError(f"commit every {self.commit_every} seconds: take a number from 0 (every batch), not inf")
        freeze(self, "max_failed", str(self.max_failed))
        self.allowed_failures(100)

    def allowed_failures(self, images: int) -> int:
        """How many of `images` may fail before the run counts as failed (exit code 1)."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", str(self.max_failed))
        if match is None or (match[2] and float(match[2]) > 100):
            raise FpnxError(f"max failed {self.max_failed!r}: take a number of images or a share such as 1%")
        return int(match[1]) if match[1] else math.floor(images * float(match[2]) / 100)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how it is computed. Only `precision` changes the numbers.

    `workers` are threads that decode; `cpus` are the processors that a run, or each actor of an engine, keeps busy.
    """

    device: str = "auto"
    precision: str = "auto"
    batch_size: str | int = "auto"
    workers: str | int = "auto"
    cpus: str | int = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        names = self.device.split(",")
        one = len(names) == 1 and re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device)
        if not one and not (len(set(names)) == len(names) and all(re.fullmatch(r"cuda:\d+", name) for name in names)):
            raise FpnxError(f"device {self.device!r}: take auto, cpu, cuda, cuda:1, several as cuda:0,cuda:1, or mps")
        check_choice("precision", self.precision, PRECISIONS)
        for name, limit in (("batch_size", 65536), ("workers", 1024), ("cpus", 4096)):
            freeze(self, name, auto_or_whole(name.replace("_", " "), getattr(self, name), limit))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who computes: this process, or the workers of an engine, shard by shard.

    `shards` is how many the images are cut into, `actors` how many workers take them; both are the engine's to choose
    unless told.
    """

    engine: str = "local"
    shards: str | int = "auto"
    actors: str | int = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("engine", self.engine, ENGINES)
        for name in ("shards", "actors"):
            freeze(self, name, auto_or_whole(name, getattr(self, name), 99_999))
            if self.engine == "local" and getattr(self, name) != "auto":
                raise FpnxError(f"{name} {getattr(self, name)} are for an engine: give --engine ray beside it")


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """What a cell of a heatmap shows, and how it is drawn.

    `point` is x and y from the left top of the upright source image, in pixels (`"120,80"`, `(120, 80)`) or as
    shares of its size (`"50%,50%"`); `pick` names channels (`"3,17"`) in place of the `top` strongest; `panel` is
    the longer side of a panel in pixels, which grows where a map has more cells.
    """

    mode: str = "energy"
    overlay: bool = False
    per_image: bool = False
    point: str | tuple[float, float] | None = None
    top: int = 9
    pick: str | Iterable[int] | None = None
    colormap: str = "viridis"
    panel: int = 256

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("mode", self.mode, MODES)
        check_whole("top", self.top, 1, 100)
        check_whole("panel", self.panel, 32, 4096)
        if self.point is not None:
            freeze(self, "point", point_text(self.point))
        if self.pick is not None:
            freeze(self, "pick", ",".join(map(str, parse_channels(self.pick))))
        if (self.mode == "similarity") != (self.point is not None):
            raise FpnxError(
                "mode similarity and a point go together: give both, as in --mode similarity --point X,Y, or "
                "mode='similarity', point=(X, Y)"
            )
        if self.pick is not None and self.mode != "channels":
            raise FpnxError(f"mode {self.mode} shows no single channels: give --mode channels beside --pick")

    def check_channels(self, channels: Mapping[str, int]) -> None:
        """Refuse, before any work, what levels of so many channels do not have.

        Raises:
            FpnxError: naming the level.
        """
        if self.mode != "channels":
            return
        if self.pick is not None:
            number = max(parse_channels(self.pick))
            for level, count in channels.items():
                if number >= count:
                    raise FpnxError(f"channel {number} is not in {level}: there are {count}, from 0 to {count - 1}")
        elif self.top not in (PictureConfig.top, *range(max(channels.values(), default=self.top) + 1)):
            most = max(channels.values())
            raise FpnxError(f"top {self.top}: no level has more than {most} channels: take from 1 to {most}")

    def position(self, size: tuple[int, int]) -> tuple[float, float]:
        """`point` as (x, y) in pixels of an image of `size` (height, width)."""
        parts = str(self.point).split(",")
        sides = zip(parts, size[::-1], strict=True)
        x, y = (float(p[:-1]) / 100 * side if p.endswith("%") else float(p) for p, side in sides)
        return x, y


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ModelConfig, InputConfig, OutputConfig, RunConfig, PictureConfig, EngineConfig):
    """Everything that `fpnx extract` can be asked for.

    `shard`: `"3/16"` works on the fourth of sixteen slices of the images, those that `limit` leaves; `"auto/16"` asks
    the environment which, and is kept as that number.
    """

    limit: int | None = None
    shard: str | Shard | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        for part in (ModelConfig, InputConfig, OutputConfig, RunConfig, PictureConfig, EngineConfig):
            part.__post_init__(self)
        self._check_engine()
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
        """What the workers of an engine cannot be asked for."""
        if self.engine == "local":
            return
        if self.format != "h5":
            raise FpnxError(f"engine {self.engine} makes files of features: leave out --format {self.format}")
        if self.shard is not None:
            raise FpnxError(f"shard {self.shard} is one and engine {self.engine} makes all of them: give one of them")
        if self.device not in ("auto", "cpu", "cuda"):
            raise FpnxError(f"device {self.device}: engine {self.engine} hands out devices: take auto, cpu or cuda")

    def repeatable(self) -> dict[str, Any]:
        """The options that numbers depend on, as plain values: `ExtractConfig(**them)` computes the same again."""
        names = [field.name for part in (ModelConfig, InputConfig) for field in fields(part)]
        plain = {name: getattr(self, name) for name in (*names, "dtype", "pool", "precision")}
        if os.path.isfile(self.weights):
            plain["weights"] = os.path.abspath(self.weights)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig(PictureConfig):
    """Everything that `fpnx visualize` can be asked for.

    `images` are names, globs, indices or ranges of them (`"3"`, `"0:10"`). The last six are for photographs, and
    mean what they mean for `fpnx extract`; None: not said.
    """

    images: str | Iterable[str] | None = None
    limit: int = 24
    levels: str | Iterable[str] | None = None
    overwrite: bool = False
    backbone: str | Iterable[str] | None = None
    weights: str | None = None
    seed: int | None = None
    size: str | int | None = None
    device: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        PictureConfig.__post_init__(self)
        check_whole("limit", self.limit, 1, 2**63 - 1)
        if self.levels is not None:
            freeze(self, "levels", parse_levels(self.levels))
        for name in ("images", "backbone"):
            value = getattr(self, name)
            freeze(self, name, (value,) if isinstance(value, str) else tuple(value or ()) or None)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(InputConfig):
    """Everything that `fpnx benchmark` can be asked for.

    `backbone`, `precision` and `batch_size` take several: lists, or text with commas. `images`: a folder; None makes
    photograph-like ones. `repeats`: rounds, in each of which every configuration is measured; `"auto"`: as many as
    fit into a minute, at least five.
    """

    backbone: str | Iterable[str] | None = None
    weights: str = "random"
    pyramid: str | None = ModelConfig.pyramid
    seed: int = ModelConfig.seed
    levels: str | Iterable[str] | None = None
    channels: int | None = ModelConfig.channels
    top_block: str | None = ModelConfig.top_block
    offline: bool = ModelConfig.offline
    images: str | None = None
    dtype: str = OutputConfig.dtype
    device: str = RunConfig.device
    precision: str | Iterable[str] = RunConfig.precision
    batch_size: str | int | Iterable[int] = RunConfig.batch_size
    workers: str | int = RunConfig.workers
    repeats: str | int = "auto"
    baseline: bool = False
    plot: str | None = None

    def __post_init__(self) -> None:
        InputConfig.__post_init__(self)
        for name in ("backbone", "precision", "batch_size"):
            freeze(self, name, several(name.replace("_", " "), getattr(self, name)))
        if self.repeats != "auto":
            value = self.repeats
            number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
            check_whole("repeats", number, 1, 10_000, "auto or ")
            freeze(self, "repeats", number)
        if self.plot is not None and not self.plot.lower().endswith(PLOTS):
            raise FpnxError(f"plot {escape(self.plot)}: take a name that ends in {', '.join(PLOTS)}")
        if not self.runs():  # which also checks every other field
            raise FpnxError("no precision or no batch size: name at least one, or auto")

    def runs(self) -> list[ExtractConfig]:
        """One extraction for each backbone, precision and batch size; the batch size changes fastest."""
        chosen: tuple[Any, ...] = (self.backbone or (None,), self.precision, self.batch_size)
        return [
            ExtractConfig(
                backbone=backbone,
                weights=self.weights,
                pyramid=self.pyramid,
                seed=self.seed,
                levels=self.levels,
                channels=self.channels,
                top_block=self.top_block,
                offline=self.offline,
                size=self.size,
                short_side=self.short_side,
                long_side=self.long_side,
                max_pixels=self.max_pixels,
                dtype=self.dtype,
                device=self.device,
                precision=precision,
                batch_size=batch_size,
                workers=self.workers,
            )
            for backbone, precision, batch_size in itertools.product(*chosen)
        ]


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `identity`, the facts that change the stored numbers."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
