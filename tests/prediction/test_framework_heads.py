"""Heads of detectron2 and mmdetection against references that follow the frameworks' own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fpnx
from fpnx.core.errors import FpnxError
from fpnx.core.mask_runs import decode_mask
from fpnx.evaluation.detections import to_source
from fpnx.models.heads.base import Detections, Geometry, Pyramid
from fpnx.models.heads.framework import framework_head
from tests.helpers.detectors import matched, smooth_image
from tests.helpers.framework_heads import CHANNELS, REFERENCES, parameters, paste, scaled
from tests.helpers.reference_networks import D2Detector, MMDetector, randomise

SIZE, PADDED = (60, 90), (64, 96)
# Layers whose outputs are made larger or smaller, so that there are boxes of many scores and sizes.
FACTORS = {
    "detectron2": {
        "head.cls_score": 0.8, "head.bbox_pred": 0.3,
        "proposal_generator.rpn_head.anchor_deltas": 0.3, "roi_heads.box_predictor.cls_score": 1.2,
    },
    "mmdetection": {
        "bbox_head.retina_cls": 0.8, "bbox_head.retina_reg": 0.3,
        "rpn_head.rpn_reg": 0.3, "roi_head.bbox_head.fc_cls": 1.2,
    },
}  # fmt: skip

# Layers that read the levels.
FIRST = {
    "detectron2": (
        "proposal_generator.rpn_head.conv", "roi_heads.box_head.fc1", "roi_heads.mask_head.mask_fcn1"
    ),
    "mmdetection": ("rpn_head.rpn_conv", "roi_head.bbox_head.shared_fcs.0", "roi_head.mask_head.convs.0.conv"),
}  # fmt: skip


def levels_of(first: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"P{k}": torch.randn(1, CHANNELS, *(-(-side // 2**k) for side in PADDED), generator=generator)
        for k in range(first, first + 5)
    }


def pyramid_of(first: int) -> Pyramid:
    names = [f"P{k}" for k in range(first, first + 5)]
    return Pyramid(channels=dict.fromkeys(names, CHANNELS), strides={name: 2 ** int(name[1]) for name in names})


def state_of(framework: str, kind: str) -> dict[str, Tensor]:
    reference = REFERENCES[framework]
    shapes = reference.retinanet_shapes if kind == "retinanet" else dict(reference.two_stage_shapes)
    shapes = shapes | reference.mask_shapes if kind == "mask_rcnn" else shapes
    return scaled(parameters(shapes), {n: f for n, f in FACTORS[framework].items() if n in shapes})


@pytest.mark.parametrize("framework", REFERENCES)
@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "mask_rcnn"])
def test_detections_equal_the_references(framework: str, kind: str) -> None:
    state, reference = state_of(framework, kind), REFERENCES[framework]
    levels = levels_of(3 if kind == "retinanet" else 2)
    single = [level[0] for level in levels.values()]
    expected = (reference.retinanet if kind == "retinanet" else reference.two_stage)(state, single, SIZE)
    head = framework_head(framework, state, pyramid_of(3 if kind == "retinanet" else 2))
    with torch.no_grad():
        twice = {name: torch.cat([level, level.flip(3)]) for name, level in levels.items()}
        found = head.predict(twice, Geometry(padded=PADDED, sizes=(SIZE, SIZE)))
    assert isinstance(found[0], Detections)
    assert len(found[0].scores) == len(expected["scores"]) >= 30
    pairs = matched(
        found[0].boxes.numpy(),
        found[0].scores.numpy(),
        found[0].labels.numpy(),
        {name: torch.from_numpy(values) for name, values in expected.items()},
    )
    assert len(pairs) == len(expected["scores"])
    assert [found[0].levels[ours] for ours, _ in pairs] == [f"P{expected['levels'][theirs]}" for _, theirs in pairs]
    assert head.kind == kind
    if kind == "mask_rcnn":
        cells = reference.masks(state, single, expected)
        for ours, theirs in pairs:
            np.testing.assert_allclose(found[0].mask_cells[ours].numpy(), cells[theirs], atol=1e-3)
        source = to_source("", found[0], SIZE, (120, 180))
        for ours, theirs in pairs[:5]:
            mask = paste(cells[theirs], 2 * expected["boxes"][theirs], (120, 180))
            assert (decode_mask(source.masks[ours]) != mask).mean() < 1e-3


@pytest.mark.parametrize("framework", REFERENCES)
def test_boxes_of_retinanet_have_the_level_of_their_anchor(framework: str) -> None:
    state, reference, levels = state_of(framework, "retinanet"), REFERENCES[framework], levels_of(3)
    levels["P3"] = 0.3 * levels["P3"]  # which would have most of the best boxes
    expected = reference.retinanet(state, [level[0] for level in levels.values()], SIZE)
    with torch.no_grad():
        (found,) = framework_head(framework, state, pyramid_of(3)).predict(
            levels, Geometry(padded=PADDED, sizes=(SIZE,))
        )
    assert isinstance(found, Detections)
    tensors = {name: torch.from_numpy(values) for name, values in expected.items()}
    pairs = matched(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy(), tensors)
    assert len(pairs) == len(found.scores) >= 30
    assert {found.levels[ours] for ours, _ in pairs} >= {"P3", "P4"}
    assert [found.levels[ours] for ours, _ in pairs] == [f"P{expected['levels'][theirs]}" for _, theirs in pairs]


@pytest.mark.parametrize("framework", REFERENCES)
def test_other_heads_are_refused_with_the_reason(framework: str) -> None:
    state = state_of(framework, "faster_rcnn")
    extra = next(iter(state)).replace(".weight", ".norm.weight")
    with pytest.raises(FpnxError, match=f"its head has what {framework}'s own .* have not: {extra}"):
        framework_head(framework, {**state, extra: torch.ones(4)}, pyramid_of(2))
    few = Pyramid(channels={"P3": CHANNELS, "P4": CHANNELS, "P5": CHANNELS}, strides={"P3": 8, "P4": 16, "P5": 32})
    with pytest.raises(FpnxError, match="its 3 anchors a cell on 3 levels are not the framework's 3 on 5"):
        framework_head(framework, state, few)
    with pytest.raises(FpnxError, match="none of RetinaNet, Faster and Mask R-CNN"):
        framework_head(framework, {"other.weight": torch.ones(4)}, pyramid_of(2))
    name = next(name for name in state if name.endswith((".fc2.weight", "shared_fcs.1.weight")))
    with pytest.raises(FpnxError, match=r"is not built as .* own: size mismatch"):
        framework_head(framework, {**state, name: state[name][:, :3]}, pyramid_of(2))


@pytest.mark.parametrize("framework", ["detectron2", pytest.param("mmdetection", marks=pytest.mark.slow)])
def test_whole_checkpoints_are_predicted(framework: str, tmp_path: Path) -> None:
    if framework == "detectron2":
        network = randomise(D2Detector(18, channels=CHANNELS, stride_in_1x1=False), smallest_variance=0.1)
        body = {f"backbone.{name}": value for name, value in network.backbone.state_dict().items()}
    else:
        network = randomise(MMDetector(start_level=0, num_outs=5, channels=CHANNELS), smallest_variance=0.1)
        body = {name: value for name, value in network.state_dict().items() if not name.startswith("bbox_head")}
    file = tmp_path / "own.pth"
    torch.save({"model": body}, file)
    image = smooth_image(SIZE, 0)
    options = {"weights": str(file), "short_side": 60, "long_side": 90}
    model = fpnx.create_model(weights=str(file))
    model.recipe = model.recipe.sized(fpnx.PredictConfig(**options))
    with torch.no_grad():
        levels = [level[0] for level in model(model.transform(image)[None]).values()]
    spread = float(torch.stack([level.std() for level in levels]).mean())
    state = scaled(state_of(framework, "mask_rcnn"), dict.fromkeys(FIRST[framework], 1 / spread))
    torch.save({"model": body | state}, file)
    found = fpnx.predict(image, **options)
    expected = REFERENCES[framework].two_stage(state, levels, SIZE)
    assert len(found) == len(expected["scores"])
    pairs = matched(found.boxes, found.scores, found.labels - 1, {n: torch.from_numpy(v) for n, v in expected.items()})
    assert len(pairs) == len(found)
    assert found.masks.shape == (len(found), *SIZE)
    assert set(found.names) <= {f"class {i}" for i in range(1, 5)}
