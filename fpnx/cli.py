"""The command line: parse, make a config, one library call, show the result."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fpnx._version import __version__
from fpnx.config import SAMPLE, BenchmarkConfig, ExtractConfig
from fpnx.errors import FpnxError, Interrupted

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
    list[str], typer.Argument(help="Files, folders (searched recursively), or @list.txt with a path a line.")
]
Output = Annotated[str, typer.Option("-o", "--output", help="The file to make.", rich_help_panel="Output")]
Json = Annotated[bool, _option("Output", "--json", "One JSON document on stdout.")]

Backbone = Annotated[
    str | None,
    _option("Model", "--backbone", "Name; by default the one of the weights, or resnet50.", "NAME"),
]
WeightsChoice = Annotated[
    str,
    _option("Model", "--weights", "default, imagenet, random, a torchvision name, or a file.", "NAME|FILE"),
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
        "pool|c5|p5",
    ),
]
Offline = Annotated[bool, _option("Model", "--offline", "Never download (also FPNX_OFFLINE=1).")]

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

Backbones = Annotated[list[str] | None, _option("Model", "--backbone", "Name; again for one more column.", "NAME")]
Precisions = Annotated[str, _option("Run", "--precision", "As for extract; several with commas.", "NAME,…")]
BatchSizes = Annotated[str, _option("Run", "--batch-size", "auto or numbers; several with commas.", "auto|N,…")]
Folder = Annotated[str | None, _option("Input", "--images", "Images to measure with; else some are made.", "FOLDER")]
Repeats = Annotated[str, _option("Run", "--repeats", "Rounds; auto takes about a minute, at least 5 rounds.", "auto|N")]
Baseline = Annotated[bool, _option("Run", "--baseline", "Beside it, the plain script that people write today.")]
Plot = Annotated[str | None, _option("Output", "--plot", "Draw the stages into FILE.png (.svg, .pdf).", "FILE")]


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
    size: Size = str(ExtractConfig.size),
    short_side: ShortSide = ExtractConfig.short_side,
    long_side: LongSide = ExtractConfig.long_side,
    max_pixels: MaxPixels = ExtractConfig.max_pixels,
    limit: Limit = ExtractConfig.limit,
    output: Output = "out.h5",
    dtype: Dtype = ExtractConfig.dtype,
    pool: Pool = ExtractConfig.pool,
    resume: Resume = ExtractConfig.resume,
    overwrite: Overwrite = ExtractConfig.overwrite,
    commit_every: CommitEvery = ExtractConfig.commit_every,
    max_failed: MaxFailed = str(ExtractConfig.max_failed),
    strict: Strict = ExtractConfig.strict,
    dry_run: DryRun = ExtractConfig.dry_run,
    json: Json = False,
    device: Device = ExtractConfig.device,
    precision: Precision = ExtractConfig.precision,
    batch_size: BatchSize = str(ExtractConfig.batch_size),
    workers: Workers = str(ExtractConfig.workers),
) -> int:
    """Extract pyramid levels from images into an HDF5 file.

    [dim]fpnx extract photos/ --weights random[/dim]

    [dim]fpnx extract photos/ -o p.h5 --backbone vgg16 --levels C4,P4 --dtype float16[/dim]
    """
    options = _options(context, ExtractConfig)
    from fpnx import extraction, report

    terminal = report.Terminal(json)
    try:
        result = extraction.extract(images, output, listener=terminal, **options)
    finally:
        terminal.close()
    report.show_json(result.to_json()) if json else report.show_result(result)
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


@app.command()
def info(
    file: Annotated[str, typer.Argument(help="What fpnx extract wrote, also while it is being written.")],
    json: Json = False,
) -> None:
    """Show what a file holds, and a snippet that reads it.

    [dim]fpnx info out.h5[/dim]

    [dim]fpnx info out.h5.part --json[/dim]
    """
    from fpnx import report, store

    with store.open_store(file) as opened:
        report.show_json(report.store_facts(opened)) if json else report.show_info(opened)


@app.command()
def verify(
    file: Annotated[str, typer.Argument(help="What fpnx extract wrote; also an unfinished .part.")],
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
    """Check that all of a file is there and is what it says. Reads every value; exit code 1 where it is not.

    [dim]fpnx verify out.h5[/dim]

    [dim]fpnx verify out.h5 --against photos/ --sample 20[/dim]
    """
    from fpnx import report, verification

    terminal = report.Terminal(json)
    try:
        found = verification.verify(
            file,
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
    wants_json = "--json" in given
    try:
        return int(app(given, prog_name="fpnx", standalone_mode=False) or 0)
    except FpnxError as error:
        return _complain(str(error), wants_json, 2)
    except Interrupted as error:
        return _complain(str(error), wants_json, 128 + error.signum)
    except KeyboardInterrupt:
        return _complain("interrupted", wants_json, 130)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
            return _complain(f"{error.format_message()} (fpnx --help shows what there is)", wants_json, 2)
        if os.environ.get("FPNX_TRACEBACK"):
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        hint = "this is a fault of fpnx; FPNX_TRACEBACK=1 shows where, please report it"
        return _complain(f"{what} ({hint})", wants_json, FAULT_OF_OURS)


def _options(context: typer.Context, config: type) -> dict[str, Any]:
    """The parameters of a command that are fields of `config`."""
    return {field.name: context.params[field.name] for field in dataclasses.fields(config)}


def _complain(text: str, wants_json: bool, code: int) -> int:
    from fpnx.report import complain

    complain(text, wants_json)
    return code
