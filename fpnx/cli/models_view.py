"""The output of `fpnx models`: one line for each backbone, or the details of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpnx.core.text import escape

__all__ = ["show_details", "show_overview"]

LEVELS = ("C2", "C3", "C4", "C5")


def show_overview(
    names: Sequence[str], rows: Iterable[Mapping[str, Any]], kinds: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Print a line for each backbone as soon as it is known: channels at strides 4 to 32, parameters, weights.

    The kinds of pyramid follow.
    """
    console, refused = Console(highlight=False), []
    width = max(map(len, (*names, "backbone")))

    def line(name: str, cells: Iterable[str], parameters: str, weights: str) -> None:
        text = "".join([f"{name:<{width}}", *(f"{cell:>8}" for cell in cells), f"{parameters:>12}", f"  {weights}"])
        console.print(Text(text), soft_wrap=True)

    for i, row in enumerate(rows):
        if "refused" in row:
            refused.append(f"no pyramid: {row['name']} {row['refused']}")
            continue
        if i == len(refused):
            line("backbone", [f"{level} /{2 ** int(level[1:])}" for level in LEVELS], "parameters", "weights")
        channels = {tap["level"]: str(tap["channels"]) for tap in row["taps"]}
        cells = [channels.get(level, "–" if channels else "") for level in LEVELS]
        line(row["name"], cells, _millions(row["parameters"]), ", ".join(row["weights"]))
    if len(refused) < len(names):
        console.print("\nchannels at each stride; parameters of the whole classifier; weights are also names and files")
    for reason in refused:
        console.print(Text(reason), soft_wrap=True)
    if kinds:
        _show_pyramids(console, kinds)
    console.print("fpnx models NAME shows one of them; fpnx models timm/ lists those of timm, if it is installed")


def _show_pyramids(console: Console, kinds: Sequence[Mapping[str, Any]]) -> None:
    """Print what `--pyramid` takes, and which backbones each kind is for."""
    width = max(len(kind["name"]) for kind in kinds)
    console.print("\nkinds of pyramid (--pyramid)")
    for kind in kinds:
        of = "one map: any backbone, --tap chooses the map" if kind["of_one_map"] else "maps of several strides"
        console.print(Text(f"  {kind['name']:<{width}}  {kind['summary']}; of {of}"), soft_wrap=True)
    single = ", ".join(kind["name"] for kind in kinds if kind["of_one_map"])
    lines = (
        "\nvision transformers have maps of one stride, and are given as they are: --levels C4 by default, --blocks",
        f"chooses the blocks; of pyramids they take {single}",
        "  timm/NAME  vit, deit, eva, dinov2, dinov3 and others: fpnx models timm/vit",
        "  hf/NAME    backbones of Hugging Face, such as hf/facebook/dinov2-small, or a folder",
    )
    console.print(Text("\n".join(lines)), soft_wrap=True)


def show_details(backbone: Mapping[str, Any]) -> None:
    """Print the taps, parameters and operations of a backbone, and its weights with their files."""
    console = Console(highlight=False)
    height, width = backbone["input_size"]
    table = Table(box=None, pad_edge=False)
    for name in ("level", "stride", "channels", "height × width", "tapped at"):
        table.add_column(name, justify="right" if name in ("stride", "channels", "height × width") else "left")
    for tap in backbone["taps"]:
        table.add_row(
            tap["level"], str(tap["stride"]), str(tap["channels"]), f"{tap['height']} × {tap['width']}", tap["node"]
        )
    parameters, gflops = backbone["parameters"], backbone["gflops"]
    with_head = f" ({_millions(parameters['published'])} with its head)" if parameters["published"] else ""
    console.print(Text(f"{backbone['name']} at {height}×{width}"))
    console.print(table)
    side = backbone["only_squares_in_multiples_of"]
    if side:
        console.print(f"takes squares in multiples of {side} only")
    pyramid_parameters, pyramid_gflops = "", ""
    console.print(f"--pyramid {', '.join(backbone['pyramids'])}")
    if backbone["blocks"]:
        (tap,) = (tap["level"] for tap in backbone["taps"])
        console.print(f"--levels {tap} by default, the map of the last block; --blocks 0 to {backbone['blocks'] - 1}")
    else:
        channels, count = backbone["pyramid_channels"], _millions(parameters["pyramid"])
        pyramid_parameters = f", pyramid of {channels} channels {count}"
        pyramid_gflops = f", pyramid {gflops['pyramid']:.2f}"
    console.print(f"parameters: body {_millions(parameters['body'])}{with_head}{pyramid_parameters}")
    console.print(f"GFLOPs: body {gflops['body']:.2f}{pyramid_gflops} (a multiply-add counts as 2)", end="\n\n")
    console.print(Text("--weights random: trains nothing; recipe " + backbone["recipe"]), soft_wrap=True)
    for each in backbone["weights"]:
        also = f" (also: {', '.join(each['also'])})" if each["also"] else ""
        lines = [
            f"--weights {each['name']}{also}",
            f"  trained: {' and '.join(each['trains'])}",
            f"  recipe:  {each['recipe']}",
            f"  from:    {each['url']}",
            f"  file:    {escape(each['file'])}{' (exists)' if each['there'] else ''}",
        ]
        console.print(Text("\n".join(lines)), soft_wrap=True)


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} M"
