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
from fpnx.cli import options as opt
from fpnx.cli.streams import robust_streams
from fpnx.core.config import SAMPLE, BenchmarkConfig, ExtractConfig, VisualizeConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.text import escape

__all__ = ["app", "main"]

FAULT_OF_OURS = 70

app = typer.Typer(
    name="fpnx",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    images: opt.Images,
    backbone: opt.Backbone = ExtractConfig.backbone,
    weights: opt.WeightsChoice = ExtractConfig.weights,
    pyramid: opt.Pyramid = ExtractConfig.pyramid,
    seed: opt.Seed = ExtractConfig.seed,
    levels: opt.Levels = None,
    channels: opt.Channels = ExtractConfig.channels,
    top_block: opt.TopBlock = ExtractConfig.top_block,
    offline: opt.Offline = ExtractConfig.offline,
    stride_in_1x1: opt.StrideIn1x1 = ExtractConfig.stride_in_1x1,
    p7_relu: opt.P7Relu = ExtractConfig.p7_relu,
    norm_eps: opt.NormEps = ExtractConfig.norm_eps,
    pixel_order: opt.PixelOrder = ExtractConfig.pixel_order,
    resampling: opt.Resampling = ExtractConfig.resampling,
    mean: opt.Mean = None,
    std: opt.Std = None,
    size: opt.Size = str(ExtractConfig.size),
    short_side: opt.ShortSide = ExtractConfig.short_side,
    long_side: opt.LongSide = ExtractConfig.long_side,
    max_pixels: opt.MaxPixels = ExtractConfig.max_pixels,
    limit: opt.Limit = ExtractConfig.limit,
    shard: opt.ShardChoice = None,
    output: opt.Output = None,
    format: opt.Format = ExtractConfig.format,  # noqa: A002
    dtype: opt.Dtype = ExtractConfig.dtype,
    pool: opt.Pool = ExtractConfig.pool,
    resume: opt.Resume = ExtractConfig.resume,
    overwrite: opt.Overwrite = ExtractConfig.overwrite,
    commit_every: opt.CommitEvery = ExtractConfig.commit_every,
    max_failed: opt.MaxFailed = str(ExtractConfig.max_failed),
    strict: opt.Strict = ExtractConfig.strict,
    scratch: opt.Scratch = ExtractConfig.scratch,
    dry_run: opt.DryRun = ExtractConfig.dry_run,
    json: opt.Json = False,
    device: opt.Device = ExtractConfig.device,
    precision: opt.Precision = ExtractConfig.precision,
    batch_size: opt.BatchSize = str(ExtractConfig.batch_size),
    workers: opt.Workers = str(ExtractConfig.workers),
    cpus: opt.Cpus = str(ExtractConfig.cpus),
    engine: opt.EngineChoice = ExtractConfig.engine,
    shards: opt.Shards = str(ExtractConfig.shards),
    actors: opt.Actors = str(ExtractConfig.actors),
    mode: opt.Mode = ExtractConfig.mode,
    overlay: opt.Overlay = ExtractConfig.overlay,
    per_image: opt.PerImage = ExtractConfig.per_image,
    point: opt.Point = None,
    top: opt.Top = ExtractConfig.top,
    pick: opt.Pick = None,
    colormap: opt.Colormap = ExtractConfig.colormap,
    panel: opt.Panel = ExtractConfig.panel,
) -> int:
    """Extract pyramid levels from images into an HDF5 file, or draw them.

    [dim]fpnx extract photos/ --weights random[/dim]

    [dim]fpnx extract photos/ -o p.h5 --backbone vgg16 --levels C4,P4 --dtype float16[/dim]
    """
    options = _options(context, ExtractConfig)
    from fpnx.cli import console, views
    from fpnx.commands.extract import extract as run

    with console.Terminal(json) as terminal:
        result = run(images, output, listener=terminal, **options)
    console.show_json(result.to_json()) if json else views.show_result(result)
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
    html: Annotated[str | None, opt.option("Output", "--html", "One page to look through.", "FILE")] = None,
    overwrite: Annotated[
        bool, opt.option("Output", "--overwrite", "Replace what is there.")
    ] = VisualizeConfig.overwrite,
    json: opt.Json = False,
    images: Annotated[
        list[str] | None,
        opt.option("Images", "--images", "Which: name, glob, index or range; repeatable.", "NAME|3|0:10"),
    ] = None,
    limit: Annotated[int, opt.option("Images", "--limit", "At most N images; the rest is counted.", "N")] = (
        VisualizeConfig.limit
    ),
    levels: Annotated[str | None, opt.option("Images", "--levels", "Such as P3-P5 or C3,P3.", "LEVELS")] = None,
    mode: opt.Mode = VisualizeConfig.mode,
    overlay: opt.Overlay = VisualizeConfig.overlay,
    per_image: opt.PerImage = VisualizeConfig.per_image,
    point: opt.Point = None,
    top: opt.Top = VisualizeConfig.top,
    pick: opt.Pick = None,
    colormap: opt.Colormap = VisualizeConfig.colormap,
    panel: opt.Panel = VisualizeConfig.panel,
    backbone: Annotated[
        list[str] | None, opt.option("Photographs", "--backbone", "Repeat it to compare.", "NAME")
    ] = None,
    weights: Annotated[str | None, opt.option("Photographs", "--weights", "As for extract.", "NAME|FILE")] = None,
    seed: Annotated[int | None, opt.option("Photographs", "--seed", "As for extract.", "N")] = None,
    size: Annotated[str | None, opt.option("Photographs", "--size", "As for extract.", "recipe|native|N|HxW")] = None,
    device: Annotated[str | None, opt.option("Photographs", "--device", "As for extract.", "auto|cpu|cuda|mps")] = None,
    offline: Annotated[bool, opt.option("Photographs", "--offline", "Never download.")] = VisualizeConfig.offline,
) -> int:
    """Draw pyramids as heatmap grids, from a file alone or straight from photographs.

    [dim]fpnx visualize out.h5 --mode pca --html out.html[/dim]

    [dim]fpnx visualize cat.jpg --backbone resnet50 --backbone vgg16 --weights random --overlay[/dim]
    """
    options = _options(context, VisualizeConfig)
    from fpnx.cli import console, views
    from fpnx.commands.visualize import visualize as run

    with console.Terminal(json) as terminal:
        result = run(inputs, output, html=html, listener=terminal, **options)
    console.show_json(result.to_json()) if json else views.show_pictures(result)
    return result.exit_code


@app.command()
def benchmark(
    context: typer.Context,
    backbone: opt.Backbones = None,
    weights: opt.WeightsChoice = BenchmarkConfig.weights,
    pyramid: opt.Pyramid = BenchmarkConfig.pyramid,
    seed: opt.Seed = BenchmarkConfig.seed,
    levels: opt.Levels = None,
    channels: opt.Channels = BenchmarkConfig.channels,
    top_block: opt.TopBlock = BenchmarkConfig.top_block,
    offline: opt.Offline = BenchmarkConfig.offline,
    images: opt.Folder = BenchmarkConfig.images,
    size: opt.Size = str(BenchmarkConfig.size),
    short_side: opt.ShortSide = BenchmarkConfig.short_side,
    long_side: opt.LongSide = BenchmarkConfig.long_side,
    max_pixels: opt.MaxPixels = BenchmarkConfig.max_pixels,
    dtype: opt.Dtype = BenchmarkConfig.dtype,
    plot: opt.Plot = BenchmarkConfig.plot,
    json: opt.Json = False,
    device: opt.Device = BenchmarkConfig.device,
    precision: opt.Precisions = str(BenchmarkConfig.precision),
    batch_size: opt.BatchSizes = str(BenchmarkConfig.batch_size),
    workers: opt.Workers = str(BenchmarkConfig.workers),
    repeats: opt.Repeats = str(BenchmarkConfig.repeats),
    baseline: opt.Baseline = BenchmarkConfig.baseline,
) -> int:
    """Show shapes, costs and timings of backbones, batch sizes and precisions, side by side.

    [dim]fpnx benchmark --backbone resnet50 --backbone vgg16 --baseline[/dim]

    [dim]fpnx benchmark --precision float32,bfloat16 --batch-size 1,8 --plot stages.png[/dim]
    """
    options = _options(context, BenchmarkConfig)
    from fpnx.benchmark.plot import draw_stages
    from fpnx.cli import benchmark_view, console
    from fpnx.commands.benchmark import benchmark as run

    with console.Terminal(json) as terminal:
        findings = run(listener=terminal, **options)
    console.show_json(findings.to_json()) if json else benchmark_view.show_benchmark(findings)
    if plot is not None:
        draw_stages(findings, plot)
    return findings.exit_code


@app.command("list")
def list_images(images: opt.Images, limit: opt.Limit = ExtractConfig.limit) -> int:
    """List images once, with sizes and times, for shards that need not look for them again: extract @list.txt.

    [dim]fpnx list photos/ > list.txt[/dim]

    [dim]fpnx list photos/ scans/ --limit 1000 > list.txt[/dim]
    """
    from fpnx.cli import console
    from fpnx.commands.list import list_images as run

    lines, remarks, listing = run(images, limit)
    sys.stdout.flush()
    sys.stdout.buffer.writelines(lines)
    sys.stdout.buffer.flush()
    with console.Terminal() as terminal:
        for remark in remarks:
            terminal.message(remark)
    return 1 if listing.truncated else 0


@app.command()
def merge(
    output: Annotated[str, typer.Argument(help="File to make.")],
    shards: Annotated[list[str], typer.Argument(help="All shards of a run, in any order.")],
    overwrite: opt.Overwrite = ExtractConfig.overwrite,
    json: opt.Json = False,
) -> None:
    """Copy all shards of a run into one file, as a whole run would have written it.

    [dim]fpnx merge out.h5 out.shard-*.h5[/dim]

    [dim]fpnx merge out.h5 'node?/out.shard-*.h5' --overwrite[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands.merge import merge as run

    with console.Terminal(json) as terminal:
        merged = run(output, shards, overwrite=overwrite, listener=terminal)
    console.show_json(merged.to_json()) if json else views.show_merged(merged)


@app.command()
def info(
    files: Annotated[
        list[str], typer.Argument(help="What fpnx extract wrote, also while it is being written; or all shards.")
    ],
    json: opt.Json = False,
) -> None:
    """Show what a file, or a run's shards together, hold, and a snippet that reads it.

    [dim]fpnx info out.h5[/dim]

    [dim]fpnx info out.shard-*.h5 --json[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands.info import info as run
    from fpnx.store.info import store_facts

    with run(files) as store:
        console.show_json(store_facts(store)) if json else views.show_info(store)


@app.command()
def models(
    word: Annotated[str | None, typer.Argument(help="A backbone's name, or a part of names.", metavar="[NAME]")] = None,
    json: opt.Json = False,
) -> None:
    """List the backbones, or show one: taps, parameters, operations, and its weights with their files.

    [dim]fpnx models mobilenet[/dim]

    [dim]fpnx models resnet50 --json[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands import models as catalogue

    if word is not None and catalogue.is_backbone(word):
        found = catalogue.details(word)
        console.show_json(found) if json else views.show_details(found)
    else:
        names = catalogue.matching(word)
        rows = catalogue.entries(names)
        console.show_json(catalogue.overview(rows)) if json else views.show_overview(names, rows)


@app.command()
def verify(
    files: Annotated[
        list[str], typer.Argument(help="What fpnx extract wrote; also an unfinished .part; or all shards of a run.")
    ],
    against: Annotated[
        list[str] | None, opt.option("Compare", "--against", "The images: compute some again and compare.", "IMAGES")
    ] = None,
    sample: Annotated[int, opt.option("Compare", "--sample", "How many to compute again.", "N")] = SAMPLE,
    weights: Annotated[
        str | None, opt.option("Compare", "--weights", "If they are not where they were.", "NAME|FILE")
    ] = None,
    device: opt.Device = ExtractConfig.device,
    offline: opt.Offline = ExtractConfig.offline,
    json: opt.Json = False,
) -> int:
    """Check that a file is whole: its tables agree, and every value is read and as finite as it says.

    That values are those of the images is not checked, unless --against names these. Exit code 1 where it does not
    verify, 2 where it is no file of fpnx's, or cut off.

    [dim]fpnx verify out.shard-*.h5[/dim]

    [dim]fpnx verify out.h5 --against photos/ --sample 20[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands.verify import verify as run

    with console.Terminal(json) as terminal:
        found = run(
            _one_or_more(files),
            against=against,
            sample=sample,
            weights=weights,
            device=device,
            offline=offline,
            listener=terminal,
        )
    console.show_json(found.to_json()) if json else views.show_verification(found)
    return found.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; the one place that turns errors into a line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with robust_streams() as outlets:
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
        what = escape(f"{type(error).__name__}: {error}")
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
    from fpnx.cli.console import complain

    complain(text, wants_json)
    return code
