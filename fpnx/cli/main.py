"""The command line: one short function for each command, exit codes, and errors as one line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fpnx._version import __version__
from fpnx.cli.completion import completer
from fpnx.cli.options import config_options
from fpnx.cli.streams import robust_streams
from fpnx.core.analysis_config import CompareConfig, ExportConfig, ProbeConfig
from fpnx.core.config import SAMPLE, BenchmarkConfig, ExtractConfig, OutputConfig, VisualizeConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.interrupts import while_loading
from fpnx.core.predict_config import PredictConfig
from fpnx.core.text import escape
from fpnx.core.train_config import TrainConfig

__all__ = ["app", "main"]

INTERNAL_ERROR = 70  # exit code; EX_SOFTWARE of sysexits.h

Images = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders (searched recursively), .tar archives, s3://, gs:// and https:// addresses, "
        "or @list.txt with a path a line."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel="Output")]

app = typer.Typer(
    name="fpnx",
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
@config_options(ExtractConfig, ["Model", "Checkpoint", "Input", "Output", "Run", "Pictures"])
def extract(
    images: Images,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="File or folder to make (default out.h5, out_png), or s3://bucket/out.h5.",
            rich_help_panel="Output",
        ),
    ] = None,
    *,
    json: Json = False,
    **options: Any,
) -> int:
    """Extract pyramid levels from images into an HDF5 file, or draw them.

    [dim]fpnx extract photos/ --weights random[/dim]

    [dim]fpnx extract photos/ -o p.h5 --backbone vgg16 --levels C4,P4 --dtype float16[/dim]
    """
    with while_loading():
        from fpnx.cli import console, views
        from fpnx.commands.extract import extract as run

    with console.Terminal(json) as terminal:
        result = run(images, output, listener=terminal, **options)
    console.show_json(result.to_json()) if json else views.show_result(result)
    return result.exit_code


@app.command()
@config_options(VisualizeConfig, ["Output", "Images", "Pictures", "Photographs"])
def visualize(
    inputs: Annotated[list[str], typer.Argument(help="Files of features, compared image by image; or photographs.")],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", help="Folder for pictures (default <file>_png, <photo>_png).", rich_help_panel="Output"
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="One HTML page with all pictures.", rich_help_panel="Output"),
    ] = None,
    *,
    json: Json = False,
    **options: Any,
) -> int:
    """Draw pyramids as heatmap grids, from a file alone or straight from photographs.

    [dim]fpnx visualize out.h5 --mode pca --html out.html[/dim]

    [dim]fpnx visualize cat.jpg --backbone resnet50 --backbone vgg16 --weights random --overlay[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands.visualize import visualize as run

    with console.Terminal(json) as terminal:
        result = run(inputs, output, html=html, listener=terminal, **options)
    console.show_json(result.to_json()) if json else views.show_pictures(result)
    return result.exit_code


@app.command()
@config_options(BenchmarkConfig, ["Model", "Input", "Output", "Run"])
def benchmark(*, json: Json = False, **options: Any) -> int:
    """Show shapes, costs and timings of backbones, batch sizes and precisions, side by side.

    [dim]fpnx benchmark --backbone resnet50 --backbone vgg16 --baseline[/dim]

    [dim]fpnx benchmark --precision float32,bfloat16 --batch-size 1,8 --plot stages.png[/dim]
    """
    from fpnx.benchmark.plot import draw_stages
    from fpnx.cli import benchmark_view, console
    from fpnx.commands.benchmark import benchmark as run

    with console.Terminal(json) as terminal:
        result = run(listener=terminal, **options)
    console.show_json(result.to_json()) if json else benchmark_view.show_benchmark(result)
    if options["plot"] is not None:
        draw_stages(result, options["plot"])
    return result.exit_code


@app.command()
@config_options(TrainConfig, ["Labels", "Training", "Model", "Checkpoint", "Input", "Output", "Run"])
def train(
    inputs: Annotated[
        list[str], typer.Argument(help="Images, as for extract; or a file of C levels, or several, read as one.")
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="File to make.", rich_help_panel="Output")
    ] = "model.safetensors",
    *,
    json: Json = False,
    **options: Any,
) -> int:
    """Train a pyramid and a head for classification, detection or segmentation, from your own labels.

    [dim]fpnx train birds/ --labels folders -o birds.safetensors --backbone mobilenet_v2[/dim]

    [dim]fpnx train taps.h5 --labels instances.json --head fcos --epochs 12[/dim]
    """
    from fpnx.cli import console, training_view
    from fpnx.commands.train import train as run

    with console.Terminal(json) as terminal:
        result = run(inputs, output=output, listener=terminal, **options)
    if console.is_first_process():
        console.show_json(result.to_json()) if json else training_view.show_training(result)
    return result.exit_code


@app.command()
@config_options(PredictConfig, ["Model", "Results", "Output", "Input", "Run", "Checkpoint"])
def predict(
    images: Images,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="File to make (default predictions.json, predictions.csv), or folder of masks (predictions_masks).",
            rich_help_panel="Output",
        ),
    ] = None,
    *,
    json: Json = False,
    **options: Any,
) -> int:
    """Find objects in images with a detector, or name their classes, and score it with labels.

    [dim]fpnx predict photos/ --weights coco --draw found/[/dim]

    [dim]fpnx predict photos/ --weights parts.safetensors --labels instances.json[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands.predict import predict_to_file as run

    with console.Terminal(json) as terminal:
        result = run(images, output, listener=terminal, **options)
    console.show_json(result.to_json()) if json else views.show_predictions(result)
    return result.exit_code


@app.command()
@config_options(ProbeConfig, ["Labels", "Levels", "Classifiers", "Output"])
def probe(
    files: Annotated[list[str], typer.Argument(help="Files of fpnx extract, side by side; read as one: 'out.*.h5'.")],
    *,
    json: Json = False,
    **options: Any,
) -> None:
    """Show which level tells your classes apart: accuracy of a linear classifier and of nearest neighbours.

    Images, boxes or pixels are classified, each from those of other images (cross-validation).

    [dim]fpnx probe out.h5 --labels folders[/dim]

    [dim]fpnx probe a.h5 b.h5 --labels instances.json --plot levels.png[/dim]
    """
    from fpnx.cli import analysis_view, console
    from fpnx.commands.probe import probe as run

    with console.Terminal(json) as terminal:
        result = run(files, listener=terminal, **options)
    console.show_json(result.to_json()) if json else analysis_view.show_probe(result)


@app.command()
@config_options(CompareConfig, ["Levels", "Output"])
def compare(
    files: Annotated[list[str], typer.Argument(help="One file of fpnx extract, or two; read as one: 'out.*.h5'.")],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Draw the matrices: .png, .svg or .pdf.", rich_help_panel="Output"
        ),
    ] = None,
    *,
    json: Json = False,
    **options: Any,
) -> None:
    """Show how alike the levels of two files are, or those of one: linear CKA and RSA, image by image.

    [dim]fpnx compare a.h5 b.h5 -o matrix.png[/dim]

    [dim]fpnx compare out.h5 --levels P2-P5 --json[/dim]
    """
    from fpnx.cli import analysis_view, console
    from fpnx.commands.compare import compare as run

    with console.Terminal(json) as terminal:
        result = run(files, output, listener=terminal, **options)
    console.show_json(result.to_json()) if json else analysis_view.show_comparison(result)


@app.command()
@config_options(ExportConfig, ["Levels", "Output"])
def export(
    files: Annotated[list[str], typer.Argument(help="A file of fpnx extract, or several, read as one.")],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="Folder to make.", rich_help_panel="Output")
    ],
    *,
    json: Json = False,
    **options: Any,
) -> None:
    """Write features for other tools: NumPy arrays of vectors, a safetensors file an image, or descriptors for hloc.

    [dim]fpnx export out.h5 -o vectors/[/dim]

    [dim]fpnx export out.h5 --to hloc --levels C5 -o hloc/[/dim]
    """
    from fpnx.cli import analysis_view, console
    from fpnx.commands.export import export as run

    with console.Terminal(json) as terminal:
        result = run(files[0] if len(files) == 1 else files, output, listener=terminal, **options)
    console.show_json(result.to_json()) if json else analysis_view.show_exported(result)


@app.command()
def models(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name of a backbone, or part of a name.", metavar="[NAME]", autocompletion=completer("backbones")
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the backbones, or show one: taps, parameters, operations, and its weights with their files.

    [dim]fpnx models mobilenet[/dim]

    [dim]fpnx models resnet50 --json[/dim]
    """
    from fpnx.cli import console, models_view
    from fpnx.commands import models as catalogue

    if name is not None and catalogue.is_backbone(name):
        details = catalogue.details(name)
        console.show_json(details) if json else models_view.show_details(details)
    else:
        names = catalogue.matching(name)
        rows = catalogue.entries(names)
        kinds = catalogue.pyramids() if name is None else []
        console.show_json(catalogue.overview(rows)) if json else models_view.show_overview(names, rows, kinds)


@app.command()
def info(
    files: Annotated[
        list[str],
        typer.Argument(help="A file of fpnx extract, also while it is written; or several, read as one."),
    ],
    json: Json = False,
) -> None:
    """Show what a file, or several read as one, hold, and Python code that reads it.

    [dim]fpnx info out.h5[/dim]

    [dim]fpnx info march.h5 april.h5 --json[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands.info import info as run
    from fpnx.store.info import store_facts

    with run(files) as store:
        console.show_json(store_facts(store)) if json else views.show_info(store)


@app.command()
@config_options(ExtractConfig, ["Compare", "Run", "Model", "Output"], only=["device", "offline"])
def verify(
    files: Annotated[
        list[str], typer.Argument(help="A file of fpnx extract, also an unfinished .part; or several, read as one.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="IMAGES", help="The images: compute some again and compare.", rich_help_panel="Compare"),
    ] = None,
    sample: Annotated[
        int, typer.Option(metavar="N", help="How many to compute again.", rich_help_panel="Compare")
    ] = SAMPLE,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="The weights, if they are no longer where the file says.",
            rich_help_panel="Compare",
            autocompletion=completer("weights"),
        ),
    ] = None,
    *,
    json: Json = False,
    **options: Any,
) -> int:
    """Check that a file is complete: tables agree, all values can be read, NaN and infinite values are counted right.

    Values are compared with those of the images only if --against names these.

    Exit code 1: the file does not verify. Exit code 2: it is not a file of fpnx, or it is truncated.

    [dim]fpnx verify out.shard-*.h5[/dim]

    [dim]fpnx verify out.h5 --against photos/ --sample 20[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands.verify import verify as run

    file = files[0] if len(files) == 1 else files
    with console.Terminal(json) as terminal:
        result = run(file, against=against, sample=sample, weights=weights, listener=terminal, **options)
    console.show_json(result.to_json()) if json else views.show_verification(result)
    return result.exit_code


@app.command()
@config_options(OutputConfig, ["Output"], only=["overwrite"])
def merge(
    output: Annotated[str, typer.Argument(help="File to make.")],
    files: Annotated[list[str], typer.Argument(help="All shards of a run, or files with the same options.")],
    *,
    json: Json = False,
    **options: Any,
) -> None:
    """Copy all shards of a run, or files with the same options, into one file, as one run would have written it.

    An image that is in several files, with the same bytes, is taken once.

    [dim]fpnx merge out.h5 out.shard-*.h5[/dim]

    [dim]fpnx merge year.h5 march.h5 april.h5 --overwrite[/dim]
    """
    from fpnx.cli import console, views
    from fpnx.commands.merge import merge as run

    with console.Terminal(json) as terminal:
        merged = run(output, files, listener=terminal, **options)
    console.show_json(merged.to_json()) if json else views.show_merged(merged)


@app.command("list")
@config_options(ExtractConfig, ["Input"], only=["limit"])
def list_images(images: Images, **options: Any) -> int:
    """List images once, with sizes and times, so that shards need not search for them again: extract @list.txt.

    [dim]fpnx list photos/ > list.txt[/dim]

    [dim]fpnx list photos/ scans/ --limit 1000 > list.txt[/dim]
    """
    from fpnx.cli import console
    from fpnx.commands.list import list_images as run

    result = run(images, **options)
    sys.stdout.flush()
    sys.stdout.buffer.writelines(result.lines)
    sys.stdout.buffer.flush()
    with console.Terminal() as terminal:
        for text in result.messages:
            terminal.message(text)
    return result.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code. Every error becomes one line on stderr here."""
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    with robust_streams() as streams:
        code = _exit_code(command_line, "--json" in command_line)
        # A reader that closed its pipe early, as `head` does, is no error: the exit code stays.
        if error := streams.write_error():
            return _show_error(error, False, 2)
        return code


def _exit_code(command_line: list[str], wants_json: bool) -> int:
    try:
        _refuse_empty(command_line)
        return int(app(command_line, prog_name="fpnx", standalone_mode=False) or 0)
    except FpnxError as error:
        return _show_error(str(error), wants_json, 2)
    except Interrupted as error:
        return _show_error(str(error), wants_json, 128 + error.signum)
    except (KeyboardInterrupt, typer.Abort):  # Typer turns the first into the second
        return _show_error("interrupted", wants_json, 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's usage errors: an unknown option, a missing argument
            command = getattr(getattr(error, "ctx", None), "command_path", "fpnx")
            return _show_error(f"{error.format_message()} ({command} --help shows what there is)", wants_json, 2)
        if os.environ.get("FPNX_TRACEBACK"):
            traceback.print_exc()
        what = escape(f"{type(error).__name__}: {error}")
        hint = "internal error of fpnx; FPNX_TRACEBACK=1 shows where, please report it"
        return _show_error(f"{what} ({hint})", wants_json, INTERNAL_ERROR)


def _refuse_empty(command_line: Sequence[str]) -> None:
    """Refuse an empty argument, as `"$NAME"` gives without the variable, and say which it is."""
    for position, argument in enumerate(command_line):
        before = command_line[position - 1] if position else ""
        if re.fullmatch(r"--[a-z0-9-]+=", argument):
            raise FpnxError(f"the value of {argument[:-1]} is empty: put one there, or leave the option out")
        if not argument and re.fullmatch(r"--[a-z0-9-]+|-[a-z]", before):
            raise FpnxError(f"the value of {before}, or an argument after it, is empty: put one there, or leave it out")
        if not argument:
            place = f"after {escape(before)!r}" if before else "before all others"
            raise FpnxError(f"argument {position + 1}, {place}, is empty: put a name there, or leave it out")


def _show_error(text: str, wants_json: bool, code: int) -> int:
    from fpnx.cli.console import show_error

    show_error(text, wants_json)
    return code
