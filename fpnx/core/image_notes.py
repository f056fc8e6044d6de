"""What was decided about images without being asked, counted by kind for the end of a run."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from fpnx.core.text import plural

__all__ = [
    "BOX_OUTSIDE",
    "FLAT",
    "MORE_FRAMES",
    "NOT_A_NUMBER",
    "OTHER_LABEL_SIZE",
    "PROFILE",
    "TRANSPARENCY",
    "ImageNotes",
    "note_lines",
]

# The kinds, as `--json` names them.
TRANSPARENCY = "transparency"
PROFILE = "color_profile"
FLAT = "almost_flat"
MORE_FRAMES = "more_frames"
NOT_A_NUMBER = "not_a_number"
OTHER_LABEL_SIZE = "other_label_size"
BOX_OUTSIDE = "box_outside"

TEXTS = {
    TRANSPARENCY: "transparency was laid over white",
    PROFILE: "a colour profile that is not sRGB was ignored",
    FLAT: "almost flat after scaling to 8 bits, since little of the range is used: see --value-range",
    MORE_FRAMES: "only the first of several frames or pages was read",
    NOT_A_NUMBER: "values that are not numbers became black",
    OTHER_LABEL_SIZE: "the labels say a size of another shape; boxes were taken as they are",
    BOX_OUTSIDE: "a box outside of the image has a feature of zeros and level 0",
}


class ImageNotes:
    """Counts images by kind of note; may be used by several threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, kinds: Iterable[str]) -> None:
        """Count one image, once for each of the different `kinds`."""
        with self._lock:
            self._counts.update(set(kinds))

    def to_json(self) -> dict[str, int]:
        """Number of images by kind, in a fixed order."""
        with self._lock:
            return {kind: self._counts[kind] for kind in TEXTS if self._counts[kind]}


def note_lines(counts: Mapping[str, int]) -> list[str]:
    """One line for each kind: `"12 images: transparency was laid over white"`."""
    return [f"{plural(count, 'image')}: {TEXTS[kind]}" for kind, count in counts.items()]
