"""A run of the command line imports neither torch's compiler nor SymPy, and whoever needs the compiler gets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.files import ROOT, noise_image


def python(*arguments: object, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def imported_by_torch(tmp_path_factory) -> set[str]:
    """What a part of torch that torchvision needs imports itself: SymPy in torch 2.6."""
    code = "import torch.utils.checkpoint"
    return imported(python("-X", "importtime", "-c", code, cwd=tmp_path_factory.mktemp("torch")))


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
def test_a_small_extraction_imports_neither(tmp_path, backbone, imported_by_torch):
    noise_image(0, (40, 50)).save(tmp_path / "a.png")
    options = ["--backbone", backbone, "--weights", "random", "--size", 64, "--channels", 8, "-o", "out.h5"]
    for _ in range(2):  # the first may have to find the stages of the backbone
        done = python("-X", "importtime", "-m", "fpnx", "extract", "a.png", "--overwrite", *options, cwd=tmp_path)
    names = imported(done)
    assert {"torch", "torchvision.ops.roi_align"} <= names
    assert not {name for name in names - imported_by_torch if name.startswith(("sympy", "torch._dynamo"))}


def packages(folder: Path, torchvision: str) -> None:
    """Small packages in place of torch and torchvision."""
    files = {
        "torch/__init__.py": "",
        "torch/_dynamo/__init__.py": "config = 5",
        "torch/_dynamo/utils.py": "def is_compile_supported(device): return device == 'cpu'",
        "torchvision/__init__.py": "from torchvision import ops",
        "torchvision/ops.py": torchvision,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


IMPORT = """
import importlib.util
import sys
from fpnx.cli.torchvision_import import without_compiler
without_compiler()
without_compiler()
assert importlib.util.find_spec("torchvision") is not None
import torchvision
print(len(sys.meta_path), "torch._dynamo" in sys.modules)
"""


def test_the_compiler_is_imported_when_it_is_asked(tmp_path):
    packages(tmp_path, "from torch._dynamo.utils import is_compile_supported")
    code = IMPORT + "print(torchvision.ops.is_compile_supported('cpu'), torchvision.ops.is_compile_supported('tpu'))\n"
    code += "import torch._dynamo; print(torch._dynamo.config)"
    done = python("-c", code, cwd=tmp_path, path=tmp_path)
    assert done.stdout.split()[1:] == ["False", "True", "False", "5"], done.stderr


def test_a_torchvision_that_needs_more_of_the_compiler_gets_it(tmp_path):
    packages(tmp_path, "from torch._dynamo import config\nfrom torch._dynamo.utils import is_compile_supported")
    done = python("-c", IMPORT + "print(torchvision.ops.config)", cwd=tmp_path, path=tmp_path)
    assert done.stdout.split()[1:] == ["True", "5"], done.stderr


def test_the_loader_is_the_usual_one_afterwards(tmp_path):
    packages(tmp_path, "from torch._dynamo.utils import is_compile_supported")
    code = IMPORT + "import pkgutil; print(pkgutil.get_data('torchvision', 'ops.py').decode())"
    done = python("-c", code, cwd=tmp_path, path=tmp_path)
    assert done.stdout.splitlines()[1:] == ["from torch._dynamo.utils import is_compile_supported"], done.stderr


def test_an_error_of_torchvision_stays_what_it_is(tmp_path):
    packages(tmp_path, "import nothing_of_this_name")
    done = python("-c", IMPORT, cwd=tmp_path, path=tmp_path)
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in done.stderr
