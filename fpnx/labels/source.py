"""What a reader of labels is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LabelSource"]


@dataclass(frozen=True)
class LabelSource:
    """A label file or folder, and the images that it is for.

    Attributes:
        path: the file or folder.
        images: names of the images of the run, relative to `root`.
        root: the folder, archive or URL of the images; it need not exist. Empty where unknown.
    """

    path: str
    images: Sequence[str]
    root: str = ""

    @property
    def folder(self) -> str:
        """The path itself, or the folder of a file."""
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
