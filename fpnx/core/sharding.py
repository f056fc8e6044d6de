"""Shards: which slice of a list of images a run works on, and what its file is called."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fpnx.core.errors import FpnxError

__all__ = ["ShardSlice", "Shard", "parse_shard", "shard_path"]

MOST = 99_999  # what five digits hold
ARRAY_ID, ARRAY_LEAST, ARRAY_MOST, RANK = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "RANK"


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a list; `index` from 0 to `count` - 1."""

    index: int
    count: int

    def slice(self, images: int) -> range:
        """The part's place in a list of `images`; the sizes of parts differ by one at most, and may be 0."""
        return range(self.index * images // self.count, (self.index + 1) * images // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class ShardSlice:
    """Which slice of which list the images of a shard are; every shard's file says it, in its attribute `shard`.

    Attributes:
        index, count: of the shard.
        first: place of its first image in the whole list.
        images: how many the whole list has.
        list: fingerprint of the whole list; see `fpnx.images.manifest`.
    """

    index: int
    count: int
    first: int
    images: int
    list: str

    @classmethod
    def of(cls, shard: Shard, images: int, fingerprint: str) -> ShardSlice:
        """The cut that `shard` makes in a list of `images`."""
        return cls(shard.index, shard.count, shard.slice(images).start, images, fingerprint)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> ShardSlice:
        """Raises ValueError for what `to_json` never gives."""
        held = [told.get(name) for name in ("index", "count", "first", "images")]
        if not all(type(number) is int for number in held) or not isinstance(told.get("list"), str):
            raise ValueError("its shard is not told in whole numbers and a fingerprint")
        cut = cls(**{name: told[name] for name in cls.__dataclass_fields__})
        if not (0 <= cut.index < cut.count <= MOST and cut.images >= 0 and cut.first == cut.slice.start):
            raise ValueError(f"there is no shard {cut.index}/{cut.count} from {cut.first} on of {cut.images} images")
        return cut

    @property
    def shard(self) -> Shard:
        """Which shard it is."""
        return Shard(self.index, self.count)

    @property
    def slice(self) -> range:
        """Its place in the whole list."""
        return self.shard.slice(self.images)

    def to_json(self) -> dict[str, Any]:
        """All of this as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        place = self.slice
        held = f"images {place.start} to {place.stop - 1}" if place else "none"
        return f"{self.shard}: {held} of {self.images}"


def parse_shard(text: str | Shard, environment: Mapping[str, str] = os.environ) -> Shard:
    """`"3/16"` → that shard; `"auto/16"` → the one that a SLURM array or `RANK` makes of this process.

    Raises:
        FpnxError: for anything else, and where the environment does not say which it is.
    """
    if isinstance(text, Shard):
        return text
    match = re.fullmatch(r"(auto|\d{1,9})/(\d{1,9})", str(text), re.ASCII)
    if match is None or not 1 <= int(match[2]) <= MOST:
        raise FpnxError(f"shard {text!r}: take I/N with I from 0 to N-1 and N up to {MOST}, such as 0/16, or auto/16")
    count = int(match[2])
    if match[1] == "auto":
        index, told = _from_environment(count, environment)
    else:
        index, told = int(match[1]), f"shard {text}"
    if index >= count:
        raise FpnxError(f"{told}: of {count} shards the first is 0 and the last {count - 1}")
    return Shard(index, count)


def shard_path(output: Path, shard: Shard) -> Path:
    """`out.h5` → `out.shard-00003-of-00016.h5`."""
    return output.with_name(f"{output.stem}.shard-{shard.index:05}-of-{shard.count:05}{output.suffix}")


def _from_environment(count: int, environment: Mapping[str, str]) -> tuple[int, str]:
    """The shard's number, and where it is from."""
    there = [name for name in (ARRAY_ID, RANK) if environment.get(name)]
    if len(there) != 1:
        what = f"{' and '.join(there)} are both set" if there else f"neither {ARRAY_ID} nor {RANK} is set"
        raise FpnxError(f"shard auto/{count}: {what}: give the number itself, such as 0/{count}")
    name = there[0]
    index = _number(name, count, environment)
    if name == RANK:
        return index, f"shard auto/{count} with {RANK} {index}"
    if not environment.get(ARRAY_LEAST):
        return index, f"shard auto/{count} with {ARRAY_ID} {index}"
    least = _number(ARRAY_LEAST, count, environment)
    most = _number(ARRAY_MOST, count, environment) if environment.get(ARRAY_MOST) else least + count - 1
    if most - least + 1 != count or not least <= index <= most:
        # Of a part of an array that is submitted again nobody knows where the whole one began.
        raise FpnxError(
            f"shard auto/{count}: this array is {least}-{most} and its task {index}, which does not tell which of "
            f"{count} shards it is: submit an array of {count} tasks, or give the number itself, such as "
            f"${ARRAY_ID}/{count} in an array that begins at 0"
        )
    return index - least, f"shard auto/{count} with {ARRAY_ID} {index}, of an array from {least} on"


def _number(name: str, count: int, environment: Mapping[str, str]) -> int:
    value = environment[name].strip()
    if not re.fullmatch(r"\d{1,9}", value, re.ASCII):
        raise FpnxError(
            f"shard auto/{count}: {name} is {value!r}, no number: give the number itself, such as 0/{count}"
        )
    return int(value)
