"""Classes that are the folders of the images: `cat/01.jpg` shows a cat."""

from __future__ import annotations

import numpy as np

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape, plural
from fpnx.labels.annotations import Category, ImageLabels, LabelSet
from fpnx.labels.source import LabelSource

__all__ = ["FOLDERS", "read_folders"]

FOLDERS = "folders"  # what the user gives in place of a path
PARTS_OF_DATA = frozenset(["train", "training", "val", "valid", "validation", "test", "testing"])


def read_folders(source: LabelSource) -> LabelSet:
    """The first folder of each image's name as its class; classes are in the order of their names.

    Raises:
        FpnxError: where no image is in a folder, or the folders are parts of a data set, such as `train` and `val`.
    """
    folders = [name.partition("/")[0] if "/" in name else None for name in source.images]
    names = sorted({folder for folder in folders if folder is not None})
    root = escape(source.root or ".")
    if not names:
        raise FpnxError(f"labels folders: no image is in a folder of its class; put them into {root}/CLASS/")
    parts = [name for name in names if name.lower() in PARTS_OF_DATA]
    if len(parts) > 1 or parts == names:
        raise FpnxError(
            f"labels folders: the folders in {root} are parts of a data set ({', '.join(map(escape, parts))}), not "
            f"classes: give the images of one, such as {root}/{escape(parts[0])}"
        )
    index = {name: position for position, name in enumerate(names)}
    images = tuple(
        ImageLabels(name=name, classes=np.array([index[folder]], np.int64))
        for name, folder in zip(source.images, folders, strict=True)
        if folder is not None
    )
    loose = len(source.images) - len(images)
    remarks = (f"{plural(loose, 'image')} in no folder have no class",) if loose else ()
    return LabelSet(
        format=FOLDERS,
        path=FOLDERS,
        task="classification",
        categories=tuple(Category(position, name) for position, name in enumerate(names)),
        images=images,
        remarks=remarks,
    )
