"""The options of the command line are made of the fields of the configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import typer

from fpnx.cli.main import app
from fpnx.cli.options import config_options
from fpnx.core.analysis_config import CompareConfig, ExportConfig, ProbeConfig
from fpnx.core.config import BenchmarkConfig, ExtractConfig, VisualizeConfig
from fpnx.core.option import declared_option, option
from fpnx.core.train_config import TrainConfig

CONFIGS = {
    "extract": ExtractConfig,
    "visualize": VisualizeConfig,
    "benchmark": BenchmarkConfig,
    "compare": CompareConfig,
    "export": ExportConfig,
    "probe": ProbeConfig,
    "train": TrainConfig,
}
Run = Callable[..., Any]


def parameters_of(command: str) -> dict[str, Any]:
    """The parameters of a command, as Typer made them."""
    group: Any = typer.main.get_command(app)
    return {each.name: each for each in group.commands[command].params}


@pytest.mark.parametrize("command", CONFIGS)
def test_every_field_is_an_option_with_its_default(command: str) -> None:
    config, parameters = CONFIGS[command], parameters_of(command)
    for field in dataclasses.fields(config):
        declared = declared_option(field)
        assert declared is not None, f"{field.name} is no option"
        assert parameters[field.name].help == declared.help
        assert declared.help.endswith(".")
        assert len(declared.help) < 90
    defaults = {field.name: parameters[field.name].default for field in dataclasses.fields(config)}
    assert config(**defaults) == config()


@pytest.mark.parametrize("command", CONFIGS)
def test_a_panel_lists_the_options_of_the_command_before_and_after_those_of_the_config(command: str) -> None:
    names = list(parameters_of(command))
    if "output" in names:
        assert names.index("output") < names.index("overwrite") < names.index("json")
    panels = [each.rich_help_panel for each in parameters_of(command).values()]
    runs = [panel for number, panel in enumerate(panels) if number == 0 or panel != panels[number - 1]]
    assert len(runs) == len(set(runs)), "the options of a panel stand together"


@pytest.mark.parametrize("command", [*CONFIGS, "merge", "info", "models", "verify", "list"])
def test_help_shows_every_option_and_every_choice_at_80_columns(
    command: str, fpnx: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = fpnx(command, "--help")
    assert code == 0
    words = out.replace("│", " ").split()
    for each in parameters_of(command).values():
        assert all(flag in words for flag in each.opts if flag.startswith("-"))
        if each.metavar and each.param_type_name == "option":
            assert each.metavar in words, f"the placeholder of {each.opts} is cut"


def test_options_become_values_of_their_types() -> None:
    taken: dict[str, Any] = {}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        depth: int | None = option(None, "Depth.", "Model")
        scale: float = option(0.5, "Scale.", "Model")
        frozen: bool = option(False, "Frozen.", "Run")
        relu: bool | None = option(None, "ReLU.", "Model", flag="--relu/--no-relu")
        size: str | int | tuple[int, int] = option(224, "Size.", "Run")
        names: str | Iterable[str] | None = option(None, "Names.", "Run", repeatable=True)
        internal: int = 3

    program = typer.Typer()

    @program.command()
    @config_options(Config, ["Model", "Run"])
    def command(**options: Any) -> None:
        taken.update(options)

    def run(line: str) -> dict[str, Any]:
        taken.clear()
        program(line.split(), standalone_mode=False)
        return dict(taken)

    bare = run("")
    assert not bare.pop("names")
    assert bare == {"depth": None, "scale": 0.5, "frozen": False, "relu": None, "size": "224"}
    assert run("--depth 3 --scale 2 --frozen --no-relu --size 32x64 --names a --names b") == {
        "depth": 3, "scale": 2.0, "frozen": True, "relu": False, "size": "32x64", "names": ["a", "b"],
    }  # fmt: skip


def test_a_part_of_a_config() -> None:
    @config_options(ExtractConfig, ["Model", "Run"], only=["device", "offline"])
    def command(**options: Any) -> None: ...

    assert list(command.__annotations__) == ["offline", "device"]


def test_an_option_out_of_every_panel_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="'Run' is not in list"):
        config_options(ExtractConfig, ["Model"], only=["device"])(lambda **options: None)
