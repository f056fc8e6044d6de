"""README and docs/: every command and snippet runs, every link and name leads somewhere.

Commands that take a cluster or another machine are parsed: their options and commands must exist. Those with addresses
run in tests/extraction/test_upload.py, where there is an object store.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
import typer
from PIL import Image

import fpnx as package
from fpnx.cli.main import app
from fpnx.core.config import ExtractConfig
from fpnx.core.provenance import Provenance
from fpnx.models.necks.image_pyramid import ImagePyramid
from fpnx.models.necks.registry import NECKS
from fpnx.models.preprocessing import Recipe
from tests.helpers.boxes import label_pictures
from tests.helpers.documentation import (
    BLOCK,
    PAGES,
    blocks,
    command_lines,
    fpnx_command,
    lines_of,
    text_of,
    without_blocks,
)
from tests.helpers.files import ROOT, copied, noise_image
from tests.helpers.measuring import measure_briefly
from tests.helpers.trained import CATEGORIES, trained_file
from tests.test_architecture import LAYERS

LANGUAGES = {"sh", "bash", "python", ""}
COMMAND_LINE = typer.main.get_command(app)
COMMANDS = COMMAND_LINE.commands  # type: ignore[attr-defined]
OTHER_TOOLS = {"--index-url", "--array"}  # options in running text that are not fpnx's: of pip, of sbatch
RUN_ELSEWHERE = ".ci/run"  # runs the README's two commands for a fresh machine
README = "README.md"
TRAINED = "fpnx extract sample_images/ -o trained.h5"
TUTORIAL = ROOT / "docs" / "tutorial.md"  # its blocks follow from each other: one test runs them in order
ELSEWHERE = [page for page in PAGES if page != TUTORIAL]


@pytest.fixture
def place(tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the commands name."""
    shutil.copytree(samples, tmp_path / "sample_images")
    copied(samples, tmp_path / "photos", 3)
    shutil.copy(samples / "animals" / "chelsea.jpg", tmp_path / "cat.jpg")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos", "photos")
    (tmp_path / "scenes").mkdir()
    scene = np.random.default_rng(0).integers(0, 3000, (5, 80, 96)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "scenes" / "a.tif", scene, photometric="minisblack", planarconfig="separate")
    label_pictures(tmp_path / "photos", tmp_path / "instances.json", 2)
    labelled_images(tmp_path)
    (tmp_path / "list.txt").write_text("photos/00001.jpg\nphotos/00000.jpg\n")
    for i, name in enumerate(("robin/a.jpg", "robin/b.jpg", "wren/c.jpg", "wren/d.jpg")):
        (tmp_path / "birds" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(i, (64, 64)).save(tmp_path / "birds" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labelled_images(folder: Path) -> None:
    """Four cats and four dogs: folders as classes, a table, and boxes with outlines in COCO's format."""
    images, objects, rows = [], [], ["path,label"]
    for number in range(8):
        kind = ("cats", "dogs")[number % 2]
        name = f"{kind}/{number}.png"
        (folder / "animals" / kind).mkdir(parents=True, exist_ok=True)
        noise_image(number, (64, 48)).save(folder / "animals" / name)
        rows.append(f"{name},{kind}")
        images.append({"id": number, "file_name": name, "width": 64, "height": 48})
        outline = [[8, 8, 40, 8, 40, 32, 8, 32]]
        objects.append({"id": number, "image_id": number, "category_id": 1 + number % 2, "bbox": [8, 8, 32, 24],
                        "area": 768, "iscrowd": 0, "segmentation": outline})  # fmt: skip
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    labels = {"images": images, "annotations": objects, "categories": categories}
    (folder / "animals.json").write_text(json.dumps(labels))
    (folder / "labels.csv").write_text("\n".join(rows))


def value_of(option: str, arguments: list[str]) -> str:
    """What a command gives for an option; empty where it does not give it."""
    return arguments[arguments.index(option) + 1] if option in arguments else ""


def make_parts() -> None:
    """`parts.safetensors`, a file as `fpnx train` writes it, and `instances.json` with labels of the photographs."""
    trained_file(Path("parts.safetensors"), "fcos", convolutions=1)
    names = sorted(path.name for path in Path("photos").iterdir())
    labels = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "category_id": 2, "bbox": [9, 9, 90, 80]} for i in range(len(names))],
        "categories": [{"id": each.id, "name": each.name} for each in CATEGORIES],
    }
    Path("instances.json").write_text(json.dumps(labels))


MADE: dict[tuple[object, ...], Path] = {}


def extract(fpnx: Callable[..., Any], output: str, *arguments: object) -> None:
    """`fpnx extract ARGUMENTS -o OUTPUT`, done once: a second call copies the file."""
    if arguments in MADE:
        shutil.copy(MADE[arguments], output)
        return
    assert fpnx("extract", *arguments, "-o", output)[0] == 0
    MADE[arguments] = Path(output).absolute().with_suffix(".made")
    shutil.copy(output, MADE[arguments])


def prepare(arguments: list[str], fpnx: Callable[..., Any]) -> None:
    """Make the files that a command reads."""
    small = ("--weights", "random", "--size", "64", "--channels", "8", "--backbone", "mobilenet_v2")
    reads = [argument for argument in arguments[1:] if argument.endswith(".h5")] if arguments[0] != "extract" else []
    if "taps.h5" in reads and not os.path.exists("taps.h5"):
        extract(fpnx, "taps.h5", "photos", "--levels", "C2-C5", *small[:4], *small[6:])
    elif any("out.shard-" in name for name in reads):
        assert fpnx("extract", "photos", "--shard", "0/1", *small)[0] == 0
    elif "out.h5" in reads:
        # The default backbone and levels, as for `verify --against`, which computes them again.
        extract(fpnx, "out.h5", "sample_images", "--weights", "random", "--size", "64", "--channels", "8")
    elif "lite2.h5" in reads:
        extract(fpnx, "lite2.h5", "sample_images", "--levels", "C2-C5,P2-P5", *small)
    elif "animals.h5" in reads:
        extract(fpnx, "animals.h5", "animals", "--levels", "C3-C5,P3-P5", *small)
    elif "march.h5" in reads:
        for folder, name in (("sample_images/animals", "march.h5"), ("photos", "april.h5")):
            extract(fpnx, name, folder, *small)
    elif arguments[0] == "compare":
        for name in reads:
            extract(fpnx, name, "sample_images", "--levels", "C3-C5", *small)
    if predictions := value_of("--predictions", arguments):
        box = {"image_id": 0, "category_id": 17, "category_name": "cat", "bbox": [90, 60, 200, 180], "score": 0.9}
        Path(predictions).write_text(json.dumps([{**box, "file_name": "animals/chelsea.jpg", "level": "P5"}]))
    weights = value_of("--weights", arguments)
    if weights in ("model.safetensors", "parts.safetensors"):
        package.save_weights(package.create_model("mobilenet_v2", weights="random", channels=8), weights)
    if weights == "parts.safetensors" and arguments[0] == "predict":
        make_parts()
    if weights == "checkpoint.pth":  # as training code writes it
        model = package.create_model("resnet18", weights="random", levels="C2-C5")
        state = {f"module.{name}": value for name, value in model.body.state_dict().items()}
        torch.save({"model": state, "epoch": 3}, weights)


def quick(arguments: list[str]) -> list[str]:
    """A command as it stands, with options that make it quick and keep it off the network."""
    command = arguments[0]
    if command == "extract" and "--weights" not in arguments:
        arguments = [*arguments, "--weights", "random"]
    if command == "extract" and "--backbone" not in arguments and value_of("--weights", arguments) == "random":
        arguments = [*arguments, "--backbone", "mobilenet_v2"]
    if command == "extract" and not {"--size", "--short-side"} & set(arguments):
        arguments = [*arguments, "--size", "64"]
    if command == "predict":
        arguments = [*arguments, "--size", "64"]
    if command == "train":
        small = ["--weights", "random", "--size", "64", "--backbone", "mobilenet_v2"]
        kept = [] if "taps.h5" in arguments else [*small[:4], *([] if "--backbone" in arguments else small[4:])]
        arguments = [*arguments, *kept, "--channels", "8", "--levels", "P5", "--epochs", "1"]
    if command == "benchmark":
        named = [] if "--backbone" in arguments else ["--backbone", "mobilenet_v2"]
        narrow = [] if "image" in arguments else ["--channels", "8"]
        arguments = [*arguments, *named, "--size", "64", *narrow, "--repeats", "1"]
    return [{"800": "80", "1333": "133", "384": "64"}.get(argument, argument) for argument in arguments]


def one_by_one(arguments: list[str]) -> list[list[str]]:
    """The commands of a line with `&&` between them."""
    if "&&" not in arguments:
        return [arguments]
    place = arguments.index("&&")
    return [arguments[:place], *one_by_one(arguments[place + 2 :])]


def is_slow(line: str) -> bool:
    """The table of all backbones, which measures each of them where the cache is empty, and benchmarks of several."""
    return line == "fpnx models" or line.startswith("fpnx benchmark --")


def names_weights(arguments: list[str]) -> bool:
    """Whether a command asks for published weights, which no test can download."""
    weights = value_of("--weights", arguments)
    return weights not in ("", "random") and "." not in weights.replace("_Weights.", "")


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=pytest.mark.slow if is_slow(line) else ()) for line in command_lines(ELSEWHERE)],
)
def test_command_lines(
    line: str, place: Path, fpnx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = shlex.split(line)[1:]
    measure_briefly(monkeypatch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # without weights that were downloaded before
    if line == TRAINED or names_weights(arguments):
        code, _, error = fpnx(*arguments, "--offline")
        assert code == 2
        # All else about it is right: it ends where it would download.
        assert re.search(r"cannot be had \(downloads are forbidden\): put \S+\.(pth|safetensors) from https://", error)
        assert line != TRAINED or "put maskrcnn_resnet50_fpn_v2" in error
        return
    if ">" in arguments:  # the shell's
        arguments = arguments[: arguments.index(">")]
    for part in one_by_one(arguments):
        prepare(part, fpnx)
        code, _, error = fpnx(*quick(part))
        assert code == 0, error


def test_the_trained_command_is_that_of_the_readme() -> None:
    assert TRAINED in command_lines([ROOT / README])


@pytest.mark.parametrize(
    "page", [page for page in ELSEWHERE if any(blocks(page, "python"))], ids=lambda page: page.name
)
def test_python(page: Path, place: Path, fpnx: Callable[..., Any]) -> None:
    extract(fpnx, "out.h5", "sample_images", "--weights", "random")
    if "animals.h5" in page.read_text():
        prepare(["probe", "animals.h5"], fpnx)
    if page.name == "predict.md":
        make_parts()
    names: dict[str, Any] = {"__name__": "snippet"}
    torch.manual_seed(0)  # of the head's first parameters
    for block in blocks(page, "python"):
        exec(block, names)
    for name, check in EXPECTED.get(page.name, {}).items():
        assert check(names[name]), name


# What makes the tutorial quick and keeps it off the network. The images stay as large as they are drawn.
QUICK_TUTORIAL = {
    'weights="imagenet"': 'weights="random"',
    "--backbone timm/tf_efficientnet_lite0": "--backbone mobilenet_v2 --weights random --size 64",
    "--backbone resnet50 --backbone vgg16 ": "",  # visualization.md has several
    "--weights random --levels": "--weights random --size 64 --levels",
    'make("shapes/train", 160': 'make("shapes/train", 6',
    'make("shapes/test", 40': 'make("shapes/test", 8',  # with objects of all sizes, which have scores
    "range(200)": "range(18)",
    "034.jpg": "001.jpg",
    "--epochs 12": "--epochs 1",
    "--epochs 20": "--epochs 1",
    '"epochs": 12': '"epochs": 1',
    "--channels 64": "--channels 8",
    '"channels": 64': '"channels": 8',
}


LAST_PART = "## Four pyramids"  # trains four times


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["most", "whole"])
def test_the_tutorial_in_order(
    whole: bool, place: Path, fpnx: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = TUTORIAL.read_text()
    for written, quicker in QUICK_TUTORIAL.items():
        assert written in text
        text = text.replace(written, quicker)
    first, part, last = text.partition(LAST_PART)
    assert part
    names: dict[str, Any] = {"__name__": "snippet"}
    printed, shown = [], []
    for language, block in BLOCK.findall(first + last if whole else first):
        if language == "python":
            exec(block, names)
            printed.append(capsys.readouterr().out)
        elif language == "sh":
            for line in filter(None, map(fpnx_command, block.splitlines())):
                code, _, error = fpnx(*shlex.split(line)[1:])
                assert code == 0, error
        else:
            shown.append(block)
    assert printed[:3] == shown[:3]  # shapes, and that P4 is what the page computes
    assert names["predictor"].classes == {1: "circle", 2: "square", 3: "triangle"}
    for name in ("three/chelsea.jpg.png", "found/001.jpg.png", "levels/001.jpg.png", "probe.png", "kinds.csv"):
        assert Path(name).is_file(), name
    if whole:
        assert [line.split()[:3] for line in printed[-1].splitlines()] == [
            line.split()[:3] for line in shown[-1].splitlines()
        ]


# What the variables of a page's snippets must hold in the end.
EXPECTED: dict[str, dict[str, Callable[[Any], bool]]] = {
    "analysis.md": {
        "best": lambda row: row.linear.samples == 8,
        "result": lambda result: result.cka.shape == result.rsa.shape == (4, 4),
    },
    "README.md": {"item": lambda item: item.path == "animals/chelsea.jpg"},
    "python.md": {
        "item": lambda item: item.path == "animals/chelsea.jpg",
        "loss": lambda loss: loss.item() < 10,
        "pyramid": lambda pyramid: pyramid["P2"].shape == (1, 256, 57, 76),
        "coffee": lambda pyramid: pyramid["P2"].shape == (1, 256, 56, 56),
        "own": lambda model: model.channels["C2"] == 16 and not model.training,
        "result": lambda result: result.done == 5,
        "checked": lambda checked: checked.problems == (),
        "every": lambda regions: len(regions) == 6,
        "both": lambda store: store.paths[0] == "chelsea.jpg" and store.paths[-1] == "00002.jpg",
        "joined": lambda data: len(data) == len(data.store),
    },
    "format.md": {
        "features": lambda array: array.shape == (256, 56, 56),
        "several": lambda array: array.shape[0] == 256 and array.ndim == 3,
        "vectors": lambda array: array.shape == (6, 256),
        "classes": lambda names: names == ["dog", "cat"] * 3,
    },
    "predict.md": {
        "sure": lambda boxes: boxes.shape[1] == 4,
        "several": lambda several: len(several) == 2,
        "result": lambda result: (result.run.done, result.exit_code) == (3, 0),
    },
    "training.md": {"result": lambda result: len(result.epochs) == 2, "model": lambda m: m.levels == ("P4", "P5")},
    "visualization.md": {"heatmap": lambda array: array.shape == (28, 28)},
}


def test_every_block_has_a_language_that_is_checked() -> None:
    for page in PAGES:
        assert len(re.findall(r"^```", page.read_text(), re.MULTILINE)) % 2 == 0, f"{page.name}: a block is open"
        assert {language for language, _ in text_of(page)} <= LANGUAGES, page.name


def test_the_two_commands_for_a_fresh_machine() -> None:
    first, second = (line for line in lines_of(ROOT / README) if line.startswith("python3 -m venv"))
    assert "fpnx extract sample_images/ --weights random" in first
    assert second.endswith("-m pytest")
    script = (ROOT / RUN_ELSEWHERE).read_text()
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    assert "--weights random" in script  # by which it finds them
    assert "'pytest'" in script


def shell_commands(*languages: str) -> list[list[str]]:
    """Every command of the shell blocks, `&&` and assignments before it taken apart."""
    commands = []
    for page in PAGES:
        for language in languages:
            for block in blocks(page, language):
                for line in block.splitlines():
                    for part in re.split(r"\s&&\s", line):
                        words = shlex.split(part, comments=True)
                        while words and re.match(r"[A-Z_]+=", words[0]):
                            words.pop(0)
                        if words and words not in commands:
                            commands.append(words)
    return commands


def test_other_commands_are_such_as_exist() -> None:
    """Of the commands that are not fpnx's: extras, scripts and modules that they name are there."""
    project = (ROOT / "pyproject.toml").read_text()
    for words in shell_commands("sh", "bash"):
        tool = words[0].rpartition("/")[2]
        if tool == "torchrun":
            assert COMMANDS[words[words.index("fpnx") + 1]].make_context("fpnx", words[words.index("fpnx") + 2 :])
            continue
        if tool == "fpnx" or tool in ("ray", "export", "ruff", "mypy"):  # fpnx and Ray: below
            continue
        if tool == "pip":
            assert words[1] == "install"
            extras = re.findall(r"(?:fpnx|\.)\[(\w+)\]", " ".join(words))
            for extra in extras:
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"there is no extra {extra}"
            continue
        assert tool in ("python", "python3"), f"{' '.join(words)}: a command that no test knows"
        if words[1] == "-m":
            assert words[2] in ("venv", "pytest")
        else:
            assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("words", [words for words in shell_commands("bash") if words[0] == "fpnx"], ids=" ".join)
def test_commands_for_a_cluster_can_be_parsed(words: list[str]) -> None:
    command = COMMANDS[words[1]]
    context = command.make_context("fpnx", words[2:])
    if words[1] == "extract":
        given = {
            field.name: context.params[field.name] for field in fields(ExtractConfig) if field.name in context.params
        }
        assert ExtractConfig(**given).engine == "ray"


@pytest.mark.slow
@pytest.mark.skipif(not __import__("importlib.util").util.find_spec("ray"), reason="Ray is not installed")
@pytest.mark.parametrize("words", [words for words in shell_commands("bash") if words[0] == "ray"], ids=" ".join)
def test_commands_of_ray_have_these_options(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", words[1], "--help"], capture_output=True, text=True, check=True
    )
    for option in words[2:]:
        assert option.split("=")[0] in done.stdout


def test_the_example_output_is_what_comes_out(
    place: Path, fpnx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # however long the folder's own name is
    code, out, _ = fpnx("extract", "sample_images/", "--weights", "random")
    assert code == 0
    example = next(block for block in blocks(ROOT / README, "") if block.startswith("$ fpnx extract"))
    numbers = re.compile(r"\d+(\.\d+)?( [GMT]B)?")

    def skeleton(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if line and not line.startswith("$")]
        return [re.sub(r"\s+", " ", numbers.sub("#", line)).strip() for line in lines]

    shown, real = skeleton(example), skeleton(out)
    real = [line.replace(str(place) + "/", "").replace(re.sub(numbers, "#", str(place)) + "/", "") for line in real]
    assert len(shown) == len(real)
    assert [line.split(" ")[0] for line in shown] == [line.split(" ")[0] for line in real]
    level_lines = [line for line in example.splitlines() if re.match(r"P\d ", line)]
    assert level_lines == [line.rstrip() for line in out.splitlines() if re.match(r"P\d ", line)]


@pytest.mark.slow
def test_the_slurm_script(place: Path) -> None:
    script = next(block for page in PAGES for block in blocks(page, "") if block.startswith("#!/bin/bash"))
    (place / "run.sbatch").write_text(script.replace("fpnx extract", "fpnx extract --weights random --size 64"))
    (place / "fpnx").write_text(f'#!/bin/sh\nexec {sys.executable} -m fpnx "$@"\n')
    (place / "fpnx").chmod(0o755)
    count = int(re.findall(r"TASK_ID/(\d+)", script)[0])
    assert f"--array=0-{count - 1} " in script
    for task in (0, count // 3):  # of the photographs there: none, and the first
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{place}{os.pathsep}{os.environ['PATH']}"
        assert subprocess.run(["bash", "run.sbatch"], cwd=place, env=environment).returncode == 0
    assert len(list(place.glob("out.shard-*.h5"))) == 2


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert links(page), "a page without links"
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the project"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(lines_of(ROOT / README)) <= 150
    linked = {(ROOT / link).resolve() for link in links(ROOT / README) if not link.startswith("https://")}
    assert linked >= {page.resolve() for page in PAGES if page.name != README}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_contents_list_names_every_section(page: Path) -> None:
    listed = [link[1:] for link in re.findall(r"^- \[[^\]]+\]\((#[^)]+)\)$", without_blocks(page), re.MULTILINE)]
    headings = re.findall(r"^## (.+)$", without_blocks(page), re.MULTILINE)
    if listed:
        assert listed == [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_pictures_are_small_and_whole() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(".png")}
    assert shown == set((ROOT / "docs" / "images").iterdir())
    for path in shown:
        assert path.stat().st_size < 200_000
        with Image.open(path) as picture:
            picture.load()


def code_words(page: Path) -> Iterator[str]:
    """What stands between backticks in running text and tables."""
    yield from re.findall(r"`([^`\n]+)`", without_blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_text_exist(page: Path) -> None:
    known = {
        name
        for command in (COMMAND_LINE, *COMMANDS.values())
        for each in command.params
        for name in (*each.opts, *each.secondary_opts)
    }
    for word in code_words(page):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", word):
            assert option in known | OTHER_TOOLS | {"--help"}, f"{page.name}: {word}"
        if match := re.fullmatch(r"((?:fpnx|tests|docs)/[\w./-]*|\.ci/\w+|pyproject\.toml)", word):
            assert (ROOT / match[1]).exists(), f"{page.name}: {word}"
        if match := re.match(r"fpnx\.([A-Za-z]\w*)", word):
            assert match[1] in package.__all__, f"{page.name}: {word}"
        if match := re.match(r"fpnx ([a-z]+)(?: |$)", word):
            assert match[1] in COMMANDS, f"{page.name}: {word}"


def test_every_command_is_described() -> None:
    described = {arguments[1] for line in command_lines(every=True) if len(arguments := shlex.split(line)) > 1}
    assert described >= set(COMMANDS)


def test_the_layers_are_those_that_are_held() -> None:
    page = ROOT / "docs" / "architecture.md"
    assert LAYERS.strip() + "\n" in blocks(page, "")
    packages = re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)
    assert sorted(packages) == sorted(LAYERS.split())


# The page on the file format is a contract: it is compared to real files.
FORMAT = ROOT / "docs" / "format.md"


def rows_of(heading: str, text: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading, cell by cell."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None, f"there is no table of {heading}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]


def keys_of(heading: str, text: str) -> set[str]:
    """The names in the first column of a table."""
    return {name for row in rows_of(heading, text) for name in re.findall(r"`([^`]+)`", row[0])}


@pytest.fixture(scope="module")
def files(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of one size, one of several, a shard, a merged file, an updated one, and one of regions."""
    folder = tmp_path_factory.mktemp("files")
    options: dict[str, Any] = {"backbone": "mobilenet_v2", "weights": "random", "levels": "C3,P3", "channels": 8}
    package.extract(samples, folder / "one.h5", size=64, **options)
    package.extract(samples, folder / "several.h5", short_side=64, dtype="float16", pyramid="pafpn", **options)
    for index in range(2):
        package.extract(samples, folder / "out.h5", size=64, shard=f"{index}/2", **options)
    package.merge(folder / "merged.h5", str(folder / "out.shard-*.h5"))
    package.extract(samples, folder / "updated.h5", size=64, limit=2, **options)
    package.extract(samples, folder / "updated.h5", size=64, update=True, **options)
    labels = label_pictures(samples / "animals", folder / "boxes.json", 3)
    package.extract(samples, folder / "regions.h5", size=64, boxes=labels, **{**options, "levels": "P3-P4"})
    return {path.stem: path for path in folder.glob("*.h5")}


TYPES = {"UTF-8 string": np.dtype(object), "fixed string, 240 bytes, UTF-8": np.dtype("S240")}


def datasets(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset of a file, under the path that the format page has for it."""
    for table in ("images", "stats"):
        yield from ((f"/{table}/{name}", held) for name, held in file[table].items())
    for size, levels in file["pyramids"].items():
        assert re.fullmatch(r"[1-9]\d*x[1-9]\d*", size)
        yield from (("/pyramids/<H>x<W>/<level>", held) for held in levels.values())
    yield from ((f"/regions/{name}", held) for name, held in file.get("regions", {}).items())


def test_datasets_are_those_of_the_format_page(files: dict[str, Path]) -> None:
    text = FORMAT.read_text()
    of_maps = {row[0].strip("`"): row[1:] for row in rows_of("path", text)}
    of_regions = {row[0].strip("`"): row[1:] for row in rows_of("path", text[text.index("A file of [regions]") :])}
    for path in files.values():
        with h5py.File(path, "r") as file:
            found = list(datasets(file))
            rows = {**of_maps, **(of_regions if path.stem == "regions" else {})}
            counts = {"N": len(file["images/path"]), "R": 3}
            for name, held in found:
                types = [TYPES[each] if each in TYPES else np.dtype(each) for each in rows[name][0].split(" or ")]
                axes = rows[name][1].strip("()").split(", ")
                assert held.dtype in types, name
                assert held.ndim == len(axes), name
                assert axes[0] == "n" or held.shape[0] == counts[axes[0]], name
                assert (held.chunks, held.compression) == (None, None), name
                strings = h5py.check_string_dtype(held.dtype)
                assert strings is None or strings.encoding == "utf-8", name
            assert {name for name, _ in found} == set(rows) - {"/<level>"}
            links = {name for name in file if isinstance(file.get(name, getlink=True), h5py.SoftLink)}
            levels = {"P3", "P4"} if path.stem == "regions" else {"C3", "P3"}
            assert links == (levels if len(file["pyramids"]) == 1 else set())
            assert set(file) - links == {"images", "pyramids", "stats", *file.keys() & {"regions"}}


def test_attributes_and_keys_are_those_of_the_format_page(files: dict[str, Path]) -> None:
    text = FORMAT.read_text()
    with h5py.File(files["one"], "r") as file:
        attributes, config = set(file.attrs), json.loads(file.attrs["config"])
        assert set(file["pyramids/64x64/P3"].attrs) == keys_of("attribute", text[text.index("## Features") :])
    assert keys_of("attribute", text) == attributes | {"shard"}
    with h5py.File(files["several"], "r") as file:
        chosen = {"weights_key", "weights_prefix", "blocks", "tap", "regions"}  # only with some options and backbones
        of_necks = [
            neck.for_levels({3: 8, 4: 8, 5: 8}, 8, (), None).identity()
            for neck in NECKS.values()
            if not neck.accepts_single_stride
        ]
        of_necks.append(ImagePyramid({5: 8}).identity())
        assert keys_of("key", text) == set(config).union(json.loads(file.attrs["config"]), chosen, *of_necks)
    with h5py.File(files["regions"], "r") as file:
        assert keys_of("key of `regions`", text) == set(json.loads(file.attrs["config"])["regions"])
        assert set(file["regions"].attrs) == {"names"}
        assert config["recipe"].keys() == {field.name for field in fields(Recipe)} - {"bands", "source_range"}
    assert keys_of("key of `recipe`", text) == {field.name for field in fields(Recipe)}
    with h5py.File(files["out.shard-00001-of-00002"], "r") as file:
        assert keys_of("key of `shard`", text) == set(json.loads(file.attrs["shard"]))
    with h5py.File(files["merged"], "r") as file:
        assert "shard" not in file.attrs
        provenance = json.loads(file.attrs["provenance"])
    with h5py.File(files["updated"], "r") as file:
        provenance["updated"] = updated = json.loads(file.attrs["provenance"])["updated"]
    provenance_text = text[text.index("**`provenance`** is") :]
    rows = {next(iter(re.findall(r"`(\w+)`", row[0]))): row[1] for row in rows_of("key", provenance_text)}
    assert set(rows) == set(provenance) == {field.name for field in fields(Provenance)} - {"others"}
    assert set(re.findall(r"`(\w+)`", rows["versions"])) == set(provenance["versions"])
    assert set(re.findall(r"`(\w+)`", rows["updated"])) == {*updated, *updated["runs"][0]}
    assert set(re.findall(r"`(\w+)`", rows["merged"])) == {*provenance["merged"], "files"}  # not of shards
    in_files = {"key", "prefix"}  # only of weights that are in a file under a key or prefix
    assert keys_of("key of `weights`", provenance_text) == set(provenance["weights"]) | in_files


def test_a_reader_that_knows_only_the_format_page(files: dict[str, Path]) -> None:
    """Status, rows, groups, valid cells and counts mean what the page says."""
    for name in ("one", "several", "merged"):
        with h5py.File(files[name], "r") as file, package.open(files[name]) as store:
            levels = json.loads(file.attrs["config"])["levels"]
            assert file["stats/nonfinite"].shape == (len(store), len(levels))
            for i, path in enumerate(file["images/path"].asstr(errors="surrogateescape")[:]):
                assert file["images/status"][i] == 1
                group, row = file["images/group"].asstr()[i], file["images/row"][i]
                for level in levels:
                    data = file["pyramids"][group][level]
                    np.testing.assert_array_equal(data[row], store[path][level])
                    height, width = -(-file["images/input_size"][i] // data.attrs["stride"])
                    assert store[path].valid(level) == (height, width)
