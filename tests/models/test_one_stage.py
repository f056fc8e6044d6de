"""The levels of what torchvision's one-stage detectors find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fpnx.models.heads.base import Detections, Geometry, Pyramid
from fpnx.models.heads.detector import DetectorHead, detector_head

LEVELS = {f"P{k}": 2**k for k in range(3, 8)}
PYRAMID = Pyramid(channels=dict.fromkeys(LEVELS, 64), strides=LEVELS)
SIZE = (96, 128)


def head_of(kind: type[nn.Module]) -> tuple[DetectorHead, nn.Module]:
    """A head with parameters from a seed, and torchvision's detector with the same ones."""
    backbone = nn.Identity()
    backbone.out_channels = 64
    options = {}
    if kind is FCOS:
        options["anchor_generator"] = AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), ((1.0,),) * 5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = kind(backbone, 4, **options).eval()
        network.head.classification_head.cls_logits.weight.data.normal_(std=0.3)
        network.head.classification_head.cls_logits.bias.data.fill_(-1.0)
    return detector_head(network.state_dict(), PYRAMID), network


def torchvisions(network: nn.Module, levels: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torchvision's detector finds in these levels."""
    network.backbone.forward = lambda images: levels
    network.transform.min_size, network.transform.max_size = (SIZE[0],), SIZE[1]
    with torch.no_grad():
        (found,) = network([torch.zeros(3, *SIZE)])
    return found


@pytest.mark.parametrize("kind", [RetinaNet, FCOS])
def test_each_box_has_the_level_of_its_anchor(kind: type[nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = {
        name: torch.randn(1, 64, -(-SIZE[0] // stride), -(-SIZE[1] // stride), generator=generator)
        for name, stride in LEVELS.items()
    }
    head, network = head_of(kind)
    geometry = Geometry(padded=SIZE, sizes=(SIZE,))
    with torch.no_grad():
        (found,) = head.predict(levels, geometry)
    assert isinstance(found, Detections)
    expected = torchvisions(network, levels)
    assert len(found.scores) == len(expected["scores"]) > 20
    for name in ("scores", "labels", "boxes"):
        torch.testing.assert_close(getattr(found, name), expected[name], atol=1e-4, rtol=1e-5)
    assert len(found.levels) == len(found.scores)
    assert len(set(found.levels)) > 2
    for level in set(found.levels):  # a candidate of that level alone
        of_level = candidates(network, levels, level)
        for i in [i for i, name in enumerate(found.levels) if name == level]:
            assert (of_level - found.boxes[i]).abs().amax(dim=1).min() < 1e-3


def candidates(network: nn.Module, levels: dict[str, Tensor], level: str) -> Tensor:
    """The boxes of all anchors of one level, (n, 4), decoded and clipped."""
    stride, x = LEVELS[level], levels[level]
    with torch.no_grad():
        deltas = network.head.regression_head([x])
    deltas = deltas[0] if isinstance(deltas, tuple) else deltas
    sides = network.anchor_generator.sizes[list(LEVELS).index(level)]
    own = AnchorGenerator((sides,), (network.anchor_generator.aspect_ratios[0],))
    (anchors,) = own(
        type("Images", (), {"tensors": torch.zeros(1, 3, x.shape[2] * stride, x.shape[3] * stride),
                            "image_sizes": [SIZE]})(), [x]
    )  # fmt: skip
    decode = getattr(network.box_coder, "decode_single", network.box_coder.decode)
    return decode(deltas[0], anchors).clamp(min=0).minimum(torch.tensor([SIZE[1], SIZE[0]] * 2))


def test_limits_are_kept() -> None:
    levels = {name: torch.ones(1, 64, -(-SIZE[0] // s), -(-SIZE[1] // s)) for name, s in LEVELS.items()}
    head, _ = head_of(RetinaNet)
    assert (head.score_threshold, head.max_detections) == (0.05, 300)
    head.max_detections, head.score_threshold = 3, 0.1
    with torch.no_grad():
        (found,) = head.predict(levels, Geometry(padded=SIZE, sizes=(SIZE,)))
    assert isinstance(found, Detections)
    assert len(found.scores) <= 3
    assert all(score > 0.1 for score in found.scores.tolist())
