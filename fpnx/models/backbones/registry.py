"""Registry of named networks: torchvision's classifiers, timm's models as `timm/NAME`, transformers' as `hf/NAME`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from fpnx.core.errors import FpnxError
from fpnx.core.text import did_you_mean
from fpnx.core.warning_filters import ignored_warnings, logging_disabled
from fpnx.models.backbones.huggingface import HF, HfMaps, hf_digest, hf_network, load_hf_config

__all__ = [
    "TIMM",
    "build_network",
    "builder_versions",
    "check_name",
    "torchvision_names",
    "native_side",
    "no_warnings",
    "timm_library",
]

TIMM = "timm/"
DEFAULT_SIDE = 224  # input side in pixels of torchvision's classifiers
TENSOR_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
DRAWN_IN_PLACE = (torch.Tensor.normal_, torch.Tensor.uniform_, nn.init.normal_, nn.init.uniform_)


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """The names of all classification models in torchvision's registry, in its order, with and without stages."""
    return tuple(models.list_models(module=models))


def check_name(name: str) -> str:
    """Return `name` if torchvision, timm or transformers has a network of that name.

    Raises:
        FpnxError: unknown name, with the nearest known one; or timm or transformers is not installed.
    """
    if name.startswith(HF):
        load_hf_config(name)
    elif name.startswith(TIMM):
        timm = timm_library()
        if not timm.is_model(name[len(TIMM) :]):
            guess = did_you_mean(name, [f"{TIMM}{known}" for known in timm.list_models()])
            raise FpnxError(f"backbone {name!r} is unknown to timm {timm.__version__}{guess}: see fpnx models timm/")
    elif name not in torchvision_names():
        raise FpnxError(
            f"backbone {name!r} is unknown{did_you_mean(name, torchvision_names())}: fpnx models lists them all"
        )
    return name


def build_network(
    name: str,
    side: int | None = None,
    keyword: str | None = None,
    *,
    meta: bool = False,
    loaded: dict[str, torch.Tensor] | None = None,
    classifier: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """The network `name` in eval mode, with parameters initialised by its own code.

    A timm network is built with `features_only=True`, unless `classifier` is set. GoogLeNet and Inception undo
    ImageNet's normalisation inside, as their published weights need it.

    Args:
        side: side in pixels of the square images that the network is built for; only with `keyword`.
        keyword: the name of the builder's argument for the input size.
        meta: build it on the meta device, without data.
        loaded: the state dict in a file that timm published for this network.
        classifier: build a timm network whole, with its head.
        options: further arguments of the builder.
    """
    options = {**options, **({keyword: (side, side) if keyword == "input_size" else side} if keyword else {})}
    network: Any
    with no_warnings(), _ParametersOnMeta() if meta else nullcontext():
        if name.startswith(HF):
            network = HfMaps(hf_network(name))
        elif name.startswith(TIMM):
            network = _timm_network(name, options, loaded, classifier)
        else:
            network = models.get_model(name, weights=None, **options)
    if hasattr(network, "transform_input"):
        network.transform_input = True
    network.eval()
    return network.to("meta") if meta else network


def native_side(name: str) -> int:
    """Side in pixels of the square images that the network `name` was designed for."""
    if name.startswith(TIMM):
        config = timm_library().get_pretrained_cfg(name[len(TIMM) :])
        return int(config.input_size[1]) if config is not None else DEFAULT_SIDE
    return DEFAULT_SIDE


def builder_versions(name: str) -> str:
    """The versions of the libraries that `build_network(name)` depends on, as one line."""
    if name.startswith(HF):
        return f"torch {torch.__version__}, {hf_digest(name)}"
    return f"torch {torch.__version__}, " + (
        f"timm {version('timm')}" if name.startswith(TIMM) else f"torchvision {version('torchvision')}"
    )


def timm_library() -> Any:
    """Import timm.

    Raises:
        FpnxError: timm is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise FpnxError("backbones timm/… need timm: pip install 'fpnx[timm]'")
    with no_warnings():
        return importlib.import_module("timm")


def no_warnings() -> AbstractContextManager[None]:
    """Suppress warnings that come from the code of torchvision, timm, torch and huggingface_hub."""
    return ignored_warnings(
        r"(torchvision|timm|torch|huggingface_hub)\b", FutureWarning, UserWarning, DeprecationWarning
    )


class _ParametersOnMeta(TorchFunctionMode):
    """Makes `TENSOR_FACTORIES`, of which parameters are made, create meta tensors, which are not filled with numbers.

    Other functions still return data, since some networks compute with it while they are built. To draw numbers for a
    meta tensor torch imports its compiler, which takes longer than to build the network.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in TENSOR_FACTORIES and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if func in DRAWN_IN_PLACE:
            drawn = args[0] if args else kwargs["tensor"]
            if drawn.is_meta:
                return drawn
        return func(*args, **kwargs)


def _timm_network(
    name: str, options: dict[str, Any], loaded: dict[str, torch.Tensor] | None, classifier: bool
) -> nn.Module:
    timm, timm_name = timm_library(), name[len(TIMM) :]
    if not classifier:
        options = {**options, "features_only": True, "out_indices": _timm_indices(timm_name)}
    if loaded is not None:
        # timm renames and reshapes published parameters when it loads them.
        options["pretrained_cfg_overlay"] = {"state_dict": loaded, "custom_load": False}
    with logging_disabled("timm"):  # it names the parameters of a classifier that are not used
        return timm.create_model(timm_name, pretrained=loaded is not None, **options)


@functools.cache
def _timm_indices(name: str) -> tuple[int, ...]:
    """Indices of the feature maps that a timm network is to return: the last at each stride from 4 to 32."""
    with _ParametersOnMeta():
        network = timm_library().create_model(name, pretrained=False, features_only=True)
    last = {entry["reduction"]: i for i, entry in enumerate(network.feature_info.info)}
    chosen = tuple(sorted(i for reduction, i in last.items() if reduction in (4, 8, 16, 32)))
    return chosen or tuple(network.feature_info.out_indices)
