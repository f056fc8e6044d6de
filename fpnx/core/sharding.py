"""Shards of a list of images: their slices, option values and file names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fpnx.core.errors import FpnxError

__all__ = ["ShardSlice", "Shard", "parse_shard", "shard_path"]

MAX_SHARDS = 99_999  # five digits, as in file names
ARRAY_ID, ARRAY_MIN, ARRAY_MAX, RANK = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "RANK"


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a list; `index` from 0 to `count` - 1."""

    index: int
    count: int

    def slice(self, images: int) -> range:
        """Indices of the shard's images in a list of `images`; sizes differ by at most one, and may be 0."""
        return range(self.index * images // self.count, (self.index + 1) * images // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class ShardSlice:
    """Which slice of which list a shard holds; stored in the attribute `shard` of its file.

    Attributes:
        index, count: of the shard.
        first: index of its first image in the whole list.
        images: number of images in the whole list.
        list: fingerprint of the whole list; see `fpnx.core.image_list.list_fingerprint`.
        names: fingerprint of the whole list without times, the same for copies of the images with other times; empty in
            files of earlier versions.
    """

    index: int
    count: int
    first: int
    images: int
    list: str
    names: str = ""

    @classmethod
    def of(cls, shard: Shard, images: int, fingerprint: str, names: str = "") -> ShardSlice:
        """The slice of `shard` in a list of `images`."""
        return cls(shard.index, shard.count, shard.slice(images).start, images, fingerprint, names)

    def is_of_list(self, other: ShardSlice) -> bool:
        """Whether both are shards, of any number, of one list, or of lists that differ in times alone."""
        same = self.list == other.list or bool(self.names and self.names == other.names)
        return same and (self.count, self.images) == (other.count, other.images)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShardSlice:
        """The inverse of `to_json`.

        Raises:
            ValueError: for values that `to_json` cannot have returned.
        """
        numbers = [values.get(name) for name in ("index", "count", "first", "images")]
        if not all(type(number) is int for number in numbers) or not all(
            isinstance(values.get(name, ""), str) for name in ("list", "names")
        ):
            raise ValueError("its shard does not have whole numbers and a fingerprint")
        shard = cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})
        index, count, first, images = shard.index, shard.count, shard.first, shard.images
        if not (0 <= index < count <= MAX_SHARDS and images >= 0 and first == shard.slice.start):
            raise ValueError(f"there is no shard {index}/{count} from {first} on of {images} images")
        return shard

    @property
    def shard(self) -> Shard:
        """The shard."""
        return Shard(self.index, self.count)

    @property
    def slice(self) -> range:
        """Indices of its images in the whole list."""
        return self.shard.slice(self.images)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "names" or value}

    def __str__(self) -> str:
        indices = self.slice
        images = f"images {indices.start} to {indices.stop - 1}" if indices else "none"
        return f"{self.shard}: {images} of {self.images}"


def parse_shard(text: str | Shard, environment: Mapping[str, str] = os.environ) -> Shard:
    """`"3/16"` → shard 3 of 16; `"auto/16"` → the shard of this process, from its SLURM array task or `RANK`.

    Raises:
        FpnxError: for other text, or where the environment does not determine the shard.
    """
    if isinstance(text, Shard):
        return text
    match = re.fullmatch(r"(auto|\d{1,9})/(\d{1,9})", str(text), re.ASCII)
    if match is None or not 1 <= int(match[2]) <= MAX_SHARDS:
        raise FpnxError(
            f"shard {text!r}: take I/N with I from 0 to N-1 and N up to {MAX_SHARDS}, such as 0/16, or auto/16"
        )
    count = int(match[2])
    if match[1] == "auto":
        index, source = _from_environment(count, environment)
    else:
        index, source = int(match[1]), f"shard {text}"
    if index >= count:
        raise FpnxError(f"{source}: of {count} shards the first is 0 and the last {count - 1}")
    return Shard(index, count)


def shard_path(output: Path, shard: Shard) -> Path:
    """`out.h5` → `out.shard-00003-of-00016.h5`."""
    return output.with_name(f"{output.stem}.shard-{shard.index:05}-of-{shard.count:05}{output.suffix}")


def _from_environment(count: int, environment: Mapping[str, str]) -> tuple[int, str]:
    """The shard's index, and a description of where it comes from."""
    names = [name for name in (ARRAY_ID, RANK) if environment.get(name)]
    if len(names) != 1:
        what = f"{' and '.join(names)} are both set" if names else f"neither {ARRAY_ID} nor {RANK} is set"
        raise FpnxError(f"shard auto/{count}: {what}: give the number itself, such as 0/{count}")
    name = names[0]
    index = _number(name, count, environment)
    if name == RANK:
        return index, f"shard auto/{count} with {RANK} {index}"
    if not environment.get(ARRAY_MIN):
        return index, f"shard auto/{count} with {ARRAY_ID} {index}"
    first = _number(ARRAY_MIN, count, environment)
    last = _number(ARRAY_MAX, count, environment) if environment.get(ARRAY_MAX) else first + count - 1
    if last - first + 1 != count or not first <= index <= last:
        # Part of an array may have been submitted again; where the whole array began is then unknown.
        raise FpnxError(
            f"shard auto/{count}: this array is {first}-{last} and its task {index}, which does not tell which of "
            f"{count} shards it is: submit an array of {count} tasks, or give the number itself, such as "
            f"${ARRAY_ID}/{count} in an array that begins at 0"
        )
    return index - first, f"shard auto/{count} with {ARRAY_ID} {index}, of an array from {first} on"


def _number(name: str, count: int, environment: Mapping[str, str]) -> int:
    value = environment[name].strip()
    if not re.fullmatch(r"\d{1,9}", value, re.ASCII):
        raise FpnxError(
            f"shard auto/{count}: {name} is {value!r}, no number: give the number itself, such as 0/{count}"
        )
    return int(value)
