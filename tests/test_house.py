"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fpnx
from tests.conftest import ROOT, noise_image, process

PACKAGE = ROOT / "fpnx"
MODULES = sorted(module.name for module in pkgutil.iter_modules([str(PACKAGE)]) if module.name != "__main__")
# Each module may import those below it only.
ORDER = [
    "cli",
    "outlets",
    "scoreboard",
    "report",
    "tables",
    "charts",
    "benchmarks",
    "rival",
    "findings",
    "specimens",
    "anatomy",
    "costs",
    "ceilings",
    "stopwatch",
    "photographs",
    "baseline",
    "merging",
    "catalogue",
    "dispatch",
    "campaign",
    "cluster",
    "trial",
    "worker",
    "quarantine",
    "ledger",
    "seats",
    "pictures",
    "extraction",
    "uploads",
    "verification",
    "page",
    "selection",
    "digests",
    "dataset",
    "pipeline",
    "gallery",
    "figures",
    "lettering",
    "panels",
    "places",
    "scales",
    "scenes",
    "heatmaps",
    "fitting",
    "_version",
    "batching",
    "planning",
    "control",
    "outputs",
    "writer",
    "disk",
    "equipment",
    "streaming",
    "replays",
    "engine",
    "sets",
    "store",
    "hdf5",
    "executable",
    "machine",
    "model",
    "weights",
    "checkpoints",
    "images",
    "recombination",
    "convolutions",
    "conventions",
    "published",
    "hub",
    "layouts",
    "mmdetection",
    "backbones",
    "bodies",
    "stages",
    "tracing",
    "shelf",
    "zoo",
    "recipes",
    "discovery",
    "config",
    "pyramid",
    "lists",
    "contents",
    "archives",
    "remote",
    "services",
    "urls",
    "shards",
    "values",
    "errors",
    "options",
]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    assert name in ORDER, f"give {name} its place in the order"
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fpnx") and node not in typing_only:
            imported = [(node.module or "").partition(".")[2]]
            if node.module == "fpnx":
                imported = [alias.name for alias in node.names]
            for target in imported:
                assert ORDER.index(target) > ORDER.index(name), f"{name} imports {target}, which stands above it"


@pytest.mark.parametrize("name", MODULES)
def test_all_is_exact(name: str) -> None:
    if name == "_version":
        return
    module = importlib.import_module(f"fpnx.{name}")
    assert len(set(module.__all__)) == len(module.__all__)
    used = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == f"fpnx.{name}":
                used |= {alias.name for alias in node.names}
    assert used <= set(module.__all__), "imported elsewhere, yet not in __all__"
    assert all(hasattr(module, entry) for entry in module.__all__)


def test_public_names_survive_the_import_of_every_module() -> None:
    for name in MODULES:
        importlib.import_module(f"fpnx.{name}")
    for name in fpnx.__all__:
        value = getattr(fpnx, name)
        assert not isinstance(value, type(fpnx)), f"fpnx.{name} is a module"
    assert not set(fpnx.__all__) & set(MODULES)
    assert dir(fpnx) == sorted(fpnx.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        fpnx.nothing_like_it  # noqa: B018


def test_help_does_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from fpnx.cli import main; assert main(['--help']) == 0; assert main(['extract', '--help']) == 0; "
        "loaded = {'torch', 'torchvision', 'h5py', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mistakes_that_are_told_at_once_do_not_load_torch(tmp_path: Path) -> None:
    (tmp_path / "there.h5").write_text("")
    (tmp_path / "a.png").write_text("")
    mistakes = [
        ["missing.png"],
        ["@missing.txt"],
        ["a.png", "-o", "there.h5"],
        ["a.png", "-o", "no/where.h5"],
        ["a.png", "-o", ""],
        ["a.png", "--output="],
        ["a.png", "--size", "64x"],
        ["a.png", "--levels", "P9"],
        ["a.png", "--engine", "ray", "--device", "mps"],
    ]
    code = (
        "import sys; from fpnx.cli import main\n"
        f"for mistake in {mistakes!r}: assert main(['extract', *mistake]) == 2, mistake\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = process_of(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(mistakes)


def test_an_extraction_does_not_load_matplotlib(tmp_path: Path) -> None:
    noise_image(0, (40, 40)).save(tmp_path / "a.png")
    arguments = ["extract", "a.png", "--weights", "random", "--backbone", "mobilenet_v2", "--size", "32", "--dry-run"]
    code = f"import sys, fpnx.cli as c; assert c.main({arguments!r}) == 0; assert 'matplotlib' not in sys.modules"
    done = process_of(code, tmp_path)
    assert done.returncode == 0, done.stderr


def process_of(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_importing_does_nothing() -> None:
    code = """
import signal, sys, random, warnings
warnings.simplefilter("error")
import numpy, torch, PIL.Image, rich.console
before = (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.backends.cudnn.allow_tf32,
          signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), PIL.Image.MAX_IMAGE_PIXELS,
          torch.get_default_dtype(), torch.is_grad_enabled(), numpy.geterr(), random.getstate())
import pkgutil, importlib, fpnx
for module in pkgutil.iter_modules(fpnx.__path__):
    if module.name != "__main__":
        importlib.import_module("fpnx." + module.name)
after = (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.backends.cudnn.allow_tf32,
         signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), PIL.Image.MAX_IMAGE_PIXELS,
         torch.get_default_dtype(), torch.is_grad_enabled(), numpy.geterr(), random.getstate())
assert before == after
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_command_body_is_short() -> None:
    tree = ast.parse((PACKAGE / "cli.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and "app.command" in map(
            ast.unparse, (d.func for d in node.decorator_list if isinstance(d, ast.Call))
        ):
            first = node.body[1] if isinstance(node.body[0], ast.Expr) else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < 25, f"{node.name} does too much"
            assert (ast.get_docstring(node) or "").count("[dim]fpnx") == 2, f"{node.name} wants two examples"


def test_top_level_holds_only_what_belongs_there() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"pyproject.toml", "fpnx", "tests", "sample_images", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {top for top in tops if not top.startswith(".")} == allowed


def test_version_and_python_dash_m(tmp_path: Path) -> None:
    assert process("--version", cwd=tmp_path).stdout.strip() == f"fpnx {fpnx.__version__}"
