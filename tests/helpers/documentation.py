"""README and docs/ as tests read them: pages, fenced blocks, command lines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.helpers.files import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lines_of(page: Path) -> list[str]:
    """The lines of a page."""
    return page.read_text().splitlines()


def text_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page."""
    return BLOCK.findall(page.read_text())


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language on a page."""
    return [text for each, text in text_of(page) if each == language]


def without_blocks(page: Path) -> str:
    """The running text and the tables of a page."""
    return BLOCK.sub("", page.read_text())


def fpnx_command(line: str) -> str | None:
    """The part of a line that calls fpnx, without a comment and the path of a virtual environment; else None."""
    line = re.sub(r"\s+#.*", "", line).strip()
    match = re.search(r"(?:^|\.venv/bin/)(fpnx .*)", line)
    return match[1] if match else None


def command_lines(
    pages: Iterable[Path] = PAGES, languages: Iterable[str] = ("sh",), addresses: bool = False, every: bool = False
) -> list[str]:
    """Lines that call fpnx; with `addresses` only those that name objects by address, else only the others."""
    lines = [
        line for page in pages for each in languages for block in blocks(page, each) for line in block.splitlines()
    ]
    calls = sorted({call for line in lines if (call := fpnx_command(line))})
    return [call for call in calls if every or ("://" in call) is addresses]
