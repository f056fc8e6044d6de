"""Declaration of an option: default, help text, panel, placeholder and choices, kept on a config field."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, replace
from typing import Any

__all__ = ["Option", "like", "option", "declared_option"]

KEY = "option"  # of a field's metadata


@dataclass(frozen=True)
class Option:
    """What the command line shows of a config field, and how it completes its value.

    Attributes:
        help: one sentence.
        panel: the panel of the help page that the option is listed in.
        metavar: the placeholder of the value; by default the choices, joined by `|`.
        flag: the option's name; by default the field's, with dashes.
        choices: all values that the field takes; configs refuse any other.
        complete: words that the shell completes, or `"backbones"`, `"weights"`, `"levels"` or `"devices"`; by default
            the choices.
        repeatable: whether the option may be given several times.
    """

    help: str
    panel: str
    metavar: str | None = None
    flag: str | None = None
    choices: tuple[str, ...] = ()
    complete: str | tuple[str, ...] = ()
    repeatable: bool = False


def option(default: Any, help: str, panel: str, **settings: Any) -> Any:  # noqa: A002
    """A dataclass field that is also an option of the command line; `settings` are the attributes of `Option`."""
    return field(default=default, metadata={KEY: Option(help, panel, **settings)})


def like(config: type, name: str, **changes: Any) -> Any:
    """A dataclass field with the default and the option of another config's field.

    Args:
        config: the other config.
        name: of its field.
        changes: what differs: `default`, or attributes of `Option`.
    """
    original = config.__dataclass_fields__[name]  # type: ignore[attr-defined]
    default = changes.pop("default", original.default)
    return field(default=default, metadata={KEY: replace(original.metadata[KEY], **changes)})


def declared_option(field: Field[Any]) -> Option | None:
    """The option that a dataclass field declares; None for a field that is no option."""
    return field.metadata.get(KEY)
