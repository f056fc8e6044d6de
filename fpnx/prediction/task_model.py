"""A model with the head that turns its levels into predictions, built from what `--weights` names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import get_model_weights

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.predict_config import PredictConfig
from fpnx.core.text import escape
from fpnx.labels.annotations import Category, Task
from fpnx.models.backbones.registry import TIMM, build_network, timm_library
from fpnx.models.factory import build_model
from fpnx.models.heads.base import Head, Pyramid
from fpnx.models.heads.detector import detector_head, has_detector_head
from fpnx.models.heads.framework import FRAMEWORKS, framework_head
from fpnx.models.heads.trained_file import load_trained
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.torch_state import isolated_torch_state
from fpnx.models.weights.checkpoints import read_checkpoint, read_description
from fpnx.models.weights.key_matching import first_names
from fpnx.models.weights.resolve import is_weights_file
from fpnx.models.weights.torchvision import best_weights, detector_of, find_published

__all__ = ["NOT_CLASSES", "TaskModel", "build_task_model"]

COCO_CLASSES = 91  # of torchvision's detectors, with the background and the numbers that COCO does not use
NOT_CLASSES = ("__background__", "N/A")  # torchvision's names of numbers that are no class
AUXILIARY = ("aux", "AuxLogits")  # heads of GoogLeNet and Inception that are for training alone
NO_HEAD = "take weights of a detector or a classifier, such as coco or imagenet, or a file of fpnx train"


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A model and what it predicts.

    Attributes:
        model: gives the levels, and says how images are prepared.
        head: turns levels into predictions; None where `network` does all.
        network: a whole classifier, from normalised images to logits; None where there is a head.
        task: what is predicted.
        categories: the classes, of which predictions have indices.
        multi_label: whether an image may have several classes, or none.
        kind: the head in a few words.
    """

    model: PyramidModel
    head: Head | None
    network: nn.Module | None
    task: Task
    categories: tuple[Category, ...]
    multi_label: bool
    kind: str

    def limit(self, config: PredictConfig) -> None:
        """Set the least score and the number of boxes of the head to those of the options."""
        if self.task != "detection" or self.head is None:
            return
        head: Any = self.head
        if config.threshold is not None:
            head.score_threshold = config.threshold
        if config.max_detections is not None:
            head.max_detections = config.max_detections

    def identity(self) -> dict[str, Any]:
        """What of the head changes predictions, as plain values for a fingerprint."""
        limits = {name: getattr(self.head, name, None) for name in ("score_threshold", "max_detections")}
        return {
            "head": self.kind,
            "classes": [[each.id, each.name] for each in self.categories],
            **{name: value for name, value in limits.items() if value is not None},
        }


def build_task_model(config: ExtractConfig) -> TaskModel:
    """The model that the weights make, in eval mode on the CPU.

    Raises:
        FpnxError: they have no head, or one that cannot be computed as it was trained.
    """
    if (trained := _trained(config)) is not None:
        return trained
    model = build_model(config, keep_heads=True)
    heads, weights = model.weights.heads, model.weights
    model.weights = replace(weights, heads={})
    if has_detector_head(heads) and weights.framework == "torchvision detection":
        return _detector(model, heads)
    if weights.framework in FRAMEWORKS and heads:
        return _framework_detector(model, heads, weights.framework)
    if (found := _classifier(model)) is not None:
        network, names = found
        return TaskModel(
            model=model,
            head=None,
            network=network.eval(),
            task="classification",
            categories=tuple(Category(i, name) for i, name in enumerate(names)),
            multi_label=False,
            kind="classifier",
        )
    raise FpnxError(f"{escape(weights.name)} has no head, so that nothing can be predicted: {NO_HEAD}")


def _trained(config: ExtractConfig) -> TaskModel | None:
    """The model in a file of `fpnx train`; None for other weights."""
    file = Path(config.weights)
    if not is_weights_file(config.weights) or not file.is_file():
        return None
    if "head" not in read_description(file):
        return None
    trained = load_trained(file, config)
    weights = trained.model.weights
    trained.model.weights = replace(weights, heads={}, ignored=max(0, weights.ignored - len(trained.head.state_dict())))
    return TaskModel(
        model=trained.model,
        head=trained.head,
        network=None,
        task=trained.task,
        categories=trained.categories,
        multi_label=bool(trained.head.settings().get("multi_label", False)),
        kind=trained.head.kind,
    )


def _detector(model: PyramidModel, heads: Mapping[str, Tensor]) -> TaskModel:
    """A detector in torchvision's layout."""
    name = model.weights.name
    detector = detector_of(name)
    try:
        head = detector_head(heads, _pyramid_of(model), detector)
    except FpnxError as error:
        raise FpnxError(f"{escape(name)}: {error}") from error
    loaded = sum(key.startswith(("rpn.", "roi_heads.", "head.")) for key in heads)
    model.weights = replace(model.weights, ignored=model.weights.ignored - loaded)
    return TaskModel(
        model=model,
        head=head,
        network=None,
        task="detection",
        categories=_detector_categories(detector, head.classes),
        multi_label=False,
        kind=head.summary,
    )


def _framework_detector(model: PyramidModel, heads: Mapping[str, Tensor], framework: str) -> TaskModel:
    """A detector of detectron2 or mmdetection."""
    name = model.weights.name
    try:
        head = framework_head(framework, heads, _pyramid_of(model))
    except FpnxError as error:
        raise FpnxError(f"{escape(name)}: {error}") from error
    model.weights = replace(model.weights, ignored=model.weights.ignored - len(heads))
    known = [each for each in _detector_categories(None, COCO_CLASSES) if each.name not in NOT_CLASSES]
    numbered = tuple(Category(i, f"class {i}") for i in range(1, head.classes + 1))
    return TaskModel(
        model=model,
        head=head,
        network=None,
        task="detection",
        categories=tuple(known) if head.classes == len(known) else numbered,
        multi_label=False,
        kind=f"{head.kind} of {framework}",
    )


def _pyramid_of(model: PyramidModel) -> Pyramid:
    return Pyramid(
        channels={level: model.channels[level] for level in model.levels},
        strides={level: model.stride(level) for level in model.levels},
    )


def _detector_categories(detector: str | None, classes: int) -> tuple[Category, ...]:
    """The classes of a published detector, or numbers where a file does not name them. Those of COCO have its ids."""
    if detector is None and classes == COCO_CLASSES:
        detector = "fasterrcnn_resnet50_fpn"
    if detector is not None:
        names: Sequence[str] = get_model_weights(detector).DEFAULT.meta["categories"]
        if len(names) == classes:
            return tuple(Category(i, name) for i, name in enumerate(names))
    return tuple(Category(i, f"class {i}") for i in range(classes))


def _classifier(model: PyramidModel) -> tuple[nn.Module, Sequence[str]] | None:
    """The whole classifier of torchvision or timm that the weights are of, with the names of its classes.

    None where they have no head.

    Raises:
        FpnxError: they have another head than the network's own.
    """
    weights = model.weights
    if weights.file is None or weights.framework not in (None, "torchvision", "timm"):
        return None
    if weights.framework is None and not weights.name.startswith(TIMM):
        return None
    if weights.name.startswith(TIMM):
        return _timm_classifier(weights.name, Path(weights.file))
    backbone = weights.backbone
    checkpoint = read_checkpoint(Path(weights.file), weights.key or None, averages_first=backbone.startswith(TIMM))
    state = {
        name[len(weights.prefix) :]: value
        for name, value in checkpoint.state.items()
        if name.startswith(weights.prefix) and not name.endswith("num_batches_tracked")
    }
    with isolated_torch_state():
        plain = build_network(backbone, meta=True, classifier=True).state_dict()
        state = {  # published DenseNets have older names
            key if key in plain else re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value
            for key, value in state.items()
        }
        last = [name for name, value in plain.items() if value.dim() > 1][-1]  # the layer with the classes
        if last not in state:
            _refuse_other_head(weights.name, backbone, last, state)
            return None
        classes = state[last].shape[0]
        network = build_network(backbone, classifier=True, options={"num_classes": classes})
        own = {name: v for name, v in network.state_dict().items() if not name.endswith("num_batches_tracked")}
        unfit = [name for name, v in own.items() if name not in state or state[name].shape != v.shape]
        if wrong := [name for name in unfit if not name.startswith(AUXILIARY)]:
            what = "lacks" if wrong[0] not in state else "has another shape of"
            raise FpnxError(f"{escape(weights.name)} {what} {wrong[0]}: save or download it again")
        used = {name: state[name] for name in own if name not in unfit}
        network.load_state_dict(used, strict=False)
    tensors = [name for name in checkpoint.state if not name.endswith("num_batches_tracked")]
    model.weights = replace(weights, ignored=len(tensors) - len(used))
    known: Sequence[str] = ()
    if not backbone.startswith(TIMM):
        published = find_published(weights.name, backbone)
        known = (best_weights(backbone) if published is None else published.entry).meta["categories"]
    return network, known if len(known) == classes else [f"class {i}" for i in range(classes)]


def _refuse_other_head(name: str, backbone: str, last: str, state: Mapping[str, Tensor]) -> None:
    """Refuse a head where the network has its own, but with other layers."""
    others = [key for key in state if key.startswith(f"{last.partition('.')[0]}.")]
    if others:
        raise FpnxError(
            f"{escape(name)}: its head ({first_names(others)}) is not the one of {backbone} ({last}): rename its "
            f"tensors, or train a head with fpnx train"
        )


def _timm_classifier(name: str, file: Path) -> tuple[nn.Module, Sequence[str]] | None:
    timm = timm_library()
    state = dict(read_checkpoint(file).state)
    with isolated_torch_state():
        network: Any = build_network(name, loaded=state, classifier=True)
    count = int(network.num_classes)
    if count == 0:
        return None
    config = network.pretrained_cfg
    names = config.get("label_names") if isinstance(config, dict) else None
    if not names:
        subset = timm.data.infer_imagenet_subset(network)
        if subset is not None:
            info = timm.data.ImageNetInfo(subset)
            names = [info.index_to_description(i) for i in range(count)]
    return network, list(names) if names else [f"class {i}" for i in range(count)]
