"""timm's weights: their names, recipes, addresses, and the caches that hold their files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.models.backbones.registry import TIMM, build_network, no_warnings, timm_library
from fpnx.models.preprocessing import Recipe

__all__ = ["TimmWeights", "adapted", "fetched", "forbidden", "timm_recipe", "timm_weights"]

RESAMPLINGS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class TimmWeights:
    """Weights of a timm network that can be asked for by name; nothing has been fetched or read.

    Attributes:
        name: `"timm/convnext_tiny.fb_in22k"`, which is a backbone's name too; `tag` is what stands after the dot.
        backbone: what they are for, `"timm/convnext_tiny"`.
        recipe: timm's own, the whole image stretched to its input size.
        hub_id: the repository at Hugging Face; url, file: where they are published, and where a copy is looked for.
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
        suffix = Path(self.file_name).suffix or ".safetensors"
        return Path(torch.hub.get_dir()) / "checkpoints" / f"timm-{self.name[len(TIMM) :]}{suffix}"


def timm_weights(backbone: str) -> list[TimmWeights]:
    """All weights for `backbone`, `timm/NAME` or `timm/NAME.TAG`, that can be asked for by name, its default first."""
    timm = timm_library()
    plain = backbone[len(TIMM) :]
    architecture = plain.partition(".")[0]
    default = timm.get_pretrained_cfg(plain)
    found = []
    for full in timm.list_pretrained(f"{architecture}*"):
        name, _, tag = full.partition(".")
        config = timm.get_pretrained_cfg(full) if name == architecture else None
        if config is None or not (config.hf_hub_id or config.url):
            continue
        file_name = config.hf_hub_filename or "model.safetensors"
        url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file_name}"
        if not config.hf_hub_id:
            file_name, url = os.path.basename(config.url), config.url
        found.append(
            TimmWeights(
                name=f"{TIMM}{full}",
                tag=tag,
                backbone=f"{TIMM}{architecture}",
                recipe=timm_recipe(config),
                hub_id=config.hf_hub_id or "",
                file_name=file_name,
                url=url,
            )
        )
    return sorted(found, key=lambda each: default is None or each.tag != (default.tag or ""))


def timm_recipe(config: Any) -> Recipe:
    """The recipe in a timm `pretrained_cfg`, with the whole image stretched to the input size: nothing is cut off."""
    told = timm_library().data.resolve_data_config(
        {}, pretrained_cfg=config if isinstance(config, dict) else config.to_dict()
    )
    return Recipe(
        sizing="stretch",
        height=int(told["input_size"][1]),
        width=int(told["input_size"][2]),
        resampling=told["interpolation"] if told["interpolation"] in RESAMPLINGS else "bicubic",
        mean=tuple(told["mean"]),
        std=tuple(told["std"]),
    )


def fetched(weights: TimmWeights, offline: bool) -> Path:
    """The file of `weights`: a copy put where `weights.file` says, or in Hugging Face's cache, or downloaded to there.

    Raises:
        FpnxError: where it cannot be had; names the file, its URL and the place for a copy.
    """
    if weights.file.exists():
        return weights.file
    offline = offline or forbidden()
    try:
        if not weights.hub_id:
            raise FileNotFoundError("it is not at Hugging Face")
        with no_warnings(), _silent("huggingface_hub"):
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(weights.hub_id, weights.file_name, local_files_only=offline))
    except Exception as error:  # every layer below has its own: HTTP, TLS, file locks, the hub's
        first: BaseException = error
        while not offline and (deeper := first.__cause__ or first.__context__):
            first = deeper
        why = "downloads are forbidden" if offline else " ".join(str(first).split())[:160]
        raise FpnxError(
            f"weights {weights.name} cannot be had ({why}): put {weights.file_name} from {weights.url} at "
            f"{weights.file}, or take --weights random or --weights FILE"
        ) from error


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Nothing from the logger `name` below a fault: what went wrong is told in one line, by us."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def adapted(weights: TimmWeights, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a published file holds, under the names that timm's `features_only` network gives it.

    Raises:
        FpnxError: where timm cannot load it.
    """
    try:
        return build_network(weights.name, loaded=state).state_dict()
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise FpnxError(f"timm cannot load the file of {weights.name}: {why}") from error


def forbidden() -> bool:
    """Whether `FPNX_OFFLINE` forbids downloads.

    Raises:
        FpnxError: for a word that says neither.
    """
    word = os.environ.get("FPNX_OFFLINE", "")
    if word.lower() not in ("", "0", "1", "false", "true", "no", "yes", "off", "on"):
        raise FpnxError(f"FPNX_OFFLINE={escape(word)}: take 1, which forbids downloads, or 0")
    return word.lower() in ("1", "true", "yes", "on")
