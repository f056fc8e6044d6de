"""PNG masks for semantic segmentation: the class of each pixel as its value, or as its index in a palette."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fpnx.core.errors import FpnxError, ImageError
from fpnx.core.text import escape
from fpnx.core.warning_filters import ignored_warnings
from fpnx.labels.annotations import Category, ImageLabels, LabelSet
from fpnx.labels.class_names import find_class_names
from fpnx.labels.dropped import DropCounter
from fpnx.labels.files import list_files
from fpnx.labels.pairing import absolute_images, pair_files
from fpnx.labels.source import LabelSource

__all__ = ["IGNORED", "MAX_CLASSES", "is_class_mask", "mask_files", "mask_values", "read_masks"]

IGNORED = 255  # the value of pixels without a class
MAX_CLASSES = 255  # so that indices stay below IGNORED
WORKERS = 4
BAD_FILE = "masks that cannot be read"
HEADER, GREY = 26, 0  # bytes of a PNG up to its colour type; the colour type of grey
SCALED = {2: 85, 4: 17}  # Pillow spreads grey values of so many bits over 0 to 255, by this factor
ONE_VALUE = ("1", "P", "L", "I;16", "I;16B", "I")


@dataclass(frozen=True)
class _Mask:
    path: str
    size: tuple[int, int]
    values: tuple[int, ...]


def read_masks(source: LabelSource) -> LabelSet:
    """Read the PNG masks of a folder, each for the image of its name. All are read once, for the values in them.

    Values are the ids of classes; 255 stands for no class. Their names are the lines of `classes.txt` or `labels.txt`
    in the folder or above it, the first for value 0; without such a file, the values.

    Raises:
        FpnxError: where there is no mask, no class, or a value without a name.
    """
    where, dropped = f"labels {escape(source.path)}", DropCounter()
    files = mask_files(source)
    if not files:
        raise FpnxError(f"{where}: no PNG masks")
    masks, reasons = [], {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for path, outcome in zip(files, pool.map(_examined, files), strict=True):
            if isinstance(outcome, _Mask):
                masks.append(outcome)
            else:
                reasons[path] = outcome
    for path, reason in reasons.items():
        dropped.add(BAD_FILE, f"{os.path.relpath(path, os.path.abspath(source.path))} ({reason})")
    if not masks:
        raise FpnxError(f"{where}: no mask can be used: {dropped.words()}")
    values = sorted({value for mask in masks for value in mask.values} - {IGNORED})
    categories, remarks = _categories(values, source, where)
    if values in ([], [0]) and any(IGNORED in mask.values for mask in masks):
        raise FpnxError(
            f"{where}: the masks hold only {', '.join(map(str, [*values, IGNORED]))}, and 255 stands for no class: "
            f"give objects another value, such as 1"
        )
    index = {category.id: position for position, category in enumerate(categories)}
    images: dict[str, ImageLabels] = {}
    for mask, name in zip(masks, pair_files(source, [mask.path for mask in masks]), strict=True):
        if name in images:
            first = os.path.basename(images[name].mask_file or "")
            dropped.add("second masks of one image", f"{os.path.basename(mask.path)} beside {first}")
            continue
        classes = np.array([index[value] for value in mask.values if value != IGNORED], np.int64)
        images[name] = ImageLabels(name=name, size=mask.size, classes=classes, mask_file=mask.path)
    return LabelSet(
        format="masks",
        path=source.path,
        task="semantic",
        categories=categories,
        images=tuple(images.values()),
        dropped=dropped.result(),
        remarks=remarks,
    )


def mask_files(source: LabelSource) -> list[str]:
    """Absolute paths of the PNGs that may be masks: all in a folder below the images' own; in another one those that
    are no images of the run, or belong to an image of another format with the same name."""
    folder, root = os.path.abspath(source.path), os.path.abspath(source.root or ".")
    files = list_files(folder, (".png",))
    if folder != root and folder.startswith(os.path.join(root, "")):
        return files
    images = absolute_images(source)
    stems = {os.path.splitext(path)[0] for path in images if not path.lower().endswith(".png")}
    return [path for path in files if path not in images or os.path.splitext(path)[0] in stems]


def is_class_mask(path: str) -> bool:
    """Whether a PNG has one value for each pixel, by its header."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.mode in ONE_VALUE
    except Exception:  # whatever Pillow raises for a damaged file
        return False


def mask_values(path: str) -> np.ndarray:
    """The value of each pixel of a mask.

    Returns:
        (H, W) integers.

    Raises:
        ImageError: with the reason why it cannot be read.
    """
    try:
        with ignored_warnings(r"PIL\b"), open(path, "rb") as file:
            header = file.read(HEADER)
            file.seek(0)
            with Image.open(file, formats=("PNG",)) as image:
                if image.mode not in ONE_VALUE:
                    raise ImageError(f"it has {image.mode} colours, not one value (palette or grey) for each pixel")
                values = np.asarray(image)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(error.strerror or "not a whole PNG") from error
    except Exception as error:  # whatever Pillow raises for a damaged file
        raise ImageError(f"not a whole PNG ({escape(str(error))})") from error
    if values.dtype == bool:
        values = values.astype(np.uint8)
    bits, colour = header[-2:]
    return values // SCALED[bits] if colour == GREY and bits in SCALED else values


def _examined(path: str) -> _Mask | str:
    """Size and values of a mask, or the reason why it cannot be read."""
    try:
        values = mask_values(path)
    except ImageError as error:
        return str(error)
    different = np.flatnonzero(np.bincount(values.ravel())) if values.dtype == np.uint8 else np.unique(values)
    return _Mask(path, (values.shape[0], values.shape[1]), tuple(different.tolist()))


def _categories(values: list[int], source: LabelSource, where: str) -> tuple[tuple[Category, ...], tuple[str, ...]]:
    """The classes, from a list of names or from the values."""
    found = find_class_names(os.path.abspath(source.path))
    if found is None:
        if len(values) > MAX_CLASSES:
            raise FpnxError(f"{where}: the masks have {len(values)} different values: they are no classes")
        remark = "there is no classes.txt, so classes have the values of pixels for names"
        return tuple(Category(value, str(value)) for value in values), (remark,)
    names, file = found
    if len(names) > MAX_CLASSES:
        raise FpnxError(f"{where}: {file} names {len(names)} classes; masks can tell {MAX_CLASSES}")
    if values and values[-1] >= len(names):
        hint = ""
        if values[-1] == len(names):
            hint = " (is the first line, for the background at value 0, missing?)"
        raise FpnxError(
            f"{where}: the masks have values up to {values[-1]}, and {file} names {len(names)}, for the values 0 to "
            f"{len(names) - 1}{hint}"
        )
    return tuple(Category(number, name) for number, name in enumerate(names)), ()
