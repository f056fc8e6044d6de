"""`fpnx visualize` and `fpnx extract --format png`: drawn pictures, output paths and refused requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import fpnx as package
from fpnx.core.errors import FpnxError, ImageError
from fpnx.visualization.class_colours import class_colour
from fpnx.visualization.png_files import PngPaths, save_png
from fpnx.visualization.selection import select
from tests.helpers.files import ROOT, noise_image
from tests.helpers.process import document, process
from tests.helpers.trained import trained_file

SMALL = ("--backbone", "mobilenet_v2", "--weights", "random", "--channels", "8", "--size", "64")
SMALL_PHOTOGRAPHS = (*SMALL[:4], "--size", "64", "--levels", "P3")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos/` and the two files `a.h5` and `b.h5` made from them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos/below").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "below/a.png", "below/c.png")):
        noise_image(i, (96, 64)).save(folder / "photos" / name)
    shared = {"backbone": "mobilenet_v2", "weights": "random", "channels": 8, "size": 64}
    package.extract(folder / "photos", folder / "a.h5", levels="C3,P3,P5", **shared)
    package.extract(folder / "photos", folder / "b.h5", levels="P4", seed=3, **shared)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`, which is the current folder of `fpnx`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def pictures(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_pictures_of_a_file(here: Path, fpnx: Run) -> None:
    code, out, _ = fpnx("visualize", "a.h5")
    assert code == 0
    assert pictures(here / "a_png") == ["a.png.png", "b.jpg.png", "below/a.png.png", "below/c.png.png"]
    assert "pictures in a_png: 4" in out
    with Image.open(here / "a_png/a.png.png") as picture:
        assert picture.text["Title"] == "a.png"  # type: ignore[attr-defined]
        assert "pyramid: untrained (random, seed 0)" in picture.text["Description"]  # type: ignore[attr-defined]


def test_nothing_is_overwritten_without_the_option(here: Path, fpnx: Run) -> None:
    fpnx("visualize", "a.h5", "--images", "b.jpg")
    before = (here / "a_png/b.jpg.png").read_bytes()
    code, _, err = fpnx("visualize", "a.h5", "--mode", "std")
    assert code == 2
    assert "1 of the pictures is there already" in err
    assert "--overwrite" in err
    assert pictures(here / "a_png") == ["b.jpg.png"]
    assert fpnx("visualize", "a.h5", "--mode", "std", "--overwrite")[0] == 0
    assert (here / "a_png/b.jpg.png").read_bytes() != before


@pytest.mark.parametrize("mode", ["energy", "pca", "channels"])
def test_the_same_file_gives_the_same_pictures_bit_for_bit(mode: str, here: Path, fpnx: Run) -> None:
    fpnx("visualize", "a.h5", "--mode", mode, "-o", "one", "--images", "0")
    fpnx("visualize", "a.h5", "--mode", mode, "-o", "two")
    assert (here / "one/a.png.png").read_bytes() == (here / "two/a.png.png").read_bytes()


def test_the_limit_counts_the_rest(here: Path, fpnx: Run) -> None:
    code, out, _ = fpnx("visualize", "a.h5", "--limit", "3", "--json")
    report = document(out)
    assert (code, len(report["pictures"]), report["left_out"]) == (0, 3, 1)


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (None, [0, 1, 2, 3, 4]),
        (["1"], [1]),
        (["3"], [4]),  # a name takes precedence over an index
        (["b/*", "0"], [0, 2, 3]),
        (["1:3"], [1, 2]),
        ([":2"], [0, 1]),
        (["4:", "a.jpg"], [0, 4]),
        (["*.jpg"], [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_select(wanted: list[str] | None, rows: list[int]) -> None:
    assert select(["a.jpg", "b.jpg", "b/1.jpg", "b/2.jpg", "3"], wanted) == rows


@pytest.mark.parametrize("wanted", ["caf\u00e9.png", "cafe\u0301.png", "c*\u00e9.*", "caf[\u00e9].png"])
def test_select_by_names_in_another_normalisation(wanted: str) -> None:
    assert select(["a.jpg", "cafe\u0301.png"], [wanted]) == [1]
    assert select(["caf\u00e9.png", "b.png"], [wanted]) == [0]


@pytest.mark.parametrize("wanted", ["a.jpeg", "7", "5:9", "x*", ":"], ids=str)
def test_select_nothing(wanted: str) -> None:
    if wanted == ":":
        assert select(["a.jpg"], [wanted]) == [0]
        return
    with pytest.raises(FpnxError, match=r"did you mean a\.jpg" if wanted == "a.jpeg" else "index from 0 to 0"):
        select(["a.jpg"], [wanted])


def test_each_file_gets_a_row(here: Path, fpnx: Run) -> None:
    assert fpnx("visualize", "a.h5", "b.h5", "--limit", "1")[0] == 0
    one = fpnx("visualize", "a.h5", "--limit", "1")
    assert one[0] == 0
    with Image.open(here / "a_b_png/a.png.png") as both, Image.open(here / "a_png/a.png.png") as single:
        assert both.height > 1.3 * single.height
        assert "seed 3" in both.text["Description"]  # type: ignore[attr-defined]


def test_the_same_photograph_is_found_below_another_root(here: Path, fpnx: Run) -> None:
    fpnx("extract", "photos/below", "-o", "below.h5", *SMALL, "--levels", "P5")
    code, out, _ = fpnx("visualize", "a.h5", "below.h5", "--json", "--images", "below/c.png", "--images", "b.jpg")
    assert code == 0
    assert len(document(out)["pictures"]) == 2  # the row of below.h5 says that it lacks b.jpg


def test_photographs_are_extracted_and_compared(here: Path, fpnx: Run) -> None:
    photographs = ("photos/a.png", "photos/b.jpg")
    options = ("--backbone", "mobilenet_v2", "--backbone", "resnet50", "--weights", "random", "--size", "64")
    code, out, err = fpnx("visualize", *photographs, *options, "--levels", "P5", "--limit", "1", "--json")
    assert code == 0, err
    report = document(out)
    assert (report["pictures"], report["left_out"]) == (["a_png/a.png.png"], 1)
    assert not [path for path in os.listdir(here) if path.endswith((".part", ".lock"))]


def test_requests_for_photographs_are_checked_before_any_is_computed(here: Path, fpnx: Run) -> None:
    shared = ("visualize", "photos", "--backbone", "mobilenet_v2", "--weights", "random", "--size", "64")
    code, out, err = fpnx(*shared, "--mode", "channels", "--pick", "256")
    assert (code, out) == (2, "")
    assert err.splitlines()[1:] == ["fpnx: channel 256 is not in P2: there are 256, from 0 to 255"]
    (here / "photos_png").mkdir()
    (here / "photos_png/a.png.png").touch()
    code, out, err = fpnx(*shared)
    assert (code, out) == (2, "")
    assert err.startswith("fpnx: 1 of the pictures is there already, such as photos_png/a.png.png")
    (here / "text.jpg").write_text("no picture")
    code, out, err = fpnx("visualize", "text.jpg", *shared[2:])
    assert (code, out) == (2, "")
    assert "fpnx: nothing to draw: text.jpg failed: not an image" in err


def test_failed_and_pending_rows_are_skipped_and_named(here: Path, fpnx: Run) -> None:
    with h5py.File(here / "a.h5", "r+") as file:
        file["images/status"][0] = 0
        file["images/status"][1] = 2
        file["images/error"][1] = b"broken data stream"
    code, out, _ = fpnx("visualize", "a.h5")
    assert code == 0
    assert pictures(here / "a_png") == ["below/a.png.png", "below/c.png.png"]
    assert "skipped a.png: is not done yet" in out
    assert "skipped b.jpg: failed: broken data stream" in out
    code, _, err = fpnx("visualize", "a.h5", "--images", "b.jpg", "-o", "x")
    assert code == 2
    assert "nothing to draw in a.h5: b.jpg failed: broken data stream" in err


@pytest.mark.parametrize("mode", ["energy", "pca"])
def test_a_broken_row_is_skipped_and_named(mode: str, here: Path, fpnx: Run) -> None:
    with h5py.File(here / "a.h5", "r+") as file:
        file["images/source_size"][0] = 0
    code, out, err = fpnx("visualize", "a.h5", "--mode", mode, "-o", "x", "--html", "x.html")
    assert code == 0, err
    assert "skipped a.png: a.h5 gives a.png a size of nothing" in out
    assert pictures(here / "x") == ["b.jpg.png", "below/a.png.png", "below/c.png.png"]


def test_a_path_that_leads_out_of_the_folder_is_skipped(here: Path, fpnx: Run) -> None:
    with h5py.File(here / "a.h5", "r+") as file:
        names = file["images/path"][:]
        names[0] = b"../../evil.png"
        file["images/path"][:] = names
    code, out, _ = fpnx("visualize", "a.h5")
    assert code == 0
    assert "skipped ../../evil.png: its stored path" in out
    assert len(pictures(here / "a_png")) == 3
    assert not list(here.parent.rglob("evil.png.png"))


def test_an_unfinished_file_can_be_drawn(here: Path, fpnx: Run) -> None:
    shutil.move(here / "a.h5", here / "c.h5.part")
    assert fpnx("visualize", "c.h5.part", "--limit", "1")[0] == 0
    assert pictures(here / "c_png") == ["a.png.png"]


def test_missing_sources_are_no_error(here: Path, fpnx: Run) -> None:
    shutil.rmtree(here / "photos")
    with h5py.File(here / "a.h5", "r+") as file:
        file.attrs["root"] = str(here / "photos")
    assert fpnx("visualize", "a.h5", "--overlay")[0] == 0
    assert len(pictures(here / "a_png")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.h5"], "none.h5 does not exist"),
        (["a.h5", "photos/a.png"], "name the one or the other"),
        (["a.h5", "--backbone", "vgg16"], "--backbone is for photographs"),
        (["photos/a.png", "--images", "0"], "name the photographs themselves"),
        (["a.h5", "--levels", "P7"], "no level P7 here"),
        (["a.h5", "--mode", "similarity"], "--point X,Y"),
        (["a.h5", "--colormap", "vridis"], "did you mean viridis?"),
        (["a.h5", "-o", "a.h5"], "not a folder"),
        (["a.h5", "-o", "no/where"], "does not exist"),
        (["a.h5", "--html", "a.h5"], "exists"),
        (["a.h5", "--html", "photos"], "is a folder"),
        (["photos/a.png", "--backbone", "vgg16", "--backbone", "vgg16"], "named twice"),
        (["a.h5", "--images", "zzz"], "no image 'zzz' among 4"),
        (["a.h5", "--limit", "0"], "limit 0"),
        (["a.h5", "--levels", "P3", "--mode", "channels", "--pick", "99"], "channel 99 is not in P3: there are 8"),
        (["a.h5", "--levels", "P3", "--mode", "channels", "--top", "10"], "no level has more than 8 channels"),
        (["a.h5", "--mode", "similarity", "--point", "97,1"], "outside every image: none goes beyond 64×96"),
        (["a.h5", "--mode", "similarity", "--point", "101%,1"], "shares go from 0% to 100%"),
    ],
    ids=lambda value: " ".join(value)[:44] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(arguments: list[str], message: str, here: Path, fpnx: Run) -> None:
    code, out, err = fpnx("visualize", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


# Predicted boxes --------------------------------------------------------------------------------------------


def write_predictions(path: Path) -> None:
    """Boxes of two of the images of `made`, as `fpnx predict` writes them."""
    shared = {"image_id": 0, "category_id": 3, "category_name": "cat", "bbox": [20, 10, 30, 40]}
    results = [
        {**shared, "file_name": "a.png", "score": 0.9, "level": "P3"},
        {**shared, "file_name": "a.png", "score": 0.4, "level": "P5"},
        {**shared, "file_name": "below/a.png", "score": 0.6, "level": "P5"},
    ]
    path.write_text(json.dumps(results))


def same(one: Path, other: Path) -> bool:
    with Image.open(one) as first, Image.open(other) as second:
        return first.size == second.size and bool(np.array_equal(np.asarray(first), np.asarray(second)))


def test_predicted_boxes_are_drawn(here: Path, fpnx: Run) -> None:
    write_predictions(here / "p.json")
    code, _, err = fpnx("visualize", "a.h5", "b.h5", "--predictions", "p.json", "-o", "boxes")
    assert code == 0
    assert "p.json has boxes of 2 of 4 images" in err
    assert fpnx("visualize", "a.h5", "b.h5", "--predictions", "p.json", "--threshold", "0.3", "-o", "more")[0] == 0
    (here / "none.json").write_text("[]")
    assert fpnx("visualize", "a.h5", "b.h5", "--predictions", "none.json", "-o", "none")[0] == 0
    colours = {
        name: np.unique(np.asarray(Image.open(here / name)).reshape(-1, 3), axis=0).tolist()
        for name in ("boxes/a.png.png", "none/a.png.png", "boxes/b.jpg.png")
    }
    assert list(class_colour(3)) in colours["boxes/a.png.png"]
    assert list(class_colour(3)) not in colours["none/a.png.png"]
    assert list(class_colour(3)) not in colours["boxes/b.jpg.png"]
    assert not same(here / "boxes/a.png.png", here / "more/a.png.png")
    assert same(here / "boxes/below/a.png.png", here / "more/below/a.png.png")
    assert same(here / "boxes/b.jpg.png", here / "none/b.jpg.png")
    with Image.open(here / "boxes/a.png.png") as picture:
        assert "; boxes of p.json, score ≥ 0.5" in picture.text["Description"]  # type: ignore[attr-defined]


def test_boxes_over_photographs(here: Path, fpnx: Run) -> None:
    write_predictions(here / "p.json")
    code, _, err = fpnx("visualize", "photos", *SMALL_PHOTOGRAPHS, "--predictions", "p.json", "-o", "drawn")
    assert code == 0
    assert "p.json has boxes of 2 of 4 images" in err
    assert fpnx("visualize", "a.h5", "--predictions", "p.json", "--levels", "P3")[0] == 0


def test_boxes_of_a_trained_detector(here: Path, fpnx: Run) -> None:
    trained_file(here / "model.safetensors", "fcos", convolutions=1)
    shared = ("photos", "--weights", "model.safetensors", "--size", "64", "--device", "cpu")
    assert fpnx("extract", *shared, "-o", "out.h5", "--levels", "P3-P7")[0] == 0
    assert fpnx("predict", *shared, "-o", "p.json", "--max-detections", "9")[0] == 0
    results = json.loads((here / "p.json").read_text())
    assert {each["file_name"] for each in results} == {"a.png", "b.jpg", "below/a.png", "below/c.png"}
    code, _, err = fpnx(
        "visualize", "out.h5", "--predictions", "p.json", "--threshold", "0", "-o", "d", "--html", "d.html"
    )
    assert code == 0
    assert "p.json has boxes of 4 of 4 images" in err
    assert "not of the model" not in err
    code, _, err = fpnx("visualize", "a.h5", "--predictions", "p.json", "-o", "other")
    assert code == 0
    assert (
        "the boxes of p.json are not of the model of a.h5: they were found with model.safetensors, its maps were made "
        "with random" in err
    )
    index = json.loads(re.findall(r'id="index">(.*?)</script>', (here / "d.html").read_text())[0])
    assert set(index["boxes"]["levels"]) == {each["level"] for each in results} <= {"P3", "P4", "P5", "P6", "P7"}
    first = json.loads(re.findall(r'id="image-0">(.*?)</script>', (here / "d.html").read_text())[0])
    assert len(first["boxes"]) == sum(each["file_name"] == first["name"] for each in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "none.json"], "predictions none.json: No such file"),
        (["--predictions", "plain.json"], "lack, as plain COCO results do, file_name and category_name"),
        (["--predictions", "other.json"], "boxes of none of the 4 images"),
        (["--predictions", "a.h5"], "take the JSON file that fpnx predict writes for detectors"),
        (["--predictions", "photos"], "a folder; only boxes are drawn over levels"),
        (["--predictions", "p.json", "--threshold", "1.5"], "threshold 1.5: take a score from 0 to 1"),
        (["--threshold", "0.7"], "threshold 0.7 is for boxes: give --predictions FILE beside it"),
    ],
    ids=" ".join,
)
def test_mistakes_with_predictions_are_one_line(arguments: list[str], message: str, here: Path, fpnx: Run) -> None:
    write_predictions(here / "p.json")
    (here / "plain.json").write_text('[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    (here / "other.json").write_text((here / "p.json").read_text().replace("a.png", "z.png"))
    code, out, err = fpnx("visualize", "a.h5", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (here / "a_png").exists()


# Output paths ---------------------------------------------------------------------------------------------


def test_png_paths_do_not_collide() -> None:
    paths = ["a.jpg", "A.jpg", "b/c.jpg", "e\u0301.jpg", "\u00e9.jpg", "x.jpg", "x.jpg.png/y.jpg", "n" * 255, "a.png"]
    png_paths = PngPaths(Path("out"), paths)
    names = [str(png_paths[path]) for path in paths]
    assert names[2] == "out/b/c.jpg.png"
    assert names[8] == "out/a.png.png"
    normalized = [os.path.normcase(name).casefold().replace("e\u0301", "\u00e9") for name in names]
    assert len(set(normalized)) == len(paths)
    assert not any(one.startswith(f"{other}/") for one in normalized for other in normalized)
    assert max(len(os.fsencode(part)) for name in names for part in name.split("/")) <= 255
    assert [str(PngPaths(Path("out"), paths[::-1])[path]) for path in paths] == names


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//x", "./x", "a\0b", ""], ids=repr)
def test_png_paths_stay_in_their_folder(path: str) -> None:
    with pytest.raises(ImageError, match="leads out of its folder"):
        PngPaths(Path("out"), [path])[path]


def test_a_picture_is_written_atomically(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"before")
    with pytest.raises(FpnxError, match="cannot write"):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png" / "y.png", {})
    with pytest.raises(AttributeError):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png", {"Title": 3})  # type: ignore[dict-item]
    assert (tmp_path / "x.png").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["x.png"]


# extract --format png -----------------------------------------------------------------------------------------


def test_extract_draws_what_visualize_draws(here: Path, fpnx: Run) -> None:
    shared = ("photos", *SMALL, "--levels", "C3,P3,P5")
    assert fpnx("extract", *shared, "--format", "png", "-o", "drawn")[0] == 0
    assert pictures(here / "drawn") == ["a.png.png", "b.jpg.png", "below/a.png.png", "below/c.png.png"]
    assert fpnx("extract", *shared, "-o", "c.h5")[0] == 0
    assert fpnx("visualize", "c.h5", "--per-image")[0] == 0
    for name in pictures(here / "drawn"):
        with Image.open(here / "drawn" / name) as one, Image.open(here / "c_png" / name) as other:
            assert np.array_equal(np.asarray(one), np.asarray(other)), name


def test_extract_png_resumes_and_refuses(here: Path, fpnx: Run) -> None:
    shared = ("extract", "photos", *SMALL, "--levels", "P5", "--format", "png")
    assert fpnx(*shared)[0] == 0
    kept = (here / "out_png/a.png.png").stat().st_mtime_ns
    (here / "out_png/b.jpg.png").unlink()
    code, _, err = fpnx(*shared)
    assert code == 2
    assert "3 of the pictures are there already" in err
    code, out, _ = fpnx(*shared, "--resume", "--json")
    report = document(out)
    assert (code, report["done"], report["computed"], report["complete"]) == (0, 4, 1, True)
    assert (here / "out_png/a.png.png").stat().st_mtime_ns == kept
    assert fpnx(*shared, "--overwrite", "--mode", "std")[0] == 0
    assert (here / "out_png/a.png.png").stat().st_mtime_ns != kept


def test_extract_png_names_what_failed(here: Path, fpnx: Run) -> None:
    (here / "photos/bad.jpg").write_bytes(b"nothing")
    noise_image(0, (30, 20)).save(here / "photos/tiny.png")
    options = ("--format", "png", "--levels", "P5", "--mode", "similarity", "--point", "60,40", "--json")
    code, out, _ = fpnx("extract", "photos", *SMALL, *options)
    report = document(out)
    assert (code, report["done"]) == (1, 4)
    reasons = {failure["path"]: failure["reason"] for failure in report["failed"]}
    assert set(reasons) == {"bad.jpg", "tiny.png"}
    assert "outside tiny.png" in reasons["tiny.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "std"], "--format png"),
        (["--overlay"], "overlay is for pictures"),
        (["--format", "png", "--mode", "pca"], "--per-image"),
        (["--format", "pdf"], "take one of h5, png"),
        (["--format", "png", "-o", "a.h5"], "not a folder"),
        (["--format", "png", "--colormap", "nope"], "colour map"),
        (["--format", "png", "--mode", "channels", "--pick", "99"], "channel 99 is not in P"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_extract_png_mistakes(arguments: list[str], message: str, here: Path, fpnx: Run) -> None:
    code, _, err = fpnx("extract", "photos", *SMALL, *arguments)
    assert code == 2
    assert message in err


# Processes ------------------------------------------------------------------------------------------------------


def test_drawing_a_file_loads_no_torch(here: Path) -> None:
    code = (
        "import sys; from fpnx.cli.main import main; assert main(['visualize', 'a.h5', '--html', 'a.html']) == 0; "
        "assert main(['visualize', 'a.h5']) == 0; "
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=here, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_signal_ends_it_between_pictures(here: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fpnx", "visualize", "a.h5", "--panel", "2000", "--mode", "channels"]
    running = subprocess.Popen(command, cwd=here, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (here / "a_png").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143, err
    assert "are drawn and kept" in err
    for name in pictures(here / "a_png"):
        with Image.open(here / "a_png" / name) as picture:
            picture.load()


def test_help_shows_its_panels(tmp_path: Path) -> None:
    text = process("visualize", "--help", cwd=tmp_path, COLUMNS="120").stdout
    for expected in ("Pictures", "Photographs", "--html", "--point", "--overlay"):
        assert expected in text
