"""Hugging Face backbones, `hf/NAME`: configs, networks and preprocessing of transformers' `AutoBackbone`."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.core.system import downloads_forbidden
from fpnx.core.text import escape
from fpnx.core.warning_filters import ignored_warnings

__all__ = [
    "HF",
    "HfBlockMaps",
    "HfMaps",
    "block_count",
    "hf_digest",
    "hf_folder",
    "hf_network",
    "hf_preprocessor",
    "load_hf_config",
    "pretrained_hf_state",
]

HF = "hf/"
# Norms that transformers adds to the maps of a backbone; published classifiers do not have them.
ADDED_NORMS = "hidden_states_norms."
_configs: dict[str, tuple[Any, Path]] = {}


class HfMaps(nn.Module):
    """A backbone of transformers whose forward returns its maps: (B, 3, H, W) → [(B, C, h, w), …], fine to coarse.

    Parameters are the backbone's own, under its names.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # The registries are shared with the network, so that both have the same names, devices and parameters.
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = network.__dict__[registry]
        self.__dict__["_network"] = network

    def train(self, mode: bool = True) -> HfMaps:
        self.__dict__["_network"].training = mode
        return super().train(mode)

    def forward(self, images: Tensor) -> Any:
        return list(self.__dict__["_network"](images).feature_maps)


class HfBlockMaps(HfMaps):
    """The maps of some blocks of a vision transformer, concatenated along channels: `{"C4": (B, C, h, w)}`.

    Args:
        network: gives the maps of these blocks, all of one stride.
        stride: of the maps; sides of images must be multiples of it.
        tap: the name of the map.
    """

    def __init__(self, network: nn.Module, stride: int, tap: str) -> None:
        super().__init__(network)
        self._stride, self._tap = stride, tap

    def forward(self, images: Tensor) -> Any:
        if images.shape[2] % self._stride or images.shape[3] % self._stride:
            raise ValueError(f"the sides of images must be multiples of {self._stride}")
        maps = super().forward(images)
        return {self._tap: maps[0] if len(maps) == 1 else torch.cat(maps, 1)}


def load_hf_config(name: str, offline: bool = False) -> Any:
    """transformers' config of the backbone `hf/NAME`, which is a folder or a repository at Hugging Face.

    Raises:
        FpnxError: transformers is not installed, there is no such model, or it is no backbone.
    """
    if name not in _configs:
        folder = _folder(name, ["config.json", "preprocessor_config.json"], "config.json", offline)
        transformers = _library()
        try:
            with _quiet():
                config = transformers.AutoConfig.from_pretrained(folder)
                known = type(config) in transformers.AutoBackbone._model_mapping
        except Exception as error:  # its checks of values raise errors of many types
            raise _unreadable(name, error) from error
        if not known:
            raise FpnxError(
                f"{escape(name)} is a {type(config).__name__.removesuffix('Config')}, of which transformers "
                f"{transformers.__version__} has no backbone: take one such as Dinov2, Swin or ConvNext"
            )
        _configs[name] = (config, Path(folder))
    return _configs[name][0]


def hf_digest(name: str) -> str:
    """Version of transformers, and the config of `name`, as one line: what its network depends on."""
    config = json.dumps(load_hf_config(name).to_dict(), default=str, sort_keys=True)
    return f"transformers {_library().__version__}, {hashlib.sha256(config.encode()).hexdigest()}"


def block_count(name: str) -> int:
    """Number of stages or blocks, without the stem."""
    return len(_stage_names(load_hf_config(name))) - 1


def hf_network(name: str, blocks: Sequence[int] | None = None) -> nn.Module:
    """The backbone `hf/NAME` with parameters that transformers draws, which returns the maps of its stages.

    Args:
        blocks: numbers of the stages or blocks, from 0; None: all, and the stem.
    """
    config = _config_for(name, blocks)
    try:
        with _quiet():
            network: nn.Module = _library().AutoBackbone.from_config(config)
    except Exception as error:  # such as a division by a patch size of 0
        raise _unreadable(name, error) from error
    return network.eval()


def _unreadable(name: str, error: Exception) -> FpnxError:
    reason = " ".join(str(error).split())[:160]
    return FpnxError(f"transformers cannot use the config of {escape(name)}: {reason}: take another, or mend it")


def pretrained_hf_state(name: str, offline: bool, blocks: Sequence[int] | None) -> tuple[dict[str, Tensor], str, str]:
    """The parameters that are published for `hf/NAME`, or are in its folder.

    Returns:
        The parameters; where they are from; a note on what is missing, or nothing.

    Raises:
        FpnxError: there are none, or some are missing.
    """
    load_hf_config(name, offline)
    folder = _folder(name, ["*.json", "model*.safetensors", "pytorch_model*.bin"], None, offline)
    try:
        with _quiet():
            config = _config_for(name, blocks)
            kind = _library().AutoBackbone._model_mapping[type(config)]
            network, report = kind.from_pretrained(
                folder, config=config, output_loading_info=True, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FpnxError(f"transformers cannot load the weights of {escape(name)}: {reason}") from error
    missing = sorted(report["missing_keys"])
    needed = [key for key in missing if not key.startswith(ADDED_NORMS)] + [str(k) for k in report["mismatched_keys"]]
    if needed:
        raise FpnxError(
            f"the weights of {escape(name)} lack {len(needed)} parameters of its backbone, such as "
            f"{escape(needed[0])}: take --weights random, or another model"
        )
    note = "the norms that transformers adds to the maps are not in the file: they scale by 1" if missing else ""
    return dict(network.state_dict()), str(folder), note


def hf_folder(name: str) -> Path:
    """The local folder with the config of `name`."""
    load_hf_config(name)
    return _configs[name][1]


def hf_preprocessor(name: str) -> dict[str, Any]:
    """The config of the image processor of `name`; empty where it has none."""
    try:
        found = json.loads((hf_folder(name) / "preprocessor_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _config_for(name: str, blocks: Sequence[int] | None) -> Any:
    config = copy.deepcopy(load_hf_config(name))
    names = _stage_names(config)
    chosen = range(len(names)) if blocks is None else [number + 1 for number in blocks]
    config.out_features = [names[i] for i in chosen]
    return config


def _stage_names(config: Any) -> list[str]:
    return list(config.stage_names)


def _folder(name: str, patterns: list[str], needed: str | None, offline: bool) -> str:
    """The local folder of a model: the one that is named, or that of Hugging Face's cache, filled where that may be."""
    asked = name[len(HF) :]
    local = os.path.expanduser(asked)
    if os.path.isdir(local):
        if needed is not None and not os.path.isfile(os.path.join(local, needed)):
            raise FpnxError(f"{escape(local)} has no {needed}: take a folder that save_pretrained has written")
        return local
    if asked.startswith(("/", ".", "~")):
        raise FpnxError(f"the folder {escape(local)} does not exist: hf/ takes a folder or a name at Hugging Face")
    _library()
    import huggingface_hub

    forbidden = offline or downloads_forbidden()
    try:
        with _quiet():
            folder = huggingface_hub.snapshot_download(asked, allow_patterns=patterns, local_files_only=forbidden)
    except Exception as error:  # HTTP, TLS, file locks and the hub each raise their own types
        raise FpnxError(_why_not(asked, error, forbidden)) from error
    if needed is not None and not os.path.isfile(os.path.join(folder, needed)):
        raise FpnxError(f"{escape(name)} has no {needed} in Hugging Face's cache or at Hugging Face")
    return str(folder)


def _why_not(asked: str, error: BaseException, forbidden: bool) -> str:
    """What to say of a model that cannot be had."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    page = f"https://huggingface.co/{asked}"
    if any(isinstance(each, errors.GatedRepoError) for each in chain):
        return (
            f"hf/{escape(asked)} is gated: accept its terms at {page} and log in with `hf auth login`, or give a "
            "folder with its files"
        )
    if any(isinstance(each, (errors.RepositoryNotFoundError, errors.HFValidationError)) for each in chain):
        return f"there is no public model {escape(asked)} at Hugging Face, and no such folder: check the name"
    reason = "downloads are forbidden, and it is not in the cache"
    if not forbidden:
        reason = " ".join(str(chain[-1]).split())[:160]
    return f"hf/{escape(asked)} cannot be had ({reason}): give a folder with its files, as in --backbone hf/./FOLDER"


@functools.cache
def _library() -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise FpnxError("backbones hf/… need transformers: pip install 'fpnx[hf]'")
    with _quiet():
        return importlib.import_module("transformers")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages, progress bars and warnings of transformers and huggingface_hub: fpnx reports errors itself."""
    loggers = {name: logging.getLogger(name) for name in ("transformers", "huggingface_hub")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    bars: Any = getattr(sys.modules.get("transformers.utils"), "logging", None)
    shown = bars is not None and bars.is_progress_bar_enabled()
    if shown:
        bars.disable_progress_bar()
    try:
        with ignored_warnings(r"(transformers|huggingface_hub|torch)\b", UserWarning, FutureWarning):
            yield
    finally:
        if shown:
            bars.enable_progress_bar()
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
