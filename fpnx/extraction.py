"""A folder of images → model → store: the whole pipeline."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import PIL
import torch
import torchvision

from fpnx._version import __version__
from fpnx.config import ExtractConfig
from fpnx.control import Listener, Stop, stoppable
from fpnx.disk import lock
from fpnx.equipment import Equipment
from fpnx.errors import FpnxError, Interrupted, shown
from fpnx.images import as_paths, find, pillow_within_limits
from fpnx.outputs import DEFAULT_OUTPUTS, check_output
from fpnx.pipeline import STAGES, Clock, compute
from fpnx.planning import Plan, make_plan
from fpnx.remote import connections
from fpnx.shards import parse_shard
from fpnx.store import DONE, PENDING, Store, open_store
from fpnx.uploads import check_goal, deliver, goal_of, work_folder
from fpnx.writer import Writer, part_of

if TYPE_CHECKING:
    from fpnx.gallery import Gallery  # loads matplotlib, which takes a second

__all__ = ["DEFAULT_OUTPUTS", "Result", "extract"]

LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)  # smaller values lose digits in float16, and end as 0
IMAGES_LOOKED_AT = 8


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        output: the file, or its address.
        images, done: how many there are in it, and how many hold features.
        failed: (path, reason) of each failed image.
        computed: how many this run computed.
        seconds: of computing, without loading the model.
        timings: milliseconds per computed image, by stage.
        nonfinite: NaN and infinite values, by level; in a strict run they are errors.
        too_small: levels stored as float16 whose values, in the images looked at, are all too small for it.
        stopped: why `strict` ended it early; None where it did not.
        complete: whether `output` has its final name.
        lost: archives that may have had more images, a line each; each counts as a failed image.
        facts: what was planned, as plain values.
    """

    output: Path | str
    images: int
    done: int
    failed: tuple[tuple[str, str], ...]
    computed: int
    seconds: float
    timings: Mapping[str, float]
    nonfinite: Mapping[str, int]
    allowed_failures: int
    strict: bool = False
    too_small: tuple[str, ...] = ()
    stopped: str | None = None
    complete: bool = True
    dry_run: bool = False
    lost: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def images_per_second(self) -> float:
        """Computed images over the seconds that it took."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    @property
    def exit_code(self) -> int:
        """0, or 1 where more images failed than allowed or `strict` stopped the run."""
        not_finite = self.strict and any(self.nonfinite.values())
        failures = len(self.failed) + len(self.lost)
        return 1 if self.stopped or not_finite or failures > self.allowed_failures else 0

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        return {
            **self.facts,
            "dry_run": self.dry_run,
            "complete": self.complete,
            "done": self.done,
            "computed": self.computed,
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
            "lost": list(self.lost),
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "ms_per_image": dict(self.timings),
            "nonfinite": dict(self.nonfinite),
            "too_small": list(self.too_small),
            "stopped": self.stopped,
            "exit_code": self.exit_code,
        }


def extract(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    listener: Listener | None = None,
    equipment: Equipment | None = None,
    barred: Mapping[bytes, str] | None = None,
    **options: Any,
) -> Result:
    """`fpnx.extract` in this process.

    Args:
        images, output, listener, options: as there; what it returns and raises, too.
        equipment: lends its model, for runs of many parts.
        barred: by name, images that must not be opened, and why; they fail.
    """
    config, paths = ExtractConfig(**options), as_paths(images)
    shard, hears = None if config.shard is None else parse_shard(config.shard), listener or Listener()
    goal = goal_of(DEFAULT_OUTPUTS[config.format] if output is None else output, config, shard)
    target, draws = goal.local, config.format == "png"
    with connections(), work_folder(goal):
        if not draws:
            check_output(target, config)
        finished = check_goal(goal, config)
        with stoppable(hears) as stop, pillow_within_limits():
            listing = find(paths, config.limit, shard)
            if barred:
                sources = tuple(replace(source, barred=barred.get(source.name, "")) for source in listing.sources)
                listing = replace(listing, sources=sources)
            for remark in (*listing.remarks, *listing.lost):
                hears.message(remark)
            with nullcontext(True) if config.dry_run else lock(target) as alone:
                if not alone:
                    hears.message("files cannot be locked here: see to it that no second run writes this output")
                if draws:
                    from fpnx.gallery import check_gallery

                    check_gallery(target, listing, config)
                else:
                    check_output(target, config)  # again: another run may have ended since
                plan = make_plan(target, config, listing, hears, equipment, destination=goal.url, finished=finished)
                if draws:
                    config.check_channels({shape.level: shape.channels for shape in plan.shapes})
                hears.planned(plan)
                if config.dry_run:
                    return _result(plan, None, Clock(), dry_run=True)
                result = None if draws else _finished(plan, finished)
                if result is None:
                    result = _run(plan, stop, hears)
                if goal.url is not None and finished is None and result.complete:
                    deliver(goal, plan.layout.config, listing.records, stop, hears)
                return result


def _finished(plan: Plan, address: str | None) -> Result | None:
    """How the run ended that a complete output is of; None where there is none to go on from."""
    if not plan.config.resume or part_of(plan.output).exists():
        return None
    output = plan.output if plan.output.exists() else address
    if output is None:
        return None
    with open_store(output) as store:
        _refuse_unfinished(plan.output, store)
        return _result(plan, store, Clock())


def _run(plan: Plan, stop: Stop, listener: Listener) -> Result:
    clock = Clock()
    writer: Writer | Gallery
    if plan.config.format == "png":
        from fpnx.gallery import Gallery

        writer = Gallery(plan.output, plan.layout, plan.config, plan.listing, _provenance(plan))
    elif plan.config.resume and part_of(plan.output).exists():
        writer = Writer.reopen(plan.output)
    else:
        writer = Writer.create(plan.output, plan.layout, _provenance(plan))
        if not writer.space_is_claimed:
            listener.message("this file system cannot set space aside: free space was checked once, now")
    try:
        stop.begin()
        stopped = compute(plan, writer, clock, stop, listener)
        if stopped is None:
            writer.finish()
        else:
            writer.commit()
    finally:
        writer.close()
    clock.stop()
    if not isinstance(writer, Writer):
        result = _result(plan, writer, clock, stopped=stopped)
    else:
        with open_store(part_of(plan.output) if stopped else plan.output) as store:
            result = _result(plan, store, clock, stopped=stopped)
    if stop.signum is not None and stopped == "interrupted":
        raise Interrupted(
            f"interrupted: {result.done} of {result.images} images are done and kept: continue with --resume",
            stop.signum,
        )
    return result


def _refuse_unfinished(output: Path, store: Store) -> None:
    pending = int((store.status == PENDING).sum())
    if pending:
        raise FpnxError(
            f"{shown(output)} is not finished ({pending} images are pending): rename it to "
            f"{shown(part_of(output).name)} and continue it with --resume, or start over with --overwrite"
        )


def _result(
    plan: Plan, store: Store | Gallery | None, clock: Clock, *, stopped: str | None = None, dry_run: bool = False
) -> Result:
    failed = tuple(store.failures()) if store is not None else ()
    count = len(plan.listing.sources)
    return Result(
        output=plan.destination or plan.output,
        images=count,
        done=int((store.status == DONE).sum()) if store is not None else 0,
        failed=failed,
        computed=clock.images,
        seconds=clock.seconds,
        timings={stage: 1000 * clock.spent[stage] / max(clock.images, 1) for stage in STAGES},
        nonfinite=store.nonfinite_by_level() if store is not None else {},
        allowed_failures=0 if plan.config.strict else plan.config.allowed_failures(count),
        strict=plan.config.strict,
        too_small=_too_small(store) if isinstance(store, Store) else (),
        stopped=stopped,
        complete=store is not None and stopped is None,
        dry_run=dry_run,
        lost=plan.listing.lost,
        facts=plan.facts(),
    )


def _too_small(store: Store) -> tuple[str, ...]:
    """Levels whose values are all below float16's normal numbers in a few images, the first and others at a distance.

    The scale of a level is the network's, so that a few images tell. NaN counts as large: it is told elsewhere.
    """
    if store.config.get("dtype") != "float16":
        return ()
    done = np.flatnonzero(store.status == DONE)
    looked_at = [store[i] for i in done[:: len(done) // IMAGES_LOOKED_AT + 1].tolist()]
    return tuple(
        level
        for level in store.levels
        if looked_at and all(np.abs(item[level]).max(initial=0) < LEAST_NORMAL for item in looked_at)
    )


def _provenance(plan: Plan) -> dict[str, Any]:
    facts = plan.facts()
    return {
        "versions": {
            "fpnx": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
            "h5py": h5py.__version__,
        },
        "options": plan.config.repeatable(),
        "command": [shown(argument) for argument in sys.argv[:64]],
        "weights": facts["weights"],
        "recipe": str(plan.recipe),
        "device": ", ".join(map(_device_name, plan.devices)),
        "precision": plan.precision,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
