"""What is trained: a backbone, a neck and a head in one module, and which of their parameters change."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fpnx.core.errors import FpnxError
from fpnx.models.heads.base import Geometry, Head, Prediction, Target
from fpnx.models.pyramid_model import PyramidModel
from fpnx.models.torch_state import isolated_torch_state
from fpnx.training.batches import Inputs

__all__ = ["Network"]

PROBE_SIDE = 64  # of the input with which the parameters of each stage are found


class Network(nn.Module):
    """A `PyramidModel` with a head on its levels.

    The backbone stays in eval mode, so that its norms keep their statistics and nothing in it is dropped at random.

    Args:
        model: its `levels` are those of the head.
        head: takes these levels.
        from_taps: whether inputs are the maps that `input_levels` names, and the backbone is not run.
        unfreeze: how many of the backbone's last stages are trained, or `"all"`.
        freeze_pyramid: whether the neck keeps its parameters.

    Attributes:
        input_levels: names of the maps that it takes where `from_taps` is true.
    """

    def __init__(
        self,
        model: PyramidModel,
        head: Head,
        *,
        from_taps: bool = False,
        unfreeze: int | str = 0,
        freeze_pyramid: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.head, self.from_taps = model, head, from_taps
        self._pyramid_levels = tuple(name for name in model.levels if name in model.fpn.levels)
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        self._trains_neck = not freeze_pyramid and model.has_neck
        if self._trains_neck:
            for name in self._neck_parameters():
                model.fpn.get_parameter(name).requires_grad_(True)
        self._trains_body = unfreeze != 0
        self._body_parameters = tuple(_stage_parameters(model, unfreeze))
        for name in self._body_parameters:
            model.body.get_parameter(name).requires_grad_(True)
        self.train()

    @property
    def input_levels(self) -> tuple[str, ...]:
        if self.model.scales:
            return self.model.levels
        taps = tuple(name for name in self.model.levels if name not in self._pyramid_levels)
        needed = self.model.fpn.taps_for(self._pyramid_levels) if self._pyramid_levels else ()
        return tuple(dict.fromkeys((*taps, *needed)))

    def train(self, mode: bool = True) -> Network:
        """Training mode for the neck, where it is trained, and the head."""
        super().train(mode)
        self.model.eval()
        self.model.fpn.train(mode and self._trains_neck)
        return self

    def levels(self, inputs: Inputs) -> dict[str, Tensor]:
        """The levels that the head takes."""
        if self.model.scales:
            return dict(inputs) if self.from_taps else self._frozen(self.model, inputs)
        if self.from_taps:
            taps: Any = inputs
        else:
            taps = self.model.taps(inputs) if self._trains_body else self._frozen(self.model.taps, inputs)
        if not self._pyramid_levels:
            return {name: taps[name] for name in self.model.levels}
        with nullcontext() if self._trains_neck or self._trains_body else torch.no_grad():
            pyramid = self.model.fpn(taps, self._pyramid_levels)
        return {name: pyramid[name] if name in pyramid else taps[name] for name in self.model.levels}

    def losses(self, inputs: Inputs, geometry: Geometry, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses by name; see `Head.losses`."""
        return self.head.losses(self.levels(inputs), geometry, targets)

    @torch.no_grad()
    def predict(self, inputs: Inputs, geometry: Geometry) -> list[Prediction]:
        """One prediction for each image; see `Head.predict`."""
        return self.head.predict(self.levels(inputs), geometry)

    def trained_state(self) -> dict[str, Tensor]:
        """Names → parameters and buffers that training changes, not copied."""
        state = {f"head.{name}": value for name, value in self.head.state_dict(keep_vars=False).items()}
        if self._trains_neck:
            state |= {f"fpn.{name}": value for name, value in self.model.fpn.state_dict().items()}
        return state | {f"body.{name}": self.model.body.get_parameter(name).detach() for name in self._body_parameters}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Set the values of `trained_state`."""
        with torch.no_grad():
            for name, value in self.trained_state().items():
                value.copy_(state[name])

    def averaged_copy(self) -> Network:
        """A copy for averages of the weights; a frozen backbone is shared."""
        shared: dict[int, Any] = {} if self._trains_body else {id(self.model.body): self.model.body}
        copied = copy.deepcopy(self, shared)
        return copied.requires_grad_(False).eval()

    def groups(self, learning_rate: float, weight_decay: float, backbone_share: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser: norms and biases without decay, the backbone with a lower rate."""
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        body = {id(each) for each in self.model.body.parameters()}
        for each in self.parameters():
            if each.requires_grad:
                found.setdefault((id(each) in body, each.ndim > 1), []).append(each)
        return [
            {
                "params": parameters,
                "lr": learning_rate * (backbone_share if of_body else 1.0),
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (of_body, decays), parameters in sorted(found.items(), key=lambda item: item[0])
        ]

    def parameter_counts(self) -> dict[str, dict[str, int]]:
        """Numbers of parameters of each part, frozen and trained."""
        parts = {"backbone": self.model.body, "pyramid": self.model.fpn, "head": self.head}
        return {
            name: {
                "frozen": sum(each.numel() for each in part.parameters() if not each.requires_grad),
                "trained": sum(each.numel() for each in part.parameters() if each.requires_grad),
            }
            for name, part in parts.items()
        }

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """Which of `"body"` and `"fpn"` are trained."""
        return (*(["body"] if self._trains_body else []), *(["fpn"] if self._trains_neck else []))

    def _frozen(self, module: Any, inputs: Any) -> Any:
        with torch.no_grad():
            return module(inputs)

    def _neck_parameters(self) -> list[str]:
        """Names of the neck's parameters on which its levels depend; others get no gradient."""
        model = self.model
        with isolated_torch_state(0):
            taps = {
                f"C{number}": torch.zeros(2, channels, *_cells(number, model))
                for number, channels in model.fpn.in_channels.items()
            }
            neck = copy.deepcopy(model.fpn).requires_grad_(True).train()
            levels = neck(taps, self._pyramid_levels)
            total = torch.stack([level.sum() for level in levels.values()]).sum()
            names, parameters = zip(*neck.named_parameters(), strict=True)
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]


def _cells(number: int, model: PyramidModel) -> tuple[int, int]:
    side = 256 // min(256, model.strides.get(f"C{number}", 2**number))
    return max(side, 1), max(side, 1)


def _stage_parameters(model: PyramidModel, unfreeze: int | str) -> list[str]:
    """Names of the parameters of the backbone's last `unfreeze` stages, `"all"` or a number.

    A stage reaches from one tap to the next. They are found by the gradients of the taps.

    Raises:
        FpnxError: the backbone has fewer stages.
    """
    if unfreeze == 0:
        return []
    names = [name for name, _ in model.body.named_parameters()]
    if unfreeze == "all":
        return names
    side = model.size or (PROBE_SIDE, PROBE_SIDE)
    body = copy.deepcopy(model.body).requires_grad_(True).eval()
    with isolated_torch_state(0):
        taps = body(torch.rand(1, 3, *side))
    ordered = sorted(taps, key=lambda name: int(name[1:]))
    if int(unfreeze) > len(ordered):
        raise FpnxError(
            f"unfreeze {unfreeze}: {model.backbone} has {len(ordered)} stages: take up to {len(ordered)}, or all"
        )
    used = [_used(body, taps[name]) for name in ordered]
    below = used[-int(unfreeze) - 1] if int(unfreeze) < len(ordered) else set()
    return [name for name in names if name in used[-1] and name not in below]


def _used(body: nn.Module, tap: Tensor) -> set[str]:
    """Names of the parameters that a tap depends on."""
    names, parameters = zip(*body.named_parameters(), strict=True)
    gradients = torch.autograd.grad(tap.sum(), parameters, allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
