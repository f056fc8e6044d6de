"""The options of `fpnx predict`: validated, frozen, each declared once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fpnx.core.config import DRAWN_FROM, ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.option import like, option
from fpnx.core.option_groups import CheckpointConfig, InputConfig, ModelConfig, OutputConfig, RunConfig
from fpnx.core.sharding import Shard
from fpnx.core.validation import check_fields, check_whole, freeze

__all__ = ["PredictConfig"]

MOST_DETECTIONS = 10_000
MOST_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class PredictConfig(RunConfig, InputConfig, CheckpointConfig):
    """All options of `fpnx predict`.

    `threshold` and `max_detections` are for boxes, None: the detector's own; `top` for classes. `labels` is a label
    file or folder, as `fpnx train` takes it; `draw` the folder for pictures. `limit`, `shard`, `resume` and the others
    of a run mean what they mean for `fpnx extract`.
    """

    backbone: str | None = like(ModelConfig, "backbone")
    weights: str = like(
        ModelConfig, "weights", default="coco", help="coco, imagenet, a torchvision detector, or a file of fpnx train."
    )
    weights_key: str | None = like(ModelConfig, "weights_key")
    weights_prefix: str | None = like(ModelConfig, "weights_prefix")
    offline: bool = like(ModelConfig, "offline")
    threshold: float | None = option(
        None, "Leave out boxes with a lower score (default: the detector's own; in pictures 0.5).", "Results",
        metavar="0..1",
    )  # fmt: skip
    max_detections: int | None = option(
        None, "Most boxes of an image, best first (default: the detector's own, mostly 100).", "Results", metavar="N"
    )
    top: int = option(5, "How many classes of an image, the most likely first.", "Results", metavar="N")
    labels: str | None = option(
        None, "Label file or folder: scores the predictions, and names the worst images.", "Results", metavar="LABELS"
    )
    draw: str | None = option(None, "Draw what was found over the images, into this folder.", "Output", metavar="DIR")
    limit: int | None = like(ExtractConfig, "limit")
    shard: str | Shard | None = like(ExtractConfig, "shard")  # noqa: RUF009
    resume: bool = like(OutputConfig, "resume")
    overwrite: bool = like(OutputConfig, "overwrite")
    commit_every: float = like(OutputConfig, "commit_every")
    max_failed: str | int = like(OutputConfig, "max_failed")
    strict: bool = like(OutputConfig, "strict")
    dry_run: bool = like(ExtractConfig, "dry_run")

    def __post_init__(self) -> None:
        check_fields(self)
        for part in (CheckpointConfig, InputConfig, RunConfig):
            part.__post_init__(self)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise FpnxError(f"threshold {self.threshold}: take a score from 0 to 1, such as 0.5")
        if self.max_detections is not None:
            check_whole("max detections", self.max_detections, 1, MOST_DETECTIONS)
        check_whole("top", self.top, 1, MOST_CLASSES)
        freeze(self, "shard", self.run().shard)  # which checks every other field

    @property
    def drawn_from(self) -> float:
        """The least score of a box in a picture."""
        return DRAWN_FROM if self.threshold is None else self.threshold

    def run(self) -> ExtractConfig:
        """The same run as an extraction, whose options the pipeline reads."""
        names = {field.name for field in fields(self)} & {field.name for field in fields(ExtractConfig)} - {"top"}
        return ExtractConfig(**{name: getattr(self, name) for name in names})
