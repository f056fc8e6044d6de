"""The sink of predictions: notes what was found in a journal, draws it, and writes the output from the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fpnx.core.errors import ImageError
from fpnx.core.text import escape
from fpnx.extraction.plan import Plan
from fpnx.extraction.sink import Outcome
from fpnx.images.decoding import decode
from fpnx.labels.masks import mask_values
from fpnx.prediction.engine import FOUND
from fpnx.prediction.journal import Journal
from fpnx.prediction.outputs import save_mask, write_classes, write_csv, write_results
from fpnx.prediction.predictions import (
    Prediction,
    Reading,
    draw_prediction,
    prediction_of,
    prediction_of_results,
    results_of,
    rounded,
)
from fpnx.store.reader import DONE, FAILED
from fpnx.store.regions import RegionBatch
from fpnx.visualization.png_files import PngPaths, save_png

__all__ = ["PredictionSink", "Target"]


@dataclass(frozen=True)
class Target:
    """Where predictions go.

    Attributes:
        output: the file, or for masks the folder.
        names: of the images.
        image_ids: their numbers in COCO results.
        scored: by index, whether an image is scored, so that all that scores need of it is kept.
        pictures: folder for pictures; None draws none.
        drawn_from: least score of an object in a picture.
    """

    output: Path
    names: Sequence[str]
    image_ids: Sequence[int | str]
    scored: Sequence[bool]
    pictures: Path | None = None
    drawn_from: float = 0.5


class PredictionSink:
    """Takes predictions instead of features; the other members are those of `Sink`.

    Attributes:
        status: (N,) uint8, PENDING, DONE or FAILED for each image, as in a store.
        found: number of objects in the images of this run.
    """

    def __init__(self, plan: Plan, journal: Journal, reading: Reading, target: Target, description: str) -> None:
        self._plan, self._journal, self._reading, self._target = plan, journal, reading, target
        self._description = description
        self._masks = PngPaths(target.output, target.names) if reading.task == "semantic" else None
        self._pictures = None if target.pictures is None else PngPaths(target.pictures, target.names)
        self._nonfinite: dict[str, int] = {}
        self.status = journal.status
        self._done_before = np.flatnonzero(self.status == DONE).tolist()
        for index, reason in plan.layout.errors.items():
            if self.status[index] != FAILED or journal.errors.get(index) != reason:
                journal.fail(index, reason)

    def put(
        self,
        indices: Sequence[int],
        features: Mapping[str, Any],
        source_sizes: np.ndarray,
        nonfinite: Mapping[str, Sequence[int]],
        regions: RegionBatch | None = None,
        digests: np.ndarray | None = None,
    ) -> None:
        """Take the predictions for images of one padded size; there are no regions, and content hashes are not kept.

        Raises:
            FpnxError: where a file cannot be written.
        """
        for position, index in enumerate(indices):
            height, width = source_sizes[position].tolist()
            input_size = tuple(self._plan.layout.input_sizes[index].tolist())
            found, name = features[FOUND][position], self._target.names[index]
            prediction = prediction_of(name, found, self._reading, input_size, (height, width))
            entry: dict[str, Any] = {"size": [height, width], "results": results_of(prediction)}
            if self._reading.task == "classification" and self._target.scored[index]:
                entry["logits"] = [float(str(value)) for value in found.numpy().astype(np.float32)]
            if prediction.proposals is not None and self._target.scored[index]:
                entry["proposals"] = rounded(prediction.proposals)
            if self._masks is not None:
                assert prediction.class_map is not None, "segmentation gives a class map"
                save_mask(self._masks, name, prediction.class_map)
            if self._pictures is not None:
                self._draw(index, prediction)
            for level, counts in nonfinite.items():
                self._nonfinite[level] = self._nonfinite.get(level, 0) + int(counts[position])
            self._journal.done(index, entry)

    def fail(self, index: int, reason: str) -> None:
        """Mark an image as failed, with the reason."""
        self._journal.fail(index, reason)

    def commit(self) -> None:
        """Make all that was put durable."""
        self._journal.commit()

    def finish(self) -> None:
        """Write the output. The journal stays until it is removed."""
        self._journal.commit()
        self._draw_done_before()
        names = self._target.names
        if self._reading.task == "detection":
            write_results(self._target.output, self._journal, names, self._target.image_ids)
        elif self._reading.task == "classification":
            write_csv(self._target.output, self._journal, names)
        else:
            self._target.output.mkdir(exist_ok=True)
            write_classes(self._target.output, self._reading.categories)

    def close(self) -> None:
        """Does nothing: the journal is still read, and closed by its owner."""

    def outcome(self) -> Outcome:
        """Summary of the journal; NaN and infinite values are counted in the levels that this run computed."""
        failed = np.flatnonzero(self.status == FAILED).tolist()
        return Outcome(
            done=int((self.status == DONE).sum()),
            failed=tuple((self._target.names[index], self._journal.errors[index]) for index in failed),
            nonfinite=dict(self._nonfinite),
        )

    def picture(self, index: int) -> Image.Image:
        """The upright RGB image.

        Raises:
            ImageError: it can no longer be read.
        """
        config = self._plan.config
        return decode(self._plan.listing.sources[index], config.max_pixels, config.pixels)

    def save(self, drawn: Image.Image, path: Path, name: str) -> None:
        """Write a picture, with the name of its image and the model in its metadata."""
        save_png(drawn, path, {"Title": escape(name), "Description": self._description}, quick=True)

    def _draw_done_before(self) -> None:
        """Draw the images that an earlier run has done and not drawn."""
        if self._pictures is None:
            return
        missing = {i for i in self._done_before if not self._pictures[self._target.names[i]].exists()}
        for index, entry in self._journal.entries() if missing else ():
            if index in missing:
                size = (entry["size"][0], entry["size"][1])
                name = self._target.names[index]
                prediction = prediction_of_results(name, size, self._reading.task, entry["results"])
                if self._masks is not None:
                    prediction = replace(prediction, class_map=mask_values(str(self._masks[name])))
                self._draw(index, prediction)

    def _draw(self, index: int, prediction: Prediction) -> None:
        assert self._pictures is not None, "there is a folder for pictures"
        try:
            picture = self.picture(index)
        except ImageError:  # it was readable when it was computed: its results stay
            return
        drawn = draw_prediction(prediction, picture, self._target.drawn_from)
        self.save(drawn, self._pictures[prediction.image], prediction.image)
