"""torchvision's published weights: names, recipes, URLs, and download through torch's hub cache."""

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
from fpnx.core.system import downloads_forbidden
from fpnx.models.backbones.huggingface import HF
from fpnx.models.backbones.registry import TIMM, timm_library, torchvision_names
from fpnx.models.preprocessing import Recipe
from fpnx.models.weights.huggingface import hf_recipe
from fpnx.models.weights.timm import timm_recipe

__all__ = [
    "COCO",
    "DETECTORS",
    "DETECTOR_RECIPE",
    "PublishedWeights",
    "best_weights",
    "cached_file",
    "classification_recipe",
    "detector_of",
    "detector_weights",
    "find_published",
    "known_names",
    "native_recipe",
    "norm_eps_of",
    "published_weights",
]

SOCKET_TIMEOUT = 30.0  # seconds without data before a download is aborted

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

# The weights that `coco` selects: the highest published box mAP on all 80 COCO classes (keypoint detectors have one)
# among detectors whose levels begin at the backbone's finest tap, or among all if there are no such detectors.
COCO = {
    "mobilenet_v3_large": "FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1",
    "resnet50": "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1",
}

# torchvision's `overwrite_eps`: these four were trained with epsilon 0 in their frozen batch norms.
ZERO_EPS_FILES = {
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
}

# The preprocessing of torchvision.models.detection (GeneralizedRCNNTransform).
DETECTOR_RECIPE = Recipe(
    sizing="aspect", short_side=800, long_side=1333, rounding="scaled-floor", backend="tensor", pad_multiple=32
)


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """A set of weights that torchvision publishes; nothing has been downloaded or read.

    Attributes:
        name: the full name, `"ResNet50_Weights.IMAGENET1K_V2"`.
        entry: torchvision's enum member.
        backbone: the network that they are for.
        trains: the parts that they hold: `("backbone",)` or `("backbone", "pyramid")`.
        recipe: their preprocessing.
    """

    name: str
    entry: WeightsEnum
    backbone: str
    trains: tuple[str, ...]
    recipe: Recipe

    @property
    def url(self) -> str:
        """Where they are published."""
        return str(self.entry.url)

    @property
    def file_name(self) -> str:
        """The last part of the URL."""
        return os.path.basename(self.url)

    @property
    def file(self) -> Path:
        """Their path in torch's hub cache, whether the file exists or not."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file_name


def published_weights(backbone: str) -> list[PublishedWeights]:
    """All published weights for `backbone`: classification first, then detection."""
    weights = [
        PublishedWeights(
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
            weights += [
                PublishedWeights(
                    name=str(entry), entry=entry, backbone=body, trains=("backbone", "pyramid"), recipe=recipe
                )
                for entry in models.get_model_weights(detector)
            ]  # fmt: skip
    return weights


def find_published(name: str, backbone: str | None) -> PublishedWeights | None:
    """Find weights by full name, or by a short name such as `IMAGENET1K_V2` together with `backbone`."""
    owner = _backbone_of_weights().get(name, backbone)
    if owner is None:
        return None
    candidates = published_weights(owner)
    return next(
        (each for each in candidates if name == each.name or (name == each.entry.name and len(each.trains) == 1)), None
    )


def known_names(backbone: str | None) -> list[str]:
    """All names that `find_published` accepts together with `backbone`."""
    short_names = [entry.name for entry in models.get_model_weights(backbone)] if backbone else []
    return [*_backbone_of_weights(), *DETECTORS, *short_names]


def detector_weights(detector: str) -> str:
    """The full name of torchvision's default weights for one of `DETECTORS`."""
    return str(models.get_model_weights(detector).DEFAULT)


def detector_of(weights: str) -> str | None:
    """The name in `DETECTORS` of the detector that published weights are for; None for other weights."""
    return next((name for name in DETECTORS if weights in map(str, models.get_model_weights(name))), None)


@lru_cache(maxsize=1)
def _backbone_of_weights() -> dict[str, str]:
    """Full name of weights → backbone."""
    return {str(entry): name for name in torchvision_names() for entry in models.get_model_weights(name)} | {
        str(entry): body for name, (body, *_) in DETECTORS.items() for entry in models.get_model_weights(name)
    }


def best_weights(backbone: str) -> WeightsEnum:
    """torchvision's default classification weights for `backbone`."""
    return models.get_model_weights(backbone).DEFAULT


def classification_recipe(weights: WeightsEnum) -> Recipe:
    """The recipe of classification weights, with the whole image stretched to the crop size instead of cropped."""
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
    """The recipe of the backbone's default weights; random weights use it too."""
    if backbone.startswith(HF):
        return hf_recipe(backbone)
    if backbone.startswith(TIMM):
        config = timm_library().get_pretrained_cfg(backbone[len(TIMM) :])
        return timm_recipe(config if config is not None else {})
    return classification_recipe(best_weights(backbone))


def norm_eps_of(file: Path, sha256: str) -> float:
    """The epsilon of the batch norms in a torchvision detector's file; published files are known by name or hash."""
    digests = {name.rsplit("-", 1)[1][:8] for name in ZERO_EPS_FILES}
    return 0.0 if file.name in ZERO_EPS_FILES or sha256[:8] in digests else 1e-5


def cached_file(published: PublishedWeights, offline: bool) -> Path:
    """The file of `published` in torch's hub cache; downloaded, with a check of its hash, if it is missing.

    Raises:
        FpnxError: it cannot be downloaded; names the file, its URL and the folder for a copy.
    """
    file = published.file
    if file.exists():
        return file
    offline = offline or downloads_forbidden()
    try:
        if offline:
            raise FpnxError("downloads are forbidden")
        file.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout():
            torch.hub.download_url_to_file(
                published.url, str(file), hash_prefix=file.stem.rsplit("-", 1)[-1], progress=sys.stderr.isatty()
            )
    except (
        FpnxError,
        OSError,
        RuntimeError,
    ) as error:  # URLError and timeouts are OSErrors; a wrong hash is a RuntimeError
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise FpnxError(
            f"weights {published.name} cannot be had ({reason}): put {file.name} from {published.url} into "
            f"{file.parent}, or take --weights random or --weights FILE"
        ) from error
    return file


@contextmanager
def _socket_timeout() -> Iterator[None]:
    """Set a timeout for new sockets, because torch.hub sets none and would wait without end."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
