"""fpnx: feature pyramids from a folder of images, on disk, in one command.

Names are loaded when they are first used, so that importing fpnx loads neither torch nor h5py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fpnx._version import __version__

if TYPE_CHECKING:
    from fpnx.analysis.comparison import Comparison
    from fpnx.analysis.export import Exported
    from fpnx.analysis.probing import Probe
    from fpnx.commands.compare import compare
    from fpnx.commands.export import export
    from fpnx.commands.extract import extract
    from fpnx.commands.merge import Merged, merge
    from fpnx.commands.predict import predict
    from fpnx.commands.probe import probe
    from fpnx.commands.train import train
    from fpnx.commands.verify import verify
    from fpnx.core.config import ExtractConfig
    from fpnx.core.errors import BusyError, FpnxError, ImageError, Interrupted, NotDoneError, StoreError
    from fpnx.core.events import Listener
    from fpnx.core.predict_config import PredictConfig
    from fpnx.core.provenance import ModelPart, Provenance, WeightsInfo
    from fpnx.core.train_config import TrainConfig
    from fpnx.extraction.run import Result
    from fpnx.models.factory import create_model, save_weights
    from fpnx.models.pyramid_model import PyramidModel
    from fpnx.prediction.in_memory import Predictor
    from fpnx.prediction.predictions import Prediction
    from fpnx.prediction.run import PredictResult
    from fpnx.store.joined_store import open_store as open
    from fpnx.store.reader import Item, Store
    from fpnx.store.regions import Regions
    from fpnx.store.torch_dataset import PyramidDataset
    from fpnx.store.verify import Verification
    from fpnx.training.result import TrainResult
    from fpnx.visualization.figure import figure
    from fpnx.visualization.heatmaps import heatmap

__all__ = [
    "BusyError",
    "Comparison",
    "Exported",
    "ExtractConfig",
    "FpnxError",
    "ImageError",
    "Interrupted",
    "Item",
    "Listener",
    "Merged",
    "ModelPart",
    "NotDoneError",
    "PredictConfig",
    "PredictResult",
    "Prediction",
    "Predictor",
    "Probe",
    "Provenance",
    "PyramidDataset",
    "PyramidModel",
    "Regions",
    "Result",
    "Store",
    "StoreError",
    "TrainConfig",
    "TrainResult",
    "Verification",
    "WeightsInfo",
    "__version__",
    "compare",
    "create_model",
    "export",
    "extract",
    "figure",
    "heatmap",
    "merge",
    "open",
    "predict",
    "probe",
    "save_weights",
    "train",
    "verify",
]

_MODULES = {  # where each public name is defined, below fpnx
    "BusyError": "core.errors",
    "Comparison": "analysis.comparison",
    "Exported": "analysis.export",
    "ExtractConfig": "core.config",
    "FpnxError": "core.errors",
    "ImageError": "core.errors",
    "Interrupted": "core.errors",
    "Item": "store.reader",
    "Listener": "core.events",
    "Merged": "commands.merge",
    "ModelPart": "core.provenance",
    "NotDoneError": "core.errors",
    "PredictConfig": "core.predict_config",
    "PredictResult": "prediction.run",
    "Prediction": "prediction.predictions",
    "Predictor": "prediction.in_memory",
    "Probe": "analysis.probing",
    "Provenance": "core.provenance",
    "PyramidDataset": "store.torch_dataset",
    "PyramidModel": "models.pyramid_model",
    "Result": "extraction.run",
    "Regions": "store.regions",
    "Store": "store.reader",
    "StoreError": "core.errors",
    "TrainConfig": "core.train_config",
    "TrainResult": "training.result",
    "Verification": "store.verify",
    "WeightsInfo": "core.provenance",
    "compare": "commands.compare",
    "create_model": "models.factory",
    "export": "commands.export",
    "extract": "commands.extract",
    "figure": "visualization.figure",
    "heatmap": "visualization.heatmaps",
    "merge": "commands.merge",
    "open": "store.joined_store",
    "predict": "commands.predict",
    "probe": "commands.probe",
    "save_weights": "models.factory",
    "train": "commands.train",
    "verify": "commands.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fpnx' has no attribute {name!r}")
    attribute = "open_store" if name == "open" else name
    value = globals()[name] = getattr(import_module(f"fpnx.{_MODULES[name]}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
