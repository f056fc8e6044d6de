"""Hostile, damaged and unusual images, names and HDF5 files."""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

import fpnx as package
from fpnx.core.errors import FpnxError, StoreError
from fpnx.images.decoding import PixelBudget
from fpnx.images.listing import find_images
from tests.helpers.files import noise_image
from tests.helpers.process import SMALL, Forked, unprivileged

LINE = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
ESCAPE = "\x1b[31mred\x07\u202e"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, rows: bytes | None = None) -> bytes:
    """A grey PNG, its pixels 0 unless `rows` says otherwise; `chunks` stand before the pixels."""
    data = zlib.compress(bytes((width + 1) * height) if rows is None else rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(width: int, height: int, tile: int) -> bytes:
    """An LZW TIFF whose picture is cut from one tile of `tile` × `tile`."""
    tags = [(256, width), (257, height), (258, 8), (259, 5), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(324, 8), (325, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 72) + bytes(64) + struct.pack("<H", len(tags)) + entries + bytes(4)


def jpeg(size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    held = io.BytesIO()
    noise_image(1, size).save(held, "JPEG", **options)
    return held.getvalue()


def damaged(content: bytes) -> bytes:
    """A PNG with one bit of its pixels turned."""
    at = content.index(b"IDAT") + 20
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


GOOD: dict[str, Callable[[], bytes]] = {
    "upright.jpg": jpeg,
    "turned.jpg": lambda: jpeg(exif=turned()),
    "broken exif.jpg": lambda: jpeg(exif=b"Exif\0\0garbage"),
    "large exif.jpg": lambda: jpeg(comment=b"x" * 60000),
    "large profile.png": lambda: png(40, 40, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1 << 19)))),
    "two\nlines.jpg": jpeg,
    "quote'\"$(touch harmed).jpg": jpeg,
    f"{ESCAPE}.jpg": jpeg,
    "é.jpg": jpeg,
    "e\u0301.jpg": jpeg,
    "below/upright.png": lambda: png(40, 40),
    "thin.png": lambda: png(1, 30000),
    "\udcff\udcfe.jpg": jpeg,
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.jpg": (lambda: jpeg()[:-300], "truncated"),
    "bit.png": (lambda: damaged(png(40, 40, rows=os.urandom(41 * 40).replace(b"\x05", b"\0"))), ""),
    "empty.jpg": (bytes, "empty file"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html>", "an HTML page"),
    "text.png": (lambda: b"hello", "not an image that fpnx reads"),
    "pointer.jpg": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "drawing.png": (lambda: b"<svg xmlns='x'/>", "SVG"),
    "script.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript"),
    "bomb.png": (lambda: png(30000, 30000, rows=b""), "30000×30000 pixels, over the limit of 178956970"),
    "tile.tif": (lambda: tiff(10, 10, 40000), "tiles of 1600000000 pixels"),
    "text bomb.png": (lambda: png(40, 40, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 27)))), "too large"),
    "float.tiff": (lambda: saved(Image.fromarray(np.full((9, 9), 7.0, np.float32))), "scale is unknown"),
}


LINKS = {"nowhere.jpg": "missing", "round.jpg": "round.jpg"}
REASONS = {**{name: reason for name, (_, reason) in BAD.items()}, **dict.fromkeys(LINKS, "broken link")}


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def saved(image: Image.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "TIFF")
    return held.getvalue()


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of damaged and unusual files."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "below").mkdir()
    for name, make in GOOD.items():
        (folder / name).write_bytes(make())
    for name, (make, _) in BAD.items():
        (folder / name).write_bytes(make())
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)
    (folder / "up").symlink_to(".")
    (folder / "device.png").symlink_to("/dev/zero")
    return folder


def test_a_folder_of_damaged_and_unusual_files(odd_files: Path, tmp_path: Path) -> None:
    result = package.extract(odd_files, tmp_path / "out.h5", **SMALL)
    reasons = dict(result.failed)
    assert set(reasons) == set(REASONS)
    for name, reason in REASONS.items():
        assert reason in reasons[name], name
    assert result.done == len(GOOD)
    with package.open(tmp_path / "out.h5") as store:
        assert {item.path for item in store} == set(GOOD)
        assert store["turned.jpg"].source_size == (60, 40)
        # The good ones are equal to the good ones alone.
        for name in ("upright.jpg", "thin.png", "\udcff\udcfe.jpg"):
            alone = package.extract(odd_files / name, tmp_path / "alone.h5", overwrite=True, **SMALL)
            assert alone.exit_code == 0
            with package.open(tmp_path / "alone.h5") as other:
                for level in store.levels:
                    np.testing.assert_allclose(store[name][level], other[0][level], atol=1e-5)


def test_damaged_and_unusual_files_with_sizes_that_follow_the_image(odd_files: Path, tmp_path: Path) -> None:
    """Sizes that follow the picture: the thin one would be 24 million pixels wide, and is refused."""
    options = {**SMALL, "size": "recipe", "short_side": 64, "max_pixels": 100_000}
    result = package.extract(odd_files, tmp_path / "out.h5", **options)
    assert {name for name, _ in result.failed} == {*REASONS, "thin.png"}
    assert "over the limit of 100000" in dict(result.failed)["thin.png"]


def test_memory_for_damaged_and_unusual_files_is_bounded(odd_files: Path, tmp_path: Path) -> None:
    program = (
        "import resource, sys; from fpnx.cli.main import main; import torch, fpnx.extraction.run; before = "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; code = main(sys.argv[1:]); "
        "print(code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    out, _ = Forked(program, "extract", odd_files, *LINE, cwd=tmp_path).communicate()
    code, mebibytes = map(int, out.splitlines()[-1].split())
    assert code == 1
    assert mebibytes < 1000, "a bomb was unpacked"


def test_no_control_character_reaches_the_terminal(fpnx: Callable[..., tuple[int, str, str]]) -> None:
    """Failing names, too, and an output that is named so."""
    bad = {f"{ESCAPE}.jpg", "two\nlines.png", "\udcff.jpg"}
    Path("pictures").mkdir()
    for name in bad:
        Path("pictures", name).write_bytes(b"no picture")
    Path("pictures/good.jpg").write_bytes(jpeg())
    made = fpnx("extract", "pictures", "-o", f"{ESCAPE}.h5", *LINE)
    verified = fpnx("verify", f"{ESCAPE}.h5", "--against", "pictures")
    info, missing = fpnx("info", f"{ESCAPE}.h5"), fpnx("info", f"{ESCAPE}2.h5")
    assert [result[0] for result in (made, verified, info, missing)] == [1, 0, 0, 2]
    for _, out, err in (made, verified, info, missing):
        assert not [c for c in out + err if not c.isprintable() and c != "\n"], repr(out + err)
    assert r"\x1b[31mred\x07\u202e.jpg" in made[1]
    assert r"two\nlines.png" in made[1]
    _, out, _ = fpnx("info", f"{ESCAPE}.h5", "--json")
    assert {entry["path"] for entry in json.loads(out)["failed"]} == bad


def test_no_permission_is_one_image_that_fails(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "good.jpg").write_bytes(jpeg())
    (tmp_path / "closed.jpg").write_bytes(jpeg())
    (tmp_path / "closed.jpg").chmod(0)
    result = package.extract([tmp_path / "good.jpg", tmp_path / "closed.jpg"], tmp_path / "out.h5", **SMALL)
    assert result.failed == (("closed.jpg", "Permission denied"),)


def test_a_named_pipe_fails_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "good.jpg").write_bytes(jpeg())
    result = package.extract([tmp_path / "good.jpg", tmp_path / "pipe.jpg"], tmp_path / "out.h5", **SMALL)
    assert result.failed == (("pipe.jpg", "not a regular file"),)


def test_pillow_is_left_as_it_was(odd_files: Path, tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    package.extract(odd_files / "upright.jpg", tmp_path / "out.h5", **SMALL)
    assert before == Image.MAX_IMAGE_PIXELS
    assert len(find_images([odd_files]).sources) == len(GOOD) + len(REASONS)


def test_decoding_is_bounded_over_all_threads() -> None:
    budget, lock, now, most = PixelBudget(100), threading.Lock(), [0], [0]

    def decode(pixels: int) -> None:
        with budget.share() as claim:
            claim(pixels)
            with lock:
                now[0] += pixels
                most[0] = max(most[0], now[0])
            threading.Event().wait(0.002)
            with lock:
                now[0] -= pixels

    threads = [threading.Thread(target=decode, args=(n,)) for n in [60, 30, 50, 10, 100, 40] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 60 <= most[0] <= 100


@pytest.fixture(scope="module")
def whole(odd_files: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A finished file of three images, one of them failed."""
    output = tmp_path_factory.mktemp("whole") / "out.h5"
    package.extract([odd_files / name for name in ("upright.jpg", "thin.png", "empty.jpg")], output, **SMALL)
    return output.read_bytes()


def replaced(name: str, data: Any, **options: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=data, **options)

    return change


def linked(name: str, link: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = link

    return change


def without(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]

    return change


def attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


def config_with(**changes: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs["config"] = json.dumps({**json.loads(file.attrs["config"]), **changes})

    return change


def elsewhere(file: h5py.File) -> None:
    """The features are raw bytes of another file."""
    shape, dtype = file["pyramids/64x64/P4"].shape, file["pyramids/64x64/P4"].dtype
    del file["pyramids/64x64/P4"]
    external = [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    made = file.create_dataset("pyramids/64x64/P4", shape, dtype, external=external)
    made.attrs["stride"] = 16


def virtual(file: h5py.File) -> None:
    shape, dtype = file["pyramids/64x64/P4"].shape, file["pyramids/64x64/P4"].dtype
    del file["pyramids/64x64/P4"]
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", shape)
    file.create_virtual_dataset("pyramids/64x64/P4", layout).attrs["stride"] = 16


def amplified(file: h5py.File) -> None:
    """Every path is the same text of 20 MB, which the file holds once."""
    name = "images/path"
    del file[name]
    made = file.create_dataset(name, (3,), h5py.string_dtype())
    file.flush()
    made[0] = b"x" * (20 << 20)
    file.flush()
    reference = made.id.get_offset()
    file.attrs["at"] = reference


HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "external link": (linked("images", h5py.ExternalLink("/tmp/other.h5", "/images")), "a link to another place"),
    "external level": (linked("pyramids/64x64", h5py.ExternalLink("/tmp/other.h5", "/x")), "a link to another place"),
    "soft link": (linked("images/status", h5py.SoftLink("/images/row")), "a link to another place"),
    "external storage": (elsewhere, "are in other files"),
    "virtual": (virtual, "are in other files"),
    "no level": (without("pyramids/64x64/P5"), "/pyramids/64x64/P5 is missing"),
    "no pyramids": (without("pyramids"), "/pyramids is missing"),
    "no status": (without("images/status"), "/images/status is missing"),
    "status type": (replaced("images/status", np.zeros(3, np.float64)), "float64 (3,), where uint8 (3,) belongs"),
    "status length": (replaced("images/status", np.zeros(2, np.uint8)), "uint8 (2,), where uint8 (3,) belongs"),
    "group of a dataset": (replaced("images", np.zeros(2)), "/images is no group"),
    "group names": (replaced("images/group", ["../..", "", "64x64"]), "names no sizes"),
    "huge table": (
        replaced("images/path", None, shape=(1 << 40,), dtype="S16", chunks=(1024,)),
        "claims to be larger than the file",
    ),
    "huge level": (
        replaced("pyramids/64x64/P4", None, shape=(3, 1 << 30, 64, 64), dtype="f4", chunks=(1, 8, 8, 8)),
        "claims to be larger than the file",
    ),
    "level type": (replaced("pyramids/64x64/P4", np.zeros((3, 8, 4, 4), "i4")), "float32 (n, C, H, W) belongs"),
    "foreign": (attribute("format", "other"), "not one of fpnx's"),
    "format list": (attribute("format", ["fpnx"] * 3), "no single value"),
    "future": (attribute("format_version", 2), "format version 2, this fpnx reads 1: update fpnx"),
    "infinite version": (attribute("format_version", np.inf), "no whole number"),
    "config": (attribute("config", "{"), "not JSON"),
    "deep config": (attribute("config", "[" * 60000), "not JSON"),
    "config list": (attribute("config", "[]"), "no JSON object"),
    "levels": (config_with(levels=["\x1b[31mP4"]), "names no levels"),
    "dtype": (config_with(dtype="float64"), "belongs"),
    "provenance": (attribute("provenance", "{}"), "incomplete"),
    "amplified": (amplified, ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_or_foreign_file_is_refused_in_one_line(whole: bytes, tmp_path: Path, kind: str) -> None:
    change, message = HOSTILE[kind]
    path = tmp_path / "out.h5"
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        change(file)
        at = file.attrs.get("at")
    if at is not None:
        content = bytearray(path.read_bytes())
        content[at + 16 : at + 48] = content[at : at + 16] * 2
        path.write_bytes(content)
        message = ""
        with package.open(path) as store:  # 60 MB: within 16 times the file
            assert [len(name) for name in store.paths] == [20 << 20] * 3
        return
    with pytest.raises(StoreError) as caught, package.open(path) as store:
        store.check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_share_one_text_cannot_fill_the_memory(tmp_path: Path) -> None:
    from fpnx.store.hdf5 import read_strings

    path, count = tmp_path / "names.h5", 200
    with h5py.File(path, "w") as file:
        made = file.create_dataset("path", (count,), h5py.string_dtype())
        made[0] = b"x" * (1 << 20)
        at = made.id.get_offset()
    content = bytearray(path.read_bytes())
    content[at : at + 16 * count] = content[at : at + 16] * count
    path.write_bytes(content)
    with h5py.File(path) as file, pytest.raises(StoreError, match="claims to be larger than the file"):
        read_strings(file, "path")
    with h5py.File(path, "w") as file:
        file["path"] = [b"a", b"\xff\n"]
        assert read_strings(file, "path") == [b"a", b"\xff\n"]


@pytest.mark.parametrize("length", [0, 7, 100, 3000, -1], ids=str)
def test_a_truncated_file_is_refused_in_one_line(whole: bytes, tmp_path: Path, length: int) -> None:
    path = tmp_path / "out.h5"
    path.write_bytes(whole[:length])
    for command in ("info", "verify"):
        from fpnx.cli.main import main

        assert main([command, str(path)]) == 2
    with pytest.raises(StoreError, match=r"not an HDF5 file|truncated"):
        package.open(path)


def test_paths_that_are_not_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    for name, message in (("pipe.h5", "not a regular file"), (".", "is a folder"), ("none.h5", "does not exist")):
        with pytest.raises(StoreError, match=message):
            package.open(tmp_path / name)


def test_a_file_without_read_permission_is_refused_in_one_line(whole: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:  # outside of tmp_path, which only its owner may enter
        path = Path(folder, "closed.h5")
        path.write_bytes(whole)
        path.chmod(0)
        Path(folder).chmod(0o755)
        with unprivileged(), pytest.raises(FpnxError, match=r"closed\.h5: Permission denied$"):
            package.open(path)


def test_random_damage_never_causes_a_traceback(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random bytes are changed: `info` and `verify` read the file, or refuse it in one line."""
    from fpnx.cli.main import main

    chance, path = np.random.default_rng(0), tmp_path / "out.h5"
    for _ in range(60):
        content = np.frombuffer(whole, np.uint8).copy()
        at = chance.integers(0, len(content), 20)
        content[at] = chance.integers(0, 256, 20)
        path.write_bytes(content.tobytes())
        codes = {main(["info", str(path)]), main(["verify", str(path), "--json"])}
        assert codes <= {0, 1, 2}, capsys.readouterr().err
        assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)
