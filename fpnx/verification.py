"""Whether a file holds what it says: structure, rows, values; and, beside the images, whether they give the same."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import h5py
import numpy as np

from fpnx.config import SAMPLE, ExtractConfig, fingerprint
from fpnx.control import Listener
from fpnx.errors import FpnxError, shown
from fpnx.remote import connections
from fpnx.sets import ShardSet, open_pyramids
from fpnx.store import DONE, FAILED, PENDING, Store, different_fields
from fpnx.values import parse_extent

__all__ = ["Verification", "verify"]

BLOCK = 1 << 26  # bytes of features that are looked at together
# The largest difference, relative to the largest value of the level, that another device or thread count explains.
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "reduced": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was looked at, and what is wrong.

    Attributes:
        file: the file, or the pattern of a set of shards.
        images, done, failed, pending: how many there are.
        values: how many stored numbers were read.
        problems: one line for each thing that is not as it should be; empty where the file verifies.
        shards: how many files it is, where it is a set of them; else 0.
        compared: images that were computed again.
        largest_difference: between stored and computed values, relative to the largest of their level.
    """

    file: str
    images: int
    done: int
    failed: int
    pending: int
    values: int
    problems: tuple[str, ...]
    shards: int = 0
    compared: int = 0
    largest_difference: float = 0.0

    @property
    def exit_code(self) -> int:
        """0, or 1 where the file does not verify."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**plain, "problems": list(self.problems), "verified": not self.problems, "exit_code": self.exit_code}


def verify(
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    sample: int = SAMPLE,
    weights: str | None = None,
    device: str = ExtractConfig.device,
    offline: bool = ExtractConfig.offline,
    listener: Listener | None = None,
) -> Verification:
    """Look at everything in `file`; with `against`, compute some of its images again and compare.

    Args:
        file: what `fpnx extract` wrote, or its `.part`; or all shards of a run, as a glob or paths in any order.
            Every stored value is read.
        against: the images that it was made from: files, folders, or `"@list.txt"`.
        sample: how many images are computed again, evenly spread over those that are done.
        weights: where the weights are now, if not where the file says.
        device: computes them.
        offline: never download weights.
        listener: hears of the progress.

    Raises:
        FpnxError: a file that cannot be read as fpnx's at all, a set that is not complete and of one run, or images
            or weights that cannot be had.
    """
    if sample < 1:
        raise FpnxError(f"sample {sample}: take 1 image or more")
    hears = listener or Listener()
    with connections(), open_pyramids(file) as store:
        # What it cannot be compared with is told before all of it is read.
        again = None if against is None else _Again(store, against, _options(store, weights, device, offline), sample)
        problems, values, before = [*_whole(store)], 0, 0
        for part in store.each():
            part.check()
            wrong = [*_tables(part), *_groups(part)]
            if not wrong:  # the rows of a wrong table would only be wrong again
                for read, seen, found in _values(part):
                    values += read
                    wrong += found
                    hears.progress("images", before + seen, len(store))
            before += len(part)
            where = "" if part is store else f"{shown(os.path.basename(part.path))}: "
            problems += [where + problem for problem in wrong]
        states = {state: int((store.status == state).sum()) for state in (PENDING, DONE, FAILED)}
        told = Verification(
            file=store.path,
            images=len(store),
            done=states[DONE],
            failed=states[FAILED],
            pending=states[PENDING],
            values=values,
            problems=tuple(problems),
            shards=len(store.shards),
        )
        if again is None:
            return told
        largest, found = again.compared()
        return replace(told, problems=(*problems, *found), compared=len(again.chosen), largest_difference=largest)


def _whole(store: Store) -> Iterator[str]:
    """What is wrong with a set of shards that each may be right."""
    if isinstance(store, ShardSet):
        if why := store.altered():
            yield why
        if len(set(store.paths)) != len(store.paths):
            yield "a path stands in two shards"


def _tables(store: Store) -> Iterator[str]:
    """What is wrong with the tables, without a look at the features."""
    if store.fingerprint != fingerprint(store.config):
        yield "the fingerprint is not the sha256 of the config: one of them was changed"
    if len(set(store.paths)) != len(store.paths):
        yield "a path stands there twice"
    if store.cut and len(store) != len(store.cut.slice):
        yield f"it has {len(store)} images, where shard {store.cut.shard} of {store.cut.images} has another number"
    done, failed = store.status == DONE, store.status == FAILED
    if pending := int((store.status == PENDING).sum()):
        yield f"{pending} of {len(store)} images are pending: continue with fpnx extract --resume"
    if unknown := int((~np.isin(store.status, (PENDING, DONE, FAILED))).sum()):
        yield f"{unknown} images have a status that does not exist"
    errors = dict(store.failures())
    yield from _first(
        "failed without a reason", store, [i for i in np.flatnonzero(failed).tolist() if not errors[store.paths[i]]]
    )
    yield from _first("done without a row", store, np.flatnonzero(done & (store.rows < 0)))
    yield from _first("done without a source size", store, np.flatnonzero(done & (store.source_sizes <= 0).any(axis=1)))
    placed = store.rows >= 0
    yield from _first("in a group without a row", store, np.flatnonzero(~placed & (np.array(store.groups, str) != "")))
    extents = np.array([parse_extent(name) or (0, 0) for name in store.groups]).reshape(-1, 2)
    wrong = placed & ((store.input_sizes < 1) | (store.input_sizes > extents)).any(axis=1)
    yield from _first("of an input size that is not that of its group", store, np.flatnonzero(wrong))


def _groups(store: Store) -> Iterator[str]:
    """What is wrong with the places of images: each has its own row, and each row its image."""
    counts = Counter(name for name in store.groups if name)
    for size in sorted({*counts, *store.sizes}):
        members = store.rows[np.array(store.groups, str) == size]
        if sorted(members.tolist()) != list(range(len(members))):
            yield f"rows of {size} are not numbered one by one"
        extent = parse_extent(size) or (0, 0)
        for level in store.levels:
            dataset = store.dataset(size, level)
            rows, channels, *cells = dataset.shape
            if rows != len(members):
                yield f"{dataset.name} has {rows} rows for {len(members)} images"
            if channels != dataset.attrs.get("channels") or (level[0] != "C" and channels != store.config["channels"]):
                yield f"{dataset.name} has {channels} channels, which is not what it says"
            stride, pool = store.stride(level), store.config["pool"]
            most = tuple(-(-side // stride) for side in extent)
            if pool != "none" and tuple(cells) != (parse_extent(pool) or (1, 1)):
                yield f"{dataset.name} has {cells[0]}×{cells[1]} cells, which is not pool {shown(pool)}"
            elif pool == "none" and not all(1 <= held <= limit for held, limit in zip(cells, most, strict=True)):
                yield f"{dataset.name} has {cells[0]}×{cells[1]} cells, where stride {stride} gives {most[0]}×{most[1]}"
    if len(store.sizes) == 1:
        for level in store.levels:
            if not store.links_to(store.sizes[0], level):
                yield f"/{level} does not lead to /pyramids/{store.sizes[0]}/{level}"


def _values(store: Store) -> Iterator[tuple[int, int, list[str]]]:
    """How many values were read, how many images seen, and what is wrong: NaN or inf where none are counted."""
    seen = 0
    for size in store.sizes:
        images = np.flatnonzero(np.array(store.groups, str) == size)
        images = images[np.argsort(store.rows[images])]
        for position, level in enumerate(store.levels):
            dataset, column = store.dataset(size, level), store.levels.index(level)
            for start, block in _blocks(dataset):
                here = images[start : start + len(block)]
                status = store.status[here]
                bad = (~np.isfinite(block)).reshape(len(block), -1).sum(axis=1)
                wrong = here[(status == DONE) & (bad != store.nonfinite[here, column])]
                filled = here[(status == FAILED) & ~np.isnan(block).reshape(len(block), -1).all(axis=1)]
                found = [*_first(f"not as finite in {level} as the file says", store, wrong)]
                found += _first(f"failed, but with values in {level}", store, filled)
                seen += len(block) if position == len(store.levels) - 1 else 0
                yield block.size, seen, found


def _blocks(dataset: h5py.Dataset) -> Iterator[tuple[int, np.ndarray]]:
    each = max(1, int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize)
    step = max(1, BLOCK // each)
    for start in range(0, len(dataset), step):
        yield start, dataset[start : start + step]


def _first(what: str, store: Store, indices: Sequence[int] | np.ndarray) -> Iterator[str]:
    """One line for all `indices`, with the first of them by name."""
    if len(indices):
        others = f" and {len(indices) - 1} others" if len(indices) > 1 else ""
        yield f"{shown(store.paths[int(indices[0])])}{others}: {what}"


def _options(store: Store, weights: str | None, device: str, offline: bool) -> dict[str, Any]:
    """The options that computed `store`, for this machine."""
    options = store.provenance.get("options")
    if not isinstance(options, dict):
        raise FpnxError(f"{shown(store.path)} does not say with which options it was made: it cannot be computed again")
    changed = {"weights": weights} if weights is not None else {}
    return {**options, **changed, "device": device, "offline": offline}


class _Again:
    """A sample of a store's images, and all that it takes to compute them again.

    Raises:
        FpnxError: where there are none of the images, or not the model.
    """

    def __init__(self, store: Store, against: Any, options: dict[str, Any], sample: int) -> None:
        # Here, since a look at the file alone needs no torch.
        from fpnx.images import find

        self._store = store
        listing = find([against] if isinstance(against, (str, os.PathLike)) else list(against))
        there = {os.fsdecode(source.name): source for source in listing.sources}
        missing = [i for i, path in enumerate(store.paths) if path not in there]
        if len(missing) == len(store):
            raise FpnxError(
                f"none of the images of {shown(store.path)} is in {shown(listing.root)}: name the same folder"
            )
        gone = set(missing)
        here = [i for i, path in enumerate(store.paths) if i not in gone]
        known = [i for i in here if min(there[store.paths[i]].bytes, store.bytes[i]) >= 0]
        others = [i for i in known if there[store.paths[i]].bytes != store.bytes[i]]
        self._problems = [*_first("not among the images any more", store, missing)]
        self._problems += _first("another file than then", store, others)
        usable = [item.index for item in store if item.index not in gone.union(others)]
        places = np.linspace(0, len(usable) - 1, min(sample, len(usable)))
        self.chosen = [(i, there[store.paths[i]]) for i in sorted({usable[round(place)] for place in places})]
        try:
            self._config = ExtractConfig(**options)
        except TypeError as error:
            name = shown(store.path)
            raise FpnxError(f"{name} was made with options that this fpnx does not know: {error}") from error
        self._engine: Any = self._made() if self.chosen else None

    def _made(self) -> Any:
        """The engine that computed the store."""
        from fpnx.engine import Engine, resolve_device
        from fpnx.model import build_model
        from fpnx.planning import identity_of

        model = build_model(self._config)
        recipe = model.recipe.sized(self._config)
        fields = different_fields(self._store.config, identity_of(model, recipe, self._config))
        if fields:
            raise FpnxError(
                f"{shown(self._store.path)} cannot be computed again here ({'; '.join(map(shown, fields))}): "
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
                    f"{shown(store.paths[index])}: computed again it differs by {difference:.2g} of its level"
                )
        return largest, problems

    def _computed(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(index, level → (C, H, W)) of each image, one by one, as `extract` computes it."""
        from fpnx.engine import arithmetic
        from fpnx.images import decode, pillow_within_limits

        if not self.chosen:
            return
        engine, most = self._engine, self._config.max_pixels
        with pillow_within_limits(), arithmetic(engine.device, engine.precision, steady=False):
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
