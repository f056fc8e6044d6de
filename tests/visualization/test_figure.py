"""Figures of stored pyramids: geometry of cells, texts, missing sources, shared colour scales."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import fpnx
from fpnx.core.config import PictureConfig
from fpnx.core.errors import FpnxError
from fpnx.core.levels import parse_levels
from fpnx.core.provenance import ModelPart
from fpnx.store.reader import Item, Store
from fpnx.visualization.class_colours import class_colour
from fpnx.visualization.color_scale import measure_scales, sample_rows
from fpnx.visualization.figure import draw, figure, rendered
from fpnx.visualization.image_maps import ImageMaps, Photo, item_maps
from fpnx.visualization.panels import FAINT, apply_colormap, colour_table, compute_map, render_panel, resample
from fpnx.visualization.predicted_boxes import PredictedBox
from fpnx.visualization.predictions import DrawnObject, tag_objects
from fpnx.visualization.text_layout import fit_text, printable, text_width
from tests.helpers.files import noise_image

SMALL = {"backbone": "mobilenet_v2", "weights": "random", "channels": 8}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of one size, C and P levels of 8 channels."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "photos").mkdir()
    for i in range(6):
        noise_image(i, (96, 64) if i % 2 else (64, 96)).save(folder / "photos" / f"{i}.png")
    result = fpnx.extract(folder / "photos", folder / "out.h5", size=64, levels="C3,C5,P3-P6", **SMALL)
    assert result.exit_code == 0
    return folder / "out.h5"


@pytest.fixture
def store(stored: Path) -> Iterator[Store]:
    with fpnx.open(stored) as opened:
        yield opened


def texts(drawn: Figure) -> str:
    """All texts of a figure."""
    return "\n".join(text.get_text() for text in drawn.texts)


# Geometry of cells ---------------------------------------------------------------------------------------------


def test_resample_by_hand() -> None:
    cells = np.array([[1, 2, 3], [4, 5, 6]])
    pixels, inside = resample(cells, (8, 12), (8, 12), (4, 6))  # two pixels a cell
    assert pixels.tolist() == [[1, 1, 2, 2, 3, 3]] * 2 + [[4, 4, 5, 5, 6, 6]] * 2
    assert inside.all()
    # the last column overhangs the source by half a cell, which is cut off
    pixels, _ = resample(cells, (8, 12), (8, 10), (2, 5))
    assert pixels.tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    # pixels that no cell covers are masked
    _, inside = resample(cells, (8, 12), (8, 24), (2, 4))
    assert inside.tolist() == [[True, True, False, False]] * 2


def test_apply_colormap_by_hand() -> None:
    table = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    values = np.array([[0.0, 0.5, 1.0, 2.0, -1.0, np.nan, np.inf]])
    assert apply_colormap(values, 0, 1, table)[0, :, 0].tolist() == [0, 128, 255, 255, 0, 150, 150]
    assert apply_colormap(np.array([[3.0]]), 3, 3, table)[0, 0, 0] == 0


MEAN = (124, 116, 104)  # normalisation maps this colour to 0, the value of padding


def save_square(path: Path, size: tuple[int, int], box: tuple[int, int, int, int], turn: int = 1) -> None:
    """A picture of `size` (width, height) with one square of noise at `box` (left, top, right, bottom), as displayed.

    With `turn` 6 or 8 it is stored rotated, with that EXIF orientation.
    """
    pixels = np.full((size[1], size[0], 3), MEAN, np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = np.random.default_rng(0).integers(0, 2, (bottom - top, right - left, 1)) * 255
    stored = Image.fromarray(pixels)
    if turn != 1:
        stored = stored.transpose({6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[turn])
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(path, exif=exif)


@pytest.fixture(scope="module")
def padding_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose recipe pads to a multiple of 32, as detectors' do."""
    model = fpnx.create_model("mobilenet_v2", weights="random", channels=8)
    padded = dataclasses.replace(
        model.recipe, sizing="aspect", height=None, width=None, short_side=200, pad_multiple=32
    )
    model.weights = dataclasses.replace(model.weights, recipe=padded)
    model.recipe = padded
    path = tmp_path_factory.mktemp("weights") / "padding.safetensors"
    fpnx.save_weights(model, path)
    return path


@pytest.mark.parametrize("turn", [1, 6, 8], ids=["upright", "turned right", "turned left"])
@pytest.mark.parametrize("sizing", ["stretched", "aspect", "padded"])
def test_the_brightest_cells_lie_over_the_bright_square(
    sizing: str, turn: int, padding_weights: Path, tmp_path: Path
) -> None:
    boxes = {"a.png": (230, 40, 330, 140), "b.png": (20, 130, 120, 230)}
    for name, box in boxes.items():
        save_square(tmp_path / name, (370, 250), box, turn)
    options = {
        "stretched": {"size": "192x256", "weights": "random", "backbone": "mobilenet_v2"},
        "aspect": {"short_side": 200, "weights": "random", "backbone": "mobilenet_v2"},
        "padded": {"weights": str(padding_weights)},
    }[sizing]
    fpnx.extract(tmp_path, tmp_path / "out.h5", levels="C2-C5", **options)
    with fpnx.open(tmp_path / "out.h5") as store:
        assert ((224, 320) in store.sizes) == (sizing == "padded")
        for name, (left, top, right, bottom) in boxes.items():
            item = store[name]
            assert item.source_size == (250, 370)
            maps = item_maps(item)
            for level in store.levels:
                level_map = compute_map(maps, level, PictureConfig(), None)
                y, x = np.unravel_index(level_map.tiles[0].argmax(), level_map.shape)
                cell = item.box(level, int(y), int(x))
                assert left <= (cell.left + cell.right) / 2 <= right, level
                assert top <= (cell.top + cell.bottom) / 2 <= bottom, level
                # the same in the rendered panel, with one pixel for each source pixel
                panel = render_panel(maps, level_map, (250, 370), 1, PictureConfig(), colour_table("gray"))[..., 0]
                bright = np.argwhere(panel == panel.max())
                middle = bright.mean(axis=0)
                assert top <= middle[0] <= bottom, level
                assert left <= middle[1] <= right, level


def test_panel_pixels_are_drawn_unscaled(store: Store) -> None:
    config, maps = PictureConfig(per_image=True, panel=96), item_maps(store[1])
    pixels = np.asarray(rendered(figure(store[1], per_image=True, panel=96)))
    level_map = compute_map(maps, "P3", config, None)
    tile = (64, 96)
    panel = render_panel(maps, level_map, tile, 1, config, colour_table("viridis"))
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (*tile, 3))[:, :, 0]
    corners = np.argwhere((windows[:, :, 0, 0] == panel[0, 0]).all(axis=2))
    hits = [(y, x) for y, x in corners if (windows[y, x] == panel).all()]
    assert len(hits) == 1


def test_a_panel_has_a_pixel_for_each_cell_and_the_aspect_of_the_source() -> None:
    from fpnx.visualization.color_scale import ColorScale
    from fpnx.visualization.panels import LevelMap, tile_size

    def level_map(shape: tuple[int, int]) -> LevelMap:
        return LevelMap("P2", 4, shape, (np.zeros(shape),), ColorScale())

    assert tile_size((800, 1216), [level_map((7, 7))], PictureConfig()) == (168, 256)
    assert tile_size((800, 1216), [level_map((200, 304))], PictureConfig()) == (200, 304)
    assert tile_size((1216, 800), [level_map((304, 200)), level_map((7, 7))], PictureConfig(panel=64)) == (304, 200)
    height, width = tile_size((10, 60000), [level_map((1, 512))], PictureConfig())
    assert (height >= 8, width >= 512) == (True, True)


# Texts of a figure -------------------------------------------------------------------------------------------


def test_a_figure_names_its_content(store: Store) -> None:
    text = texts(figure(store["1.png"]))
    for expected in (
        "1.png",
        "energy: L2 norm over channels",
        "from all images",
        "mobilenet_v2: untrained (random, seed 0) · pyramid: untrained (random, seed 0)",
        "source",
        "64×96",
        "C3",
        "P6",
        "8×8",
        "stride 8",
    ):
        assert expected in text
    assert "for each image and level" in texts(figure(store["1.png"], per_image=True))


def test_trained_parts_are_named(store: Store) -> None:
    part = ModelPart(True, "FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1")
    store.provenance = dataclasses.replace(
        store.provenance, weights=dataclasses.replace(store.provenance.weights, body=part, pyramid=part)
    )
    assert "pyramid: trained (FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1)" in texts(figure(store[0]))


def test_c_levels_are_above_p_levels_of_the_same_stride(store: Store) -> None:
    drawn = figure(store[1])
    at = {axes.get_label(): axes.get_position() for axes in drawn.axes if axes.get_label()}
    assert at["C3"].x0 == at["P3"].x0 < at["P4"].x0 < at["C5"].x0 == at["P5"].x0 < at["P6"].x0
    assert at["C3"].y0 == at["C5"].y0 > at["P3"].y0 == at["P6"].y0
    assert at["source"].y0 == at["C3"].y0


@pytest.mark.parametrize("mode", ["energy", "mean", "max", "std", "pca", "channels", "similarity"])
@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "overlay"])
def test_no_text_is_cut_off_or_overlaps_another(store: Store, mode: str, overlay: bool) -> None:
    point = (10, 90) if mode == "similarity" else None
    drawn = figure(store["0.png"], mode=mode, overlay=overlay, point=point, panel=64)
    assert_texts_are_whole_and_apart(drawn)


def assert_texts_are_whole_and_apart(drawn: Figure) -> None:
    drawn.canvas.draw()
    frame = drawn.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn.texts if text.get_text()]
    assert not any("…" in text for text, _ in boxes)
    for text, box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1, text
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1, text
    for i, (text, box) in enumerate(boxes):
        for other, another in boxes[i + 1 :]:
            apart = box.x1 <= another.x0 or another.x1 <= box.x0 or box.y1 <= another.y0 + 4 or another.y1 <= box.y0 + 4
            assert apart, (text, other)


# Predicted boxes ------------------------------------------------------------------------------------------------


def maps_with(boxes: Sequence[PredictedBox], source: tuple[int, int] = (40, 60)) -> ImageMaps:
    """An image of black pixels with levels P3 and P4 of zeros."""
    return ImageMaps(
        path="a.png",
        model="none",
        source_size=source,
        input_size=source,
        levels=("P3", "P4"),
        strides={"P3": 8, "P4": 16},
        pooled=False,
        read=lambda level: np.zeros((2, *(-(-side // {"P3": 8, "P4": 16}[level]) for side in source)), np.float32),
        photo=Photo(Image.new("RGB", source[::-1])),
        boxes=tuple(boxes),
    )


BOXES = (
    PredictedBox((10, 5, 30, 20), 0.9, 3, "cat", "P3"),
    PredictedBox((32.25, 10, 40, 45), 0.8, 4, "dog", "P4"),  # it ends below the image
)


def test_boxes_are_strong_in_their_level_and_faint_in_others() -> None:
    maps, table = maps_with(BOXES), colour_table("gray")
    panels = {}
    for level in maps.levels:
        level_map = compute_map(maps, level, PictureConfig(), None)
        panels[level] = render_panel(maps, level_map, (80, 120), 1, PictureConfig(), table).astype(int)
    strong, faint = (np.array(class_colour(3)) * share for share in (1, FAINT))
    frame = [(10, 20), (10, 59), (39, 20), (39, 59), (25, 20), (25, 59), (10, 40), (39, 40)]  # y, x: twice the box
    for y, x in frame:
        assert np.abs(panels["P3"][y, x] - strong).max() <= 1
        assert np.abs(panels["P4"][y, x] - faint).max() <= 1
    dog = np.array(class_colour(4))
    assert np.abs(panels["P4"][50, 64] - dog).max() <= 1
    assert np.abs(panels["P4"][79, 70] - dog).max() <= 1  # the lower edge, moved into the image
    assert np.abs(panels["P3"][50, 64] - dog * FAINT).max() <= 1
    for panel in panels.values():
        assert not panel[15:35, 25:55].any()  # nothing inside
        assert not panel[:8, :].any()


def test_a_box_without_a_level_is_strong_everywhere() -> None:
    maps = maps_with([dataclasses.replace(BOXES[0], level="")])
    for level in maps.levels:
        level_map = compute_map(maps, level, PictureConfig(), None)
        panel = render_panel(maps, level_map, (80, 120), 1, PictureConfig(), colour_table("gray"))
        assert tuple(panel[25, 20]) == class_colour(3)


@pytest.mark.parametrize("turn", [1, 6, 8], ids=["upright", "turned right", "turned left"])
def test_boxes_lie_over_the_upright_photograph(turn: int, tmp_path: Path) -> None:
    left, top, right, bottom = 230, 40, 330, 140
    save_square(tmp_path / "a.png", (370, 250), (left, top, right, bottom), turn)
    fpnx.extract(tmp_path, tmp_path / "out.h5", size=64, levels="P5", **SMALL)
    with fpnx.open(tmp_path / "out.h5") as store:
        box = PredictedBox((left, top, right, bottom), 0.9, 3, "square", "P5")
        maps = dataclasses.replace(item_maps(store[0]), boxes=(box,))
        drawn = rendered(draw([maps], PictureConfig(panel=370), ["P5"], [None]))
    pixels = np.asarray(drawn).astype(int)
    rows, columns = np.nonzero((pixels == class_colour(3)).all(axis=2)[:, :400])
    source_top = np.flatnonzero((pixels[:, 100] == MEAN).all(axis=1))[0]
    assert (columns.min() - 16, columns.max() + 1 - 16) == (left, right)
    assert rows.max() + 1 - source_top == bottom
    inside = pixels[source_top + top + 4 : source_top + bottom - 4, 16 + left + 4 : 16 + right - 4]
    assert set(np.unique(inside)) == {0, 255}  # the noise of the square


@pytest.mark.parametrize("mode", ["energy", "pca", "channels"])
@pytest.mark.parametrize("levels", ["P3-P5", "C3,C5,P3-P6"])
def test_texts_about_boxes_fit(mode: str, levels: str, store: Store) -> None:
    rng = np.random.default_rng(0)
    boxes = []
    for i, (x, y) in enumerate(rng.uniform(0, 50, (100, 2)).tolist()):
        boxes.append(PredictedBox((x, y, x + 10, y + 12), 0.9 - i / 200, i, f"class {i}", f"P{3 + i % 4}"))
    maps = dataclasses.replace(item_maps(store["0.png"]), boxes=tuple(boxes))
    drawn = draw([maps], PictureConfig(mode=mode, panel=64), parse_levels(levels), [None])
    assert_texts_are_whole_and_apart(drawn)
    assert "100 boxes: P3 25 · P4 25 · P5 25 · P6 25" in texts(drawn).replace("\n", " ")
    assert "stride 8 · 25 boxes" in texts(drawn)
    assert "labels left out" in texts(drawn)
    assert "boxes: strong in the level that they come from, faint in the others" in texts(drawn)


def test_an_image_without_boxes_says_so(store: Store) -> None:
    drawn = draw([dataclasses.replace(item_maps(store[0]), boxes=())], PictureConfig(panel=64), ["P3"], [None])
    assert "0 boxes" in texts(drawn)


@pytest.mark.parametrize("size", [(8, 8), (20, 400), (400, 20), (256, 170)], ids=str)
def test_tags_stay_in_the_picture_and_leave_most_of_it_free(size: tuple[int, int]) -> None:
    names = ["a long name of a class " * 8, "x" * 200, "猫", "cat", *(f"class {i}" for i in range(40))]
    objects = [
        DrawnObject(box=(i % 7, i % 5, i % 7 + 9, i % 5 + 9), label=f"{name} 0.50 P3", colour=i)
        for i, name in enumerate(names)
    ]
    picture, left_out = tag_objects(Image.new("RGB", size[::-1]), objects, (16, 16), 11, 168)
    assert picture.size == (max(size[1], 168), size[0])
    assert 0 < left_out <= len(objects)
    if size == (256, 170):
        assert 1 < len(objects) - left_out < 30
        assert (np.asarray(picture) == 0).all(axis=2).mean() > 0.3


def test_long_and_unusual_names_fit(stored: Path, tmp_path: Path) -> None:
    name = "a_very_long_name " * 12 + "$x^2$\n猫\u202eé.png"
    noise_image(0, (64, 64)).save(tmp_path / "x.png")
    shutil.move(tmp_path / "x.png", tmp_path / name)
    fpnx.extract(tmp_path, tmp_path / "out.h5", size=64, levels="P5", **SMALL)
    with fpnx.open(tmp_path / "out.h5") as store:
        drawn = figure(store[0])
        drawn.canvas.draw()
        lines = [text for text in drawn.texts if text.get_fontweight() == "bold"][:3]
        assert all(text.get_window_extent().x1 <= drawn.bbox.x1 - 8 for text in lines)
        text = "".join(text.get_text() for text in lines)
        assert text.startswith("a_very_long")
        assert "…" in text
        assert "é.png" in text


@pytest.mark.parametrize(
    ("text", "lines"), [("short", 1), ("many words of a line " * 9, 3), ("x" * 500, 2)], ids=["short", "words", "x"]
)
def test_fitted_lines_are_narrow_enough(text: str, lines: int) -> None:
    broken = fit_text(text, 200, 12, lines)
    assert 1 <= len(broken) <= lines
    assert all(text_width(line, 12) <= 200 for line in broken)


def test_letters_without_a_font_are_escaped() -> None:
    assert printable("é ß я") == "é ß я"
    assert printable("\x1b\udc80") == "\\x1b\\udc80"


# Missing and changed source images ------------------------------------------------------------------------------


@pytest.fixture
def own(stored: Path, tmp_path: Path) -> Path:
    """A folder with a separate feature file and photographs that a test may change."""
    shutil.copytree(stored.parent / "photos", tmp_path / "photos")
    fpnx.extract(tmp_path / "photos", tmp_path / "out.h5", size=64, levels="P4", **SMALL)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "source not found (No such file or directory)"),
        (lambda path: path.write_bytes(b"no image"), "source cannot be read"),
        (lambda path: noise_image(9, (40, 40)).save(path), "another picture now, 40×40"),
        (lambda path: noise_image(9, (96, 64)).save(path), "file changed since extraction"),
    ],
    ids=["gone", "broken", "other size", "changed"],
)
def test_missing_and_changed_sources_are_named(own: Path, change: object, message: str) -> None:
    change(own / "photos" / "1.png")  # type: ignore[operator]
    with fpnx.open(own / "out.h5") as store:
        for overlay in (False, True):
            text = texts(figure(store["1.png"], overlay=overlay, panel=256)).replace("\n", " ")
            assert message in text.replace("directory ) ", "directory) ")


# Scales that the pictures of a file share -----------------------------------------------------------------------


def test_the_scale_is_that_of_the_file(store: Store) -> None:
    energies = [np.sqrt((item["P3"].astype(np.float64) ** 2).sum(axis=0)) for item in store]
    scale = measure_scales(store, PictureConfig()).levels["P3"]
    assert scale.low == pytest.approx(min(e.min() for e in energies))
    assert scale.high == pytest.approx(max(e.max() for e in energies))
    assert measure_scales(store, PictureConfig()) is measure_scales(store, PictureConfig(overlay=True))  # measured once


def test_a_sample_is_spread_over_the_file_and_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample_rows(store) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr("fpnx.visualization.color_scale.SAMPLE_IMAGES", 3)
    assert sample_rows(store) == [0, 2, 5]
    monkeypatch.setattr("fpnx.visualization.color_scale.SAMPLE_BYTES", 1)
    assert sample_rows(store) == [0]
    assert "from 1 of 6 images" in texts(figure(store[3]))
    store.status[0] = 0
    assert sample_rows(store) == [1]


def test_pca_is_the_same_picture_twice(stored: Path) -> None:
    pictures = []
    for _ in range(2):
        with fpnx.open(stored) as store:
            pictures.append(rendered(figure(store[2], mode="pca")).tobytes())
    assert pictures[0] == pictures[1]


def test_pca_shares_a_basis_unless_per_image(store: Store) -> None:
    config = PictureConfig(mode="pca")
    basis = measure_scales(store, config).levels["P3"].basis
    assert basis is not None
    cells = np.concatenate([item["P3"].reshape(8, -1).T for item in store]).astype(np.float64)
    _, _, rows = np.linalg.svd(cells - cells.mean(axis=0), full_matrices=False)
    assert np.abs(basis.components @ rows[:3].T) == pytest.approx(np.eye(3), abs=1e-5)
    coordinates = (cells - cells.mean(axis=0)) @ basis.components.T
    assert basis.low == pytest.approx(np.percentile(coordinates, 1, axis=0), rel=1e-6)
    own = compute_map(item_maps(store[2]), "P3", dataclasses.replace(config, per_image=True), None)
    assert not np.allclose(own.tiles[0], basis.colours(store[2]["P3"]))


def test_values_outside_the_scale_are_marked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpnx.visualization.color_scale.SAMPLE_IMAGES", 1)
    assert any("≥" in texts(figure(store[i])) or "≤" in texts(figure(store[i])) for i in range(1, 6))
    assert "≥" not in texts(figure(store[0]))


def test_nan_is_counted_and_ignored_by_the_scale(own: Path) -> None:
    with h5py.File(own / "out.h5", "r+") as file:
        file["P4"][2, :, 1, 1] = np.nan
    with fpnx.open(own / "out.h5") as store:
        assert "1 cells not finite" in texts(figure(store[2]))
        assert np.isfinite(measure_scales(store, PictureConfig()).levels["P4"].high)


# In Python --------------------------------------------------------------------------------------------------------


def test_figure_does_not_change_matplotlib_settings(store: Store) -> None:
    before = dict(matplotlib.rcParams)
    drawn = figure(store[0], mode="channels", top=4, overlay=True)
    assert isinstance(drawn, Figure)
    buffer = io.BytesIO()
    drawn.savefig(buffer)
    assert dict(matplotlib.rcParams) == before
    import sys

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    assert drawn._repr_png_().startswith(b"\x89PNG")


def test_rcparams_do_not_change_pictures(store: Store) -> None:
    plain = rendered(figure(store[0])).tobytes()
    settings = {"figure.autolayout": True, "image.interpolation": "bicubic", "image.origin": "lower", "font.size": 30}
    with matplotlib.rc_context({**settings, "figure.facecolor": "red", "image.aspect": "equal", "text.color": "red"}):
        assert rendered(figure(store[0])).tobytes() == plain


def test_each_item_gets_a_row(store: Store, stored: Path) -> None:
    with fpnx.open(stored) as other:
        drawn = figure([store[0], other[0]], levels="P3,P4")
    assert [axes.get_label() for axes in drawn.axes if axes.get_label()] == ["source", "P3", "P4"] * 2


def test_pooled_maps_cover_the_whole_image(own: Path) -> None:
    fpnx.extract(own / "photos", own / "pooled.h5", size=80, levels="P4", pool="2x3", **SMALL)
    with fpnx.open(own / "pooled.h5") as store:
        maps = item_maps(store["1.png"])
        assert maps.covered_size("P4", (2, 3)) == (64, 96)  # 5×5 cells of 16 are 80 input pixels, the whole source
        assert maps.cell_at("P4", (2, 3), (95, 63)) == (1, 2)
        assert maps.cell_at("P4", (2, 3), (0, 31)) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "heat"}, "take one of energy"),
        ({"levels": "P7"}, "no level P7 here: there are C3, P3"),
        ({"colormap": "virids"}, r"did you mean viridis\?"),
        ({"mode": "similarity"}, "go together"),
        ({"point": (1, 1)}, "go together"),
        ({"mode": "similarity", "point": "1"}, "take x and y"),
        ({"mode": "similarity", "point": "500,10"}, "outside 1.png, 96×64"),
        ({"mode": "channels", "pick": "8"}, "numbered from 0 to 7"),
        ({"pick": "1"}, "--mode channels"),
        ({"top": 0}, "take a whole number"),
        ({"panel": 5}, "from 32 to 4096"),
    ],
    ids=lambda value: str(value)[:36],
)
def test_mistakes(store: Store, options: dict[str, object], message: str) -> None:
    with pytest.raises(FpnxError, match=message):
        figure(store["1.png"], **options)  # type: ignore[arg-type]


def test_an_unknown_option_is_a_type_error(store: Store) -> None:
    with pytest.raises(TypeError):
        figure(store[0], nothing=1)


def test_an_item_knows_its_store_and_strides(store: Store) -> None:
    item = store[0]
    assert isinstance(item, Item)
    assert item.store is store
    assert [item.stride(level) for level in item.levels] == [8, 8, 16, 32, 32, 64]
