"""Backbones: from a name to a body whose forward gives the taps C2…C5, with strides and channels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, fx, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from fpnx.errors import FpnxError, nearest
from fpnx.pyramid import seeded_generator

__all__ = ["TAPS", "Backbone", "create_backbone", "known_backbone", "parameter_shapes", "tap_shapes"]

# The last node at strides 4, 8, 16 and 32 that every path through the network passes.
TAPS: dict[str, dict[int, str]] = {
    "mobilenet_v2": {2: "features.3", 3: "features.6", 4: "features.13", 5: "features.18"},
    "mobilenet_v3_large": {2: "features.3", 3: "features.6", 4: "features.12", 5: "features.16"},
    "resnet101": {2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"},
    "resnet18": {2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"},
    "resnet50": {2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"},
    "resnext101_32x8d": {2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"},
    "resnext50_32x4d": {2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"},
    "vgg16": {2: "features.15", 3: "features.22", 4: "features.29", 5: "features.30"},
}


@dataclass(frozen=True)
class Backbone:
    """A body and where it is read.

    `body(images)` gives `{"C2": (B, C, H, W), ...}`; its parameters keep torchvision's names, without the head.
    `nodes` and `channels` are by level number.
    """

    name: str
    body: fx.GraphModule
    nodes: Mapping[int, str]
    channels: Mapping[int, int]


def known_backbone(name: str) -> str:
    """`name`, if there is such a backbone.

    Raises:
        FpnxError: naming the choices and the nearest.
    """
    if name not in TAPS:
        raise FpnxError(f"backbone {name!r} is unknown{nearest(name, TAPS)}: take one of {', '.join(TAPS)}")
    return name


def create_backbone(name: str, seed: int, nodes: Mapping[int, str] | None = None) -> Backbone:
    """The body of `name` in eval mode on the CPU, its parameters drawn as torchvision does, from `seed`.

    `nodes` taps it elsewhere than at the last node of each stride.
    """
    nodes = nodes or TAPS[known_backbone(name)]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # A generator of its own: neither the caller's draws before nor those after are touched.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchvision\b")
        torch.manual_seed(seeded_generator(seed, f"body.{name}").initial_seed())
        network = models.get_model(name, weights=None)
    body = _tapped(network.eval(), {node: f"C{level}" for level, node in nodes.items()})
    side = 256
    channels = {int(tap[1:]): shape[0] for tap, shape in tap_shapes(body, (side, side)).items()}
    return Backbone(name, body, nodes, channels)


@lru_cache(maxsize=128)
def parameter_shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of all parameters and buffers of the whole network, head included; nothing is drawn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchvision\b")
        try:
            with torch.device("meta"):
                network = models.get_model(known_backbone(name), weights=None)
        except NotImplementedError:  # networks that compute with tensors while they are built
            network = models.get_model(name, weights=None)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def tap_shapes(body: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
    """(channels, height, width) of every tap for an input of `size` (height, width), without computing it.

    Raises:
        RuntimeError: where the network cannot take that size.
    """
    on_meta = {name: value.to("meta") for name, value in body.state_dict().items()}
    with torch.no_grad():
        image = torch.empty(1, 3, *size, device="meta")
        taps: dict[str, Tensor] = torch.func.functional_call(body, on_meta, (image,))
    return {name: (tap.shape[1], tap.shape[2], tap.shape[3]) for name, tap in taps.items()}


def _tapped(network: nn.Module, outputs: dict[str, str]) -> fx.GraphModule:
    dual = create_feature_extractor(network, return_nodes=outputs, suppress_diff_warning=True)
    # A plain graph module, since a copy of torchvision's dual one comes back with batch norm in training mode.
    return fx.GraphModule(dual, dual.eval_graph).eval()
