"""Mistakes on the command line in one line: what was given, what is allowed, where to read on."""

from __future__ import annotations

from typing import Any

import typer

UsageError: Any = typer.BadParameter.__base__  # Typer brings its own Click, or takes the installed one


def told_in_one_line(error: Any) -> str:
    """The line of a usage error; the whole help where nothing was given."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.format_message())
    said = _said(error).rstrip(".")
    return f"error: {said}; see {error.ctx.command_path} --help" if error.ctx else f"error: {said}"


def _said(error: Any) -> str:
    given = _given(error)
    if getattr(error, "option_name", None) and hasattr(error, "possibilities"):
        near = list(error.possibilities or ())[:1]  # the nearest is first
        return f"{error.option_name}: no such option" + (f", did you mean {near[0]}?" if near else "")
    if given is not None and error.param is not None:
        name = max(error.param.opts, key=len)
        return f"{name} {given['input']}: {_must(given)}"
    return " ".join(str(error.format_message()).split())


def _given(error: Any) -> dict[str, Any] | None:
    """What pydantic, by which newer versions of Typer read values, found wrong."""
    cause = error.__cause__
    return cause.errors()[0] if hasattr(cause, "errors") else None


_KINDS = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}


def _must(given: dict[str, Any]) -> str:
    if given["type"] in _KINDS:
        return f"must be {_KINDS[given['type']]}"
    words = str(given["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    return words.replace("should", "must", 1)
