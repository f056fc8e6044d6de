"""Names of classes in a text file with one name on each line, the first for class 0."""

from __future__ import annotations

import os

from fpnx.labels.files import read_text

__all__ = ["CLASS_FILES", "find_class_names"]

CLASS_FILES = ("classes.txt", "labels.txt")


def find_class_names(folder: str) -> tuple[list[str], str] | None:
    """The names in `classes.txt` or `labels.txt` in a folder or the one above, and which file it is."""
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        for name in CLASS_FILES:
            if os.path.isfile(path := os.path.join(place, name)):
                names = [line.strip() for line in read_text(path).splitlines()]
                while names and not names[-1]:
                    names.pop()
                if names:
                    return names, name
    return None
