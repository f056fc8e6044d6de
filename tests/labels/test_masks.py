"""PNG masks: values, palettes, bits, names of classes, and masks that are none."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpnx.core.errors import FpnxError, ImageError
from fpnx.labels.annotations import Category
from fpnx.labels.masks import mask_values
from fpnx.labels.reading import read_labels
from tests.helpers.labels import files


def save(path: Path, values: object, mode: str = "L") -> Path:
    """A mask with these values, in grey or with a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.array(values, np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(array)
    if mode == "P":
        image = image.convert("P")
        image.putdata(array.ravel().tolist())
        image.putpalette([(37 * i) % 256 for i in range(768)])
    image.save(path)
    return path


def grey_png(path: Path, rows: list[bytes], width: int, bits: int) -> None:
    """A grey PNG with `bits` for each pixel, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_values_are_classes_and_255_is_none(tmp_path: Path) -> None:
    save(tmp_path / "masks/a.png", [[0, 7], [255, 7], [0, 0]])
    save(tmp_path / "masks/deep/b.png", [[26, 255]], "P")
    labels = read_labels(tmp_path / "masks", ["a.jpg", "deep/b.jpg"], tmp_path / "images")
    assert (labels.format, labels.task, labels.dropped) == ("masks", "semantic", {})
    assert labels.categories == (Category(0, "0"), Category(7, "7"), Category(26, "26"))
    first, second = labels.images
    assert (first.name, first.size, first.classes.tolist(), first.boxes) == ("a.jpg", (3, 2), [0, 1], None)
    assert (second.name, second.size, second.classes.tolist()) == ("deep/b.jpg", (1, 2), [2])
    assert second.mask_file == str(tmp_path / "masks/deep/b.png")
    assert labels.remarks == ("there is no classes.txt, so classes have the values of pixels for names",)


def test_every_kind_of_png_with_one_value(tmp_path: Path) -> None:
    values = [[0, 1, 2, 3], [3, 2, 1, 0]]
    for mode in ("L", "P", "I;16"):
        np.testing.assert_array_equal(mask_values(str(save(tmp_path / "a.png", values, mode))), values)
    np.testing.assert_array_equal(mask_values(str(save(tmp_path / "a.png", [[300, 65535]], "I;16"))), [[300, 65535]])
    grey_png(tmp_path / "a.png", [bytes([0b00011011]), bytes([0b11100100])], 4, 2)
    np.testing.assert_array_equal(mask_values(str(tmp_path / "a.png")), values)
    grey_png(tmp_path / "a.png", [bytes([0x0F, 0x10])], 3, 4)
    np.testing.assert_array_equal(mask_values(str(tmp_path / "a.png")), [[0, 15, 1]])
    grey_png(tmp_path / "a.png", [bytes([0b01100000])], 3, 1)
    np.testing.assert_array_equal(mask_values(str(tmp_path / "a.png")), [[0, 1, 1]])


@pytest.mark.parametrize("name", ["masks/classes.txt", "classes.txt", "labels.txt"])
def test_names_of_classes(name: str, tmp_path: Path) -> None:
    save(tmp_path / "masks/a.png", [[0, 2]])
    files(tmp_path, {name: "background\r\ncat\ndog\n\n"})
    labels = read_labels(tmp_path / "masks", ["a.jpg"], tmp_path / "images")
    assert labels.categories == (Category(0, "background"), Category(1, "cat"), Category(2, "dog"))
    assert (labels.images[0].classes.tolist(), labels.remarks) == ([0, 2], ())


def test_names_off_by_one_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "masks/a.png", [[0, 2]])
    files(tmp_path, {"masks/classes.txt": "cat\ndog"})
    with pytest.raises(FpnxError, match=r"values up to 2, and classes.txt names 2, for the values 0 to 1 \(is the "
                                        r"first line, for the background at value 0, missing\?\)"):  # fmt: skip
        read_labels(tmp_path / "masks", ["a.jpg"], tmp_path / "images")


def test_masks_of_0_and_255_only_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "masks/a.png", [[0, 255]])
    with pytest.raises(FpnxError, match="hold only 0, 255, and 255 stands for no class: give objects another value"):
        read_labels(tmp_path / "masks", ["a.jpg"], tmp_path / "images")


def test_where_masks_may_be(tmp_path: Path) -> None:
    """In a parallel folder that is or is not listed with the images, and beside images of another format."""
    for name in ("pics/train/a.jpg", "pics/train/b.png"):
        save(tmp_path / name, [[1]])
    for name in ("seg/train/a.png", "seg/train/b.png", "pics/train/a.png"):
        save(tmp_path / name, [[0, 1]])
    pairs = {"a.jpg": "a", "b.png": "b"}
    for root, prefix in (("pics/train", ""), ("pics", "train/"), (".", "pics/train/")):
        images = [prefix + name for name in pairs]
        for listed in ([], ["seg/train/a.png", "seg/train/b.png", "pics/train/a.png"] if root == "." else []):
            labels = read_labels(tmp_path / "seg", [*images, *listed], tmp_path / root)
            found = {image.name: image.mask_file for image in labels.images}
            if listed:  # a.jpg and a.png are two pictures with one name
                assert found[f"{prefix}b.png"] == str(tmp_path / "seg/train/b.png")
            else:
                assert found == {prefix + name: str(tmp_path / f"seg/train/{stem}.png") for name, stem in pairs.items()}
    beside = read_labels(tmp_path / "pics/train", ["a.jpg", "a.png", "b.png"], tmp_path / "pics/train")
    assert [(image.name, image.size) for image in beside.images] == [("a.jpg", (1, 2))]


def test_masks_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    whole = save(tmp_path / "masks/a.png", np.random.default_rng(0).integers(0, 9, (50, 50))).read_bytes()
    files(tmp_path / "masks", {"b.png": whole[:60], "c.png": b"", "d.png": whole[:-30]})
    Image.new("RGB", (2, 2)).save(tmp_path / "masks/e.png")
    Image.new("LA", (2, 2)).save(tmp_path / "masks/f.png")
    (tmp_path / "masks/g.png").mkdir()
    labels = read_labels(tmp_path / "masks", ["a.jpg", "b.jpg"], tmp_path / "images")
    assert [image.name for image in labels.images] == ["a.jpg"]
    dropped = labels.dropped["masks that cannot be read"]
    assert dropped.count == 5
    assert dropped.example.startswith("b.png (")
    for name, reason in (("e", "it has RGB colours, not one value"), ("f", "it has LA colours"), ("c", "PNG")):
        with pytest.raises(ImageError, match=reason):
            mask_values(str(tmp_path / f"masks/{name}.png"))
    with pytest.raises(ImageError, match="No such file"):
        mask_values(str(tmp_path / "masks/none.png"))


def test_a_large_png_is_refused_without_reading_it(tmp_path: Path) -> None:
    grey_png(tmp_path / "a.png", [b""], 2_000_000_000, 8)
    with pytest.raises(ImageError, match="exceeds limit"):
        mask_values(str(tmp_path / "a.png"))


def test_no_mask_at_all(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(FpnxError, match=r"a.png has colours, and masks have one value for each pixel"):
        read_labels(tmp_path, ["a.jpg"], tmp_path / "images")
    save(tmp_path / "values/a.png", np.arange(300).reshape(2, 150), "I;16")
    with pytest.raises(FpnxError, match="the masks have 299 different values: they are no classes"):
        read_labels(tmp_path / "values", ["a.jpg"], tmp_path / "images")
