"""Extraction from end to end: values compared with torchvision's, the output, and invalid requests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms import functional

import fpnx as package
from fpnx.core.events import Listener
from tests.helpers.boxes import labelled_pictures
from tests.helpers.files import ROOT, SAMPLES, copied, noise_image
from tests.helpers.process import document, process
from tests.models.test_pyramid_model import IN_CHANNELS, NODES

Run = Callable[..., Any]
TINY = ("--weights", "random", "--backbone", "mobilenet_v2", "--size", "64", "--channels", "8")
TINY_OPTIONS: dict[str, Any] = {"weights": "random", "backbone": "mobilenet_v2", "size": 64, "channels": 8}


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_features_equal_those_of_torchvision(fpnx: Run, backbone: str) -> None:
    code, out, _ = fpnx("extract", "--backbone", backbone, "--weights", "random", SAMPLES)
    assert code == 0
    for line in (
        "P2 4 256 56 × 56 3.211",
        "P3 8 256 28 × 28 0.803",
        "P4 16 256 14 × 14 0.201",
        "P5 32 256 7 × 7 0.050",
    ):
        assert line in " ".join(out.split()), out
    assert "untrained (random, seed 0)" in out
    assert "random projection of C" in out
    with h5py.File("out.h5") as file:
        assert [file[level].shape for level in ("P2", "P3", "P4", "P5")] == [
            (5, 256, 56, 56), (5, 256, 28, 28), (5, 256, 14, 14), (5, 256, 7, 7),
        ]  # fmt: skip
        names = list(file["images/path"].asstr(errors="surrogateescape"))
        assert names == ["animals/chelsea.jpg", "astronaut.jpg", "coffee.jpg", "hubble_deep_field.jpg", "rocket.jpg"]
        assert file["images/status"][:].tolist() == [1] * 5
        assert file["images/source_size"][4].tolist() == [427, 300]
        stored = {level: file[level][:] for level in ("P2", "P3", "P4", "P5")}

    model = package.create_model(backbone, weights="random")
    state = model.state_dict()
    body = create_feature_extractor(
        models.get_model(backbone, weights=None).eval(), {node: f"C{k + 2}" for k, node in enumerate(NODES[backbone])}
    )
    body.load_state_dict({key[5:]: value for key, value in state.items() if key.startswith("body.")})
    fpn = FeaturePyramidNetwork(IN_CHANNELS[backbone], 256)
    fpn.load_state_dict({key[4:]: value for key, value in state.items() if key.startswith("fpn.")})
    for index, name in enumerate(names):
        with Image.open(SAMPLES / name) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
        pixels = functional.to_tensor(functional.resize(upright, [224, 224], antialias=True))
        image = functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
        with torch.no_grad():
            expected = fpn(OrderedDict(body.eval()(image)))
        for level, value in zip(stored, expected.values(), strict=True):
            assert np.abs(stored[level][index] - value[0].numpy()).max() <= 1e-5 * value.abs().max(), (name, level)


@pytest.mark.parametrize("batch_size", ["1", "8", "auto"])
def test_features_do_not_depend_on_the_other_images_of_a_batch(fpnx: Run, samples: Path, batch_size: str) -> None:
    """The same image alone, among eight, and among images of other sizes."""
    copied(samples, Path("many"), 9)
    options = ("--weights", "random", "--backbone", "resnet18", "--channels", "16", "--short-side", "96")
    assert fpnx("extract", "many/00002.jpg", *options, "-o", "alone.h5")[0] == 0
    assert fpnx("extract", "many", *options, "-o", "many.h5", "--batch-size", batch_size)[0] == 0
    with package.open("alone.h5") as alone, package.open("many.h5") as many:
        assert len(many.sizes) == 4
        for level in alone.levels:
            one = alone["00002.jpg"][level]
            for name in ("00002.jpg", "00007.jpg"):  # the same photograph twice
                assert np.abs(many[name][level] - one).max() <= 1e-5 * np.abs(one).max()


def test_two_runs_give_the_same_file(fpnx: Run, photos: Path) -> None:
    for name in ("one.h5", "two.h5"):
        assert fpnx("extract", photos, *TINY, "-o", name)[0] == 0
    with package.open("one.h5") as one, package.open("two.h5") as two:
        assert one.fingerprint == two.fingerprint
        assert all(np.array_equal(a[level], b[level]) for a, b in zip(one, two, strict=True) for level in one.levels)


def test_an_image_is_not_replaced_by_the_output(fpnx: Run, photos: Path) -> None:
    before = (photos / "a.jpg").read_bytes()
    code, _, error = fpnx("extract", "photos", "--weights", "random", "-o", "photos/a.jpg", "--overwrite")
    assert code == 2
    assert "output photos/a.jpg is read by this run, and would be lost: name another with -o" in error
    assert (photos / "a.jpg").read_bytes() == before


def test_ragged_sizes(fpnx: Run, photos: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"no image")
    code, out, _ = fpnx(
        "extract", photos, "--weights", "random", "--backbone", "vgg16", "--size", "native", "--channels", "8"
    )
    assert code == 1
    assert "96×64" in out
    assert "and 2 other input sizes" in out
    with package.open("out.h5") as store:
        assert store.sizes == [(50, 70), (64, 96), (70, 50), (80, 80), (96, 64)]
        broken = store.index("broken.jpg")
        assert (store.padded_sizes[broken], int(store.rows[broken])) == (None, -1)
        assert store.padded_sizes[store.index("a.jpg")] == store.padded_sizes[store.index("d.webp")] == (64, 96)
        assert store["b.JPG"]["P2"].shape == (8, 24, 16)
        assert store["below/e.jpeg"].input_size == store["below/e.jpeg"].source_size == (70, 50)
        with pytest.raises(LookupError, match="not an image that fpnx reads"):
            store["broken.jpg"]


def test_images_that_are_too_small_for_the_backbone(fpnx: Run, photos: Path) -> None:
    noise_image(0, (16, 40)).save(photos / "slim.png")
    code, _, _ = fpnx(
        "extract", photos, "--weights", "random", "--backbone", "vgg16", "--size", "native", "--channels", "8"
    )
    assert code == 1
    with package.open("out.h5") as store:
        assert store.failures() == [
            ("slim.png", "vgg16 cannot take an input of 40×16: the smallest square it takes is 32×32")
        ]
        assert int((store.status == 1).sum()) == 6


def test_failed_images_do_not_stop_a_run(fpnx: Run, photos: Path) -> None:
    (photos / "b.JPG").write_bytes(b"<html>")
    (photos / "z.png").write_bytes(b"")
    code, out, _ = fpnx("extract", photos, *TINY)
    assert code == 1
    assert "2 images failed:" in out
    assert "  b.JPG: an HTML page, not an image" in out
    assert "  z.png: empty file" in out
    with h5py.File("out.h5") as file:
        assert file["images/status"][:].tolist() == [1, 2, 1, 1, 1, 1, 2]
        assert np.isnan(file["P3"][1]).all()
        assert np.isfinite(file["P3"][0]).all()
        assert file["images/error"][6] == b"empty file"
    assert fpnx("extract", photos, *TINY, "-o", "tolerant.h5", "--max-failed", "2")[0] == 0
    assert fpnx("extract", photos, *TINY, "-o", "share.h5", "--max-failed", "20%")[0] == 1


def test_pooling_is_over_valid_cells(fpnx: Run, photos: Path) -> None:
    assert fpnx("extract", photos, *TINY, "--levels", "C3,P3", "-o", "maps.h5")[0] == 0
    for pool, reduce in (("avg", np.mean), ("max", np.max)):
        assert fpnx("extract", photos, *TINY, "--levels", "C3,P3", "--pool", pool, "-o", f"{pool}.h5")[0] == 0
        with package.open("maps.h5") as maps, package.open(f"{pool}.h5") as pooled:
            for whole, small in zip(maps, pooled, strict=True):
                assert small["P3"].shape == (8, 1, 1)
                expected = reduce(whole["C3"], axis=(1, 2))
                assert np.allclose(small["C3"][:, 0, 0], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    assert fpnx("extract", photos, *TINY, "--pool", "3x2", "-o", "grid.h5")[0] == 0
    with package.open("grid.h5") as grid:
        assert grid[0]["P2"].shape == grid[0]["P5"].shape == (8, 3, 2)


def test_values_too_small_for_float16_are_reported(fpnx: Run, photos: Path) -> None:
    # Drawn at random, MobileNetV2's maps shrink from stage to stage, down to 1e-9.
    options = ["--weights", "random", "--backbone", "mobilenet_v2", "--size", "64", "--overwrite", "-o", "o.h5"]
    code, out, _ = fpnx("extract", photos, *options, "--dtype", "float16")
    assert code == 0
    assert "P5 are too small for float16" in out
    _, out, _ = fpnx("extract", photos, *options)
    assert "too small" not in out
    code, out, _ = fpnx("extract", photos, *options, "--dtype", "float16", "--backbone", "vgg16", "--levels", "C2,C5")
    assert (code, "too small" in out) == (0, False)


def test_values_too_large_for_float16_are_reported(fpnx: Run, photos: Path) -> None:
    model = package.create_model("mobilenet_v2", weights="random", levels="P4-P5", channels=8)
    model.fpn.layer_blocks[-1][0].weight.data.mul_(1e18)
    package.save_weights(model, "large.safetensors")
    options = ["--weights", "large.safetensors", "--size", "64", "--overwrite", "--device", "cpu"]
    text = "values of P5 are beyond float16's ±65504 and stored as inf: store --dtype float32"
    code, out, _ = fpnx("extract", photos, *options, "--dtype", "float16", "-o", "o.h5")
    assert (code, text in out) == (0, True)
    assert "eps" not in out  # the file leaves it to the network
    assert text in fpnx("info", "o.h5")[1]
    facts = document(fpnx("info", "o.h5", "--json")[1])
    assert (facts["too_large"], facts["nonfinite"]["P4"]) == (["P5"], 0)
    _, out, _ = fpnx("extract", photos, *options, "--dtype", "float16", "--format", "png", "-o", "pictures")
    assert text in out
    _, out, _ = fpnx("extract", photos, *options, "-o", "o.h5", "--json")
    assert (document(out)["too_large"], sum(document(out)["nonfinite"].values())) == ([], 0)


def test_facts_without_a_value_are_not_shown(fpnx: Run, photos: Path) -> None:
    torch.save(models.mobilenet_v2(weights=None).state_dict(), "body.pth")
    options = ["--weights", "body.pth", "--backbone", "mobilenet_v2", "--size", "64", "--dry-run"]
    code, out, _ = fpnx("extract", photos, *options)
    assert (code, "pixel order RGB" in out, "eps" in out) == (0, True, False)
    assert "by option   norm eps 0.001" in fpnx("extract", photos, *options, "--norm-eps", "0.001")[1]


def test_float16(fpnx: Run, photos: Path) -> None:
    options = ("--weights", "random", "--backbone", "resnet18", "--size", "64", "--channels", "8")
    assert fpnx("extract", photos, *options, "-o", "single.h5")[0] == 0
    assert fpnx("extract", photos, *options, "-o", "half.h5", "--dtype", "float16")[0] == 0
    with package.open("single.h5") as single, package.open("half.h5") as half:
        assert half[0]["P2"].dtype == np.float16
        expected = single[0]["P2"].astype(np.float16)
        assert np.allclose(half[0]["P2"], expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def test_json(fpnx: Run, photos: Path) -> None:
    (photos / "bad.gif").write_bytes(b"GIF")
    code, out, _ = fpnx("extract", photos, *TINY, "--json")
    facts = document(out)
    assert code == facts["exit_code"] == 1
    assert (facts["images"], facts["done"], facts["computed"]) == (7, 6, 7)
    assert facts["failed"][0]["path"] == "bad.gif"
    assert facts["weights"]["pyramid"] == {"trained": False, "source": "random, seed 0"}
    assert [row["level"] for row in facts["levels"]] == ["P2", "P3", "P4", "P5"]
    assert facts["levels"][0] == {
        "input_size": "64x64", "images": 7, "level": "P2", "stride": 4, "channels": 8, "height": 16, "width": 16,
        "bytes_per_image": 8192,
    }  # fmt: skip
    assert set(facts["ms_per_image"]) == {"decode", "resize", "forward", "write"}
    code, out, _ = fpnx("extract", "nowhere", *TINY, "--json", "-o", "new.h5")
    assert code == 2
    assert "nowhere" in document(out)["error"]
    _, out, _ = fpnx("info", "out.h5", "--json")
    assert document(out)["images"] == {"total": 7, "pending": 0, "done": 6, "failed": 1}


def test_dry_run_writes_nothing(fpnx: Run, photos: Path) -> None:
    code, out, _ = fpnx("extract", photos, *TINY, "--dry-run")
    assert code == 0
    assert "nothing was computed or written" in out
    assert "6 in" in out
    assert sorted(os.listdir()) == ["photos"]


def test_limit(fpnx: Run, photos: Path) -> None:
    assert fpnx("extract", photos, *TINY, "--limit", "2")[0] == 0
    with package.open("out.h5") as store:
        assert store.paths == ["a.jpg", "b.JPG"]


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_lower_precision_gives_nearly_the_same(fpnx: Run, photos: Path, precision: str) -> None:
    options = ("--weights", "random", "--backbone", "vgg16", "--size", "64", "--channels", "8")
    assert fpnx("extract", photos, *options, "-o", "single.h5")[0] == 0
    assert fpnx("extract", photos, *options, "-o", "low.h5", "--precision", precision)[0] == 0
    with package.open("single.h5") as single, package.open("low.h5") as low:
        assert low.config["precision"] == precision
        assert low.fingerprint != single.fingerprint
        for level in low.levels:
            error = np.abs(low[0][level] - single[0][level]).max() / np.abs(single[0][level]).max()
            assert 0 < error < 0.05


def test_tf32_is_refused_on_the_cpu(fpnx: Run, photos: Path) -> None:
    code, out, err = fpnx("extract", photos, *TINY, "--device", "cpu", "--precision", "tf32")
    assert (code, out) == (2, "")
    assert "precision tf32 is of CUDA devices: take float32" in err
    assert os.listdir() == ["photos"]


def test_info_and_its_snippet(fpnx: Run, photos: Path) -> None:
    for options in (("--size", "64"), ("--short-side", "64")):
        Path("out.h5").unlink(missing_ok=True)
        assert fpnx("extract", photos, *TINY[:4], "--channels", "8", *options)[0] == 0
        code, out, _ = fpnx("info", "out.h5")
        assert code == 0
        assert "6 done, 0 failed, 0 pending" in out
        snippet = out.partition("read it with h5py alone:")[2]
        assert "h5py.File" in snippet
        done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("a.jpg (8, 16, ")


def test_info_refuses_other_files(fpnx: Run) -> None:
    with h5py.File("other.h5", "w") as file:
        file["x"] = [1]
    Path("text.h5").write_text("no")
    for name, message in (
        ("other.h5", "not one of fpnx's"),
        ("text.h5", "is not an HDF5 file"),
        ("none.h5", "does not exist"),
    ):
        code, out, err = fpnx("info", name)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


BAD = {
    "unknown backbone": (("photos", "--weights", "random", "--backbone", "resnet5"), "did you mean resnet50"),
    "levels": (("photos", "--weights", "random", "--levels", "C6"), "has no level C6"),
    "size": (
        ("photos", "--weights", "random", "--backbone", "vgg16", "--size", "16"),
        "smallest square it takes is 32×32",
    ),
    "missing input": (("nowhere", "--weights", "random"), "nowhere: No such file"),
    "no images": (("empty", "--weights", "random"), "no images in empty"),
    "output exists": (("photos", "--weights", "random", "-o", "there.h5"), "--resume"),
    "output folder": (("photos", "--weights", "random", "-o", "no/where.h5"), "does not exist"),
    "output is a folder": (("photos", "--weights", "random", "-o", "empty"), "is a folder"),
    "weights not to be had": (("photos", "--weights", "imagenet", "--offline"), "resnet50-11ad3fa6.pth"),
    "weights of another": (
        ("photos", "--weights", "VGG16_Weights.IMAGENET1K_V1", "--backbone", "resnet50"),
        "for vgg16",
    ),
    "weights that do not fit": (("photos", "--weights", "other.pt"), "missing"),
    "weights unreadable": (("photos", "--weights", "text.pt"), "cannot read weights from text.pt"),
    "seed": (("photos", "--seed", "-1"), "seed -1"),
    "no such option": (("photos", "--sizes", "3"), "No such option"),
    "no number": (("photos", "--seed", "many"), "Invalid value for '--seed'"),
    "size twice": (("photos", "--size", "64", "--short-side", "64"), "contradict"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_requests(
    fpnx: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", "torch_home")
    Path("empty").mkdir()
    Path("there.h5").write_bytes(b"something dear")
    Path("text.pt").write_text("no weights")
    model = package.create_model("mobilenet_v2", weights="random", channels=8)
    state = model.state_dict()
    del state["body.features.0.0.weight"]
    package.save_weights(model, "other.pt")
    saved = torch.load("other.pt")
    saved["state_dict"] = state
    torch.save(saved, "other.pt")
    code, out, err = fpnx("extract", *arguments)
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert Path("there.h5").read_bytes() == b"something dear"
    assert not list(Path().glob("*.part"))
    assert not list(Path().glob("*.lock"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_on_a_machine_without_it(fpnx: Run, photos: Path) -> None:
    code, _, err = fpnx("extract", photos, *TINY, "--device", "cuda")
    assert code == 2
    assert "no CUDA device can be used here" in err


def test_too_little_disk_space_is_an_error_before_any_work(
    fpnx: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Planned(Listener):
        def planned(self, plan: Any) -> None:
            raise AssertionError("work began")

    free = shutil.disk_usage(".").free
    count = free // (64 * 3_000_000) + 1
    for i in range(min(count, 40)):
        os.link(photos / "a.jpg", photos / f"{i}.jpg")
    size = 4096 if count <= 40 else int((free / 40 / 256 / 4 * 16) ** 0.5) + 32
    with pytest.raises(package.FpnxError, match=r"too little disk space for .*GB are free"):
        package.extract(
            [photos], "out.h5", weights="random", size=min(size, 65535), max_pixels=2**33, listener=Planned()
        )
    assert not Path("out.h5.part").exists()


def test_overwrite_keeps_the_old_file_until_the_new_one_is_complete(fpnx: Run, photos: Path) -> None:
    assert fpnx("extract", photos, *TINY)[0] == 0
    assert fpnx("extract", photos, *TINY, "--seed", "1", "--overwrite")[0] == 0
    with package.open("out.h5") as store:
        assert store.config["seed"] == 1


def test_the_function_does_what_the_command_does(photos: Path, tmp_path: Path) -> None:
    result = package.extract(photos, tmp_path / "f.h5", levels="P4", **TINY_OPTIONS)
    assert (result.done, result.images, result.exit_code, result.complete) == (6, 6, 0, True)
    assert result.failed == ()
    assert result.images_per_second > 0
    with pytest.raises(TypeError, match="bakbone"):
        package.extract(photos, tmp_path / "g.h5", bakbone="vgg16")


def test_extraction_in_another_thread(photos: Path, tmp_path: Path) -> None:
    """Signals can be handled in the main thread only; in other threads a run does not handle them."""
    import threading

    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(package.extract(photos, tmp_path / "t.h5", levels="P4", **TINY_OPTIONS))
    )
    thread.start()
    thread.join()
    assert results[0].done == 6


def test_as_a_process(tmp_path: Path, photos: Path) -> None:
    done = process("extract", photos, *TINY, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "6 of 6 images")
    assert "6 of 6 images are in out.h5" in done.stdout
    again = process("extract", photos, *TINY, cwd=tmp_path)
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, samples: Path) -> None:
    with Image.open(samples / "coffee.jpg") as picture:
        picture.resize((1024, 768)).save(tmp_path / "one.jpg", quality=90)
    peaks = {}
    for count in (60, 600):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        for i in range(count):
            os.link(tmp_path / "one.jpg", folder / f"{i:04}.jpg")
        code = (
            "import resource, fpnx; "
            f"fpnx.extract({str(folder)!r}, {str(folder) + '.h5'!r}, backbone='mobilenet_v2', weights='random', "
            "pool='avg', size=96); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout)
    assert peaks[600] <= 1.1 * peaks[60]
    assert (tmp_path / "600.h5").stat().st_size < 4e6


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="ctrl-c"),
        pytest.param(signal.SIGTERM, 143, id="term", marks=pytest.mark.slow),
    ],
)
def test_interrupts_say_what_is_kept(
    fpnx: Run, tmp_path: Path, samples: Path, signum: signal.Signals, code: int
) -> None:
    copied(samples, tmp_path / "many", 60)
    arguments = ["extract", "many", *TINY, "--batch-size", "1", "--json"]
    running = subprocess.Popen(
        [sys.executable, "-m", "fpnx", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "out.h5.part").exists():
        assert running.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    running.send_signal(signum)
    out, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert "continue with --resume" in document(out)["error"]
    assert "stopping after this batch" in err
    with package.open(tmp_path / "out.h5.part") as store:
        done = int((store.status == 1).sum())
        assert document(out)["error"].startswith(f"interrupted: {done} of 60 images are done")
        assert done < 60
    code, out, err = fpnx(*arguments, "--resume")
    assert code == 0, err
    assert document(out)["computed"] == 60 - done


def test_bands_and_a_range_are_read_kept_and_compared(fpnx: Run, tmp_path: Path) -> None:
    """Five bands of a TIFF give the features of the same picture as a PNG, and both verify."""
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "bands").mkdir()
    (tmp_path / "plain").mkdir()
    values = np.random.default_rng(0).integers(0, 3001, (80, 96, 5)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "bands/a.tif", values, photometric="minisblack", planarconfig="contig")
    scaled = np.rint(values[..., [3, 2, 1]] / 3000 * 255).astype(np.uint8)
    Image.fromarray(scaled).save(tmp_path / "plain/a.png")
    options = (*TINY, "--levels", "P4", "--device", "cpu")  # a GPU's numbers differ from run to run
    assert fpnx("extract", "plain", *options, "-o", "plain.h5")[0] == 0
    code, out, _ = fpnx("extract", "bands", *options, "-o", "none.h5")
    assert code == 1
    assert "choose with --bands, as in --bands 1 or --bands 3,2,1" in out
    options = (*options, "--bands", "4,3,2", "--value-range", "0,3000")
    assert fpnx("extract", "bands", *options, "-o", "bands.h5")[0] == 0
    with package.open("plain.h5") as plain, package.open("bands.h5") as bands:
        assert np.array_equal(plain[0]["P4"], bands[0]["P4"])
        assert plain.fingerprint != bands.fingerprint
        assert not {"bands", "source_range"} & set(plain.config["recipe"])
        assert (bands.config["recipe"]["bands"], bands.config["recipe"]["source_range"]) == ([4, 3, 2], "0,3000")
        assert bands.provenance.recipe.startswith("bands 4,3,2, values 0,3000, stretched to 64×64")
    assert fpnx("verify", "bands.h5", "--against", "bands")[0] == 0
    code, _, err = fpnx("extract", "bands", *TINY, "--levels", "P4", "-o", "bands.h5", "--resume")
    assert code == 2
    assert "recipe" in err
    assert fpnx("visualize", "bands.h5", "-o", "stored")[0] == 0
    code, out, err = fpnx("visualize", "bands", *TINY[:6], "--bands", "4,3,2", "--value-range", "0,3000", "-o", "drawn")
    assert code == 0, (out, err)
    assert fpnx("extract", "bands", *options, "--format", "png", "-o", "png")[0] == 0


def test_what_was_decided_about_images_is_noted(fpnx: Run, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        Image.new("RGBA", (40, 30), (i, 9, 9, 100)).save(folder / f"clear{i}.png")
    Image.fromarray(np.tile(np.arange(4096, dtype=np.uint16), (40, 1))).save(folder / "dark.png")
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    code, out, _ = fpnx("extract", folder, *TINY)
    assert code == 0
    for line in (
        "2 images: transparency was laid over white",
        "1 image: almost flat after scaling to 8 bits, since little of the range is used: see --value-range",
        "1 image: only the first of several frames or pages was read",
    ):
        assert line in out.splitlines()
    _, out, _ = fpnx("extract", folder, *TINY, "--overwrite", "--json")
    assert document(out)["image_notes"] == {"transparency": 2, "almost_flat": 1, "more_frames": 1}
    _, out, _ = fpnx("extract", folder, *TINY, "--format", "png", "--json")
    assert document(out)["image_notes"] == {"transparency": 2, "almost_flat": 1, "more_frames": 1}
    _, out, _ = fpnx("extract", folder, *TINY, "--resume", "--json")
    assert document(out)["image_notes"] == {}, "nothing was computed"


def test_turned_tiffs_at_their_own_size(fpnx: Run, tmp_path: Path) -> None:
    (tmp_path / "turned").mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for ending in ("png", "tif"):
            noise_image(0, (96, 64)).save(tmp_path / f"turned/{orientation}.{ending}", exif=exif)
    for size in (("--size", "native"), ("--short-side", "64")):
        code, out, _ = fpnx("extract", "turned", *TINY[:4], "--levels", "C4", *size, "--overwrite")
        assert code == 0, out
        with package.open("out.h5") as store:
            for orientation in range(1, 9):
                one, other = store[f"{orientation}.png"], store[f"{orientation}.tif"]
                assert one.source_size == other.source_size == ((64, 96) if orientation < 5 else (96, 64))
                np.testing.assert_allclose(other["C4"], one["C4"], atol=1e-5 * np.abs(one["C4"]).max())


def test_boxes_on_the_command_line(fpnx: Run, tmp_path: Path) -> None:
    labelled_pictures(tmp_path / "photos", (2, 0, 5))
    line = ("extract", "photos/", "--boxes", "photos.json", "-o", "regions.h5", "--roi-size", "3x2", *TINY)
    code, out, err = fpnx(*line, "--dry-run", "--json")
    plan = document(out)
    assert (code, plan["regions"]["count"], plan["regions"]["bytes_per_region"]) == (0, 7, 8 * 6 * 4)
    assert "boxes photos.json: 1 image without boxes" in err
    code, out, _ = fpnx(*line)
    assert code == 0
    assert "regions 7 regions in 2 images, 8×3×2 each, 0.2 kB" in " ".join(out.split())
    assert "3 of 3 images are in regions.h5" in out
    assert plan["bytes_needed"] >= Path("regions.h5").stat().st_size
    code, out, _ = fpnx("info", "regions.h5")
    assert "regions 7 regions in 2 images, 8×3×2 each" in " ".join(out.split())
    snippet = out.partition("read it with h5py alone:")[2]
    run = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path)
    assert "(8, 3, 2)" in run.stdout, run.stderr
    assert document(fpnx("info", "regions.h5", "--json")[1])["regions"] == plan["regions"]
    code, out, _ = fpnx("verify", "regions.h5", "--against", "photos/")
    assert (code, "verified: complete, finite as counted, and the same when computed again" in out) == (0, True)
    code, _, err = fpnx("visualize", "regions.h5")
    assert (code, "no maps of P2 in regions.h5, which has regions" in err) == (2, True)
    code, _, err = fpnx("extract", "photos/", "--roi-size", "3", *TINY)
    assert (code, "roi size 3x3 is for boxes: give --boxes LABELS beside it" in err) == (2, True)
