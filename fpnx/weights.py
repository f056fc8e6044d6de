"""Where parameters come from: seeds, torchvision's names and cache, files; and the recipes they carry."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fpnx.backbones import known_backbone
from fpnx.config import ModelConfig
from fpnx.errors import FpnxError, nearest, shown
from fpnx.hub import adapted, fetched, timm_recipe, timm_weights
from fpnx.published import (
    Published,
    best_weights,
    cached_file,
    find_published,
    known_names,
    modern_key,
    native_recipe,
    published_weights,
)
from fpnx.recipes import Recipe
from fpnx.zoo import TIMM

__all__ = [
    "Part",
    "Published",
    "Weights",
    "given_weights",
    "published_weights",
    "resolve_weights",
    "write_weights",
]

DEFAULT_BACKBONE = "resnet50"
AS_GIVEN = "as given"  # the parameters of somebody's own module
FORMAT = "fpnx-weights"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Part:
    """The body or the pyramid of a model: whether it was trained (None: unknown), and where it came from."""

    trained: bool | None
    source: str

    def __str__(self) -> str:
        if self.source == AS_GIVEN:
            return AS_GIVEN
        state = {True: "trained", False: "untrained", None: "from file"}[self.trained]
        return f"{state} ({self.source})"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Parameters on the CPU and what they say of themselves.

    `state` is in fpnx's layout (`body.*`, `fpn.*`), without the parts that are drawn from the seed: a body or a
    pyramid that it does not hold is random. `pyramid` describes the pyramid in the file (first_level, channels,
    top_block, levels), where there is one.
    """

    name: str
    backbone: str
    recipe: Recipe
    body: Part
    fpn: Part
    state: Mapping[str, Tensor]
    pyramid: Mapping[str, Any] | None = None
    file: str | None = None
    sha256: str | None = None


def resolve_weights(config: ModelConfig) -> Weights:
    """Find, fetch and read what `config.weights` names. Cache first; never another choice than the one asked for.

    Raises:
        FpnxError: an unknown name, a contradiction with `config.backbone`, a file that cannot be had or read.
    """
    backbone = None if config.backbone is None else known_backbone(config.backbone)
    choice = config.weights
    if choice == "random":
        name = backbone or DEFAULT_BACKBONE
        return Weights(
            name="random",
            backbone=name,
            recipe=native_recipe(name),
            body=_drawn(config.seed),
            fpn=_drawn(config.seed),
            state={},
        )
    if (config.backbone or choice).startswith(TIMM) and not _is_file(choice):
        return _timm(config)
    if choice in ("default", "imagenet"):
        choice = str(best_weights(backbone or DEFAULT_BACKBONE))
    if published := find_published(choice, backbone):
        return _torchvision(published, config)
    if _is_file(choice):
        return _own_file(Path(choice), backbone, config)
    raise FpnxError(
        f"weights {shown(choice)!r} are neither a name nor a file{nearest(choice, known_names(backbone))}: "
        "take default, imagenet, coco, random, a file, or a name that "
        f"`fpnx models {backbone or DEFAULT_BACKBONE}` lists"
    )


def given_weights(module: nn.Module, name: str, seed: int) -> Weights:
    """A module's own parameters, which stay as they are, and a pyramid drawn from `seed`.

    The recipe is the module's `recipe` where it has one (a `Recipe`), else what timm noted in its `pretrained_cfg`,
    else ImageNet's mean and standard deviation on images stretched to 224×224.
    """
    recipe, config = getattr(module, "recipe", None), getattr(module, "pretrained_cfg", None)
    if not isinstance(recipe, Recipe):
        timm_told = isinstance(config, dict) and {"input_size", "mean", "std"} <= set(config)
        recipe = timm_recipe(config) if timm_told else Recipe(height=224, width=224)
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Weights(
        name=AS_GIVEN,
        backbone=name,
        recipe=recipe,
        body=Part(None, AS_GIVEN),
        fpn=_drawn(seed),
        state={},
        sha256=digest.hexdigest(),
    )


def write_weights(path: str | os.PathLike[str], state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `state` with its description: safetensors for `.safetensors`, else a torch file; whole or not at all.

    Raises:
        FpnxError: where the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".pt", ".pth", ".safetensors"):
        raise FpnxError(f"weights file {shown(target)}: take a name that ends in .safetensors, .pt or .pth")
    # Tensors may share memory, which safetensors refuses; contiguous copies on the CPU do not.
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    description = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **about}, sort_keys=True)
    part = target.with_name(target.name + ".part")
    try:
        if target.suffix == ".safetensors":
            safetensors.torch.save_file(plain, part, metadata={"fpnx": description})
        else:
            torch.save({"fpnx": description, "state_dict": plain}, part)
        os.replace(part, target)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise FpnxError(f"cannot write {shown(target)}: {error}") from error


def _drawn(seed: int) -> Part:
    return Part(False, f"random, seed {seed}")


def _torchvision(published: Published, config: ModelConfig) -> Weights:
    if config.backbone not in (None, published.backbone):
        raise FpnxError(
            f"weights {published.name} are for {published.backbone}, not for {config.backbone}: drop one of the two"
        )
    file = cached_file(published, config.offline)
    state, _ = _read(file)
    return Weights(
        name=published.name,
        backbone=published.backbone,
        recipe=published.recipe,
        body=Part(True, published.name),
        fpn=_drawn(config.seed),
        state={f"body.{modern_key(name)}": value for name, value in state.items()},
        file=str(file),
        sha256=_sha256(file),
    )


def _timm(config: ModelConfig) -> Weights:
    """timm's weights: by the tag, by the full name (which names the backbone too), or the default ones."""
    backbone, choice = config.backbone or config.weights, config.weights
    known = timm_weights(known_backbone(backbone))
    tag = backbone.partition(".")[2]
    if choice in ("default", "imagenet"):
        wanted = [each for each in known if each.tag == tag] or known
    else:
        wanted = [each for each in known if choice in (each.name, each.name[len(TIMM) :], each.tag)]
    found = wanted[0] if wanted else None
    if found is None:
        there = ", ".join(each.tag for each in known) or "none"
        raise FpnxError(f"timm has no weights {shown(choice)!r} for {backbone}, only {there}: take random, or a file")
    if tag and found.tag != tag:
        raise FpnxError(f"weights {found.name} are not those of {backbone}: drop one of the two")
    file = fetched(found, config.offline)
    state, _ = _read(file)
    return Weights(
        name=found.name,
        backbone=config.backbone or found.backbone,
        recipe=found.recipe,
        body=Part(True, found.name),
        fpn=_drawn(config.seed),
        state={f"body.{name}": value for name, value in adapted(found, state).items()},
        file=str(file),
        sha256=_sha256(file),
    )


def _is_file(choice: str) -> bool:
    return os.path.lexists(choice) or Path(choice).suffix in (".pt", ".pth", ".safetensors")


def _own_file(file: Path, backbone: str | None, config: ModelConfig) -> Weights:
    state, description = _read(file)
    about = _described(description, file)
    if not any(name.startswith(("body.", "fpn.")) for name in state):
        raise FpnxError(
            f"{shown(file)} holds no keys body.* or fpn.* (but {_few(state)}): not a layout that fpnx knows"
        )
    named = about.get("backbone")
    if named is not None and backbone not in (None, named):
        raise FpnxError(f"{shown(file)} is for {named}, not for {backbone}: drop --backbone or take another file")
    name = named or backbone
    if name is None:
        raise FpnxError(f"{shown(file)} does not say for which backbone it is: name it with --backbone")
    parts = about.get("parts", {})
    body, fpn = (
        Part(*parts[part]) if part in parts else Part(None, file.name)
        if any(key.startswith(f"{part}.") for key in state) else _drawn(config.seed)
        for part in ("body", "fpn")
    )  # fmt: skip
    return Weights(
        name=file.name,
        backbone=known_backbone(name),
        recipe=Recipe.from_json(about["recipe"]) if "recipe" in about else native_recipe(name),
        body=body,
        fpn=fpn,
        state=state,
        pyramid=_pyramid_in(state, about, file),
        file=str(file),
        sha256=_sha256(file),
    )


def _pyramid_in(state: Mapping[str, Tensor], about: Mapping[str, Any], file: Path) -> dict[str, Any] | None:
    laterals = [name for name in state if name.startswith("fpn.inner_blocks.") and name.endswith(".0.weight")]
    if not laterals:
        return None
    first = about.get("first_level", 6 - len(laterals))  # without a description: a pyramid ends at C5
    extra = state.get("fpn.extra_blocks.p6.weight")
    width = state[laterals[0]].shape[0]
    top_block = about.get("top_block")
    if extra is not None and top_block is None:
        top_block = "p5" if extra.shape[1] == width else "c5"
    levels = about.get("levels") or [f"P{k}" for k in range(first, 8 if extra is not None else 6)]
    if not isinstance(first, int) or not 2 <= first <= 5:
        raise FpnxError(f"{shown(file)} gives its pyramid's first level as {first!r}: 2 to 5 can be")
    return {"first_level": first, "channels": width, "top_block": top_block, "levels": tuple(levels)}


def _read(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file and fpnx's description in it. No code in a file is ever run."""
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt") as handle:
                names, about = handle.keys(), handle.metadata() or {}
                return {name: handle.get_tensor(name) for name in names}, about.get("fpnx")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FpnxError(f"cannot read weights from {shown(file)}: {why[:200]}") from error
    except safetensors.SafetensorError as error:
        raise FpnxError(f"cannot read weights from {shown(file)}: {error}") from error
    description = content.get("fpnx") if isinstance(content, dict) else None
    if isinstance(description, str) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    else:
        description = None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise FpnxError(f"{shown(file)} is not a state dict (names with tensors): save model.state_dict()")
    return {str(name): value for name, value in content.items()}, description


def _described(description: str | None, file: Path) -> dict[str, Any]:
    if description is None:
        return {}
    try:
        about = json.loads(description)
        version = about["version"]
        if about["format"] != FORMAT or not isinstance(version, int):
            raise ValueError(about["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise FpnxError(f"{shown(file)} has a description that is not fpnx's: {error}") from error
    if version > FORMAT_VERSION:
        raise FpnxError(f"{shown(file)} is of version {version}, this fpnx reads {FORMAT_VERSION}: update fpnx")
    return dict(about)


def _few(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
