"""The weights that torchvision publishes: their names, recipes, addresses, and the cache that holds their files."""

from __future__ import annotations

import os
import socket
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torchvision import models
from torchvision.models import WeightsEnum

from fpnx.core.errors import FpnxError
from fpnx.models.backbones.registry import TIMM, timm_library, torchvision_names
from fpnx.models.preprocessing import Recipe
from fpnx.models.weights.timm import forbidden, timm_recipe

__all__ = [
    "COCO",
    "DETECTORS",
    "DETECTOR_RECIPE",
    "Published",
    "best_weights",
    "cached_file",
    "classification_recipe",
    "find_published",
    "known_names",
    "native_recipe",
    "norm_eps_of",
    "published_weights",
]

STALLED_AFTER = 30.0  # seconds without a byte before a download is given up

# torchvision's detectors with a feature pyramid → backbone, shorter side, longest side.
DETECTORS: dict[str, tuple[str, int, int]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("mobilenet_v3_large", 320, 640),
    "fasterrcnn_mobilenet_v3_large_fpn": ("mobilenet_v3_large", 800, 1333),
    "fasterrcnn_resnet50_fpn": ("resnet50", 800, 1333),
    "fasterrcnn_resnet50_fpn_v2": ("resnet50", 800, 1333),
    "fcos_resnet50_fpn": ("resnet50", 800, 1333),
    "keypointrcnn_resnet50_fpn": ("resnet50", 800, 1333),
    "maskrcnn_resnet50_fpn": ("resnet50", 800, 1333),
    "maskrcnn_resnet50_fpn_v2": ("resnet50", 800, 1333),
    "retinanet_resnet50_fpn": ("resnet50", 800, 1333),
    "retinanet_resnet50_fpn_v2": ("resnet50", 800, 1333),
}

# What `coco` stands for: the highest published box mAP on all 80 COCO classes (keypoint detectors know one) among
# detectors whose levels begin at the backbone's finest tap, where it has any such; else the highest of all.
COCO = {
    "mobilenet_v3_large": "FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1",
    "resnet50": "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1",
}

# torchvision's `overwrite_eps`: these four were trained without an epsilon in their frozen batch norms.
WITHOUT_EPS = {
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
}

# What torchvision.models.detection does to an image (GeneralizedRCNNTransform).
DETECTOR_RECIPE = Recipe(
    sizing="aspect", short_side=800, long_side=1333, rounding="scaled-floor", backend="tensor", pad_multiple=32
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Weights that can be asked for by name; nothing has been fetched or read.

    Attributes:
        name: the full name, `"ResNet50_Weights.IMAGENET1K_V2"`; `entry` is torchvision's own object.
        backbone: what they are for.
        trains: `("backbone",)` or `("backbone", "pyramid")`.
        recipe: the preprocessing that they carry.
        url, file: where they are published, and where the cache holds them (torch's hub folder).
    """

    name: str
    entry: WeightsEnum
    backbone: str
    trains: tuple[str, ...]
    recipe: Recipe

    @property
    def url(self) -> str:
        return str(self.entry.url)

    @property
    def file_name(self) -> str:
        return os.path.basename(self.url)

    @property
    def file(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file_name


def published_weights(backbone: str) -> list[Published]:
    """All weights for `backbone` that can be asked for by name: classification first, then detection."""
    found = [
        Published(
            name=str(entry),
            entry=entry,
            backbone=backbone,
            trains=("backbone",),
            recipe=classification_recipe(entry),
        )
        for entry in models.get_model_weights(backbone)
    ]
    for detector, (body, short_side, long_side) in DETECTORS.items():
        if body == backbone:
            recipe = replace(DETECTOR_RECIPE, short_side=short_side, long_side=long_side)
            found += [
                Published(
                    name=str(entry), entry=entry, backbone=body, trains=("backbone", "pyramid"), recipe=recipe
                )
                for entry in models.get_model_weights(detector)
            ]  # fmt: skip
    return found


def find_published(name: str, backbone: str | None) -> Published | None:
    """The weights called `name`: a full name, or a short one such as `IMAGENET1K_V2` beside a backbone."""
    owner = _owners().get(name, backbone)
    if owner is None:
        return None
    entries = published_weights(owner)
    return next(
        (each for each in entries if name == each.name or (name == each.entry.name and len(each.trains) == 1)), None
    )


def known_names(backbone: str | None) -> list[str]:
    """Every name that `find_published` finds beside `backbone`."""
    short = [entry.name for entry in models.get_model_weights(backbone)] if backbone else []
    return [*_owners(), *short]


@lru_cache(maxsize=1)
def _owners() -> dict[str, str]:
    """Full name → backbone, without building a recipe."""
    return {str(entry): name for name in torchvision_names() for entry in models.get_model_weights(name)} | {
        str(entry): body for name, (body, *_) in DETECTORS.items() for entry in models.get_model_weights(name)
    }


def best_weights(backbone: str) -> WeightsEnum:
    """Torchvision's best classification weights of `backbone`."""
    return models.get_model_weights(backbone).DEFAULT


def classification_recipe(weights: WeightsEnum) -> Recipe:
    """The recipe of classification weights, with the whole image stretched to the crop size: nothing is cut off."""
    preset = weights.transforms()
    return Recipe(
        sizing="stretch",
        height=preset.crop_size[0],
        width=preset.crop_size[0],
        resampling=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def native_recipe(backbone: str) -> Recipe:
    """The recipe of the backbone's best weights, which random ones take too."""
    if backbone.startswith(TIMM):
        config = timm_library().get_pretrained_cfg(backbone[len(TIMM) :])
        return timm_recipe(config if config is not None else {})
    return classification_recipe(best_weights(backbone))


def norm_eps_of(file: Path, sha256: str) -> float:
    """The epsilon of the norm layers in a torchvision detector's file; a published one is known by name or content."""
    digests = {name.rsplit("-", 1)[1][:8] for name in WITHOUT_EPS}
    return 0.0 if file.name in WITHOUT_EPS or sha256[:8] in digests else 1e-5


def cached_file(published: Published, offline: bool) -> Path:
    """The file of `published` in torch's hub cache, downloaded (and checked) if it is not there.

    Raises:
        FpnxError: where it cannot be had; names the file, its URL and the folder for a copy.
    """
    file = published.file
    if file.exists():
        return file
    offline = offline or forbidden()
    try:
        if offline:
            raise FpnxError("downloads are forbidden")
        file.parent.mkdir(parents=True, exist_ok=True)
        with _impatient_sockets():
            torch.hub.download_url_to_file(
                published.url, str(file), hash_prefix=file.stem.rsplit("-", 1)[-1], progress=sys.stderr.isatty()
            )
    except (FpnxError, OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors; a bad hash is not
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        raise FpnxError(
            f"weights {published.name} cannot be had ({why}): put {file.name} from {published.url} into "
            f"{file.parent}, or take --weights random or --weights FILE"
        ) from error
    return file


@contextmanager
def _impatient_sockets() -> Iterator[None]:
    """torch.hub waits for ever on a silent server; sockets opened in here do not."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_AFTER)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
