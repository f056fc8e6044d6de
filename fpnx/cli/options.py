"""Command-line options made from the fields of configs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, fields
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from fpnx.cli.completion import completer
from fpnx.core.option import Option, declared_option

__all__ = ["config_options"]

Command = TypeVar("Command", bound=Callable[..., Any])


def config_options(
    config: type, panels: Sequence[str], only: Collection[str] | None = None
) -> Callable[[Command], Command]:
    """Decorator for a command with `**options`: gives it one option for each field of `config`.

    In each panel, parameters of the command that stand before `*` come first, then those of the config, then the
    command's keyword-only ones.

    Args:
        config: a dataclass with fields that `fpnx.core.option` made.
        panels: the panels of the help page, from top to bottom.
        only: names of the fields to take; by default all.
    """
    hints = get_type_hints(config)
    declared = [(field, declared_option(field)) for field in fields(config) if only is None or field.name in only]
    made = [_parameter(field, each, hints[field.name]) for field, each in declared if each is not None]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        first = [each for each in signature.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
        last = [each for each in signature.parameters.values() if each.kind is each.KEYWORD_ONLY]
        ordered = sorted([*first, *made, *last], key=lambda each: _panel_index(each, panels))
        parameters = [each.replace(kind=each.KEYWORD_ONLY) for each in ordered]
        # Typer reads both.
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _parameter(field: Field[Any], declared: Option, hint: Any) -> inspect.Parameter:
    """A config field as a parameter for Typer. What is not a plain number or flag is text, which configs parse."""
    kinds = set(get_args(hint) or (hint,))
    kind: Any = next((each for each in (bool, int, float) if kinds <= {each, NoneType}), str)
    default = str(field.default) if kind is str and field.default is not None else field.default
    if declared.repeatable:
        kind = list[str]
    info = typer.Option(
        declared.flag or f"--{field.name.replace('_', '-')}",
        help=declared.help,
        metavar=declared.metavar or "|".join(declared.choices) or None,
        rich_help_panel=declared.panel,
        autocompletion=completer(declared.choices or declared.complete, lists=not declared.choices),
    )
    annotation = Annotated[kind | None if NoneType in kinds else kind, info]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _panel_index(parameter: inspect.Parameter, panels: Sequence[str]) -> int:
    """The position of a parameter's panel; -1 for arguments, which have none."""
    info = get_args(parameter.annotation)[1]
    return -1 if info.rich_help_panel is None else panels.index(info.rich_help_panel)
