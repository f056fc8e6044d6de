"""What the parameters of a pyramid, by their names in fpnx's layout and their shapes, say of its neck."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["FpnKeys", "fpn_keys"]


@dataclass(frozen=True, kw_only=True)
class FpnKeys:
    """What the keys and shapes of a pyramid say: laterals' inputs (fine to coarse), width, norm, and P6's inputs.

    An input of 0 is that of a level without a lateral, whatever its tap has.
    `first_level` is None where names do not tell it; `top_in` where nothing is convolved above the last level.
    `kind` is the neck's, as `--pyramid` takes it; `settings` are further arguments of its class.
    """

    in_channels: tuple[int, ...]
    channels: int
    norm: str | None
    top_in: int | None
    first_level: int | None = None
    kind: str = "fpn"
    settings: Mapping[str, Any] = field(default_factory=dict)


def fpn_keys(state: Mapping[str, Tensor], first_level: int | None = None) -> FpnKeys | None:
    """What `fpn.*` of a state dict in fpnx's layout says of its pyramid; None where there is none."""
    if any(name.startswith("fpn.cells.") for name in state):
        return _bifpn_keys(state)
    found = {i: state[name] for i in range(16) if (name := f"fpn.inner_blocks.{i}.0.weight") in state}
    if not found:
        return None
    laterals = list(found.values())
    inputs = tuple(found[i].shape[1] if i in found else 0 for i in range(max(found) + 1))
    norms = [name.rsplit(".", 1)[1] for name in state if re.match(r"fpn\.(inner|layer)_blocks\.\d+\.1\.", name)]
    norm = None if not norms else "batch" if "running_mean" in norms else "group"
    top = state.get("fpn.extra_blocks.p6.weight")
    stacks = _count(state, r"fpn\.stacks\.(\d+)\.")
    if stacks:
        return FpnKeys(
            in_channels=inputs,
            channels=laterals[0].shape[0],
            norm=norm,
            top_in=None,
            first_level=3,
            kind="nasfpn",
            settings={"stacks": stacks, "norm": norm},
        )
    return FpnKeys(
        in_channels=inputs,
        channels=laterals[0].shape[0],
        norm=norm,
        top_in=None if top is None else top.shape[1],
        first_level=first_level,
        kind="pafpn" if "fpn.pafpn_blocks.0.0.weight" in state else "fpn",
    )


def _bifpn_keys(state: Mapping[str, Tensor]) -> FpnKeys | None:
    """What `fpn.*` of a state dict in fpnx's layout says of a BiFPN; None where its cells are not whole."""
    first = {name[len("fpn.cells.0.") :]: value for name, value in state.items() if name.startswith("fpn.cells.0.")}
    levels = 1 + _count(first, r"top_down\.(\d+)\.")
    depthwise, extra = first.get("top_down.0.depthwise.weight"), state.get("fpn.extra_block.0.weight")
    if depthwise is None or levels < 2:
        return None
    channels = depthwise.shape[0]
    places = [f"top_down.{k}.projections.0.0.weight" for k in range(levels - 1)]
    places.append(f"bottom_up.{levels - 2}.projections.0.0.weight")
    widths = [first[place].shape[1] if place in first else channels for place in places]
    projected = [k for k, place in enumerate(places) if place in first]
    # A tap with as many channels as the levels has no convolution: then it is P6 and P7 that are not taps.
    taps = max(projected, default=-1) + 1 if extra is not None else levels - 2
    return FpnKeys(
        in_channels=tuple(widths[:taps]),
        channels=channels,
        norm="batch",
        top_in=None,
        kind="bifpn",
        settings={
            "cells": _count(state, r"fpn\.cells\.(\d+)\."),
            "extra_levels": levels - taps,
            "weighted": "top_down.0.weights" in first,
            "bias": "top_down.0.pointwise.0.bias" in first,
        },
    )


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers `pattern` finds at the start of names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
