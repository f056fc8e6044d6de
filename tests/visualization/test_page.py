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
from fpnx.commands.visualize import visualize
from fpnx.core.config import VisualizeConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.visualization.heatmaps import heatmap
from fpnx.visualization.html.encoding import DIRECTIONS, encode_map, measure_statistics, quantize, unit_vectors
from fpnx.visualization.html.page import write_page
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


def test_similarity_from_directions_approximates_the_exact_one(made: Path) -> None:
    with fpnx.open(made / "out.h5") as store:
        statistics = measure_statistics(store, ["P3"])["P3"]
        assert statistics.directions.shape == (DIRECTIONS, 24)
        assert statistics.directions @ statistics.directions.T == pytest.approx(np.eye(DIRECTIONS), abs=1e-9)
        cells = store[0]["P3"].reshape(24, -1).T.astype(np.float64)
        exact = unit_vectors(cells) @ unit_vectors(cells).T
        approximate = unit_vectors(quantize(cells, statistics.directions).astype(np.float64))
        errors = np.abs(approximate @ approximate.T - exact)
        assert np.percentile(errors, 90) < 0.05
        assert 0 < statistics.error < 0.1
        fields = encode_map(store[0]["P3"], statistics)
        assert decoded(fields["directions"], "i1", 12, 12, DIRECTIONS).any()


def test_cells_of_length_zero_quantize_to_zero() -> None:
    cells = np.array([[3.0, 4.0], [0, 0], [np.nan, 1], [np.inf, 1]])
    assert quantize(cells, np.eye(2)).tolist() == [[76, 102], [0, 0], [0, 0], [0, 0]]


def test_images_over_the_size_limit_are_left_out_and_counted(made: Path, tmp_path: Path) -> None:
    with fpnx.open(made / "out.h5") as store:
        images = [[item_maps(item)] for item in store]

        def write(name: str, limit_bytes: int) -> Any:
            arguments = (images, [store], ["out.h5"], VisualizeConfig(), 5, Listener(), limit_bytes)
            return write_page(tmp_path / name, *arguments)

        whole = write("whole.html", 10**8)
        assert (whole.images, whole.left_out) == (4, 0)
        assert whole.bytes == (tmp_path / "whole.html").stat().st_size
        half = write("half.html", 200_000 + whole.bytes // 2)
        assert 0 < half.images < 4
        assert half.images + half.left_out == 4
        assert half.bytes <= half.limit_bytes
        notes = " ".join(blocks(tmp_path / "half.html")["index"]["notes"])
        assert f"{half.left_out} images were left out" in notes
        assert "5 more images of the file are not in this page" in notes
        with pytest.raises(FpnxError, match="not one image fits"):
            write("none.html", 201_000)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["half.html", "whole.html"]


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
