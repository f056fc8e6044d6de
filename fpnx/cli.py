"""The command line: parse, make a config, one library call, show the result."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fpnx._version import __version__
from fpnx.config import SAMPLE, BenchmarkConfig, ExtractConfig, VisualizeConfig
from fpnx.errors import FpnxError, Interrupted, counted, shown
from fpnx.outlets import lasting_outlets

__all__ = ["app", "main"]

FAULT_OF_OURS = 70

app = typer.Typer(
    name="fpnx",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _option(panel: str, flag: str, help: str, metavar: str | None = None) -> Any:  # noqa: A002
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
    _option("Output", "--scratch", "Where an output for a store is worked on (default $TMPDIR).", "FOLDER"),
]
Format = Annotated[str, _option("Output", "--format", "Features, or a heatmap grid an image.", "h5|png")]
Json = Annotated[bool, _option("Output", "--json", "One JSON document on stdout.")]

Backbone = Annotated[
    str | None,
    _option("Model", "--backbone", "Name; by default the one of the weights, or resnet50.", "NAME"),
]
WeightsChoice = Annotated[
    str,
    _option("Model", "--weights", "default, imagenet, coco, random, a torchvision name, or a file.", "NAME|FILE"),
]
Seed = Annotated[int, _option("Model", "--seed", "For parts without trained parameters.", "N")]
Levels = Annotated[str | None, _option("Model", "--levels", "Such as P2-P5 (default), P3-P7 or C3,P3.", "LEVELS")]
Channels = Annotated[int | None, _option("Model", "--channels", "Of every P level (default 256).", "N")]
TopBlock = Annotated[
    str | None,
    _option(
        "Model",
        "--top-block",
        "Where P6 and P7 come from (default: pool for P6 alone, else c5).",
        "pool|c5|p5|m5",
    ),
]
Offline = Annotated[bool, _option("Model", "--offline", "Never download (also FPNX_OFFLINE=1).")]

# What a file of parameters may not tell; None takes what it says, else its framework's default.
StrideIn1x1 = Annotated[
    bool | None, _option("Checkpoint", "--stride-in-1x1/--stride-in-3x3", "Where bottlenecks of a ResNet stride.")
]
P7Relu = Annotated[bool | None, _option("Checkpoint", "--p7-relu/--no-p7-relu", "Whether a ReLU comes before P7.")]
NormEps = Annotated[float | None, _option("Checkpoint", "--norm-eps", "Epsilon of its batch norms.", "X")]
PixelOrder = Annotated[
    str | None, _option("Checkpoint", "--pixel-order", "Channel order that it was trained on.", "RGB|BGR")
]
Resampling = Annotated[str | None, _option("Checkpoint", "--resampling", "How it resized.", "antialiased|plain")]
Mean = Annotated[
    str | None,
    _option("Checkpoint", "--mean", "In that order; 0..1 for torchvision's layouts, 0..255 for others.", "A,B,C"),
]
Std = Annotated[str | None, _option("Checkpoint", "--std", "Likewise.", "A,B,C")]

Size = Annotated[
    str,
    _option(
        "Input",
        "--size",
        "recipe (the weights' own), native, or 224 / 480x640: the whole image is stretched to it.",
        "recipe|native|N|HxW",
    ),
]
ShortSide = Annotated[int | None, _option("Input", "--short-side", "Keep the aspect: shorter side to N.", "N")]
LongSide = Annotated[int | None, _option("Input", "--long-side", "With --short-side: longer side at most N.", "N")]
MaxPixels = Annotated[int, _option("Input", "--max-pixels", "Refuse larger images and inputs.", "N")]
Limit = Annotated[int | None, _option("Input", "--limit", "Only the first N images.", "N")]
ShardChoice = Annotated[
    str | None,
    _option("Input", "--shard", "Only slice I of N (0 to N-1); auto: SLURM's or RANK's number.", "I/N|auto/N"),
]

Dtype = Annotated[str, _option("Output", "--dtype", "How features are stored.", "float32|float16")]
Pool = Annotated[str, _option("Output", "--pool", "Pool each level, over what is not padding.", "none|avg|max|HxW")]
Resume = Annotated[bool, _option("Output", "--resume", "Continue where an earlier run ended, or start.")]
Overwrite = Annotated[bool, _option("Output", "--overwrite", "Replace what is there, once this run is whole.")]
CommitEvery = Annotated[float, _option("Output", "--commit-every", "What a crash can lose at most.", "SECONDS")]
MaxFailed = Annotated[str, _option("Output", "--max-failed", "Images that may fail before exit code 1.", "N|P%")]
Strict = Annotated[bool, _option("Output", "--strict", "Stop at the first image that fails.")]
DryRun = Annotated[bool, _option("Output", "--dry-run", "Show what would be done, and stop.")]

Device = Annotated[
    str, _option("Run", "--device", "auto takes CUDA where there is one.", "auto|cpu|cuda|cuda:0,cuda:1|mps")
]
Precision = Annotated[
    str, _option("Run", "--precision", "Of computing; auto is float32.", "auto|float32|bfloat16|float16")
]
BatchSize = Annotated[str, _option("Run", "--batch-size", "Images in one forward pass.", "auto|N")]
Workers = Annotated[str, _option("Run", "--workers", "Decoding threads.", "auto|N")]
Cpus = Annotated[str, _option("Run", "--cpus", "Processors to keep busy; of an engine, by each actor.", "auto|N")]
EngineChoice = Annotated[
    str, _option("Run", "--engine", "ray: shards on the cluster of RAY_ADDRESS, or on this machine.", "local|ray")
]
Shards = Annotated[str, _option("Run", "--shards", "Files that an engine makes of the images.", "auto|N")]
Actors = Annotated[str, _option("Run", "--actors", "Workers of an engine; auto takes the whole cluster.", "auto|N")]

Backbones = Annotated[list[str] | None, _option("Model", "--backbone", "Name; again for one more column.", "NAME")]
Precisions = Annotated[str, _option("Run", "--precision", "As for extract; several with commas.", "NAME,…")]
BatchSizes = Annotated[str, _option("Run", "--batch-size", "auto or numbers; several with commas.", "auto|N,…")]
Folder = Annotated[str | None, _option("Input", "--images", "Images to measure with; else some are made.", "FOLDER")]
Repeats = Annotated[str, _option("Run", "--repeats", "Rounds; auto takes about a minute, at least 5 rounds.", "auto|N")]
Baseline = Annotated[bool, _option("Run", "--baseline", "Beside it, the plain script that people write today.")]
Plot = Annotated[str | None, _option("Output", "--plot", "Draw the stages into FILE.png (.svg, .pdf).", "FILE")]


Mode = Annotated[
    str,
    _option("Pictures", "--mode", "What a cell shows.", "energy|mean|max|std|pca|channels|similarity"),
]
Overlay = Annotated[bool, _option("Pictures", "--overlay", "Draw the maps over the image.")]
PerImage = Annotated[bool, _option("Pictures", "--per-image", "A scale (or basis) for each image, not for the file.")]
Point = Annotated[str | None, _option("Pictures", "--point", "For similarity, in source pixels.", "X,Y|X%,Y%")]
Top = Annotated[int, _option("Pictures", "--top", "For channels: how many, the strongest first.", "N")]
Pick = Annotated[str | None, _option("Pictures", "--pick", "For channels: these instead.", "3,17")]
Colormap = Annotated[str, _option("Pictures", "--colormap", "A matplotlib name.", "NAME")]
Panel = Annotated[int, _option("Pictures", "--panel", "Longer side of a panel, in pixels at least.", "N")]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    """Feature pyramids from a folder of images, on disk, in one command."""
    if version:
        print(f"fpnx {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def extract(
    context: typer.Context,
    images: Images,
    backbone: Backbone = ExtractConfig.backbone,
    weights: WeightsChoice = ExtractConfig.weights,
    seed: Seed = ExtractConfig.seed,
    levels: Levels = None,
    channels: Channels = ExtractConfig.channels,
    top_block: TopBlock = ExtractConfig.top_block,
    offline: Offline = ExtractConfig.offline,
    stride_in_1x1: StrideIn1x1 = ExtractConfig.stride_in_1x1,
    p7_relu: P7Relu = ExtractConfig.p7_relu,
    norm_eps: NormEps = ExtractConfig.norm_eps,
    pixel_order: PixelOrder = ExtractConfig.pixel_order,
    resampling: Resampling = ExtractConfig.resampling,
    mean: Mean = None,
    std: Std = None,
    size: Size = str(ExtractConfig.size),
    short_side: ShortSide = ExtractConfig.short_side,
    long_side: LongSide = ExtractConfig.long_side,
    max_pixels: MaxPixels = ExtractConfig.max_pixels,
    limit: Limit = ExtractConfig.limit,
    shard: ShardChoice = ExtractConfig.shard,
    output: Output = None,
    format: Format = ExtractConfig.format,  # noqa: A002
    dtype: Dtype = ExtractConfig.dtype,
    pool: Pool = ExtractConfig.pool,
    resume: Resume = ExtractConfig.resume,
    overwrite: Overwrite = ExtractConfig.overwrite,
    commit_every: CommitEvery = ExtractConfig.commit_every,
    max_failed: MaxFailed = str(ExtractConfig.max_failed),
    strict: Strict = ExtractConfig.strict,
    scratch: Scratch = ExtractConfig.scratch,
    dry_run: DryRun = ExtractConfig.dry_run,
    json: Json = False,
    device: Device = ExtractConfig.device,
    precision: Precision = ExtractConfig.precision,
    batch_size: BatchSize = str(ExtractConfig.batch_size),
    workers: Workers = str(ExtractConfig.workers),
    cpus: Cpus = str(ExtractConfig.cpus),
    engine: EngineChoice = ExtractConfig.engine,
    shards: Shards = str(ExtractConfig.shards),
    actors: Actors = str(ExtractConfig.actors),
    mode: Mode = ExtractConfig.mode,
    overlay: Overlay = ExtractConfig.overlay,
    per_image: PerImage = ExtractConfig.per_image,
    point: Point = None,
    top: Top = ExtractConfig.top,
    pick: Pick = None,
    colormap: Colormap = ExtractConfig.colormap,
    panel: Panel = ExtractConfig.panel,
) -> int:
    """Extract pyramid levels from images into an HDF5 file, or draw them.

    [dim]fpnx extract photos/ --weights random[/dim]

    [dim]fpnx extract photos/ -o p.h5 --backbone vgg16 --levels C4,P4 --dtype float16[/dim]
    """
    options = _options(context, ExtractConfig)
    from fpnx import dispatch, report

    terminal = report.Terminal(json)
    try:
        result = dispatch.extract(images, output, listener=terminal, **options)
    finally:
        terminal.close()
    report.show_json(result.to_json()) if json else report.show_result(result)
    return result.exit_code


@app.command()
def visualize(
    context: typer.Context,
    inputs: Annotated[list[str], typer.Argument(help="Files of features, compared image by image; or photographs.")],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", help="Folder for pictures (default <file>_png, <photo>_png).", rich_help_panel="Output"
        ),
    ] = None,
    html: Annotated[str | None, _option("Output", "--html", "One page to look through.", "FILE")] = None,
    overwrite: Annotated[bool, _option("Output", "--overwrite", "Replace what is there.")] = VisualizeConfig.overwrite,
    json: Json = False,
    images: Annotated[
        list[str] | None, _option("Images", "--images", "Which: name, glob, index or range; repeatable.", "NAME|3|0:10")
    ] = None,
    limit: Annotated[int, _option("Images", "--limit", "At most N images; the rest is counted.", "N")] = (
        VisualizeConfig.limit
    ),
    levels: Annotated[str | None, _option("Images", "--levels", "Such as P3-P5 or C3,P3.", "LEVELS")] = None,
    mode: Mode = VisualizeConfig.mode,
    overlay: Overlay = VisualizeConfig.overlay,
    per_image: PerImage = VisualizeConfig.per_image,
    point: Point = None,
    top: Top = VisualizeConfig.top,
    pick: Pick = None,
    colormap: Colormap = VisualizeConfig.colormap,
    panel: Panel = VisualizeConfig.panel,
    backbone: Annotated[list[str] | None, _option("Photographs", "--backbone", "Repeat it to compare.", "NAME")] = None,
    weights: Annotated[str | None, _option("Photographs", "--weights", "As for extract.", "NAME|FILE")] = None,
    seed: Annotated[int | None, _option("Photographs", "--seed", "As for extract.", "N")] = None,
    size: Annotated[str | None, _option("Photographs", "--size", "As for extract.", "recipe|native|N|HxW")] = None,
    device: Annotated[str | None, _option("Photographs", "--device", "As for extract.", "auto|cpu|cuda|mps")] = None,
    offline: Annotated[bool, _option("Photographs", "--offline", "Never download.")] = VisualizeConfig.offline,
) -> int:
    """Draw pyramids as heatmap grids, from a file alone or straight from photographs.

    [dim]fpnx visualize out.h5 --mode pca --html out.html[/dim]

    [dim]fpnx visualize cat.jpg --backbone resnet50 --backbone vgg16 --weights random --overlay[/dim]
    """
    options = _options(context, VisualizeConfig)
    from fpnx import pictures, report

    terminal = report.Terminal(json)
    try:
        result = pictures.visualize(inputs, output, html=html, listener=terminal, **options)
    finally:
        terminal.close()
    report.show_json(result.to_json()) if json else report.show_pictures(result)
    return result.exit_code


@app.command()
def benchmark(
    context: typer.Context,
    backbone: Backbones = None,
    weights: WeightsChoice = BenchmarkConfig.weights,
    seed: Seed = BenchmarkConfig.seed,
    levels: Levels = None,
    channels: Channels = BenchmarkConfig.channels,
    top_block: TopBlock = BenchmarkConfig.top_block,
    offline: Offline = BenchmarkConfig.offline,
    images: Folder = BenchmarkConfig.images,
    size: Size = str(BenchmarkConfig.size),
    short_side: ShortSide = BenchmarkConfig.short_side,
    long_side: LongSide = BenchmarkConfig.long_side,
    max_pixels: MaxPixels = BenchmarkConfig.max_pixels,
    dtype: Dtype = BenchmarkConfig.dtype,
    plot: Plot = BenchmarkConfig.plot,
    json: Json = False,
    device: Device = BenchmarkConfig.device,
    precision: Precisions = str(BenchmarkConfig.precision),
    batch_size: BatchSizes = str(BenchmarkConfig.batch_size),
    workers: Workers = str(BenchmarkConfig.workers),
    repeats: Repeats = str(BenchmarkConfig.repeats),
    baseline: Baseline = BenchmarkConfig.baseline,
) -> int:
    """Show shapes, costs and timings of backbones, batch sizes and precisions, side by side.

    [dim]fpnx benchmark --backbone resnet50 --backbone vgg16 --baseline[/dim]

    [dim]fpnx benchmark --precision float32,bfloat16 --batch-size 1,8 --plot stages.png[/dim]
    """
    options = _options(context, BenchmarkConfig)
    from fpnx import benchmarks, charts, report, scoreboard

    terminal = report.Terminal(json)
    try:
        findings = benchmarks.benchmark(listener=terminal, **options)
    finally:
        terminal.close()
    report.show_json(findings.to_json()) if json else scoreboard.show_findings(findings)
    if plot is not None:
        charts.draw_stages(findings, plot)
    return findings.exit_code


@app.command("list")
def list_images(images: Images, limit: Limit = ExtractConfig.limit) -> int:
    """List images once, with sizes and times, for shards that need not look for them again: extract @list.txt.

    [dim]fpnx list photos/ > list.txt[/dim]

    [dim]fpnx list photos/ scans/ --limit 1000 > list.txt[/dim]
    """
    from fpnx import report
    from fpnx.images import find, list_lines

    listing = find(images, limit)
    sys.stdout.flush()
    sys.stdout.buffer.writelines(list_lines(listing))
    sys.stdout.buffer.flush()
    told = f"{counted(len(listing.sources), 'image')}, {counted(listing.skipped, 'other file')} passed over"
    for line in (*listing.remarks, *listing.lost, told):
        report.Terminal().message(line)
    return 1 if listing.lost else 0


@app.command()
def merge(
    output: Annotated[str, typer.Argument(help="File to make.")],
    shards: Annotated[list[str], typer.Argument(help="All shards of a run, in any order.")],
    overwrite: Overwrite = ExtractConfig.overwrite,
    json: Json = False,
) -> None:
    """Copy all shards of a run into one file, as a whole run would have written it.

    [dim]fpnx merge out.h5 out.shard-*.h5[/dim]

    [dim]fpnx merge out.h5 'node?/out.shard-*.h5' --overwrite[/dim]
    """
    from fpnx import merging, report

    terminal = report.Terminal(json)
    try:
        merged = merging.merge(output, shards, overwrite=overwrite, listener=terminal)
    finally:
        terminal.close()
    report.show_json(merged.to_json()) if json else report.show_merged(merged)


@app.command()
def info(
    files: Annotated[
        list[str], typer.Argument(help="What fpnx extract wrote, also while it is being written; or all shards.")
    ],
    json: Json = False,
) -> None:
    """Show what a file, or a run's shards together, hold, and a snippet that reads it.

    [dim]fpnx info out.h5[/dim]

    [dim]fpnx info out.shard-*.h5 --json[/dim]
    """
    from fpnx import report, sets

    with sets.open_pyramids(_one_or_more(files)) as opened:
        report.show_json(report.store_facts(opened)) if json else report.show_info(opened)


@app.command()
def models(
    word: Annotated[str | None, typer.Argument(help="A backbone's name, or a part of names.", metavar="[NAME]")] = None,
    json: Json = False,
) -> None:
    """List the backbones, or show one: taps, parameters, operations, and its weights with their files.

    [dim]fpnx models mobilenet[/dim]

    [dim]fpnx models resnet50 --json[/dim]
    """
    from fpnx import catalogue, report, tables

    if word is not None and catalogue.is_backbone(word):
        found = catalogue.details(word)
        report.show_json(found) if json else tables.show_details(found)
    else:
        names = catalogue.matching(word)
        rows = catalogue.entries(names)
        report.show_json(catalogue.overview(rows)) if json else tables.show_overview(names, rows)


@app.command()
def verify(
    files: Annotated[
        list[str], typer.Argument(help="What fpnx extract wrote; also an unfinished .part; or all shards of a run.")
    ],
    against: Annotated[
        list[str] | None, _option("Compare", "--against", "The images: compute some again and compare.", "IMAGES")
    ] = None,
    sample: Annotated[int, _option("Compare", "--sample", "How many to compute again.", "N")] = SAMPLE,
    weights: Annotated[
        str | None, _option("Compare", "--weights", "If they are not where they were.", "NAME|FILE")
    ] = None,
    device: Device = ExtractConfig.device,
    offline: Offline = ExtractConfig.offline,
    json: Json = False,
) -> int:
    """Check that a file is whole: its tables agree, and every value is read and as finite as it says.

    That values are those of the images is not checked, unless --against names these. Exit code 1 where it does not
    verify, 2 where it is no file of fpnx's, or cut off.

    [dim]fpnx verify out.shard-*.h5[/dim]

    [dim]fpnx verify out.h5 --against photos/ --sample 20[/dim]
    """
    from fpnx import report, verification

    terminal = report.Terminal(json)
    try:
        found = verification.verify(
            _one_or_more(files),
            against=against,
            sample=sample,
            weights=weights,
            device=device,
            offline=offline,
            listener=terminal,
        )
    finally:
        terminal.close()
    report.show_json(found.to_json()) if json else report.show_verification(found)
    return found.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; the one place that turns errors into a line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with lasting_outlets() as outlets:
        code = _exit_code(given, "--json" in given)
        # Whoever went away having read enough, as `head` does, takes nothing from the work: its code stands.
        if why := outlets.refusal():
            return _complain(why, False, 2)
        return code


def _exit_code(given: list[str], wants_json: bool) -> int:
    try:
        if any(not argument or re.fullmatch(r"--[a-z0-9-]+=", argument) for argument in given):
            raise FpnxError("an argument is empty: leave it out, or put a name or a value there")
        return int(app(given, prog_name="fpnx", standalone_mode=False) or 0)
    except FpnxError as error:
        return _complain(str(error), wants_json, 2)
    except Interrupted as error:
        return _complain(str(error), wants_json, 128 + error.signum)
    except (KeyboardInterrupt, typer.Abort):  # Typer makes the one into the other
        return _complain("interrupted", wants_json, 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
            command = getattr(getattr(error, "ctx", None), "command_path", "fpnx")
            return _complain(f"{error.format_message()} ({command} --help shows what there is)", wants_json, 2)
        if os.environ.get("FPNX_TRACEBACK"):
            traceback.print_exc()
        what = shown(f"{type(error).__name__}: {error}")
        hint = "this is a fault of fpnx; FPNX_TRACEBACK=1 shows where, please report it"
        return _complain(f"{what} ({hint})", wants_json, FAULT_OF_OURS)


def _options(context: typer.Context, config: type) -> dict[str, Any]:
    """The parameters of a command that are fields of `config`."""
    names = [field.name for field in dataclasses.fields(config)]
    return {name: context.params[name] for name in names if name in context.params}


def _one_or_more(files: list[str]) -> str | list[str]:
    """A single file stands for itself; several are shards."""
    return files[0] if len(files) == 1 else files


def _complain(text: str, wants_json: bool, code: int) -> int:
    from fpnx.report import complain

    complain(text, wants_json)
    return code
