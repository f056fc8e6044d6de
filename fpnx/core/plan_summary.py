"""Summary of a planned run in plain values, for listeners, tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fpnx.core.config import ExtractConfig
from fpnx.core.provenance import WeightsInfo
from fpnx.core.sharding import ShardSlice

__all__ = ["LevelShape", "PlanSummary", "RegionSummary"]


@dataclass(frozen=True)
class LevelShape:
    """Stored shape of one level at one network-input size.

    Attributes:
        input_size: (height, width) of the padded network input.
        images: how many images have that size.
        stride: in input pixels.
        channels, height, width: of the stored map.
        bytes_per_image: of this level in the stored dtype.
    """

    input_size: tuple[int, int]
    images: int
    level: str
    stride: int
    channels: int
    height: int
    width: int
    bytes_per_image: int

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; `input_size` as in the HDF5 file, `"480x640"`."""
        return {**asdict(self), "input_size": f"{self.input_size[0]}x{self.input_size[1]}"}


@dataclass(frozen=True, kw_only=True)
class RegionSummary:
    """Number and stored shape of the features of boxes.

    Attributes:
        count: number of boxes.
        images: how many images have some.
        classes: number of classes that the labels name.
        channels, height, width: of one feature.
        bytes_per_region: of one feature in the stored dtype.
    """

    count: int
    images: int
    classes: int
    channels: int
    height: int
    width: int
    bytes_per_region: int

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What a run is going to compute, known before it starts.

    Attributes:
        config: the options of the run.
        output: the file or folder to write, or its URL.
        scratch: for an output in an object store, the local folder where the file is written first; else None.
        images: number of images.
        skipped: number of other files that were skipped, by kind: extensions such as `.txt`, and kinds in words.
        shard: for a shard, its slice of the list; else None.
        done_before: number of images that an earlier run finished.
        update: with `--update`, the number of images that are "copied" from files that are there, and that were
            "added", "changed" and "removed" since the output was finished; else None.
        root: the folder, archive or URL that names are relative to.
        weights: which parts are trained.
        trained_pyramid: the name of weights for this backbone whose pyramid is trained; None where there are none.
        pyramid: the kind of neck.
        work: pixels that go through the backbone for each image, relative to one pass over the network's input.
        level_names: fine to coarse.
        levels: every level at every network-input size; empty while sizes are unknown.
        regions: the features of boxes that are stored in place of the levels' maps; else None.
        recipe, recipe_text: the preprocessing, as plain values and in words.
        devices, precision, batch_size, workers: how it is computed; a batch size of None is determined by trial.
        bytes_needed, bytes_free: on the disk; free is None where the file system does not report it.
        head: what predicts, in words; None where features are stored.
    """

    config: ExtractConfig
    output: str
    scratch: str | None
    images: int
    skipped: Mapping[str, int]
    shard: ShardSlice | None
    done_before: int
    update: Mapping[str, int] | None
    root: str
    backbone: str
    weights: WeightsInfo
    trained_pyramid: str | None
    pyramid: str
    work: float
    level_names: tuple[str, ...]
    levels: tuple[LevelShape, ...]
    regions: RegionSummary | None
    recipe: Mapping[str, Any]
    recipe_text: str
    devices: tuple[str, ...]
    precision: str
    batch_size: int | None
    workers: int
    bytes_needed: int
    bytes_free: int | None
    fingerprint: str
    head: str | None = None

    @property
    def has_pyramid(self) -> bool:
        """Whether a P level is among the levels."""
        return not all(level.startswith("C") for level in self.level_names)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of all images."""
        maps = sum(shape.images * shape.bytes_per_image for shape in self.levels)
        return maps + (0 if self.regions is None else self.regions.count * self.regions.bytes_per_region)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; of a run that predicts, without what is about stored features."""
        values = self._to_json()
        if self.head is None:
            return values
        stored = ("scratch", "levels", "dtype", "pool", "bytes_needed", "bytes_free", "fingerprint")
        return {**{name: value for name, value in values.items() if name not in stored}, "head": self.head}

    def _to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "scratch": self.scratch,
            "images": self.images,
            "skipped": sum(self.skipped.values()),
            "skipped_kinds": dict(self.skipped),
            "shard": None if self.shard is None else self.shard.to_json(),
            "done_before": self.done_before,
            **({} if self.update is None else {"update": dict(self.update)}),
            "root": self.root,
            "backbone": self.backbone,
            "weights": self.weights.to_json(),
            "pyramid": self.pyramid,
            "work": self.work,
            "recipe": {"text": self.recipe_text, **self.recipe},
            "levels": [shape.to_json() for shape in self.levels],
            **({} if self.regions is None else {"regions": self.regions.to_json()}),
            "dtype": self.config.dtype,
            "pool": self.config.pool,
            "device": ",".join(self.devices),
            "precision": self.precision,
            "bytes_needed": self.bytes_needed,
            "bytes_free": self.bytes_free,
            "fingerprint": self.fingerprint,
        }
