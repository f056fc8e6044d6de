"""What is trained and what is not: parts, stages, norms, averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.models.factory import NeckPlan, build_model
from fpnx.models.heads.base import Geometry, Target
from fpnx.models.heads.registry import create_head
from fpnx.models.pyramid_model import PyramidModel
from fpnx.training.network import Network

GEOMETRY = Geometry((64, 64), ((64, 64),) * 2)
TARGETS = [Target(classes=torch.tensor([1.0, 0.0])), Target(classes=torch.tensor([0.0, 1.0]))]


def model(backbone: str = "mobilenet_v2", **options: Any) -> PyramidModel:
    options = {"levels": "P3-P5", "channels": 8, **options}
    return build_model(ExtractConfig(backbone=backbone, weights="random", **options), plan=NeckPlan())


def network(unfreeze: int | str = 0, freeze_pyramid: bool = False, **options: Any) -> Network:
    made = model(**options)
    return Network(made, create_head("classify", made, 2), unfreeze=unfreeze, freeze_pyramid=freeze_pyramid)


def changed_by_a_step(net: Network) -> set[str]:
    """Names of parameters and buffers that a step changes."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.AdamW(net.groups(0.1, 0.1, 0.1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # norms count batches in the first, and use their statistics in the second
        losses = net.losses(torch.rand(2, 3, 64, 64, generator=generator), GEOMETRY, TARGETS)
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def test_the_neck_and_the_head_are_trained() -> None:
    net = network()
    changed = changed_by_a_step(net)
    assert {name.split(".")[0] for name in changed} == {"model", "head"}
    assert all(name.startswith(("model.fpn.", "head.")) for name in changed)
    counts = net.parameter_counts()
    assert counts["backbone"]["trained"] == 0
    assert counts["pyramid"]["frozen"] == 0
    assert counts["head"] == {"frozen": 0, "trained": 3 * 8 * 2 + 2}
    assert net.trained_parts == ("fpn",)
    assert {f"head.{name}" for name in ("head.weight", "head.bias")} <= changed


def test_a_frozen_pyramid() -> None:
    net = network(freeze_pyramid=True)
    assert all(name.startswith("head.") for name in changed_by_a_step(net))
    assert net.trained_parts == ()


@pytest.mark.parametrize("pyramid", ["bifpn", "pafpn"])
def test_every_parameter_of_other_necks_that_matters_is_trained(pyramid: str) -> None:
    net = network(pyramid=pyramid, levels="P3-P7" if pyramid == "bifpn" else "P3-P5", channels=16)
    changed = changed_by_a_step(net)
    trained = {f"model.fpn.{name}" for name, each in net.model.fpn.named_parameters() if each.requires_grad}
    assert trained
    assert trained <= changed


def test_parameters_without_a_gradient_are_not_trained() -> None:
    """P5 alone does not depend on the finer laterals and outputs."""
    made = build_model(ExtractConfig(backbone="mobilenet_v2", weights="random", levels="P5", channels=8))
    net = Network(made, create_head("classify", made, 2))
    trained = {name for name, each in net.model.fpn.named_parameters() if each.requires_grad}
    assert trained == {f"{kind}_blocks.3.0.{what}" for kind in ("inner", "layer") for what in ("weight", "bias")}


def test_unfreezing_stages() -> None:
    """ResNet-18: its last stage is layer4, the one before layer3."""
    for stages, layers in ((1, {"layer4"}), (2, {"layer3", "layer4"})):
        net = network(unfreeze=stages, backbone="resnet18")
        trained = {name.split(".")[0] for name, each in net.model.body.named_parameters() if each.requires_grad}
        assert trained == layers
        changed = {name for name in changed_by_a_step(net) if name.startswith("model.body.")}
        assert {name.split(".")[2] for name in changed} == layers
        assert not any("running" in name or "batches" in name for name in changed)
    assert net.trained_parts == ("body", "fpn")
    everything = network(unfreeze="all", backbone="resnet18")
    assert all(each.requires_grad for each in everything.model.body.parameters())
    with pytest.raises(FpnxError, match="unfreeze 5: resnet18 has 4 stages: take up to 4, or all"):
        network(unfreeze=5, backbone="resnet18")


def test_groups_of_the_optimiser() -> None:
    net = network(unfreeze=1, backbone="resnet18")
    groups = net.groups(1.0, 0.5, 0.1)
    assert sum(len(group["params"]) for group in groups) == sum(each.requires_grad for each in net.parameters())
    body = {id(each) for each in net.model.body.parameters()}
    for group in groups:
        for each in group["params"]:
            assert group["lr"] == (0.1 if id(each) in body else 1.0)
            assert group["weight_decay"] == (0.5 if each.ndim > 1 else 0.0)


def test_the_backbone_stays_in_eval_mode() -> None:
    net = network(unfreeze="all", pyramid="bifpn", levels="P3-P7").train()
    assert not any(each.training for each in net.model.body.modules())
    assert any(isinstance(each, nn.BatchNorm2d) and each.training for each in net.model.fpn.modules())
    assert not any(each.training for each in network(freeze_pyramid=True).train().model.modules())


def test_an_averaged_copy_shares_what_is_frozen() -> None:
    net = network()
    copied = net.averaged_copy()
    assert copied.model.body is net.model.body
    assert copied.model.fpn is not net.model.fpn
    assert not copied.training
    state = {name: torch.full_like(value, 0.25) for name, value in net.trained_state().items()}
    copied.load_trained(state)
    assert all((value == 0.25).all() for value in copied.trained_state().values())
    assert not any((value == 0.25).all() for value in net.trained_state().values() if value.ndim > 1)
    tuned = network(unfreeze=1, backbone="resnet18")
    copied = tuned.averaged_copy()
    assert copied.model.body is not tuned.model.body
    assert list(copied.trained_state()) == list(tuned.trained_state())
    assert any(name.startswith("body.layer4.") for name in copied.trained_state())


def test_maps_in_place_of_images() -> None:
    made = model()
    head = create_head("classify", made, 2)
    from_images, from_maps = Network(made, head), Network(made, head, from_taps=True)
    assert from_maps.input_levels == ("C3", "C4", "C5")
    images = torch.rand(2, 3, 64, 64)
    taps = made.taps(images)
    one, other = from_images.levels(images), from_maps.levels({name: taps[name] for name in from_maps.input_levels})
    assert list(one) == list(other) == ["P3", "P4", "P5"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_single_map_and_the_image_pyramid_have_no_neck_to_train() -> None:
    for options in ({"levels": "C4", "channels": None}, {"pyramid": "image", "levels": "P4,P5", "channels": None}):
        made = model(**options)
        net = Network(made, create_head("classify", made, 2))
        assert net.trained_parts == ()
        assert {name.split(".")[0] for name in net.trained_state()} == {"head"}
        assert net.input_levels == made.levels
