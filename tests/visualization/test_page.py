"""The HTML page: its content and security policy, and its behaviour in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

import fpnx
from fpnx.cli.views import show_pictures
from fpnx.commands.visualize import VisualizeResult, visualize
from fpnx.core.config import VisualizeConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.visualization.class_colours import class_colour
from fpnx.visualization.heatmaps import heatmap, similarity
from fpnx.visualization.html.encoding import coordinates, measure_statistics, rice_codes, round_map, similarity_error
from fpnx.visualization.html.page import SIMILARITY_ERROR, write_page
from fpnx.visualization.html.page import Page as WrittenPage
from fpnx.visualization.image_maps import item_maps
from tests.helpers.files import noise_image

MARKUP_NAME = "</script><img src=x onerror=alert(1)>&amp;'\".png".replace("/", "∕")
SMALL = {"backbone": "mobilenet_v2", "weights": "random", "channels": 24, "size": 96}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out.h5` of four images, one with a name that tries to be HTML, and `page.html`."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "photos").mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png", MARKUP_NAME)):
        noise_image(i, (120, 80) if i != 1 else (80, 120)).save(folder / "photos" / name)
    fpnx.extract(folder / "photos", folder / "out.h5", levels="C3,P3-P5", **SMALL)
    visualize(folder / "out.h5", html=folder / "page.html")
    return folder


def blocks(path: Path) -> dict[str, Any]:
    matches = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', path.read_text(), re.DOTALL)
    return {name: json.loads(text) for name, text in matches}


def decoded(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def test_the_policy_allows_only_its_own_script_and_style(made: Path) -> None:
    text = (made / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    code = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|url\(|@import|\son\w+=", code)


def test_a_name_never_becomes_markup(made: Path) -> None:
    text = (made / "page.html").read_text()
    assert "onerror=alert" in json.dumps(blocks(made / "page.html"))
    assert "<img src=x" not in text
    assert len(re.findall("</script>", text)) == 4 + 1 + 1  # images, index, the script itself


def test_decoded_values_equal_the_stored_ones(made: Path) -> None:
    data = blocks(made / "page.html")
    assert data["index"]["images"] == 4
    with fpnx.open(made / "out.h5") as store:
        for i, item in enumerate(store):
            map_ = data[f"image-{i}"]["files"][0]["maps"]["P3"]
            for mode in ("energy", "mean", "max", "std"):
                exact = heatmap(item["P3"], mode)
                stored = decoded(map_[mode]["values"], "<u2", *exact.shape)
                low, high = map_[mode]["low"], map_[mode]["high"]
                assert low + stored / 65534 * (high - low) == pytest.approx(exact, abs=(high - low) / 65534)
            assert decoded(map_["pca"], "u1", 12, 12, 3).max() > 200


def unrice(codes: str, count: int, cells: int) -> np.ndarray:
    """Decode `rice_codes` bit by bit."""
    data, position, values = base64.b64decode(codes), 0, np.zeros((count, cells), int)

    def bit() -> int:
        nonlocal position
        position += 1
        return data[(position - 1) // 8] >> (7 - (position - 1) % 8) & 1

    for row in values:
        position = -(-position // 8) * 8
        parameter = sum(bit() << i for i in range(7, -1, -1))
        if parameter == 255:
            continue
        for cell in range(cells):
            unsigned = 0
            while not bit():
                unsigned += 1
            for _ in range(parameter):
                unsigned = 2 * unsigned + bit()
            row[cell] = unsigned // 2 if unsigned % 2 == 0 else -(unsigned + 1) // 2
    assert -(-position // 8) == len(data)
    return values


def test_rice_codes_by_hand() -> None:
    exact = np.array([[0, 1, -1, 0], [0, 0, 0, 0], [0.6, 0, 0, -0.8]])
    rounded = round_map(exact, 0.1)
    assert rounded.values.tolist() == [[0, 10, -10, 0], [0, 0, 0, 0], [6, 0, 0, -8]]
    # 0, 20, 19, 0 take 4 × (1 + 3) + 4 bits with p = 3; 12, 0, 0, 15 take 4 × (1 + 2) + 6, or 4 × (1 + 3) + 2
    assert rounded.parameters.tolist() == [3, 255, 2]
    bits = "1000 001100 001011 1000", "000100 100 100 000111"
    packed = [int(row.replace(" ", "").ljust(24, "0"), 2).to_bytes(3, "big") for row in bits]
    codes = b"\x03" + packed[0] + b"\xff" + b"\x02" + packed[1]
    assert base64.b64decode(rice_codes(rounded)) == codes
    assert rounded.code_bytes == len(codes)


@pytest.mark.parametrize("step", [1, 3, 7, 28])
def test_rice_codes_keep_every_value(step: int) -> None:
    rng = np.random.default_rng(step)
    exact = rng.laplace(size=(9, 50)) * np.logspace(0, -3, 9)[:, None]
    exact /= np.linalg.norm(exact, axis=0)
    exact[:, :3] = np.eye(9)[:, :3] * (-1, 1, -1)  # the ends of the range
    rounded = round_map(exact, step / 127)
    assert unrice(rice_codes(rounded), 9, 50).tolist() == rounded.values.tolist()
    assert np.abs(rounded.values).max() == round(127 / step)


def test_coordinates_keep_cosines(made: Path) -> None:
    with fpnx.open(made / "out.h5") as store:
        directions = measure_statistics(store, ["P3"])["P3"].directions
        assert directions @ directions.T == pytest.approx(np.eye(24), abs=1e-9)
        features = store[0]["P3"]
    exact = coordinates(features, directions)
    cosines = np.stack([similarity(features, (i // 12, i % 12)).ravel() for i in range(144)])
    assert exact.T @ exact == pytest.approx(cosines, abs=1e-5)
    assert (exact[0] ** 2).sum() == (exact**2).sum(axis=1).max()  # the first direction keeps the most
    for step in (1, 8):
        rounded = round_map(exact, step / 127)
        unit = rounded.values / np.linalg.norm(rounded.values, axis=0)
        errors = np.abs(unit.T @ unit - cosines)
        measured = similarity_error(exact, step / 127)
        assert measured == pytest.approx(np.percentile(errors, 95), rel=0.2)  # it takes some of the cells
        assert 0.004 < measured / step < 0.009


def test_cells_without_a_direction_have_no_coordinates() -> None:
    features = np.array([[3.0, 0, np.nan, np.inf], [4, 0, 1, 1]])[:, None]
    exact = coordinates(features, np.eye(2))
    assert np.allclose(exact.T, [[0.6, 0.8], [0, 0], [0, 0], [0, 0]])
    assert round_map(exact, 1 / 127).values.T.tolist() == [[76, 102], [0, 0], [0, 0], [0, 0]]
    assert similarity_error(exact[:, 1:], 1 / 127) == 0


def test_a_cell_that_rounds_to_zero_keeps_its_largest_coordinate() -> None:
    exact = np.array([[0.3, -0.5, 0], [0.4, 0.5, 0]])
    assert round_map(exact, 1.1).values.tolist() == [[0, -1, 0], [1, 0, 0]]


def write(made: Path, path: Path, limit_bytes: int, left_out: int = 0) -> Any:
    """The page of `out.h5`, with its limit of bytes."""
    with fpnx.open(made / "out.h5") as store:
        images = [[item_maps(item)] for item in store]
        config = VisualizeConfig()
        return write_page(path, images, len(images), [store], ["out.h5"], config, left_out, Listener(), limit_bytes)


RESERVED = 200_000  # bytes for what follows the images


def image_bytes(path: Path) -> tuple[int, int]:
    """Bytes of a page up to the end of its images, and those of the codes in it."""
    before = path.read_text().partition('<script type="application/json" id="index">')[0]
    return len(before), sum(map(len, re.findall(r'"directions":"([^"]*)"', before)))


def test_similarity_is_coarser_before_an_image_is_left_out(made: Path, tmp_path: Path) -> None:
    whole = write(made, tmp_path / "whole.html", 10**8)
    assert (whole.images, whole.left_out) == (4, 0)
    assert whole.bytes == (tmp_path / "whole.html").stat().st_size
    assert whole.similarity_error < 0.01
    images, codes = image_bytes(tmp_path / "whole.html")
    tight = write(made, tmp_path / "tight.html", RESERVED + images - codes // 4)
    assert (tight.images, tight.left_out) == (4, 0)
    assert whole.similarity_error < tight.similarity_error <= SIMILARITY_ERROR
    assert tight.bytes < whole.bytes
    for page, name in ((whole, "whole.html"), (tight, "tight.html")):
        index = blocks(tmp_path / name)["index"]
        errors = [level["error"] for level in index["files"][0]["levels"].values()]
        assert max(errors) == page.similarity_error
        assert f"within {page.similarity_error:.2g} of the exact" in " ".join(index["notes"])


def test_images_are_left_out_before_similarity_is_too_coarse(made: Path, tmp_path: Path) -> None:
    images, _ = image_bytes(made / "page.html")
    half = write(made, tmp_path / "half.html", RESERVED + images // 2, left_out=5)
    assert 0 < half.images < 4
    assert half.images + half.left_out == 4
    assert half.bytes <= half.limit_bytes
    assert half.similarity_error <= SIMILARITY_ERROR
    notes = " ".join(blocks(tmp_path / "half.html")["index"]["notes"])
    assert f"These are {half.images} of 4 images" in notes
    assert "5 more images of the file are not in this page" in notes
    assert "coarse" not in notes
    with pytest.raises(FpnxError, match="not one image fits"):
        write(made, tmp_path / "none.html", 201_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.html"]


def test_the_command_says_how_many_images_are_in_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    written = WrittenPage("out.html", 49_000_000, images=6, left_out=18, similarity_error=0.05)
    show_pictures(VisualizeResult(None, (), written, (), 0))
    out = capsys.readouterr().out
    assert "images in out.html: 6 of 24, 49.0 MB" in out
    assert "a page is at most 50.0 MB: --images takes others" in out


def test_an_image_that_fills_the_page_is_coarse_and_the_page_says_so(made: Path, tmp_path: Path) -> None:
    text = (made / "page.html").read_text().partition('<script type="application/json" id="image-1">')[0]
    codes = sum(map(len, re.findall(r'"directions":"([^"]*)"', text)))
    page = write(made, tmp_path / "page.html", RESERVED + len(text) - codes * 2 // 3)
    assert page.images == 1
    assert page.similarity_error > SIMILARITY_ERROR
    assert "That is coarse" in " ".join(blocks(tmp_path / "page.html")["index"]["notes"])


def test_a_missing_photograph_is_named_in_the_page(made: Path, tmp_path: Path) -> None:
    noise_image(0, (40, 40)).save(tmp_path / "x.png")
    fpnx.extract(tmp_path / "x.png", tmp_path / "out.h5", levels="P5", **SMALL)
    (tmp_path / "x.png").unlink()
    visualize([tmp_path / "out.h5", made / "out.h5"], html=tmp_path / "page.html")
    data = blocks(tmp_path / "page.html")["image-0"]
    assert data["photo"] == ""
    assert "source not found" in data["remark"]
    assert data["files"][1]["missing"] == "this image is not in this file"


# In a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def problems() -> list[str]:
    """Console errors, console warnings and uncaught exceptions of `page`."""
    return []


@pytest.fixture
def requests() -> list[str]:
    """Every address that `page` asked for."""
    return []


@pytest.fixture
def page(browser: Browser, made: Path, problems: list[str], requests: list[str]) -> Iterator[Page]:
    """`page.html`, loaded in a tab of its own."""
    with browser.new_context(viewport={"width": 1500, "height": 900}) as context, context.new_page() as page:
        problem_types = ("error", "warning", "assert")
        page.on("console", lambda message: message.type in problem_types and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address(made))
        yield page


def address(made: Path) -> str:
    return (made / "page.html").resolve().as_uri()


def point_of(element: Locator, x: float, y: float) -> tuple[float, float]:
    """A point of the window over an element, at a share of its width and height."""
    box = element.bounding_box()
    assert box is not None
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def canvases(page: Page) -> list[str]:
    return page.locator(".view canvas").evaluate_all("canvases => canvases.map(canvas => canvas.toDataURL())")


def captions(page: Page) -> list[str]:
    return page.locator("figcaption b").all_text_contents()


def test_the_page_works_in_a_browser(page: Page, made: Path, problems: list[str], requests: list[str]) -> None:
    assert page.locator("nav button").count() == 4
    assert page.locator("h2").text_content() == MARKUP_NAME
    assert captions(page) == ["source", "C3", "source", "P3", "P4", "P5"]
    assert (page.locator(".model").text_content() or "").endswith("pyramid: untrained (random, seed 0)")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    assert len(picture.getcolors(2**24) or ()) > 500  # photographs and maps are really drawn
    photographs = page.locator(".view img").evaluate_all("images => images.map(image => image.naturalWidth > 0)")
    assert photographs == [True] * 6

    energy = canvases(page)
    first = page.locator(".row.continued .view canvas").first
    page.mouse.click(*point_of(first, 0.2, 0.3))
    similar = canvases(page)
    assert all(one != other for one, other in zip(energy, similar, strict=True))  # at every level
    assert page.locator("#mode").input_value() == "similarity"
    assert page.locator(".point").evaluate_all("points => points.every(point => !point.hidden)")
    page.mouse.click(*point_of(first, 0.8, 0.8))
    assert all(one != other for one, other in zip(similar, canvases(page), strict=True))
    page.keyboard.press("Escape")
    assert canvases(page) == energy

    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [address(made)]


def test_hovering_shows_the_value_of_the_cell(page: Page, made: Path) -> None:
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    with fpnx.open(made / "out.h5") as store:
        item = store[2]
        assert page.locator("h2").text_content() == item.path
        exact = heatmap(item["P3"], "energy")
    page.mouse.move(*point_of(page.locator(".row.continued figure:nth-child(2) .view"), 0.99, 0.01))
    text = page.locator("#readout").text_content() or ""
    match = re.fullmatch(r"P3 cell \(y (\d+), x (\d+)\): energy (.+)", text)
    assert match is not None, text
    assert (int(match[1]), int(match[2])) == (0, 11)
    assert float(match[3]) == pytest.approx(float(exact[0, 11]), rel=1e-3)


@pytest.mark.parametrize("level", ["C3", "P3", "P5"])
def test_similarity_equals_the_exact_one(page: Page, made: Path, level: str) -> None:
    with fpnx.open(made / "out.h5") as store:
        item = next(item for item in store if item.path == page.locator("h2").text_content())
        features = item[level]
    height, width = features.shape[1:]
    page.locator("#level").select_option(level)
    view = page.locator(".view:has(canvas)")
    y, x = height // 3, width // 2
    page.mouse.click(*point_of(view, (x + 0.5) / width, (y + 0.5) / height))
    exact = similarity(features, (y, x))
    shown = np.full_like(exact, np.nan)
    for row, column in [*zip(range(height), range(width), strict=True), (y, x), (0, width - 1), (height - 1, 0)]:
        page.mouse.move(*point_of(view, (column + 0.5) / width, (row + 0.5) / height))
        match = re.fullmatch(rf"{level} cell \(y {row}, x {column}\): similarity (.+)", readout(page))
        assert match is not None, readout(page)
        shown[row, column] = float(match[1])
    read = np.isfinite(shown)
    assert shown[read] == pytest.approx(exact[read], abs=0.02)
    assert shown[y, x] == 1


def test_a_page_of_coarse_steps_works(browser: Browser, made: Path, tmp_path: Path) -> None:
    images, codes = image_bytes(made / "page.html")
    write(made, tmp_path / "page.html", RESERVED + images - codes // 3)
    with browser.new_context() as context, context.new_page() as page:
        page.goto((tmp_path / "page.html").resolve().as_uri())
        page.locator("#mode").select_option("similarity")
        error = re.search(r"95 % within ([\d.]+) of the exact", page.locator("#hint").text_content() or "")
        assert error is not None
        assert 0.02 < float(error[1]) <= SIMILARITY_ERROR
        assert len(set(canvases(page))) > 1


def readout(page: Page) -> str:
    return page.locator("#readout").text_content() or ""


def test_the_readout_follows_the_mode_while_the_pointer_rests(page: Page) -> None:
    hint = readout(page)
    cell = r"P3 cell \(y 3, x 2\): "
    page.mouse.click(*point_of(page.locator(".row.continued .view canvas").first, 0.2, 0.3))
    assert re.fullmatch(cell + "similarity 1", readout(page)), readout(page)
    page.keyboard.press("Escape")
    energy = readout(page)
    assert re.fullmatch(cell + r"energy [\d.]+", energy), energy
    page.locator("#mode").select_option("pca")
    assert re.fullmatch(cell + r"pca RGB \d+ \d+ \d+", readout(page)), readout(page)
    page.locator("#mode").select_option("energy")
    assert readout(page) == energy
    page.locator("#level").select_option("P4")
    assert readout(page) == hint  # the cell that was read is no longer shown


def test_modes_levels_zoom_and_overlay(page: Page, problems: list[str]) -> None:
    images_by_mode = {}
    for mode in ("energy", "mean", "max", "std", "pca", "similarity"):
        page.locator("#mode").select_option(mode)
        images_by_mode[mode] = canvases(page)[0]
    assert len(set(images_by_mode.values())) == len(images_by_mode)
    page.locator("#level").select_option("P4")
    assert captions(page) == ["source", "P4"]
    page.locator("#zoom").fill("960")
    box = page.locator(".view").first.bounding_box()
    assert box is not None
    assert box["width"] == pytest.approx(960, abs=1)
    rendering = "canvas => getComputedStyle(canvas).imageRendering"
    assert page.locator(".view canvas").evaluate(rendering) == "pixelated"
    page.locator("#overlay").check()
    assert page.locator(".view.over").count() == 1
    page.locator("#scale").select_option("image")
    assert problems == []


def test_a_name_that_tries_to_be_markup_stays_text(page: Page) -> None:
    expect(page.locator("nav .name").filter(has_text="onerror=alert(1)")).to_have_count(1)
    assert page.locator("img[src=x]").count() == 0


def test_maps_lie_over_the_photograph_to_the_pixel(page: Page) -> None:
    page.locator("#overlay").check()
    ratios = page.locator(".view:has(canvas)").evaluate_all(
        "stages => stages.map(stage => {"
        "const c = stage.querySelector('canvas').getBoundingClientRect(), b = stage.getBoundingClientRect();"
        "return [c.left - b.left, c.top - b.top, c.width / b.width, c.height / b.height]; })"
    )
    assert len(ratios) == 4
    for ratio in ratios:  # 96 is a multiple of every stride here, so that maps end where the picture ends
        assert ratio == pytest.approx([0, 0, 1, 1], abs=0.01)


# Predicted boxes ------------------------------------------------------------------------------------------------

LONG_NAME = "a class whose name is a whole sentence </script> with more words than there is room for in a label " * 2


@pytest.fixture(scope="module")
def boxed(made: Path) -> Path:
    """`boxes.html` of the four images: 100 boxes of 80 classes over `a.png`, one over `b.png`, none over the others."""
    rng = np.random.default_rng(0)
    results: list[dict[str, Any]] = []
    for i in range(100):
        x, y = rng.uniform(0, 90), rng.uniform(0, 60)
        kind = i % 80
        results.append({"category_id": kind, "category_name": LONG_NAME if kind == 3 else f"class {kind}"})
        results[-1] |= {
            "bbox": [x, y, 30, 20],
            "score": (i + 0.6) / 100,
            "level": f"P{3 + i % 4}",
            "file_name": "a.png",
        }
    # over b.png, 80×120 pixels
    box = {"category_id": 1, "category_name": "class 1", "bbox": [20, 30, 40, 60], "score": 0.8, "level": "P4"}
    results.append({**box, "file_name": "b.png"})
    (made / "predictions.json").write_text(json.dumps(results))
    options = {"predictions": str(made / "predictions.json"), "threshold": 0.75, "overwrite": True}
    visualize(made / "out.h5", html=made / "boxes.html", **options)
    return made / "boxes.html"


@pytest.fixture
def boxes(browser: Browser, boxed: Path, problems: list[str]) -> Iterator[Page]:
    """`boxes.html` at `a.png`, in a tab of its own."""
    with browser.new_context(viewport={"width": 1500, "height": 900}) as context, context.new_page() as page:
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(boxed.resolve().as_uri())
        page.locator("nav button").filter(has_text="a.png").click()
        yield page


def panel_of(page: Page, level: str) -> Locator:
    return page.locator("figure").filter(has=page.locator("b", has_text=re.compile(f"^{level}$"))).first


def strong(page: Page, level: str = "source") -> list[str]:
    """The labels of the boxes that are strong in a panel, the best first."""
    shapes = panel_of(page, level).locator("rect.strong")
    return shapes.evaluate_all("shapes => shapes.map(shape => shape.dataset.label).reverse()")


def settle(page: Page) -> None:
    """Wait until a filter has been applied, in the next frame."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_boxes_are_in_the_page(boxed: Path) -> None:
    data = blocks(boxed)
    by_name = {data[f"image-{i}"]["name"]: data[f"image-{i}"]["boxes"] for i in range(4)}
    assert [len(by_name[name]) for name in ("a.png", "b.png", "c.png")] == [100, 1, 0]
    x1, y1, x2, y2, score, kind, level = by_name["b.png"][0]
    index = data["index"]["boxes"]
    assert (x1, y1, x2, y2, score) == (20, 30, 60, 90, 0.8)
    assert (index["classes"][kind]["name"], index["levels"][level]) == ("class 1", "P4")
    assert index["score"] == 0.75
    assert len(index["classes"]) == 80
    colours = {each["name"]: each["colour"] for each in index["classes"]}
    assert colours["class 1"] == "#" + bytes(class_colour(1)).hex()
    assert any("predictions.json" in note for note in data["index"]["notes"])
    assert len(re.findall("</script>", boxed.read_text())) == 4 + 1 + 1


def test_a_page_without_predictions_has_no_filters(page: Page) -> None:
    assert not page.locator("#score").is_visible()
    assert page.locator(".boxes").count() == 0


def test_boxes_are_strong_in_the_level_that_they_come_from(boxes: Page, problems: list[str]) -> None:
    source = strong(boxes)
    assert source[:3] == ["class 19 1.00 P6", "class 18 0.99 P5", "class 17 0.98 P4"]
    assert len(source) == 25  # from score 0.75 on
    for level in ("P3", "P4", "P5"):
        assert strong(boxes, level) == [label for label in source if label.endswith(level)]
        assert panel_of(boxes, level).locator("path.faint").count() > 0
    assert strong(boxes, "C3") == []
    assert (panel_of(boxes, "P4").locator("small").text_content() or "").endswith("24 channels, 6 boxes")
    assert problems == []


def test_boxes_lie_over_their_pixels_at_any_zoom(boxes: Page) -> None:
    boxes.keyboard.press("ArrowDown")
    assert boxes.locator("h2").text_content() == "b.png"
    for zoom in (96, 272, 960):
        boxes.locator("#zoom").fill(str(zoom))
        for level in ("source", "P4"):
            view = panel_of(boxes, level).locator(".view").bounding_box()
            shape = panel_of(boxes, level).locator("rect.strong")
            assert view is not None
            x, y, width, height = (float(shape.get_attribute(each) or "") for each in ("x", "y", "width", "height"))
            scale = (view["width"] / 80, view["height"] / 120)
            expected = (20 * scale[0], 30 * scale[1], 40 * scale[0], 60 * scale[1])
            assert (x, y, width, height) == pytest.approx(expected, abs=0.01), (zoom, level)


def test_the_slider_filters_by_score(boxes: Page) -> None:
    slider = boxes.locator("#score")
    assert (slider.input_value(), boxes.locator("#score-value").text_content()) == ("0.75", "0.75")
    for score, count in (("0.9", 10), ("0", 100), ("1", 0)):
        slider.fill(score)
        settle(boxes)
        assert len(strong(boxes)) == count
        assert boxes.locator("#score-value").text_content() == f"{float(score):.2f}"
    slider.focus()
    for _ in range(3):
        boxes.keyboard.press("ArrowLeft")
    settle(boxes)
    assert len(strong(boxes)) == 3  # 0.97 and more
    assert boxes.locator("h2").text_content() == "a.png"  # the keys move the slider, not the images
    boxes.locator("nav button").filter(has_text="b.png").click()
    assert strong(boxes) == []
    assert "0 boxes" in (boxes.locator(".ends").first.text_content() or "")


def test_classes_are_chosen_with_the_keyboard(boxes: Page, problems: list[str]) -> None:
    summary = boxes.locator("#classes summary")
    assert summary.text_content() == "Classes: all 80"
    boxes.locator("#score").fill("0")
    boxes.locator("#score").focus()
    boxes.keyboard.press("Tab")
    boxes.keyboard.press("Enter")
    checks = boxes.get_by_role("checkbox").filter(visible=True)
    assert checks.count() == 80 + 1  # and the overlay's
    boxes.keyboard.press("Tab")
    boxes.keyboard.press("Tab")
    boxes.keyboard.press("Enter")  # none
    settle(boxes)
    assert strong(boxes) == []
    assert summary.text_content() == "Classes: 0 of 80"
    boxes.get_by_label("class 7", exact=True).focus()
    boxes.keyboard.press("Space")
    settle(boxes)
    assert strong(boxes) == ["class 7 0.88 P6", "class 7 0.08 P6"]
    assert summary.text_content() == "Classes: 1 of 80"
    boxes.keyboard.press("Escape")
    assert not boxes.locator("#class-list").is_visible()
    boxes.keyboard.press("Enter")  # the focus is back on the summary
    assert boxes.locator("#class-list").is_visible()
    boxes.locator("#all-classes").click()
    settle(boxes)
    assert len(strong(boxes)) == 100
    assert (boxes.locator("#class-list label").filter(has_text="sentence").inner_text()).startswith(LONG_NAME[:60])
    boxes.locator("h2").click()
    assert not boxes.locator("#class-list").is_visible()
    assert problems == []


@pytest.mark.parametrize("zoom", [96, 272, 960])
def test_labels_are_whole_and_apart(zoom: int, boxes: Page) -> None:
    boxes.locator("#score").fill("0")
    boxes.locator("#zoom").fill(str(zoom))
    settle(boxes)
    source = boxes.locator(".view.source").first
    view = source.bounding_box()
    assert view is not None
    measure = "shapes => shapes.map(s => s.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
    tags = source.locator("rect.tag").evaluate_all(measure)
    written = source.locator("text").evaluate_all(measure)
    assert 0 < len(tags) <= len(written)
    width = max(view["width"], 150)  # narrow views have a margin
    for left, top, right, bottom in tags:
        assert view["x"] - 0.5 <= left < right <= view["x"] + width + 0.5
        assert view["y"] - 0.5 <= top < bottom <= view["y"] + view["height"] + 0.5
    for left, top, right, bottom in written:
        inside = [t for t in tags if t[0] <= left and right <= t[2] + 0.5 and t[1] - 2 <= top and bottom <= t[3] + 2]
        assert len(inside) == 1
    for i, one in enumerate(tags):
        for other in tags[i + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    left_out = 100 - len(tags)
    assert f"100 boxes, {left_out} label" in (boxes.locator(".ends").first.text_content() or "")


def test_a_long_name_is_broken_and_cut_in_the_middle(boxes: Page) -> None:
    boxes.locator("#classes summary").click()
    boxes.locator("#no-classes").click()
    boxes.locator("#class-list label").filter(has_text="sentence").locator("input").check()
    boxes.locator("#score").fill("0")
    settle(boxes)
    lines = boxes.locator(".view.source").first.locator("text").all_text_contents()
    assert len(lines) == 3
    assert lines[0].startswith("a class whose name is")
    assert "…" in "".join(lines)
    assert lines[-1].endswith("P6")


def test_the_readout_names_the_boxes_under_the_pointer(boxes: Page) -> None:
    boxes.keyboard.press("ArrowDown")
    view = boxes.locator(".view.source").first
    boxes.mouse.move(*point_of(view, 0.5, 0.5))
    assert readout(boxes) == "source · in class 1 0.80 P4"
    boxes.mouse.move(*point_of(view, 0.1, 0.1))
    assert readout(boxes) == "source"
    boxes.mouse.move(*point_of(panel_of(boxes, "P3").locator(".view"), 0.5, 0.5))
    assert re.fullmatch(r"P3 cell \(y 6, x 6\): energy \S+ · in class 1 0\.80 P4", readout(boxes))
    boxes.locator("#score").fill("0.9")
    settle(boxes)
    assert "class 1" not in readout(boxes)


def test_a_step_of_the_slider_is_quick(boxes: Page) -> None:
    """100 boxes of 80 classes: the best of 20 steps, on whatever machine this is."""
    best = boxes.evaluate(
        """async () => {
          const slider = document.getElementById("score"), frame = () => new Promise(requestAnimationFrame);
          let best = Infinity;
          for (let i = 0; i < 20; i++) {
            slider.value = i / 100;
            slider.dispatchEvent(new Event("input"));
            const start = performance.now();
            await frame();
            best = Math.min(best, performance.now() - start);
          }
          return best;
        }"""
    )
    assert best < 200  # milliseconds
