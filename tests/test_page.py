"""The HTML page: what it promises about itself, and how it behaves in a real browser."""

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

import fpnx
from fpnx.config import VisualizeConfig
from fpnx.control import Listener
from fpnx.digests import DIRECTIONS, digest, encoded, quantised, unit
from fpnx.errors import FpnxError
from fpnx.heatmaps import heatmap
from fpnx.page import write_page
from fpnx.pictures import visualize
from fpnx.scenes import scene_of

from .browser import CHROMIUM, Browser
from .conftest import noise_image

NASTY = "</script><img src=x onerror=alert(1)>&amp;'\".png".replace("/", "∕")
SMALL = {"backbone": "mobilenet_v2", "weights": "random", "channels": 24, "size": 96}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out.h5` of four images, one with a name that tries to be HTML, and `page.html`."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "photos").mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png", NASTY)):
        noise_image(i, (120, 80) if i != 1 else (80, 120)).save(folder / "photos" / name)
    fpnx.extract(folder / "photos", folder / "out.h5", levels="C3,P3-P5", **SMALL)
    visualize(folder / "out.h5", html=folder / "page.html")
    return folder


def blocks(path: Path) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', path.read_text(), re.DOTALL)
    return {name: json.loads(text) for name, text in found}


def decoded(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def test_the_policy_lets_only_its_own_script_and_style_in(made: Path) -> None:
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


def test_values_survive_the_page(made: Path) -> None:
    held = blocks(made / "page.html")
    assert held["index"]["images"] == 4
    with fpnx.open(made / "out.h5") as store:
        for i, item in enumerate(store):
            map_ = held[f"image-{i}"]["files"][0]["maps"]["P3"]
            for mode in ("energy", "mean", "max", "std"):
                exact = heatmap(item["P3"], mode)
                stored = decoded(map_[mode]["values"], "<u2", *exact.shape)
                low, high = map_[mode]["low"], map_[mode]["high"]
                assert low + stored / 65534 * (high - low) == pytest.approx(exact, abs=(high - low) / 65534)
            assert decoded(map_["pca"], "u1", 12, 12, 3).max() > 200


def test_similarity_from_a_few_directions_is_near_the_exact_one(made: Path) -> None:
    with fpnx.open(made / "out.h5") as store:
        facts = digest(store, ["P3"])["P3"]
        assert facts.directions.shape == (DIRECTIONS, 24)
        assert facts.directions @ facts.directions.T == pytest.approx(np.eye(DIRECTIONS), abs=1e-9)
        cells = store[0]["P3"].reshape(24, -1).T.astype(np.float64)
        exact = unit(cells) @ unit(cells).T
        short = unit(quantised(cells, facts.directions).astype(np.float64))
        away = np.abs(short @ short.T - exact)
        assert np.percentile(away, 90) < 0.05
        assert 0 < facts.error < 0.1
        told = encoded(store[0]["P3"], facts)
        assert decoded(told["directions"], "i1", 12, 12, DIRECTIONS).any()


def test_quantised_cells_without_length_are_zero() -> None:
    cells = np.array([[3.0, 4.0], [0, 0], [np.nan, 1], [np.inf, 1]])
    assert quantised(cells, np.eye(2)).tolist() == [[76, 102], [0, 0], [0, 0], [0, 0]]


def test_the_size_is_bounded_and_the_rest_counted(made: Path, tmp_path: Path) -> None:
    with fpnx.open(made / "out.h5") as store:
        scenes = [[scene_of(item)] for item in store]

        def write(name: str, limit_bytes: int) -> Any:
            arguments = (scenes, [store], ["out.h5"], VisualizeConfig(), 5, Listener(), limit_bytes)
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


def test_a_photograph_that_is_gone_is_said_in_the_page(made: Path, tmp_path: Path) -> None:
    noise_image(0, (40, 40)).save(tmp_path / "x.png")
    fpnx.extract(tmp_path / "x.png", tmp_path / "out.h5", levels="P5", **SMALL)
    (tmp_path / "x.png").unlink()
    visualize([tmp_path / "out.h5", made / "out.h5"], html=tmp_path / "page.html")
    held = blocks(tmp_path / "page.html")["image-0"]
    assert held["photo"] == ""
    assert "source not found" in held["remark"]
    assert held["files"][1]["missing"] == "this image is not in this file"


# In a browser ---------------------------------------------------------------------------------------------------

browsing = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture
def tab(made: Path, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(made / "page.html")
        yield browser
    finally:
        browser.close()


def middle(tab: Browser, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """A point of the window over an element, at a share of its size."""
    element = f"document.querySelector({json.dumps(selector)})"
    left, top, width, height = tab.run(f"(r => [r.left, r.top, r.width, r.height])({element}.getBoundingClientRect())")
    return left + x * width, top + y * height


def canvases(tab: Browser) -> list[str]:
    return tab.run("[...document.querySelectorAll('.stage canvas')].map(c => c.toDataURL())")


def choose(tab: Browser, control: str, value: str) -> None:
    change = f"c => {{ c.value = {value!r}; c.dispatchEvent(new Event('change')); }}"
    tab.run(f"({change})(document.getElementById({control!r}))")
    tab.settle()


@browsing
def test_the_page_works_in_a_browser(tab: Browser, made: Path) -> None:
    assert tab.run("document.querySelectorAll('nav button').length") == 4
    assert tab.run("document.querySelector('h2').textContent") == NASTY
    captions = tab.run("[...document.querySelectorAll('figcaption b')].map(b => b.textContent)")
    assert captions == ["source", "C3", "source", "P3", "P4", "P5"]
    assert tab.run("document.querySelector('.about').textContent").endswith("pyramid: untrained, seed 0")
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    assert len(picture.getcolors(2**24) or ()) > 500  # photographs and maps are really drawn

    energy = canvases(tab)
    tab.mouse("click", *middle(tab, ".row.later .stage canvas", 0.2, 0.3))
    similar = canvases(tab)
    assert all(one != other for one, other in zip(energy, similar, strict=True))  # at every level
    assert tab.run("document.getElementById('mode').value") == "similarity"
    assert tab.run("[...document.querySelectorAll('.point')].every(p => !p.hidden)")
    tab.mouse("click", *middle(tab, ".row.later .stage canvas", 0.8, 0.8))
    assert all(one != other for one, other in zip(similar, canvases(tab), strict=True))
    tab.key("Escape")
    assert canvases(tab) == energy

    assert tab.problems == []
    assert [r for r in tab.requests if not r.startswith("data:")] == [(made / "page.html").resolve().as_uri()]


@browsing
def test_hovering_tells_the_value_of_the_cell(tab: Browser, made: Path) -> None:
    tab.key("ArrowDown")
    tab.key("ArrowDown")
    with fpnx.open(made / "out.h5") as store:
        item = store[2]
        assert tab.run("document.querySelector('h2').textContent") == item.path
        exact = heatmap(item["P3"], "energy")
    tab.mouse("move", *middle(tab, ".row.later figure:nth-child(2) .stage", 0.99, 0.01))
    said = tab.run("document.getElementById('readout').textContent")
    match = re.fullmatch(r"P3 cell \(y (\d+), x (\d+)\): energy (.+)", said)
    assert match is not None, said
    assert (int(match[1]), int(match[2])) == (0, 11)
    assert float(match[3]) == pytest.approx(float(exact[0, 11]), rel=1e-3)


@browsing
def test_modes_levels_zoom_and_overlay(tab: Browser) -> None:
    seen = {}
    for mode in ("energy", "mean", "max", "std", "pca", "similarity"):
        choose(tab, "mode", mode)
        seen[mode] = canvases(tab)[0]
    assert len(set(seen.values())) == len(seen)
    choose(tab, "level", "P4")
    assert tab.run("[...document.querySelectorAll('figcaption b')].map(b => b.textContent)") == ["source", "P4"]
    zoom = "(z => { z.value = 960; z.dispatchEvent(new Event('input')); })(document.getElementById('zoom'))"
    tab.run(zoom)
    assert tab.run("document.querySelector('.stage').getBoundingClientRect().width") == pytest.approx(960, abs=1)
    assert tab.run("getComputedStyle(document.querySelector('.stage canvas')).imageRendering") == "pixelated"
    tab.run("document.getElementById('overlay').click()")
    assert tab.run("document.querySelectorAll('.stage.over').length") == 1
    choose(tab, "scale", "image")
    assert tab.problems == []


@browsing
def test_a_name_that_tries_to_be_markup_stays_text(tab: Browser, made: Path) -> None:
    names = tab.run("[...document.querySelectorAll('nav .name')].map(n => n.textContent)")
    assert any("onerror=alert(1)" in name for name in names)
    assert tab.run("document.querySelectorAll('img[src=x]').length") == 0


@browsing
def test_maps_lie_over_the_photograph_to_the_pixel(tab: Browser) -> None:
    tab.run("document.getElementById('overlay').click()")
    ratios = tab.run(
        "[...document.querySelectorAll('.stage')].filter(s => s.querySelector('canvas')).map(s => {"
        "const c = s.querySelector('canvas').getBoundingClientRect(), b = s.getBoundingClientRect();"
        "return [c.left - b.left, c.top - b.top, c.width / b.width, c.height / b.height]; })"
    )
    assert len(ratios) == 4
    for ratio in ratios:  # 96 is a multiple of every stride here, so that maps end where the picture ends
        assert ratio == pytest.approx([0, 0, 1, 1], abs=0.01)
