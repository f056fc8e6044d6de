"""Provenance of stored features: trained parts of the model, weights, versions, options and device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from fpnx.core.text import escape

__all__ = ["AS_GIVEN", "NO_PARAMETERS", "ModelPart", "Provenance", "Setting", "WeightsInfo", "describe_pyramid"]

AS_GIVEN = "as given"  # the source of parameters in a caller's own module, and the backbone in the options of its run
NO_PARAMETERS = "no parameters"  # the source of a pyramid that has none


@dataclass(frozen=True)
class ModelPart:
    """The backbone or the pyramid of a model: whether it is trained, and where its parameters come from.

    Attributes:
        trained: None where it is unknown, as for parameters from a file.
        source: the name of the weights, a file, `"random, seed 0"`, `"as given"` or `"no parameters"`.
    """

    trained: bool | None
    source: str

    @classmethod
    def drawn(cls, seed: int) -> ModelPart:
        """A part with random parameters from `seed`."""
        return cls(False, f"random, seed {seed}")

    @property
    def seed(self) -> int | None:
        """The seed of random parameters; None for other parameters."""
        match = re.fullmatch(r"random, seed (\d+)", self.source) if self.trained is False else None
        return int(match[1]) if match else None

    def __str__(self) -> str:
        if self.source in (AS_GIVEN, NO_PARAMETERS) and self.trained is None:
            return self.source
        state = {True: "trained", False: "untrained", None: "from file"}[self.trained]
        return f"{state} ({escape(self.source)})"

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; the inverse of `from_json`."""
        return {"trained": self.trained, "source": self.source}

    @classmethod
    def from_json(cls, values: Any) -> ModelPart:
        """The inverse of `to_json`.

        Raises:
            ValueError: for values that `to_json` cannot have returned.
        """
        trained, source = _mapping(values).get("trained"), _mapping(values).get("source")
        if trained not in (True, False, None) or not isinstance(source, str):
            raise ValueError("not the description of a model's part")
        return cls(trained, source)


class Setting(NamedTuple):
    """A setting that cannot be read from the parameters.

    Attributes:
        value: of the setting.
        by: where it comes from: `"file"`, `"option"`, `"default"` or `"name"`.
    """

    value: Any
    by: str


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What is known about a model's weights.

    Attributes:
        name: of the published weights or the file; `"random"` where all parts are random.
        body, pyramid: state of the backbone and of the pyramid.
        file, sha256: the file that they were read from, or None.
        layout: the framework whose state-dict layout the file has.
        heads_ignored: number of other tensors in the file, of heads and other networks, which are not loaded.
        key: the key of the file under which its parameters are, such as `"state_dict"`; None for the file itself.
        prefix: what stands before their names, such as `"module.encoder."`; None for nothing.
        settings: settings that cannot be read from the parameters, by name.
        note: how the preprocessing differs from that of the training, and which of several sets of parameters in
            the file was taken; or None.
    """

    name: str
    body: ModelPart
    pyramid: ModelPart
    file: str | None = None
    sha256: str | None = None
    layout: str | None = None
    heads_ignored: int = 0
    key: str | None = None
    prefix: str | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; the inverse of `from_json`."""
        return {
            "name": self.name,
            "file": self.file,
            "sha256": self.sha256,
            "layout": self.layout,
            "heads_ignored": self.heads_ignored,
            **({} if self.key is None else {"key": self.key}),
            **({} if self.prefix is None else {"prefix": self.prefix}),
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
        """The inverse of `to_json`; missing values get their defaults.

        Raises:
            ValueError: where the parts are missing, or a value has another type.
        """
        entries = _mapping(values)
        texts = {name: entries.get(name) for name in ("file", "sha256", "layout", "key", "prefix", "note")}
        ignored, settled = entries.get("heads_ignored", 0), _mapping(entries.get("settled", {}))
        if not all(text is None or isinstance(text, str) for text in texts.values()) or not isinstance(ignored, int):
            raise ValueError("not a description of weights")
        return cls(
            name=str(entries.get("name", "")),
            body=ModelPart.from_json(entries.get("backbone")),
            pyramid=ModelPart.from_json(entries.get("pyramid")),
            heads_ignored=ignored,
            settings={
                name: Setting(_mapping(s).get("value"), str(_mapping(s).get("by"))) for name, s in settled.items()
            },
            **texts,
        )


def describe_pyramid(kind: str, weights: WeightsInfo) -> str:
    """`"untrained (random, seed 0)"`, or `"pafpn, untrained (random, seed 0)"` for a pyramid that is no whole FPN.

    Without a pyramid: `"none"`."""
    if kind == "none":
        return kind
    variant = weights.settings.get("neck_variant")
    named = [] if kind == "fpn" and variant is None else [kind if variant is None else f"{kind} {variant.value}"]
    return ", ".join([*map(escape, named), str(weights.pyramid)])


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a file was made.

    Attributes:
        weights: the model's weights.
        recipe: the preprocessing, in words.
        device, precision: on which device and in which precision it was computed.
        time: start of the run, ISO 8601.
        versions: of fpnx, Python and the libraries.
        options: the options that the features depend on, as `fpnx.extract` takes them; None where a file has none.
        command: the command line.
        merged: for a merged file, the files it was merged from.
        updated: for an updated file, how many images were copied into it, and how these had been computed.
        others: further entries, written by a later version of fpnx.
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
    updated: Mapping[str, Any] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON; the inverse of `from_json`."""
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
            "updated": None if self.updated is None else dict(self.updated),
        }
        return {name: value for name, value in plain.items() if value is not None} | dict(self.others)

    @classmethod
    def from_json(cls, values: Any) -> Provenance:
        """The inverse of `to_json`.

        Raises:
            ValueError: where a value is missing, or has another type.
        """
        entries = _mapping(values)
        texts = {name: entries.get(name) for name in ("recipe", "device", "precision", "time")}
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("its provenance is incomplete")
        options, command = entries.get("options"), entries.get("command", [])
        merged, updated = entries.get("merged"), entries.get("updated")
        known = {each.name for each in fields(cls)}
        return cls(
            weights=WeightsInfo.from_json(entries.get("weights")),
            versions={str(name): str(version) for name, version in _mapping(entries.get("versions")).items()},
            options=options if isinstance(options, Mapping) else None,
            command=tuple(map(str, command)) if isinstance(command, list) else (),
            merged=merged if isinstance(merged, Mapping) else None,
            updated=updated if isinstance(updated, Mapping) else None,
            others={name: value for name, value in entries.items() if name not in known},
            **{name: str(text) for name, text in texts.items()},
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r:.40} is not an object")
    return value
