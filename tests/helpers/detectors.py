"""torchvision's detectors with parameters from a seed that give many boxes, and the comparison of what they find."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import MultiScaleRoIAlign

from fpnx.models.weights.torchvision import ZERO_EPS_FILES
from tests.helpers.reference_networks import randomise

# Last layers, in the order in which they are run → the spread of their outputs, and their mean.
LAST_LAYERS = {
    "rpn.head.cls_logits": (2.0, 0.0),
    "rpn.head.bbox_pred": (0.2, 0.0),
    "roi_heads.box_predictor.cls_score": (2.5, 0.0),
    "roi_heads.box_predictor.bbox_pred": (1.0, 0.0),
    "roi_heads.mask_predictor.mask_fcn_logits": (3.0, 0.0),
    "roi_heads.keypoint_predictor.kps_score_lowres": (3.0, 0.0),
    "head.classification_head.cls_logits": (1.0, -3.0),
    "head.regression_head.bbox_reg": (0.2, 0.0),
    "head.regression_head.bbox_ctrness": (1.0, 1.0),
}


def lively_detector(name: str, min_size: int = 96, max_size: int = 160) -> nn.Module:
    """torchvision's detector in eval mode, which finds many objects of different scores in noise."""
    entry = models.get_model_weights(name).DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision's own code
        network = models.get_model(
            name,
            weights=None,
            weights_backbone=None,
            num_classes=len(entry.meta["categories"]),
            min_size=min_size,
            max_size=max_size,
        )
    if Path(entry.url).name in ZERO_EPS_FILES:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    randomise(network, smallest_variance=0.1)
    network.eval()
    heads = getattr(network, "roi_heads", None)
    if heads is not None:
        most, heads.detections_per_img = heads.detections_per_img, 5  # masks and keypoints of more take long
    image = smooth_image((min_size, min_size * 4 // 3), seed=100)
    generator = torch.Generator().manual_seed(7)
    for layer, (spread, mean) in LAST_LAYERS.items():
        modules = dict(network.named_modules())
        if layer in modules:
            _rescale(network, modules[layer], as_tensor(image), spread, mean, generator)
    if heads is not None:
        heads.detections_per_img = most
    return network


def _rescale(
    network: nn.Module, layer: nn.Module, image: Tensor, spread: float, mean: float, generator: torch.Generator
) -> None:
    """Give the outputs of a layer this spread and mean; each output has a mean of its own around it."""
    seen: list[Tensor] = []
    with torch.no_grad():
        layer.bias.zero_()
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten()))
        network([image])
        handle.remove()
        values = torch.cat(seen)
        layer.weight.mul_(spread / max(float(values.std()), 1e-6))
        shift = float(values.mean()) * spread / max(float(values.std()), 1e-6)
        layer.bias.copy_(mean - shift + 0.3 * spread * torch.randn(layer.bias.shape, generator=generator))


def smooth_image(size: tuple[int, int], seed: int) -> Image.Image:
    """An image of colours that change over its whole range, from a seed."""
    height, width = size
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image) -> Tensor:
    """An image as torchvision's detectors take it."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def found_by(network: nn.Module, images: list[Image.Image]) -> list[dict[str, Tensor]]:
    """What torchvision's detector finds in a batch of images."""
    for module in network.modules():
        if isinstance(module, MultiScaleRoIAlign):
            module.scales = None  # which it would keep from the first batch
    with torch.no_grad():
        found: list[dict[str, Tensor]] = network([as_tensor(image) for image in images])
    return found


def matched(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, expected: dict[str, Tensor]
) -> list[tuple[int, int]]:
    """Pairs of positions, ours and the expected: equal labels, scores within 1e-4, boxes within 0.05 pixels."""
    their_boxes, their_scores, their_labels = (expected[key].numpy() for key in ("boxes", "scores", "labels"))
    free = set(range(len(scores)))
    pairs = []
    for theirs in range(len(their_scores)):
        for ours in sorted(free):
            if (
                labels[ours] == their_labels[theirs]
                and abs(scores[ours] - their_scores[theirs]) <= 1e-4
                and np.abs(boxes[ours] - their_boxes[theirs]).max() <= 0.05
            ):
                free.remove(ours)
                pairs.append((ours, theirs))
                break
    return pairs


def save_published(folder: Path, name: str, network: nn.Module) -> Path:
    """Save a detector in torch's hub cache below `folder`, under the name of its published file."""
    path = folder / "hub" / "checkpoints" / Path(models.get_model_weights(name).DEFAULT.url).name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path
