"""Extraction with a module or a model of the caller's own: features, fingerprints, verification, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fpnx
from fpnx.cli.main import main

CHANNELS = (3, 8, 16, 32, 64, 128)


def own_network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = itertools.pairwise(CHANNELS)
        return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairs))


def fingerprint(path: Path) -> str:
    with fpnx.open(path) as store:
        return str(store.fingerprint)


def test_taps_of_an_own_network_reach_the_disk(photos: Path, tmp_path: Path) -> None:
    network, out = own_network(), tmp_path / "own.h5"
    result = fpnx.extract(photos, out, backbone=network, levels="C3-C5,P3-P5", size=64)
    assert (result.done, result.exit_code) == (6, 0)
    model = fpnx.create_model(network, levels="C3", size=64)
    with fpnx.open(out) as store, torch.no_grad():
        assert store.backbone == "Sequential"
        for item in store:
            image = model.transform(photos / item.path)[None]
            for level, depth in (("C3", 3), ("C4", 4), ("C5", 5)):
                expected = network[:depth](image)[0].numpy()
                assert np.abs(item[level] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_network_and_the_model_around_it_give_the_same_file(photos: Path, tmp_path: Path) -> None:
    network = own_network()
    fpnx.extract(photos, tmp_path / "network.h5", backbone=network, levels="P3-P5", size=64)
    model = fpnx.create_model(network, levels="P3-P5").double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fpnx.extract(photos, tmp_path / "model.h5", backbone=model.float(), size=64)
    assert fingerprint(tmp_path / "network.h5") == fingerprint(tmp_path / "model.h5")
    assert model.training
    assert all(torch.equal(value, before[name].float()) for name, value in model.state_dict().items())
    again = fpnx.extract(photos, tmp_path / "model.h5", backbone=own_network(), levels="P3-P5", size=64, resume=True)
    assert (again.done, again.computed) == (6, 0)


def test_changed_parameters_change_the_fingerprint(photos: Path, tmp_path: Path) -> None:
    model, out = fpnx.create_model("mobilenet_v2", weights="random", levels="P4"), tmp_path / "out.h5"
    fpnx.extract(photos, out, backbone=model, size=64)
    fpnx.extract(photos, tmp_path / "named.h5", backbone="mobilenet_v2", weights="random", levels="P4", size=64)
    assert fingerprint(out) == fingerprint(tmp_path / "named.h5")
    with torch.no_grad():
        model.fpn.inner_blocks[-1][0].bias.add_(1)
    with pytest.raises(fpnx.FpnxError, match="made with another config"):
        fpnx.extract(photos, out, backbone=model, size=64, resume=True)
    fpnx.extract(photos, out, backbone=model, size=64, overwrite=True)
    assert fingerprint(out) != fingerprint(tmp_path / "named.h5")
    with fpnx.open(out) as store:
        weights = store.provenance.weights
        assert (str(weights.body), str(weights.pyramid)) == ("untrained (random, seed 0)", "as given")


def test_verify_needs_the_module(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, network = tmp_path / "own.h5", own_network()
    fpnx.extract(photos, out, backbone=network, levels="P3-P5", size=64)
    checked = fpnx.verify(out, against=photos, backbone=network)
    assert (checked.problems, checked.compared) == ((), 6)
    with pytest.raises(fpnx.FpnxError, match=r"cannot be computed again here \(weights"):
        fpnx.verify(out, against=photos, backbone=own_network(1))
    code, err = main(["verify", str(out), "--against", str(photos)]), capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    assert "was computed with a module (Sequential)" in err
    fpnx.extract(photos, tmp_path / "named.h5", backbone="mobilenet_v2", weights="random", levels="P4", size=64)
    with pytest.raises(fpnx.FpnxError, match="leave out the module"):
        fpnx.verify(tmp_path / "named.h5", against=photos, backbone=network)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "P3"}, "levels beside a model, which has its own"),
        ({"weights": "random"}, "weights beside a model"),
        ({"seed": 1}, "seed beside a model"),
        ({"channels": 8}, "channels beside a model"),
        ({"engine": "ray"}, "do not get a module|pip install"),
    ],
)
def test_options_that_a_model_has_itself_are_refused(photos: Path, tmp_path: Path, options: dict, message: str) -> None:
    model = fpnx.create_model(own_network(), levels="P4")
    with pytest.raises(fpnx.FpnxError, match=message):
        fpnx.extract(photos, tmp_path / "out.h5", backbone=model, **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("backbone", "message"), [(nn.Linear, "is a class"), (3, "take a name or an nn.Module")])
def test_what_is_no_backbone_is_refused(photos: Path, tmp_path: Path, backbone: object, message: str) -> None:
    with pytest.raises(fpnx.FpnxError, match=message):
        fpnx.extract(photos, tmp_path / "out.h5", backbone=backbone)


def test_pictures_are_drawn_with_an_own_network(photos: Path, tmp_path: Path) -> None:
    result = fpnx.extract(photos, tmp_path / "png", backbone=own_network(), levels="P3-P5", size=64, format="png")
    assert result.done == 6
    assert len(list((tmp_path / "png").rglob("*.png"))) == 6


def test_weights_of_an_own_network_are_not_saved(tmp_path: Path) -> None:
    model = fpnx.create_model(own_network(), levels="P4")
    with pytest.raises(fpnx.FpnxError, match="could not be read back: the backbone Sequential is a module of yours"):
        fpnx.save_weights(model, tmp_path / "own.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (None, ("untrained (random, seed 0)", "as given")),
        ("fpn", ("untrained (random, seed 0)", "trained (as given)")),
        (("body", "fpn"), ("trained (as given)", "trained (as given)")),
    ],
)
def test_saved_weights_say_what_was_trained(tmp_path: Path, trained: object, message: tuple[str, str]) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P4")
    with torch.no_grad():
        model.fpn.inner_blocks[-1][0].bias.add_(1)
    fpnx.save_weights(model, tmp_path / "m.safetensors", trained=trained)
    read = fpnx.create_model(weights=str(tmp_path / "m.safetensors"))
    assert (str(read.weights.body), str(read.weights.fpn)) == message


def test_what_is_no_model_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(fpnx.FpnxError, match="takes a model that create_model made, and not a Linear"):
        fpnx.save_weights(nn.Linear(1, 1), tmp_path / "m.pth")
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P4")
    with pytest.raises(fpnx.FpnxError, match="trained 3: take body or fpn, or both"):
        fpnx.save_weights(model, tmp_path / "m.pth", trained=3)
    fpnx.extract(photos, tmp_path / "own.h5", backbone=own_network(), levels="P3", size=64)
    with pytest.raises(fpnx.FpnxError, match=r"backbone 'mobilenet_v2': take the nn\.Module"):
        fpnx.verify(tmp_path / "own.h5", against=photos, backbone="mobilenet_v2")


@pytest.mark.parametrize("change", [lambda value: value.to("meta"), lambda value: value.to_sparse()])
def test_parameters_without_plain_values_are_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    state = fpnx.create_model("mobilenet_v2", weights="random", levels="C4").state_dict()
    torch.save({name: change(value) if value.ndim == 4 else value for name, value in state.items()}, tmp_path / "w.pth")
    with pytest.raises(fpnx.FpnxError, match=r"w\.pth.*without plain values"):
        fpnx.create_model("mobilenet_v2", weights=str(tmp_path / "w.pth"), levels="C4")


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    model = fpnx.create_model("mobilenet_v2", weights="random", levels="P4")
    with pytest.raises(fpnx.FpnxError, match="trained 'neck': take body or fpn"):
        fpnx.save_weights(model, tmp_path / "m.pth", trained=["neck"])
