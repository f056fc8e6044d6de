"""Trainings from end to end: sources agree, runs repeat, a killed run continues, odd requests are one line."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import fpnx as package
from fpnx.commands.extract import extract
from fpnx.commands.train import train
from fpnx.core.errors import FpnxError
from fpnx.models.heads.trained_file import load_trained
from tests.helpers.process import document, forked
from tests.helpers.shapes import draw_scenes, write_coco, write_folders, write_masks
from tests.helpers.training import ABOVE, MODEL, assert_same_weights

Run = Callable[..., Any]
SETTINGS = {"fcos": ABOVE, "semantic": {**ABOVE, "convolutions": None, "levels": "P3,P4"}}
SETTINGS["classify"] = {**ABOVE, "convolutions": None}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of three sizes, labelled for every task."""
    folder = tmp_path_factory.mktemp("scenes")
    drawn = [draw_scenes(12, size=size)[i] for i, size in enumerate([(64, 64), (64, 96), (96, 64)] * 4)]
    write_coco(folder / "boxes", drawn)
    write_masks(folder / "masks", drawn)
    write_folders(folder / "folders", drawn)
    return folder


def inputs(scenes: Path, head: str) -> tuple[Path, Path | str]:
    """Images and labels for a head."""
    if head == "classify":
        return scenes / "folders", "folders"
    folder = scenes / ("masks" if head == "semantic" else "boxes")
    return folder / "images", folder / ("masks" if head == "semantic" else "annotations.json")


@pytest.mark.parametrize("head", ["classify", "fcos", "semantic"])
def test_images_and_stored_maps_give_the_same_losses(head: str, scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, head)
    model = {key: value for key, value in MODEL.items() if key != "size"} | {"short_side": 64}
    extract(images, tmp_path / "maps.h5", levels="C2-C5", device="cpu", **model)
    first = train(images, labels, tmp_path / "a.safetensors", augment="none", **model, **SETTINGS[head])
    second = train(tmp_path / "maps.h5", labels, tmp_path / "b.safetensors", **SETTINGS[head])
    assert len(first.epochs) == len(second.epochs) == 2
    for one, other in zip(first.epochs, second.epochs, strict=True):
        assert one.losses.keys() == other.losses.keys()
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
    assert first.plan.stored is False
    assert second.plan.stored is True
    assert (first.plan.training, first.plan.validation) == (second.plan.training, second.plan.validation) == (10, 2)


def test_a_file_of_float16_is_enough(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "fcos")
    losses = []
    for dtype in ("float32", "float16"):
        extract(images, tmp_path / f"{dtype}.h5", levels="C4-C5", dtype=dtype, device="cpu", **MODEL)
        losses.append(
            train(tmp_path / f"{dtype}.h5", labels, tmp_path / f"{dtype}.safetensors", **ABOVE).epochs[0].loss
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_the_last_stage_of_the_backbone_is_trained_and_saved(scenes: Path, tmp_path: Path, ema: float) -> None:
    images, labels = inputs(scenes, "fcos")
    train(images, labels, tmp_path / "a.safetensors", unfreeze=1, ema=ema, learning_rate=1e-2, **MODEL, **ABOVE)
    trained = load_trained(tmp_path / "a.safetensors").model
    assert trained.weights.body.trained
    before = package.create_model(**{name: MODEL[name] for name in ("backbone", "weights")}).body.state_dict()
    changed = {name for name, value in trained.body.state_dict().items() if not torch.equal(value, before[name])}
    last = {name for name in before if int(name.split(".")[1]) >= 14 and name.endswith((".weight", ".bias"))}
    assert changed
    assert changed <= last


def test_two_runs_are_equal_and_leave_the_process_alone(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "fcos")
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_num_threads()
    train(images, labels, tmp_path / "a.safetensors", **MODEL, **ABOVE)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), torch.get_num_threads())
    torch.manual_seed(2)
    train(images, labels, tmp_path / "b.safetensors", **MODEL, **ABOVE)
    assert_same_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    other = train(images, labels, tmp_path / "c.safetensors", seed=5, **MODEL, **ABOVE)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert other.exit_code == 0


def command(scenes: Path, output: str, *more: object) -> list[str]:
    images, labels = inputs(scenes, "fcos")
    options = {**MODEL, **ABOVE, "epochs": 4}
    flags = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return ["train", str(images), "--labels", str(labels), "-o", output, *flags, *map(str, more)]


def test_a_killed_run_continues_to_the_same_weights(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "fcos")
    options = {**MODEL, **ABOVE, "epochs": 4}
    train(images, labels, tmp_path / "whole.safetensors", log=tmp_path / "whole.jsonl", **options)
    arguments = command(scenes, "cut.safetensors", "--log", "cut.jsonl", "--resume")
    output, part = tmp_path / "cut.safetensors", tmp_path / "cut.safetensors.part"
    with forked(*arguments, cwd=tmp_path) as running:
        for line in running.stderr:
            if line.startswith("fpnx: epoch 2 of"):
                time.sleep(0.1 * random.random())
                break
        running.send_signal(signal.SIGKILL)
    assert part.exists()
    assert not output.exists()
    continued = train(images, labels, output, log=tmp_path / "cut.jsonl", resume=True, **options)
    assert len(continued.epochs) == 4
    assert_same_weights(tmp_path / "whole.safetensors", output)
    assert not part.exists()
    logs = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("whole.jsonl", "cut.jsonl")
    ]
    assert [[each.pop("seconds") > 0 for each in log] for log in logs] == [[True] * 4] * 2
    assert logs[0] == logs[1]


def test_ctrl_c_keeps_the_best_so_far(scenes: Path, tmp_path: Path) -> None:
    with forked(*command(scenes, "cut.safetensors", "--epochs", "200"), cwd=tmp_path) as running:
        lines = []
        for line in running.stderr:
            lines.append(line)
            if line.startswith("fpnx: epoch 2 of"):
                running.send_signal(signal.SIGINT)
    assert running.returncode == 130
    assert re.search(
        r"fpnx: interrupted after \d epochs: the best weights so far, of epoch \d, are in \S*cut.safetensors; the same "
        r"command with --resume continues\n$", lines[-1],
    )  # fmt: skip
    assert (tmp_path / "cut.safetensors.part").exists()
    assert load_trained(tmp_path / "cut.safetensors").head.kind == "fcos"


def test_other_options_or_data_are_not_continued(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "fcos")
    output = tmp_path / "a.safetensors"

    class StopError(Exception):
        pass

    class Listener(package.Listener):
        def message(self, text: str) -> None:
            if text.startswith("epoch 1"):
                raise StopError

    with pytest.raises(StopError):
        train(images, labels, output, listener=Listener(), **MODEL, **ABOVE)
    with pytest.raises(FpnxError, match=r"a.safetensors.part holds an unfinished run: continue it with --resume"):
        train(images, labels, output, **MODEL, **ABOVE)
    with pytest.raises(FpnxError, match=r"from a run with other options or data \(learning_rate None → 0.1\)"):
        train(images, labels, output, resume=True, learning_rate=0.1, **MODEL, **ABOVE)
    with pytest.raises(FpnxError, match=r"from a run with other options or data \(seed 0 → 3"):
        train(images, labels, output, resume=True, seed=3, **MODEL, **ABOVE)
    first = train(images, labels, output, resume=True, **MODEL, **ABOVE)
    assert len(first.epochs) == 2
    written = output.stat().st_mtime_ns
    again = train(images, labels, output, resume=True, **MODEL, **ABOVE)  # which is complete
    assert json.dumps(again.to_json()) == json.dumps(first.to_json())  # also the order of its scores
    assert output.stat().st_mtime_ns == written
    with pytest.raises(FpnxError, match=r"from a run with other options or data \(batch_size 8 → 4\)"):
        train(images, labels, output, resume=True, batch_size=4, **MODEL, **ABOVE)
    with pytest.raises(FpnxError, match=r"a.safetensors exists: continue it with --resume, replace it"):
        train(images, labels, output, **MODEL, **ABOVE)


def test_what_a_file_says_of_its_training(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "fcos")
    result = train(
        images,
        labels,
        tmp_path / "a.safetensors",
        log=tmp_path / "log.jsonl",
        plot=tmp_path / "p.png",
        **MODEL,
        **ABOVE,
    )
    trained = load_trained(tmp_path / "a.safetensors")
    assert [(each.id, each.name) for each in trained.categories] == [(2, "square"), (5, "circle"), (9, "triangle")]
    assert trained.task == "detection"
    assert result.scores is not None
    assert trained.scores["values"] == dict(result.scores.values)
    assert trained.facts["best_epoch"] == result.best
    assert [each["loss"] for each in trained.facts["history"]] == [each.loss for each in result.epochs]
    assert set(trained.facts["versions"]) >= {"fpnx", "torch", "torchvision"}
    assert trained.model.weights.fpn.trained is True
    assert trained.model.weights.body.trained is False
    with Image.open(tmp_path / "p.png") as plot:
        assert plot.size[0] > 500
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2]
    extract(images, tmp_path / "out.h5", weights=tmp_path / "a.safetensors", device="cpu")
    with package.open(tmp_path / "out.h5") as store:
        assert store.provenance.weights.pyramid.trained is True
        assert store.levels == ("P4", "P5")


def test_an_image_that_cannot_be_read_is_left_out(scenes: Path, tmp_path: Path) -> None:
    drawn = draw_scenes(8)
    write_folders(tmp_path / "folders", drawn)
    first, second = sorted((tmp_path / "folders").rglob("*.png"))[:2]
    first.write_bytes(first.read_bytes()[:200])  # found while decoding
    second.write_text("not an image")  # found by its header
    result = train(tmp_path / "folders", "folders", tmp_path / "a.safetensors", **MODEL, **SETTINGS["classify"])
    assert result.exit_code == 1
    assert set(result.failed) == {f"{path.parent.name}/{path.name}" for path in (first, second)}
    assert result.epochs[0].images + result.plan.validation in (7, 6)


def test_one_image_and_one_class(tmp_path: Path) -> None:
    write_coco(tmp_path / "boxes", draw_scenes(1, shapes=1))
    messages: list[str] = []

    class Listener(package.Listener):
        def message(self, text: str) -> None:
            messages.append(text)

    result = train(
        tmp_path / "boxes" / "images", tmp_path / "boxes" / "annotations.json", tmp_path / "a.safetensors",
        listener=Listener(), **MODEL, **{**ABOVE, "epochs": "auto"},
    )  # fmt: skip
    assert (result.plan.training, result.plan.validation, result.scores) == (1, 0, None)
    assert len(result.epochs) == 12
    assert messages[0].startswith("no image is held out, which would tell when to stop: 12 epochs")
    folder = tmp_path / "one" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (70, 70), "red").save(folder / "a.png")
    result = train(tmp_path / "one", "folders", tmp_path / "b.safetensors", **MODEL, **SETTINGS["classify"])
    assert result.epochs[-1].loss == 0.0  # one class, and nothing to choose


def test_labels_of_their_own_for_validation(tmp_path: Path) -> None:
    drawn = draw_scenes(12)
    labels = write_coco(tmp_path / "boxes", drawn)
    everything = json.loads(labels.read_text())
    for name, chosen in (("train", range(100, 108)), ("val", range(108, 112))):
        part = {
            "images": [each for each in everything["images"] if each["id"] in chosen],
            "annotations": [each for each in everything["annotations"] if each["image_id"] in chosen],
            "categories": everything["categories"][:: 1 if name == "train" else -1],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    result = train(
        tmp_path / "boxes" / "images", tmp_path / "train.json", tmp_path / "a.safetensors", val=tmp_path / "val.json",
        **MODEL, **ABOVE,
    )  # fmt: skip
    assert (result.plan.training, result.plan.validation) == (8, 4)
    assert result.scores is not None
    assert result.scores.images == 4
    counts = {row.name: row.count for row in result.scores.classes}
    expected = [shape.kind for scene in drawn[8:] for shape in scene.shapes]
    assert counts == {"square": expected.count(0), "circle": expected.count(1), "triangle": expected.count(2)}


def test_only_epochs_of_the_interval_and_the_last_are_validated(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "classify")
    options = {**MODEL, **SETTINGS["classify"], "epochs": 5}
    every = train(images, labels, tmp_path / "a.safetensors", **options)
    some = train(images, labels, tmp_path / "b.safetensors", val_interval=2, **options)
    assert [each.score is not None for each in some.epochs] == [False, True, False, True, True]
    assert [each.score for each in some.epochs[1::2]] == [each.score for each in every.epochs[1::2]]
    assert some.epochs[-1].score == every.epochs[-1].score
    scored = {each.number: each.score for each in some.epochs if each.score is not None}
    assert scored[some.best] == max(scored.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "classify"}, r"a COCO file can be used for detection and semantic, not for classification"),
        ({"head": "semantic", "task": "detection"}, r"head semantic is for semantic, and .* for detection"),
        ({"levels": "P9"}, r"level 'P9': levels are C2 to C7 and P2 to P7"),
        ({"val": "2"}, r"val 2: take a share from 0 to 0.9, such as 0.15, or a label file"),
        ({"val": "gone.json"}, r"labels gone.json: there is no such file"),
        ({"unfreeze": 9}, r"unfreeze 9: mobilenet_v2 has 4 stages|unfreeze 9: mobilenet_v2 has 5 stages"),
        ({"unfreeze": 1, "freeze_pyramid": True}, r"unfreeze 1 trains below a pyramid that is frozen"),
        (
            {"neck_variant": "no-lateral", "pyramid": "bifpn", "levels": None},
            r"neck variant no-lateral is for a new fpn",
        ),
        ({"labels": "gone.json"}, r"labels gone.json: there is no such file"),
        ({"output": "a.pt"}, r"output a.pt: trained weights are safetensors: name it .*a.safetensors"),
        ({"output": "gone/a.safetensors"}, r"output folder gone does not exist"),
        ({"log": "gone/log.jsonl"}, r"gone/log.jsonl cannot be written: gone does not exist"),
        ({"plot": "p.txt"}, r"plot p.txt: take a name that ends in .png, .svg, .pdf"),
        ({"learning_rate": 1e6}, r"learning rate 1000000.0: take a number from 0 to 10"),
        ({"device": "cuda:0,cuda:1"}, r"several: start with torchrun"),
        ({"val_interval": 0}, r"val interval 0: take a whole number from 1 to 10000"),
        ({"box_samples": 64}, r"box samples 64 beside head fcos: it is for faster_rcnn and mask_rcnn"),
        ({"head": "faster_rcnn"}, r"convolutions 1 beside head faster_rcnn: it is for fcos and retinanet"),
        ({"channels": 1}, r"channels 1: the norms of the heads need 2 at least"),
        ({"log": "labels.json"}, r"log labels.json: take a name that ends in .jsonl"),
        ({"ema": 1.0}, r"ema 1.0: take a number from 0 to 1"),
        ({"epochs": 0}, r"epochs 0: take auto or a whole number from 1 to 10000"),
    ],
)
def test_odd_requests_are_one_line(
    change: dict[str, Any], message: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = inputs(scenes, "fcos")
    options: dict[str, Any] = {"labels": labels, "output": "a.safetensors", **MODEL, **ABOVE, **change}
    with pytest.raises(FpnxError, match=message) as caught:
        train(images, options.pop("labels"), options.pop("output"), **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_odd_files_of_maps_are_one_line(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "fcos")
    extract(images, tmp_path / "c5.h5", levels="C5", device="cpu", **MODEL)
    extract(images, tmp_path / "pooled.h5", levels="C4,C5", pool="avg", device="cpu", **MODEL)

    def run(name: str, **options: Any) -> None:
        train(tmp_path / name, labels, tmp_path / "a.safetensors", **{**ABOVE, **options})

    with pytest.raises(FpnxError, match=r"c5.h5 has C5, and C4 is needed too: extract it again with --levels C4,C5"):
        run("c5.h5")
    with pytest.raises(FpnxError, match=r"pooled.h5 holds pooled maps \(avg\): extract it again without --pool"):
        run("pooled.h5")
    with pytest.raises(FpnxError, match=r"unfreeze 1 beside a file of maps, for which the backbone is not run"):
        run("c5.h5", unfreeze=1)
    with pytest.raises(FpnxError, match=r"c5.h5 is a file of maps, and other inputs are not: give maps or images"):
        train([tmp_path / "c5.h5", images], labels, tmp_path / "a.safetensors", **ABOVE)
    (tmp_path / "junk.h5").write_text("junk")
    with pytest.raises(FpnxError, match=r"junk.h5 is not an HDF5 file"):
        run("junk.h5")
    with pytest.raises(FpnxError, match=r"backbone beside a file of maps, which has its own: leave backbone out"):
        run("c5.h5", backbone="resnet18")
    run("c5.h5", levels="C5")  # a head alone
    assert load_trained(tmp_path / "a.safetensors").model.levels == ("C5",)


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "fcos")
    extract(images, tmp_path / "maps.h5", levels="C4-C5", device="cpu", **MODEL)
    with h5py.File(tmp_path / "maps.h5", "r+") as file:
        file["pyramids/64x64/C5"][:] = 3e38
    with pytest.raises(FpnxError, match=r"the loss is no longer finite in epoch 1: take a lower --learning-rate than"):
        train(tmp_path / "maps.h5", labels, tmp_path / "a.safetensors", **ABOVE)
    with h5py.File(tmp_path / "maps.h5", "r+") as file:
        file["pyramids/64x64/C5"][:] = np.nan
    with pytest.raises(FpnxError, match=r"no image of the training could be read: see the messages above"):
        train(tmp_path / "maps.h5", labels, tmp_path / "a.safetensors", **ABOVE)


def test_an_image_whose_maps_or_mask_cannot_be_used_is_left_out(scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "semantic")
    options = {**SETTINGS["semantic"], "levels": "P4-P5"}
    extract(images, tmp_path / "maps.h5", levels="C4-C5", dtype="float16", device="cpu", **MODEL)
    with h5py.File(tmp_path / "maps.h5", "r+") as file:
        file["pyramids/64x64/C5"][3, 0, 0, 0] = np.inf
    shutil.copytree(labels, tmp_path / "masks")
    Image.new("L", (10, 10)).save(tmp_path / "masks" / "0005.png")
    result = train(tmp_path / "maps.h5", tmp_path / "masks", tmp_path / "a.safetensors", **options)
    assert result.exit_code == 1
    assert result.failed == {
        "0003.png": "its maps have NaN or infinite values: extract it again with --dtype float32",
        "0005.png": "its mask has 10×10 pixels (height × width), and the image 96×64",
    }
    for mask in (tmp_path / "masks").iterdir():
        Image.new("L", (10, 10)).save(mask)
    for source in (tmp_path / "maps.h5", images):
        model = MODEL if source == images else {}
        with pytest.raises(FpnxError, match=r"no image of the training could be read: see the messages above"):
            train(source, tmp_path / "masks", tmp_path / "a.safetensors", overwrite=True, **model, **options)


@pytest.mark.parametrize(
    "levels", [{"levels": "C4-C5"}, {"levels": "P4-P5", "pyramid": "image"}], ids=["taps", "image"]
)
def test_channels_are_those_of_the_head_where_there_is_no_neck(levels: dict, scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, "fcos")
    train(images, labels, tmp_path / "a.safetensors", **MODEL, **{**ABOVE, **levels, "epochs": 1}, val=0)
    trained = load_trained(tmp_path / "a.safetensors")
    assert trained.head.settings()["channels"] == ABOVE["channels"]
    assert set(trained.head.adapters) == set(trained.model.levels)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["retinanet", "faster_rcnn", "mask_rcnn"])
def test_other_heads_are_trained_scored_and_saved(head: str, scenes: Path, tmp_path: Path) -> None:
    images, labels = inputs(scenes, head)
    options = {**ABOVE, "convolutions": None, "epochs": 1}
    result = train(images, labels, tmp_path / "a.safetensors", head=head, val=0.5, **MODEL, **options)
    assert result.scores is not None
    assert ("mask_AP" in result.scores.values) == (head == "mask_rcnn")
    assert ("proposal_AR100" in result.scores.values) == (head != "retinanet")
    assert ("loss_mask" in result.epochs[0].losses) == (head == "mask_rcnn")
    assert load_trained(tmp_path / "a.safetensors").head.kind == head


def test_the_command_line(scenes: Path, fpnx: Run, tmp_path: Path) -> None:
    code, out, error = fpnx(*command(scenes, "a.safetensors", "--json", "--epochs", 1))
    assert code == 0, error
    shown = document(out)
    assert shown["head"] == "fcos"
    assert shown["labels"]["labelled"] == 12
    assert shown["history"][0]["images"] == 10
    assert shown["parameters"]["backbone"]["trained"] == 0
    code, out, error = fpnx(*command(scenes, "b.safetensors", "--epochs", 1, "--freeze-pyramid"))
    assert code == 0, error
    assert "frozen: backbone 2.22 M, pyramid" in " ".join(out.split())
    assert "weights of epoch 1 are in b.safetensors" in out
    code, _, error = fpnx("train", str(scenes), "--labels", "")
    assert code == 2
    code, _, error = fpnx("train", str(scenes))
    assert (code, error.count("\n")) == (2, 1)
