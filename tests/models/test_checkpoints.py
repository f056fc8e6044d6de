"""Checkpoints of other frameworks: recognised, equal to independent reference networks, and no code in them runs."""

from __future__ import annotations

import argparse
import codecs
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fpnx
from fpnx.core.errors import FpnxError
from fpnx.models.weights.checkpoints import read_checkpoint
from fpnx.models.weights.framework_defaults import DETECTRON2_RECIPE, MMDETECTION_RECIPE
from fpnx.models.weights.mmdetection import read_config
from fpnx.models.weights.state_dicts import recognize_layout
from tests.helpers.reference_networks import D2FPN, D2Detector, D2ResNet, MMDetector, randomise

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (53, 76, 3), dtype=np.uint8))
SHORT, LONG = 64, 120
BGR_MEAN, RGB_MEAN, RGB_STD = (103.53, 116.28, 123.675), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def half_up(height: int, width: int) -> tuple[int, int]:
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def preprocess(picture: Image.Image, *, pillow: bool, order: str, mean: tuple, std: tuple) -> Tensor:
    """The test-time pipeline of detectron2 and mmdetection: resize, reorder, normalise on 0..255, pad to 32."""
    size = half_up(picture.height, picture.width)
    if pillow:
        pixels = (
            torch.from_numpy(np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR))).permute(2, 0, 1).float()
        )
    else:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        pixels = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
    if order == "BGR":
        pixels = pixels[[2, 1, 0]]
    image = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return F.pad(image, (0, -size[1] % 32, 0, -size[0] % 32))


def extract_levels(tmp_path: Path, weights: Path, **options: object) -> dict[str, np.ndarray]:
    """The levels of `PICTURE` in the file that `fpnx.extract` writes."""
    PICTURE.save(tmp_path / "picture.png")
    output = tmp_path / "out.h5"
    fpnx.extract(tmp_path / "picture.png", output, weights=str(weights), short_side=SHORT, long_side=LONG, **options)
    with fpnx.open(output) as store:
        return {level: store[0][level] for level in store.levels}


def assert_levels(levels: dict[str, np.ndarray], expected: dict[str, Tensor]) -> None:
    assert sorted(levels) == sorted(expected)
    for level, reference in expected.items():
        error = np.abs(levels[level] - reference[0].numpy()).max()
        assert error <= 1e-5 * reference.abs().max().item(), level


def as_pickle(state: dict[str, Tensor], protocol: int) -> bytes:
    content = {"model": {name: value.numpy() for name, value in state.items()}, "__author__": "fpnx tests"}
    return pickle.dumps(content, protocol)


# --- detectron2 ---


def shortest_edge(height: int, width: int) -> tuple[int, int]:
    """detectron2's ResizeShortestEdge.get_output_shape for 800 and 1333."""
    scale = 800.0 / min(height, width)
    new_h, new_w = (800.0, scale * width) if height < width else (scale * height, 800.0)
    if max(new_h, new_w) > 1333:
        scale = 1333.0 / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    return int(new_h + 0.5), int(new_w + 0.5)


def test_detectron2_sizes():
    # One factor for both sides would resize (33, 86) to (512, 1333); resizing in two steps gives 511.
    assert DETECTRON2_RECIPE.input_size((33, 86)) == (511, 1333) != MMDETECTION_RECIPE.input_size((33, 86))
    for height, width in [(480, 640), (1080, 1920), *RNG.integers(30, 3000, (3000, 2)).tolist()]:
        assert DETECTRON2_RECIPE.input_size((height, width)) == shortest_edge(height, width)


DETECTRON2 = {
    "R50 faster rcnn, pkl": ({"depth": 50}, {}, {"order": "BGR", "mean": BGR_MEAN, "std": (1, 1, 1)}),
    "R50 retinanet from res5, pth": (
        {"depth": 50, "first": 3, "top": "res5"},
        {},
        {"order": "BGR", "mean": BGR_MEAN, "std": (1, 1, 1)},
    ),
    "R50 stride in 3x3, RGB, norm in FPN, P6 from p5": (
        {"depth": 50, "first": 3, "top": "p5", "norm": True, "stride_in_1x1": False},
        {
            "stride_in_1x1": False,
            "pixel_order": "RGB",
            "mean": RGB_MEAN,
            "std": "58.395,57.12,57.375",
            "top_block": "p5",
        },
        {"order": "RGB", "mean": RGB_MEAN, "std": RGB_STD},
    ),
    "R18, pkl": ({"depth": 18}, {}, {"order": "BGR", "mean": BGR_MEAN, "std": (1, 1, 1)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DETECTRON2)
def test_detectron2_levels_equal_the_reference(case, tmp_path):
    arguments, options, preprocessing = DETECTRON2[case]
    network = randomise(D2Detector(**arguments))
    file = tmp_path / ("model.pkl" if "pkl" in case else "model.pth")
    if "pkl" in case:
        file.write_bytes(as_pickle(network.state_dict(), 2))
    else:
        torch.save({"model": network.state_dict(), "iteration": 7, "optimizer": {"lr": 0.1}}, file)
    with torch.no_grad():
        expected = network.backbone(preprocess(PICTURE, pillow=True, **preprocessing)[None])
    assert_levels(extract_levels(tmp_path, file, **options), expected)
    with fpnx.open(tmp_path / "out.h5") as store:
        weights = store.provenance.weights.to_json()
    assert (weights["layout"], weights["heads_ignored"]) == ("detectron2", 2)
    assert weights["settled"]["pixel_order"] == {
        "value": preprocessing["order"],
        "by": "option" if options else "default",
    }
    if arguments["depth"] == 50:
        assert weights["settled"]["stride_in_1x1"]["value"] is arguments.get("stride_in_1x1", True)


def test_detectron2_x101_defaults_differ(tmp_path):
    """X-101-32x8d, recognised by its grouped convolutions, strides in 3×3 and divides by ImageNet's deviations."""
    state = {f"backbone.bottom_up.{name}": value for name, value in D2ResNet("x50", False).state_dict().items()}
    torch.save({"model": state}, tmp_path / "x.pth")
    model = fpnx.create_model(weights=str(tmp_path / "x.pth"))
    assert model.backbone == "resnext50_32x4d"
    assert (model.recipe.order, model.recipe.std) == ("BGR", (57.375, 57.12, 58.395))
    assert model.weights.settings["stride_in_1x1"] == (False, "default")
    assert (model.weights.body.trained, model.weights.fpn.trained) == (None, False)


def test_self_supervised_detectors_in_detectron2_s_layout(tmp_path):
    """SoCo's converter writes the backbone and the FPN, with norms, without the module that holds them, for RGB."""
    network = randomise(D2FPN(18, norm=True, stride_in_1x1=False))
    state = {name.removeprefix("bottom_up."): value for name, value in network.state_dict().items()}
    state |= {"box_head.conv1.weight": torch.ones(3), "fpn_lateral2.norm.num_batches_tracked": torch.tensor(7)}
    (tmp_path / "current_detectron2_Head.pkl").write_bytes(as_pickle(state, 4))
    model = fpnx.create_model(weights=str(tmp_path / "current_detectron2_Head.pkl"))
    assert (model.backbone, model.weights.framework) == ("resnet18", "detectron2 backbone")
    assert (model.recipe.order, model.recipe.mean, model.recipe.std) == ("RGB", RGB_MEAN, RGB_STD)
    assert (model.recipe.short_side, model.recipe.long_side, model.recipe.pad_multiple) == (800, 1333, 32)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        levels, expected = model(images), network(images)
    assert sorted(levels) == sorted(expected)
    for name, level in levels.items():
        assert (level - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    (tmp_path / "odd.pkl").write_bytes(as_pickle({**state, "fpn_extra.weight": torch.ones(1)}, 4))
    with pytest.raises(FpnxError, match=r"names that fpnx does not know: fpn_extra.weight"):
        fpnx.create_model(weights=str(tmp_path / "odd.pkl"))


def test_mean_and_std_are_read_from_old_detectron2_files(tmp_path):
    state = {f"backbone.bottom_up.{name}": value for name, value in D2ResNet(18, False).state_dict().items()}
    state |= {"pixel_mean": torch.tensor([1.0, 2.0, 3.0])[:, None, None], "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": state}, tmp_path / "old.pth")
    model = fpnx.create_model(weights=str(tmp_path / "old.pth"))
    assert (model.recipe.mean, model.weights.settings["mean"]) == ((1.0, 2.0, 3.0), ((1.0, 2.0, 3.0), "file"))
    with pytest.raises(FpnxError, match=r"--mean .* contradicts it"):
        fpnx.create_model(weights=str(tmp_path / "old.pth"), mean="3,2,1")


@pytest.mark.parametrize("fused", [False, True], ids=["statistics", "fused"])
def test_caffe2_names_of_imagenet_r50(fused, tmp_path):
    """MSRA's R-50.pkl has Caffe2's names and no wrapper; Detectron's files have folded statistics, and momenta."""
    network = randomise(D2ResNet(50, True))
    roles = {"weight": "s", "bias": "b"} if fused else {"weight": "gamma", "bias": "beta"}
    blobs = {"pred_w": np.zeros((10, 2048), np.float32), "conv1_w_momentum": np.zeros(3, np.float32)}
    for name, value in network.state_dict().items():
        layer, _, role = name.rpartition(".")
        norm = layer.endswith(".norm")
        layer = layer.removesuffix(".norm")
        if norm and fused and role.startswith("running"):
            continue
        stem = layer == "stem.conv1"
        caffe = ("res_conv1" if norm else "conv1") if stem else layer.replace(".", "_")
        for conv, branch in (("_conv1", "2a"), ("_conv2", "2b"), ("_conv3", "2c"), ("_shortcut", "1")):
            caffe = caffe if stem else caffe.replace(conv, f"_branch{branch}")
        blobs[f"{caffe}_bn_{roles.get(role, role)}" if norm else f"{caffe}_w"] = value.numpy()
    content = {"blobs": blobs, "cfg": "text"} if fused else blobs
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, 2))
    if fused:
        for name, module in network.named_modules():
            if name.endswith("norm"):
                module.running_mean.zero_(), module.running_var.fill_(1.0)
                module.eps = 0.0
    model = fpnx.create_model(weights=str(tmp_path / "R-50.pkl"), levels="C2-C5")
    assert (model.backbone, model.weights.framework) == ("resnet50", "caffe2")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        taps, expected = model(image), network(image)
    for k, reference in expected.items():
        assert (taps[f"C{k}"] - reference).abs().max() <= 1e-5 * reference.abs().max()


# --- mmdetection ---

CONFIG = """
img_norm_cfg = dict(mean={mean}, std={std}, to_rgb={rgb})
model = dict(
    type='Detector',
    backbone=dict(type='ResNet', depth=50, norm_cfg=dict(type='BN', requires_grad=True), style='{style}'),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=32, {neck}))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1333, 800), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True),
        dict(type='Normalize', **img_norm_cfg),
        dict(type='Pad', size_divisor=32)])]
hooks = [__import__('os').system('touch {canary}')]
"""
RETINANET = {"start_level": 1, "num_outs": 5, "add_extra_convs": "on_input"}
FCOS = {"start_level": 1, "num_outs": 5, "add_extra_convs": "on_output", "relu_before_extra_convs": True}
LATERAL = {"start_level": 1, "num_outs": 5, "add_extra_convs": "on_lateral"}
RCNN = {"start_level": 0, "num_outs": 5}
MMDETECTION = {  # style, neck, whether the config is in the file, options
    "faster rcnn, config inside": ("pytorch", RCNN, True, {}),
    "faster rcnn, caffe, BGR, config inside": ("caffe", RCNN, True, {}),
    "retinanet without relu, no config": ("pytorch", RETINANET, False, {}),
    "retinanet with relu, no config": ("pytorch", {**RETINANET, "relu_before_extra_convs": True}, False,
                                       {"p7_relu": True}),
    "fcos, config inside": ("pytorch", FCOS, True, {}),
    "norm in neck, no config": ("pytorch", {**RCNN, "norm": True}, False, {}),
    "on_lateral, config inside": ("pytorch", LATERAL, True, {}),
    "on_lateral, caffe, BGR, by options": ("caffe", LATERAL, False, {
        "top_block": "m5", "stride_in_1x1": True, "pixel_order": "BGR", "mean": BGR_MEAN, "std": (1, 1, 1)}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", MMDETECTION)
def test_mmdetection_levels_equal_the_reference(case, tmp_path):
    style, neck, with_config, options = MMDETECTION[case]
    network = randomise(MMDetector(style, **neck))
    order, mean, std = ("BGR", BGR_MEAN, (1, 1, 1)) if "BGR" in case else ("RGB", RGB_MEAN, RGB_STD)
    text = CONFIG.format(
        mean=list(mean), std=list(std), rgb=order == "RGB", style=style, canary=tmp_path / "ran",
        neck=", ".join(f"{key}={value!r}" for key, value in neck.items()),
    )  # fmt: skip
    meta = {"epoch": 12, "config": text} if with_config else {"epoch": 12}
    # Published files are of the old format of torch.save.
    content = {"meta": meta, "state_dict": OrderedDict(network.state_dict())}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    with torch.no_grad():
        expected = network(preprocess(PICTURE, pillow=False, order=order, mean=mean, std=std)[None])
    assert_levels(extract_levels(tmp_path, tmp_path / "model.pth", **options), expected)
    assert not (tmp_path / "ran").exists()
    with fpnx.open(tmp_path / "out.h5") as store:
        weights = store.provenance.weights.to_json()
    assert (weights["layout"], weights["heads_ignored"]) == ("mmdetection", 2)
    assert "OpenCV" in weights["note"]
    assert weights["settled"]["mean"]["by"] == ("file" if with_config else "option" if "mean" in options else "default")


def test_config_is_read_without_running_it(tmp_path):
    neck = "start_level=1, num_outs=5, add_extra_convs='on_output', relu_before_extra_convs=True"
    text = CONFIG.format(
        mean=[1.5, 2, 3], std=[1, 1, 1], rgb=False, style="caffe", neck=neck, canary=tmp_path / "ran"
    )  # fmt: skip
    assert read_config(text) == {
        "stride_in_1x1": True, "norm_eps": 1e-5, "p7_relu": True, "top_block": "p5", "mean": (1.5, 2.0, 3.0),
        "std": (1.0, 1.0, 1.0), "pixel_order": "BGR", "short_side": 800, "long_side": 1333, "pad_multiple": 32,
    }  # fmt: skip
    assert not (tmp_path / "ran").exists()


def test_mmengine_config_is_read():
    text = """
model = dict(
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0],
                           bgr_to_rgb=False, pad_size_divisor=64),
    backbone=dict(type='ResNet', style='caffe'),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], num_outs=4))
test_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', scale=(640, 400), keep_ratio=True)]))
"""
    assert read_config(text) == {
        "stride_in_1x1": True, "norm_eps": 1e-5, "p7_relu": False, "top_block": "none", "mean": BGR_MEAN,
        "std": (1.0, 1.0, 1.0), "pixel_order": "BGR", "pad_multiple": 64, "short_side": 400, "long_side": 640,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "model = (", "model = 3", "{'json': true}", "model = " + "[" * 3000, "x = 1\0"])
def test_text_that_is_no_config_gives_no_facts(text):
    assert read_config(text) == {}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("neck=dict(type='BFP')", "neck.type = BFP"),
        ("neck=dict(type='PAFPN', act_cfg=dict(type='ReLU'))", "neck.act_cfg"),
        ("neck=dict(type='FPN', act_cfg=dict(type='ReLU'))", "neck.act_cfg"),
        ("backbone=dict(type='ResNet', dilations=(1, 1, 1, 2))", "backbone.dilations"),
        ("backbone=dict(type='ResNetV1d')", "backbone.type = ResNetV1d"),
    ],
)
def test_configs_of_other_networks_are_refused(model, message):
    with pytest.raises(FpnxError, match=message):
        read_config(f"model = dict({model})")


# --- files and options that do not fit ---


@pytest.fixture(scope="module")
def detectron2_state():
    return randomise(D2Detector(18)).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("backbone.bottom_up.res3.0.conv1.weight"), r"1 missing \(body\.layer2\.0\.conv1\.weight\)"),
        (lambda s: s.pop("backbone.fpn_output4.bias"), r"1 missing \(fpn\.layer_blocks\.2\.0\.bias\)"),
        (
            lambda s: s.update({"backbone.fpn_output3.weight": torch.zeros(32, 32, 1, 1)}),
            r"1 misshapen \(fpn\.layer_blocks\.1\.0\.weight \(32, 32, 1, 1\) for \(32, 32, 3, 3\)\)",
        ),
        (lambda s: s.update({"backbone.bottom_up.res2.0.conv2_offset.weight": torch.zeros(1)}), "conv2_offset.weight"),
        (lambda s: s.update({"backbone.fpn_lateral2.weight": torch.zeros(32, 99, 1, 1)}), "laterals for 99, 128, 256"),
    ],
    ids=["backbone", "pyramid", "shape", "unknown name", "lateral"],
)
def test_keys_that_are_missing_misshapen_or_unknown_are_named(change, message, detectron2_state, tmp_path):
    state = dict(detectron2_state)
    change(state)
    torch.save({"model": state}, tmp_path / "bad.pth")
    with pytest.raises(FpnxError, match=message):
        fpnx.create_model(weights=str(tmp_path / "bad.pth"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet50"}, "it is for resnet18, not for resnet50"),
        ({"channels": 64}, "channels 64 contradicts .* which has 32"),
        ({"levels": "P7"}, "has no level P7: it has C2, P2, C3, P3, C4, P4, C5, P5, P6|has no level P7"),
        ({"stride_in_1x1": True}, "--stride-in-1x1 does not matter"),
        ({"p7_relu": False}, "--p7-relu does not matter"),
        ({"top_block": "c5"}, "no top block c5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_contradict_a_file_are_refused(options, message, detectron2_state, tmp_path):
    torch.save({"model": detectron2_state}, tmp_path / "r18.pth")
    with pytest.raises(FpnxError, match=message):
        fpnx.create_model(weights=str(tmp_path / "r18.pth"), **options)


def test_unknown_networks_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(FpnxError, match=r"its names \(weight, bias\) are of no backbone that fpnx knows"):
        fpnx.create_model(weights=str(tmp_path / "linear.pth"))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_prefixes_of_wrappers_are_removed(prefix, detectron2_state):
    state = {f"{prefix}{name}": value for name, value in detectron2_state.items()} | {"loss.weight": torch.ones(1)}
    layout = recognize_layout(state)
    assert layout.framework == "detectron2"
    assert layout.ignored == 3
    assert layout.pyramid.first_level == 2
    assert len(layout.state) == len(detectron2_state) - 2


# --- files that are not a plain state dict ---


class Malicious:
    """Calls a function when it is unpickled without restrictions."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("kind", ["zip", "legacy", *range(6)])
@pytest.mark.parametrize("function", [os.system, eval, getattr], ids=lambda f: f.__name__)
def test_files_that_would_run_code_are_refused_and_nothing_runs(kind, function, tmp_path):
    canary = tmp_path / "ran"
    call = {
        os.system: (f"touch {canary}",),
        eval: (f"open({str(canary)!r}, 'w')",),
        getattr: (Malicious(eval, f"open({str(canary)!r}, 'w')"), "x"),
    }[function]
    content = {"model": {"a": Malicious(function, *call)}}
    file = tmp_path / "malicious.pth"
    if isinstance(kind, int):
        file.write_bytes(pickle.dumps(content, kind))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(FpnxError, match=r"it asks for \S*(posix\.system|eval|getattr)\S*, which could run code"):
        fpnx.create_model(weights=str(file))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Malicious(open, canary, "w"))).close()  # the plain unpickler does run it
    assert canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        np.array([None]),
        np.array(["text"]),
        np.zeros(2, [("x", "f4")]),
        np.ma.masked_array([1.0]),
        torch.ones(2),
        Malicious(codecs.encode, "a", "rot13"),
    ],
    ids=["object", "text", "structured", "masked", "tensor", "rot13"],
)
def test_pickles_with_values_other_than_numbers_are_refused(content, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"a": content}}, 2))
    with pytest.raises(FpnxError, match="cannot read weights"):
        read_checkpoint(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_pickles_keep_their_values(protocol, tmp_path):
    arrays = {
        "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">f8"),
        "integers": np.array([-1, 2], np.int64),
        "scalar": np.float32(4.5),
        "no dimension": np.array(7.0, np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": OrderedDict(arrays), "__author__": "x"}, protocol))
    read = read_checkpoint(tmp_path / "x.pkl")
    assert read.wrapper == "model"
    for name, array in arrays.items():
        assert read.state[name].numpy().tolist() == np.asarray(array).tolist()
        assert read.state[name].shape == np.shape(array)


def test_a_pickle_of_python_2_is_read(tmp_path):
    """Python 2 stored arrays as str, which Python 3 reads as text."""
    data = np.array([1.5, -2.0], "<f4").tobytes()
    content = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"U" + bytes([len(data)]) + data + b"tbs."
    )  # fmt: skip
    (tmp_path / "x.pkl").write_bytes(content)
    assert read_checkpoint(tmp_path / "x.pkl").state["a"].tolist() == [1.5, -2.0]


def test_training_checkpoints_are_read(tmp_path, detectron2_state):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    extras = {
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, output=Path("/runs")),
        "best": np.float64(0.4),
        "losses": np.arange(3.0),
        "message_hub": {
            "time": [np.float32(1.0)],
            "methods": {"mean": [].append},
        },  # a bound method is pickled as a call of getattr
    }
    torch.save({"model": detectron2_state, **extras}, tmp_path / "last.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.pth", weights_only=True)
    model = fpnx.create_model(weights=str(tmp_path / "last.pth"))
    assert (model.backbone, model.weights.framework, model.levels[-1]) == ("resnet18", "detectron2", "P6")
    assert torch.equal(
        model.body.state_dict()["conv1.weight"], detectron2_state["backbone.bottom_up.stem.conv1.weight"]
    )


@pytest.mark.parametrize("kind", ["pth", "pkl", "legacy", "safetensors", "empty", "text", "module"])
def test_damaged_and_other_files_are_refused_in_one_line(kind, tmp_path):
    file = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    state = {"a": torch.ones(100)}
    if kind == "pkl":
        file.write_bytes(pickle.dumps({"a": np.ones(100)}))
    elif kind == "safetensors":
        safetensors.torch.save_file(state, file)
    elif kind == "module":
        torch.save(nn.Linear(2, 2), file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind != "legacy")
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"hello", "module": whole}.get(kind, whole[: len(whole) // 2]))
    with pytest.raises(FpnxError, match="cannot read weights") as caught:
        fpnx.create_model(weights=str(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("backbone", [None, "resnet18", "timm/resnet10t"])
def test_damaged_safetensors_are_described_in_fpnxs_words(backbone, tmp_path):
    if backbone == "timm/resnet10t":
        pytest.importorskip("timm")
    safetensors.torch.save_file({"a": torch.ones(100)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    damaged = "it begins as safetensors, but is truncated or damaged: copy or download it again"
    other = "it is no safetensors file: copy or download it again"
    for content, reason in {
        b"": "it is empty: save it or download it again",
        b"garbage " * 30: other,
        whole[:-8]: damaged,
        whole[:20]: damaged,
        whole + b"more": damaged,
        b"\xff" * 8 + whole[8:]: damaged,
    }.items():
        file = tmp_path / "x.safetensors"
        file.write_bytes(content)
        with pytest.raises(FpnxError) as caught:
            fpnx.create_model(backbone, weights=str(file))
        assert str(caught.value) == f"cannot read weights from {file}: {reason}"


def test_the_first_bytes_decide_on_the_format_not_the_name(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "torch.safetensors")
    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / "safe.pth")
    for name in ("torch.safetensors", "safe.pth"):
        assert read_checkpoint(tmp_path / name).state["a"].tolist() == [1.0, 1.0, 1.0]


def test_files_that_hold_no_weights_are_refused_with_the_reason(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a.txt", "text")
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    contents = {
        "empty.pth": b"",
        "text.pth": b"hello",
        "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "page.pth": b"\n<!DOCTYPE html><html></html>",
        "cut.pth": whole[: len(whole) // 2],
        "garbage.safetensors": b"garbage" * 9,
        "cut.safetensors": safetensors.torch.save({"a": torch.zeros(100)})[:40],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    messages = {
        "empty.pth": "it is empty: save it or download it again",
        "text.pth": "it is neither a torch file nor safetensors nor a pickle: save model.state_dict() with torch.save",
        "lfs.safetensors": "it is a pointer of Git LFS to the weights: get the file itself with git lfs pull",
        "page.pth": "it is a web page: download the file itself",
        "cut.pth": "it is a torch file that is cut off: save it or download it again",
        "garbage.safetensors": "it is no safetensors file: copy or download it again",
        "cut.safetensors": "it begins as safetensors, but is truncated or damaged: copy or download it again",
        "pipe.pth": "it is not a regular file",
        "zip.pth": "it is a zip archive, but no whole torch file",
        "none.pth": "No such file or directory",
    }
    for name, message in messages.items():
        with pytest.raises(FpnxError) as caught:
            read_checkpoint(tmp_path / name)
        assert str(caught.value) == f"cannot read weights from {tmp_path / name}: {message}"


def test_integer_parameters_are_refused(tmp_path):
    model = fpnx.create_model("mobilenet_v2", weights="random", channels=8)
    fpnx.save_weights(model, tmp_path / "good.pth")
    content = torch.load(tmp_path / "good.pth", weights_only=True)
    content["state_dict"]["body.features.0.0.weight"] = content["state_dict"]["body.features.0.0.weight"].int()
    torch.save(content, tmp_path / "cut.pth")
    with pytest.raises(FpnxError, match=r"body\.features\.0\.0\.weight .*int32"):
        fpnx.create_model(weights=str(tmp_path / "cut.pth"))
