"""Prefixes and keys of other people's checkpoints: found, chosen by an option, or named in an error."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

import fpnx
from fpnx.cli.main import main
from fpnx.core.errors import FpnxError
from fpnx.core.provenance import WeightsInfo
from fpnx.models.backbones.factory import parameter_shapes
from fpnx.models.backbones.registry import torchvision_names
from fpnx.models.weights.key_matching import FIRST_CONVOLUTION, PARTS
from tests.helpers.reference_networks import randomise

STATE = randomise(models.resnet18()).state_dict()
OTHER = {name: value + 1 if value.is_floating_point() else value for name, value in STATE.items()}
LITTLE = torch.linspace(-2, 2, 3 * 64 * 96).reshape(1, 3, 64, 96).sin()


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def saved(tmp_path: Path, content: Any, name: str = "file.pth") -> str:
    (safetensors.torch.save_file if name.endswith(".safetensors") else torch.save)(content, tmp_path / name)
    return str(tmp_path / name)


def model_of(tmp_path: Path, content: Any, **options: Any) -> fpnx.PyramidModel:
    return fpnx.create_model(weights=saved(tmp_path, content), levels="C3", **options)


def holds(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return torch.equal(model.state_dict()["body.conv1.weight"], state["conv1.weight"])


# --- one prefix, one key ---


@pytest.mark.slow
def test_the_first_convolution_and_the_parts_of_every_torchvision_network_are_known():
    for name in torchvision_names():
        shapes = parameter_shapes(name)
        first = [key for key, shape in shapes.items() if len(shape) == 4 and shape[1] == 3]
        assert len(first) == 1, name
        assert FIRST_CONVOLUTION.fullmatch(first[0]), name
        assert all(PARTS.match(key) or key.startswith(("fc", "classifier", "head", "aux", "Aux")) for key in shapes), (
            name
        )


@pytest.mark.parametrize("backbone", [None, "resnet18"])
@pytest.mark.parametrize(
    "prefix", ["encoder_q.", "backbone.", "encoder.", "net.", "module.", "model.", "_orig_mod.module.", "a.b.c.d."]
)
def test_any_one_prefix_is_found(prefix, backbone, tmp_path):
    content = under(prefix) | {"projector.0.weight": torch.ones(7, 3), "queue": torch.ones(2)}
    model = model_of(tmp_path, {"state_dict": content}, backbone=backbone)
    assert (model.backbone, model.weights.framework, holds(model, STATE)) == ("resnet18", "torchvision", True)
    assert (model.weights.info.prefix, model.weights.info.key) == (prefix, "state_dict")
    assert model.weights.ignored == 4  # fc, the projector and the queue
    again = WeightsInfo.from_json(json.loads(json.dumps(model.weights.info.to_json())))
    assert (again.prefix, again.key) == (prefix, "state_dict")


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_heads_of_ones_own_do_not_matter(head, tmp_path):
    body = {name: value for name, value in STATE.items() if head or not name.startswith("fc.")}
    content = body | {"projector.net.0.weight": torch.ones(4096, 4096), "fc.3.weight": torch.ones(2, 2)}
    assert model_of(tmp_path, content).backbone == "resnet18"
    content["layer1.0.attention.weight"] = torch.ones(3)  # within the backbone: another network
    with pytest.raises(FpnxError, match=r"1 unexpected \(body\.layer1\.0\.attention\.weight\)"):
        model_of(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        {"net": STATE, "epoch": torch.tensor(7)},
        {"network": {"weights": STATE}, "best": 0.5},
        {"net": under("module."), "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": []}},
    ],
    ids=["net", "two keys", "optimizer"],
)
def test_any_one_key_is_found(content, tmp_path):
    model = model_of(tmp_path, content)
    assert holds(model, STATE)
    assert model.weights.key == ("network.weights" if "network" in content else "net")


def test_a_prefix_that_is_found_is_said_and_changes_no_fingerprint(tmp_path, capsys):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    file = saved(tmp_path, {"state_dict": under("encoder.")})
    arguments = ["extract", str(tmp_path / "a.png"), "-o", str(tmp_path / "o.h5"), "--weights", file, "--size", "64",
                 "--levels", "C5", "--overwrite"]  # fmt: skip
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "layout torchvision, key state_dict, prefix encoder., 2 other tensors ignored" in said
    with fpnx.open(tmp_path / "o.h5") as store:
        found, fields = store.fingerprint, dict(store.config)
        assert (store.provenance.weights.prefix, store.provenance.weights.key) == ("encoder.", "state_dict")
        assert store.provenance.options["weights_prefix"] is None
    assert not {"weights_prefix", "weights_key"} & set(fields)
    assert main([*arguments, "--weights-prefix", "encoder", "--weights-key", "state_dict"]) == 0
    with fpnx.open(tmp_path / "o.h5") as store:
        assert store.fingerprint == found
        assert store.provenance.options["weights_prefix"] == "encoder"


# --- several fit ---


@pytest.mark.parametrize("backbone", [None, "resnet18"])
def test_of_several_prefixes_one_is_chosen_by_the_option(backbone, tmp_path):
    content = {"state_dict": under("module.encoder_q.") | under("module.encoder_k.", OTHER) | {"module.queue": LITTLE}}
    with pytest.raises(
        FpnxError, match=r"'module\.encoder_k\.' and 'module\.encoder_q\.': choose one with --weights-prefix"
    ):
        model_of(tmp_path, content, backbone=backbone)
    identities = []
    for asked, state in (("encoder_q", STATE), ("module.encoder_q.", STATE), ("module.encoder_k", OTHER)):
        model = model_of(tmp_path, content, backbone=backbone, weights_prefix=asked)
        assert holds(model, state)
        identities.append(model.identity())
    assert identities[0] == identities[1] != identities[2]
    with pytest.raises(
        FpnxError, match=r"weights prefix 'encoder_z': its parameters are under 'module\.encoder_k\.' and"
    ):
        model_of(tmp_path, content, backbone=backbone, weights_prefix="encoder_z")


def test_a_student_and_a_teacher_under_keys(tmp_path):
    content = {"student": under("module.backbone."), "teacher": under("backbone.", OTHER), "epoch": 3}
    with pytest.raises(FpnxError, match=r"'student\.module\.backbone\.' and 'teacher\.backbone\.'.*--weights-prefix"):
        model_of(tmp_path, content)
    assert holds(model_of(tmp_path, content, weights_prefix="student"), STATE)
    assert holds(model_of(tmp_path, content, weights_prefix="teacher"), OTHER)
    model = model_of(tmp_path, content, weights_key="teacher")
    assert holds(model, OTHER)
    assert model.identity()["weights_key"] == "teacher"


def test_no_prefix_is_chosen_by_an_empty_one(tmp_path):
    content = dict(STATE) | under("momentum.", OTHER)
    with pytest.raises(FpnxError, match=r"'' and 'momentum\.'"):
        model_of(tmp_path, content)
    assert holds(model_of(tmp_path, content, weights_prefix=""), STATE)
    assert holds(model_of(tmp_path, content, weights_prefix="momentum"), OTHER)


def test_prefixes_of_detectors(tmp_path):
    detector = randomise(models.get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None)).state_dict()
    plain = fpnx.create_model(weights=saved(tmp_path, detector))
    wrapped = fpnx.create_model(weights=saved(tmp_path, {"net": under("detector.", detector)}))
    assert (wrapped.weights.framework, wrapped.weights.prefix) == ("torchvision detection", "detector.")
    content = under("student.", {name: value + 1 for name, value in detector.items()}) | under("teacher.", detector)
    with pytest.raises(FpnxError, match=r"'student\.' and 'teacher\.'"):
        fpnx.create_model(weights=saved(tmp_path, content))
    teacher = fpnx.create_model(weights=saved(tmp_path, content), weights_prefix="teacher")
    for name, value in plain.state_dict().items():
        assert torch.equal(wrapped.state_dict()[name], value), name
        assert torch.equal(teacher.state_dict()[name], value), name


# --- averages beside the parameters ---


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": STATE, "state_dict_ema": OTHER},
        {"model": STATE, "model_ema": under("module.", OTHER) | {"n_averaged": torch.tensor(9)}},
        {"net": STATE, "ema": OTHER},
    ],
    ids=["timm", "torchvision", "other"],
)
def test_an_average_beside_the_parameters_is_said_and_taken_on_demand(content, tmp_path):
    first, average = content
    model = model_of(tmp_path, content)
    assert holds(model, STATE)
    assert f"{first} was taken, --weights-key {average} takes the other" in model.weights.note
    assert model.identity() == model_of(tmp_path, content, weights_key=first).identity()
    other = model_of(tmp_path, content, weights_key=average)
    assert holds(other, OTHER)
    assert other.identity() == {**model.identity(), "weights_key": average}
    with pytest.raises(FpnxError, match=rf"weights key 'shadow': .* holds no parameters there, but {first}, {average}"):
        model_of(tmp_path, content, weights_key="shadow")


def test_an_average_behind_a_prefix_is_said_and_taken_on_demand(tmp_path):
    content = {"state_dict": under("model.") | under("ema_model.module.", OTHER)}
    model = model_of(tmp_path, content)
    assert (holds(model, STATE), model.weights.prefix) == (True, "model.")
    assert "model. was taken, --weights-prefix ema_model.module. takes the other" in model.weights.note
    assert model.identity() == model_of(tmp_path, content, weights_prefix="model.").identity()
    average = model_of(tmp_path, content, weights_prefix="ema_model")
    assert holds(average, OTHER)
    assert average.identity() == {**model.identity(), "weights_prefix": "ema_model.module."}


def test_an_average_alone_is_taken_without_a_note(tmp_path):
    model = model_of(tmp_path, {"state_dict_ema": OTHER, "epoch": 3})
    assert (holds(model, OTHER), model.weights.note) == (True, None)


# --- nothing fits ---


@pytest.mark.parametrize("backbone", [None, "resnet18"])
def test_what_is_missing_under_the_best_prefix_is_named(backbone, tmp_path):
    content = under("net.")
    for name in ("layer2.0.conv1.weight", "layer3.1.bn2.bias"):
        del content[f"net.{name}"]
    # 20 convolutions, and 20 batch norms with four tensors each
    message = r"98 of 100 names fit under the prefix net\.; 2 missing \(body\.layer2\.0\.conv1\.weight, body\.layer3"
    with pytest.raises(FpnxError, match=message):
        model_of(tmp_path, content, backbone=backbone)


def test_how_much_of_another_network_fits_is_said(tmp_path):
    content = {name: value for name, value in under("net.").items() if ".layer1." in name}
    with pytest.raises(
        FpnxError,
        match=r"at most 20 of 100 names of resnet18 fit under the prefix 'net\.', missing are conv1\.weight, bn1",
    ):
        model_of(tmp_path, content, backbone="resnet18")


@pytest.mark.parametrize("option", ["weights_key", "weights_prefix"])
@pytest.mark.parametrize("weights", ["random", "ResNet18_Weights.IMAGENET1K_V1"])
def test_key_and_prefix_are_for_files(option, weights):
    with pytest.raises(FpnxError, match=f"--{option.replace('_', '-')} is for a file of parameters"):
        fpnx.create_model("resnet18", weights=weights, offline=True, **{option: "x"})


def test_safetensors_have_no_keys(tmp_path):
    file = saved(tmp_path, STATE, "file.safetensors")
    with pytest.raises(FpnxError, match=r"weights key 'model': .* is safetensors, which has no keys"):
        fpnx.create_model(weights=file, weights_key="model")


# --- a module of one's own ---


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 8, 16, 16, 32)
        self.stages = nn.Sequential(*(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(images).mean((2, 3)))


def test_a_file_is_loaded_into_a_module(tmp_path):
    module, trained = Own(), Own()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("head.")}
    model = fpnx.create_model(module, weights=saved(tmp_path, {"net": under("encoder.", state)}), levels="C2-C5")
    expected = fpnx.create_model(trained, levels="C2-C5")
    with torch.no_grad():
        for level, value in expected(LITTLE).items():
            assert torch.equal(model(LITTLE)[level], value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (model.weights.key, model.weights.prefix, str(model.weights.body)) == (
        "net",
        "encoder.",
        "from file (file.pth)",
    )
    assert model.identity()["weights"] != fpnx.create_model(module, levels="C2-C5").identity()["weights"]


def test_files_that_do_not_fit_a_module_are_refused(tmp_path):
    state = Own().state_dict()
    twice = saved(tmp_path, under("s.", state) | under("t.", state))
    with pytest.raises(FpnxError, match=r"'s\.' and 't\.'"):
        fpnx.create_model(Own(), weights=twice)
    fpnx.create_model(Own(), weights=twice, weights_prefix="t")
    for change, message in (
        ({"stages.1.weight": None}, r"1 of its parameters are missing or misshapen \(stages\.1\.weight\)"),
        ({"stages.1.weight": torch.ones(1)}, r"misshapen \(stages\.1\.weight\)"),
        ({"stages.9.weight": torch.ones(1)}, r"names that Own does not have: stages\.9\.weight"),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(FpnxError, match=message):
            fpnx.create_model(Own(), weights=saved(tmp_path, changed))
    with pytest.raises(FpnxError, match=r"its names \(conv1\.weight, .* are not those of Own"):
        fpnx.create_model(Own(), weights=saved(tmp_path, STATE))
    with pytest.raises(FpnxError, match="No such file"):
        fpnx.create_model(Own(), weights=str(tmp_path / "gone.pth"))


# --- timm ---


@pytest.fixture
def timm() -> Iterator[Any]:
    library = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield library


def timm_taps(network: nn.Module, images: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last intermediate map of a timm network at each stride, by its own `forward_intermediates`."""
    if not hasattr(network, "forward_intermediates"):
        pytest.skip("this version of timm has no forward_intermediates for this network")
    with torch.no_grad():
        maps = network.forward_intermediates(images, intermediates_only=True)
    by_size = {tuple(each.shape[2:]): each for each in maps}
    return {level: by_size[tuple(value.shape[2:])] for level, value in wanted.items()}


TIMM_NETWORKS = ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize(
    "name",
    [*TIMM_NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in ("efficientnet_b0", "regnety_002"))],
)
def test_timms_own_state_dicts_give_timms_taps(timm, name, tmp_path):
    file = saved(tmp_path, randomise(timm.create_model(name)).state_dict())
    network = timm.create_model(name, checkpoint_path=file).eval()
    model = fpnx.create_model(f"timm/{name}", weights=file, levels="C3-C5")
    images = torch.randn(1, 3, *(model.size or (64, 96)))
    with torch.no_grad():
        levels = model(images)
    for level, expected in timm_taps(network, images, levels).items():
        assert (levels[level] - expected).abs().max() <= 1e-5 * expected.abs().max(), level
    assert (model.weights.framework, str(model.weights.body)) == ("timm", "from file (file.pth)")


@pytest.mark.parametrize(
    "variant",
    ["bare", "state_dict", "model", "state_dict_ema", "model_ema", "module", "no head", "10 classes", "features only",
     "safetensors", "tag"],
)  # fmt: skip
def test_forms_of_timms_files(timm, variant, tmp_path):
    classes = {"no head": 0, "10 classes": 10}.get(variant, 1000)
    network = randomise(timm.create_model("convnext_atto", num_classes=classes)).eval()
    state = network.state_dict()
    if variant == "features only":
        state = {
            name: state[name.replace("_", ".", 1)]
            for name in timm.create_model("convnext_atto", features_only=True).state_dict()
        }
    content = {variant: state} if variant.startswith(("state", "model")) else state
    content = under("module.", state) if variant == "module" else content
    file = saved(tmp_path, content, "file.safetensors" if variant == "safetensors" else "file.pth")
    tag = ".d2_in1k" if variant == "tag" else ""
    model = fpnx.create_model(f"timm/convnext_atto{tag}", weights=file, levels="C5")
    with torch.no_grad():
        assert torch.equal(model(LITTLE)["C5"], network.forward_features(LITTLE))


def test_files_of_a_networks_authors_are_renamed_by_timm(timm, tmp_path):
    """ConvNeXt's authors have `downsample_layers.0.0.weight` for `stem.0.weight`; timm's filter knows them."""
    network = randomise(timm.create_model("convnext_atto")).eval()
    authors = {}
    for name, value in network.state_dict().items():
        stage, _, rest = name.removeprefix("stages.").partition(".")
        new = name.replace("stem.", "downsample_layers.0.")
        if rest.startswith("downsample."):
            new = f"downsample_layers.{stage}.{rest[11:]}"
        elif rest.startswith("blocks."):
            new = f"stages.{stage}.{rest[7:]}".replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        authors[new.replace("head.fc.", "head.").replace("head.norm.", "norm.")] = value
    model = fpnx.create_model("timm/convnext_atto", weights=saved(tmp_path, {"model": authors}), levels="C5")
    with torch.no_grad():
        assert torch.equal(model(LITTLE)["C5"], network.forward_features(LITTLE))


def test_timm_takes_the_average_first_as_timm_does(timm, tmp_path):
    parameters, average = (randomise(timm.create_model("resnet10t")).state_dict() for _ in range(2))
    average["conv1.0.weight"] = average["conv1.0.weight"] + 1
    file = saved(tmp_path, {"state_dict": parameters, "state_dict_ema": average})
    reference = timm.create_model("resnet10t", checkpoint_path=file).state_dict()["conv1.0.weight"]
    model = fpnx.create_model("timm/resnet10t", weights=file)
    assert torch.equal(model.state_dict()["body.conv1.0.weight"], reference)
    assert "state_dict_ema was taken, --weights-key state_dict takes the other" in model.weights.note
    model = fpnx.create_model("timm/resnet10t", weights=file, weights_key="state_dict")
    assert torch.equal(model.state_dict()["body.conv1.0.weight"], parameters["conv1.0.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_files_with_timm_backbones(timm, suffix, tmp_path):
    file = tmp_path / f"own{suffix}"
    model = fpnx.create_model("timm/convnext_atto", weights="random", levels="P3-P5", channels=16)
    fpnx.save_weights(model, file)
    for backbone in (None, "timm/convnext_atto"):
        loaded = fpnx.create_model(backbone, weights=str(file))
        with torch.no_grad():
            for level, value in model(LITTLE).items():
                assert torch.equal(loaded(LITTLE)[level], value)
    with pytest.raises(FpnxError, match=r"it is for timm/convnext_atto, not for timm/resnet10t"):
        fpnx.create_model("timm/resnet10t", weights=str(file))


def test_prefixes_and_other_networks_with_timm(timm, tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    twice = {"state_dict": under("encoder_q.", state) | under("encoder_k.", state)}
    with pytest.raises(FpnxError, match=r"'encoder_k\.' and 'encoder_q\.'.*--weights-prefix"):
        model_of(tmp_path, twice, backbone="timm/resnet10t")
    assert (
        model_of(tmp_path, twice, backbone="timm/resnet10t", weights_prefix="encoder_q").weights.prefix == "encoder_q."
    )
    with pytest.raises(FpnxError, match=r"does not fit timm/resnet18: .*unexpected"):
        model_of(tmp_path, models.resnet34().state_dict(), backbone="timm/resnet18")
    with pytest.raises(FpnxError, match=r"names \(conv1\.weight, .* are not those of timm/convnext_atto"):
        model_of(tmp_path, STATE, backbone="timm/convnext_atto")


@pytest.mark.parametrize("backbone", [None, "resnet18", "timm/resnet10t"])
def test_a_missing_file_is_one_line(backbone, tmp_path, capsys):
    if backbone == "timm/resnet10t":
        pytest.importorskip("timm")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    options = [] if backbone is None else ["--backbone", backbone]
    gone = tmp_path / "gone.pth"
    assert (
        main(["extract", str(tmp_path / "a.png"), "-o", str(tmp_path / "o.h5"), "--weights", str(gone), *options]) == 2
    )
    assert capsys.readouterr().err == f"fpnx: cannot read weights from {gone}: No such file or directory\n"
