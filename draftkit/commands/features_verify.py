"""`draftkit features verify`: read a whole feature store and name each record that is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
)
from draftkit.errors import ConfigError
from draftkit.output import as_json
from draftkit.progress import doing
from draftkit.suggest import no_folder

EXAMPLE = "Example: draftkit features verify features --repair"


def command(
    folder: Annotated[Path, typer.Argument(help="feature store")],
    repair: Annotated[
        bool, typer.Option("--repair", help="leave out what is damaged, so that capture writes it again")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Read a whole feature store and name each record that is damaged; exit code 1 where one is."""
    from dataclasses import asdict

    if not folder.is_dir():
        raise ConfigError(f"{folder}: {no_folder(folder, 'a feature store')}")
    with doing(LIBRARIES):
        from draftkit.feature_stages import run_verify

    found = run_verify(folder, repair)
    if json_output:
        typer.echo(as_json(asdict(found)))
    else:
        for line in found.damaged:
            typer.echo(line)
        said = (
            "left out; run the same `draftkit capture` again" if repair else "give --repair to leave them out"
        )
        typer.echo(
            f"{found.records} records, {found.bytes / 1e6:,.1f} MB, {len(found.damaged)} faults"
            + (f": {said}" if found.damaged else "")
        )
    raise typer.Exit(1 if found.damaged and not repair else 0)
