"""Finding the images of a run by the names that label files have for them."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fpnx.core.names import NameIndex, normal_form

__all__ = ["AMBIGUOUS", "ImageNames", "NameMatch"]

AMBIGUOUS = -1
RANKS = 1000  # of each way to compare names
DRIVE = re.compile(r"^[A-Za-z]:")
# Folders that tell images from their labels, and nothing else: `images/a.jpg` belongs to `labels/a.txt`.
KIND_FOLDERS = frozenset(
    [
        "images",
        "image",
        "imgs",
        "img",
        "jpegimages",
        "labels",
        "label",
        "masks",
        "mask",
        "annotations",
        "annotation",
        "segmentationclass",
    ]
)


@dataclass(frozen=True)
class NameMatch:
    """What was found for a name.

    Attributes:
        index: position of the image; AMBIGUOUS where several images fit equally well.
        rank: how sure it is; lower is surer. Names that fit only in their last parts rank by how many those are.
        longer: whether the name has folders that nothing explains before that of the image.
    """

    index: int
    rank: int
    longer: bool = False


class ImageNames:
    """The names of the images of a run. A name of a label file is tried, in this order,

    1. as it is, or in another Unicode normalisation;
    2. with `/` for a backslash and without `./` or a drive letter; also as a path that leads through `root`;
    3. by its last parts: the only image whose name ends with it, or the longest image name that it ends with;
    4. as 2 and 3, without extensions, upper case, and folders such as `images` and `labels`.

    Args:
        names: of the images, relative to `root`.
        root: the folder that they are in; empty where unknown. It need not exist.
    """

    def __init__(self, names: Sequence[str], root: str | bytes | os.PathLike[str] = "") -> None:
        self._names, self._root = names, _parts(os.fsdecode(root))
        self._exact = NameIndex(names)
        self._full: _PartsIndex | None = None
        self._reduced: _PartsIndex | None = None

    def find(self, name: str) -> NameMatch | None:
        """The image of this name; None where none fits."""
        if (position := self._exact.get(name)) is not None:
            return NameMatch(position, 0)
        if self._full is None:
            self._full = _PartsIndex(map(_parts, self._names), self._root)
        parts = _parts(name)
        full = self._full.find(parts, 1)
        if full is not None and not full.longer:
            return full
        if self._reduced is None:
            self._reduced = _PartsIndex((_reduced(_parts(name)) for name in self._names), _reduced(self._root, True))
        reduced = self._reduced.find(_reduced(parts), 1 + RANKS)
        # `images/a.jpg` is `a.jpg` for certain, where the folder only says that it is an image.
        if full is not None and (reduced is None or reduced.longer or reduced.index == AMBIGUOUS):
            return full
        return reduced

    def assign(self, entries: Iterable[Sequence[str]], *, longer: bool = True) -> list[int | None]:
        """The image of each entry of a label source.

        Where several entries fit one image, the surest has it. A name with unexplained folders before that of the
        image counts only where no name is surer: `val/1.jpg` is not `1.jpg`, if `train/1.jpg` is.

        Args:
            entries: the names that each entry may have, the surest first.
            longer: whether names may have unexplained folders before that of the image at all.

        Returns:
            Positions of images; None for an entry without one, AMBIGUOUS where several fit.
        """
        matches = [self._first(names, longer) for names in entries]
        if any(match is not None and not match.longer and match.index != AMBIGUOUS for match in matches):
            matches = [None if match is not None and match.longer else match for match in matches]
        found = [None if match is None else match.index for match in matches]
        claims: dict[int, list[int]] = {}
        for entry, match in enumerate(matches):
            if match is not None and match.index != AMBIGUOUS:
                claims.setdefault(match.index, []).append(entry)
        for claimants in claims.values():
            if len(claimants) > 1:
                ranks = [match.rank for entry in claimants if (match := matches[entry]) is not None]
                surest = [entry for entry, rank in zip(claimants, ranks, strict=True) if rank == min(ranks)]
                for entry in claimants:
                    if len(surest) > 1 or entry != surest[0]:
                        found[entry] = AMBIGUOUS if entry in surest else None
        return found

    def _first(self, names: Sequence[str], longer: bool) -> NameMatch | None:
        """The first match of several names that is not ambiguous; else an ambiguous one."""
        ambiguous = None
        for number, name in enumerate(names):
            match = self.find(name)
            if match is None or (match.longer and not longer):
                continue
            if match.index != AMBIGUOUS:
                return replace(match, rank=match.rank + number * 3 * RANKS)
            ambiguous = match
        return ambiguous


class _PartsIndex:
    """Names in parts, found as a whole or by their last parts."""

    def __init__(self, names: Iterable[tuple[str, ...]], root: tuple[str, ...]) -> None:
        self._root = root
        self._whole: dict[tuple[str, ...], int] = {}
        self._ends: dict[tuple[str, ...], int] = {}
        for position, parts in enumerate(names):
            self._whole[parts] = AMBIGUOUS if parts in self._whole else position
            for start in range(1, len(parts)):
                end = parts[start:]
                self._ends[end] = AMBIGUOUS if end in self._ends else position

    def find(self, parts: tuple[str, ...], rank: int) -> NameMatch | None:
        """The image whose name fits best; ranks are `rank` for a whole name, and up to `rank` + RANKS - 1."""
        if not parts:
            return None
        if (position := self._whole.get(parts)) is not None:
            return NameMatch(position, rank)
        for count in range(min(len(parts) - 1, len(self._root)), 0, -1):
            if parts[:count] == self._root[-count:] and (position := self._whole.get(parts[count:])) is not None:
                return NameMatch(position, rank)
        if (position := self._ends.get(parts)) is not None:
            return NameMatch(position, rank + max(1, RANKS - 1 - len(parts)))
        if self._root and parts[: len(self._root)] == self._root:
            return None  # a path to another place below the root
        for start in range(1, len(parts)):
            if (position := self._whole.get(parts[start:])) is not None:
                return NameMatch(position, rank + max(1, RANKS - 1 - (len(parts) - start)), longer=True)
        return None


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a path, with `/` or backslashes between them, in one Unicode normalisation."""
    path = DRIVE.sub("", normal_form(name).replace("\\", "/"))
    return tuple(part for part in posixpath.normpath(path).split("/") if part not in ("", ".", ".."))


def _reduced(parts: tuple[str, ...], is_folder: bool = False) -> tuple[str, ...]:
    """Parts in lower case, without folders that name a kind of file, and without the extension of a file."""
    folders, last = (parts, ()) if is_folder else (parts[:-1], parts[-1:])
    lower = [part.casefold() for part in folders]
    kept = tuple(part for part in lower if part not in KIND_FOLDERS)
    return (*kept, *(os.path.splitext(part)[0].casefold() for part in last))
