"""Groups of options that commands share: model, checkpoint, input, output, run, pictures, distributed runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.option import option
from fpnx.core.pixel_options import PixelOptions, parse_bands, parse_value_range
from fpnx.core.text import escape
from fpnx.core.validation import (
    auto_or_whole,
    check_fields,
    check_whole,
    checked_size,
    format_size,
    freeze,
    parse_blocks,
    parse_channels,
    parse_size,
    point_text,
    three_numbers,
)

__all__ = [
    "DTYPES",
    "DistributedConfig",
    "CheckpointConfig",
    "InputConfig",
    "MODES",
    "ModelConfig",
    "OutputConfig",
    "PRECISIONS",
    "PYRAMIDS",
    "PictureConfig",
    "RunConfig",
    "TASKS",
    "TOP_BLOCKS",
]

PYRAMIDS = ("fpn", "pafpn", "bifpn", "nasfpn", "simple", "image")
TASKS = ("classification", "detection", "semantic")
DTYPES = ("float32", "float16")
PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float16")
TOP_BLOCKS = ("pool", "c5", "p5", "m5")
PIXEL_ORDERS = ("RGB", "BGR")
RESAMPLINGS = ("antialiased", "plain")
POOLS = ("none", "avg", "max")
FORMATS = ("h5", "png")
ENGINES = ("local", "ray")
MODES = ("energy", "mean", "max", "std", "pca", "channels", "similarity")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a checkpoint may not say about its model. None takes it from the file, else the framework's default.

    `mean` and `std` take three numbers, or text such as `"103.53,116.28,123.675"`, in the channel order and the
    value range of the file's framework (0..1 torchvision, 0..255 detectron2 and mmdetection). `stride_in_1x1` and
    `p7_relu` are properties of bottleneck ResNets and of RetinaNet's top block; `norm_eps` of batch norm layers.
    """

    stride_in_1x1: bool | None = option(
        None,
        "Which convolution of a ResNet bottleneck has the stride.",
        "Checkpoint",
        flag="--stride-in-1x1/--stride-in-3x3",
    )
    p7_relu: bool | None = option(None, "Whether a ReLU comes before P7.", "Checkpoint", flag="--p7-relu/--no-p7-relu")
    norm_eps: float | None = option(None, "Epsilon of its batch norms.", "Checkpoint", metavar="X")
    pixel_order: str | None = option(None, "Channel order in training.", "Checkpoint", choices=PIXEL_ORDERS)
    resampling: str | None = option(None, "How images were resized in training.", "Checkpoint", choices=RESAMPLINGS)
    mean: str | Iterable[float] | None = option(
        None,
        "Channel means, in that order; 0..1 for torchvision's layouts, 0..255 for others.",
        "Checkpoint",
        metavar="A,B,C",
    )
    std: str | Iterable[float] | None = option(
        None, "Standard deviations, in the same order and range.", "Checkpoint", metavar="A,B,C"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.norm_eps is not None and not 0 <= self.norm_eps < 1:
            raise FpnxError(f"norm eps {self.norm_eps}: take a number from 0 to 1, such as 1e-5")
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                freeze(self, name, three_numbers(name, getattr(self, name)))
        if self.std is not None and 0.0 in tuple(self.std):
            raise FpnxError("std 0 cannot be divided by: take three numbers above 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(CheckpointConfig):
    """Backbone, pyramid and parameters. `None`: the default of the weights or of the backbone.

    `levels` takes `"P2-P5"`, `"C3,P3"` or a sequence of names, and is kept as a tuple, fine to coarse. `blocks` takes
    `"5,11"`, 11 or a sequence of numbers, and is kept as a tuple.
    """

    backbone: str | None = option(
        None, "Name; by default that of the weights, or resnet50.", "Model", metavar="NAME", complete="backbones"
    )
    weights: str = option(
        "default",
        "default, imagenet, coco, random, a torchvision name, or a file.",
        "Model",
        metavar="NAME|FILE",
        complete="weights",
    )
    weights_key: str | None = option(
        None, "Key in the file under which they are, such as state_dict_ema.", "Model", metavar="KEY"
    )
    weights_prefix: str | None = option(
        None, "What stands before their names in it, where several fit.", "Model", metavar="PREFIX"
    )
    pyramid: str | None = option(
        None,
        f"{', '.join(PYRAMIDS[:-1])} or {PYRAMIDS[-1]} (default: that of the weights, or fpn).",
        "Model",
        metavar="KIND",
        choices=PYRAMIDS,
    )
    tap: str | None = option(
        None,
        "The map that pyramids image and simple are made of (default: the last, such as C5).",
        "Model",
        metavar="C4|C5",
    )
    blocks: str | int | Sequence[int] | None = option(
        None,
        "Blocks of a vision transformer that are its tap, from 0, or -1 (default: the last).",
        "Model",
        metavar="N,…",
    )
    seed: int = option(0, "For parts without trained parameters.", "Model", metavar="N")
    levels: str | Iterable[str] | None = option(
        None, "Such as P2-P5 (default; bifpn and nasfpn P3-P7) or C3,P3.", "Model", metavar="LEVELS", complete="levels"
    )
    channels: int | None = option(None, "Channels of every P level (default 256; bifpn 64).", "Model", metavar="N")
    top_block: str | None = option(
        None, "What P6 and P7 are made from (default: pool for P6 alone, else c5).", "Model", choices=TOP_BLOCKS
    )
    offline: bool = option(False, "Never download (also FPNX_OFFLINE=1).", "Model")

    def __post_init__(self) -> None:
        CheckpointConfig.__post_init__(self)
        if self.levels is not None:
            freeze(self, "levels", parse_levels(self.levels))
        if self.tap is not None:
            freeze(self, "tap", self.tap.upper())
            if not re.fullmatch(r"C[1-9]", self.tap):
                raise FpnxError(f"tap {escape(self.tap)}: take one of the backbone's taps, such as C4 or C5")
        if self.blocks is not None:
            freeze(self, "blocks", parse_blocks(self.blocks))
        check_whole("seed", self.seed, 0, 2**63 - 1)
        if self.channels is not None:
            check_whole("channels", self.channels, 1, 65536)


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which values of images are read, and the size to which images are resized before the network.

    `size`: `"recipe"` (the weights' own), `"native"` (not resized), `224` (stretched to a square), `"480x640"` or
    `(480, 640)` (stretched to height × width); kept as `"recipe"`, `"native"` or (height, width). `short_side` and
    `long_side` keep the aspect ratio instead. `max_pixels` limits both the source image and the network input.
    `bands` (`"4,3,2"`, `(4, 3, 2)`, or one for grey; from 1) and `value_range` (`"full"`, `"0,3000"`, `(0, 3000)` or
    `"P1,P99"`) tell which values become the 8-bit RGB image, see `fpnx.core.pixel_options.PixelOptions`.
    """

    size: str | int | tuple[int, int] = option(
        "recipe",
        "recipe (the weights' own), native, or 224 / 480x640: the whole image is stretched to it.",
        "Input",
        metavar="recipe|native|N|HxW",
        complete=("recipe", "native"),
    )
    short_side: int | None = option(None, "Keep the aspect ratio: shorter side to N.", "Input", metavar="N")
    long_side: int | None = option(None, "With --short-side: longer side at most N.", "Input", metavar="N")
    # The default is the size from which Pillow raises an error: 2 × Image.MAX_IMAGE_PIXELS.
    max_pixels: int = option(178_956_970, "Refuse larger images and inputs.", "Input", metavar="N")
    bands: str | Iterable[int] | None = option(
        None, "Which bands are red, green and blue, or grey; from 1.", "Input", metavar="R,G,B|N"
    )
    value_range: str | Iterable[float] | None = option(
        None, "Values that become 0 and 255 (P: percentiles of each image).", "Input", metavar="full|LO,HI|P1,P99"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bands is not None:
            freeze(self, "bands", parse_bands(self.bands))
        if self.value_range is not None:
            freeze(self, "value_range", parse_value_range(self.value_range))
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

    @property
    def pixels(self) -> PixelOptions:
        """How pixels are read."""
        return PixelOptions(self.bands, self.value_range)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is stored, and how a run treats an existing output and failing images.

    `scratch`: the folder for the working copy of an output in an object store (`s3://bucket/out.h5`); None: the
    folder for temporary files.
    """

    format: str = option("h5", "Features, or a heatmap grid for each image.", "Output", choices=FORMATS)
    dtype: str = option("float32", "How features are stored.", "Output", choices=DTYPES)
    pool: str = option(
        "none", "Pool each level, without the padding.", "Output", metavar="none|avg|max|HxW", complete=POOLS
    )
    resume: bool = option(False, "Continue an earlier run where it ended, or start.", "Output")
    overwrite: bool = option(False, "Replace an existing output, once the new one is complete.", "Output")
    update: bool = option(False, "Compute new and changed images, copy the others from the existing output.", "Output")
    check_content: bool = option(False, "With --update: compare bytes, and trust no size and time.", "Output")
    commit_every: float = option(5.0, "Save results this often: a crash loses no more.", "Output", metavar="SECONDS")
    max_failed: str | int = option("0", "Images that may fail before exit code 1.", "Output", metavar="N|P%")
    strict: bool = option(False, "Stop at the first image that fails.", "Output")
    scratch: str | None = option(
        None,
        "Folder for the working copy of an output in an object store (default $TMPDIR).",
        "Output",
        metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pool not in POOLS and parse_size(self.pool) is None:
            raise FpnxError(f"pool {self.pool!r}: take none, avg, max, or a grid such as 7x7")
        if self.resume and self.overwrite:
            raise FpnxError("resume continues a file and overwrite replaces it: give one of them")
        if self.update and (self.resume or self.overwrite):
            other = "resume" if self.resume else "overwrite"
            raise FpnxError(f"update continues and replaces a file by itself: leave out --{other}")
        if self.update and self.format != "h5":
            raise FpnxError(f"update is for a file of features: leave out --format {self.format}")
        if self.check_content and not self.update:
            raise FpnxError("check content says how images are compared: give --update beside it")
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
    """Device, precision, batch size and threads. Only `precision` changes the numbers.

    `workers` are threads that decode; `cpus` are the processors that a run, or each actor of `--engine ray`, uses.
    """

    device: str = option(
        "auto",
        "auto takes CUDA where there is one; several: cuda:0,cuda:1.",
        "Run",
        metavar="auto|cpu|cuda|mps",
        complete="devices",
    )
    precision: str = option(
        "auto",
        "Of computing: float32, tf32, bfloat16 or float16; auto is IEEE float32.",
        "Run",
        metavar="PRECISION",
        choices=PRECISIONS,
    )
    batch_size: str | int = option("auto", "Images in one forward pass.", "Run", metavar="auto|N", complete=("auto",))
    workers: str | int = option("auto", "Decoding threads.", "Run", metavar="auto|N", complete=("auto",))
    cpus: str | int = option(
        "auto", "Processors to use; with --engine ray, of each actor.", "Run", metavar="auto|N", complete=("auto",)
    )

    def __post_init__(self) -> None:
        check_fields(self)
        names = self.device.split(",")
        one = len(names) == 1 and re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device)
        if not one and not (len(set(names)) == len(names) and all(re.fullmatch(r"cuda:\d+", name) for name in names)):
            raise FpnxError(f"device {self.device!r}: take auto, cpu, cuda, cuda:1, several as cuda:0,cuda:1, or mps")
        for name, limit in (("batch_size", 65536), ("workers", 1024), ("cpus", 4096)):
            freeze(self, name, auto_or_whole(name.replace("_", " "), getattr(self, name), limit))


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Whether this process computes, or the workers of a Ray cluster, shard by shard.

    `shards`: into how many shards the images are cut; `actors`: how many workers compute them.
    """

    engine: str = option(
        "local", "ray: shards on the cluster of RAY_ADDRESS, or on this machine.", "Run", choices=ENGINES
    )
    shards: str | int = option(
        "auto", "With --engine ray: how many files are made.", "Run", metavar="auto|N", complete=("auto",)
    )
    actors: str | int = option(
        "auto",
        "With --engine ray: workers; auto takes the whole cluster.",
        "Run",
        metavar="auto|N",
        complete=("auto",),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("shards", "actors"):
            freeze(self, name, auto_or_whole(name, getattr(self, name), 99_999))
            if self.engine == "local" and getattr(self, name) != "auto":
                raise FpnxError(f"{name} {getattr(self, name)} are for an engine: give --engine ray beside it")


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """What a heatmap shows, and how it is drawn.

    `point` is x and y from the top left of the upright source image, in pixels (`"120,80"`, `(120, 80)`) or as
    shares of its size (`"50%,50%"`); `pick` names channels (`"3,17"`) in place of the `top` strongest; `panel` is
    the longer side of a panel in pixels, which grows where a map has more cells.
    """

    mode: str = option(
        "energy",
        "What a cell shows: energy, mean, max, std, pca, channels or similarity.",
        "Pictures",
        metavar="MODE",
        choices=MODES,
    )
    overlay: bool = option(False, "Draw the maps over the image.", "Pictures")
    per_image: bool = option(False, "A scale (or basis) for each image, not for the file.", "Pictures")
    point: str | tuple[float, float] | None = option(
        None, "For similarity, in source pixels.", "Pictures", metavar="X,Y|X%,Y%"
    )
    top: int = option(9, "For channels: how many, the strongest first.", "Pictures", metavar="N")
    pick: str | Iterable[int] | None = option(
        None, "For channels: these, not the strongest.", "Pictures", metavar="3,17"
    )
    colormap: str = option("viridis", "A matplotlib name.", "Pictures", metavar="NAME")
    panel: int = option(256, "Longer side of a panel, in pixels at least.", "Pictures", metavar="N")

    def __post_init__(self) -> None:
        check_fields(self)
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
        """Check, before any work, that levels of so many channels have the channels that are to be drawn.

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
