"""fpnx: feature pyramids from a folder of images, on disk, in one command.

Names are loaded when they are first used, so that importing fpnx loads neither torch nor h5py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fpnx._version import __version__

if TYPE_CHECKING:
    from fpnx.config import ExtractConfig
    from fpnx.dataset import PyramidDataset
    from fpnx.dispatch import extract
    from fpnx.errors import FpnxError, Interrupted
    from fpnx.extraction import Result
    from fpnx.figures import figure
    from fpnx.heatmaps import heatmap
    from fpnx.merging import Merged, merge
    from fpnx.model import PyramidModel, create_model, save_weights
    from fpnx.sets import open_pyramids as open
    from fpnx.store import Item, Store
    from fpnx.verification import Verification, verify

__all__ = [
    "ExtractConfig",
    "FpnxError",
    "Interrupted",
    "Item",
    "Merged",
    "PyramidDataset",
    "PyramidModel",
    "Result",
    "Store",
    "Verification",
    "__version__",
    "create_model",
    "extract",
    "figure",
    "heatmap",
    "merge",
    "open",
    "save_weights",
    "verify",
]

_HOMES = {
    "ExtractConfig": ("config", "ExtractConfig"),
    "FpnxError": ("errors", "FpnxError"),
    "Interrupted": ("errors", "Interrupted"),
    "Item": ("store", "Item"),
    "Merged": ("merging", "Merged"),
    "PyramidDataset": ("dataset", "PyramidDataset"),
    "PyramidModel": ("model", "PyramidModel"),
    "Result": ("extraction", "Result"),
    "Store": ("store", "Store"),
    "Verification": ("verification", "Verification"),
    "create_model": ("model", "create_model"),
    "extract": ("dispatch", "extract"),
    "figure": ("figures", "figure"),
    "heatmap": ("heatmaps", "heatmap"),
    "merge": ("merging", "merge"),
    "open": ("sets", "open_pyramids"),
    "save_weights": ("model", "save_weights"),
    "verify": ("verification", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fpnx' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = globals()[name] = getattr(import_module(f"fpnx.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
