"""One training from images or stored maps to a file of weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.files import lock
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.text import escape, plural
from fpnx.core.train_config import TrainConfig
from fpnx.core.training_summary import TrainingSummary
from fpnx.evaluation.coco_library import coco_library
from fpnx.evaluation.scores import Scores
from fpnx.extraction.run import library_versions
from fpnx.images.decoding import pillow_limits
from fpnx.inference.devices import arithmetic, resolve_precision
from fpnx.models.heads.registry import create_head
from fpnx.models.heads.trained_file import TrainedModel, save_trained
from fpnx.models.torch_state import isolated_torch_state
from fpnx.models.weights.checkpoints import read_checkpoint
from fpnx.remote.client import connections
from fpnx.store.output_path import check_output
from fpnx.store.writer import part_path
from fpnx.training.checkpoint import read_progress, refuse_other_run, write_progress
from fpnx.training.data import TrainingData, open_data
from fpnx.training.history import draw_history, write_log
from fpnx.training.loop import Epoch, Trainer
from fpnx.training.network import Network
from fpnx.training.processes import Processes, joined_processes, process_rank
from fpnx.training.result import TrainResult
from fpnx.training.schedule import AUTO_WITHOUT_SCORES
from fpnx.training.tap_batches import TapBatches

__all__ = ["run_training"]

# Peaks of the learning rate by head, for batches of 8.
LEARNING_RATES = {"fcos": 2e-3, "semantic": 2e-3}
LEARNING_RATE = 1e-3
AUTO_PRECISION = "bfloat16"


def run_training(
    inputs: Sequence[str | os.PathLike[str]], output: Path, config: TrainConfig, listener: Listener | None = None
) -> TrainResult:
    """Train a pyramid and a head.

    Args:
        inputs: images, as `find_images` takes them; or files of maps.
        output: the `.safetensors` file to write; `output` + `.part` holds the state of an unfinished run.
        config: the options.
        listener: receives progress and messages; in other processes than the first, nothing does.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: a signal; the best weights so far are kept.
    """
    first = process_rank() == 0
    listener = (listener or Listener()) if first else Listener()
    if first:
        check_output(output, config, output.name)
    with ExitStack() as stack:
        processes = stack.enter_context(joined_processes(config.device))
        stop = stack.enter_context(handle_signals(listener))
        if first:
            stack.enter_context(lock(output))
        stack.enter_context(connections())
        stack.enter_context(pillow_limits())
        data = stack.enter_context(open_data(inputs, config, listener))
        precision = _precision(config, processes)
        stack.enter_context(arithmetic(processes.device, precision, steady=len(set(data.source.shapes)) == 1))
        with isolated_torch_state():
            return _Run(data, output, config, precision, processes, listener, stop).finish()


class _Run:
    """A training whose data are known."""

    def __init__(
        self,
        data: TrainingData,
        output: Path,
        config: TrainConfig,
        precision: str,
        processes: Processes,
        listener: Listener,
        stop: StopRequest,
    ) -> None:
        self._data, self._output, self._config = data, output, config
        self._processes, self._listener, self._stop = processes, listener, stop
        self._precision = precision
        self._learning_rate = config.learning_rate or LEARNING_RATES.get(data.head, LEARNING_RATE)
        if data.labels.task == "detection" and data.validation:
            coco_library()  # raises now where it is not installed, and not after the first epoch
        head = create_head(
            data.head, data.model, len(data.labels.categories), seed=config.seed, settings=self._head_settings()
        )
        self._network = Network(
            data.model,
            head,
            from_taps=data.stored,
            unfreeze=config.unfreeze,
            freeze_pyramid=config.freeze_pyramid,
        ).to(processes.device)
        if isinstance(data.source, TapBatches):
            data.source.read_maps(self._network.input_levels)
        self._identity = json.loads(json.dumps({"options": config.effective(), **data.identity}))

    def finish(self) -> TrainResult:
        """Train, write the file, and tell how it ended."""
        config, data, first = self._config, self._data, self._processes.rank == 0
        trainer = Trainer(
            self._network,
            data.source,
            data.training,
            data.validation,
            data.make,
            config,
            epochs=self._epochs(),
            learning_rate=self._learning_rate,
            precision=self._precision,
            processes=self._processes,
            listener=self._listener,
            stop=self._stop,
        )
        part = part_path(self._output)
        done_before = config.resume and not part.exists() and self._output.exists()
        if done_before:
            self._load_finished(trainer)
        elif config.resume and part.exists():
            trainer.load(read_progress(part, self._identity))
        plan = self._plan(trainer)
        self._listener.training_planned(plan)
        if done_before:
            self._listener.message(f"{escape(self._output)} was trained before: nothing is left to do")
            return self._result(trainer, plan)
        self._stop.begin()

        def keep() -> None:
            if first:
                write_progress(part, self._identity, trainer.state())
                if config.log is not None:
                    write_log(config.log, trainer.history)
                self._listener.message(_epoch_line(trainer))

        finished = trainer.run(keep)
        trainer.failed = dict(self._processes.gather(sorted(trainer.failed.items())))
        result = self._result(trainer, plan)
        if first and trainer.best:
            self._write(trainer, result)
        if not finished:
            raise self._interrupted(trainer)
        if first:
            part.unlink(missing_ok=True)
        self._processes.wait()
        return result

    def _load_finished(self, trainer: Trainer) -> None:
        """Take the history and the scores of a finished run of the same options and data.

        Raises:
            FpnxError: the file is of another run.
        """
        description = read_checkpoint(self._output).description or {}
        facts = description.get("trained")
        if not isinstance(facts, dict) or "identity" not in facts:
            raise FpnxError(
                f"{escape(self._output)} is no file of fpnx train: replace it with --overwrite, or name another output"
            )
        refuse_other_run(self._output, facts["identity"], self._identity)
        trainer.history = [Epoch(**each) for each in facts["history"]]
        trainer.best, trainer.failed = facts["best_epoch"], dict(facts["failed"])
        trainer.best_scores = Scores.from_json(description["scores"]) if description["scores"] else None

    def _result(self, trainer: Trainer, plan: TrainingSummary) -> TrainResult:
        return TrainResult(
            output=os.fspath(self._output),
            scores=trainer.best_scores,
            best=trainer.best,
            epochs=tuple(trainer.history),
            failed=dict(trainer.failed),
            plan=plan,
        )

    def _head_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if self._config.convolutions is not None:
            settings["convolutions"] = self._config.convolutions
        if self._config.box_samples is not None:
            settings["box_samples"] = self._config.box_samples
        if self._data.labels.multi_label and self._data.head == "classify":
            settings["multi_label"] = True
        if self._config.channels is not None and self._data.head != "classify" and not self._data.model.has_neck:
            settings["channels"] = self._config.channels
        return settings

    def _epochs(self) -> int | str:
        if self._config.epochs == "auto" and not self._data.validation:
            self._listener.message(
                f"no image is held out, which would tell when to stop: {AUTO_WITHOUT_SCORES} epochs are trained "
                "(--epochs N sets their number)"
            )
            return AUTO_WITHOUT_SCORES
        return self._config.epochs

    def _write(self, trainer: Trainer, result: TrainResult) -> None:
        self._network.load_trained(trainer.best_state)
        facts = {
            "identity": self._identity,
            "best_epoch": trainer.best,
            "history": [epoch.to_json() for epoch in trainer.history],
            "images": {"training": len(self._data.training), "validation": len(self._data.validation)},
            "failed": dict(trainer.failed),
            "versions": library_versions(),
            "command": [escape(argument) for argument in sys.argv[:64]],
            "device": str(self._processes.device),
            "precision": self._precision,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        trained = TrainedModel(
            model=self._data.model,
            head=self._network.head,
            categories=self._data.labels.categories,
            task=self._data.labels.task,
            scores={} if result.scores is None else result.scores.to_json(),
            facts=facts,
        )
        try:
            save_trained(self._output, trained, parts=self._network.trained_parts)
        except FpnxError as error:
            advice = "make room; nothing is lost, and the same command with --resume writes it"
            raise FpnxError(f"{error}: {advice}") from error
        if self._config.plot is not None:
            draw_history(self._config.plot, trainer.history)

    def _interrupted(self, trainer: Trainer) -> Interrupted:
        signum = self._stop.signum or 2
        if not trainer.best:
            return Interrupted("interrupted in the first epoch: nothing is kept", signum)
        return Interrupted(
            f"interrupted after {plural(len(trainer.history), 'epoch')}: the best weights so far, of epoch "
            f"{trainer.best}, are in {escape(self._output)}; the same command with --resume continues",
            signum,
        )

    def _plan(self, trainer: Trainer) -> TrainingSummary:
        data, config, model = self._data, self._config, self._data.model
        return TrainingSummary(
            output=os.fspath(self._output),
            source=data.where,
            stored=data.stored,
            label_lines=data.label_lines,
            labels=data.label_facts,
            training=len(data.training),
            validation=len(data.validation),
            head=data.head,
            task=data.labels.task,
            backbone=model.backbone,
            pyramid=model.fpn.kind,
            levels=model.levels,
            weights=model.weights.info,
            recipe=str(data.model.recipe),
            augmented=data.augments,
            parameters=self._network.parameter_counts(),
            device=str(self._processes.device),
            precision=self._precision,
            processes=self._processes.count,
            batch_size=config.batch_size,
            learning_rate=self._learning_rate,
            epochs=config.epochs,
            epochs_before=len(trainer.history),
        )


def _precision(config: TrainConfig, processes: Processes) -> str:
    if config.precision == "auto" and processes.device.type == "cuda":
        return AUTO_PRECISION if torch.cuda.is_bf16_supported() else "float32"
    return resolve_precision(config.precision, processes.device)


def _epoch_line(trainer: Trainer) -> str:
    epoch, total = trainer.history[-1], trainer.schedule.epochs
    of = f" of {total}" if total is not None else ""
    main = "" if trainer.best_scores is None else trainer.best_scores.main
    score = f", {main} {epoch.score:.3f}" if epoch.score is not None else ""
    best = " (best)" if trainer.best == epoch.number and epoch.score is not None else ""
    speed = epoch.images / epoch.seconds if epoch.seconds else 0.0
    left = "" if total is None else f", {_duration((total - epoch.number) * epoch.seconds)} left"
    return f"epoch {epoch.number}{of}: loss {epoch.loss:.3g}{score}{best}, {speed:.1f} images/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
