"""Images that kill the process that opens them, as a bug in a decoder does.

fpnx itself is unchanged: `sitecustomize`, which Python imports at its start, makes Pillow abort on files that contain
`MARK`.
"""

from __future__ import annotations

import os
from pathlib import Path

MARK = b"this kills the decoder"
SITECUSTOMIZE = f"""
import os
from PIL import Image

MARK, original_open = {MARK!r}, Image.open

def fragile_open(file, *arguments, **options):
    if not isinstance(file, (str, bytes, os.PathLike)):
        content = file.read()
        file.seek(0)
        if MARK in content:
            os.abort()
    return original_open(file, *arguments, **options)

Image.open = fragile_open
"""


def poison(image: Path) -> None:
    """Append the mark to an image file; without `fragile_pythonpath` it stays readable."""
    with open(image, "ab") as file:
        file.write(MARK)


def fragile_pythonpath(folder: Path, root: Path) -> str:
    """A PYTHONPATH with which marked images abort the process; fpnx is imported from `root`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return os.pathsep.join([str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
