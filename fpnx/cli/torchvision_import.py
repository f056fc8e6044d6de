"""Imports torchvision without torch's compiler, which would take more than half of the time that a small run takes.

torchvision imports `torch._dynamo` for `is_compile_supported`, which its RoIAlign asks only where deterministic
algorithms are demanded.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["without_compiler"]

COMPILER, UTILITIES = "torch._dynamo", "torch._dynamo.utils"
KNOWN_USE = "from torch._dynamo.utils import is_compile_supported"  # the only line of torchvision that names it


def without_compiler() -> None:
    """From now on torchvision, once it is imported, leaves torch's compiler to whoever needs it.

    For a program of its own: it changes how modules are imported.
    """
    if "torchvision" not in sys.modules and not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torchvision as the other finders do, with another way to run its code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision" or COMPILER in sys.modules:
            return None
        others = (each for each in sys.meta_path if each is not self)
        found = (each.find_spec(fullname, path, target) for each in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None and _names_nothing_else(spec.submodule_search_locations or ()):
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run torchvision's code while small modules are in place of the compiler's."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        package, utilities = ModuleType(COMPILER), ModuleType(UTILITIES)
        package.__path__ = []
        vars(utilities)["is_compile_supported"] = _is_compile_supported
        sys.modules |= {COMPILER: package, UTILITIES: utilities}
        try:
            self._loader.exec_module(module)
        finally:
            for name, standing in ((COMPILER, package), (UTILITIES, utilities)):
                if sys.modules.get(name) is standing:
                    del sys.modules[name]


def _names_nothing_else(folders: Iterable[str]) -> bool:
    """Whether the sources of torchvision name the compiler in the one known line only."""
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in Path(folder).rglob("*.py")]
    return bool(texts) and {
        line.strip() for text in texts if "_dynamo" in text for line in text.splitlines() if "_dynamo" in line
    } <= {KNOWN_USE}


def _is_compile_supported(device_type: str) -> Any:
    return importlib.import_module(UTILITIES).is_compile_supported(device_type)
