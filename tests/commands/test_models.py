"""`fpnx models`: the list of backbones, one backbone in detail, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision import models

from fpnx.cli.models_view import show_overview
from fpnx.commands import models as models_command
from fpnx.core.config import PYRAMIDS
from tests.helpers.files import DATA
from tests.helpers.process import document, forked

TABLE = json.loads((DATA / "stages.json").read_text())
Command = Callable[..., tuple[int, str, str]]


def test_a_part_of_a_name_lists_the_matching_backbones(fpnx: Command) -> None:
    code, out, _ = fpnx("models", "resnet1")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("resnet1")]
    assert [line.split()[0] for line in lines] == ["resnet101", "resnet152", "resnet18"]
    assert lines[2].split() == ["resnet18", "64", "128", "256", "512", "11.7", "M", "random,", "imagenet"]


def test_networks_without_stages_are_listed_with_the_reason(fpnx: Command) -> None:
    code, out, _ = fpnx("models", "b_32")
    assert code == 0
    assert "no pyramid: vit_b_32 has maps at stride 32 only" in out
    code, out, _ = fpnx("models", "vit_b_32")
    assert (code, out) == (2, "")


@pytest.mark.slow
def test_all_backbones(fpnx: Command) -> None:
    code, out, _ = fpnx("models", "--json")
    result = document(out)
    assert code == 0
    keys = ("stride", "node", "channels")
    taps = {row["name"]: [[tap[key] for key in keys] for tap in row["taps"]] for row in result["backbones"]}
    assert taps == {name: rows for name, rows in TABLE.items() if rows}
    assert {row["name"] for row in result["refused"]} == {name for name, rows in TABLE.items() if not rows}
    assert {row["name"] for row in result["backbones"] if "coco" in row["weights"]} == {
        "resnet50",
        "mobilenet_v3_large",
    }


def test_one_backbone(fpnx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = tmp_path / "torch" / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not read")
    code, out, _ = fpnx("models", "resnet50", "--json")
    result = document(out)
    assert code == 0
    plain = models.resnet50(weights=None)
    head = sum(p.numel() for p in plain.fc.parameters())
    total = sum(p.numel() for p in plain.parameters())
    # Laterals 256·C + 256 for C in 256, 512, 1024, 2048, and four outputs of 256·256·9 + 256.
    pyramid = 256 * 3840 + 4 * 256 + 4 * (256 * 256 * 9 + 256)
    assert result["parameters"] == {"body": total - head, "pyramid": pyramid, "published": total}
    # torchvision states 4.089e9 multiply-adds, of which the head has 2048·1000.
    multiply_adds = models.ResNet50_Weights.IMAGENET1K_V2.meta["_ops"]
    assert result["gflops"]["body"] == pytest.approx(2 * (multiply_adds - 2048 * 1000 / 1e9), abs=2e-3)
    pixels = [56 * 56, 28 * 28, 14 * 14, 7 * 7]
    channels = [256, 512, 1024, 2048]
    operations = sum(2 * n * (256 * c + 256 * 256 * 9) for n, c in zip(pixels, channels, strict=True))
    assert result["gflops"]["pyramid"] == pytest.approx(operations / 1e9)
    assert [tap["level"] for tap in result["taps"]] == ["C2", "C3", "C4", "C5"]
    weights = {each["name"]: each for each in result["weights"]}
    assert {str(entry) for entry in models.ResNet50_Weights} <= set(weights)
    best = weights["ResNet50_Weights.IMAGENET1K_V2"]
    assert best["also"] == ["imagenet"]
    assert best["trains"] == ["backbone"]
    assert (best["file"], best["there"]) == (str(file), True)
    assert best["url"] == models.ResNet50_Weights.IMAGENET1K_V2.url
    assert "224×224" in best["recipe"]
    detector = weights["RetinaNet_ResNet50_FPN_Weights.COCO_V1"]
    assert detector["trains"] == ["backbone", "pyramid"]
    assert detector["file_name"] == "retinanet_resnet50_fpn_coco-eeacb38b.pth"
    assert (detector["there"], "short side 800" in detector["recipe"]) == (False, True)


def test_kinds_of_pyramid_and_what_takes_them(fpnx: Command) -> None:
    code, out, _ = fpnx("models", "resnet18", "--json")
    assert (code, document(out)["pyramids"]) == (0, list(PYRAMIDS))
    code, out, _ = fpnx("models", "maxvit_t", "--json")
    assert document(out)["pyramids"] == [kind for kind in PYRAMIDS if kind != "image"]
    assert all(kind["summary"] for kind in models_command.pyramids())
    pytest.importorskip("timm")
    name = "timm/eva02_tiny_patch14_224"
    code, out, _ = fpnx("models", name, "--json")
    result = document(out)
    assert (result["pyramids"], result["blocks"]) == (["simple", "image"], 12)
    assert [(tap["level"], tap["stride"], tap["height"]) for tap in result["taps"]] == [("C4", 14, 16)]
    code, out, _ = fpnx("models", name)
    for text in ("C4         14       192         16 × 16  blocks.11", "--pyramid simple, image", "--blocks 0 to 11"):
        assert text in out
    assert code == 0
    rows = document(fpnx("models", name[:-4], "--json")[1])["backbones"]  # it is in the cache now
    assert [row["pyramids"] for row in rows if row["name"] == name] == [["simple", "image"]]


def test_the_kinds_are_listed_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_overview([], [], models_command.pyramids())
    text = capsys.readouterr().out
    for kind in PYRAMIDS:
        assert f"  {kind} " in text
    assert "of pyramids they take simple, image" in text
    assert "hf/NAME" in text


def test_one_backbone_as_text(fpnx: Command) -> None:
    code, out, _ = fpnx("models", "squeezenet1_1")
    assert code == 0
    for text in ("C4         16       512         13 × 13  features.12", "a multiply-add counts as 2",
                 "--weights SqueezeNet1_1_Weights.IMAGENET1K_V1 (also: imagenet)", "trained: backbone",
                 models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url, "squeezenet1_1-b8a52dc0.pth"):  # fmt: skip
        assert text in out
    assert "C5" not in out


def test_a_file_at_the_listed_path_is_used(
    fpnx: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = document(fpnx("models", "squeezenet1_1", "--json")[1])["weights"][0]
    Path(weights["file"]).parent.mkdir(parents=True)
    torch.save(models.squeezenet1_1(weights=None).state_dict(), weights["file"])
    arguments = (
        "extract",
        photos,
        "--backbone",
        "squeezenet1_1",
        "--weights",
        weights["name"],
        "--size",
        64,
        "--offline",
    )
    code, _, err = fpnx(*arguments)
    assert code == 0, err
    assert (tmp_path / "out.h5").exists()


def test_an_unknown_name_is_refused(fpnx: Command) -> None:
    code, out, err = fpnx("models", "resnett50", "--json")
    assert code == 2
    assert "did you mean resnet50?" in err
    assert "error" in document(out)


def test_timm_backbones(fpnx: Command) -> None:
    pytest.importorskip("timm")
    result = document(fpnx("models", "timm/resnet10", "--json")[1])
    assert "timm/resnet10t" in {row["name"] for row in result["backbones"]}
    details = document(fpnx("models", "timm/resnet10t", "--json")[1])
    assert [tap["channels"] for tap in details["taps"]] == [64, 128, 256, 512]
    assert [each["name"] for each in details["weights"]] == ["timm/resnet10t.c3_in1k"]
    assert details["weights"][0]["file"].endswith("timm-resnet10t.c3_in1k.safetensors")


def test_the_command_in_a_separate_process(tmp_path: Path) -> None:
    running = forked("models", "squeezenet", "--json", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    out, err = running.communicate()
    assert running.returncode == 0, err
    result = json.loads(out)
    assert [row["name"] for row in result["backbones"]] == ["squeezenet1_0", "squeezenet1_1"]
