"""Reads the config text in an mmdetection checkpoint without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape

__all__ = ["read_config"]

MAX_LENGTH = 1_000_000  # characters; real configs have some thousands


def read_config(text: str) -> dict[str, Any]:
    """Read from an mmdetection 2 or 3 config what the parameters alone do not show.

    Returns:
        Those of these facts that the config states: stride_in_1x1, p7_relu, top_block, pixel_order, mean, std (0..255),
        short_side, long_side, pad_multiple, norm_eps. Empty if the text is not a Python config.

    Raises:
        FpnxError: the network is not a plain ResNet with a plain FPN, PAFPN or NAS-FPN.
    """
    try:
        return {name: value for name, value in _facts(_evaluate(text)).items() if value is not None}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return {}


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    model = _dict(config.get("model"))
    backbone, neck = _dict(model.get("backbone")), _dict(model.get("neck"))
    _refuse_variants(backbone, neck)
    facts: dict[str, Any] = {}
    if backbone:
        facts["stride_in_1x1"] = backbone.get("style", "pytorch") == "caffe"
        facts["norm_eps"] = _dict(backbone.get("norm_cfg")).get("eps", 1e-5)
    if neck and neck.get("type") != "NASFPN":  # which makes P6 and P7 in its own way
        facts["p7_relu"] = bool(neck.get("relu_before_extra_convs", False))
        facts["top_block"] = _top_block(neck)
    return facts | _preprocessing(config, model)


def _refuse_variants(backbone: Mapping[str, Any], neck: Mapping[str, Any]) -> None:
    supported = {
        "neck.type": str(neck.get("type", "FPN")) in ("FPN", "PAFPN", "NASFPN"),
        "neck.act_cfg": neck.get("act_cfg") is None,
        "neck.upsample_cfg": _dict(neck.get("upsample_cfg")).get("mode", "nearest") == "nearest",
        "backbone.type": str(backbone.get("type", "ResNet")) in ("ResNet", "ResNeXt"),
        "backbone.strides": tuple(backbone.get("strides") or (1, 2, 2, 2)) == (1, 2, 2, 2),
        "backbone.dilations": set(backbone.get("dilations") or (1,)) == {1},
    }
    for name, is_supported in supported.items():
        if not is_supported:
            part = {"neck": neck, "backbone": backbone}[name.partition(".")[0]]
            value = part.get(name.partition(".")[2])
            value = escape(value)[:40] if isinstance(value, str) else "something else"
            raise FpnxError(
                f"the config inside has {name} = {value}: fpnx reads a plain ResNet or ResNeXt with an FPN, PAFPN or "
                "NASFPN"
            )


def _top_block(neck: Mapping[str, Any]) -> str | None:
    """The source of P6; `"none"` if there is no P6, None if the config does not state it."""
    extra = neck.get("add_extra_convs", False)
    if extra:
        return {"on_input": "c5", "on_output": "p5", "on_lateral": "m5", True: "c5"}.get(extra)
    inputs, outputs = neck.get("in_channels"), neck.get("num_outs")
    if not isinstance(inputs, (list, tuple)) or not isinstance(outputs, int):
        return None
    above = outputs - (len(inputs) - int(neck.get("start_level", 0)))
    if above > 1:
        raise FpnxError(f"the config inside pools {above} levels above the last: fpnx knows one")
    return "pool" if above == 1 else "none"


def _preprocessing(config: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for values, rgb_key in (
        (_dict(model.get("data_preprocessor")), "bgr_to_rgb"),
        (_dict(config.get("img_norm_cfg")), "to_rgb"),
        *((step, "to_rgb") for step in _steps(config) if step.get("type") == "Normalize"),
    ):
        mean, std = _numbers(values.get("mean")), _numbers(values.get("std"))
        if mean and std:
            facts |= {"mean": mean, "std": std, "pixel_order": "RGB" if values.get(rgb_key) else "BGR"}
            break
    pads = [_dict(model.get("data_preprocessor")).get("pad_size_divisor")]
    pads += [step.get("size_divisor") for step in _steps(config) if step.get("type") == "Pad"]
    facts["pad_multiple"] = next((pad for pad in pads if isinstance(pad, int) and 0 < pad <= 1024), None)
    scales = [
        step.get("scale", step.get("img_scale"))
        for step in _steps(config)
        if step.get("type") in ("Resize", "MultiScaleFlipAug") and step.get("keep_ratio", True) is True
    ]
    for scale in scales:
        sides = _numbers(scale, 2)
        if sides:
            facts["short_side"], facts["long_side"] = int(min(sides)), int(max(sides))
            break
    return facts


def _steps(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of the test-time image pipeline."""
    pipelines: list[Any] = [config.get("test_pipeline"), config.get("val_pipeline")]
    for split in ("test", "val"):
        pipelines.append(_dict(_dict(config.get("data")).get(split)).get("pipeline"))
        pipelines.append(_dict(_dict(config.get(f"{split}_dataloader")).get("dataset")).get("pipeline"))
    steps = [step for pipeline in pipelines if isinstance(pipeline, (list, tuple)) for step in pipeline]
    for step in steps:
        if isinstance(step, dict):
            yield step
            yield from (inner for inner in step.get("transforms") or () if isinstance(inner, dict))


def _evaluate(text: str) -> dict[str, Any]:
    """Evaluate top-level assignments of literals, `dict(...)` and earlier names; any other value becomes None."""
    if len(text) > MAX_LENGTH:
        return {}
    names: dict[str, Any] = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names[statement.targets[0].id] = _value(statement.value, names)
    return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, names)
        return -value if isinstance(value, (int, float)) else None
    if isinstance(node, ast.Dict):
        keys = (_value(key, names) if key is not None else None for key in node.keys)
        return {key: _value(value, names) for key, value in zip(keys, node.values, strict=True) if isinstance(key, str)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {each.arg: _value(each.value, names) for each in node.keywords if each.arg is not None}
    return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any, count: int = 3) -> tuple[float, ...] | None:
    if not isinstance(value, list) or len(value) != count or not all(isinstance(v, (int, float)) for v in value):
        return None
    return tuple(float(v) for v in value)
