"""`fpnx models`: lists backbones with their stages, sizes and published weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torchvision import models

from fpnx.core.errors import FpnxError
from fpnx.core.text import did_you_mean
from fpnx.models.backbones.factory import StageDetection, cached_detection, create_backbone, detect_stages
from fpnx.models.backbones.huggingface import HF
from fpnx.models.backbones.registry import TIMM, build_network, timm_library, torchvision_names
from fpnx.models.backbones.stage_search import Stages
from fpnx.models.backbones.tracing import meta_copy, on_meta, run_on_meta
from fpnx.models.flop_counter import FlopCounter
from fpnx.models.necks.fpn import FPN
from fpnx.models.necks.registry import NECKS
from fpnx.models.torch_state import on_meta_device
from fpnx.models.weights.huggingface import hf_weights
from fpnx.models.weights.timm import timm_weights
from fpnx.models.weights.torchvision import COCO, best_weights, native_recipe, published_weights

__all__ = ["FPN_CHANNELS", "details", "entries", "is_backbone", "matching", "overview", "pyramids"]

FPN_CHANNELS = 256  # channels of the pyramid whose parameters and operations are counted


def is_backbone(name: str) -> bool:
    """Whether `name` is the full name of a network; a part of a name is not."""
    if name.startswith(HF):
        return len(name) > len(HF)
    return timm_library().is_model(name[len(TIMM) :]) if name.startswith(TIMM) else name in torchvision_names()


def matching(part: str | None = None) -> list[str]:
    """The backbones whose name contains `part`: torchvision's, or timm's if it begins with `timm/`.

    Raises:
        FpnxError: there is none.
    """
    part = part or ""
    if part.startswith(TIMM):
        names = [f"{TIMM}{name}" for name in timm_library().list_models() if part[len(TIMM) :] in name]
    else:
        names = [name for name in torchvision_names() if part in name]
    if not names:
        raise FpnxError(
            f"no backbone's name contains {part!r}{did_you_mean(part.lower(), torchvision_names())}: "
            f"fpnx models lists them all"
        )
    return names


def entries(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield one JSON object for each backbone; no weights are loaded.

    It has the taps, the kinds of pyramid, the parameters of the whole classifier and the kinds of weights. A network
    without stages has the reason as `refused` instead. Stages of torchvision's networks that are not in the cache are
    detected, a tenth of a second each; timm's networks have taps and kinds only if they are in the cache.
    """
    for name in names:
        detection = cached_detection(name) if name.startswith(TIMM) else detect_stages(name)
        if detection is not None and detection.stages is None:
            yield {"name": name, "refused": detection.refused}
        else:
            stages = detection.stages if detection else None
            yield {
                "name": name,
                "taps": _taps(stages),
                "pyramids": None if detection is None else _kinds(detection),
                **_published_facts(name),
            }


def pyramids() -> list[dict[str, Any]]:
    """The kinds of pyramid, each as a JSON object: its name, what it is, and whether it is made of one map."""
    return [
        {"name": name, "summary": neck.summary, "of_one_map": neck.accepts_single_stride}
        for name, neck in NECKS.items()
    ]


def overview(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`entries` as one JSON object: `backbones`, those `refused` with the reason, and the kinds of `pyramids`."""
    listed = list(rows)
    return {
        "backbones": [row for row in listed if "refused" not in row],
        "refused": [{"name": row["name"], "reason": row["refused"]} for row in listed if "refused" in row],
        "pyramids": pyramids(),
    }


def details(name: str) -> dict[str, Any]:
    """One backbone as a JSON object: taps, parameters, operations at its recipe's size, and weights with their files.

    GFLOPs count a multiply-add as 2, for the taps and for a pyramid with `FPN_CHANNELS` channels, where the backbone
    has maps of several strides. No weights are loaded.

    Raises:
        FpnxError: a network without stages.
    """
    recipe = native_recipe(name)
    size = recipe.fixed_size
    assert size is not None
    stages = detect_stages(name).stages
    blocks = stages.blocks if stages is not None else 0
    backbone = create_backbone(name, 0, size=size if detect_stages(name).keyword else None, meta=True)
    size = backbone.size or size
    with FlopCounter() as body_counter:
        taps = run_on_meta(meta_copy(backbone.body), size, counted=True)
    pyramid = None if backbone.one_stride else on_meta(FPN(backbone.pyramid_channels, FPN_CHANNELS))
    if pyramid is not None:
        with on_meta_device(counted=True), FlopCounter() as pyramid_counter:
            pyramid(taps)
    return {
        "name": name,
        "taps": [
            {**tap, "height": taps[tap["level"]].shape[2], "width": taps[tap["level"]].shape[3]}
            for tap in _taps(stages)
        ],
        "input_size": list(size),
        "blocks": blocks or None,
        "pyramids": _kinds(detect_stages(name)),
        "only_squares_in_multiples_of": backbone.side,
        "recipe": str(recipe),
        "parameters": {
            "body": _count(backbone.body),
            "pyramid": None if pyramid is None else _count(pyramid),
            "published": None if name.startswith((TIMM, HF)) else _count(build_network(name, meta=True)),
        },
        "gflops": {
            "body": body_counter.flops / 1e9,
            "pyramid": None if pyramid is None else pyramid_counter.flops / 1e9,
            "multiply_add_counts_as": 2,
        },
        "pyramid_channels": FPN_CHANNELS,
        "weights": _weights(name),
    }


def _weights(name: str) -> list[dict[str, Any]]:
    """All weights that `--weights` accepts by name for this backbone."""
    if name.startswith(HF):
        return [hf_weights(name)]
    is_timm = name.startswith(TIMM)
    published: list[Any] = [*timm_weights(name)] if is_timm else [*published_weights(name)]
    aliases = {} if is_timm else {"imagenet": str(best_weights(name)), "coco": COCO.get(name)}
    if is_timm and published:
        aliases = {"imagenet": published[0].name}
    return [
        {
            "name": each.name,
            "also": [alias for alias, full_name in aliases.items() if full_name == each.name],
            "trains": list(each.trains),
            "recipe": str(each.recipe),
            "url": each.url,
            "file_name": each.file.name,
            "file": str(each.file),
            "there": each.file.exists(),
        }
        for each in published
    ]


def _published_facts(name: str) -> dict[str, Any]:
    if name.startswith(TIMM):
        tagged = timm_library().list_pretrained(f"{name[len(TIMM) :]}.*")
        return {"parameters": None, "weights": ["random", *(["imagenet"] if tagged else [])]}
    entries = list(models.get_model_weights(name))
    kinds = ["random", *(["imagenet"] if entries else []), *(["coco"] if name in COCO else [])]
    return {"parameters": entries[0].meta["num_params"] if entries else None, "weights": kinds}


def _kinds(detection: StageDetection) -> list[str]:
    """The kinds of pyramid that a backbone can have."""
    several = detection.stages is not None and detection.stages.stride is None
    any_size = detection.keyword is None
    return [
        name
        for name, neck in NECKS.items()
        if (several or neck.accepts_single_stride) and (any_size or name != "image")
    ]


def _taps(stages: Stages | None) -> list[dict[str, Any]]:
    if stages is None:
        return []
    return [
        {"level": f"C{level}", "stride": stages.stride or 2**level, "node": tap.node, "channels": tap.channels}
        for level, tap in sorted(stages.taps.items())
    ]


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
