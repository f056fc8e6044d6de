"""The rules of the code base that a machine can check: layers of imports, exports, and what importing costs."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fpnx
from tests.helpers.files import ROOT, noise_image
from tests.helpers.process import process

PACKAGE = ROOT / "fpnx"
# A package imports packages of lower lines only; those on one line do not import each other.
LAYERS = """
cli
commands
distributed benchmark training prediction analysis
extraction
inference visualization evaluation
models
images store labels
remote
core
"""
LAYER_OF = {package: number for number, line in enumerate(LAYERS.split("\n")) for package in line.split()}
MODULES = sorted(module.name for module in pkgutil.walk_packages(fpnx.__path__, "fpnx.") if not module.ispkg)


@functools.cache
def names_imported_by(module: str) -> tuple[tuple[str, str], ...]:
    """(module, name) of everything of fpnx that a module imports, wherever it stands, `TYPE_CHECKING` included."""
    found = []
    for node in ast.walk(ast.parse(source_of(module).read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.startswith("fpnx.")]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if node.module == "fpnx" or (node.module or "").startswith("fpnx."):
                found += [(str(node.module), alias.name) for alias in node.names]
    return tuple(found)


def imports_of(module: str) -> list[str]:
    """Every module of fpnx that a module imports."""
    inner = [(target, f"{target}.{name}") for target, name in names_imported_by(module)]
    found = [name if name in MODULES else target for target, name in inner]
    return [name for name in found if name not in ("fpnx", "fpnx._version")]


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def package_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".") > 1])
def test_imports_point_down(module: str) -> None:
    own = package_of(module)
    for name in imports_of(module):
        target = package_of(name)
        assert target == own or LAYER_OF[target] > LAYER_OF[own], f"{module} ({own}) imports {name} ({target})"


def test_every_package_has_a_layer_and_says_what_it_is() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == set(LAYER_OF)
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} says nothing"


def test_no_two_modules_import_each_other() -> None:
    graph = {module: set(imports_of(module)) & set(MODULES) for module in MODULES}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in finished:
            for name in graph[module]:
                visit(name, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_only_packages_stand_at_the_top() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "_version.py", "py.typed"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") > 1])
def test_all_is_exact(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    used = {alias for other in MODULES for target, alias in names_imported_by(other) if target == name}
    assert used <= set(module.__all__), "imported elsewhere, yet not in __all__"
    assert all(hasattr(module, entry) for entry in module.__all__)


def test_public_names_survive_the_import_of_every_module() -> None:
    for name in MODULES:
        if name != "fpnx.__main__":
            importlib.import_module(name)
    for name in fpnx.__all__:
        value = getattr(fpnx, name)
        assert not isinstance(value, type(fpnx)), f"fpnx.{name} is a module"
    assert not set(fpnx.__all__) & set(LAYER_OF)
    assert dir(fpnx) == sorted(fpnx.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        fpnx.nothing_like_it  # noqa: B018


def test_every_error_that_a_caller_may_see_is_exported() -> None:
    from fpnx.core import errors

    for name in errors.__all__:
        assert getattr(fpnx, name) is getattr(errors, name)


def test_help_does_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from fpnx.cli.main import main; "
        "assert main(['--help']) == 0; assert main(['extract', '--help']) == 0; "
        "loaded = {'torch', 'torchvision', 'h5py', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mistakes_in_arguments_are_found_without_torch(tmp_path: Path) -> None:
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
        "import sys; from fpnx.cli.main import main\n"
        f"for mistake in {mistakes!r}: assert main(['extract', *mistake]) == 2, mistake\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = process_of(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(mistakes)


def test_an_extraction_does_not_load_matplotlib(tmp_path: Path) -> None:
    noise_image(0, (40, 40)).save(tmp_path / "a.png")
    arguments = ["extract", "a.png", "--weights", "random", "--backbone", "mobilenet_v2", "--size", "32", "--dry-run"]
    code = f"import sys, fpnx.cli.main as c; assert c.main({arguments!r}) == 0; assert 'matplotlib' not in sys.modules"
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
for module in pkgutil.walk_packages(fpnx.__path__, "fpnx."):
    if module.name != "fpnx.__main__":
        importlib.import_module(module.name)
after = (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.backends.cudnn.allow_tf32,
         signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), PIL.Image.MAX_IMAGE_PIXELS,
         torch.get_default_dtype(), torch.is_grad_enabled(), numpy.geterr(), random.getstate())
assert before == after
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_command_body_is_short() -> None:
    tree = ast.parse((PACKAGE / "cli" / "main.py").read_text())
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
    allowed = {"pyproject.toml", "fpnx", "tests", "docs", "sample_images", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {top for top in tops if not top.startswith(".")} == allowed


def test_version_and_python_dash_m(tmp_path: Path) -> None:
    assert process("--version", cwd=tmp_path).stdout.strip() == f"fpnx {fpnx.__version__}"
