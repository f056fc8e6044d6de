"""Recognises the state-dict layouts of other frameworks and renames their keys to fpnx's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fpnx.core.errors import FpnxError
from fpnx.models.backbones.registry import TIMM
from fpnx.models.weights.effdet import effdet_backbone, from_effdet
from fpnx.models.weights.key_matching import choose_prefix, first_names, match_backbone, tails
from fpnx.models.weights.mmdetection import read_config
from fpnx.models.weights.neck_keys import FpnKeys, fpn_keys
from fpnx.models.weights.vitdet import rename_vitdet, vitdet_backbone, vitdet_state

__all__ = ["StateDictLayout", "recognize_layout", "with_names_of"]


@dataclass(frozen=True, kw_only=True)
class StateDictLayout:
    """A state dict renamed to fpnx's layout, and the layout that its file has.

    Attributes:
        framework: the file's layout: `"fpnx"`, `"torchvision"`, `"timm"`, `"torchvision detection"`, `"detectron2"`,
            `"detectron2 ViTDet"`, `"detectron2 backbone"` (converted from torchvision's by its script, or by SoCo's
            with an FPN), `"caffe2"` (Detectron's), `"mmdetection"` or `"effdet"`.
        state: the parameters: `body.*` with the backbone's names, and `fpn.*`.
        others: the other tensors under the same prefix, which belong to heads and other networks.
        ignored: number of all other tensors.
        facts: what the file states beside its parameters, by the field names of `CheckpointConfig` and `Recipe`.
        pyramid: the pyramid in the file; None where there is none.
        backbone: the backbone that the parameters are of, where that is known yet.
        prefix: what stood before the keys, such as `"module.encoder."`, and was removed.
        automatic: whether this prefix would have been taken without asking for it.
        beside: all prefixes under which parameters fit, this one included.
    """

    framework: str
    state: Mapping[str, Tensor]
    ignored: int
    facts: Mapping[str, Any]
    pyramid: FpnKeys | None
    backbone: str | None = None
    prefix: str = ""
    automatic: bool = True
    beside: tuple[str, ...] = ()
    others: Mapping[str, Tensor] = field(default_factory=dict)


Rename = Callable[[str], "str | None"]


def recognize_layout(
    state: Mapping[str, Tensor],
    config: str | None = None,
    *,
    backbone: str | None = None,
    prefix: str | None = None,
    own: bool = False,
) -> StateDictLayout:
    """Recognise the layout of `state` by its keys, and rename the parameters of the backbone and the pyramid.

    Args:
        state: names → tensors, as in the file.
        config: the text of an mmdetection config.
        backbone: the backbone that the user names; None finds it.
        prefix: the prefix before the keys that the user names; None finds it.
        own: the file says that fpnx wrote it.

    Raises:
        FpnxError: the backbone or the pyramid has keys that its layout does not have; no backbone fits, or it is
            another one; or several prefixes fit.
    """
    is_plain = own and any(name.startswith("body.") for name in state)
    framework, prefixes = ("fpnx", [""]) if is_plain else _framework(state, backbone)
    if not prefixes:
        match = match_backbone(state, backbone, prefix)
        return StateDictLayout(
            framework="timm" if match.name.startswith(TIMM) else "torchvision",
            state={f"body.{name}": value for name, value in match.state.items()},
            ignored=len([name for name in state if not name.endswith("num_batches_tracked")]) - len(match.state),
            facts={},
            pyramid=None,
            backbone=match.name,
            prefix=match.prefix,
            automatic=match.automatic,
            beside=match.beside,
        )
    used, automatic = choose_prefix(prefixes, prefix)
    inner = {name[len(used) :]: value for name, value in state.items() if name.startswith(used)}
    pattern, rename = _rename_rules(framework, inner)
    renamed: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in inner.items():
        new = rename(name)
        if new is not None and not new.endswith("num_batches_tracked"):
            renamed[new] = value
        elif new is None and re.match(pattern, name):
            unknown.append(name)
        elif new is None:
            others[name] = value
    if unknown:
        raise FpnxError(
            f"the layout is {framework}'s, but it has names that fpnx does not know: {first_names(unknown)}"
        )
    facts = _stated_facts(framework, inner, config)
    if framework == "caffe2":
        renamed, facts = _add_norm_statistics(renamed, facts)
    found: str | None = None
    if framework == "detectron2 ViTDet":
        renamed, found = vitdet_state(renamed), vitdet_backbone(renamed)
        if backbone not in (None, found):
            raise FpnxError(f"it is for {found}, not for {backbone}: drop --backbone or take another file")
    elif framework == "effdet":
        found = effdet_backbone(renamed, backbone)
    pyramid = fpn_keys(renamed, _first_level(framework, inner))
    return StateDictLayout(
        framework=framework, state=renamed, ignored=len(state) - len(inner) + len(others), facts=facts,
        pyramid=pyramid, prefix=used, automatic=automatic, beside=tuple(prefixes), backbone=found, others=others,
    )  # fmt: skip


def with_names_of(layout: StateDictLayout, backbone: str | None) -> StateDictLayout:
    """The layout with the backbone that its parameters are of, and with this backbone's own names.

    Raises:
        FpnxError: they are of another backbone, or of none.
    """
    body = {name[5:]: value for name, value in layout.state.items() if name.startswith("body.")}
    if layout.backbone is not None or not body:
        return layout
    match = match_backbone(body, backbone, whole=True)
    rest = {name: value for name, value in layout.state.items() if not name.startswith("body.")}
    state = {f"body.{name}": value for name, value in match.state.items()} | rest
    ignored = layout.ignored + len(layout.state) - len(state)
    return replace(layout, state=state, ignored=ignored, backbone=match.name)


LAYOUT_PATTERNS = {  # layout → start of a key that only this layout has; the first that matches counts
    "effdet": r"fpn\.cell\.\d+\.fnode\.",
    "torchvision detection": r"backbone\.body\.",
    "fpnx": r"fpn\.(inner_blocks|cells)\.|body\.",
    "detectron2": r"backbone\.bottom_up\.",
    "detectron2 ViTDet": r"backbone\.(simfp_\d\.|net\.blocks\.\d+\.attn\.rel_pos_h)",
    "detectron2 backbone": r"stem\.conv1\.(weight|norm\.)",
    "caffe2": r"res2_0_branch2a_w$",
    "mmdetection": r"neck\.(lateral|fpn)_convs\.",
}
COMMON_NAMES = ("body.", "stem.conv1.")  # parts of other networks have these names, too
WRAPPERS = re.compile(r"((module|model|_orig_mod)\.)*")  # of DistributedDataParallel, Lightning and torch.compile


def _framework(state: Mapping[str, Tensor], backbone: str | None) -> tuple[str, list[str]]:
    """The layout, and the prefixes before its keys; `"torchvision"` and no prefixes where no key is of another one."""
    has_common_names = (backbone or "").startswith(TIMM)
    for framework, pattern in LAYOUT_PATTERNS.items():
        prefixes = {
            prefix
            for name in state
            for prefix, rest in tails(name)
            if re.match(pattern, rest)
            and not (rest.startswith(COMMON_NAMES) and (has_common_names or not WRAPPERS.fullmatch(prefix)))
        }
        if prefixes:
            return framework, sorted(prefixes)
    return "torchvision", []


def _rename_rules(framework: str, state: Mapping[str, Tensor]) -> tuple[str, Rename]:
    """The pattern of the keys that must be known, and the function that renames keys (None: not known)."""
    if framework == "fpnx":
        return r"(body|fpn)\.", _from_own
    if framework == "torchvision detection":
        return r"backbone\.", lambda name: _from_own(name[9:]) if name.startswith("backbone.") else None
    if framework == "detectron2 ViTDet":
        return r"backbone\.", rename_vitdet
    if framework.startswith("detectron2"):
        return r"backbone\.|stem\.|res\d|fpn_", _from_detectron2(_first_level(framework, state))
    if framework == "caffe2":
        return r"(res|conv1|fpn)(?!.*_momentum$)", _from_caffe2
    if framework == "effdet":
        return r"(backbone|fpn)\.", from_effdet(state)
    if framework == "mmdetection":
        laterals = {match[1] for name in state if (match := re.match(r"neck\.lateral_convs\.(\d+)\.", name))}
        return r"(backbone|neck)\.", _from_mmdetection(len(laterals))
    raise AssertionError(framework)


def _from_own(name: str) -> str | None:
    """fpnx's own names. torchvision's detectors omit `features.`, and old ones the `.0` of convolutions."""
    name = re.sub(r"^body\.(?=\d)", "body.features.", name)
    name = re.sub(r"^(fpn\.(?:inner|layer)_blocks\.\d+)\.(?=weight|bias)", r"\1.0.", name)
    blocks = r"(inner|layer|downsample|pafpn)_blocks\.\d+\.[01]\.\w+"
    of_necks = r"blocks\.P\d\.\d\.(weight|bias)|extra_blocks\.p\d\.(weight|bias)|extra_block\.[01]\.\w+"
    known = rf"body\..+|fpn\.({blocks}|{of_necks}|(cells|stacks)\.\d+\..+)"
    return name if re.fullmatch(known, name) else None


def _from_detectron2(first_level: int | None) -> Rename:
    def rename(name: str) -> str | None:
        name = name.removeprefix("backbone.bottom_up.")
        if match := re.fullmatch(r"stem\.conv1\.(norm\.)?(\w+)", name):
            return f"body.{'bn1' if match[1] else 'conv1'}.{match[2]}"
        if match := re.fullmatch(r"res([2-5])\.(\d+)\.(conv(\d)|shortcut)\.(norm\.)?(\w+)", name):
            inner = f"{'bn' if match[5] else 'conv'}{match[4]}" if match[4] else f"downsample.{1 if match[5] else 0}"
            return f"body.layer{int(match[1]) - 1}.{match[2]}.{inner}.{match[6]}"
        if match := re.fullmatch(r"(?:backbone\.)?fpn_(lateral|output)(\d)\.(norm\.)?(\w+)", name):
            blocks = "inner_blocks" if match[1] == "lateral" else "layer_blocks"
            return f"fpn.{blocks}.{int(match[2]) - (first_level or 0)}.{1 if match[3] else 0}.{match[4]}"
        if match := re.fullmatch(r"backbone\.top_block\.(p[67]\.(weight|bias))", name):
            return f"fpn.extra_blocks.{match[1]}"
        return None

    return rename


def _from_caffe2(name: str) -> str | None:
    """Names of Detectron and Caffe2, such as `res2_0_branch2a_bn_gamma`."""
    roles = {
        "w": "weight", "bn_s": "weight", "bn_gamma": "weight", "bn_b": "bias", "bn_beta": "bias",
        "bn_rm": "running_mean", "bn_running_mean": "running_mean",
        "bn_riv": "running_var", "bn_running_var": "running_var",
    }  # fmt: skip
    match = re.fullmatch(r"(res_)?conv1_(\w+?)|res([2-5])_(\d+)_branch(1|2[abc])_(\w+)", name)
    role = roles.get((match[2] or match[6]) if match else "")
    if match is None or role is None:
        # The stem's bias is always 0 in these files: a batch norm follows.
        return "body.conv1.num_batches_tracked" if name == "conv1_b" else None
    is_norm = (match[2] or match[6]).startswith("bn")
    if match[3] is None:
        return f"body.{'bn1' if is_norm else 'conv1'}.{role}"
    block = f"body.layer{int(match[3]) - 1}.{match[4]}"
    if match[5] == "1":
        return f"{block}.downsample.{1 if is_norm else 0}.{role}"
    return f"{block}.{'bn' if is_norm else 'conv'}{'abc'.index(match[5][1]) + 1}.{role}"


def _from_mmdetection(laterals: int) -> Rename:
    def rename(name: str) -> str | None:
        if name.startswith("backbone."):
            return f"body.{name[9:]}"
        if match := re.fullmatch(r"neck\.fpn_stages\.(\d+)\.(\w+)\.out_conv\.(conv|bn)\.(\w+)", name):
            return f"fpn.stacks.{match[1]}.{match[2]}.{('conv', 'bn').index(match[3])}.{match[4]}"
        if match := re.fullmatch(r"neck\.extra_downsamples\.(\d+)\.0\.(conv|bn)\.(\w+)", name):
            return f"fpn.downsample_blocks.{match[1]}.{('conv', 'bn').index(match[2])}.{match[3]}"
        match = re.fullmatch(r"neck\.(lateral|fpn|downsample|pafpn)_convs\.(\d+)\.(conv|bn|gn)\.(\w+)", name)
        if match is None:
            return None
        i, part = int(match[2]), 0 if match[3] == "conv" else 1
        if match[1] in ("downsample", "pafpn"):
            return f"fpn.{match[1]}_blocks.{i}.{part}.{match[4]}"
        if match[1] == "lateral" or i < laterals:
            blocks = "inner_blocks" if match[1] == "lateral" else "layer_blocks"
            return f"fpn.{blocks}.{i}.{part}.{match[4]}"
        return f"fpn.extra_blocks.p{6 + i - laterals}.{match[4]}" if part == 0 else None

    return rename


def _first_level(framework: str, state: Mapping[str, Tensor]) -> int | None:
    found = [int(match[1]) for name in state if (match := re.match(r"(?:backbone\.)?fpn_lateral(\d)\.", name))]
    return min(found, default=None) if framework.startswith("detectron2") else None


def _stated_facts(framework: str, state: Mapping[str, Tensor], config: str | None) -> dict[str, Any]:
    if framework == "mmdetection":
        return read_config(config or "")
    if framework == "detectron2":  # old versions kept these as buffers
        buffers = {"mean": state.get("pixel_mean"), "std": state.get("pixel_std")}
        return {
            name: tuple(value.flatten().tolist())
            for name, value in buffers.items()
            if value is not None and value.numel() == 3
        }
    return {}


def _add_norm_statistics(state: dict[str, Tensor], facts: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Add mean 0 and variance 1: Detectron's files have the statistics folded into weight and bias of the norms."""
    for name in [name for name in state if re.search(r"(bn\d|downsample\.1)\.weight$", name)]:
        mean = name.replace("weight", "running_mean")
        if mean not in state:
            state[mean] = torch.zeros_like(state[name])
            state[name.replace("weight", "running_var")] = torch.ones_like(state[name])
            facts = {**facts, "norm_eps": 0.0}
    return state, facts
