"""Where stored numbers come from: which parts of a model are trained, its weights, versions, options and device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from fpnx.core.text import escape

__all__ = ["AS_GIVEN", "ModelPart", "Provenance", "Setting", "WeightsInfo"]

AS_GIVEN = "as given"  # the source of parameters in a caller's own module


@dataclass(frozen=True)
class ModelPart:
    """The body or the pyramid of a model: whether it is trained, and where its parameters come from.

    Attributes:
        trained: None where nobody knows, as for parameters from a file.
        source: the name of the weights, a file, `"random, seed 0"` or `"as given"`.
    """

    trained: bool | None
    source: str

    @classmethod
    def drawn(cls, seed: int) -> ModelPart:
        """A part whose parameters are drawn from `seed`."""
        return cls(False, f"random, seed {seed}")

    @property
    def seed(self) -> int | None:
        """The seed that the parameters are drawn from; None where they are not drawn."""
        match = re.fullmatch(r"random, seed (\d+)", self.source) if self.trained is False else None
        return int(match[1]) if match else None

    def __str__(self) -> str:
        if self.source == AS_GIVEN:
            return AS_GIVEN
        state = {True: "trained", False: "untrained", None: "from file"}[self.trained]
        return f"{state} ({escape(self.source)})"

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` takes back."""
        return {"trained": self.trained, "source": self.source}

    @classmethod
    def from_json(cls, values: Any) -> ModelPart:
        """The part that `to_json` described.

        Raises:
            ValueError: for anything else.
        """
        trained, source = _mapping(values).get("trained"), _mapping(values).get("source")
        if trained not in (True, False, None) or not isinstance(source, str):
            raise ValueError("not the description of a model's part")
        return cls(trained, source)


class Setting(NamedTuple):
    """A value that parameters alone do not tell, and what decided it: `"file"`, `"option"`, `"default"` or `"name"`."""

    value: Any
    by: str


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What is known of a model's weights.

    Attributes:
        name: of the published weights or the file; `"random"` where all parts are drawn.
        body, pyramid: which part is trained.
        file, sha256: the file that they were read from; None where there is none.
        layout: the framework whose parameter names the file has.
        heads_ignored: tensors in the file that belong to heads.
        settings: what parameters alone do not tell, by name.
        note: where the preprocessing is not exactly that of the training.
    """

    name: str
    body: ModelPart
    pyramid: ModelPart
    file: str | None = None
    sha256: str | None = None
    layout: str | None = None
    heads_ignored: int = 0
    settings: Mapping[str, Setting] = field(default_factory=dict)
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` takes back."""
        return {
            "name": self.name,
            "file": self.file,
            "sha256": self.sha256,
            "layout": self.layout,
            "heads_ignored": self.heads_ignored,
            "settled": {
                name: {"value": list(value) if isinstance(value, tuple) else value, "by": by}
                for name, (value, by) in self.settings.items()
            },
            "note": self.note,
            "backbone": self.body.to_json(),
            "pyramid": self.pyramid.to_json(),
        }

    @classmethod
    def from_json(cls, values: Any) -> WeightsInfo:
        """The weights that `to_json` described; what a file leaves out gets its default.

        Raises:
            ValueError: where the parts are missing, or a value has another type.
        """
        told = _mapping(values)
        texts = {name: told.get(name) for name in ("file", "sha256", "layout", "note")}
        ignored, settled = told.get("heads_ignored", 0), _mapping(told.get("settled", {}))
        if not all(text is None or isinstance(text, str) for text in texts.values()) or not isinstance(ignored, int):
            raise ValueError("not a description of weights")
        return cls(
            name=str(told.get("name", "")),
            body=ModelPart.from_json(told.get("backbone")),
            pyramid=ModelPart.from_json(told.get("pyramid")),
            heads_ignored=ignored,
            settings={
                name: Setting(_mapping(s).get("value"), str(_mapping(s).get("by"))) for name, s in settled.items()
            },
            **texts,
        )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a file was made.

    Attributes:
        weights: which parts are trained, and where they come from.
        recipe: the preprocessing, in words.
        device, precision: what computed it.
        time: when it was begun, ISO 8601.
        versions: of fpnx, Python and the libraries.
        options: the options that its numbers depend on, as `fpnx.extract` takes them; None where a file has none.
        command: the command line.
        merged: of a merged file, what it was merged from.
        others: what a later version of fpnx wrote besides.
    """

    weights: WeightsInfo
    recipe: str
    device: str
    precision: str
    time: str
    versions: Mapping[str, str]
    options: Mapping[str, Any] | None = None
    command: tuple[str, ...] = ()
    merged: Mapping[str, Any] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` takes back."""
        plain: dict[str, Any] = {
            "versions": dict(self.versions),
            "options": None if self.options is None else dict(self.options),
            "command": list(self.command),
            "weights": self.weights.to_json(),
            "recipe": self.recipe,
            "device": self.device,
            "precision": self.precision,
            "time": self.time,
            "merged": None if self.merged is None else dict(self.merged),
        }
        return {name: value for name, value in plain.items() if value is not None} | dict(self.others)

    @classmethod
    def from_json(cls, values: Any) -> Provenance:
        """The provenance that `to_json` described.

        Raises:
            ValueError: where something is missing, or has another type.
        """
        told = _mapping(values)
        texts = {name: told.get(name) for name in ("recipe", "device", "precision", "time")}
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("its provenance is incomplete")
        options, merged, command = told.get("options"), told.get("merged"), told.get("command", [])
        known = {each.name for each in fields(cls)}
        return cls(
            weights=WeightsInfo.from_json(told.get("weights")),
            versions={str(name): str(version) for name, version in _mapping(told.get("versions")).items()},
            options=options if isinstance(options, Mapping) else None,
            command=tuple(map(str, command)) if isinstance(command, list) else (),
            merged=merged if isinstance(merged, Mapping) else None,
            others={name: value for name, value in told.items() if name not in known},
            **{name: str(text) for name, text in texts.items()},
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r:.40} is not an object")
    return value
