"""One run of predictions in this process: images are listed, the run is planned, and the pipeline fills the sink."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpnx._version import __version__
from fpnx.core.config import ExtractConfig, fingerprint
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.files import lock
from fpnx.core.image_list import list_fingerprint
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.predict_config import PredictConfig
from fpnx.core.sharding import shard_path
from fpnx.core.text import escape
from fpnx.evaluation.scores import Scores
from fpnx.extraction.plan import Plan, fingerprint_fields, make_plan
from fpnx.extraction.run import Result, compute, planned_result, provenance_of
from fpnx.images.decoding import pillow_limits
from fpnx.images.listing import Listing, find_images
from fpnx.prediction.engine import PredictionCache
from fpnx.prediction.journal import Journal, check_settings
from fpnx.prediction.outputs import (
    DEFAULT_OUTPUTS,
    check_pictures,
    check_target,
    resolve_output,
    run_path,
    write_document,
)
from fpnx.prediction.predictions import Reading
from fpnx.prediction.scoring import RunLabels, Worst, score_run
from fpnx.prediction.sink import PredictionSink, Target
from fpnx.prediction.task_model import NOT_CLASSES, TaskModel
from fpnx.remote.client import connections
from fpnx.store.output_path import refuse_input
from fpnx.store.reader import DONE
from fpnx.store.writer import part_path

__all__ = ["PredictResult", "run_prediction"]


@dataclass(frozen=True)
class PredictResult:
    """How a run of predictions ended.

    Attributes:
        run: counts, timings and failures, as of an extraction.
        output: the file, or for masks the folder.
        task: what was predicted.
        found: number of objects, classes or masks in the output.
        pictures: folder with pictures; None where none were drawn.
        scores: against the labels; None without labels.
        worst: the images with the most errors, the worst first; empty without labels.
    """

    run: Result
    output: Path
    task: str
    found: int
    pictures: Path | None = None
    scores: Scores | None = None
    worst: tuple[Worst, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 where more images failed than allowed or the run stopped early, else 0."""
        return self.run.exit_code

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            **self.run.to_json(),
            "output": str(self.output),
            "task": self.task,
            "found": self.found,
            "pictures": None if self.pictures is None else str(self.pictures),
            "scores": None if self.scores is None else self.scores.to_json(),
            "worst": [each.to_json() for each in self.worst],
        }


def run_prediction(
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None,
    config: PredictConfig,
    *,
    listener: Listener | None = None,
) -> PredictResult:
    """Predict what is in `images`, in this process.

    Args:
        images: files, folders, archives, URLs, or `"@list.txt"`.
        output: the file, or for masks the folder; None takes a name by the task.
        config: the options.
        listener: receives the progress.

    Raises:
        FpnxError: for a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; the images that are done are kept.
    """
    listener, run = listener or Listener(), config.run()
    assert not isinstance(run.shard, str), "the config parses it"
    with connections(), handle_signals(listener) as stop, pillow_limits():
        listing = find_images(images, config.limit, run.shard)
        for remark in (*listing.remarks, *listing.truncated):
            listener.message(remark)
        cache = PredictionCache(config)
        cache.model(run)
        task_model = cache.task_model
        assert task_model is not None, "it is built with the model"
        target = resolve_output(DEFAULT_OUTPUTS[task_model.task] if output is None else output)
        target = target if run.shard is None else shard_path(target, run.shard)
        check_target(target, task_model.task, config)
        refuse_input(target, [config.weights, config.labels or "", *(source.path for source in listing.sources)])
        names = [os.fsdecode(source.name) for source in listing.sources]
        if config.draw is not None:
            check_pictures(Path(config.draw), names, config)
        labels = None
        if config.labels is not None:
            labels = RunLabels.read(config.labels, names, os.fsdecode(listing.root), task_model)
            for remark in labels.remarks:
                listener.message(remark)
        with nullcontext(True) if config.dry_run else lock(target) as locked:
            if not locked:
                listener.message("files cannot be locked here: see to it that no second run writes this output")
            check_target(target, task_model.task, config)  # again: another run may have ended in the meantime
            settings = _settings(task_model, listing, run, config, labels)
            finished = _finished(target, config, settings)
            plan = make_plan(target, run, listing, listener, cache, stored=False)
            plan = replace(plan, head=_head_in_words(task_model))
            if config.dry_run or finished is not None:
                listener.planned(plan.summary)
            if config.dry_run:
                return PredictResult(planned_result(plan), target, task_model.task, 0)
            if finished is not None:
                return _earlier(finished, plan, target, task_model, labels)
            return _compute(plan, target, task_model, labels, settings, config, stop, listener)


def _compute(
    plan: Plan,
    output: Path,
    task_model: TaskModel,
    labels: RunLabels | None,
    settings: Mapping[str, Any],
    config: PredictConfig,
    stop: StopRequest,
    listener: Listener,
) -> PredictResult:
    names = [os.fsdecode(source.name) for source in plan.listing.sources]
    first = plan.listing.shard_slice.first if plan.listing.shard_slice is not None else 0
    target = Target(
        output=output,
        names=names,
        image_ids=[first + i for i in range(len(names))] if labels is None else labels.image_ids(first),
        scored=[labels is not None and labels.of_image[i] is not None for i in range(len(names))],
        pictures=None if config.draw is None else Path(config.draw),
        drawn_from=config.drawn_from,
    )
    categories = task_model.categories if labels is None else labels.predicted
    reading = Reading(task_model.task, categories, task_model.multi_label, config.top)
    journal = Journal(part_path(output), settings, len(names), resume=config.resume)
    try:
        plan = replace(plan, done_before=int((journal.status == DONE).sum()))
        listener.planned(plan.summary)
        sink = PredictionSink(plan, journal, reading, target, f"{task_model.kind}, {plan.model.weights.name}")
        result = compute(plan, sink, stop, listener)
        found = sum(len(entry["results"]) for _, entry in journal.entries())
        outcome = PredictResult(result, output, task_model.task, found, target.pictures)
        if not result.complete:
            return outcome
        if labels is not None:
            scores, worst = score_run(labels, journal, sink, target, config, listener)
            outcome = replace(outcome, scores=scores, worst=worst)
        document = {
            "fpnx": __version__,
            "settings": settings,
            "provenance": provenance_of(plan).to_json(),
            "result": outcome.to_json(),
        }
        write_document(run_path(output), document)
        journal.remove()
        return outcome
    finally:
        journal.close()


def _settings(
    task_model: TaskModel, listing: Listing, run: ExtractConfig, config: PredictConfig, labels: RunLabels | None
) -> dict[str, Any]:
    """Everything that the output depends on, in plain values."""
    model = task_model.model
    identity = fingerprint_fields(model, model.recipe.sized(run), run)
    shard = listing.shard_slice
    return {
        **{name: value for name, value in identity.items() if name not in ("dtype", "pool")},
        **task_model.identity(),
        "classes": fingerprint({"classes": task_model.identity()["classes"]}),
        "top": config.top,
        "labels": None if config.labels is None else os.path.abspath(config.labels),
        "content of labels": None if labels is None else labels.content_hash(),
        "images": list_fingerprint(listing.records.records),
        "shard": None if shard is None else shard.to_json(),
    }


def _finished(output: Path, config: PredictConfig, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What stands beside the output of a run that has ended, with `resume`; None where the run must go on.

    Raises:
        FpnxError: it was made with other settings, or nothing says with which.
    """
    path = run_path(output)
    if not config.resume or part_path(output).exists() or not output.exists():
        return None
    try:
        document = json.loads(path.read_bytes())
        check_settings(path, document["settings"], settings)
        return dict(document["result"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FpnxError(
            f"{escape(output)} exists, and {escape(path.name)} beside it does not say how it was made: start over with "
            f"--overwrite, or name another output with -o"
        ) from error


def _earlier(
    stored: Mapping[str, Any], plan: Plan, output: Path, task_model: TaskModel, labels: RunLabels | None
) -> PredictResult:
    """The result of an earlier run, which has ended."""
    try:
        failed = tuple((str(each["path"]), str(each["reason"])) for each in stored["failed"])
        result = replace(planned_result(plan), done=int(stored["done"]), failed=failed, complete=True, dry_run=False)
        scores = None if labels is None or stored["scores"] is None else Scores.from_json(stored["scores"])
        pictures = None if stored["pictures"] is None else Path(stored["pictures"])
        worst = tuple(Worst(**each) for each in stored["worst"])
        return PredictResult(result, output, task_model.task, int(stored["found"]), pictures, scores, worst)
    except (LookupError, TypeError, ValueError) as error:
        raise FpnxError(f"{escape(run_path(output))} is damaged: start over with --overwrite") from error


def _head_in_words(task_model: TaskModel) -> str:
    if task_model.task == "classification" and task_model.head is None:
        return f"{task_model.kind}, {len(task_model.categories)} classes"
    named = [each for each in task_model.categories if each.name not in NOT_CLASSES]
    return f"{task_model.kind}, {len(named)} classes"
