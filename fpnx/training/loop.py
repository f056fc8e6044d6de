"""The training loop: optimiser, moving average, validation, best weights, and the state that a run continues from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.interrupts import StopRequest
from fpnx.core.train_config import TrainConfig
from fpnx.evaluation.scores import Scores
from fpnx.inference.devices import compute_dtype
from fpnx.models.torch_state import isolated_torch_state
from fpnx.training.batches import Batch, Draw, Source, batches_of_epoch, random_seed, read_ahead, share_of
from fpnx.training.network import Network
from fpnx.training.processes import Processes
from fpnx.training.schedule import Schedule
from fpnx.training.targets import TargetMaker
from fpnx.training.validation import validation_scores

__all__ = ["Epoch", "Trainer"]

BACKBONE_SHARE = 0.1  # of the learning rate, for the stages of the backbone
CLIP_NORM = 10.0  # of the gradient
WARM_AVERAGE = 10  # updates: the decay of the average after n of them is at most (1 + n) / (WARM_AVERAGE + n)
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What an epoch gave.

    Attributes:
        number: from 1.
        loss: mean of the total loss over its images.
        losses: mean of each loss.
        learning_rate: at its end.
        images: trained on.
        seconds: of training and validation.
        score: the main score on the images held out; None where the epoch was not validated.
        scores: all of them.
    """

    number: int
    loss: float
    losses: Mapping[str, float]
    learning_rate: float
    images: int
    seconds: float
    score: float | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; `Epoch(**values)` reads them."""
        return {
            "number": self.number,
            "loss": self.loss,
            "losses": dict(self.losses),
            "learning_rate": self.learning_rate,
            "images": self.images,
            "seconds": self.seconds,
            "score": self.score,
            "scores": dict(self.scores),
        }


class Trainer:
    """Trains a network on a source.

    Args:
        network: on the device of `processes`.
        source: of the images.
        training, validation: indices of the images to train on, and of those that are held out.
        make: makes the targets.
        config: the options.
        epochs: how many, or `"auto"`.
        learning_rate: the peak.
        precision: as `RunConfig.precision` has it, resolved.
        processes: of which this is one.
        listener: receives progress and messages.
        stop: whether a signal asked to stop.

    Attributes:
        history: of the epochs that are done.
        best: number of the epoch with the best score, from 1, or of the last one where none has a score; 0 before the
            first.
        best_scores: of that epoch; None without images that are held out.
        best_state: the averaged parameters of that epoch.
        failed: name → reason, for images that could not be read.
    """

    def __init__(
        self,
        network: Network,
        source: Source,
        training: Sequence[int],
        validation: Sequence[int],
        make: TargetMaker,
        config: TrainConfig,
        *,
        epochs: int | str,
        learning_rate: float,
        precision: str,
        processes: Processes,
        listener: Listener,
        stop: StopRequest,
    ) -> None:
        self._network, self._source, self._make = network, source, make
        self._config, self._processes, self._listener, self._stop = config, processes, listener, stop
        self._training, self._precision = list(training), precision
        self._averaged = network.averaged_copy() if config.ema else network
        # Tensors stay the same ones; their values are changed in place.
        self._averages = list(
            zip(self._averaged.trained_state().values(), network.trained_state().values(), strict=True)
        )
        self._optimiser = torch.optim.AdamW(network.groups(learning_rate, config.weight_decay, BACKBONE_SHARE))
        self._peaks = [group["lr"] for group in self._optimiser.param_groups]
        self._parameters = [each for group in self._optimiser.param_groups for each in group["params"]]
        uses_scaler = precision == "float16" and processes.device.type == "cuda"
        self._scaler = torch.amp.GradScaler("cuda", enabled=uses_scaler)
        steps = len(batches_of_epoch(source, self._training, config.batch_size, config.seed, 0))
        self.schedule = Schedule(epochs, steps, config.patience)
        self._validation = _in_order(source, validation, config.batch_size)
        self._updates, self._loss_names = 0, list[str]()
        self.history: list[Epoch] = []
        self.best, self.best_scores, self.best_state = 0, None, dict[str, Tensor]()
        self.failed: dict[str, str] = dict(source.left_out)

    best_scores: Scores | None

    def run(self, after_epoch: Callable[[], None]) -> bool:
        """Train to the end; False where a signal stopped it. `after_epoch` is called after each epoch."""
        while not self.schedule.finished(len(self.history)):
            if not self._epoch(len(self.history)):
                return False
            after_epoch()
        return True

    def losses_of(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of one batch, in the precision of the run."""
        moved = batch.to(self._processes.device)
        with self._autocast():
            return self._network.losses(moved.inputs, moved.geometry, moved.targets)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which `load` continues."""
        return {
            "network": self._network.trained_state(),
            "averaged": self._averaged.trained_state() if self._averaged is not self._network else {},
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "schedule": self.schedule.state(),
            "updates": self._updates,
            "history": [each.to_json() for each in self.history],
            "best": self.best,
            "best_scores": None if self.best_scores is None else self.best_scores.to_json(),
            "best_state": self.best_state,
            "failed": dict(self.failed),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._network.load_trained(state["network"])
        if self._averaged is not self._network:
            self._averaged.load_trained(state["averaged"])
        self._optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self.schedule.load(state["schedule"])
        self._updates = state["updates"]
        self.history = [Epoch(**each) for each in state["history"]]
        self.best, self.best_state = state["best"], dict(state["best_state"])
        self.best_scores = None if state["best_scores"] is None else Scores.from_json(state["best_scores"])
        self.failed = dict(state["failed"])

    def _epoch(self, epoch: int) -> bool:
        """One epoch; False where a signal stopped it."""
        started = time.perf_counter()
        config, processes = self._config, self._processes
        batches = batches_of_epoch(self._source, self._training, config.batch_size, config.seed, epoch)
        shares = [share_of(batch, processes.rank, processes.count) for batch in batches]
        draw = Draw(config.seed, epoch) if config.augment != "none" else None
        totals: dict[str, float] = {}
        images, shown, rate = 0, 0.0, 0.0
        self._network.train()
        reader = read_ahead(self._source, shares, draw)
        try:
            for number, batch in enumerate(reader):
                self._note_failures(batch.failed)
                rate = self._set_rate(epoch * len(batches) + number)
                losses, count, stopped = self._step(batch, random_seed("step", config.seed, epoch, number))
                if stopped:
                    return False
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0.0) + value * count
                images += count
                now = time.perf_counter()
                if images and now - shown > PROGRESS_SECONDS:
                    shown = now
                    self._report(epoch, images, totals, now - started)
        finally:
            reader.close()  # type: ignore[attr-defined]
        means = {name: value / images for name, value in totals.items()} if images else {}
        if not images:
            raise FpnxError("no image of the training could be read: see the messages above")
        scores = self._validated(epoch + 1)
        self._finish_epoch(means, rate, images, time.perf_counter() - started, scores)
        return True

    def _step(self, batch: Batch, seed: int) -> tuple[dict[str, float], int, bool]:
        """One step of all processes: (losses, images, whether to stop)."""
        device, processes = self._processes.device, self._processes
        losses: dict[str, Tensor] = {}
        self._optimiser.zero_grad(set_to_none=True)
        with _seeded(seed, device):
            if batch.indices:
                losses = self.losses_of(batch)
        losses, images, stopped = self._joined(losses, len(batch.indices))
        if stopped or not images:
            return {}, images, stopped
        if batch.indices:
            self._scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        processes.sum_gradients(self._parameters)
        values = processes.sum(torch.tensor([float(each.detach()) for each in losses.values()], device=device))
        self._scaler.unscale_(self._optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, CLIP_NORM)
        if not self._scaler.is_enabled() and not bool(torch.isfinite(norm)):
            raise FpnxError(
                f"the loss is no longer finite in epoch {len(self.history) + 1}: take a lower --learning-rate than "
                f"{max(self._peaks):g}, or --precision float32"
            )
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._average()
        return dict(zip(losses, values.tolist(), strict=True)), images, False

    def _joined(self, losses: dict[str, Tensor], images: int) -> tuple[dict[str, Tensor], int, bool]:
        """The losses as this process's part of those of the joint batch, the images of it, and whether to stop."""
        stop = float(self._stop.signum is not None)
        if self._processes.count == 1:
            return losses, images, bool(stop)
        if not self._loss_names:
            self._loss_names = sorted(set(self._processes.gather(sorted(losses))))
        names = self._loss_names
        counts = self._network.head.loss_counts(losses, images) if losses else {}
        local = torch.tensor([float(images), stop, *(float(counts.get(name, 0.0)) for name in names)])
        joint = self._processes.sum(local.double()).tolist()
        weights = {
            name: max(1.0, float(counts[name])) / max(1.0, total)
            for name, total in zip(names, joint[2:], strict=True)
            if name in losses
        }
        zero = torch.zeros((), device=self._processes.device)
        weighted = {name: losses[name] * weights[name] if name in losses else zero for name in names}
        return weighted, round(joint[0]), joint[1] > 0

    @torch.no_grad()
    def _average(self) -> None:
        self._updates += 1
        if self._averaged is self._network:
            return
        decay = min(self._config.ema, (1 + self._updates) / (WARM_AVERAGE + self._updates))
        for averaged, now in self._averages:
            if averaged.is_floating_point():
                averaged.lerp_(now, 1 - decay)
            else:
                averaged.copy_(now)

    def _validated(self, number: int) -> Scores | None:
        """The scores of this epoch, where it is one that is validated."""
        if not self._validation or (number % self._config.val_interval and number != self.schedule.epochs):
            return None
        self._averaged.eval()
        scores, failed = validation_scores(
            self._averaged, self._source, self._validation, self._make, self._processes, self._autocast
        )
        self._note_failures(failed)
        return scores

    def _finish_epoch(
        self, losses: Mapping[str, float], rate: float, images: int, seconds: float, scores: Scores | None
    ) -> None:
        epoch = Epoch(
            number=len(self.history) + 1,
            loss=sum(losses.values()),
            losses=losses,
            learning_rate=rate,
            images=images,
            seconds=round(seconds, 3),
            score=None if scores is None else scores.value,
            scores={} if scores is None else dict(scores.values),
        )
        best = max((each.score for each in self.history if each.score is not None), default=-math.inf)
        if epoch.score >= best if epoch.score is not None else best == -math.inf:
            self.best, self.best_scores = epoch.number, scores
            self.best_state = {
                name: value.detach().cpu().clone() for name, value in self._averaged.trained_state().items()
            }
        self.history.append(epoch)
        if scores is not None:
            self.schedule.after_epoch([each.score for each in self.history])

    def _note_failures(self, failed: Sequence[tuple[int, str]]) -> None:
        for index, reason in failed:
            name = self._source.names[index]
            if name not in self.failed:
                self.failed[name] = reason
                self._listener.message(f"left out {name}: {reason}")

    def _set_rate(self, step: int) -> float:
        factor = self.schedule.factor(step)
        for group, peak in zip(self._optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return max(self._peaks) * factor

    def _report(self, epoch: int, images: int, totals: Mapping[str, float], seconds: float) -> None:
        epochs, each = self.schedule.epochs, len(self._training)
        loss = sum(totals.values()) / images
        score = next((f", {self._main} {e.score:.3f}" for e in reversed(self.history) if e.score is not None), "")
        self._listener.status(f"loss {loss:.3g}{score}")
        if epochs is None:
            self._listener.progress(f"images of epoch {epoch + 1}", images, each)
        else:
            self._listener.progress("images", epoch * each + images, epochs * each)

    @property
    def _main(self) -> str:
        return "score" if self.best_scores is None else self.best_scores.main

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = compute_dtype(self._precision)
        return torch.autocast(self._processes.device.type, dtype=dtype, enabled=dtype is not torch.float32)


def _in_order(source: Source, chosen: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of one shape, in the order of the images."""
    by_shape: dict[Any, list[int]] = {}
    for index in chosen:
        by_shape.setdefault(source.shapes[index], []).append(index)
    return [indices[i : i + batch_size] for indices in by_shape.values() for i in range(0, len(indices), batch_size)]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed`, also of functions that take the device's default generator; it is restored."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), isolated_torch_state(seed):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
