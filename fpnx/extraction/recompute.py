"""Computing images of a store again, to compare the stored values with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.extraction.plan import fingerprint_fields
from fpnx.images.decoding import decode, pillow_limits
from fpnx.images.listing import find_images
from fpnx.inference.devices import arithmetic, resolve_device
from fpnx.inference.engine import Engine
from fpnx.models.factory import build_model
from fpnx.store.reader import Store, different_fields
from fpnx.store.verify import describe_first

__all__ = ["Recomputation", "recompute_options"]

# The largest difference, relative to the largest value of the level, that another device or thread count explains.
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "reduced": 5e-2}


def recompute_options(store: Store, weights: str | None, device: str, offline: bool) -> dict[str, Any]:
    """The options that computed `store`, for this machine.

    Raises:
        FpnxError: where the file does not say them.
    """
    options = store.provenance.options
    if options is None:
        raise FpnxError(
            f"{escape(store.path)} does not say with which options it was made: it cannot be computed again"
        )
    changed = {"weights": weights} if weights is not None else {}
    return {**options, **changed, "device": device, "offline": offline}


class Recomputation:
    """A sample of a store's images, and all that it takes to compute them again.

    Args:
        store: the file, or all shards of a run.
        against: the images that it was made from: files, folders, or `"@list.txt"`.
        options: of `fpnx.extract`, as `recompute_options` gives them.
        sample: how many images to compute, evenly spread over those that are done.

    Raises:
        FpnxError: where none of the images is there, or the model cannot be built.
    """

    def __init__(self, store: Store, against: Any, options: dict[str, Any], sample: int) -> None:
        self._store = store
        listing = find_images([against] if isinstance(against, (str, os.PathLike)) else list(against))
        there = {os.fsdecode(source.name): source for source in listing.sources}
        missing = [i for i, path in enumerate(store.paths) if path not in there]
        if len(missing) == len(store):
            raise FpnxError(
                f"none of the images of {escape(store.path)} is in {escape(listing.root)}: name the same folder"
            )
        gone = set(missing)
        here = [i for i, path in enumerate(store.paths) if i not in gone]
        known = [i for i in here if min(there[store.paths[i]].bytes, store.bytes[i]) >= 0]
        others = [i for i in known if there[store.paths[i]].bytes != store.bytes[i]]
        self._problems = [*describe_first("not among the images any more", store, missing)]
        self._problems += describe_first("another file than then", store, others)
        usable = [item.index for item in store if item.index not in gone.union(others)]
        places = np.linspace(0, len(usable) - 1, min(sample, len(usable)))
        self.chosen = [(i, there[store.paths[i]]) for i in sorted({usable[round(place)] for place in places})]
        try:
            self._config = ExtractConfig(**options)
        except TypeError as error:
            name = escape(store.path)
            raise FpnxError(f"{name} was made with options that this fpnx does not know: {error}") from error
        self._engine: Engine | None = self._made() if self.chosen else None

    def _made(self) -> Engine:
        """The engine that computed the store."""
        model = build_model(self._config)
        recipe = model.recipe.sized(self._config)
        fields = different_fields(self._store.config, fingerprint_fields(model, recipe, self._config))
        if fields:
            raise FpnxError(
                f"{escape(self._store.path)} cannot be computed again here ({'; '.join(map(escape, fields))}): "
                f"bring the same weights with --weights"
            )
        device, config = resolve_device(self._config.device), self._config
        if config.precision == "tf32" and device.type != "cuda":
            config = replace(config, precision="float32")  # near enough, for the tolerance of reduced precisions
        return Engine(model, recipe, config, device)

    def compared(self) -> tuple[float, list[str]]:
        """Compute the sample again → the largest relative difference, and what is wrong."""
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
        """(index, level → (C, H, W)) of each image, one by one, as `extract` computes it."""
        engine, most = self._engine, self._config.max_pixels
        if engine is None:
            return
        with pillow_limits(), arithmetic(engine.device, engine.precision, steady=False):
            for index, source in self.chosen:
                picture = decode(source, most)
                size = engine.recipe.input_size((picture.height, picture.width), most)
                features = engine([engine.recipe.resize(picture, size)])
                yield index, {level: values[0] for level, values in features.arrays.items()}


def _difference(store: Store, index: int, computed: dict[str, np.ndarray]) -> float:
    """The largest difference of any level, relative to the level's largest value; inf where NaN or inf differ."""
    largest = 0.0
    for level, again in computed.items():
        stored = store[index][level].astype(np.float64)
        if stored.shape != again.shape or not np.array_equal(np.isfinite(stored), np.isfinite(again)):
            return float("inf")
        finite = np.isfinite(stored)
        if finite.any():
            scale = float(np.abs(stored[finite]).max()) or 1.0
            largest = max(largest, float(np.abs(stored[finite] - again[finite]).max()) / scale)
    return largest


def _tolerance(store: Store) -> float:
    precision = "float32" if store.config.get("precision") == "float32" else "reduced"
    return max(TOLERANCES[precision], TOLERANCES[str(store.config["dtype"])])
