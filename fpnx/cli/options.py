"""The options of the command line: what each is called, what it says of itself, and the panel that it stands in."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = [
    "Actors",
    "Backbone",
    "Backbones",
    "Baseline",
    "BatchSize",
    "BatchSizes",
    "Channels",
    "Colormap",
    "CommitEvery",
    "Cpus",
    "Device",
    "DryRun",
    "Dtype",
    "EngineChoice",
    "Folder",
    "Format",
    "Images",
    "Json",
    "Levels",
    "Limit",
    "LongSide",
    "MaxFailed",
    "MaxPixels",
    "Mean",
    "Mode",
    "NormEps",
    "Offline",
    "option",
    "Output",
    "Overlay",
    "Overwrite",
    "P7Relu",
    "Panel",
    "PerImage",
    "Pick",
    "PixelOrder",
    "Plot",
    "Point",
    "Pool",
    "Precision",
    "Precisions",
    "Pyramid",
    "Repeats",
    "Resampling",
    "Resume",
    "Scratch",
    "Seed",
    "ShardChoice",
    "Shards",
    "ShortSide",
    "Size",
    "Std",
    "Strict",
    "StrideIn1x1",
    "Top",
    "TopBlock",
    "WeightsChoice",
    "Workers",
]


def option(panel: str, flag: str, help: str, metavar: str | None = None) -> Any:  # noqa: A002
    """An option in one of the help's panels."""
    return typer.Option(flag, help=help, metavar=metavar, rich_help_panel=panel)


Images = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders (searched recursively), .tar archives, s3://, gs:// and https:// addresses, "
        "or @list.txt with a path a line."
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        help="File or folder to make (default out.h5, out_png), or s3://bucket/out.h5.",
        rich_help_panel="Output",
    ),
]
Scratch = Annotated[
    str | None,
    option("Output", "--scratch", "Where an output for a store is worked on (default $TMPDIR).", "FOLDER"),
]
Format = Annotated[str, option("Output", "--format", "Features, or a heatmap grid an image.", "h5|png")]
Json = Annotated[bool, option("Output", "--json", "One JSON document on stdout.")]

Backbone = Annotated[
    str | None,
    option("Model", "--backbone", "Name; by default the one of the weights, or resnet50.", "NAME"),
]
WeightsChoice = Annotated[
    str,
    option("Model", "--weights", "default, imagenet, coco, random, a torchvision name, or a file.", "NAME|FILE"),
]
Pyramid = Annotated[
    str | None, option("Model", "--pyramid", "Kind of pyramid (default: that of the weights, or fpn).", "fpn|pafpn")
]
Seed = Annotated[int, option("Model", "--seed", "For parts without trained parameters.", "N")]
Levels = Annotated[str | None, option("Model", "--levels", "Such as P2-P5 (default), P3-P7 or C3,P3.", "LEVELS")]
Channels = Annotated[int | None, option("Model", "--channels", "Of every P level (default 256).", "N")]
TopBlock = Annotated[
    str | None,
    option(
        "Model",
        "--top-block",
        "Where P6 and P7 come from (default: pool for P6 alone, else c5).",
        "pool|c5|p5|m5",
    ),
]
Offline = Annotated[bool, option("Model", "--offline", "Never download (also FPNX_OFFLINE=1).")]

# What a file of parameters may not tell; None takes what it says, else its framework's default.
StrideIn1x1 = Annotated[
    bool | None, option("Checkpoint", "--stride-in-1x1/--stride-in-3x3", "Where bottlenecks of a ResNet stride.")
]
P7Relu = Annotated[bool | None, option("Checkpoint", "--p7-relu/--no-p7-relu", "Whether a ReLU comes before P7.")]
NormEps = Annotated[float | None, option("Checkpoint", "--norm-eps", "Epsilon of its batch norms.", "X")]
PixelOrder = Annotated[
    str | None, option("Checkpoint", "--pixel-order", "Channel order that it was trained on.", "RGB|BGR")
]
Resampling = Annotated[str | None, option("Checkpoint", "--resampling", "How it resized.", "antialiased|plain")]
Mean = Annotated[
    str | None,
    option("Checkpoint", "--mean", "In that order; 0..1 for torchvision's layouts, 0..255 for others.", "A,B,C"),
]
Std = Annotated[str | None, option("Checkpoint", "--std", "Likewise.", "A,B,C")]

Size = Annotated[
    str,
    option(
        "Input",
        "--size",
        "recipe (the weights' own), native, or 224 / 480x640: the whole image is stretched to it.",
        "recipe|native|N|HxW",
    ),
]
ShortSide = Annotated[int | None, option("Input", "--short-side", "Keep the aspect: shorter side to N.", "N")]
LongSide = Annotated[int | None, option("Input", "--long-side", "With --short-side: longer side at most N.", "N")]
MaxPixels = Annotated[int, option("Input", "--max-pixels", "Refuse larger images and inputs.", "N")]
Limit = Annotated[int | None, option("Input", "--limit", "Only the first N images.", "N")]
ShardChoice = Annotated[
    str | None,
    option("Input", "--shard", "Only slice I of N (0 to N-1); auto: SLURM's or RANK's number.", "I/N|auto/N"),
]

Dtype = Annotated[str, option("Output", "--dtype", "How features are stored.", "float32|float16")]
Pool = Annotated[str, option("Output", "--pool", "Pool each level, over what is not padding.", "none|avg|max|HxW")]
Resume = Annotated[bool, option("Output", "--resume", "Continue where an earlier run ended, or start.")]
Overwrite = Annotated[bool, option("Output", "--overwrite", "Replace what is there, once this run is whole.")]
CommitEvery = Annotated[float, option("Output", "--commit-every", "What a crash can lose at most.", "SECONDS")]
MaxFailed = Annotated[str, option("Output", "--max-failed", "Images that may fail before exit code 1.", "N|P%")]
Strict = Annotated[bool, option("Output", "--strict", "Stop at the first image that fails.")]
DryRun = Annotated[bool, option("Output", "--dry-run", "Show what would be done, and stop.")]

Device = Annotated[
    str, option("Run", "--device", "auto takes CUDA where there is one.", "auto|cpu|cuda|cuda:0,cuda:1|mps")
]
Precision = Annotated[
    str, option("Run", "--precision", "Of computing; auto is IEEE float32.", "auto|float32|tf32|bfloat16|float16")
]
BatchSize = Annotated[str, option("Run", "--batch-size", "Images in one forward pass.", "auto|N")]
Workers = Annotated[str, option("Run", "--workers", "Decoding threads.", "auto|N")]
Cpus = Annotated[str, option("Run", "--cpus", "Processors to keep busy; of an engine, by each actor.", "auto|N")]
EngineChoice = Annotated[
    str, option("Run", "--engine", "ray: shards on the cluster of RAY_ADDRESS, or on this machine.", "local|ray")
]
Shards = Annotated[str, option("Run", "--shards", "Files that an engine makes of the images.", "auto|N")]
Actors = Annotated[str, option("Run", "--actors", "Workers of an engine; auto takes the whole cluster.", "auto|N")]

Backbones = Annotated[list[str] | None, option("Model", "--backbone", "Name; again for one more column.", "NAME")]
Precisions = Annotated[str, option("Run", "--precision", "As for extract; several with commas.", "NAME,…")]
BatchSizes = Annotated[str, option("Run", "--batch-size", "auto or numbers; several with commas.", "auto|N,…")]
Folder = Annotated[str | None, option("Input", "--images", "Images to measure with; else some are made.", "FOLDER")]
Repeats = Annotated[str, option("Run", "--repeats", "Rounds; auto takes about a minute, at least 5 rounds.", "auto|N")]
Baseline = Annotated[bool, option("Run", "--baseline", "Beside it, the plain script that people write today.")]
Plot = Annotated[str | None, option("Output", "--plot", "Draw the stages into FILE.png (.svg, .pdf).", "FILE")]


Mode = Annotated[
    str,
    option("Pictures", "--mode", "What a cell shows.", "energy|mean|max|std|pca|channels|similarity"),
]
Overlay = Annotated[bool, option("Pictures", "--overlay", "Draw the maps over the image.")]
PerImage = Annotated[bool, option("Pictures", "--per-image", "A scale (or basis) for each image, not for the file.")]
Point = Annotated[str | None, option("Pictures", "--point", "For similarity, in source pixels.", "X,Y|X%,Y%")]
Top = Annotated[int, option("Pictures", "--top", "For channels: how many, the strongest first.", "N")]
Pick = Annotated[str | None, option("Pictures", "--pick", "For channels: these instead.", "3,17")]
Colormap = Annotated[str, option("Pictures", "--colormap", "A matplotlib name.", "NAME")]
Panel = Annotated[int, option("Pictures", "--panel", "Longer side of a panel, in pixels at least.", "N")]
