"""timm's published weights: names, recipes, URLs, and download through Hugging Face's cache."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpnx.core.errors import FpnxError
from fpnx.core.system import downloads_forbidden
from fpnx.core.warning_filters import logging_disabled
from fpnx.models.backbones.factory import has_one_stride
from fpnx.models.backbones.one_stride import build_blocks
from fpnx.models.backbones.registry import TIMM, build_network, no_warnings, timm_library
from fpnx.models.preprocessing import Recipe

__all__ = [
    "TimmWeights",
    "cached_timm_file",
    "classifier_names",
    "features_only_state",
    "filter_checkpoint",
    "timm_recipe",
    "timm_weights",
]

RESAMPLINGS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class TimmWeights:
    """A set of weights that timm publishes for a network; nothing has been downloaded or read.

    Attributes:
        name: `"timm/convnext_tiny.fb_in22k"`, which is also a backbone's name.
        tag: the part of the name after the dot, `"fb_in22k"`.
        backbone: the network that they are for, `"timm/convnext_tiny"`.
        recipe: timm's preprocessing, but with the whole image stretched to the input size.
        hub_id: the repository at Hugging Face; empty if they are published elsewhere.
        url: where they are published.
        trains: the parts of a pyramid model that they hold.
    """

    name: str
    tag: str
    backbone: str
    recipe: Recipe
    hub_id: str
    file_name: str
    url: str
    trains: tuple[str, ...] = ("backbone",)

    @property
    def file(self) -> Path:
        """Where a copy of the file is looked for first, in torch's hub folder."""
        suffix = Path(self.file_name).suffix or ".safetensors"
        return Path(torch.hub.get_dir()) / "checkpoints" / f"timm-{self.name[len(TIMM) :]}{suffix}"


def timm_weights(backbone: str) -> list[TimmWeights]:
    """All published weights for `backbone` (`timm/NAME` or `timm/NAME.TAG`), its default first."""
    timm = timm_library()
    timm_name = backbone[len(TIMM) :]
    architecture = timm_name.partition(".")[0]
    default = timm.get_pretrained_cfg(timm_name)
    weights = []
    for full_name in timm.list_pretrained(f"{architecture}*"):
        name, _, tag = full_name.partition(".")
        config = timm.get_pretrained_cfg(full_name) if name == architecture else None
        if config is None or not (config.hf_hub_id or config.url):
            continue
        file_name = config.hf_hub_filename or "model.safetensors"
        url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file_name}"
        if not config.hf_hub_id:
            file_name, url = os.path.basename(config.url), config.url
        weights.append(
            TimmWeights(
                name=f"{TIMM}{full_name}",
                tag=tag,
                backbone=f"{TIMM}{architecture}",
                recipe=timm_recipe(config),
                hub_id=config.hf_hub_id or "",
                file_name=file_name,
                url=url,
            )
        )
    return sorted(weights, key=lambda each: default is None or each.tag != (default.tag or ""))


def timm_recipe(config: Any) -> Recipe:
    """The recipe of a timm `pretrained_cfg`, with the whole image stretched to the input size instead of cropped."""
    data_config = timm_library().data.resolve_data_config(
        {}, pretrained_cfg=config if isinstance(config, dict) else config.to_dict()
    )
    return Recipe(
        sizing="stretch",
        height=int(data_config["input_size"][1]),
        width=int(data_config["input_size"][2]),
        resampling=data_config["interpolation"] if data_config["interpolation"] in RESAMPLINGS else "bicubic",
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
    )


def cached_timm_file(weights: TimmWeights, offline: bool) -> Path:
    """The file of `weights`: at `weights.file`, or in Hugging Face's cache, downloaded if it is in neither.

    Raises:
        FpnxError: it cannot be downloaded; names the file, its URL and the path for a copy.
    """
    if weights.file.exists():
        return weights.file
    offline = offline or downloads_forbidden()
    try:
        if not weights.hub_id:
            raise FileNotFoundError("it is not at Hugging Face")
        with no_warnings(), logging_disabled("huggingface_hub"):
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(weights.hub_id, weights.file_name, local_files_only=offline))
    except Exception as error:  # HTTP, TLS, file locks and the hub each raise their own types
        root: BaseException = error
        while not offline and (cause := root.__cause__ or root.__context__):
            root = cause
        reason = "downloads are forbidden" if offline else " ".join(str(root).split())[:160]
        raise FpnxError(
            f"weights {weights.name} cannot be had ({reason}): put {weights.file_name} from {weights.url} at "
            f"{weights.file}, or take --weights random or --weights FILE"
        ) from error


def features_only_state(weights: TimmWeights, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a published file to that of the network that fpnx builds.

    Raises:
        FpnxError: timm cannot load it.
    """
    try:
        build = build_blocks if has_one_stride(weights.backbone) else build_network
        return build(weights.name, loaded=state).state_dict()
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FpnxError(f"timm cannot load the file of {weights.name}: {reason}") from error


@functools.lru_cache(maxsize=16)
def classifier_names(backbone: str) -> frozenset[str]:
    """The names of all parameters of timm's whole network `backbone`, head included."""
    return frozenset(build_network(backbone, meta=True, classifier=True).state_dict())


def filter_checkpoint(backbone: str, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` as timm's `checkpoint_filter_fn` for this network renames and reshapes it.

    It does this for files of the network's authors. Unchanged where timm has none, or where it cannot read the names.
    """
    timm = timm_library()
    architecture = backbone[len(TIMM) :].partition(".")[0]
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    function = getattr(module, "checkpoint_filter_fn", None)
    if function is None:
        return state
    try:
        with no_warnings(), torch.no_grad():
            filtered = function(dict(state), build_network(backbone, meta=True, classifier=True))
    except Exception:  # it expects the names of certain files, and fails on others in any way
        return state
    names = {name: value for name, value in dict(filtered).items() if isinstance(value, Tensor)}
    return names if not any(value.is_meta for value in names.values()) else state
