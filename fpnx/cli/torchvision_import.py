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
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["without_compiler"]

COMPILER, UTILITIES = "torch._dynamo", "torch._dynamo.utils"


def without_compiler() -> None:
    """From now on torchvision, once it is imported, leaves torch's compiler to whoever needs it.

    For a program of its own: it changes how modules are imported.
    """
    if "torchvision" not in sys.modules and not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torchvision, once, as the other finders do, with another way to run its code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None and COMPILER not in sys.modules:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run torchvision's code with small modules in place of the compiler's, or as it is where that fails."""
        package, utilities = ModuleType(COMPILER), ModuleType(UTILITIES)
        package.__path__ = []
        vars(utilities)["is_compile_supported"] = _is_compile_supported
        names = set(sys.modules)
        sys.modules |= {COMPILER: package, UTILITIES: utilities}
        try:
            self._loader.exec_module(module)
            return
        except (ImportError, AttributeError):  # another version, which needs more of the compiler
            for name in set(sys.modules) - names:
                if name.startswith("torchvision."):
                    del sys.modules[name]
        finally:
            for name, standing in ((COMPILER, package), (UTILITIES, utilities)):
                if sys.modules.get(name) is standing:
                    del sys.modules[name]
        self._loader.exec_module(module)


def _is_compile_supported(device_type: str) -> Any:
    return importlib.import_module(UTILITIES).is_compile_supported(device_type)
