"""Builds backbones from names or modules, and detects their stages."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpnx.core.cache import load_entry, save_entry
from fpnx.core.errors import FpnxError
from fpnx.models.backbones.feature_extractor import create_feature_extractor
from fpnx.models.backbones.huggingface import HF
from fpnx.models.backbones.one_stride import block_maps, build_blocks, chosen_blocks, find_blocks
from fpnx.models.backbones.registry import (
    TIMM,
    build_network,
    builder_versions,
    check_name,
    native_side,
    no_warnings,
    torchvision_names,
)
from fpnx.models.backbones.stage_search import PROBE_SIZES, NoStagesError, Stages, TapPoint, find_stages
from fpnx.models.backbones.tracing import meta_copy, on_meta, run_on_meta
from fpnx.models.necks.base import seeded_generator
from fpnx.models.torch_state import isolated_torch_state

__all__ = [
    "Backbone",
    "StageDetection",
    "backbone_names",
    "create_backbone",
    "backbone_from_module",
    "check_backbone_name",
    "cached_detection",
    "has_one_stride",
    "one_size",
    "refuse_blocks",
    "parameter_shapes",
    "detect_stages",
    "tap_shapes",
]

CACHE_VERSION = 3  # of stage detection and its cache entries; another version makes entries on disk void
# Builders' arguments for the input size. timm's name is first: timm before 1.0.31 takes the others and ignores them.
SIZE_KEYWORDS = ("img_size", "input_size", "image_size")


@dataclass(frozen=True)
class Backbone:
    """A network without its head, whose forward returns the taps.

    Attributes:
        name: the registry's name, or the module's class.
        body: `body(images)` gives `{"C2": (B, C, H, W), ...}`; its parameters keep the network's own names.
        nodes: level number → the node that is tapped.
        channels: level number → channels of the tap.
        size: the only (height, width) that it takes; None: any size.
        side: with `size`, which is a square: its side is a multiple of this one.
        one_stride: the stride of its only tap, of a network whose maps all have one, such as a vision transformer.
        blocks: then, the blocks whose maps are the tap, counted from 0.
    """

    name: str
    body: nn.Module
    nodes: Mapping[int, str]
    channels: Mapping[int, int]
    size: tuple[int, int] | None = None
    side: int | None = None
    one_stride: int | None = None
    blocks: tuple[int, ...] = ()

    def stride(self, level: int) -> int | None:
        """Stride of C_k or P_k in input pixels; None where it would be no whole number."""
        if self.one_stride is None:
            return 2**level
        (tap,) = self.channels
        stride = self.one_stride * 2.0 ** (level - tap)
        return int(stride) if stride.is_integer() else None

    @property
    def pyramid_channels(self) -> dict[int, int]:
        """Level number → channels of the taps that a pyramid can merge: consecutive strides up to the coarsest."""
        first = max(self.channels)
        while first - 1 in self.channels:
            first -= 1
        return {level: channels for level, channels in sorted(self.channels.items()) if level >= first}

    def check_levels(self, levels: Collection[str], top_block: str | None) -> None:
        """Check that the backbone has the taps that these levels and this top block are computed from.

        Raises:
            FpnxError: a tap is missing; names the levels that are available.
        """
        merged = self.pyramid_channels
        for name in [*levels, *(["P6"] if top_block else [])]:
            kind, level = name[0], min(int(name[1:]), 5)
            if level in (merged if kind == "P" else self.channels):
                continue
            available = [f"C{k}" for k in sorted(self.channels)] + [f"P{k}" for k in merged]
            reason = (
                f"the network has no map at stride {2**level}" if level not in self.channels else "a stride is missing"
            )
            missing = f"level {name}" if name in levels else f"top block {top_block}"
            raise FpnxError(f"{self.name} has no {missing}: {reason}: it gives {', '.join(available)}")


@dataclass(frozen=True, kw_only=True)
class StageDetection:
    """The result of stage detection on a named network.

    Attributes:
        stages: the stages; None where it has none for a pyramid.
        refused: the reason why it has none.
        keyword: the builder's argument for the input size, where a network is built for one size only.
    """

    stages: Stages | None
    refused: str | None = None
    keyword: str | None = None


def backbone_names() -> list[str]:
    """The names of torchvision's classifiers that have stages. Runs stage detection where the cache has no result."""
    return [name for name in torchvision_names() if detect_stages(name).stages is not None]


def check_backbone_name(name: str) -> str:
    """Return `name` if there is a network of that name, with stages or without.

    Raises:
        FpnxError: unknown name, with the nearest known one.
    """
    return check_name(name)


def detect_stages(name: str) -> StageDetection:
    """Detect the stages of the network `name`; results are cached on disk for each version of torch and torchvision."""
    detection = cached_detection(name)
    if detection is None:
        detection = _detections[name] = _detect(name)
        save_entry(_cache_key(name), asdict(detection))
    return detection


def cached_detection(name: str) -> StageDetection | None:
    """The result of `detect_stages` if it is in memory or on disk, else None."""
    if name not in _detections:
        detection = _detection_from_entry(load_entry(_cache_key(name)))
        if detection is not None:
            _detections[name] = detection
    return _detections.get(name)


_detections: dict[str, StageDetection] = {}


def _cache_key(name: str) -> str:
    return f"stages {CACHE_VERSION}, {builder_versions(name)}, {name}"


def create_backbone(
    name: str,
    seed: int,
    nodes: Mapping[int, str] | None = None,
    *,
    size: tuple[int, int] | None = None,
    meta: bool = False,
    blocks: Sequence[int] | None = None,
) -> Backbone:
    """The backbone `name` in eval mode on the CPU, with parameters initialised by its own code from `seed`.

    Args:
        nodes: level number → node to tap, instead of the ends of its stages.
        size: (height, width) of the inputs; only networks that are built for one size need it.
        meta: build it on the meta device, without data.
        blocks: those whose maps are the tap, of a network whose maps have one stride; None: the last.

    Raises:
        FpnxError: unknown name, a network without stages, a size that it cannot be built for, or blocks that do not
            exist.
    """
    detection = detect_stages(check_backbone_name(name))
    if detection.stages is None:
        raise FpnxError(f"{name} {detection.refused}: take another backbone (fpnx models lists them)")
    seed = seeded_generator(seed, f"body.{name}").initial_seed()
    if detection.stages.stride is not None:
        numbers = chosen_blocks(name, blocks, detection.stages.blocks)
        with isolated_torch_state(seed):
            return _create_from_blocks(name, build_blocks(name, numbers, meta=meta), detection.stages, numbers)
    refuse_blocks(name, blocks)
    side = native_side(name) if detection.keyword else None
    built_for = None
    if side is not None:
        built_for = size or (side, side)
        if built_for[0] != built_for[1] or built_for[0] % side:
            raise FpnxError(one_size(name, built_for, side))
    stages = detection.stages
    if nodes is not None:
        stages = Stages(taps={level: TapPoint(node=node) for level, node in nodes.items()}, traced=True)
    with isolated_torch_state(seed):
        network = build_network(name, built_for and built_for[0], detection.keyword, meta=meta)
        return _create(name, network, stages, built_for, side)


def refuse_blocks(name: str, blocks: Sequence[int] | None) -> None:
    """Raise FpnxError where `blocks` of a network are asked for whose maps have several strides."""
    if blocks is not None:
        asked = ",".join(map(str, blocks))
        raise FpnxError(
            f"blocks {asked} are for networks with maps of one stride, such as timm/vit_small_patch16_224, and {name} "
            "has several: choose maps with --levels"
        )


def has_one_stride(name: str) -> bool:
    """Whether the maps of the network `name` have one stride."""
    stages = detect_stages(check_backbone_name(name)).stages
    return stages is not None and stages.stride is not None


@functools.lru_cache(maxsize=128)
def parameter_shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    """Name → shape of all parameters and buffers of the network `name`, without initialising it.

    The head is included, except for networks whose maps have one stride.
    """
    with isolated_torch_state():
        network = build_blocks(name, meta=True) if has_one_stride(name) else build_network(name, meta=True)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def backbone_from_module(module: nn.Module) -> Backbone:
    """A backbone from any module: a copy in eval mode on the CPU, with the module's parameters.

    Raises:
        FpnxError: it does not take images of any size, or has no stages.
    """
    name = type(module).__name__
    try:
        network = copy.deepcopy(module).eval().cpu()
        meta_network = on_meta(network)
        with no_warnings():
            stages = find_stages(lambda _: meta_network)
    except NoStagesError as error:
        raise FpnxError(f"the module {name} {error}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise FpnxError(
            f"the module {name} cannot be measured ({reason}): a backbone takes images (B, 3, H, W) of any size, such "
            "as 448×672, and computes only with its parameters, buffers and inputs"
        ) from error
    return _create(name, network, stages)


def tap_shapes(body: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
    """(channels, height, width) of every tap for an input of `size` (height, width), computed on the meta device.

    Raises:
        RuntimeError: the network cannot take that size.
    """
    try:
        taps: dict[str, Tensor] = run_on_meta(meta_copy(body), size)
    except Exception as error:  # networks raise errors of any type for sizes that they cannot take
        raise RuntimeError(f"the network cannot take {size[0]}×{size[1]}: {error}") from error
    if not all(all(tap.shape) for tap in taps.values()):
        raise RuntimeError(f"a tap has no pixels at {size[0]}×{size[1]}")
    return {name: (tap.shape[1], tap.shape[2], tap.shape[3]) for name, tap in taps.items()}


def _create(
    name: str, network: nn.Module, stages: Stages, size: tuple[int, int] | None = None, side: int | None = None
) -> Backbone:
    with no_warnings():
        body = create_feature_extractor(network, stages)
    channels = {level: tap.channels for level, tap in stages.taps.items()}
    if not all(channels.values()):
        channels = {int(tap[1:]): shape[0] for tap, shape in tap_shapes(body, size or PROBE_SIZES[0]).items()}
    return Backbone(
        name=name,
        body=body,
        nodes={level: tap.node for level, tap in stages.taps.items()},
        channels=channels,
        size=size,
        side=side,
    )


def _create_from_blocks(name: str, network: nn.Module, stages: Stages, blocks: tuple[int, ...]) -> Backbone:
    ((level, tap),) = stages.taps.items()
    assert stages.stride is not None
    return Backbone(
        name=name,
        body=block_maps(name, network, stages, blocks).eval(),
        nodes={level: tap.node},
        channels={level: tap.channels * len(blocks)},
        one_stride=stages.stride,
        blocks=blocks,
    )


def one_size(name: str, size: tuple[int, int], side: int) -> str:
    """The message for a network that is built for one size and does not take `size` (height, width)."""
    return (
        f"{name} takes inputs of one size, for which it is built: squares in multiples of {side}, and not "
        f"{size[0]}×{size[1]}: take size {side} or {2 * side}"
    )


def _network_for_shapes(name: str, side: int | None = None, keyword: str | None = None) -> nn.Module:
    """The network on the meta device, with norms that only compute shapes: norms take a third of the time."""
    network = build_network(name, side, keyword, meta=True)
    for module in network.modules():
        if type(module) in (nn.BatchNorm2d, nn.LayerNorm):
            module.forward = torch.empty_like
    return network


def _detect(name: str) -> StageDetection:
    found = _detect_blocks(name)
    if found is not None:
        return found
    try:
        with no_warnings(), isolated_torch_state():
            network = _network_for_shapes(name)
            try:
                return StageDetection(stages=find_stages(lambda _: network))
            except NoStagesError:
                raise
            except Exception as error:  # the network may be built for one size only
                return _detect_at_one_size(name, error)
    except NoStagesError as error:
        return StageDetection(stages=None, refused=str(error))
    except (RuntimeError, NotImplementedError, AssertionError, AttributeError, TypeError, ValueError) as error:
        if not name.startswith((TIMM, HF)):
            raise
        reason = " ".join(str(error).split())[:160]
        return StageDetection(stages=None, refused=f"offers no maps that can be read ({reason})")


def _detect_blocks(name: str) -> StageDetection | None:
    """The tap of a network whose maps have one stride; None where it has no such tap for images of any size."""
    try:
        with no_warnings(), isolated_torch_state():
            stages = find_blocks(name)
    except Exception:  # networks raise errors of any type for sizes and arguments that they cannot take
        return None
    return None if stages is None else StageDetection(stages=stages)


def _detect_at_one_size(name: str, error: Exception) -> StageDetection:
    """Detect the stages of a network that takes one input size only, by building it for two sizes.

    Raises:
        Exception: `error`, if its builder has no argument for the size.
    """
    if name.startswith(HF):
        raise error
    side = native_side(name)
    for keyword in SIZE_KEYWORDS:
        try:
            build_network(name, side, keyword, meta=True)
        except TypeError:  # the builder has no such argument
            continue
        stages = find_stages(
            lambda size, keyword=keyword: _network_for_shapes(name, size[0], keyword),  # type: ignore[misc]
            [(side, side), (2 * side, 2 * side)],
        )
        return StageDetection(stages=stages, keyword=keyword)
    raise error


def _detection_from_entry(entry: Any) -> StageDetection | None:
    """The detection result in a cache entry; None if the entry is missing or broken."""
    try:
        if entry["stages"] is None:
            return StageDetection(stages=None, refused=str(entry["refused"]))
        taps = {int(level): TapPoint(**tap) for level, tap in entry["stages"]["taps"].items()}
        found = entry["stages"]
        stages = Stages(taps=taps, traced=bool(found["traced"]), stride=found["stride"], blocks=found["blocks"])
        return StageDetection(stages=stages, keyword=entry["keyword"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
