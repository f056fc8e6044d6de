"""Reading label files: whole files on a disk or at a URL, their text, and the files of a folder."""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Iterable

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.remote import client as remote
from fpnx.remote.urls import checked, is_url

__all__ = ["as_text", "list_files", "read_bytes", "read_text"]

# The longer byte order marks first: that of UTF-32 begins with that of UTF-16.
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_bytes(path: str, most: int = -1) -> bytes:
    """The content of a file, or its first `most` bytes; `path` may be a URL.

    Raises:
        FpnxError: where it is missing, a folder, a device or a pipe, or cannot be read.
    """
    if is_url(os.fsencode(path)):
        url = checked(os.fsencode(path))
        info = remote.object_info(url)
        end = min(most, info.bytes) if most >= 0 and info.bytes >= 0 else None  # -1: a server that gives no size
        return remote.read(url, info, 0, end)[: most if most >= 0 else None]
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise FpnxError(f"labels {escape(path)}: a folder where a file is expected")
        if not stat.S_ISREG(mode):
            raise FpnxError(f"labels {escape(path)}: not a regular file")
        with open(path, "rb") as file:
            return file.read(most)
    except FileNotFoundError:
        raise FpnxError(f"labels {escape(path)}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise FpnxError(f"labels {escape(path)}: {getattr(error, 'strerror', None) or error}") from error


def read_text(path: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        FpnxError: as from `read_bytes`, and for another encoding.
    """
    return as_text(read_bytes(path), path)


def as_text(content: bytes, path: str, whole: bool = True) -> str:
    """Bytes as text, see `read_text`; a part of a file (not `whole`) may end within a character."""
    bom, encoding = next(((bom, name) for bom, name in BOMS if content.startswith(bom)), (b"", "utf-8"))
    try:
        return codecs.getincrementaldecoder(encoding)().decode(content[len(bom) :], whole)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FpnxError(
            f"labels {escape(path)}: not a text in {encoding.upper()} (line {line}): save it as UTF-8"
        ) from None


def list_files(folder: str, extensions: Iterable[str]) -> list[str]:
    """Paths of the files of these extensions in a folder and its subfolders, in order; hidden ones are left out.

    Args:
        folder: a folder on a disk. Links are followed; each folder is entered once.
        extensions: in lower case, such as `".txt"`.

    Raises:
        FpnxError: where the folder itself cannot be read.
    """
    wanted, entered, found = tuple(extensions), set(), []

    def fail(error: OSError) -> None:
        if error.filename == folder:
            raise FpnxError(f"labels {escape(folder)}: {error.strerror}") from error

    for current, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(current)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith(".") and name.lower().endswith(wanted))
        found += [os.path.join(current, name) for name in names]
    return found
