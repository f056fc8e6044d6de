"""The command `fpnx visualize`: draws stored pyramids, or photographs, as PNG files and an HTML page."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpnx._version import __version__
from fpnx.core.config import ExtractConfig, VisualizeConfig
from fpnx.core.errors import FpnxError, Interrupted, NotDoneError
from fpnx.core.events import Listener
from fpnx.core.interrupts import StopRequest, handle_signals
from fpnx.core.names import normal_form
from fpnx.core.plan_summary import PlanSummary
from fpnx.core.provenance import WeightsInfo
from fpnx.core.text import escape, plural
from fpnx.images.decoding import pillow_limits
from fpnx.images.listing import find_images
from fpnx.prediction.outputs import run_path
from fpnx.remote.client import connections
from fpnx.store.joined_store import STORE_ENDINGS, is_store, open_store, refuse_separate_shards
from fpnx.store.reader import FAILED, Item, Store
from fpnx.visualization.color_scale import ColorScales, measure_scales
from fpnx.visualization.figure import chosen_levels, draw, mode_in_words, rendered
from fpnx.visualization.html.page import Page, write_page
from fpnx.visualization.image_maps import ImageMaps, describe_model, find_photo, item_maps
from fpnx.visualization.panels import colour_table
from fpnx.visualization.png_files import PngPaths, save_png
from fpnx.visualization.predicted_boxes import PredictedBoxes
from fpnx.visualization.selection import select

__all__ = ["VisualizeResult", "visualize"]

DEFAULT_STEM = "out"  # where the path of the photographs has no name, such as /
PHOTOGRAPH_OPTIONS = (
    "backbone",
    "weights",
    "weights_key",
    "weights_prefix",
    "seed",
    "size",
    "bands",
    "value_range",
    "device",
)


@dataclass(frozen=True)
class VisualizeResult:
    """The files that were written, and what was not drawn.

    Attributes:
        folder: folder of the pictures; None where only a page was written.
        pictures: their paths.
        page: the HTML page; None where none was requested.
        skipped: (stored path, reason) of each image that could not be drawn.
        left_out: how many images exceed `limit`.
    """

    folder: Path | None
    pictures: tuple[Path, ...]
    page: Page | None
    skipped: tuple[tuple[str, str], ...]
    left_out: int

    @property
    def exit_code(self) -> int:
        """0, or 1 where nothing could be drawn."""
        return 0 if self.pictures or (self.page is not None and self.page.images) else 1

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "pictures": [str(path) for path in self.pictures],
            "html": None if self.page is None else self.page.to_json(),
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
            "left_out": self.left_out,
            "exit_code": self.exit_code,
        }


def visualize(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    html: str | os.PathLike[str] | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> VisualizeResult:
    """Draw stored pyramids or photographs; `fpnx visualize` as a function.

    Args:
        inputs: files written by `fpnx extract`, compared image by image, each of which may be a glob of files that are
            read as one; or photographs.
        output: folder for pictures; by default `<file>_png` beside the file, or `<first photograph>_png` in the
            current folder. With `html` and without `output` no pictures are written.
        html: path of an HTML page to write.
        listener: receives progress events.
        options: the fields of `fpnx.core.config.VisualizeConfig`.

    Raises:
        FpnxError: a request that cannot be carried out.
        Interrupted: on SIGINT or SIGTERM; pictures written so far are kept.
        TypeError: an option that does not exist.
    """
    config = VisualizeConfig(**options)
    colour_table(config.colormap)
    predictions = None if config.predictions is None else PredictedBoxes.read(config.predictions)
    paths = [os.fspath(p) for p in ([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs)]
    listener = listener or Listener()
    folder = None if html is not None and output is None else Path(output) if output else _default_folder(paths)
    _check_outputs(folder, None if html is None else Path(html), config)
    with ExitStack() as stack:
        stack.enter_context(pillow_limits())
        stack.enter_context(connections())
        over_limit = 0
        from_stores = _are_stores(paths, config)
        if not from_stores:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="fpnx-"))
            names = [os.fsdecode(source.name) for source in find_images(paths).sources]
            over_limit = max(0, len(names) - config.limit)
            if folder is not None:
                _refuse_existing(folder, names[: config.limit], range(min(len(names), config.limit)), config)
            paths = _extract_photographs(paths, Path(temporary), config, listener)
        stop = stack.enter_context(handle_signals(listener))
        stores = [stack.enter_context(open_store(path)) for path in paths]
        refuse_separate_shards(stores)
        selection = _Selection(stores, from_stores, predictions, config, stop, listener)
        pictures = tuple(selection.pictures(folder)) if folder is not None else ()
        page = None
        if html is not None:
            page = write_page(
                Path(html),
                selection.images(),
                len(selection.rows),
                selection.stores,
                selection.names,
                config,
                selection.left_out + over_limit,
                listener,
            )
        return VisualizeResult(
            folder, pictures, page, tuple(selection.skipped.items()), selection.left_out + over_limit
        )


class _Selection:
    """The images to draw, from one or several files."""

    def __init__(
        self,
        stores: Sequence[Store],
        from_stores: bool,
        predictions: PredictedBoxes | None,
        config: VisualizeConfig,
        stop: StopRequest,
        listener: Listener,
    ) -> None:
        self.stores, self.config, self._stop, self._listener = stores, config, stop, listener
        self.names = [os.path.basename(store.path) if from_stores else "" for store in stores]
        self.skipped: dict[str, str] = {}
        first = stores[0]
        ready: list[int] = []
        for row in select(first.paths, config.images):
            try:
                first[row]
                ready.append(row)
            except NotDoneError:
                failed = first.status[row] == FAILED
                self.skipped[first.paths[row]] = f"failed: {first.error(row)}" if failed else "is not done yet"
        self.rows, self.left_out = ready[: config.limit], max(0, len(ready) - config.limit)
        if not self.rows:
            why = "; ".join(f"{escape(path)} {reason}" for path, reason in list(self.skipped.items())[:3])
            raise FpnxError(
                f"nothing to draw{f' in {escape(first.path)}' if from_stores else ''}: {why or 'no image at all'}"
            )
        for store in stores:
            levels = chosen_levels(store, config.levels)
            for level in levels:
                store.check_level(level)
            config.check_channels({lv: store.dataset(size, lv).shape[1] for size in store.sizes for lv in levels})
        self._refuse_point()
        self._boxes = None if predictions is None else predictions.of_images(first.paths, first.root)
        if self._boxes is not None:
            there = sum(row in self._boxes for row in self.rows)
            listener.message(
                f"{escape(str(config.predictions))} has boxes of {there} of {plural(len(self.rows), 'image')}"
            )
            if other := _other_model(str(config.predictions), stores):
                listener.message(other)

    def pictures(self, folder: Path) -> Iterator[Path]:
        """Draw and write each picture; yields its path."""
        png_paths = PngPaths(folder, self.stores[0].paths)
        _refuse_existing(folder, self.stores[0].paths, self.rows, self.config)
        scales = self._scales()
        for images in self.images():
            try:
                target = png_paths[images[0].path]
                figure = draw([self._above_threshold(maps) for maps in images], self.config, self.config.levels, scales)
            except FpnxError as error:
                self.skipped[images[0].path] = str(error)
                continue
            metadata = {"Title": escape(images[0].path), "Description": _description(images, self.config)}
            save_png(rendered(figure), target, {**metadata, "Software": f"fpnx {__version__}"})
            yield target

    def images(self) -> Iterator[list[ImageMaps]]:
        """Yields each image's maps in every file; reports progress, and stops on a signal."""
        self._stop.begin()
        for position, row in enumerate(self.rows):
            if self._stop.signum is not None:
                raise Interrupted(
                    f"interrupted: {position} of {len(self.rows)} images are drawn and kept", self._stop.signum
                )
            self._listener.progress("pictures", position, len(self.rows))
            try:
                images = self._maps_in_all_files(self.stores[0][row])
            except FpnxError as error:
                self.skipped[self.stores[0].paths[row]] = str(error)
                continue
            yield images
            self._listener.progress("pictures", position + 1, len(self.rows))

    def _maps_in_all_files(self, item: Item) -> list[ImageMaps]:
        photo = find_photo(item)
        maps_by_file = [replace(item_maps(item, photo), file=self.names[0])]
        for store, name in zip(self.stores[1:], self.names[1:], strict=True):
            other, reason = _same_image(item, store)
            if other is None:
                maps_by_file.append(replace(maps_by_file[0], file=name, model=_model_of(store), missing=reason))
                continue
            same_source = _full_path(other) == _full_path(item) and other.source_size == item.source_size
            maps_by_file.append(replace(item_maps(other, photo if same_source else None), file=name))
        if self._boxes is None:
            return maps_by_file
        boxes = self._boxes.get(item.index, ())
        return [replace(maps, boxes=boxes) for maps in maps_by_file]

    def _above_threshold(self, maps: ImageMaps) -> ImageMaps:
        """The maps with the boxes that pictures show."""
        if maps.boxes is None:
            return maps
        return replace(maps, boxes=tuple(each for each in maps.boxes if each.score >= self.config.threshold))

    def _scales(self) -> list[ColorScales | None]:
        if self.config.per_image:
            return [None] * len(self.stores)
        return [
            measure_scales(
                store,
                self.config,
                chosen_levels(store, self.config.levels),
                lambda done, total: self._listener.progress("maps measured", done, total),
            )
            for store in self.stores
        ]

    def _refuse_point(self) -> None:
        """Refuse a point that is outside every image."""
        if self.config.point is None:
            return
        sizes = [(int(height), int(width)) for height, width in self.stores[0].source_sizes[self.rows]]
        for height, width in sizes:
            x, y = self.config.position((height, width))
            if x <= width and y <= height:
                return
        most = f"{max(height for height, _ in sizes)}×{max(width for _, width in sizes)}"
        raise FpnxError(f"point {self.config.point} is outside every image: none goes beyond {most} (height × width)")


def _refuse_existing(folder: Path, paths: Sequence[str], rows: Sequence[int], config: VisualizeConfig) -> None:
    """Refuse to replace existing pictures of these rows of `paths` without `overwrite`."""
    if config.overwrite:
        return
    png_paths, existing = PngPaths(folder, paths), list[Path]()
    for row in rows:
        try:
            target = png_paths[paths[row]]
        except FpnxError:  # reported when the image is drawn
            continue
        if os.path.lexists(target):
            existing.append(target)
    if existing:
        raise FpnxError(
            f"{len(existing)} of the pictures {'is' if len(existing) == 1 else 'are'} there already, such as "
            f"{escape(existing[0])}: replace them with --overwrite, or name another folder with -o"
        )


def _description(images: Sequence[ImageMaps], config: VisualizeConfig) -> str:
    """What a picture shows, in one line."""
    models = "; ".join(dict.fromkeys(maps.model for maps in images))
    boxes = f"; boxes of {escape(config.predictions)}, score ≥ {config.threshold:g}" if config.predictions else ""
    return f"{mode_in_words(config)}; {models}{boxes}"


def _other_model(predictions: str, stores: Sequence[Store]) -> str:
    """Says that predictions are of another model than the maps, by what stands beside them; else empty."""
    try:
        document = json.loads(run_path(Path(predictions)).read_bytes())
        predicted = WeightsInfo.from_json(document["provenance"]["weights"])
    except (OSError, ValueError, LookupError, TypeError):  # plain results, or moved without that file
        return ""
    for store in stores:
        weights = store.provenance.weights
        if (weights.sha256, weights.name) != (predicted.sha256, predicted.name):
            return (
                f"the boxes of {escape(predictions)} are not of the model of {escape(os.path.basename(store.path))}: "
                f"they were found with {escape(predicted.name)}, its maps were made with {escape(weights.name)}"
            )
    return ""


def _same_image(item: Item, store: Store) -> tuple[Item | None, str]:
    """The item of the same image in `store`: by its stored path, else by its full path; or None and the reason."""
    full = _full_path(item)
    row = store.index(item.path) if item.path in store else None
    if row is None:
        row = next(
            (i for i, path in enumerate(store.paths) if normal_form(os.path.join(store.root_of(i), path)) == full), None
        )
    if row is None:
        return None, "this image is not in this file"
    try:
        return store[row], ""
    except NotDoneError as error:
        return None, str(error)


def _full_path(item: Item) -> str:
    return normal_form(os.path.join(item.store.root_of(item.index), item.path))


def _model_of(store: Store) -> str:
    return describe_model(store.backbone, store.pyramid, store.levels, store.provenance.weights)


def _are_stores(paths: Sequence[str], config: VisualizeConfig) -> bool:
    """Whether the inputs are feature files; otherwise they are photographs."""
    if not paths:
        raise FpnxError("nothing to draw: name files that fpnx extract wrote, or photographs")
    stores = list(map(is_store, paths))
    if any(stores) and not all(stores):
        raise FpnxError(
            f"{escape(paths[stores.index(True)])} is a file of features and "
            f"{escape(paths[stores.index(False)])} is not: name the one or the other"
        )
    photograph_options = [name for name in PHOTOGRAPH_OPTIONS if getattr(config, name) is not None]
    if all(stores) and photograph_options:
        flag = "--" + photograph_options[0].replace("_", "-")
        raise FpnxError(f"{flag} is for photographs: {escape(paths[0])} holds features that are computed already")
    if not all(stores) and config.images is not None:
        raise FpnxError("--images picks from a file of features: name the photographs themselves")
    return all(stores)


def _extract_photographs(paths: Sequence[str], folder: Path, config: VisualizeConfig, listener: Listener) -> list[str]:
    """Extract photographs into `folder`: one feature file for each backbone."""
    from fpnx.extraction.run import run_extraction
    from fpnx.extraction.upload import resolve_destination

    names = config.backbone or (None,)
    duplicate = next((name for name in names if list(names).count(name) > 1), None)
    if duplicate:
        raise FpnxError(f"backbone {duplicate} is named twice")
    values = {name: getattr(config, name) for name in (*PHOTOGRAPH_OPTIONS, "levels") if name != "backbone"}
    options = {name: value for name, value in values.items() if value is not None}
    files = []
    for number, name in enumerate(names):
        target = folder / f"{number}.h5"
        listener.message(f"extracting with {name}" if name else "extracting")
        progress = _ExtractionListener(listener, config)
        extract_config = ExtractConfig(backbone=name, limit=config.limit, offline=config.offline, **options)
        run_extraction(paths, resolve_destination(target, extract_config), extract_config, listener=progress)
        files.append(str(target))
    return files


class _ExtractionListener(Listener):
    """Forwards the events of an extraction except its plan, of which it checks that all channels can be drawn."""

    def __init__(self, listener: Listener, config: VisualizeConfig) -> None:
        self._config = config
        self.progress, self.message = listener.progress, listener.message  # type: ignore[method-assign]
        self.stopping = listener.stopping  # type: ignore[method-assign]

    def planned(self, plan: PlanSummary) -> None:
        self._config.check_channels({shape.level: shape.channels for shape in plan.levels})


def _default_folder(paths: Sequence[str]) -> Path:
    """Default folder: `<a>_png` or `<a>_<b>_png` beside the first file; `<photograph>_png` in the current folder."""
    if not paths or not all(path.endswith(STORE_ENDINGS) for path in paths):
        first = "".join(paths[:1]).removeprefix("@")
        return Path(f"{Path(first).stem or Path(os.path.abspath(first)).stem or DEFAULT_STEM}_png")
    stems = [Path(path.removesuffix(".part")).stem for path in paths]
    name = "_".join(stems) if len(stems) <= 3 else f"{stems[0]}_and_{len(stems) - 1}_others"
    return Path(paths[0]).with_name(f"{name}_png")


def _check_outputs(folder: Path | None, html: Path | None, config: VisualizeConfig) -> None:
    if folder is not None and os.path.lexists(folder) and not folder.is_dir():
        raise FpnxError(f"{escape(folder)} is not a folder: name another with -o")
    if folder is not None and not folder.parent.is_dir():
        raise FpnxError(f"{escape(folder.parent)} does not exist: make it, or name another folder with -o")
    if html is None:
        return
    if not html.parent.is_dir():
        raise FpnxError(f"{escape(html.parent)} does not exist: make it, or name another file with --html")
    if html.is_dir():
        raise FpnxError(f"{escape(html)} is a folder: name a file, such as {escape(html / 'out.html')}")
    if html.exists() and not config.overwrite:
        raise FpnxError(f"{escape(html)} exists: replace it with --overwrite, or name another with --html")
