"""Words for shell completion. torchvision's names are read from its source files: importing it takes seconds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fpnx.core.levels import LEVELS

__all__ = ["backbone_names", "completer", "weights_names"]

WEIGHTS = ("default", "imagenet", "coco", "random")  # and names of torchvision's weights, and files
LEVEL_RANGES = ("P2-P5", "P3-P7")
DEVICES = ("auto", "cpu", "cuda", "mps")

BUILDER = re.compile(r"^@register_model\(\)$.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)
WEIGHTS_ENUM = re.compile(r"^class (\w+)\(WeightsEnum\):\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
ENUM_MEMBER = re.compile(r"^    (\w+) = Weights\(", re.MULTILINE)


def completer(words: str | tuple[str, ...], lists: bool = False) -> Callable[[str], list[str]] | None:
    """The function that Typer calls to complete a value; None if there are no words.

    Args:
        words: what may be completed, or the key of a function in `WORDS`, called only when a value is completed.
        lists: whether the value may hold several words with commas, of which the last is completed.
    """
    if not words:
        return None

    def complete(incomplete: str) -> list[str]:
        start = incomplete.rfind(",") + 1 if lists else 0
        known = WORDS[words]() if isinstance(words, str) else words
        return [incomplete[:start] + word for word in known if word.startswith(incomplete[start:])]

    return complete


def backbone_names() -> list[str]:
    """The classification models that torchvision registers."""
    return sorted(name for text in _torchvision_sources("models") for name in BUILDER.findall(text))


def weights_names() -> list[str]:
    """What `--weights` takes, besides files: words, torchvision's weights of classifiers and of FPN detectors, and the
    names of these detectors."""
    classifiers = [name for text in _torchvision_sources("models") for name in _weights_in(text)]
    sources = list(_torchvision_sources("models/detection"))
    detectors = [name for text in sources for name in _weights_in(text) if "_FPN_" in name]
    builders = [name for text in sources for name in BUILDER.findall(text) if "_fpn" in name]
    return [*WEIGHTS, *sorted([*classifiers, *detectors, *builders])]


def level_names() -> list[str]:
    """Ranges and names of levels."""
    return [*LEVEL_RANGES, *LEVELS]


def device_names() -> list[str]:
    """Kinds of devices, and the NVIDIA cards of this machine; Linux names these in `/dev`."""
    cards = sorted(int(path.name[len("nvidia") :]) for path in Path("/dev").glob("nvidia[0-9]*"))
    return [*DEVICES, *(f"cuda:{card}" for card in cards)]


WORDS: dict[str, Callable[[], list[str]]] = {
    "backbones": backbone_names,
    "weights": weights_names,
    "levels": level_names,
    "devices": device_names,
}


def _torchvision_sources(folder: str) -> Iterator[str]:
    """The text of the modules in a folder of the installed torchvision; nothing where it has no source files."""
    spec = importlib.util.find_spec("torchvision")  # does not import it
    for location in (spec and spec.submodule_search_locations) or ():
        for path in Path(location, folder).glob("*.py"):
            yield path.read_text(encoding="utf-8")


def _weights_in(text: str) -> Iterator[str]:
    """The names of the weights that a module of torchvision publishes: `ResNet50_Weights.IMAGENET1K_V2`."""
    for name, body in WEIGHTS_ENUM.findall(text):
        yield from (f"{name}.{member}" for member in ENUM_MEMBER.findall(body))
