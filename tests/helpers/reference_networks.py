"""Reference implementations of detectron2's and mmdetection's backbones and FPNs, with their parameter names.

They are written from the frameworks' definitions and share no code with fpnx or torchvision's FPN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS_OF_DEPTH = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), "x50": (3, 4, 6, 3)}


def randomise(network: nn.Module, seed: int = 0, smallest_variance: float = 1e-3) -> nn.Module:
    """Set random parameters and statistics; some variances are small enough for the norms' epsilon to matter."""
    generator = torch.Generator().manual_seed(seed)
    values = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with torch.no_grad():
        for name, value in values.items():
            if not value.is_floating_point():
                continue
            uniform = torch.rand(value.shape, generator=generator)
            if value.ndim > 1:
                fan_in = value[0].numel()
                value.copy_((uniform * 2 - 1) * (3.0 / fan_in) ** 0.5)
            elif name.endswith("running_var"):
                value.copy_(uniform.clamp_min(smallest_variance))
            else:
                value.copy_(uniform * 0.5 + 0.25 if name.endswith("weight") else uniform * 0.2 - 0.1)
    return network.eval()


class FrozenNorm(nn.Module):
    """y = weight · (x − mean) / √(var + eps) + bias."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            getattr(self, name)[:, None, None] for name in ("weight", "bias", "running_mean", "running_var")
        )
        return weight * (x - mean) / torch.sqrt(var + self.eps) + bias


# --- detectron2 (modeling/backbone/resnet.py, fpn.py) ---


class ConvNorm(nn.Conv2d):
    """A convolution followed by its norm, which is the attribute `norm`."""

    def __init__(self, *args: int, norm: bool = True, **kwargs: int) -> None:
        super().__init__(*args, bias=not norm, **kwargs)
        self.norm = FrozenNorm(self.out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


class D2Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut = ConvNorm(inputs, outputs, 1, stride) if inputs != outputs else None
        self.conv1 = ConvNorm(inputs, outputs, 3, stride, 1)
        self.conv2 = ConvNorm(outputs, outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class D2Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int, groups: int, stride_in_1x1: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = ConvNorm(inputs, outputs, 1, stride) if inputs != outputs else None
        self.conv1 = ConvNorm(inputs, width, 1, first)
        self.conv2 = ConvNorm(width, width, 3, second, 1, groups=groups)
        self.conv3 = ConvNorm(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class D2ResNet(nn.Module):
    def __init__(self, depth: int | str, stride_in_1x1: bool) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = ConvNorm(3, 64, 7, 2, 3)
        inputs = 64
        for stage, blocks in enumerate(BLOCKS_OF_DEPTH[depth]):
            outputs = (64 if depth == 18 else 256) * 2**stage
            layers = []
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                if depth == 18:
                    layers.append(D2Basic(inputs, outputs, stride))
                else:
                    width, groups = (outputs // 2, 32) if depth == "x50" else (outputs // 4, 1)
                    layers.append(D2Bottleneck(inputs, width, outputs, stride, groups, stride_in_1x1))
                inputs = outputs
            self.add_module(f"res{stage + 2}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
        taps = {}
        for k in range(2, 6):
            taps[k] = x = getattr(self, f"res{k}")(x)
        return taps


class P6P7(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(inputs, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)


class D2FPN(nn.Module):
    """detectron2's FPN; `top` is "pool" or the input of P6 and P7: "res5" or "p5"."""

    def __init__(
        self, depth: int | str, *, first: int = 2, channels: int = 32, top: str = "pool", norm: bool = False,
        stride_in_1x1: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.first, self.top = first, top
        self.bottom_up = D2ResNet(depth, stride_in_1x1)
        inputs = {k: (64 if depth == 18 else 256) * 2 ** (k - 2) for k in range(2, 6)}
        for k in range(first, 6):
            self.add_module(f"fpn_lateral{k}", ConvNorm(inputs[k], channels, 1, norm=norm))
            self.add_module(f"fpn_output{k}", ConvNorm(channels, channels, 3, 1, 1, norm=norm))
        if top != "pool":
            self.top_block = P6P7(inputs[5] if top == "res5" else channels, channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        taps = self.bottom_up(x)
        merged = self.fpn_lateral5(taps[5])
        levels = {"P5": self.fpn_output5(merged)}
        for k in range(4, self.first - 1, -1):
            merged = getattr(self, f"fpn_lateral{k}")(taps[k]) + F.interpolate(merged, scale_factor=2.0, mode="nearest")
            levels[f"P{k}"] = getattr(self, f"fpn_output{k}")(merged)
        if self.top == "pool":
            levels["P6"] = F.max_pool2d(levels["P5"], kernel_size=1, stride=2, padding=0)
        else:
            levels["P6"] = self.top_block.p6(taps[5] if self.top == "res5" else levels["P5"])
            levels["P7"] = self.top_block.p7(F.relu(levels["P6"]))
        return levels


class D2Detector(nn.Module):
    """A detector's backbone, and a head of two parameters."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()
        self.backbone = D2FPN(*args, **kwargs)
        self.head = nn.Linear(4, 4)


# --- mmdetection (models/backbones/resnet.py, models/necks/fpn.py) ---


class MMBottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, style: str) -> None:
        super().__init__()
        first, second = (1, stride) if style == "pytorch" else (stride, 1)
        self.conv1 = nn.Conv2d(inputs, planes, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride != 1 or inputs != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class MMResNet50(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, blocks in enumerate(BLOCKS_OF_DEPTH[50]):
            planes, layers = 64 * 2**stage, []
            for i in range(blocks):
                layers.append(MMBottleneck(inputs, planes, 2 if stage > 0 and i == 0 else 1, style))
                inputs = 4 * planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        taps = []
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            taps.append(x)
        return taps


class ConvModule(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) if hasattr(self, "bn") else x


class MMFPN(nn.Module):
    def __init__(
        self, *, start_level: int, num_outs: int, add_extra_convs: str = "", relu_before_extra_convs: bool = False,
        channels: int = 32, norm: bool = False, inputs: tuple[int, ...] = (256, 512, 1024, 2048),
    ) -> None:  # fmt: skip
        super().__init__()
        self.start, self.outs = start_level, num_outs
        self.extra, self.relu = add_extra_convs, relu_before_extra_convs
        self.lateral_convs = nn.ModuleList(ConvModule(n, channels, 1, norm=norm) for n in inputs[start_level:])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm=norm) for _ in inputs[start_level:])
        for i in range(num_outs - len(self.lateral_convs) if add_extra_convs else 0):
            source = inputs[-1] if i == 0 and add_extra_convs == "on_input" else channels
            self.fpn_convs.append(ConvModule(source, channels, 3, 2, norm=norm))

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        laterals = [conv(tap) for conv, tap in zip(self.lateral_convs, taps[self.start :], strict=True)]
        count = len(laterals)
        for i in range(count - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
        outs = [self.fpn_convs[i](laterals[i]) for i in range(count)]
        if not self.extra:
            for _ in range(self.outs - count):
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
            return outs
        source = {"on_input": taps[-1], "on_lateral": laterals[-1], "on_output": outs[-1]}[self.extra]
        outs.append(self.fpn_convs[count](source))
        for i in range(count + 1, self.outs):
            outs.append(self.fpn_convs[i](F.relu(outs[-1]) if self.relu else outs[-1]))
        return outs


class MMDetector(nn.Module):
    def __init__(self, style: str = "pytorch", kind: str = "FPN", **neck: object) -> None:
        super().__init__()
        kinds = {"FPN": MMFPN, "PAFPN": MMPAFPN, "NASFPN": MMNASFPN}
        self.backbone, self.neck = MMResNet50(style), kinds[kind](**neck)
        self.bbox_head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outs = self.neck(self.backbone(x))
        return {f"P{i + 2 + self.neck.start}": out for i, out in enumerate(outs)}


class MMMergingCell(nn.Module):
    """mmcv's cells of NAS-FPN: `kind` is "sum" or "gp"; `out` whether a convolution follows."""

    def __init__(self, kind: str, channels: int, norm: bool, out: bool) -> None:
        super().__init__()
        self.kind = kind
        if out:
            self.out_conv = nn.Module()
            self.out_conv.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=True)
            if norm:
                self.out_conv.bn = nn.BatchNorm2d(channels)

    def forward(self, first: Tensor, second: Tensor, like: Tensor) -> Tensor:
        first, second = self.resized(first, like), self.resized(second, like)
        if self.kind == "gp":
            merged = second + torch.sigmoid(F.adaptive_avg_pool2d(second, 1)) * first
        else:
            merged = first + second
        if not hasattr(self, "out_conv"):
            return merged
        merged = self.out_conv.conv(F.relu(merged))
        return self.out_conv.bn(merged) if hasattr(self.out_conv, "bn") else merged

    @staticmethod
    def resized(x: Tensor, like: Tensor) -> Tensor:
        if x.shape[2:] == like.shape[2:]:
            return x
        if x.shape[2] < like.shape[2] or x.shape[3] < like.shape[3]:
            return F.interpolate(x, size=like.shape[2:], mode="nearest")
        parts, pads = [], []
        for have, want in zip(x.shape[2:], like.shape[2:], strict=True):
            part = (have + want - 1) // want
            missing = part * want - have
            parts.append(part)
            pads = [missing // 2, missing - missing // 2, *pads]
        return F.max_pool2d(F.pad(x, pads), parts, parts)


class MMNASFPN(nn.Module):
    """mmdetection's NASFPN over the last three of four taps."""

    CELLS = ("gp_64_4", "sum_44_4", "sum_43_3", "sum_34_4", "gp_43_5", "sum_55_5", "gp_54_7", "sum_77_7", "gp_75_6")

    def __init__(
        self, *, stack_times: int, channels: int = 32, norm: bool = True, inputs: tuple[int, ...] = (512, 1024, 2048)
    ) -> None:
        super().__init__()
        self.start = 1
        self.lateral_convs = nn.ModuleList(ConvModule(n, channels, 1, norm=norm) for n in inputs)
        self.extra_downsamples = nn.ModuleList(
            nn.Sequential(ConvModule(channels, channels, 1, norm=norm), nn.MaxPool2d(2, 2)) for _ in range(2)
        )
        self.fpn_stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: MMMergingCell(name.split("_")[0], channels, norm, name not in ("gp_43_5", "gp_54_7"))
                    for name in self.CELLS
                }
            )
            for _ in range(stack_times)
        )

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        p3, p4, p5 = (conv(tap) for conv, tap in zip(self.lateral_convs, taps[-3:], strict=True))
        p6 = self.extra_downsamples[0](p5)
        p7 = self.extra_downsamples[1](p6)
        for stage in self.fpn_stages:
            p4_1 = stage["gp_64_4"](p6, p4, p4)
            p4_2 = stage["sum_44_4"](p4_1, p4, p4)
            p3 = stage["sum_43_3"](p4_2, p3, p3)
            p4 = stage["sum_34_4"](p3, p4_2, p4)
            p5 = stage["sum_55_5"](p5, stage["gp_43_5"](p4, p3, p5), p5)
            p7 = stage["sum_77_7"](p7, stage["gp_54_7"](p5, p4_2, p7), p7)
            p6 = stage["gp_75_6"](p7, p5, p6)
        return [p3, p4, p5, p6, p7]


class MMPAFPN(MMFPN):
    """mmdetection's PAFPN."""

    def __init__(self, *, channels: int = 32, norm: bool = False, **options: object) -> None:
        super().__init__(channels=channels, norm=norm, **options)
        steps = len(self.lateral_convs) - 1
        self.downsample_convs = nn.ModuleList(ConvModule(channels, channels, 3, 2, norm=norm) for _ in range(steps))
        self.pafpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm=norm) for _ in range(steps))

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        laterals = [conv(tap) for conv, tap in zip(self.lateral_convs, taps[self.start :], strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
        sums = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals, strict=False)]
        for i, conv in enumerate(self.downsample_convs):
            sums[i + 1] = sums[i + 1] + conv(sums[i])
        outs = sums[:1] + [conv(each) for conv, each in zip(self.pafpn_convs, sums[1:], strict=True)]
        source = {"on_input": taps[-1], "on_lateral": laterals[-1], "on_output": outs[-1]}.get(self.extra)
        for i in range(len(laterals), self.outs):
            if source is None:
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
            elif i == len(laterals):
                outs.append(self.fpn_convs[i](source))
            else:
                outs.append(self.fpn_convs[i](F.relu(outs[-1]) if self.relu else outs[-1]))
        return outs
