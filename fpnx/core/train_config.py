"""The options of `fpnx train`: validated, frozen, each declared once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.option import like, option
from fpnx.core.option_groups import TASKS, InputConfig, ModelConfig, OutputConfig, RunConfig
from fpnx.core.text import escape
from fpnx.core.validation import auto_or_whole, check_fields, check_plot, check_whole, freeze

__all__ = ["HEAD_NAMES", "TrainConfig"]

HEAD_NAMES = ("classify", "fcos", "retinanet", "faster_rcnn", "mask_rcnn", "semantic")
NECK_VARIANTS = ("full", "no-lateral", "no-top-down")
AUGMENTATIONS = ("auto", "none")
MAX_EPOCHS = 10_000

# Options that do not change what is learned, or that only name files: a run may be continued with other ones.
WITHOUT_EFFECT = frozenset(
    {"device", "workers", "resume", "overwrite", "log", "plot", "offline", "labels", "weights"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(InputConfig, ModelConfig):
    """All options of `fpnx train`.

    `unfreeze`: how many of the backbone's last stages are trained too, or `"all"`; kept as a number or `"all"`.
    `val`: the share of the images that is held out (0 to 0.9), or a label file or folder of its own; kept as text or
    a number. `epochs`: `"auto"` or a number. `learning_rate` None: the head's own.
    """

    labels: str | None = option(
        None,
        "Label file or folder (COCO, YOLO, VOC, CSV, masks), or folders: the images' own.",
        "Labels",
        metavar="LABELS",
    )
    task: str | None = option(
        None, "What is learned (default: by the labels).", "Labels", metavar="TASK", choices=TASKS
    )
    val: str | float = option(
        "0.15", "Images held out: a share, a label file of their own, or 0.", "Labels", metavar="FRACTION|LABELS|0"
    )
    head: str | None = option(
        None, "classify, fcos, retinanet, faster_rcnn, mask_rcnn or semantic.", "Training", metavar="NAME",
        choices=HEAD_NAMES,
    )  # fmt: skip
    convolutions: int | None = option(
        None, "Of fcos and retinanet, before the last one (default 4).", "Training", metavar="N"
    )
    box_samples: int | None = option(
        None,
        "Of faster_rcnn and mask_rcnn: boxes of an image whose class is trained on (default 512).",
        "Training",
        metavar="N",
    )
    epochs: str | int = option(
        "auto", "auto: until the validation score no longer rises.", "Training", metavar="auto|N", complete=("auto",)
    )
    val_interval: int = option(
        1, "Epochs from one validation to the next; the last epoch is always validated.", "Training", metavar="N"
    )
    patience: int = option(5, "With --epochs auto: epochs without a better score.", "Training", metavar="N")
    batch_size: int = option(8, "Images in one step, over all processes together.", "Training", metavar="N")
    learning_rate: float | None = option(
        None, "Peak of the learning rate (default: by the head).", "Training", metavar="X"
    )
    weight_decay: float = option(0.05, "Of AdamW, for weights of two axes or more.", "Training", metavar="X")
    ema: float = option(0.99, "Decay of the moving average of the weights; 0: none.", "Training", metavar="X")
    augment: str = option("auto", "auto: flips, sizes, crops and colours of images.", "Training", choices=AUGMENTATIONS)
    unfreeze: str | int = option(
        0, "Also train the backbone's last N stages, or all.", "Training", metavar="N|all", complete=("all",)
    )
    freeze_pyramid: bool = option(False, "Train the head only, on the pyramid as it is.", "Training")
    neck_variant: str = option(
        "full",
        "full; or an FPN without a part: no-lateral or no-top-down.",
        "Training",
        metavar="VARIANT",
        choices=NECK_VARIANTS,
    )
    levels: str | Iterable[str] | None = like(
        ModelConfig, "levels", help="Such as P3-P5 or C4 (default: those that the head takes)."
    )
    channels: int | None = like(
        ModelConfig,
        "channels",
        help="Channels of every P level; of the head, where there is no neck (default 256; bifpn 64).",
    )
    seed: int = like(ModelConfig, "seed", help="Of what is drawn: new parameters, split, order, augmentation.")
    resume: bool = like(OutputConfig, "resume", help="Continue an earlier run after its last epoch, or start.")
    overwrite: bool = like(OutputConfig, "overwrite")
    log: str | None = option(None, "Write a JSON line for each epoch.", "Output", metavar="FILE.jsonl")
    plot: str | None = option(None, "Draw losses and scores.", "Output", metavar="FILE.png")
    device: str = like(RunConfig, "device", help="auto takes CUDA where there is one.")
    precision: str = like(
        RunConfig, "precision", help="auto: bfloat16 mixed with float32 on CUDA devices that have it, else float32."
    )
    workers: str | int = like(RunConfig, "workers")

    def __post_init__(self) -> None:
        check_fields(self)
        for part in (ModelConfig, InputConfig):
            part.__post_init__(self)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device):
            raise FpnxError(
                f"device {self.device!r}: take auto, cpu, cuda, cuda:1 or mps; several: start with torchrun"
            )
        freeze(self, "epochs", auto_or_whole("epochs", self.epochs, MAX_EPOCHS))
        freeze(self, "workers", auto_or_whole("workers", self.workers, 1024))
        freeze(self, "unfreeze", _stages(self.unfreeze))
        freeze(self, "val", _validation(self.val))
        if self.channels == 1:  # of a map of one cell, which other widths allow
            raise FpnxError("channels 1: the norms of the heads need 2 at least")
        if self.convolutions is not None:
            check_whole("convolutions", self.convolutions, 1, 16)
        if self.box_samples is not None:
            check_whole("box samples", self.box_samples, 1, 65536)
        check_whole("val interval", self.val_interval, 1, MAX_EPOCHS)
        check_whole("patience", self.patience, 1, MAX_EPOCHS)
        check_whole("batch size", self.batch_size, 1, 65536)
        for name, least, most in (("learning_rate", 0.0, 10.0), ("weight_decay", -1.0, 10.0), ("ema", -1.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not (least < value < most and value >= 0):
                raise FpnxError(f"{name.replace('_', ' ')} {value}: take a number from 0 to {most:g}, such as 0.01")
        if self.log is not None and not self.log.endswith(".jsonl"):  # it is replaced, as labels must not be
            raise FpnxError(f"log {escape(self.log)}: take a name that ends in .jsonl")
        if self.plot is not None:
            check_plot(self.plot)
        if self.resume and self.overwrite:
            raise FpnxError("resume continues a run and overwrite replaces it: give one of them")
        if self.freeze_pyramid and self.unfreeze:
            raise FpnxError(f"unfreeze {self.unfreeze} trains below a pyramid that is frozen: leave one of them out")

    @property
    def held_out(self) -> float | None:
        """The share of the images that is held out; None where they have labels of their own."""
        return self.val if isinstance(self.val, float) else None

    def effective(self) -> dict[str, Any]:
        """The options that change what is learned, as plain values."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in WITHOUT_EFFECT}
        plain["val"] = self.held_out
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _stages(unfreeze: str | int) -> str | int:
    if unfreeze == "all":
        return "all"
    number = int(unfreeze) if isinstance(unfreeze, str) and unfreeze.isascii() and unfreeze.isdigit() else unfreeze
    check_whole("unfreeze", number, 0, 99, "all or ")
    return number


def _validation(val: str | float) -> str | float:
    try:
        share = float(val)
    except ValueError:
        return val  # a label file
    if not 0 <= share <= 0.9:
        raise FpnxError(f"val {val}: take a share from 0 to 0.9, such as 0.15, or a label file")
    return share
