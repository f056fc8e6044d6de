"""The executable form gives the numbers of the plain model, whatever it folds, fuses, packs or reorders."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

from fpnx.inference.devices import slow_precision
from fpnx.inference.fpn_fusion import FusedFpn, _Recombined, _UpsampledConvolution
from fpnx.inference.graph_fusion import fuse_model
from fpnx.inference.packed_conv import PackedConv2d, can_pack, native_on_cpu
from fpnx.models.backbones.factory import Backbone, tap_shapes
from fpnx.models.backbones.feature_extractor import create_feature_extractor
from fpnx.models.backbones.stage_search import Stages, TapPoint
from fpnx.models.factory import create_model
from fpnx.models.necks.fpn import FPN
from fpnx.models.pyramid_model import PyramidModel
from tests.helpers.files import ROOT
from tests.helpers.process import Forked
from tests.models.test_backbones import FAMILIES

EQUAL = 1e-5  # of each level's greatest magnitude
SIZES = [(64, 64), (96, 160), (75, 101), (33, 64)]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(batch: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
    return drawn.contiguous(memory_format=torch.channels_last)


def unsettled(model: PyramidModel) -> PyramidModel:
    """The model with norms and biases that are not those of a fresh one, so that losing them would show."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:  # a norm, or what a graph holds of one
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model


def assert_equal_levels(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float = EQUAL) -> None:
    assert list(made) == list(wanted)
    for name, level in wanted.items():
        assert made[name].shape == level.shape
        assert (made[name].float() - level).abs().max() <= bound * level.abs().max(), name


def model_of(network: nn.Module, nodes: dict[int, str], levels: tuple[str, ...]) -> PyramidModel:
    stages = Stages(taps={k: TapPoint(node=node) for k, node in nodes.items()}, traced=True)
    body = create_feature_extractor(network.eval(), stages)
    channels = {int(tap[1:]): shape[0] for tap, shape in tap_shapes(body, (128, 128)).items()}
    fpn = FPN(channels, 64, "pool")
    fpn.initialize(0)
    weights = create_model("mobilenet_v2", weights="random").weights
    return PyramidModel(Backbone("own", body, nodes, channels), fpn, levels, weights).eval()


@pytest.mark.parametrize(
    "packs", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="packed")]
)
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "vgg16"])
def test_equals_the_model(name, packs):
    model = unsettled(
        create_model(name, weights="random", levels="C2,C4,P2-P7", channels=200 if name[0] == "m" else 48)
    )
    made = fuse_model(model)
    for size in SIZES:
        with torch.inference_mode():
            if packs:  # and computes on the way
                assert_equal_levels(made.pack(images(2, size)), model(images(2, size)))
                assert (size in made.packed) is can_pack(torch.float32)
            assert_equal_levels(made(images(2, size)), model(images(2, size)))
            assert_equal_levels(made(images(1, size)), model(images(1, size)))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_model_of_any_family(name):
    side = FAMILIES[name]
    model = unsettled(create_model(name, weights="random", levels="C2,P2-P4", channels=64))
    made = fuse_model(model)
    for size in [side] if name == "maxvit_t" else [side, (96, 160)]:
        with torch.inference_mode():
            wanted = model(images(2, size))
            assert_equal_levels(made(images(2, size)), wanted)
            made.pack(images(1, size))
            assert_equal_levels(made(images(2, size)), wanted)


@pytest.mark.parametrize("levels", ["C2", "C4", "P4", "P5", "C3,P4-P6", "P7", "P2", "P6"])
def test_computes_only_what_levels_need(levels):
    model = unsettled(create_model("resnet50", weights="random", levels=levels, channels=16))
    made = fuse_model(model)
    with torch.inference_mode():
        assert_equal_levels(made(images(1, (64, 96))), model(images(1, (64, 96))))
    held = sum(isinstance(module, PackedConv2d) for module in made.body.modules())
    assert held == {"C2": 11, "C4": 43}.get(levels, 53)


def test_folds_and_fuses_everything_in_a_resnet():
    made = fuse_model(create_model("resnet50", weights="random", levels="P2-P5", channels=16))
    assert {node.op for node in made.body.graph.nodes} == {"placeholder", "call_module", "output"}
    called = [made.body.get_submodule(node.target) for node in made.body.graph.nodes if node.op == "call_module"]
    assert [type(module) for module in called if not isinstance(module, PackedConv2d)] == [nn.MaxPool2d]
    assert sum(module.accumulates for module in called if isinstance(module, PackedConv2d)) == 16


@pytest.mark.parametrize("name", ["timm/tf_efficientnet_lite0", "timm/efficientnet_b0"])
def test_folds_norms_that_are_functions_and_padding_that_depends_on_the_size(name):
    """timm's norms with an activation call F.batch_norm; its convolutions from TensorFlow pad by the image's size."""
    pytest.importorskip("timm")
    model = unsettled(create_model(name, weights="random", levels="P2-P5", channels=16))
    made = fuse_model(model)
    assert not any(node.target is F.batch_norm or node.op == "get_attr" for node in made.body.graph.nodes)
    assert not [*made.body.parameters(), *made.body.buffers()], "what is not read is not held"
    called = [made.body.get_submodule(node.target) for node in made.body.graph.nodes if node.op == "call_module"]
    assert all(isinstance(module, PackedConv2d) for module in called)
    exact = copy.deepcopy(model).double()
    for size in SIZES:
        with torch.inference_mode():
            wanted = exact(images(2, size).double())
            assert_equal_levels(made(images(2, size)), wanted)
            assert_equal_levels(made.pack(images(2, size)), wanted)
            assert_equal_levels(made(images(2, size)), wanted)


class NormsAsFunctions(nn.Module):
    """Norms that are called as functions: with parameters that are buffers, with statistics that a module uses, too,
    without weight and bias, and with the statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (
            nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 8), (8, 8), (8, 16), (16, 24))
        )
        for name in ("mean", "var", "weight", "bias"):
            self.register_buffer(name, torch.linspace(0.5, 1.5, 8))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(self.first(x), self.mean, self.var, self.weight, self.bias, training=False, eps=0.1)
        x = self.bn(x * 2)
        c2 = F.batch_norm(self.second(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        c3 = self.third(F.batch_norm(c2, self.mean, self.var))
        return self.fourth(F.batch_norm(c3, None, None, training=True))


def test_folds_norms_whatever_their_parameters_are():
    model = unsettled(model_of(NormsAsFunctions(), {3: "third", 4: "fourth"}, ("C3", "C4")))
    made = fuse_model(model)
    assert sum(node.target is F.batch_norm for node in made.body.graph.nodes) == 2, (
        "after no convolution, and of the batch"
    )
    with torch.inference_mode():
        assert_equal_levels(made(images(2, (64, 96))), model(images(2, (64, 96))))


def test_does_not_depend_on_the_default_device():
    model = create_model("mobilenet_v2", weights="random", levels="P2-P5")
    with torch.device("meta"):
        made = fuse_model(model)
    with torch.inference_mode():
        assert_equal_levels(made(images(1, (64, 64))), model(images(1, (64, 64))))


def test_leaves_the_model_as_it_was():
    model = unsettled(create_model("mobilenet_v2", weights="random", levels="P2-P5", channels=32))
    before, code = copy.deepcopy(model.state_dict()), model.body.code
    made = fuse_model(model, dtype=torch.bfloat16)
    made.pack(images(1, (64, 64)).bfloat16())
    assert model.body.code == code
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        reference = fuse_model(model)
        wanted = reference(images(1, (64, 64)))
        for parameter in model.parameters():
            parameter.zero_()
        assert_equal_levels(reference(images(1, (64, 64))), wanted, 0)


@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
def test_frozen_norms_any_eps_and_norms_in_the_pyramid(packs):
    def frozen(width: int) -> nn.Module:
        return FrozenBatchNorm2d(width, eps=0.0)

    network = models.resnet18(weights=None, norm_layer=frozen)
    model = model_of(network, {2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"}, ("P2", "P3", "P6"))
    for block, eps in [(model.fpn.inner_blocks[0], 1e-3), (model.fpn.layer_blocks[1], 0.1)]:
        block.append(nn.BatchNorm2d(64, eps=eps))
        block.append(nn.ReLU())
    model.fpn.layer_blocks[0].append(nn.GroupNorm(4, 64))
    model = unsettled(model.eval())
    made = fuse_model(model)
    assert not any(isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)) for module in made.modules())
    if packs:
        made.pack(images(1, (64, 96)))
    with torch.inference_mode():
        assert_equal_levels(made(images(2, (64, 96))), model(images(2, (64, 96))))


class Awkward(nn.Module):
    """What must not be fused: a convolution used twice, one read by others, sums that broadcast or come too early."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.shared, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.gate, self.own = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.pooled, self.one, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 8, 1)
        self.same = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect")
        self.relu = nn.ReLU()
        self.out = nn.Conv2d(8, 8, 3, 2, 1)
        self.beside = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.norm(self.shared(x)) + self.shared(self.relu(x))
        y = self.gate(x)
        x = y * self.relu(y) + x
        x = self.own(x) + x
        x = x + self.pooled(F.adaptive_avg_pool2d(x, 1))
        z = self.last(self.one(x) + x)
        z += x
        w = self.same(z) + z
        return self.relu(self.out(w) + self.beside(z))


@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
def test_leaves_alone_what_cannot_be_fused(packs):
    torch.manual_seed(3)
    model = unsettled(model_of(Awkward(), {2: "relu_2"}, ("C2", "P2")))
    made = fuse_model(model)
    if packs:
        made.pack(images(1, (32, 48)))
    with torch.inference_mode():
        assert_equal_levels(made(images(2, (32, 48))), model(images(2, (32, 48))))


def test_weights_are_held_once_while_images_are_of_one_size():
    made = fuse_model(unsettled(create_model("resnet18", weights="random", levels="C3,P2-P5", channels=64)))
    plain = [weakref.ref(module.weight) for module in made.modules() if isinstance(module, PackedConv2d)]
    with torch.inference_mode():
        before = made(images(2, (64, 96)))
        made.pack(images(2, (96, 64)))
        assert len(plain) > 20
        assert all((weight() is None) is can_pack(torch.float32) for weight in plain)
        after = made(images(2, (64, 96)))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_reorders_by_counting():
    def ways(name: str, channels: int = 256) -> dict[str, int]:
        model = create_model(name, weights="random", levels="P2-P5", channels=channels)
        made = FusedFpn(model.fpn, model.levels, model.channels)
        return {k: way.steps for k, way in made.recombined.items() if isinstance(way, _Recombined)}

    assert ways("resnet50") == {}
    assert ways("vgg16") == {}
    # P2: 9·24 + 4·32 + 25/16·96 + 25/64·256 = 594 of 2304 for each cell and channel; P3: 9·32 + 4·96 + 25/16·256 = 1072
    assert ways("mobilenet_v2") == {"2": 3, "3": 2}
    assert ways("mobilenet_v2", 16) == {}


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (4, 3)], ids=str)
def test_a_convolution_of_an_upsampled_map(scale, size):
    generator = torch.Generator().manual_seed(scale)
    kernel = torch.randn(5, 3, 3, 3, generator=generator).double()
    x = torch.randn(2, 3, *size, generator=generator)
    wanted = F.conv2d(F.interpolate(x, scale_factor=scale, mode="nearest").double(), kernel, padding=1) + 1
    level = torch.ones_like(wanted, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    _UpsampledConvolution(kernel, scale)(x, level)
    torch.testing.assert_close(level, wanted.float(), rtol=1e-5, atol=1e-5)


def test_biases_reach_the_border_of_a_reordered_level():
    """With all weights zero, the lateral biases alone: 9 cells inside, 6 at an edge, 4 in a corner."""
    fpn = FPN({2: 1, 3: 1, 4: 1}, 32)
    for parameter in fpn.parameters():
        parameter.data.zero_()
    for block, bias in zip(fpn.inner_blocks, (1.0, 10.0, 100.0), strict=True):
        block[0].bias.data.fill_(bias)
    fpn.layer_blocks[0][0].weight.data.fill_(1 / 32)
    fpn.layer_blocks[0][0].bias.data.fill_(0.5)
    made = FusedFpn(fpn, ["P2"], {"C2": 1, "C3": 1, "C4": 1})
    assert made.recombined["2"].steps == 2
    taps = {"C2": torch.zeros(1, 1, 8, 12), "C3": torch.zeros(1, 1, 4, 6), "C4": torch.zeros(1, 1, 2, 3)}
    with torch.no_grad():
        level = made.eval()(taps)["P2"][0, 0]
    assert level[0, 0].item() == pytest.approx(4 * 111 + 0.5)
    assert level[0, 5].item() == pytest.approx(6 * 111 + 0.5)
    assert level[7, 11].item() == pytest.approx(4 * 111 + 0.5)
    assert level[3, 0].item() == pytest.approx(6 * 111 + 0.5)
    assert level[4, 5].item() == pytest.approx(9 * 111 + 0.5)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "vgg16"])
def test_bfloat16_is_near(name):
    model = create_model(name, weights="random", levels="P2-P5", channels=64)
    made = fuse_model(model, dtype=torch.bfloat16)
    made.pack(images(1, (64, 96)).bfloat16())
    with torch.inference_mode():
        levels = made(images(2, (64, 96)).bfloat16())
        wanted = model(images(2, (64, 96)))
    assert {level.dtype for level in levels.values()} == {torch.bfloat16}
    for level, reference in zip(levels.values(), wanted.values(), strict=True):
        error = (level.float() - reference).norm() / reference.norm()
        assert error < {"vgg16": 0.02, "resnet50": 0.1, "mobilenet_v2": 0.2}[name]


def test_types_that_onednn_does_not_pack_are_computed_plainly():
    model = unsettled(create_model("mobilenet_v2", weights="random", levels="P2-P5", channels=256))
    made = fuse_model(model, dtype=torch.float64)
    with torch.inference_mode():
        assert_equal_levels(made.pack(images(1, (64, 64)).double()), model(images(1, (64, 64))))
        assert not made.packed
        assert_equal_levels(made(images(1, (64, 64)).double()), model(images(1, (64, 64))))


def test_a_precision_that_the_processor_lacks_is_called_slow():
    cpu = torch.device("cpu")
    assert slow_precision(cpu, "float32") is None
    assert slow_precision(torch.device("cuda"), "float16") is None
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        told = slow_precision(cpu, name)
        assert (told is None) == native_on_cpu(dtype)
        assert told is None or f"no {name} arithmetic" in told
    assert not native_on_cpu(torch.float64)


class Untraceable(torch.nn.Module):
    """Four stages of stride 2 and a branch on values, which no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList(
            torch.nn.Conv2d(i, o, 3, stride=s, padding=1)
            for i, o, s in [(3, 8, 4), (8, 12, 2), (12, 16, 2), (16, 20, 2)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
            if bool((x.mean() > 1e9).item()) if x.device.type != "meta" else False:
                x = x * 2
        return x.mean((2, 3))


def test_a_body_that_cannot_be_traced_is_shared_by_threads_one_at_a_time():
    from concurrent.futures import ThreadPoolExecutor

    model = create_model(Untraceable().eval(), channels=8, levels="C2,C5,P2-P5")
    assert not isinstance(model.body, torch.fx.GraphModule)
    executable = fuse_model(model)
    images = [torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    with torch.no_grad():
        expected = [model(image) for image in images]

    def run(image: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return executable(image)

    with ThreadPoolExecutor(4) as pool:
        for levels, wanted in zip(pool.map(run, images), expected, strict=True):
            for name, level in wanted.items():
                assert (levels[name] - level).abs().max() <= 1e-5 * level.abs().max(), name


@pytest.mark.parametrize("top_block", ["pool", "c5", "p5", "m5"])
@pytest.mark.parametrize("levels", ["all", "above", "finest"])
def test_every_kind_of_pyramid(top_block, levels):
    """Norms after the convolutions, every top block with and without its ReLU, and levels with names of their own."""
    channels = {3: 8, 4: 12, 5: 16}
    taps = {
        f"C{k}": images(2, (48 >> (k - 3), 32 >> (k - 3)), k)[:, :1].expand(-1, n, -1, -1) for k, n in channels.items()
    }
    taps = {name: (tap + torch.arange(tap.shape[1]).view(1, -1, 1, 1)).contiguous() for name, tap in taps.items()}
    for norm, relu, names in [(None, True, ()), ("batch", False, ()), (None, False, "abcde")]:
        count = 4 if top_block == "pool" else 5
        fpn = FPN(channels, 32, top_block, norm=norm, p7_relu=relu, names=tuple(names)[:count])
        fpn.initialize(1)
        wanted = {"all": fpn.levels, "above": fpn.levels[3:], "finest": fpn.levels[:1]}[levels]
        fpn.eval()
        made = FusedFpn(fpn, wanted, {f"C{k}": n for k, n in channels.items()}).eval()
        for part in made.modules():
            if isinstance(part, PackedConv2d):
                part.prepare(torch.device("cpu"), torch.float32)
        with torch.no_grad():
            assert_equal_levels(made(taps), fpn(taps, wanted))


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("words", ["none", "old", "new"])
def test_tf32_is_as_asked_within_and_as_before_after(words, precision):
    """In a process of its own: torch remembers in which words it was told."""
    script = f"""
import torch
from fpnx.inference.devices import arithmetic
cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
words = {words!r} if hasattr(products, "fp32_precision") else "old"
conv = getattr(cudnn, "conv", None)
asked = {precision!r} == "tf32"
other = "ieee" if asked else "tf32"
settings = {{"none": [], "old": [(products, "allow_tf32", not asked), (cudnn, "allow_tf32", not asked)],
            "new": [(products, "fp32_precision", other), (conv, "fp32_precision", other)]}}[words]
for owner, name, value in settings:
    setattr(owner, name, value)
with arithmetic(torch.device("cuda"), {precision!r}):
    if conv is None:
        assert (products.allow_tf32, cudnn.allow_tf32) == (asked, asked)
    else:
        kind = "tf32" if asked else "ieee"
        assert (products.fp32_precision, conv.fp32_precision) == (kind, kind)
    assert cudnn.benchmark
assert [getattr(owner, name) for owner, name, _ in settings] == [value for _, _, value in settings]
assert not cudnn.benchmark
with arithmetic(torch.device("cuda"), {precision!r}, steady=False):
    assert not cudnn.benchmark
"""
    running = Forked("import warnings\nwarnings.simplefilter('error')\n" + script, cwd=ROOT)
    _, err = running.communicate()
    assert running.returncode == 0, err
