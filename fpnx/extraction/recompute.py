"""Recomputes images of a store, to compare the features with the stored ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.events import Listener
from fpnx.core.names import NameIndex
from fpnx.core.provenance import AS_GIVEN
from fpnx.core.system import usable_cpus
from fpnx.core.text import escape
from fpnx.extraction.plan import decode_threads, fingerprint_fields
from fpnx.extraction.regions import scaled_boxes
from fpnx.extraction.update import digest_reader
from fpnx.images.decoding import decode, pillow_limits
from fpnx.images.listing import Listing, find_images
from fpnx.inference.devices import arithmetic, resolve_device
from fpnx.inference.engine import Engine
from fpnx.models.factory import build_model
from fpnx.store.reader import Store, different_fields
from fpnx.store.verify import describe_first

__all__ = ["Recomputation", "recompute_options"]

# The largest difference, relative to the largest value of the level, that another device or thread count can cause.
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "reduced": 5e-2}


def recompute_options(
    store: Store, module: nn.Module | None, weights: str | None, device: str, offline: bool
) -> dict[str, Any]:
    """The options that `store` was computed with, with this machine's weights file and device.

    Raises:
        FpnxError: where the file does not hold them, or was computed with a module and `module` is None.
    """
    options = store.provenance.options
    if options is None:
        raise FpnxError(
            f"{escape(store.path)} does not say with which options it was made: it cannot be computed again"
        )
    if options.get("backbone") == AS_GIVEN:
        if module is None:
            name = escape(store.path)
            raise FpnxError(
                f"{name} was computed with a module ({escape(store.backbone)}), which is not in the file: give it in "
                "Python, fpnx.verify(..., backbone=module)"
            )
        options = {**options, "backbone": None}
    elif module is not None:
        raise FpnxError(f"{escape(store.path)} was computed with a backbone by name: leave out the module")
    changed = {"weights": weights} if weights is not None else {}
    return {**options, **changed, "device": device, "offline": offline}


class Recomputation:
    """Recomputes a sample of a store's images, with the model and options that the store was computed with.

    All images whose content hash the store has are read, and their bytes compared.

    Args:
        store: the file, or several as one.
        against: the images that it was made from: files, folders, or `"@list.txt"`.
        options: of `fpnx.extract`, as `recompute_options` gives them.
        sample: how many images to compute, evenly spread over those that are done.
        module: the network that the store was computed with, where it was none of a name.
        listener: receives the progress.

    Attributes:
        read: indices of the images whose bytes were compared.
        chosen: (index, source) of the images that are computed again.

    Raises:
        FpnxError: where none of the images is found, or the model cannot be built.
    """

    def __init__(
        self,
        store: Store,
        against: Any,
        options: dict[str, Any],
        sample: int,
        module: nn.Module | None = None,
        listener: Listener | None = None,
    ) -> None:
        self._store, self._module = store, module
        listing = find_images([against] if isinstance(against, (str, os.PathLike)) else list(against))
        index = NameIndex([os.fsdecode(source.name) for source in listing.sources])
        positions = {row: index.get(path) for row, path in enumerate(store.paths)}
        sources = {row: listing.sources[position] for row, position in positions.items() if position is not None}
        missing = [row for row in positions if row not in sources]
        if len(missing) == len(store):
            raise FpnxError(
                f"none of the images of {escape(store.path)} is in {escape(listing.root)}: name the same folder"
            )
        known_sizes = [row for row, source in sources.items() if min(source.bytes, store.bytes[row]) >= 0]
        resized = [row for row in known_sizes if sources[row].bytes != store.bytes[row]]
        self._problems = [*describe_first("not among the images any more", store, missing)]
        self._problems += describe_first("its file size is not the stored one", store, resized)
        try:
            self._config = ExtractConfig(**options)
        except TypeError as error:
            name = escape(store.path)
            raise FpnxError(f"{name} was made with options that this fpnx does not know: {error}") from error
        excluded = {*missing, *resized}
        usable = [item.index for item in store if item.index not in excluded]
        self._engine: Engine | None = self._make_engine() if usable else None
        self.read = [row for row in usable if store.digests[row].any()]
        changed = set(self._changed(listing, [sources[row].name for row in self.read], listener))
        self._problems += describe_first("its bytes are not those that were computed", store, sorted(changed))
        usable = [row for row in usable if row not in changed]
        evenly = np.linspace(0, len(usable) - 1, min(sample, len(usable)))
        self.chosen = [(row, sources[row]) for row in sorted({usable[round(at)] for at in evenly})]

    def _changed(self, listing: Listing, names: Sequence[bytes], listener: Listener | None) -> list[int]:
        """Those of the images `read` whose bytes are not those that were computed, or cannot be read."""
        threads = decode_threads("auto", listing, usable_cpus())
        read_digests = digest_reader(listing, self._config.max_pixels, threads, listener or Listener())
        return [
            row
            for row, digest in zip(self.read, read_digests(names), strict=True)
            if digest != self._store.digests[row].tobytes()
        ]

    def _make_engine(self) -> Engine:
        """An engine that computes as the store was computed.

        Raises:
            FpnxError: where the weights or options are not those of the store.
        """
        model = build_model(self._config, self._module)
        recipe = model.recipe.sized(self._config)
        identity = fingerprint_fields(model, recipe, self._config)
        if self._store.has_regions:  # their boxes are in the file
            identity["regions"] = self._store.config["regions"]
        fields = different_fields(self._store.config, identity)
        if fields:
            raise FpnxError(
                f"{escape(self._store.path)} cannot be computed again here ({'; '.join(map(escape, fields))}): "
                f"bring the same weights with --weights"
            )
        self._resize = model.resize
        device, config = resolve_device(self._config.device), self._config
        if config.precision == "tf32" and device.type != "cuda":
            config = replace(config, precision="float32")  # differs less than the tolerance of reduced precisions
        engine = Engine(model, recipe, config, device)
        model.to("meta")  # the engine has copies of its parameters, and resizing needs none
        return engine

    def compare(self) -> tuple[float, list[str]]:
        """Recompute the sample → the largest relative difference, and all problems, one line each."""
        store, largest, problems = self._store, 0.0, self._problems
        for index, computed in self._computed():
            difference = _difference(store, index, computed)
            largest = max(largest, difference)
            if not difference <= _tolerance(store):
                problems.append(
                    f"{escape(store.paths[index])}: computed again it differs by {difference:.2g} of its level"
                )
        return largest, problems

    def _computed(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(index, level → values) of each image of the sample, as `extract` computes it; see `Store.stored_values`."""
        engine, max_pixels = self._engine, self._config.max_pixels
        if engine is None:
            return
        with pillow_limits(), arithmetic(engine.device, engine.precision, steady=False):
            for index, source in self.chosen:
                picture = decode(source, max_pixels, self._config.pixels)
                size = engine.recipe.input_size((picture.height, picture.width), max_pixels)
                pixels = [self._resize(picture, size, engine.recipe)]
                if self._store.has_regions:
                    boxes = scaled_boxes(self._store[index].regions.box, (picture.height, picture.width), size)
                    features = engine(pixels, [boxes])
                    yield index, {level: part.features for level, part in features.regions.items()}
                else:
                    yield index, {level: values[0] for level, values in engine(pixels).arrays.items()}


def _difference(store: Store, index: int, computed: dict[str, np.ndarray]) -> float:
    """The largest difference over all levels, relative to the level's largest value; inf where NaN or inf differ."""
    largest = 0.0
    for level, values in computed.items():
        stored = store.stored_values(index, level).astype(np.float64)
        if stored.shape != values.shape or not np.array_equal(np.isfinite(stored), np.isfinite(values)):
            return float("inf")
        finite = np.isfinite(stored)
        if finite.any():
            scale = float(np.abs(stored[finite]).max()) or 1.0
            largest = max(largest, float(np.abs(stored[finite] - values[finite]).max()) / scale)
    return largest


def _tolerance(store: Store) -> float:
    precision = "float32" if store.config.get("precision") == "float32" else "reduced"
    return max(TOLERANCES[precision], TOLERANCES[str(store.config["dtype"])])
