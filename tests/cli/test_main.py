"""Exit codes of errors, and that each is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def broken_info(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fpnx info` fail with an error that no user can cause."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("fpnx.commands.info.open_store", fail)
    monkeypatch.delenv("FPNX_TRACEBACK", raising=False)


@pytest.mark.usefixtures("broken_info")
def test_an_internal_error_is_one_line_and_exit_code_70(fpnx: Run) -> None:
    message = "ZeroDivisionError: by zero (internal error of fpnx; FPNX_TRACEBACK=1 shows where, please report it)"
    code, out, error = fpnx("info", "out.h5")
    assert (code, out) == (70, "")
    assert error.replace("\\n", " ") == f"fpnx: {message}\n"
    code, out, _ = fpnx("info", "out.h5", "--json")
    assert code == 70
    assert json.loads(out)["error"].startswith("ZeroDivisionError")


@pytest.mark.usefixtures("broken_info")
def test_an_internal_error_with_its_traceback(fpnx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPNX_TRACEBACK", "1")
    code, _, error = fpnx("info", "out.h5")
    assert code == 70
    assert "Traceback (most recent call last)" in error
    assert "raise ZeroDivisionError" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "a.png", "--size="), "the value of --size is empty: put one there, or leave the option out"),
        (("extract", "a.png", "", "b.png"), "argument 3, after 'a.png', is empty: put a name there, or leave it out"),
        (
            ("extract", "a.png", "--weights", ""),
            "the value of --weights, or an argument after it, is empty: put one there, or leave it out",
        ),
        (("nonsense",), "(fpnx --help shows what there is)"),
        (("merge", "out.h5"), "(fpnx merge --help shows what there is)"),
        (("extract", "a.png", "--seed", "x"), "(fpnx extract --help shows what there is)"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(fpnx: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, error = fpnx(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("fpnx: ")
    assert error.endswith(f"{message}\n")
    assert error.count("\n") == 1
