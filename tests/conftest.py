"""What the tests share: real photographs, small folders of images, and the command line as a process or a call."""

from __future__ import annotations

import io
import json
import os

# Before torch is loaded: tests run side by side, and more threads than cores would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# A job in the background is started with SIGINT ignored, and so would be all the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "sample_images"
SMALL: dict[str, Any] = {  # options with which an extraction takes little
    "backbone": "mobilenet_v2",
    "weights": "random",
    "size": 64,
    "levels": "P4-P5",
    "channels": 8,
    "device": "cpu",
}
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


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for these tests alone: what was measured before is measured again, and no home is written to."""
    home = tmp_path_factory.mktemp("cache")
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


def noise_image(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth random picture of `size` (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 2, size[0] // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def fpnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command line in this process, in an empty folder: `fpnx("extract", ...)` → (exit code, stdout, stderr)."""
    from fpnx.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the powers of root, which permissions do not bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def process(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`fpnx ARGUMENTS` in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "fpnx", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def document(text: str) -> dict[str, Any]:
    """The one JSON document that `text` is."""
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def copied(samples: Path, folder: Path, count: int) -> Path:
    """A folder of `count` copies of the sample photographs."""
    folder.mkdir()
    pictures = sorted(p for p in samples.rglob("*.jpg"))
    for i in range(count):
        shutil.copy(pictures[i % len(pictures)], folder / f"{i:05}.jpg")
    return folder


def archive(contents: dict[str, bytes]) -> bytes:
    """A plain tar of `contents`, by member name."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return held.getvalue()
