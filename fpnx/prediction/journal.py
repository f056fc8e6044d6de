"""The journal of a run: one line for each image that is done or failed, durable at commits, for `--resume`."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fpnx.core.errors import FpnxError
from fpnx.core.files import sync_folder
from fpnx.core.text import escape
from fpnx.store.reader import DONE, FAILED, PENDING, different_fields

__all__ = ["Journal", "check_settings"]

FORMAT = "fpnx-predictions"
VERSION = 1
CHECKSUM = re.compile(rb',"crc32":(\d+)\}\n')  # at the end of a line, of the line without it


class Journal:
    """A text file of JSON lines beside an output. The first line has the settings, each other one an image.

    Each line has a checksum. Of several lines about an image the last counts. A last line that is cut off, as after a
    crash, is dropped.

    Args:
        path: the file.
        settings: everything that the predictions depend on, as plain values.
        images: number of images.
        resume: continue the file where there is one, else start anew.

    Attributes:
        status: (images,) uint8, PENDING, DONE or FAILED.
        errors: by index, why images failed.

    Raises:
        FpnxError: the file is of a run with other settings or images, is damaged, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], images: int, *, resume: bool) -> None:
        self.path, self._settings = path, dict(settings)
        self.status = np.full(images, PENDING, np.uint8)
        self.errors: dict[int, str] = {}
        self._places: dict[int, int] = {}  # by index, where its line begins
        try:
            if resume and path.exists():
                self._end = self._read()
                self._file = open(path, "r+b")  # noqa: SIM115
                self._file.truncate(self._end)
                self._file.seek(self._end)
            else:
                self._end, self._file = 0, open(path, "w+b")  # noqa: SIM115
                self._write({"format": FORMAT, "version": VERSION, "images": images, "settings": self._settings})
                self.commit()
                sync_folder(path.parent)
        except OSError as error:
            raise self._failed(error) from error

    def done(self, index: int, entry: Mapping[str, Any]) -> None:
        """Note an image that is done, with what was found."""
        self._note(index, {"image": index, **entry}, DONE)
        self.errors.pop(index, None)

    def fail(self, index: int, reason: str) -> None:
        """Note an image that failed, and why."""
        self._note(index, {"image": index, "error": reason}, FAILED)
        self.errors[index] = reason

    def commit(self) -> None:
        """Make all lines durable."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The index and the entry of each image that is done, in the order of the images."""
        self.commit()
        with open(self.path, "rb") as file:
            for index in np.flatnonzero(self.status == DONE).tolist():
                file.seek(self._places[index])
                yield index, json.loads(file.readline())

    def close(self) -> None:
        """Close the file, which stays. What is not committed may be lost, as on a full disk."""
        with suppress(OSError):
            self._file.close()

    def remove(self) -> None:
        """Close and delete the file: its output is complete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _note(self, index: int, entry: Mapping[str, Any], status: int) -> None:
        self._places[index] = self._end
        self._write(entry)
        self.status[index] = status

    def _write(self, entry: Mapping[str, Any]) -> None:
        content = json.dumps(entry, separators=(",", ":")).encode("ascii")
        line = content[:-1] + b',"crc32":%d}\n' % zlib.crc32(content)
        try:
            self._file.write(line)
        except OSError as error:
            raise self._failed(error) from error
        self._end += len(line)

    def _read(self) -> int:
        """Read the file; returns where its last whole line ends."""
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    entry = json.loads(_checked(line))
                    if number == 0:
                        self._check_first(entry)
                    else:
                        self._take(entry, end)
                except (ValueError, LookupError, TypeError) as error:
                    if file.read(1):  # the crash of a run damages its last line only
                        raise FpnxError(
                            f"{escape(self.path)} is damaged in line {number + 1}: start over with --overwrite"
                        ) from error
                    if number == 0:
                        raise FpnxError(
                            f"{escape(self.path)} is no journal of fpnx predict: start over with --overwrite"
                        ) from error
                    break
                end += len(line)
        if end == 0:
            raise FpnxError(f"{escape(self.path)} is empty: start over with --overwrite")
        return end

    def _take(self, entry: Mapping[str, Any], place: int) -> None:
        index = entry["image"]
        if type(index) is not int or not 0 <= index < len(self.status):
            raise ValueError(f"there is no image {index}")
        self._places[index] = place
        self.status[index] = FAILED if "error" in entry else DONE
        self.errors.pop(index, None)
        if "error" in entry:
            self.errors[index] = str(entry["error"])

    def _check_first(self, entry: Mapping[str, Any]) -> None:
        if entry["format"] != FORMAT or entry["version"] != VERSION:
            raise ValueError("another format")
        check_settings(self.path, entry["settings"], self._settings)

    def _failed(self, error: OSError) -> FpnxError:
        return FpnxError(f"cannot write {escape(self.path)}: {error.strerror or error}: --resume goes on from there")


def _checked(line: bytes) -> bytes:
    """A line without its checksum.

    Raises:
        ValueError: the line is cut off or damaged.
    """
    match = CHECKSUM.search(line, max(0, len(line) - 30))
    if match is None or match.end() != len(line):
        raise ValueError("a line that is cut off")
    content = line[: match.start()] + b"}"
    if zlib.crc32(content) != int(match[1]):
        raise ValueError("a damaged line")
    return content


def check_settings(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise unless a file was made with these settings.

    Raises:
        FpnxError: with the settings that differ.
    """
    different = different_fields(stored, json.loads(json.dumps(settings)))
    if different:
        raise FpnxError(
            f"{escape(path)} is of a run with other settings ({'; '.join(different)}): repeat that one, take another "
            f"output with -o, or start over with --overwrite"
        )
