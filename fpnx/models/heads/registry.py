"""The heads by name, as `--head` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.text import did_you_mean, escape
from fpnx.labels.annotations import Task
from fpnx.models.heads.base import Head, Pyramid
from fpnx.models.heads.classify import ClassifyHead
from fpnx.models.heads.detection import FasterRcnnHead, FcosHead, MaskRcnnHead, RetinaNetHead
from fpnx.models.heads.semantic import SemanticHead
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.torch_state import isolated_torch_state

__all__ = ["HEADS", "create_head", "default_head", "find_head"]

HEADS: dict[str, type[Head]] = {
    "fcos": FcosHead,
    "retinanet": RetinaNetHead,
    "faster_rcnn": FasterRcnnHead,
    "mask_rcnn": MaskRcnnHead,
    "semantic": SemanticHead,
    "classify": ClassifyHead,
}


def find_head(kind: str) -> type[Head]:
    """The class of the head `kind`.

    Raises:
        FpnxError: there is none of that name.
    """
    if kind not in HEADS:
        raise FpnxError(f"head {escape(kind)!r} is unknown{did_you_mean(kind, HEADS)}: take {', '.join(HEADS)}")
    return HEADS[kind]


def default_head(task: Task, has_segments: bool = False) -> str:
    """The head for a task where none is named: `"classify"`, `"semantic"`, or for boxes `"fcos"`.

    `"mask_rcnn"` takes several times the work, and is chosen by name alone, also where objects have outlines.
    """
    return {"classification": "classify", "detection": "fcos", "semantic": "semantic"}[task]


def create_head(
    kind: str, model: PyramidModel, classes: int, *, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> Head:
    """A head on all levels of a model, in training mode on the CPU, with parameters drawn from `seed`.

    Args:
        kind: the head's name.
        model: its `levels` are those that the head takes.
        classes: number of classes, background not counted.
        seed: of the parameters.
        settings: of the head, such as `{"convolutions": 2, "channels": 128}`; what is left out has its default.

    Raises:
        FpnxError: an unknown head or setting, or levels that it cannot take.
    """
    channels = {name: model.channels[name] for name in model.levels}
    pyramid = Pyramid(channels=channels, strides={name: model.stride(name) for name in model.levels})
    with isolated_torch_state():
        head = find_head(kind).for_pyramid(pyramid, classes, settings or {})
    head.initialize(seed)
    return head
