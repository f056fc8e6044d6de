"""Pairing of formats with one label file for each image: both have one name, in one folder or in parallel ones."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fpnx.labels.image_names import AMBIGUOUS, ImageNames
from fpnx.labels.source import LabelSource

__all__ = ["Pairing", "absolute_images"]


def absolute_images(source: LabelSource) -> set[str]:
    """Paths of the images of the run, as far as they are on a disk."""
    root = os.path.abspath(source.root or ".")
    return {os.path.join(root, name) for name in source.images}


class Pairing:
    """Finds the image of a label file.

    Args:
        source: the images.
        files: absolute paths of the label files; those that are images of the run themselves, such as PNG masks in a
            folder of images, are no candidates.
    """

    def __init__(self, source: LabelSource, files: Iterable[str]) -> None:
        root, own = os.path.abspath(source.root or "."), set(files)
        self._images = [name for name in source.images if os.path.join(root, name) not in own]
        self._names = ImageNames(self._images, root)
        self._folder = source.folder

    def image_of(self, file: str, *names: str) -> str:
        """The name of the image that belongs to an absolute path of a label file. `names` are tried first, as names of
        the image. Where none fits, the path of the file from the folder of labels."""
        for name in (*names, file):
            match = self._names.find(name)
            if match is not None and match.index != AMBIGUOUS:
                return self._images[match.index]
        return os.path.relpath(file, os.path.abspath(self._folder or ".")).replace(os.sep, "/")
