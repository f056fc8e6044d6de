"""Stage detection and taps: all torchvision classifiers, timm's networks, and the caller's own modules."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import fpnx
from fpnx.core.errors import FpnxError
from fpnx.models.backbones import factory
from fpnx.models.backbones.registry import no_warnings
from fpnx.models.preprocessing import Recipe
from tests.helpers.files import DATA, ROOT, noise_image
from tests.helpers.process import Forked

# Strides, nodes and channels, measured with another implementation of the method.
TABLE = json.loads((DATA / "stages.json").read_text())
WITH_STAGES = [name for name, rows in TABLE.items() if rows]
# One network of each family, with the (height, width) that it is tested at.
FAMILIES = {
    "alexnet": (107, 139),
    "convnext_tiny": (107, 139),
    "densenet121": (107, 139),
    "efficientnet_b0": (107, 139),
    "efficientnet_v2_s": (107, 139),
    "googlenet": (107, 139),
    "inception_v3": (139, 171),
    "maxvit_t": (224, 224),
    "mnasnet0_5": (107, 139),
    "mobilenet_v2": (107, 139),
    "mobilenet_v3_small": (107, 139),
    "regnet_y_400mf": (107, 139),
    "resnet18": (107, 139),
    "resnext50_32x4d": (107, 139),
    "shufflenet_v2_x0_5": (107, 139),
    "squeezenet1_0": (107, 139),
    "swin_t": (107, 139),
    "swin_v2_t": (107, 139),
    "vgg11_bn": (107, 139),
}


def mark_slow(names: Any, fast: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow, id=name) for name in names]


def rows(detection: factory.StageDetection) -> list[list[Any]]:
    assert detection.stages is not None, detection.refused
    return [[2**level, tap.node, tap.channels] for level, tap in sorted(detection.stages.taps.items())]


@pytest.mark.parametrize("name", mark_slow(WITH_STAGES, FAMILIES))
def test_taps_equal_the_table(name: str) -> None:
    assert rows(factory.detect_stages(name)) == TABLE[name]


def test_the_table_lists_torchvisions_networks() -> None:
    assert set(TABLE) <= set(models.list_models(module=models))
    assert len(WITH_STAGES) == 75


@pytest.mark.parametrize("name", mark_slow(sorted(set(TABLE) - set(WITH_STAGES)), ["vit_b_16", "vit_h_14"]))
def test_vision_transformers_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(FpnxError, match=rf"{name} has (maps at stride \d+ only|no maps at strides).*transformer"):
        fpnx.create_model(name, weights="random")


@pytest.mark.parametrize("name", mark_slow(FAMILIES, ["densenet121", "googlenet", "mobilenet_v3_small", "resnet18",
                                                  "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t"]))  # fmt: skip
def test_taps_equal_hooks_on_the_plain_network(name: str) -> None:
    backbone = factory.create_backbone(name, seed=3)
    body = randomise_statistics(backbone.body)
    plain = plain_network(name)
    assert not set(body.state_dict()) - set(plain.state_dict()), "names that torchvision does not have"
    state = plain.state_dict()  # it holds the version metadata that MNASNet reads
    state.update(body.state_dict())
    plain.load_state_dict(state)
    images = torch.randn(2, 3, *FAMILIES[name], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = body(images), hooked_outputs(plain, backbone.nodes, images)
    assert list(ours) == [f"C{level}" for level in backbone.nodes]
    for level, channels in backbone.channels.items():
        assert ours[f"C{level}"].shape[1] == channels
        assert torch.equal(ours[f"C{level}"], theirs[level]), level
    shapes = factory.tap_shapes(body, FAMILIES[name])
    assert shapes == {level: tuple(tap.shape[1:]) for level, tap in ours.items()}


def plain_network(name: str) -> nn.Module:
    with no_warnings():
        network = models.get_model(name, weights=None).eval()
    if hasattr(network, "transform_input"):
        network.transform_input = True  # as torchvision builds it for its published weights
    return network


def hooked_outputs(plain: nn.Module, nodes: Any, images: Tensor) -> dict[int, Tensor]:
    """Copies of the outputs of the named modules. DenseNet's last ReLU is a function that follows `features`."""
    outputs: dict[int, Tensor] = {}
    for level, node in nodes.items():
        name = "features" if node == "relu" else node
        plain.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, level=level: outputs.__setitem__(level, output.clone())
        )
    plain(images)
    for level, node in nodes.items():
        if node == "relu":
            outputs[level] = F.relu(outputs[level])
        if type(plain).__name__ == "SwinTransformer" and node.startswith("features"):
            outputs[level] = outputs[level].permute(0, 3, 1, 2)
    return outputs


def randomise_statistics(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1, generator=generator)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize("name", ["swin_t", "densenet121"])
def test_a_single_tap_runs_no_deeper_stage(name: str) -> None:
    every = fpnx.create_model(name, weights="random", levels="C2-C5")
    one = fpnx.create_model(name, weights="random", levels="C3")
    ran: list[str] = []
    for path, module in one.body.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(one(images)["C3"], every(images)["C3"])
    deeper = tuple(node for level, node in factory.create_backbone(name, 0).nodes.items() if level > 3)
    assert ran
    assert not any(path.startswith(deeper) for path in ran)


# Missing strides and fixed input sizes


def test_a_missing_stride_leaves_the_other_levels() -> None:
    model = fpnx.create_model("squeezenet1_1", weights="random")
    assert model.levels == ("P2", "P3", "P4")
    with torch.no_grad():
        pyramid = model(torch.randn(1, 3, 96, 128))
    assert {name: tuple(level.shape[1:]) for name, level in pyramid.items()} == model.shapes((96, 128))


@pytest.mark.parametrize(
    "options",
    [{"levels": "P5"}, {"levels": "C5"}, {"levels": "P2-P6"}, {"levels": "P7"}, {"top_block": "pool"}],
    ids=lambda options: str(*options.values()),
)
def test_a_missing_stride_is_reported(options: dict[str, str]) -> None:
    with pytest.raises(FpnxError, match=r"squeezenet1_1 has no .*no map at stride 32: it gives C2, C3, C4, P2, P3, P4"):
        fpnx.create_model("squeezenet1_1", weights="random", **options)


def test_a_wrong_size_for_a_network_built_for_one_size_is_refused(fpnx: Any, photos: Path) -> None:
    code, _, err = fpnx("extract", photos, "--backbone", "maxvit_t", "--weights", "random", "--size", "300")
    assert code == 2
    assert "maxvit_t" in err
    assert "squares in multiples of 224, and not 300×300: take size 224 or 448" in err


def test_a_network_built_for_one_size_can_be_built_for_another() -> None:
    small = fpnx.create_model("maxvit_t", weights="random", levels="C5")
    assert small.shapes((224, 224)) == {"C5": (512, 7, 7)}
    with pytest.raises(FpnxError, match="built for inputs of 224×224: give size 448"):
        small.shapes((448, 448))
    large = fpnx.create_model("maxvit_t", weights="random", levels="C5", size=448)
    assert large.shapes((448, 448)) == {"C5": (512, 14, 14)}
    assert large.transform(noise_image(0, (80, 60))).shape == (3, 448, 448)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (small, large)]
    assert shapes[0] == shapes[1]
    assert torch.equal(small.state_dict()["body.stem.0.0.weight"], large.state_dict()["body.stem.0.0.weight"])


def test_the_smallest_size_is_reported() -> None:
    model = fpnx.create_model("inception_v3", weights="random", levels="C2")
    with pytest.raises(FpnxError, match="the smallest square it takes is 75×75"):
        model.shapes((74, 200))


# The caller's own modules


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class CustomNetwork(nn.Module):
    """Strides 2 to 32. In-place operations between the stages change the output of the stage before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 4)
        self.one, self.two, self.three, self.four = block(4, 8), block(8, 12), block(12, 16), block(16, 20)
        self.head = nn.Linear(20, 5)
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.stem(x * self.scale))
        x = self.two(x.mul_(0.5))
        x = self.three(x)
        x += 1
        return self.head(self.four(x).mean((2, 3)))

    def expected_taps(self, x: Tensor) -> dict[str, Tensor]:
        taps = {"C2": self.one(self.stem(x * self.scale))}
        # `mul_` and `+=` stand between the stages: each belongs to the stage before it.
        taps["C2"] = taps["C2"] * 0.5
        taps["C3"] = self.two(taps["C2"])
        taps["C4"] = self.three(taps["C3"]) + 1
        taps["C5"] = self.four(taps["C4"])
        return taps


class Untraceable(CustomNetwork):
    """Its control flow depends on its input, so it cannot be traced: its taps are the outputs of its modules."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[0] > 0 else x[:0])

    def expected_taps(self, x: Tensor) -> dict[str, Tensor]:
        taps = {"C2": self.one(self.stem(x * self.scale))}
        taps["C3"] = self.two(taps["C2"] * 0.5)
        taps["C4"] = self.three(taps["C3"])
        taps["C5"] = self.four(taps["C4"] + 1)
        return taps


class SeveralOutputs(CustomNetwork):
    """A network that returns several maps, one of them with channels last."""

    def forward(self, x: Tensor) -> Any:
        one = self.one(self.stem(x))
        two = self.two(one)
        four = self.four(self.three(two))
        return {"fine": one, "rest": [two.permute(0, 2, 3, 1), four], "pooled": four.mean((2, 3))}

    def expected_taps(self, x: Tensor) -> dict[str, Tensor]:
        one = self.one(self.stem(x))
        return {"C2": one, "C3": self.two(one), "C5": self.four(self.three(self.two(one)))}


class Decoder(CustomNetwork):
    """An encoder and a decoder without skip connections: its last maps are fine again."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Upsample(scale_factor=8), nn.Conv2d(20, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.four(self.three(self.two(self.one(self.stem(x))))))


@pytest.fixture(params=[CustomNetwork, Untraceable, SeveralOutputs], ids=lambda kind: kind.__name__)
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(2)
    module: nn.Module = randomise_statistics(request.param())
    return module


def test_a_callers_module(module: Any) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()
    model = fpnx.create_model(module, levels="C2,C3,C5,P5", seed=1)
    assert module.training, "the caller's module must stay as it is"
    assert not any(part.training for part in model.modules())
    images = torch.randn(2, 3, 75, 107)
    with torch.no_grad():
        levels, taps = model(images), module.eval().expected_taps(images)
    assert list(levels) == ["C2", "C3", "C5", "P5"]
    assert all(torch.equal(levels[name], taps[name]) for name in ("C2", "C3", "C5"))
    body = {name[5:]: value for name, value in model.state_dict().items() if name.startswith("body.")}
    assert set(body) <= set(before)
    assert all(torch.equal(value, before[name]) for name, value in body.items())
    assert model.shapes((75, 107)) == {name: tuple(level.shape[1:]) for name, level in levels.items()}
    assert (str(model.weights.body), model.weights.body.trained) == ("as given", None)
    assert model.weights.fpn.trained is False
    assert model.backbone == type(module).__name__


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_share_no_parameters(module: nn.Module, duplicate: Any) -> None:
    model = fpnx.create_model(module, levels="C2,P5")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        copied = duplicate(model)
        assert all(torch.equal(value, before[name]) for name, value in copied(images).items())
        for parameter in copied.parameters():
            parameter.zero_()
        assert all(torch.equal(value, before[name]) for name, value in model(images).items()), (
            "copies must share no parameters"
        )
        assert copied(images)["C2"].abs().max() == 0
        doubled = copy.deepcopy(model).double()(images.double())
    assert all((value - before[name]).abs().max() < 1e-4 for name, value in doubled.items())


@pytest.mark.parametrize("levels", ["C2", "C3"])
def test_hooked_networks_stop_after_the_last_tap(levels: str) -> None:
    torch.manual_seed(2)
    module = Untraceable().eval()
    model = fpnx.create_model(module, levels=levels)
    ran: list[str] = []
    model.body.get_submodule("head").register_forward_hook(lambda *_: ran.append("head"))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert not ran


class OneStride(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 16)


class OneSize(CustomNetwork):
    def forward(self, x: Tensor) -> Tensor:
        assert tuple(x.shape[2:]) == (224, 224), "only 224"
        return super().forward(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (OneStride(), "the module OneStride has maps at stride 16 only"),
        (Decoder(), "the module Decoder does not go from fine to coarse"),
        (OneSize(), r"the module OneSize cannot be measured \(AssertionError: only 224.*\): .* of any size"),
        (nn.Linear(3, 3), "the module Linear cannot be measured"),
    ],
    ids=["one stride", "decoder", "one size", "no images"],
)
def test_modules_without_usable_stages_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        fpnx.create_model(module)


def test_a_module_keeps_its_parameters_whatever_weights_are_given() -> None:
    torch.manual_seed(2)
    module = CustomNetwork()
    default, random = fpnx.create_model(module), fpnx.create_model(module, weights="random")
    assert all(torch.equal(value, random.state_dict()[name]) for name, value in default.state_dict().items())
    with pytest.raises(FpnxError, match="beside a module: it keeps the parameters that it has"):
        fpnx.create_model(module, weights="imagenet")


def test_a_modules_recipe_is_used() -> None:
    module = CustomNetwork()
    assert fpnx.create_model(module).recipe == Recipe(height=224, width=224)
    module.recipe = Recipe(height=96, width=64, mean=(0.5, 0.5, 0.5))
    assert fpnx.create_model(module).transform(noise_image(0, (80, 60))).shape == (3, 96, 64)


def test_a_models_identity_depends_on_its_parameters() -> None:
    one, two = CustomNetwork(), CustomNetwork()
    assert fpnx.create_model(one).identity() == fpnx.create_model(copy.deepcopy(one)).identity()
    assert fpnx.create_model(one).identity() != fpnx.create_model(two).identity()


# The cache of stage detection


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def detect_c2(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Detects the node of resnet18's C2 with nothing cached in memory, as in a fresh process."""

    def detect() -> str:
        monkeypatch.setattr(factory, "_detections", {})
        detection = factory.detect_stages("resnet18")
        assert detection.stages is not None
        return detection.stages.taps[2].node

    return detect


def test_another_process_reads_the_cache(cache_home: Path, detect_c2: Callable[[], str]) -> None:
    assert detect_c2() == "layer1"
    (file,) = (cache_home / "fpnx" / "stages").iterdir()
    file.write_text(file.read_text().replace('"layer1"', '"cached"'))
    code = (
        "from fpnx.models.backbones.factory import detect_stages; print(detect_stages('resnet18').stages.taps[2].node)"
    )
    out, _ = Forked(code, cwd=ROOT).communicate()
    assert (out.strip(), detect_c2()) == ("cached", "cached")


@pytest.mark.parametrize(
    "broken",
    [b"", b'{"key": ', b"[1, 2]", b'{"key": "another", "value": {}}', b"\xff\xfe", None],
    ids=["empty", "truncated", "no object", "another key", "no text", "other fields"],
)
def test_a_broken_cache_entry_is_replaced(cache_home: Path, detect_c2: Callable[[], str], broken: bytes | None) -> None:
    assert detect_c2() == "layer1"
    (file,) = (cache_home / "fpnx" / "stages").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"taps"', b'"tips"') if broken is None else broken)
    assert detect_c2() == "layer1"
    assert file.read_bytes() == whole, "the entry was not replaced"


def test_detection_works_where_the_cache_cannot_be_written(
    tmp_path: Path, detect_c2: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    assert detect_c2() == "layer1"


# Published files with old names


def test_densenet_files_with_old_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    plain = randomise_statistics(models.densenet121(weights=None)).eval()
    old = {
        re.sub(r"(denselayer.*(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in plain.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    file = tmp_path / "hub" / "checkpoints" / Path(models.DenseNet121_Weights.IMAGENET1K_V1.url).name
    file.parent.mkdir(parents=True)
    torch.save(old, file)
    model = fpnx.create_model("densenet121", weights="imagenet", levels="C5", offline=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images)["C5"], F.relu(plain.features(images)))


# timm


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm")


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224", "hrnet_w18_small"]
)
def test_timm_networks(timm: Any, name: str) -> None:
    model = fpnx.create_model(f"timm/{name}", weights="random", levels="C2-C5,P3")
    theirs = timm.create_model(name, features_only=True).eval()
    state = {
        key[5:]: value for key, value in randomise_statistics(model).state_dict().items() if key.startswith("body.")
    }
    theirs.load_state_dict({**theirs.state_dict(), **state})
    size = model.size or (96, 160)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        ours, maps = model(images), theirs(images)
    if name.startswith("swin"):
        maps = [each.permute(0, 3, 1, 2) for each in maps]
    by_stride = dict(zip(theirs.feature_info.reduction(), maps, strict=True))
    for k in range(2, 6):
        assert torch.equal(ours[f"C{k}"], by_stride[2**k]), k
    assert {level: tuple(value.shape[1:]) for level, value in ours.items()} == model.shapes(size)
    config = timm.data.resolve_data_config({}, model=theirs)
    assert (model.recipe.height, model.recipe.width) == config["input_size"][1:]
    assert (model.recipe.mean, model.recipe.std) == (config["mean"], config["std"])
    assert model.recipe.resampling == config["interpolation"]


@pytest.mark.parametrize("weights", ["imagenet", "default", "c3_in1k", "timm/resnet10t.c3_in1k"])
def test_timm_weights_from_a_copied_file(
    timm: Any, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    import safetensors.torch

    from fpnx.models.weights.timm import timm_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(5)
    classifier = randomise_statistics(timm.create_model("resnet10t")).eval()
    (published,) = timm_weights("timm/resnet10t")
    published.file.parent.mkdir(parents=True)
    safetensors.torch.save_file(classifier.state_dict(), published.file)
    model = fpnx.create_model("timm/resnet10t", weights=weights, levels="C5", offline=True)
    assert not caplog.records  # timm does not name the parameters that it leaves out
    assert logging.getLogger("timm").level == logging.NOTSET
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images)["C5"], classifier.forward_features(images))
    assert (model.weights.body.trained, model.weights.body.source) == (True, "timm/resnet10t.c3_in1k")


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        ("timm/resnet10t", "imagenet", "forbidden.*put model.safetensors from https://.* or take --weights"),
        ("timm/resnet10t", "a1_in1k", "has no weights 'a1_in1k' for timm/resnet10t, only c3_in1k"),
        ("timm/resnet10", "random", "unknown to timm .*did you mean timm/resnet1"),
        ("timm/gmixer_12_224", "random", "has maps at stride 16 only"),
    ],
    ids=["offline", "tag", "name", "one stride"],
)  # fmt: skip
def test_unknown_timm_names_and_missing_files_are_reported(
    timm: Any, backbone: str, weights: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FpnxError, match=message) as caught:
        fpnx.create_model(backbone, weights=weights, offline=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_failed_download_is_reported_in_one_line(
    timm: Any, fpnx: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    code, _, err = fpnx("extract", photos, "--backbone", "timm/resnet10t", "--weights", "imagenet")
    assert code == 2
    assert err.count("\n") == 1
    assert "timm/resnet10t.c3_in1k cannot be had" in err
    assert "--weights random or --weights FILE" in err


def test_timm_that_is_not_installed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FpnxError, match=r"pip install 'fpnx\[timm\]'"):
        fpnx.create_model("timm/resnet18", weights="random")


def test_a_timm_module_has_its_own_recipe(timm: Any) -> None:
    network = timm.create_model("mobilenetv3_small_050", pretrained_cfg_overlay={"input_size": (3, 160, 160)})
    model = fpnx.create_model(network, levels="C3")
    assert (model.recipe.height, model.recipe.resampling) == (160, "bicubic")
    assert model.channels["C3"] == 16
