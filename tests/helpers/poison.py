"""Images that kill the process that opens them, as a fault in a decoder does.

The product knows nothing of it: `sitecustomize`, which Python imports when it starts, makes Pillow abort on files that
hold a mark.
"""

from __future__ import annotations

import os
from pathlib import Path

MARK = b"what no decoder survives"
CUSTOM = f"""
import os
from PIL import Image

MARK, opened = {MARK!r}, Image.open

def fragile(file, *arguments, **options):
    if not isinstance(file, (str, bytes, os.PathLike)):
        whole = file.read()
        file.seek(0)
        if MARK in whole:
            os.abort()
    return opened(file, *arguments, **options)

Image.open = fragile
"""


def poisoned(image: Path) -> None:
    """Append the mark to an image file, which stays readable for others."""
    with open(image, "ab") as file:
        file.write(MARK)


def fragile_pythonpath(folder: Path, root: Path) -> str:
    """A PYTHONPATH under which marked images kill, and fpnx is found in `root`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CUSTOM)
    return os.pathsep.join([str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
