"""Pairing of formats with one label file for each image: both have one name, in one folder or in parallel ones."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fpnx.labels.image_names import AMBIGUOUS, ImageNames
from fpnx.labels.source import LabelSource

__all__ = ["absolute_images", "pair_files"]


def absolute_images(source: LabelSource) -> set[str]:
    """Paths of the images of the run, as far as they are on a disk."""
    root = os.path.abspath(source.root or ".")
    return {os.path.join(root, name) for name in source.images}


def pair_files(source: LabelSource, files: Sequence[str], said: Sequence[str] = ()) -> list[str]:
    """The name of the image of each label file; where there is none, the path of the file below the folder of labels.

    Args:
        source: the images. Those that are label files themselves, as PNG masks among images are, are left out.
        files: absolute paths of the label files.
        said: for each file the name of its image as the file says it, or an empty text.
    """
    root, own = os.path.abspath(source.root or "."), set(files)
    folder = os.path.abspath(source.folder or ".")
    images = [name for name in source.images if os.path.join(root, name) not in own]
    below = [os.path.relpath(file, folder) for file in files]
    entries = []
    for number, file in enumerate(files):
        # A name in the file counts only with the folders that the file itself is in.
        named = [said[number]] if said and said[number] else []
        places = [os.path.join(os.path.dirname(path), name) for name in named for path in (file, below[number])]
        entries.append([*places, file, below[number]])
    found = ImageNames(images, root).assign(entries, longer=False)
    return [
        below[number].replace(os.sep, "/") if image is None or image == AMBIGUOUS else images[image]
        for number, image in enumerate(found)
    ]
