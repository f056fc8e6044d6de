"""The plan of a run, made before any image is computed: images, model, sizes, file layout, devices, disk space."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import ImageError
from fpnx.core.events import Listener
from fpnx.core.files import SMALLER_FEATURES, check_space, free_bytes
from fpnx.core.plan_summary import LevelShape, PlanSummary
from fpnx.core.system import usable_cpus
from fpnx.core.validation import parse_pool
from fpnx.extraction.regions import PlannedRegions, RunBoxes
from fpnx.extraction.update import Update, digest_reader, find_update
from fpnx.images.decoding import upright_sizes
from fpnx.images.listing import Listing
from fpnx.inference.devices import resolve_device, resolve_precision
from fpnx.inference.engine_cache import EngineCache
from fpnx.inference.region_pooling import RegionPooling
from fpnx.models.preprocessing import Recipe
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.weights.torchvision import COCO
from fpnx.remote.urls import is_url
from fpnx.store.file_layout import FileLayout
from fpnx.store.matching import check_same_run
from fpnx.store.reader import DONE, open_store_file
from fpnx.store.writer import part_path

__all__ = ["Plan", "decode_threads", "fingerprint_fields", "make_plan"]

MAX_DECODE_THREADS = 16  # unless `--workers` asks for more


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        output: the local file or folder to write.
        config: the options.
        listing: the images.
        layout: of the HDF5 file; its tables are used with `--format png` too.
        devices: devices that compute, all of one kind.
        batch_size: None where it is chosen by timing a few.
        workers: number of decode threads.
        cpus: number of CPU cores to use.
        bytes_free: free space for the output; None where the file system does not report it.
        engine_cache: holds the model and its engines.
        regions: the boxes whose features are stored in place of maps; else None.
        done_before: number of images that an earlier run has done.
        update: with `--update`, what is taken over from files that are there; else None.
        destination: URL that the output is uploaded to; None where it stays local.
        head: what predicts, in words; None where features are stored.
    """

    output: Path
    config: ExtractConfig
    listing: Listing
    model: PyramidModel
    recipe: Recipe
    layout: FileLayout
    devices: tuple[torch.device, ...]
    precision: str
    batch_size: int | None
    workers: int
    cpus: int
    bytes_free: int | None
    engine_cache: EngineCache
    regions: PlannedRegions | None = None
    done_before: int = 0
    update: Update | None = None
    destination: str | None = None
    head: str | None = None

    @property
    def shapes(self) -> tuple[LevelShape, ...]:
        """Stored shape of every level at every network-input size."""
        item, counts = np.dtype(self.layout.dtype).itemsize, self.layout.counts()
        return tuple(
            LevelShape(size, counts[size], level, self.layout.strides[level], c, h, w, c * h * w * item)
            for size, levels in self.layout.shapes.items()
            for level, (c, h, w) in levels.items()
        )

    @property
    def device(self) -> torch.device:
        """The first of the devices, which are all of one kind."""
        return self.devices[0]

    @property
    def summary(self) -> PlanSummary:
        """The plan in plain values."""
        return PlanSummary(
            config=self.config,
            output=self.destination or str(self.output),
            scratch=str(self.output.parent) if self.destination else None,
            images=len(self.listing.sources),
            skipped=self.listing.skipped,
            shard=self.listing.shard_slice,
            done_before=self.done_before,
            update=None if self.update is None else self.update.counts(),
            root=os.fsdecode(self.listing.root),
            backbone=self.model.backbone,
            weights=self.model.weights.info,
            trained_pyramid="coco" if self.model.backbone in COCO else None,
            pyramid=self.model.fpn.kind,
            work=self.model.work,
            level_names=self.model.levels,
            levels=self.shapes,
            regions=None if self.layout.regions is None else self.layout.regions.summary(self.layout.dtype),
            recipe=self.recipe.to_json(),
            recipe_text=str(self.recipe),
            devices=tuple(map(str, self.devices)),
            precision=self.precision,
            batch_size=self.batch_size,
            workers=self.workers,
            bytes_needed=self.layout.total_bytes(),
            bytes_free=self.bytes_free,
            fingerprint=self.layout.fingerprint,
            head=self.head,
        )


def make_plan(
    output: Path,
    config: ExtractConfig,
    listing: Listing,
    listener: Listener,
    engine_cache: EngineCache | None = None,
    *,
    boxes: RunBoxes | None = None,
    destination: str | None = None,
    finished: str | None = None,
    handed_out: bool = False,
    stored: bool = True,
) -> Plan:
    """Make the plan of a run on `output`, or refuse the request.

    Args:
        output: the local file or folder to write.
        config: the options.
        listing: the images.
        listener: receives the progress of reading image headers.
        engine_cache: gives the model; by default a new one is built.
        boxes: of the images, where the config has boxes.
        destination: URL that the output will be uploaded to.
        finished: URL of a finished output that `--resume` compares the request with.
        handed_out: plan for workers that compute elsewhere. Image headers are not read and disk space is not checked
            here; where images have different sizes, the layout has no shapes.
        stored: whether features are stored: then the file of an earlier run is continued, and disk space is checked.

    Raises:
        FpnxError: for a request that cannot be carried out.
    """
    devices = tuple(resolve_device(name) for name in config.device.split(","))
    precision = resolve_precision(config.precision, None if handed_out else devices[0])
    engine_cache = engine_cache or EngineCache()
    model = engine_cache.model(config)
    recipe = model.recipe.sized(config)
    strides = {level: model.stride(level) for level in model.levels}
    regions = None if boxes is None else PlannedRegions(boxes, RegionPooling(strides, str(config.roi_size)))
    identity = fingerprint_fields(model, recipe, config)
    if regions is not None:
        identity["regions"] = regions.identity()
    cpus = config.cpus if isinstance(config.cpus, int) else usable_cpus()
    workers = decode_threads(config.workers, listing, cpus)
    read_digests, update = digest_reader(listing, config.max_pixels, workers, listener), None
    existing = _file_to_resume(output, config) or finished if stored else None
    if config.update and stored and not handed_out:
        update = find_update(output, config, identity, listing.records, read_digests)
        existing = update.existing
    done_before = 0
    if existing is not None:
        with open_store_file(existing) as store:
            if update is None:
                check_same_run(store, identity, listing.records, read_digests)
            sizes, padded, rows = store.input_sizes, store.padded_sizes, store.rows
            errors = {i: store.error(i) for i in np.flatnonzero(rows < 0).tolist()}
            done_before = int((store.status == DONE).sum())
    elif handed_out and recipe.sizing != "stretch":
        count = len(listing.sources)
        sizes, errors = np.zeros((count, 2), np.int32), dict[int, str]()
        padded, rows = [None] * count, np.full(count, -1, np.int64)
    else:
        known = None if update is None else update.input_sizes(len(listing.sources))
        sizes, errors = _input_sizes(listing, model, recipe, config.max_pixels, workers, listener, known)
        padded, rows = _padded_sizes(model, recipe, sizes, errors)
    shapes = {size: _stored_shapes(model, size, config.pool) for size in dict.fromkeys(padded) if size is not None}
    rows_of_regions = None
    if regions is not None:
        rows_of_regions = regions.layout(rows, shapes)
        shapes = {size: {level: (shape[0], 0, 0) for level, shape in of.items()} for size, of in shapes.items()}
    layout = FileLayout(
        images=listing.records,
        levels=model.levels,
        strides=strides,
        dtype=config.dtype,
        config=identity,
        input_sizes=sizes,
        padded_sizes=padded,
        rows=rows,
        shapes=shapes,
        errors=errors,
        regions=rows_of_regions,
    )
    free = free_bytes(output.parent)
    plan = Plan(
        output=output,
        config=config,
        listing=listing,
        model=model,
        recipe=recipe,
        layout=layout,
        devices=devices,
        precision=precision,
        batch_size=config.batch_size if isinstance(config.batch_size, int) else None,
        workers=workers,
        cpus=cpus,
        bytes_free=None if free is None else free + (0 if existing or update else _bytes_of_part(output)),
        engine_cache=engine_cache,
        regions=regions,
        done_before=done_before,
        update=update,
        destination=destination,
    )
    if stored and existing is None and config.format == "h5" and not handed_out:
        check_space(output, layout.total_bytes(), plan.bytes_free, SMALLER_FEATURES)
    return plan


def fingerprint_fields(model: PyramidModel, recipe: Recipe, config: ExtractConfig) -> dict[str, Any]:
    """Everything that the stored values depend on, in plain values: the `config` of a store, and what is hashed for its
    fingerprint."""
    identity = {
        **model.identity(),
        "recipe": {name: list(v) if isinstance(v, tuple) else v for name, v in recipe.to_json().items()},
        "pool": config.pool,
        "dtype": config.dtype,
        "precision": resolve_precision(config.precision),
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in identity.items()}


def decode_threads(workers: str | int, listing: Listing, cpus: int) -> int:
    """Number of decode threads: `--workers`, or for `"auto"` one for each core, or the most where images come over a
    network, since the threads then mostly wait."""
    if isinstance(workers, int):
        return workers
    return (
        MAX_DECODE_THREADS if any(is_url(source.path) for source in listing.sources) else min(MAX_DECODE_THREADS, cpus)
    )


def _bytes_of_part(output: Path) -> int:
    """Bytes that are freed when an old `.part` is deleted."""
    try:
        stat = os.stat(part_path(output))
    except OSError:
        return 0
    return 512 * stat.st_blocks if hasattr(stat, "st_blocks") else 0


def _file_to_resume(output: Path, config: ExtractConfig) -> Path | None:
    """The local file that `--resume` continues; None where there is none."""
    if not config.resume or config.format == "png":
        return None
    return next((path for path in (part_path(output), output) if path.exists()), None)


def _input_sizes(
    listing: Listing,
    model: PyramidModel,
    recipe: Recipe,
    max_pixels: int,
    workers: int,
    listener: Listener,
    known: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """(N, 2) network-input sizes without padding, and the reasons, by index, why images have none.

    Reads the headers of the images where the size depends on them, except for those whose size is `known`, not 0, 0."""
    count = len(listing.sources)
    sizes, errors = np.zeros((count, 2), np.int32), dict[int, str]()
    if recipe.sizing == "stretch":
        sizes[:] = recipe.input_size((1, 1), max_pixels, model.largest_scale)
        return sizes, errors

    if known is not None:
        sizes[:] = known
    indices = np.flatnonzero(~sizes.any(axis=1)).tolist()
    with closing(upright_sizes([listing.sources[i] for i in indices], max_pixels, workers)) as measured:
        for done, (i, source_size) in enumerate(zip(indices, measured, strict=True), start=1):
            try:
                if isinstance(source_size, ImageError):
                    raise source_size
                sizes[i] = recipe.input_size(source_size, max_pixels, model.largest_scale)
            except ImageError as error:
                errors[i] = str(error)
            listener.progress("headers", done, len(indices))
    return sizes, errors


def _padded_sizes(
    model: PyramidModel, recipe: Recipe, sizes: np.ndarray, errors: dict[int, str]
) -> tuple[list[tuple[int, int] | None], np.ndarray]:
    """The padded size and row of every image; adds to `errors` the images whose size the backbone cannot take."""
    padded_sizes: list[tuple[int, int] | None] = []
    rows = np.full(len(sizes), -1, np.int64)
    last_rows: dict[tuple[int, int], int] = {}
    for i, size in enumerate(sizes.tolist()):
        padded = None
        if i not in errors:
            try:
                padded = model.padded_size((size[0], size[1]), recipe)
                rows[i] = last_rows[padded] = last_rows.get(padded, -1) + 1
            except ImageError as error:
                errors[i] = str(error)
        padded_sizes.append(padded)
    return padded_sizes, rows


def _stored_shapes(model: PyramidModel, size: tuple[int, int], pool: str) -> dict[str, tuple[int, int, int]]:
    shapes, pooled = model.shapes(size), parse_pool(pool)
    if pooled is None:
        return shapes
    return {level: (shape[0], *pooled) for level, shape in shapes.items()}
