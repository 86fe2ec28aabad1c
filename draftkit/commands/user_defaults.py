"""A user's own defaults: `$XDG_CONFIG_HOME/draftkit/config.toml`, one table per command, keys as its options.

    [serve]
    target = "smollm2"
    dtype = "bfloat16"

What is typed on the command line wins.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import typer

from draftkit.errors import ConfigError
from draftkit.suggest import nearest

Options = dict[str, dict[str, bool]]  # of each command: by the parameter's names, whether it may be repeated


def config_file() -> Path:
    """Where the file lies, whether it is there or not."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "draftkit" / "config.toml"


def user_defaults(app: typer.Typer) -> dict[str, dict[str, Any]]:
    """Defaults by command and parameter, as Click's `default_map`; empty without a file. Raises ConfigError
    that names the file, the table and the key."""
    path = config_file()
    try:
        told = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); correct it, or remove it") from error
    commands = getattr(typer.main.get_command(app), "commands", {})
    defaults: dict[str, dict[str, Any]] = {}
    for name, table in told.items():
        if name not in commands:
            raise ConfigError(f"{path}: there is no command {name}{nearest(name, commands)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} is {table!r}; write a table, [{name}]")
        defaults[name] = _of_command(commands[name], name, table, path)
    return defaults


def _of_command(command: Any, name: str, table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The table's values by the names of the command's parameters."""
    parameters = {
        option.removeprefix("--"): parameter
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    }
    found: dict[str, Any] = {}
    for key, value in table.items():
        written = key.replace("_", "-")
        if written not in parameters:
            raise ConfigError(f"{path}: {name} has no option --{written}{nearest(written, parameters)}")
        if isinstance(value, dict):
            raise ConfigError(f"{path}: {name}.{key} is a table; give a value as on the command line")
        parameter = parameters[written]
        found[parameter.name] = [value] if parameter.multiple and not isinstance(value, list) else value
    return found
