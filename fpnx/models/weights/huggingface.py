"""The recipe of a Hugging Face backbone, from the config of its image processor, and where its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpnx.models.backbones.huggingface import HF, hf_folder, hf_preprocessor, load_hf_config
from fpnx.models.preprocessing import Recipe

__all__ = ["hf_recipe", "hf_weights"]

RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
DEFAULT_SIDE = 224


def hf_recipe(name: str) -> Recipe:
    """The recipe of `hf/NAME`, with the whole image stretched to the input size instead of cropped.

    Without an image processor it is ImageNet's, at the size that the backbone is built for.
    """
    found = hf_preprocessor(name)
    native = getattr(load_hf_config(name), "image_size", None)
    sides = (found.get("crop_size") if found.get("do_center_crop") else None) or found.get("size") or native
    height, width = _sides(sides)
    recipe = Recipe(height=height, width=width)
    if not found:
        return recipe
    mean, std = found.get("image_mean"), found.get("image_std")
    if not (found.get("do_normalize", True) and mean and std):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    scale = float(found.get("rescale_factor", 1 / 255)) * 255 if found.get("do_rescale", True) else 255.0
    return Recipe(
        height=height,
        width=width,
        resampling=RESAMPLINGS.get(found.get("resample", 2), "bicubic"),
        value_range=round(scale, 6),
        mean=tuple(mean),
        std=tuple(std),
    )


def hf_weights(name: str) -> dict[str, Any]:
    """What `fpnx models` says of the weights that belong to `hf/NAME`, as a JSON object."""
    folder, asked = hf_folder(name), name[len(HF) :]
    files = sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")])
    return {
        "name": "default",
        "also": [],
        "trains": ["backbone"],
        "recipe": str(hf_recipe(name)),
        "url": asked if Path(asked).expanduser().is_dir() else f"https://huggingface.co/{asked}",
        "file_name": files[0].name if files else "model.safetensors",
        "file": str(files[0] if files else folder / "model.safetensors"),
        "there": bool(files),
    }


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of the forms that processors and configs have: a number, a pair, or a dict."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    pair = size if isinstance(size, (list, tuple)) else (size, size)
    height, width = (int(side) if side else DEFAULT_SIDE for side in pair)
    return height, width
