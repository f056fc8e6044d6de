"""Backbones: from a name or a module to a body whose forward gives the taps C2…C5, with strides and channels."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fpnx.core.cache import load_entry, save_entry
from fpnx.core.errors import FpnxError
from fpnx.models.backbones.feature_extractor import tapped
from fpnx.models.backbones.registry import (
    TIMM,
    build_network,
    builder_versions,
    check_name,
    native_side,
    no_warnings,
    torchvision_names,
)
from fpnx.models.backbones.stage_search import PROBES, NoStagesError, Stages, TapPoint, find_stages
from fpnx.models.backbones.tracing import on_meta, run_on_meta
from fpnx.models.necks.base import seeded_generator

__all__ = [
    "Backbone",
    "StageDetection",
    "backbone_names",
    "create_backbone",
    "backbone_from_module",
    "check_backbone_name",
    "cached_detection",
    "one_size",
    "parameter_shapes",
    "detect_stages",
    "tap_shapes",
]

SCHEME = 1  # of finding and keeping stages; a change makes what is kept on disk void
SIZE_KEYWORDS = ("input_size", "image_size", "img_size")  # how builders call the one size that they build for


@dataclass(frozen=True)
class Backbone:
    """A body and where it is read.

    `body(images)` gives `{"C2": (B, C, H, W), ...}`; its parameters keep the network's own names, without the head.
    `nodes` and `channels` are by level number. `size` is the one (height, width) that it takes, a square in multiples
    of `side`; None: any that works.
    """

    name: str
    body: nn.Module
    nodes: Mapping[int, str]
    channels: Mapping[int, int]
    size: tuple[int, int] | None = None
    side: int | None = None

    @property
    def pyramid_channels(self) -> dict[int, int]:
        """Channels of the taps that a pyramid can merge: those up to the coarsest without a gap between them."""
        first = max(self.channels)
        while first - 1 in self.channels:
            first -= 1
        return {level: channels for level, channels in sorted(self.channels.items()) if level >= first}

    def check_levels(self, levels: Collection[str], top_block: str | None) -> None:
        """See that there are maps at the strides that these levels, and this top block, are made from.

        Raises:
            FpnxError: naming what there is instead, and why.
        """
        merged = self.pyramid_channels
        for name in [*levels, *(["P6"] if top_block else [])]:
            kind, level = name[0], min(int(name[1:]), 5)
            if level in (merged if kind == "P" else self.channels):
                continue
            there = [f"C{k}" for k in sorted(self.channels)] + [f"P{k}" for k in merged]
            why = (
                f"the network has no map at stride {2**level}" if level not in self.channels else "a stride is missing"
            )
            what = f"level {name}" if name in levels else f"top block {top_block}"
            raise FpnxError(f"{self.name} has no {what}: {why}: it gives {', '.join(there)}")


@dataclass(frozen=True, kw_only=True)
class StageDetection:
    """What was found of a named network: its stages, or why it has none.

    `keyword` is the builder's name for the input size, where it builds for one size only.
    """

    stages: Stages | None
    refused: str | None = None
    keyword: str | None = None


def backbone_names() -> list[str]:
    """Torchvision's classifiers that have stages. Measures those that were not met before."""
    return [name for name in torchvision_names() if detect_stages(name).stages is not None]


def check_backbone_name(name: str) -> str:
    """`name`, if there is such a network, with stages or without.

    Raises:
        FpnxError: naming the nearest.
    """
    return check_name(name)


def detect_stages(name: str) -> StageDetection:
    """The stages of the network `name`, measured once for each version of torch and torchvision, and then kept."""
    found = cached_detection(name)
    if found is None:
        found = _surveys[name] = _measure(name)
        save_entry(_key(name), asdict(found))
    return found


def cached_detection(name: str) -> StageDetection | None:
    """What `detect_stages` gives, where nothing needs to be measured for it."""
    if name not in _surveys:
        kept = _survey_from(load_entry(_key(name)))
        if kept is not None:
            _surveys[name] = kept
    return _surveys.get(name)


_surveys: dict[str, StageDetection] = {}


def _key(name: str) -> str:
    return f"stages {SCHEME}, {builder_versions(name)}, {name}"


def create_backbone(
    name: str,
    seed: int,
    nodes: Mapping[int, str] | None = None,
    *,
    size: tuple[int, int] | None = None,
    meta: bool = False,
) -> Backbone:
    """The body of `name` in eval mode on the CPU, its parameters drawn as its own code does, from `seed`.

    Args:
        nodes: taps it here instead of where its stages end.
        size: (height, width) of the inputs to come, for networks that are built for one size.
        meta: on the meta device, without data and undrawn.

    Raises:
        FpnxError: a network without stages, or a size that it cannot be built for.
    """
    found = detect_stages(check_backbone_name(name))
    if found.stages is None:
        raise FpnxError(f"{name} {found.refused}: take another backbone (fpnx models lists them)")
    side = native_side(name) if found.keyword else None
    built_for = None
    if side is not None:
        built_for = size or (side, side)
        if built_for[0] != built_for[1] or built_for[0] % side:
            raise FpnxError(one_size(name, built_for, side))
    with torch.random.fork_rng(devices=[]):
        # A generator of its own: neither the caller's draws before nor those after are touched.
        torch.manual_seed(seeded_generator(seed, f"body.{name}").initial_seed())
        network = build_network(name, built_for and built_for[0], found.keyword, meta=meta)
    stages = (
        found.stages if nodes is None else Stages(taps={k: TapPoint(node=n) for k, n in nodes.items()}, traced=True)
    )
    return _backbone(name, network, stages, built_for, side)


@functools.lru_cache(maxsize=128)
def parameter_shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of all parameters and buffers of the whole network, head included; nothing is drawn."""
    network = build_network(check_backbone_name(name), meta=True)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def backbone_from_module(module: nn.Module) -> Backbone:
    """Anybody's network as a backbone: a copy of it, in eval mode on the CPU, with its parameters as they are.

    Raises:
        FpnxError: where it does not run at any size, or has no stages.
    """
    name = type(module).__name__
    try:
        network = copy.deepcopy(module).eval().cpu()
        twin = on_meta(network)
        with no_warnings():
            stages = find_stages(lambda _: twin)
    except NoStagesError as error:
        raise FpnxError(f"the module {name} {error}") from error
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise FpnxError(
            f"the module {name} cannot be measured ({why}): a backbone takes images (B, 3, H, W) of any size, such as "
            "448×672, and computes only with its parameters, buffers and inputs"
        ) from error
    return _backbone(name, network, stages)


def tap_shapes(body: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
    """(channels, height, width) of every tap for an input of `size` (height, width), without computing it.

    Raises:
        RuntimeError: where the network cannot take that size.
    """
    twin = _twins.get(body)
    if twin is None:
        twin = _twins[body] = on_meta(body)
    try:
        taps: dict[str, Tensor] = run_on_meta(twin, size)
    except Exception as error:  # a network may object in any way
        raise RuntimeError(f"the network cannot take {size[0]}×{size[1]}: {error}") from error
    if not all(all(tap.shape) for tap in taps.values()):
        raise RuntimeError(f"at {size[0]}×{size[1]} nothing is left of a level")
    return {name: (tap.shape[1], tap.shape[2], tap.shape[3]) for name, tap in taps.items()}


_twins: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def _backbone(
    name: str, network: nn.Module, stages: Stages, size: tuple[int, int] | None = None, side: int | None = None
) -> Backbone:
    with no_warnings():
        body = tapped(network, stages)
    return Backbone(
        name=name,
        body=body,
        nodes={level: tap.node for level, tap in stages.taps.items()},
        channels={int(tap[1:]): shape[0] for tap, shape in tap_shapes(body, size or PROBES[0]).items()},
        size=size,
        side=side,
    )


def one_size(name: str, size: tuple[int, int], side: int) -> str:
    """Why a network that is built for one size does not take `size` (height, width), and what it takes."""
    return (
        f"{name} takes inputs of one size, for which it is built: squares in multiples of {side}, and not "
        f"{size[0]}×{size[1]}: take size {side} or {2 * side}"
    )


def _shapes_alone(name: str, side: int | None = None, keyword: str | None = None) -> nn.Module:
    """The network on the meta device, with norms that only pass shapes on: a third of the time goes into them."""
    network = build_network(name, side, keyword, meta=True)
    for module in network.modules():
        if type(module) in (nn.BatchNorm2d, nn.LayerNorm):
            module.forward = torch.empty_like
    return network


def _measure(name: str) -> StageDetection:
    try:
        with no_warnings():
            network = _shapes_alone(name)
            try:
                return StageDetection(stages=find_stages(lambda _: network))
            except NoStagesError:
                raise
            except Exception as error:  # it may be built for one size only
                return _measure_built(name, error)
    except NoStagesError as error:
        return StageDetection(stages=None, refused=str(error))
    except (RuntimeError, NotImplementedError, AssertionError, AttributeError, TypeError, ValueError) as error:
        if not name.startswith(TIMM):
            raise
        why = " ".join(str(error).split())[:160]
        return StageDetection(stages=None, refused=f"offers no features_only that can be read ({why})")


def _measure_built(name: str, objection: Exception) -> StageDetection:
    """The stages of a network that takes one size, from two builds of it."""
    side = native_side(name)
    for keyword in SIZE_KEYWORDS:
        try:
            build_network(name, side, keyword, meta=True)
        except TypeError:  # its builder knows no such keyword
            continue
        stages = find_stages(
            lambda size, keyword=keyword: _shapes_alone(name, size[0], keyword),  # type: ignore[misc]
            [(side, side), (2 * side, 2 * side)],
        )
        return StageDetection(stages=stages, keyword=keyword)
    raise objection


def _survey_from(kept: Any) -> StageDetection | None:
    """The survey whose plain values were kept; None where they are not such."""
    try:
        if kept["stages"] is None:
            return StageDetection(stages=None, refused=str(kept["refused"]))
        taps = {int(level): TapPoint(**tap) for level, tap in kept["stages"]["taps"].items()}
        return StageDetection(stages=Stages(taps=taps, traced=bool(kept["stages"]["traced"])), keyword=kept["keyword"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
