"""The file of a trained model: backbone, neck and head under torchvision's names, with classes and scores."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fpnx.core.config import ModelConfig
from fpnx.core.errors import FpnxError
from fpnx.core.option_groups import TASKS
from fpnx.core.provenance import ModelPart
from fpnx.core.text import escape
from fpnx.labels.annotations import Category, Task
from fpnx.models.factory import NeckPlan, build_model, describe_model
from fpnx.models.heads.base import Head
from fpnx.models.heads.registry import create_head
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.weights.checkpoints import read_checkpoint, write_checkpoint
from fpnx.models.weights.key_matching import first_names

__all__ = ["TRAINED_BY", "TrainedModel", "load_trained", "save_trained"]

TRAINED_BY = "fpnx train"  # the source of parts that were trained with a head
PREFIX = "backbone."  # of the model's names, as in torchvision's detectors


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model with its head, as a file has it.

    Attributes:
        model: backbone and neck, in eval mode on the CPU; its levels are those of the head.
        head: in eval mode on the CPU.
        categories: the classes, in the order of the head's indices.
        task: what it was trained for.
        scores: on held-out images, by name.
        facts: how it was trained, as plain values.
    """

    model: PyramidModel
    head: Head
    categories: tuple[Category, ...]
    task: Task
    scores: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_trained(
    path: str | os.PathLike[str], trained: TrainedModel, *, parts: Collection[str] = ("fpn",), source: str = TRAINED_BY
) -> None:
    """Write a trained model to one file, `.safetensors`, `.pt` or `.pth`, which is replaced as a whole.

    Names of parameters are torchvision's: `backbone.body.*`, `backbone.fpn.*`, then those of the head, so that
    torchvision's detectors load the file where they have the same backbone. `--weights FILE` takes the pyramid.

    Args:
        path: the file.
        trained: what to write.
        parts: those of the model that were trained: `"body"`, `"fpn"`.
        source: what trained them.

    Raises:
        FpnxError: the file cannot be written, or could not be read back.
    """
    model, head = trained.model, trained.head
    weights = model.current_weights()
    now = {"body": weights.body, "fpn": weights.fpn}
    has_neck = any(True for _ in model.fpn.parameters())
    now |= {part: ModelPart(True, source) for part in parts if part != "fpn" or has_neck}
    description = describe_model(model, now, path) | {
        "head": {"kind": head.kind, "settings": head.settings()},
        "classes": [{"id": category.id, "name": category.name} for category in trained.categories],
        "task": trained.task,
        "scores": dict(trained.scores),
        "trained": dict(trained.facts),
    }
    state: dict[str, Tensor] = {f"{PREFIX}{name}": value for name, value in model.state_dict().items()}
    write_checkpoint(path, state | head.state_dict(), description)


def load_trained(path: str | os.PathLike[str], config: ModelConfig | None = None) -> TrainedModel:
    """Read what `save_trained` wrote.

    Args:
        path: the file.
        config: options of the model that change what is done to images; its `weights` are not looked at.

    Raises:
        FpnxError: the file cannot be read, has no head, or is not whole.
    """
    file = Path(path)
    checkpoint = read_checkpoint(file)
    description = checkpoint.description or {}
    if "head" not in description:
        raise FpnxError(f"{escape(file)} has no head, only a backbone or a pyramid: train one with fpnx train")
    try:
        kind, settings, categories, task = _head_of(description)
        model = build_model(replace(config or ModelConfig(), weights=str(file)), plan=NeckPlan())
        head = create_head(kind, model, len(categories), settings=settings)
        state = {name: value for name, value in checkpoint.state.items() if not name.startswith(PREFIX)}
        _fill(head, state)
    except FpnxError as error:
        reason = str(error)
        raise FpnxError(reason if reason.startswith(escape(file)) else f"{escape(file)}: {reason}") from error
    return TrainedModel(
        model=model,
        head=head.eval(),
        categories=categories,
        task=task,
        scores=description.get("scores", {}),
        facts=description.get("trained", {}),
    )


def _head_of(description: Mapping[str, Any]) -> tuple[str, dict[str, Any], tuple[Category, ...], Task]:
    """Kind and settings of the head, the classes and the task in a description.

    Raises:
        FpnxError: one of them is not what `save_trained` writes.
    """
    try:
        kind, settings = description["head"]["kind"], dict(description["head"]["settings"])
        categories = tuple(Category(id=int(each["id"]), name=str(each["name"])) for each in description["classes"])
        task = description["task"]
        if not isinstance(kind, str) or task not in TASKS or not categories:
            raise ValueError(task)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FpnxError(f"its description has no whole head ({escape(str(error))[:60]}): train it again") from error
    return kind, settings, categories, task


def _fill(head: Head, state: Mapping[str, Tensor]) -> None:
    """Load the parameters of a head, all of them."""
    own = head.state_dict()
    wrong = [name for name in {**own, **state} if name not in own or name not in state]
    wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        raise FpnxError(f"the parameters of its head do not fit head {head.kind}: {first_names(wrong)}")
    head.load_state_dict(state)
