"""Fixtures that all tests share: photographs, small folders of images, the command line as a call, a browser."""

from __future__ import annotations

import os

# Before torch is loaded: tests run side by side, and more threads than cores would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.files import SAMPLES, noise_image

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# A job in the background is started with SIGINT ignored, and so would be all the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHROMIUM_COMMANDS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_OPTIONS = [  # for containers, and without requests of its own
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def pytest_collection_finish() -> None:
    """Take what the modules hold, which stays until the end, out of the garbage collector's sight."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for these tests alone, of all workers: what was measured before is measured again, and no home is
    written to."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    home.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real photographs that comes with the project."""
    return SAMPLES


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of six small JPEGs, landscape and portrait, two of them in a folder below."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i, (name, size) in enumerate(
        [("a.jpg", (96, 64)), ("b.JPG", (64, 96)), ("c.png", (80, 80)), ("d.webp", (96, 64)),
         ("below/a.jpg", (70, 50)), ("below/e.jpeg", (50, 70))]
    ):  # fmt: skip
        noise_image(i, size).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The system's Chromium, headless, driven by Playwright.

    Without Chromium the test is skipped, or fails where FPNX_REQUIRE_BROWSER is set. The scope is one module, because
    Playwright keeps an asyncio loop running in this thread, and other modules' tests start their own.
    """
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, CHROMIUM_COMMANDS)), None)
    if executable is None:
        commands = ", ".join(CHROMIUM_COMMANDS)
        reason = f"no Chromium: none of {commands} is on the PATH; on Debian: apt-get install chromium"
        if os.environ.get("FPNX_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path_factory.mktemp("config"))}  # of its crash reports
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_OPTIONS, env=environment)
        yield browser
        browser.close()


@pytest.fixture
def fpnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command line in this process, in an empty folder: `fpnx("extract", ...)` → (exit code, stdout, stderr)."""
    from fpnx.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
