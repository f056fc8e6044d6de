"""Which images of a run have labels, and which labels have no image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape, plural
from fpnx.labels.annotations import LabelSet
from fpnx.labels.image_names import AMBIGUOUS, ImageNames

__all__ = ["Matched", "match_labels"]


@dataclass(frozen=True)
class Matched:
    """Labels of the images of a run.

    Attributes:
        images: the names of the images.
        indices: for each image the position of its labels in `LabelSet.images`, or None.
        absent: names in the labels that no image of the run has.
        ambiguous: names in the labels that several images fit equally well, or that fit an image as well as another
            name does; none of them is used.
    """

    images: tuple[str, ...]
    indices: tuple[int | None, ...]
    absent: tuple[str, ...]
    ambiguous: tuple[str, ...]

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The images without labels."""
        return tuple(name for name, index in zip(self.images, self.indices, strict=True) if index is None)


def match_labels(labels: LabelSet, images: Sequence[str], root: str | bytes | os.PathLike[str] = "") -> Matched:
    """Find the labels of each image; see `ImageNames` for how names are compared.

    Args:
        labels: the labels.
        images: names of the images of the run, relative to `root`.
        root: the folder that they are in, which tells more names apart; it need not exist.

    Raises:
        FpnxError: where no image has labels; it shows one name of each side.
    """
    found = ImageNames(images, root).assign([entry.name] for entry in labels.images)
    indices: list[int | None] = [None] * len(images)
    absent: list[str] = []
    ambiguous: list[str] = []
    for position, (entry, image) in enumerate(zip(labels.images, found, strict=True)):
        if image is None:
            absent.append(entry.name)
        elif image == AMBIGUOUS:
            ambiguous.append(entry.name)
        else:
            indices[image] = position
    if not any(index is not None for index in indices):
        raise _nothing_fits(labels, images, ambiguous)
    return Matched(tuple(images), tuple(indices), tuple(absent), tuple(ambiguous))


def _nothing_fits(labels: LabelSet, images: Sequence[str], ambiguous: Sequence[str]) -> FpnxError:
    where = f"labels {escape(labels.path)}"
    if not images or not labels.images:
        return FpnxError(f"{where}: {plural(len(images), 'image')}, and labels of {len(labels.images)}")
    if ambiguous:
        return FpnxError(
            f"{where}: none of the {plural(len(images), 'image')} has labels for certain, since {escape(ambiguous[0])} "
            f"in the labels fits several images: name them in the labels with their folders, as in {escape(images[0])}"
        )
    return FpnxError(
        f"{where}: none of the {plural(len(images), 'image')} has labels: an image is named {escape(images[0])}, and "
        f"in the labels there is {escape(labels.images[0].name)}; give the images and labels that belong together"
    )
