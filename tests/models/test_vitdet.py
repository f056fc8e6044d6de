"""detectron2's ViTDet checkpoints: names, position embeddings, and parity with the definition written out here."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fpnx
from fpnx import FpnxError
from fpnx.models.weights.vitdet import vitdet_backbone
from tests.models.test_simple import channel_norm

pytest.importorskip("timm")

WIDTH, DEPTH, HEADS, WINDOW, CHANNELS = 768, 12, 12, 14, 8
GLOBAL = (2, 5, 8, 11)
Parameters = dict[str, Tensor]


def checkpoint() -> Parameters:
    """ViTDet-B's parameters with detectron2's names and shapes, drawn; its pyramid has 8 channels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.02) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def layer(name: str, *shape: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(*shape), draw(shape[0])

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width), draw(width)

    state: Parameters = {"backbone.net.pos_embed": draw(1, 1 + 14 * 14, WIDTH, scale=0.5)}
    layer("backbone.net.patch_embed.proj", WIDTH, 3, 16, 16)
    for i in range(DEPTH):
        block, size = f"backbone.net.blocks.{i}", 64 if i in GLOBAL else WINDOW
        norm(f"{block}.norm1", WIDTH)
        norm(f"{block}.norm2", WIDTH)
        layer(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        layer(f"{block}.attn.proj", WIDTH, WIDTH)
        for side in "hw":
            state[f"{block}.attn.rel_pos_{side}"] = draw(2 * size - 1, WIDTH // HEADS, scale=0.2)
        layer(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        layer(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    half, quarter = WIDTH // 2, WIDTH // 4
    state |= {"backbone.simfp_2.0.weight": draw(WIDTH, half, 2, 2), "backbone.simfp_2.0.bias": draw(half)}
    norm("backbone.simfp_2.1", half)
    state |= {"backbone.simfp_2.3.weight": draw(half, quarter, 2, 2), "backbone.simfp_2.3.bias": draw(quarter)}
    state |= {"backbone.simfp_3.0.weight": draw(WIDTH, half, 2, 2), "backbone.simfp_3.0.bias": draw(half)}
    for level, (first, width) in {2: (4, quarter), 3: (1, half), 4: (0, WIDTH), 5: (1, WIDTH)}.items():
        state[f"backbone.simfp_{level}.{first}.weight"] = draw(CHANNELS, width, 1, 1)
        norm(f"backbone.simfp_{level}.{first}.norm", CHANNELS)
        state[f"backbone.simfp_{level}.{first + 1}.weight"] = draw(CHANNELS, CHANNELS, 3, 3, scale=0.2)
        norm(f"backbone.simfp_{level}.{first + 1}.norm", CHANNELS)
    state["roi_heads.box_predictor.0.cls_score.bias"] = draw(81)
    return state


def saved(folder: Path, state: Parameters) -> str:
    """A `.pkl` as detectron2 writes it: arrays under `model`."""
    with open(folder / "vitdet.pkl", "wb") as file:
        pickle.dump({"model": {name: value.numpy() for name, value in state.items()}, "__author__": "x"}, file)
    return str(folder / "vitdet.pkl")


def attention(p: Parameters, x: Tensor) -> Tensor:
    """Attention among all pixels of each (H, W, C) of x, with decomposed relative positions, head by head."""
    count, height, width, _ = x.shape
    q, k, v = F.linear(x, p["qkv.weight"], p["qkv.bias"]).reshape(count, height, width, 3, HEADS, -1).unbind(3)
    rows = torch.arange(height)[:, None] - torch.arange(height)[None] + height - 1
    columns = torch.arange(width)[:, None] - torch.arange(width)[None] + width - 1
    heads = []
    for head in range(HEADS):
        a, b, c = (each[:, :, :, head] for each in (q, k, v))
        scores = torch.einsum("nhwc,nijc->nhwij", a, b) * a.shape[-1] ** -0.5
        scores += torch.einsum("nhwc,hic->nhwi", a, p["rel_pos_h"][rows])[..., None]
        scores += torch.einsum("nhwc,wjc->nhwj", a, p["rel_pos_w"][columns])[:, :, :, None]
        shares = scores.flatten(3).softmax(-1).unflatten(3, (height, width))
        heads.append(torch.einsum("nhwij,nijc->nhwc", shares, c))
    return F.linear(torch.cat(heads, -1), p["proj.weight"], p["proj.bias"])


def windowed(p: Parameters, x: Tensor) -> Tensor:
    """Attention within windows of 14×14, after padding with zeros at the bottom and right."""
    side = x.shape[1]
    padded = F.pad(x, (0, 0, 0, -side % WINDOW, 0, -side % WINDOW))
    out = torch.zeros_like(padded)
    for top in range(0, padded.shape[1], WINDOW):
        for left in range(0, padded.shape[2], WINDOW):
            place = (slice(None), slice(top, top + WINDOW), slice(left, left + WINDOW))
            out[place] = attention(p, padded[place])
    return out[:, :side, :side]


def vit(state: Parameters, images: Tensor, blocks: int) -> Tensor:
    """The map after some blocks of ViTDet-B: (B, 3, 1024, 1024) → (B, C, 64, 64)."""
    p = {name.removeprefix("backbone.net."): value for name, value in state.items()}
    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=16)
    grid = p["pos_embed"][:, 1:].reshape(1, 14, 14, WIDTH).permute(0, 3, 1, 2)
    x = (x + F.interpolate(grid, size=(64, 64), mode="bicubic", align_corners=False)).permute(0, 2, 3, 1)
    for i in range(blocks):
        own = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")}
        inner = {name.removeprefix("attn."): value for name, value in own.items()}
        normed = F.layer_norm(x, (WIDTH,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        x = x + (attention if i in GLOBAL else windowed)(inner, normed)
        hidden = F.layer_norm(x, (WIDTH,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        hidden = F.gelu(F.linear(hidden, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        x = x + F.linear(hidden, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    return x.permute(0, 3, 1, 2)


def pyramid(state: Parameters, x: Tensor) -> dict[str, Tensor]:
    """detectron2's four levels, by its names, and P6 by subsampling."""
    p = {name.removeprefix("backbone.simfp_"): value for name, value in state.items()}
    up = F.conv_transpose2d(x, p["2.0.weight"], p["2.0.bias"], stride=2)
    up = F.gelu(channel_norm(up, p["2.1.weight"], p["2.1.bias"]))
    maps = {
        2: F.conv_transpose2d(up, p["2.3.weight"], p["2.3.bias"], stride=2),
        3: F.conv_transpose2d(x, p["3.0.weight"], p["3.0.bias"], stride=2),
        4: x,
        5: F.max_pool2d(x, 2),
    }
    levels = {}
    for level, first in {2: 4, 3: 1, 4: 0, 5: 1}.items():
        y = maps[level]
        for i, padding in ((first, 0), (first + 1, 1)):
            name = f"{level}.{i}"
            y = F.conv2d(y, p[f"{name}.weight"], padding=padding)
            y = channel_norm(y, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"])
        levels[f"P{level}"] = y
    return levels | {"P6": levels["P5"][:, :, ::2, ::2]}


@pytest.mark.slow
def test_levels_equal_the_definition(tmp_path: Path) -> None:
    """Up to the first block of global attention; the blocks behind it are of the same two kinds."""
    state = checkpoint()
    model = fpnx.create_model(weights=saved(tmp_path, state), blocks=2)
    assert (model.backbone, model.fpn.kind) == ("timm/samvit_base_patch16", "simple")
    assert model.levels == ("P2", "P3", "P4", "P5", "P6")
    assert model.weights.framework == "detectron2 ViTDet"
    assert model.weights.fpn.trained is None
    images = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tap = vit(state, images, 3)
        assert (model.taps(images)["C4"] - tap).abs().max() <= 1e-5 * tap.abs().max()
        expected = pyramid(state, tap)
        found = model.fpn({"C4": tap}, model.levels)
    for name, level in found.items():
        assert (level - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    with pytest.raises(FpnxError, match="is for inputs of 1024×1024, padding included, and not of 512×512"):
        model.shapes((512, 512))
    assert model.shapes((1024, 1024))["P2"] == (CHANNELS, 256, 256)
    # detectron2: shorter side to 1024, longer side at most 1024, RGB, padded to 1024×1024.
    assert model.recipe.input_size((480, 640)) == (768, 1024)
    assert model.recipe.padded((768, 1024)) == (1024, 1024)
    assert (model.recipe.order, model.recipe.value_range, model.recipe.mean[0]) == ("RGB", 255.0, 123.675)
    fpnx.save_weights(model, tmp_path / "own.safetensors")
    again = fpnx.create_model(weights=str(tmp_path / "own.safetensors"))
    assert (again.size, again.blocks, again.levels) == ((1024, 1024), (2,), model.levels)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_pyramid_alone_of_a_file_is_not_enough(tmp_path: Path) -> None:
    state = {name: value for name, value in checkpoint().items() if "net" not in name}
    with pytest.raises(FpnxError, match="its ViT has 0 blocks of 0 channels: ViTDet's B, L and H are read"):
        fpnx.create_model(weights=saved(tmp_path, state))


@pytest.mark.parametrize(
    ("width", "depth", "name"), [(768, 12, "base"), (1024, 24, "large"), (1280, 32, "huge"), (384, 12, None)]
)
def test_the_network_follows_from_width_and_depth(width: int, depth: int, name: str | None) -> None:
    state: dict[str, Any] = {"body.patch_embed.proj.weight": torch.zeros(width, 3, 16, 16)}
    state |= {f"body.blocks.{i}.norm1.weight": torch.zeros(width) for i in range(depth)}
    if name is not None:
        assert vitdet_backbone(state) == f"timm/samvit_{name}_patch16"
    else:
        with pytest.raises(FpnxError, match="12 blocks of 384 channels"):
            vitdet_backbone(state)


def test_unknown_names_and_other_backbones(tmp_path: Path) -> None:
    state = checkpoint()
    name = "backbone.net.blocks.2.residual.conv1.weight"
    with pytest.raises(FpnxError, match=f"names that fpnx does not know: {name}"):
        fpnx.create_model(weights=saved(tmp_path, {**state, name: torch.zeros(1)}))
    with pytest.raises(FpnxError, match="it is for timm/samvit_base_patch16, not for resnet50"):
        fpnx.create_model("resnet50", weights=saved(tmp_path, state))
    larger = {name: F.pad(value, (0, 0, 1, 1)) if "11.attn.rel_pos" in name else value for name, value in state.items()}
    with pytest.raises(FpnxError, match=r"misshapen \(body\.blocks\.11\.attn\.rel_pos_h"):
        fpnx.create_model(weights=saved(tmp_path, larger))
    assert np.prod(state["backbone.net.pos_embed"].shape) == 197 * WIDTH
