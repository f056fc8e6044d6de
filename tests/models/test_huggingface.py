"""Hugging Face backbones made from configs on the spot: maps equal to their own, weights, recipes, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fpnx
from fpnx import FpnxError

transformers: Any = pytest.importorskip("transformers")

Command = Callable[..., tuple[int, str, str]]
KINDS: dict[str, Any] = {
    "dinov2": lambda: transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, patch_size=14, image_size=56
    ),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, patch_size=14, image_size=56
    ),
    "swin": lambda: transformers.SwinConfig(
        embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=4, image_size=64
    ),
    "convnext": lambda: transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
}
PROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 80}, "do_center_crop": True, "crop_size": {"height": 56, "width": 56},
    "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], tuple[str, Any]]:
    """Saves a small model of a kind, with all its parameters drawn; gives the name of its backbone and the model."""

    def save(kind: str) -> tuple[str, Any]:
        config = KINDS[kind]()
        config.out_features = config.stage_names
        model = transformers.AutoBackbone.from_config(config).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        return f"hf/{tmp_path / kind}", model

    return save


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_stages_are_taps(saved: Any, kind: str) -> None:
    name, theirs = saved(kind)
    model = fpnx.create_model(name, levels="C2-C5,P3", channels=8, offline=True)
    images = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = theirs(images).feature_maps
        ours = model(images)
    for k, expected in zip(range(2, 6), maps[1:], strict=True):
        assert (ours[f"C{k}"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert {level: tuple(value.shape[1:]) for level, value in ours.items()} == model.shapes((96, 160))
    assert (model.weights.body.trained, model.weights.fpn.trained) == (True, False)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_blocks_of_vision_transformers(saved: Any, kind: str) -> None:
    name, theirs = saved(kind)
    images = torch.randn(1, 3, 70, 98, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = theirs(images).feature_maps
    for blocks, expected in ((None, maps[3]), ("-1,0", torch.cat([maps[1], maps[3]], 1))):
        model = fpnx.create_model(name, blocks=blocks, offline=True)
        assert (model.levels, model.stride("C4"), model.one_stride) == (("C4",), 14, 14)
        with torch.no_grad():
            found = model(images)["C4"]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(FpnxError, match="multiples of 14: the nearest size is 70×98"):
        model.shapes((72, 100))
    with pytest.raises(FpnxError, match=r"has no block 3: it has 3"):
        fpnx.create_model(name, blocks=3, offline=True)
    with pytest.raises(FpnxError, match="merges maps of several strides"):
        fpnx.create_model(name, pyramid="fpn", offline=True)


def test_the_recipe_is_that_of_the_image_processor(saved: Any, tmp_path: Path) -> None:
    name, _ = saved("dinov2")
    recipe = fpnx.create_model(name, offline=True).recipe
    assert (recipe.height, recipe.width, recipe.resampling) == (56, 56, "bicubic")
    assert (recipe.mean, recipe.std, recipe.value_range) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 1.0)


def test_random_weights_come_from_the_seed(saved: Any) -> None:
    name, theirs = saved("dinov2")
    models = [fpnx.create_model(name, weights="random", seed=seed, offline=True) for seed in (1, 1, 2)]
    key = "embeddings.patch_embeddings.projection.weight"
    one, two, three = (model.body.state_dict()[key] for model in models)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert not torch.equal(one, theirs.state_dict()[key])


def test_a_run_from_end_to_end(saved: Any, fpnx: Command, photos: Path) -> None:
    name, _ = saved("dinov2")
    options = ("extract", photos, "-o", "out.h5", "--backbone", name, "--offline", "--size", "56x84")
    code, _, err = fpnx(*options)
    assert code == 0, err
    assert fpnx("verify", "out.h5", "--against", photos)[0] == 0
    assert fpnx(*options, "--resume")[0] == 0
    code, _, err = fpnx(*options[:3], "simple.h5", *options[4:], "--pyramid", "simple", "--channels", "8")
    assert code == 0, err


def test_saved_weights_are_read_back(saved: Any, tmp_path: Path) -> None:
    for kind in ("dinov2", "convnext"):
        name, _ = saved(kind)
        model = fpnx.create_model(name, offline=True, levels="C4")
        fpnx.save_weights(model, tmp_path / "own.pt")
        again = fpnx.create_model(weights=str(tmp_path / "own.pt"), offline=True)
        images = torch.randn(1, 3, 56, 84)
        with torch.no_grad():
            assert torch.equal(again(images)["C4"], model(images)["C4"])


def test_what_is_not_there(saved: Any, tmp_path: Path) -> None:
    for name, message in (
        (f"hf/{tmp_path}/nothing", "the folder .*nothing does not exist"),
        ("hf/no-such-owner/no-such-model", "cannot be had .*forbidden, and it is not in the cache.*give a folder"),
        ("hf/a b", "there is no public model a b"),
        (f"hf/{tmp_path}", r"has no config\.json"),
    ):
        with pytest.raises(FpnxError, match=message):
            fpnx.create_model(name, offline=True)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FpnxError, match=r"is a Bert, of which transformers .* has no backbone"):
        fpnx.create_model(f"hf/{tmp_path / 'bert'}", offline=True)
    name, _ = saved("dinov2")
    file = Path(name[3:]) / "model.safetensors"
    file.unlink()
    with pytest.raises(FpnxError, match="transformers cannot load the weights of"):
        fpnx.create_model(name, offline=True)


def test_weights_that_lack_parameters(saved: Any) -> None:
    from safetensors.torch import load_file, save_file

    name, _ = saved("swin")
    file = Path(name[3:]) / "model.safetensors"
    state = {key: value.clone() for key, value in load_file(file).items()}  # the file is written over below
    plain = {key: value for key, value in state.items() if not key.startswith("hidden_states_norms")}
    save_file(plain, file, {"format": "pt"})
    model = fpnx.create_model(name, offline=True, levels="C5")
    assert "norms that transformers adds" in str(model.weights.note)
    lacking = next(key for key in plain if key.endswith("projection.weight"))
    save_file({key: value for key, value in plain.items() if key != lacking}, file, {"format": "pt"})
    with pytest.raises(FpnxError, match=r"lack 1 parameters of its backbone, such as .*projection.weight"):
        fpnx.create_model(name, offline=True)


def test_gated_and_unknown_models_are_named_as_such() -> None:
    from huggingface_hub import errors

    from fpnx.models.backbones.huggingface import _why_not

    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    assert _why_not("owner/model", errors.GatedRepoError("no", response=response), False).startswith(
        "hf/owner/model is gated: accept its terms at https://huggingface.co/owner/model and log in"
    )
    assert "no public model owner/model" in _why_not(
        "owner/model", errors.RepositoryNotFoundError("no", response=response), False
    )
