"""`draftkit quickstart`: all stages on the embedded target, in a few minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_inputs
from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
    OutOption,
    RecipeOption,
    SetOption,
    recipe_of,
)
from draftkit.output import make_folder
from draftkit.progress import doing

EXAMPLE = "Example: draftkit quickstart --out runs/quickstart --minutes 6"


def command(
    out: OutOption = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(help="time for all stages together", min=1)] = 6,
    recipe: RecipeOption = "tiny-quickstart",
    overrides: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """All stages on the embedded target, in a few minutes."""
    settings = recipe_of(recipe, overrides)
    make_folder(out)
    check_inputs(settings)
    # The machine is this command's alone: cores that wait for the next operation stay awake a few ms longer
    # (libgomp reads this when torch is imported), which makes small training steps 5 to 10 % faster.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000000")
    typer.echo(
        f"a drafter for the embedded target in about {minutes:g} minutes, into {out}: generate, capture, "
        "train, evaluate",
        err=True,
    )
    with doing(LIBRARIES):
        from draftkit.quickstart import run_quickstart

    run_quickstart(settings, out, minutes, json_output)
