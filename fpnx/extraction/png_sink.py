"""The sink of `--format png`: draws each image's features as a PNG file instead of storing them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fpnx._version import __version__
from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.provenance import Provenance
from fpnx.core.text import escape
from fpnx.extraction.plan import Plan
from fpnx.extraction.sink import Outcome
from fpnx.images.decoding import decode
from fpnx.images.listing import Listing
from fpnx.store.info import exceeds_float16
from fpnx.store.reader import DONE, FAILED, PENDING, valid_extent
from fpnx.store.regions import RegionBatch
from fpnx.visualization.figure import draw, mode_in_words, rendered
from fpnx.visualization.image_maps import ImageMaps, Photo, describe_model
from fpnx.visualization.panels import colour_table
from fpnx.visualization.png_files import PngPaths, save_png

__all__ = ["PngSink", "check_png_folder"]


class PngSink:
    """Draws heatmaps of each image with a color scale of its own; with `resume`, existing PNG files count as done.

    Attributes:
        status: (N,) uint8, PENDING, DONE or FAILED for each image, as in a store.
    """

    def __init__(self, plan: Plan, provenance: Provenance) -> None:
        self._layout, self._config, self._sources = plan.layout, plan.config, plan.listing.sources
        self._model_description = describe_model(
            plan.model.backbone, plan.model.fpn.kind, plan.layout.levels, provenance.weights
        )
        self._png_paths = _png_paths(plan.output, plan.listing)
        self._errors = dict(plan.layout.errors)
        self._nonfinite = dict.fromkeys(plan.layout.levels, 0)
        self._too_large: set[str] = set()
        self.status = np.full(len(self._sources), PENDING, np.uint8)
        self.status[list(self._errors)] = FAILED
        if plan.config.resume:
            existing = [i for i in range(len(self._sources)) if self._png_paths[self._name(i)].is_file()]
            self.status[existing] = DONE

    def put(
        self,
        indices: Sequence[int],
        features: Mapping[str, np.ndarray],
        source_sizes: np.ndarray,
        nonfinite: Mapping[str, Sequence[int]],
        regions: RegionBatch | None = None,
        digests: np.ndarray | None = None,
    ) -> None:
        """Draw the features of images of one padded size; the arguments are those of `Writer.put`.

        Raises:
            FpnxError: where a file cannot be written.
        """
        for position, index in enumerate(indices):
            arrays = {level: values[position] for level, values in features.items()}
            maps = self._maps(index, arrays, tuple(source_sizes[position].tolist()))
            try:
                picture = rendered(draw([maps], self._config, None, [None]))
            except FpnxError as error:  # a requested point or channel that this image does not have
                self.fail(index, str(error))
                continue
            metadata = {
                "Title": escape(maps.path),
                "Description": f"{mode_in_words(self._config)}; {self._model_description}",
            }
            save_png(picture, self._png_paths[maps.path], {**metadata, "Software": f"fpnx {__version__}"})
            for level, counts in nonfinite.items():
                self._nonfinite[level] += int(counts[position])
                if counts[position] and exceeds_float16(arrays[level]):
                    self._too_large.add(level)
            self.status[index] = DONE

    def fail(self, index: int, reason: str) -> None:
        """Mark an image as failed, with the reason."""
        self._errors[index] = reason
        self.status[index] = FAILED

    def commit(self) -> None:
        """Does nothing: each PNG file is durable once it is written."""

    def finish(self) -> None:
        """Does nothing: PNG files have their final names."""

    def close(self) -> None:
        """Does nothing: no file is open."""

    def outcome(self) -> Outcome:
        """Summary of the PNG files; NaN and infinite values are counted in the images that this run drew."""
        failed = np.flatnonzero(self.status == FAILED).tolist()
        return Outcome(
            done=int((self.status == DONE).sum()),
            failed=tuple((self._name(index), self._errors[index]) for index in failed),
            nonfinite=dict(self._nonfinite),
            too_large=tuple(level for level in self._layout.levels if level in self._too_large),
        )

    def _maps(self, index: int, arrays: Mapping[str, np.ndarray], source_size: tuple[int, int]) -> ImageMaps:
        layout, size = self._layout, tuple(self._layout.input_sizes[index].tolist())
        pooled = self._config.pool != "none"

        def read(level: str) -> np.ndarray:
            array = arrays[level]
            if pooled:
                return array
            height, width = valid_extent(size, layout.strides[level], array.shape[1:])
            return array[:, :height, :width]

        return ImageMaps(
            path=self._name(index),
            model=self._model_description,
            source_size=source_size,
            input_size=size,
            levels=layout.levels,
            strides=layout.strides,
            pooled=pooled,
            read=read,
            photo=self._photo(index),
        )

    def _photo(self, index: int) -> Photo:
        try:
            return Photo(decode(self._sources[index], self._config.max_pixels, self._config.pixels))
        except ImageError as error:  # it was readable when its features were computed
            return Photo(None, f"source cannot be read: {error}")

    def _name(self, index: int) -> str:
        return os.fsdecode(self._sources[index].name)


def check_png_folder(folder: Path, listing: Listing, config: ExtractConfig) -> None:
    """Refuse a folder that cannot be created, or that holds PNG files of these images without `resume` or `overwrite`.

    Raises:
        FpnxError: with the reason and what to do.
    """
    colour_table(config.colormap)
    if os.path.lexists(folder) and not folder.is_dir():
        raise FpnxError(f"output {escape(folder)} is not a folder: name another with -o")
    if not folder.parent.is_dir():
        raise FpnxError(f"output folder {escape(folder.parent)} does not exist: make it, or name another with -o")
    png_paths = _png_paths(folder, listing)
    targets = [png_paths[os.fsdecode(source.name)] for source in listing.sources]
    existing = [] if config.resume or config.overwrite else [path for path in targets if os.path.lexists(path)]
    if existing:
        raise FpnxError(
            f"{len(existing)} of the pictures are there already, such as {escape(existing[0])}: keep them with "
            f"--resume, replace them with --overwrite, or name another folder with -o"
        )


def _png_paths(folder: Path, listing: Listing) -> PngPaths:
    return PngPaths(folder, [os.fsdecode(source.name) for source in listing.sources])
